// The matrix products of a tile of keys with a panel of queries, in two engines with one interface:
//
//   DirectProduct   float, double: register-blocked multiply-adds on the tile as it lies in memory
//   LibraryProduct  bfloat16, float16 on chips with matrix or dot-product units: ATen's brgemm (oneDNN),
//                   which accumulates in float32
//
// An engine turns kPanel query rows into an `Operand` (pack), takes in a tile of keys (load), and then gives
//
//   similarities:     out (keys x panel)  = N (keys x D) . q^T (D x panel)
//   accumulate:       grad (D x panel)   += N^T (D x keys) . g (keys x panel)
//   accumulate_keys:  grad (keys x D)    += g (keys x panel) . q (panel x D), with q from pack_rows; the last
//                     may be added by finish_keys only
//
// Keys come first in `out`, so the lanes of a vector are query rows: statistics of a row never cross lanes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <type_traits>
#include <utility>

#include "matrix.h"

namespace contrastive_ops {

inline constexpr int64_t kTaskOperations = 1 << 21;  // multiply-adds that are worth a thread

// out (kRows x kPanel) = or += a (kRows x depth) . b (depth x kPanel), with the sums in registers.
template <int kRows, bool kAdd, typename T>
inline void product_block(int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b, T* out) {
  constexpr int64_t kW = kWidth<T>;
  Vec<T> sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = Vec<T>(T(0));
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> b0 = Vec<T>::loadu(b + k * kPanel<T>);
    const Vec<T> b1 = Vec<T>::loadu(b + k * kPanel<T> + kW);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> broadcast(a[r * a_row + k * a_depth]);
      sum[r][0] = at::vec::fmadd(broadcast, b0, sum[r][0]);
      sum[r][1] = at::vec::fmadd(broadcast, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      T* to = out + r * kPanel<T> + half * kW;
      (kAdd ? Vec<T>::loadu(to) + sum[r][half] : sum[r][half]).store(to);
    }
}

// Numbers that lie one after another and are to be multiplied next: they are brought into the second-level
// cache meanwhile, in parts. The chip's own prefetching ends with each page of memory, which is eight rows of
// 128 floats.
template <typename T>
class Ahead {
 public:
  Ahead() = default;
  explicit Ahead(const Matrix& rows) {
    const bool in_one_piece = rows.column_stride == 1 && rows.row_stride == rows.columns;
    if (in_one_piece && rows.dtype == c10::CppTypeToScalarType<T>::value)
      from_ = static_cast<const T*>(rows.data), left_ = rows.rows * rows.columns;
  }

  // How many numbers it takes a time to be done after so many.
  int64_t part(int64_t times) const { return at::divup(left_, times); }

  void fetch(int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    count = std::min(count, left_);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from_ + i, 0, 2);
    from_ += count, left_ -= count;
  }

 private:
  const T* from_ = nullptr;
  int64_t left_ = 0;
};

// Terms that are summed one after another. Longer sums are made of such chains, or their error would grow
// with the square root of the length: at D = 128 chains of 32 halve the error, for 2 % of the time.
inline constexpr int64_t kChain = 32;

// What is ahead is fetched meanwhile.
template <bool kAdd, typename T>
void product(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b, T* out,
             Ahead<T>& ahead) {
  // As many sums as leave registers for the operands: 16 of 32, or 12 of the 16 that AVX2 and SSE have.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
  constexpr int kBlock = 8;
#else
  constexpr int kBlock = 6;
#endif
  const int64_t part = ahead.part(at::divup(rows, kBlock) * at::divup(depth, kChain));
  const auto rows_of = [&]<int kRows>(int64_t r) {
    const T* row = a + r * a_row;
    T* to = out + r * kPanel<T>;
    const auto chain = [&]<bool kAddTo>(int64_t first, int64_t terms) {
      ahead.fetch(part);
      product_block<kRows, kAddTo>(terms, row + first * a_depth, a_row, a_depth, b + first * kPanel<T>, to);
    };
    int64_t done = std::min(depth, kChain);
    chain.template operator()<kAdd>(0, done);
    for (; done < depth; done += kChain)
      chain.template operator()<true>(done, std::min(depth - done, kChain));
  };
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) rows_of.template operator()<kBlock>(r);
  for (; r + 4 <= rows; r += 4) rows_of.template operator()<4>(r);
  for (; r < rows; ++r) rows_of.template operator()<1>(r);
}

template <typename T>
class DirectProduct {
 public:
  using Sum = T;
  using Operand = T;
  // At most so many keys a tile. With D = 128 a float tile is 48 KiB; the similarities of a panel to it, with
  // query and key, are 24 KiB and stay in the first-level cache.
  static constexpr int64_t kTile = 96;
  // Whether a product takes longer than to write and read what it gives.
  static constexpr bool kDearerThanMemory = true;
  static int64_t padded_dim(int64_t dim) { return dim; }
  static int64_t packed_rows_elements(int64_t dim) { return chunks(dim) * kPanel<T> * kPanel<T>; }
  static int64_t keys_grad_elements(int64_t dim) { return chunks(dim) * kTile * kPanel<T>; }

  explicit DirectProduct(int64_t dim) : dim_(dim) {}

  // rows (kPanel x dim) -> (dim x kPanel)
  static void pack(const T* rows, int64_t dim, Operand* out) {
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t r = 0; r < kPanel<T>; ++r) out[d * kPanel<T> + r] = rows[r * dim + d];
  }

  // rows (kPanel x dim) -> chunks of dimensions, (kPanel x kPanel) each, the last padded with zeros
  static void pack_rows(const T* rows, int64_t dim, Operand* out) {
    for (int64_t chunk = 0; chunk < chunks(dim); ++chunk)
      for (int64_t r = 0; r < kPanel<T>; ++r)
        for (int64_t i = 0; i < kPanel<T>; ++i) {
          const int64_t d = chunk * kPanel<T> + i;
          *out++ = d < dim ? rows[r * dim + d] : T(0);
        }
  }

  // `next` is the tile that is to be loaded after this one, if there is one.
  void load(const Matrix& keys, bool /*transposed_too*/, const Matrix* next = nullptr) {
    count_ = keys.rows;
    ahead_ = next ? Ahead<T>(*next) : Ahead<T>();
    if (keys.dtype == c10::CppTypeToScalarType<T>::value && keys.column_stride == 1) {
      tile_ = static_cast<const T*>(keys.data);
      row_stride_ = keys.row_stride, column_stride_ = 1;
      return;
    }
    // Converted, and gathered where the strides would jump through memory.
    const bool by_column = keys.row_stride == 1 && keys.column_stride != 1;
    row_stride_ = by_column ? 1 : dim_;
    column_stride_ = by_column ? kTile : 1;
    copied_.resize(kTile * dim_);
    copy(keys, copied_.data(), row_stride_, column_stride_);
    tile_ = copied_.data();
  }

  void similarities(const Operand* queries, T* out) {
    product<false>(count_, dim_, tile_, row_stride_, column_stride_, queries, out, ahead_);
  }

  void accumulate(const T* weights, T* grad) {
    product<true>(dim_, count_, tile_, column_stride_, row_stride_, weights, grad, ahead_);
  }

  void accumulate_keys(const T* weights, const Operand* rows, T* grad) {
    for (int64_t chunk = 0; chunk < chunks(dim_); ++chunk)
      product<true>(count_, kPanel<T>, weights, kPanel<T>, 1, rows + chunk * kPanel<T> * kPanel<T>,
                    grad + chunk * kTile * kPanel<T>, ahead_);
  }

  void finish_keys(T* /*grad*/) {}

  // A key's row of what accumulate_keys has made.
  void copy_key_grad(const T* grad, int64_t key, T* out) const {
    for (int64_t d = 0; d < dim_; d += kPanel<T>)
      std::copy_n(grad + (d * kTile) + key * kPanel<T>, std::min(kPanel<T>, dim_ - d), out + d);
  }

 private:
  static int64_t chunks(int64_t dim) { return at::divup(dim, kPanel<T>); }

  int64_t dim_, count_ = 0, row_stride_ = 0, column_stride_ = 0;
  Array<T> copied_;
  const T* tile_ = nullptr;
  Ahead<T> ahead_;
};

// brgemm takes its right operand with pairs of rows interleaved: [depth / 2][columns][2].
template <typename T>
class LibraryProduct {
 public:
  using Sum = float;
  using Operand = T;
  // Twice as many as of floats: a tile takes as much memory, and the library is called half as often, which
  // is a tenth of the time of products this small.
  static constexpr int64_t kTile = 192;
  static constexpr bool kDearerThanMemory = false;
  static constexpr int64_t kColumns = kPanel<float>;
  static int64_t padded_dim(int64_t dim) { return dim + dim % 2; }
  static int64_t packed_rows_elements(int64_t dim) { return kColumns * dim; }
  static int64_t keys_grad_elements(int64_t dim) { return kTile * dim; }

  explicit LibraryProduct(int64_t dim)
      : dim_(dim),
        depth_(padded_dim(dim)),
        memory_(kTile * (2 * depth_ + kColumns)),
        rows_(memory_.data()),
        columns_(rows_ + kTile * depth_),
        weights_(columns_ + kTile * depth_) {}

  // Whether this chip multiplies T in hardware and the library lets us at it (it does not where oneDNN is
  // switched off or held back to an older instruction set: then brgemm throws), and takes pairs of rows as we
  // give them: float16 it does on AMX alone, and elsewhere reads the same memory as whole rows.
  static bool available() {
    static const bool answer = [] {
#if defined(__x86_64__)
      // Below this the library emulates bfloat16, slower than float.
      if (std::is_same_v<T, at::BFloat16> && !__builtin_cpu_supports("avx512bf16")) return false;
      try {
        constexpr int64_t kDepth = 4;
        float rows[kDepth * kColumns], out[kColumns];
        T left[kDepth], right[kDepth * kColumns];
        for (int64_t d = 0; d < kDepth; ++d) {
          left[d] = T(float(1 << d));
          for (int64_t r = 0; r < kColumns; ++r) rows[r * kDepth + d] = float((d + r) % 3);
        }
        pack(rows, kDepth, right);
        at::native::cpublas::brgemm(1, kColumns, kDepth, kDepth, kColumns, kColumns, false, left, right, out);
        at::native::cpublas::brgemm_release();
        for (int64_t r = 0; r < kColumns; ++r) {
          float sum = 0;
          for (int64_t d = 0; d < kDepth; ++d) sum += float(left[d]) * rows[r * kDepth + d];
          if (out[r] != sum) return false;
        }
        return true;
      } catch (const c10::Error&) {
      }
#endif
      return false;
    }();
    return answer;
  }

  ~LibraryProduct() { at::native::cpublas::brgemm_release(); }
  LibraryProduct(const LibraryProduct&) = delete;
  LibraryProduct& operator=(const LibraryProduct&) = delete;

  static void pack(const float* rows, int64_t dim, Operand* out) {
    for (int64_t d = 0; d < padded_dim(dim); ++d)
      for (int64_t r = 0; r < kColumns; ++r)
        out[(d / 2 * kColumns + r) * 2 + d % 2] = d < dim ? static_cast<T>(rows[r * dim + d]) : T(0);
  }

  // rows (kPanel x dim) -> [kPanel / 2][dim][2]
  static void pack_rows(const float* rows, int64_t dim, Operand* out) {
    for (int64_t r = 0; r < kColumns; ++r)
      for (int64_t d = 0; d < dim; ++d)
        out[(r / 2 * dim + d) * 2 + r % 2] = static_cast<T>(rows[r * dim + d]);
  }

  // `transposed_too` must be set before `accumulate`.
  void load(const Matrix& keys, bool transposed_too, const Matrix* /*next*/ = nullptr) {
    count_ = keys.rows;
    const bool same = keys.dtype == c10::CppTypeToScalarType<T>::value;
    if (keys.row_stride == 1 && keys.column_stride != 1) {
      copy(keys, columns_, 1, columns_stride());
      pad_columns();
      transpose(columns_, columns_stride(), rows_, depth_, depth_, count_);
      tile_ = rows_, tile_stride_ = depth_;
      return;
    }
    if (same && keys.column_stride == 1 && depth_ == dim_) {
      tile_ = static_cast<const T*>(keys.data), tile_stride_ = keys.row_stride;
    } else {
      copy(keys, rows_, depth_, 1);
      if (depth_ != dim_)
        for (int64_t i = 0; i < count_; ++i) rows_[i * depth_ + dim_] = T(0);
      tile_ = rows_, tile_stride_ = depth_;
    }
    if (transposed_too) {
      transpose(tile_, tile_stride_, columns_, columns_stride(), count_, dim_);
      pad_columns();
    }
  }

  void similarities(const Operand* queries, float* out) const {
    at::native::cpublas::brgemm(count_, kColumns, depth_, tile_stride_, kColumns, kColumns, false, tile_,
                                queries, out);
  }

  void accumulate(const float* weights, float* grad) {
    constexpr int64_t kW = kWidth<float>;
    for (int64_t i = 0; i < count_; i += 2)
      for (int64_t r = 0; r < kColumns; r += kW) {
        const auto even = Vec<float>::loadu(weights + i * kColumns + r);
        const auto odd =
            i + 1 < count_ ? Vec<float>::loadu(weights + (i + 1) * kColumns + r) : Vec<float>(0.f);
        const auto [low, high] = at::vec::interleave2(even, odd);
        at::vec::convert_from_float<T>(low, high).store(weights_ + i * kColumns + 2 * r);
      }
    at::native::cpublas::brgemm(dim_, kColumns, count_ + count_ % 2, columns_stride(), kColumns, kColumns,
                                true, columns_, weights_, grad);
  }

  // Several panels that lie one after another are multiplied at once: with one at a time, what takes longest
  // is to read and write `grad`.
  void accumulate_keys(const float* weights, const Operand* rows, float* grad) {
    const bool follows = rows == waiting_rows_ + waiting_ * packed_rows_elements(dim_);
    if (waiting_ == kTogether || !follows) finish_keys(grad);
    if (waiting_ == 0) waiting_rows_ = rows;
    constexpr int64_t kStride = kTogether * kColumns, kW = kWidth<float>;
    waiting_weights_.resize(kTile * kStride);
    T* to = &waiting_weights_[waiting_++ * kColumns];
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t r = 0; r < kColumns; r += 2 * kW) {
        const float* from = weights + i * kColumns + r;
        at::vec::convert_from_float<T>(Vec<float>::loadu(from), Vec<float>::loadu(from + kW))
            .store(to + i * kStride + r);
      }
  }

  void finish_keys(float* grad) {
    const int64_t depth = std::exchange(waiting_, 0) * kColumns;
    if (depth > 0)
      at::native::cpublas::brgemm(count_, dim_, depth, kTogether * kColumns, dim_, dim_, true,
                                  waiting_weights_.data(), waiting_rows_, grad);
  }

  // A key's row of what accumulate_keys has made.
  void copy_key_grad(const float* grad, int64_t key, float* out) const {
    std::copy_n(grad + key * dim_, dim_, out);
  }

 private:
  static void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows,
                        int64_t columns) {
    constexpr int64_t kBlock = 16;
    using Bits = at::BFloat16;  // any 16-bit type: nothing is computed
    const auto* from = reinterpret_cast<const Bits*>(in);
    auto* to = reinterpret_cast<Bits*>(out);
    for (int64_t i = 0; i < rows; i += kBlock)
      for (int64_t j = 0; j < columns; j += kBlock) {
        if (i + kBlock <= rows && j + kBlock <= columns) {
          at::vec::transpose_mxn<Bits, kBlock, kBlock>(from + i * in_stride + j, in_stride,
                                                       to + j * out_stride + i, out_stride);
          continue;
        }
        for (int64_t r = i; r < std::min(i + kBlock, rows); ++r)
          for (int64_t c = j; c < std::min(j + kBlock, columns); ++c)
            to[c * out_stride + r] = from[r * in_stride + c];
      }
  }

  // Of the transpose's rows, in whole lines of the cache.
  int64_t columns_stride() const { return at::divup(count_, 32) * 32; }

  // The odd key out is paired with a weight of 0: what it holds must be finite.
  void pad_columns() {
    if (count_ % 2)
      for (int64_t d = 0; d < dim_; ++d) columns_[d * columns_stride() + count_] = T(0);
    if (depth_ != dim_) std::fill_n(columns_ + dim_ * columns_stride(), columns_stride(), T(0));
  }

  static constexpr int64_t kTogether = 4;  // panels that accumulate_keys multiplies at once

  int64_t dim_, depth_, count_ = 0, tile_stride_ = 0, waiting_ = 0;
  Array<T> memory_, waiting_weights_;
  const Operand* waiting_rows_ = nullptr;
  T *rows_, *columns_, *weights_;  // a tile, its transpose, and what is to be multiplied with it
  const T* tile_ = nullptr;
};

// Calls `function` with the engine that multiplies rows of a dtype; half precision in hardware if allowed.
template <typename Function>
auto with_product(at::ScalarType dtype, bool half_precision, const Function& function) {
  if (dtype == at::kDouble) return function(std::type_identity<DirectProduct<double>>{});
  if (half_precision && dtype == at::kBFloat16 && LibraryProduct<at::BFloat16>::available())
    return function(std::type_identity<LibraryProduct<at::BFloat16>>{});
  if (half_precision && dtype == at::kHalf && LibraryProduct<at::Half>::available())
    return function(std::type_identity<LibraryProduct<at::Half>>{});
  return function(std::type_identity<DirectProduct<float>>{});
}

}  // namespace contrastive_ops
