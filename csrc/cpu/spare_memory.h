// Memory that one call leaves to the next. What a system hands out anew it hands out page by page, as it is
// touched: at 32 MiB that takes longer than to compute what is written there.
#pragma once

#include <atomic>
#include <cstddef>
#include <utility>

#include "matrix.h"

namespace contrastive_ops {

// So many bytes, not set to anything. One piece of memory at a time waits for who wants it next; of two calls
// at once, one allocates another. What waits when the process ends is left to the system.
class SpareMemory {
 public:
  explicit SpareMemory(size_t bytes) : piece_(waiting_.exchange(nullptr)) {
    if (piece_ && piece_->size >= bytes) return;
    delete std::exchange(piece_, nullptr);
    piece_ = new Piece{bytes};
  }

  ~SpareMemory() { delete waiting_.exchange(piece_); }
  SpareMemory(const SpareMemory&) = delete;
  SpareMemory& operator=(const SpareMemory&) = delete;

  void* data() const { return piece_->memory; }

 private:
  struct Piece {
    explicit Piece(size_t size) : size(size), memory(LineAllocator<std::byte>().allocate(size)) {}
    ~Piece() { LineAllocator<std::byte>().deallocate(memory, size); }

    const size_t size;
    std::byte* const memory;
  };

  static inline std::atomic<Piece*> waiting_ = nullptr;

  Piece* piece_;
};

// Memory of a tensor, which waits for another call when nobody has the tensor any more.
inline at::Storage spare_storage(size_t bytes) {
  auto* memory = new SpareMemory(bytes);
  const auto give_back = [](void* memory) { delete static_cast<SpareMemory*>(memory); };
  at::DataPtr data(memory->data(), memory, give_back, at::kCPU);
  return at::Storage(at::Storage::use_byte_size_t(), bytes, std::move(data), nullptr, false);
}

}  // namespace contrastive_ops
