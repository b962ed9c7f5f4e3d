// Memory that one call leaves to the next. What a system hands out anew it hands out page by page, as it is
// touched: at 32 MiB that takes longer than to compute what is written there.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <utility>

#include "matrix.h"

namespace contrastive_ops {

// So many bytes, not set to anything. A few pieces of memory at a time wait for who wants them next, those
// that came last. What waits when the process ends is left to the system.
class SpareMemory {
 public:
  explicit SpareMemory(size_t bytes) : piece_(take(bytes)) {
    if (piece_ == nullptr) piece_ = new Piece{bytes};
  }

  ~SpareMemory() { leave(piece_); }
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

  // One that is large enough, and not twice as large; none if none waits.
  static Piece* take(size_t bytes) {
    for (auto& place : waiting_) {
      Piece* piece = place.exchange(nullptr);
      if (piece == nullptr) continue;
      if (piece->size >= bytes && piece->size / 2 < bytes) return piece;
      leave(piece);
    }
    return nullptr;
  }

  static void leave(Piece* piece) {
    for (auto& place : waiting_) {
      Piece* nothing = nullptr;
      if (place.compare_exchange_strong(nothing, piece)) return;
    }
    for (auto& place : waiting_) piece = place.exchange(piece);  // all move on by one
    delete piece;
  }

  static inline std::array<std::atomic<Piece*>, 3> waiting_{};

  Piece* piece_;
};

// Memory of a tensor, which waits for another call when nobody has the tensor any more.
inline at::Storage spare_storage(size_t bytes) {
  auto* memory = new SpareMemory(bytes);
  const auto give_back = [](void* memory) { delete static_cast<SpareMemory*>(memory); };
  at::DataPtr data(memory->data(), memory, give_back, at::kCPU);
  return at::Storage(at::Storage::use_byte_size_t(), bytes, std::move(data), c10::GetAllocator(at::kCPU),
                     true);
}

// As `empty`. Small tensors have memory from the heap, which is there; of large ones no memory is kept.
inline at::Tensor spare_empty(at::IntArrayRef shape, at::ScalarType dtype) {
  constexpr int64_t kLeastBytes = 256 << 10, kMostBytes = 32 << 20;
  const int64_t bytes = c10::multiply_integers(shape) * static_cast<int64_t>(c10::elementSize(dtype));
  if (bytes < kLeastBytes || bytes > kMostBytes) return empty(shape, dtype);
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      spare_storage(bytes), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
  return tensor;
}

}  // namespace contrastive_ops
