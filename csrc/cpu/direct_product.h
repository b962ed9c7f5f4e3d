// Products by multiply-adds of vectors.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "matrix.h"

namespace contrastive_ops {

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

  static constexpr int64_t kLine = 64 / sizeof(T);  // numbers of a line of the cache

  void fetch(int64_t count) {
    count = std::min(count, left_);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from_ + i, 0, 2);
    from_ += count, left_ -= count;
  }

  // As much as arithmetic of a few hundred cycles hides.
  void fetch_some() { fetch(32 * kLine); }

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

// A tile of keys in the dtype T, along whichever side is contiguous.
template <typename T>
struct Tile {
  const T* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  bool by_column = false;

  Tile() = default;

  // At most `most` keys: as they lie, or converted, and gathered where the strides would jump through memory,
  // into `copied`.
  Tile(const Matrix& keys, int64_t most, Array<T>& copied) {
    if (keys.dtype == c10::CppTypeToScalarType<T>::value && keys.column_stride == 1) {
      data = static_cast<const T*>(keys.data);
      row_stride = keys.row_stride, column_stride = 1;
      return;
    }
    by_column = keys.row_stride == 1 && keys.column_stride != 1;
    row_stride = by_column ? 1 : keys.columns;
    column_stride = by_column ? most : 1;
    copied.resize(most * keys.columns);
    copy(keys, copied.data(), row_stride, column_stride);
    data = copied.data();
  }

  int64_t long_stride() const { return by_column ? column_stride : row_stride; }
};

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
  static int64_t packed_elements(int64_t dim) { return dim * kPanel<T>; }
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
  void load(const Matrix& keys, const Matrix* next = nullptr) {
    count_ = keys.rows;
    ahead_ = next ? Ahead<T>(*next) : Ahead<T>();
    tile_ = Tile<T>(keys, kTile, copied_);
  }

  void similarities(const Operand* queries, T* out) {
    product<false>(count_, dim_, tile_.data, tile_.row_stride, tile_.column_stride, queries, out, ahead_);
  }

  void accumulate(const T* weights, T* grad) {
    product<true>(dim_, count_, tile_.data, tile_.column_stride, tile_.row_stride, weights, grad, ahead_);
  }

  void accumulate_keys(const T* weights, const Operand* rows, T* grad) {
    for (int64_t chunk = 0; chunk < chunks(dim_); ++chunk)
      product<true>(count_, kPanel<T>, weights, kPanel<T>, 1, rows + chunk * kPanel<T> * kPanel<T>,
                    grad + chunk * kTile * kPanel<T>, ahead_);
  }

  void finish_keys(T* /*grad*/) {}

  void fetch_ahead() {}  // the first product has

  // A key's row of what accumulate_keys has made.
  void copy_key_grad(const T* grad, int64_t key, T* out) const {
    for (int64_t d = 0; d < dim_; d += kPanel<T>)
      std::copy_n(grad + (d * kTile) + key * kPanel<T>, std::min(kPanel<T>, dim_ - d), out + d);
  }

 private:
  static int64_t chunks(int64_t dim) { return at::divup(dim, kPanel<T>); }

  int64_t dim_, count_ = 0;
  Array<T> copied_;
  Tile<T> tile_;
  Ahead<T> ahead_;
};

}  // namespace contrastive_ops
