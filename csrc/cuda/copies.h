// Tiles of rows on their way from global to shared memory, 16 bytes at a time, while others are multiplied.
//
#pragma once

#include "numbers.h"

namespace contrastive_ops {

// A row has 16 bytes more than its numbers take. The 16 bytes that 8 rows have at one place then lie in 8
// different groups of banks, so matrices of 8 x 16 bytes are read without conflicts.
template <int kRows, int kRowBytes>
struct Padded {
  static constexpr int kStride = kRowBytes + kChunk, kBytes = kRows * kStride, kAlignment = kChunk;
  static constexpr int kPeriod = 1;  // rows that are so many apart, or a multiple, differ by the stride alone

  __device__ static int offset(int row, int chunk) { return row * kStride + chunk * kChunk; }
};

#if __CUDA_ARCH__ >= 800
constexpr bool kHasAsyncCopies = true;
#else
constexpr bool kHasAsyncCopies = false;
#endif

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes, or writes zeros where `is_inside` is false; then nothing is read.
__device__ inline void copy_async(unsigned to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
}
__device__ inline void copy_async(unsigned to, const void* from, bool is_inside) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_inside ? 16 : 0)
               : "memory");
#endif
}

__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until no more than the youngest `kLeft` groups of this thread's copies are in flight.
template <int kLeft>
__device__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// Copies (kRows, kDepth) numbers of a matrix to shared memory, rounded to `Operand`, with zeros outside.
// Where they lie is told by a `Layout`.
//
// kVectors says that rows are stored as they are multiplied, 16 bytes at a time: in the same dtype, their
// numbers lie together, and every row begins at a multiple of 16 bytes and ends at one. These need no
// register from compute capability 8.0 on. All others are loaded number by number, and only where they land,
// for one that is in flight takes a register: other programs compute meanwhile. A thread has 16 bytes of a
// row, and its neighbours those of the next rows, as they lie together in the order of MoCo's (D, K) queue.
template <typename Operand, typename T, bool kVectors, int kRows, int kDepth, int kThreads, typename Layout>
class TileCopy {
  static constexpr int kNumbers = kChunk / sizeof(Operand);  // of a chunk
  static constexpr int kChunksARow = kDepth / kNumbers;
  static constexpr int kChunks = kRows * kChunksARow;
  static constexpr int kEach = (kChunks + kThreads - 1) / kThreads;
  static constexpr bool kIsWhole = kChunks % kThreads == 0;

 public:
  static constexpr bool kAsync = kVectors && kHasAsyncCopies;

  // Begins to copy what `land` writes to shared memory, unless the copy is asynchronous and does by itself.
  __device__ void begin(unsigned char* to, const Rows<T>& from, int64 first_row, int64 first_column) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kVectors) {
      // A thread's chunks have one place in their rows, which are kRowStep apart.
      constexpr int kRowStep = kThreads / kChunksARow;
      static_assert(kThreads % kChunksARow == 0);
      const int row = row_of(thread), place = place_of(thread);
      const int64 left = from.count - first_row - row, column = first_column + column_of(thread);
      const T* source = from.matrix.data + (first_row + row) * from.matrix.row + column;
      const int64 step = kRowStep * from.matrix.row;
      const bool has_column = column < from.dim;
      const unsigned first = shared_address(to + Layout::offset(row, place));
      const auto address = [&](int i) {
        if constexpr (kRowStep % Layout::kPeriod == 0) return first + i * kRowStep * Layout::kStride;
        return shared_address(to + Layout::offset(row + i * kRowStep, place));
      };
      if (kIsWhole && from.count - first_row >= kRows && first_column + kDepth <= from.dim) {
#pragma unroll
        for (int i = 0; i < kEach; ++i, source += step) {
          if constexpr (kAsync)
            copy_async(address(i), source);
          else
            held_[i] = __ldg(reinterpret_cast<const uint4*>(source));
        }
      } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i, source += step) {
          if (!kIsWhole && i * kThreads + thread >= kChunks) break;
          const bool inside = has_column && i * kRowStep < left;
          if constexpr (kAsync)
            copy_async(address(i), inside ? source : from.matrix.data, inside);
          else
            held_[i] = inside ? __ldg(reinterpret_cast<const uint4*>(source)) : make_uint4(0, 0, 0, 0);
        }
      }
    } else {
      first_row_ = first_row, first_column_ = first_column;
    }
  }

  __device__ void land(unsigned char* to, const Rows<T>& from) const {
    if constexpr (!kVectors) {
#pragma unroll 2
      for (int chunk = static_cast<int>(threadIdx.x); chunk < kChunks; chunk += kThreads)
        *reinterpret_cast<uint4*>(to + offset_of(chunk)) =
            gather(from, first_row_ + row_of(chunk), first_column_ + column_of(chunk));
    } else if constexpr (!kAsync) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int chunk = i * kThreads + static_cast<int>(threadIdx.x);
        if (!kIsWhole && chunk >= kChunks) break;
        *reinterpret_cast<uint4*>(to + offset_of(chunk)) = held_[i];
      }
    }
  }

 private:
  __device__ static int row_of(int chunk) { return kVectors ? chunk / kChunksARow : chunk % kRows; }
  __device__ static int place_of(int chunk) { return kVectors ? chunk % kChunksARow : chunk / kRows; }
  __device__ static int column_of(int chunk) { return kNumbers * place_of(chunk); }
  __device__ static int offset_of(int chunk) { return Layout::offset(row_of(chunk), place_of(chunk)); }

  __device__ static uint4 gather(const Rows<T>& from, int64 row, int64 column) {
    Operand numbers[kNumbers];
    const T* source = from.matrix.data + row * from.matrix.row;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i)
      numbers[i] = from.has(row, column + i) ? to_operand<Operand>(source[(column + i) * from.matrix.column])
                                             : from_float<Operand>(0.f);
    if constexpr (sizeof(Operand) == 4)
      return make_uint4(__float_as_uint(numbers[0]), __float_as_uint(numbers[1]), __float_as_uint(numbers[2]),
                        __float_as_uint(numbers[3]));
    else
      return make_uint4(pack(numbers[0].bits, numbers[1].bits), pack(numbers[2].bits, numbers[3].bits),
                        pack(numbers[4].bits, numbers[5].bits), pack(numbers[6].bits, numbers[7].bits));
  }

  uint4 held_[kVectors && !kAsync ? kEach : 1];
  int64 first_row_, first_column_;
};

}  // namespace contrastive_ops
