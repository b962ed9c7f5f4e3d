// Memory that one call leaves to the next. What a system hands out anew it hands out page by page, as it is
// touched: at 32 MiB that takes longer than to compute what is written there.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <utility>

namespace contrastive_ops {

// So many bytes, not set to anything. One piece of memory at a time waits for who wants it next; of two calls
// at once, one allocates another. What waits when the process ends is left to the system.
class SpareMemory {
 public:
  explicit SpareMemory(size_t bytes) : piece_(waiting_.exchange(nullptr)) {
    if (piece_ && piece_->size >= bytes) return;
    delete std::exchange(piece_, nullptr);
    piece_ = new Piece{std::make_unique_for_overwrite<std::byte[]>(bytes), bytes};
  }

  ~SpareMemory() { delete waiting_.exchange(piece_); }
  SpareMemory(const SpareMemory&) = delete;
  SpareMemory& operator=(const SpareMemory&) = delete;

  void* data() const { return piece_->memory.get(); }

 private:
  struct Piece {
    std::unique_ptr<std::byte[]> memory;
    size_t size;
  };

  static inline std::atomic<Piece*> waiting_ = nullptr;

  Piece* piece_;
};

}  // namespace contrastive_ops
