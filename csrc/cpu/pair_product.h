// Products of tiles in half precision, by pairs of terms.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "direct_product.h"
#include "pairs.h"

namespace contrastive_ops {

template <typename T>
class PairProduct {
 public:
  using Sum = float;
  using Operand = T;
  // Twice as many as of floats, in as much memory.
  static constexpr int64_t kTile = 192;
  // As DirectProduct's; but AMX, which multiplies float16, is as fast as memory.
  static constexpr bool kDearerThanMemory = std::is_same_v<T, at::BFloat16>;
  static constexpr int64_t kColumns = kPanel<float>;
  static int64_t packed_elements(int64_t dim) { return padded_dim(dim) * kColumns; }
  static int64_t packed_rows_elements(int64_t dim) { return kColumns * dim; }
  static int64_t keys_grad_elements(int64_t dim) { return kTile * dim; }

  explicit PairProduct(int64_t dim)
      : dim_(dim),
        depth_(padded_dim(dim)),
        memory_(kTile * (2 * depth_ + kColumns)),
        rows_(memory_.data()),
        columns_(rows_ + kTile * depth_),
        weights_(columns_ + kTile * depth_) {}

  static bool available() { return pairs::available<T>(); }

  ~PairProduct() {
    if (std::is_same_v<T, at::Half>) at::native::cpublas::brgemm_release();
  }
  PairProduct(const PairProduct&) = delete;
  PairProduct& operator=(const PairProduct&) = delete;

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

  void load(const Matrix& keys, const Matrix* next = nullptr) {
    count_ = keys.rows;
    ahead_ = next ? Ahead<T>(*next) : Ahead<T>();
    const bool same = keys.dtype == c10::CppTypeToScalarType<T>::value;
    if (keys.row_stride == 1 && keys.column_stride != 1) {
      copy(keys, columns_, 1, columns_stride());
      pad_columns();
      transpose(columns_, columns_stride(), rows_, depth_, depth_, count_);
      tile_ = rows_, tile_stride_ = depth_;
      has_columns_ = true;
      return;
    }
    has_columns_ = false;
    if (same && keys.column_stride == 1 && depth_ == dim_) {
      tile_ = static_cast<const T*>(keys.data), tile_stride_ = keys.row_stride;
      return;
    }
    copy(keys, rows_, depth_, 1);
    if (depth_ != dim_)
      for (int64_t i = 0; i < count_; ++i) rows_[i * depth_ + dim_] = T(0);
    tile_ = rows_, tile_stride_ = depth_;
  }

  void similarities(const Operand* queries, float* out) const {
    pairs::multiply<false>(count_, kColumns, depth_,
                           pairs::Operands<T>{tile_, queries, tile_stride_, 2 * kColumns}, out, kColumns);
  }

  void accumulate(const float* weights, float* grad) {
    if (!std::exchange(has_columns_, true)) {
      transpose(tile_, tile_stride_, columns_, columns_stride(), count_, dim_);
      pad_columns();
    }
    constexpr int64_t kW = kWidth<float>;
    for (int64_t i = 0; i < count_; i += 2)
      for (int64_t r = 0; r < kColumns; r += kW) {
        const auto even = Vec<float>::loadu(weights + i * kColumns + r);
        const auto odd =
            i + 1 < count_ ? Vec<float>::loadu(weights + (i + 1) * kColumns + r) : Vec<float>(0.f);
        const auto [low, high] = at::vec::interleave2(even, odd);
        at::vec::convert_from_float<T>(low, high).store(weights_ + i * kColumns + 2 * r);
      }
    pairs::multiply<true>(dim_, kColumns, count_ + count_ % 2,
                          pairs::Operands<T>{columns_, weights_, columns_stride(), 2 * kColumns}, grad,
                          kColumns);
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
      pairs::multiply<true>(
          count_, dim_, depth,
          pairs::Operands<T>{waiting_weights_.data(), waiting_rows_, kTogether * kColumns, 2 * dim_}, grad,
          dim_);
  }

  void fetch_ahead() { ahead_.fetch_some(); }

  // A key's row of what accumulate_keys has made.
  void copy_key_grad(const float* grad, int64_t key, float* out) const {
    std::copy_n(grad + key * dim_, dim_, out);
  }

 private:
  static int64_t padded_dim(int64_t dim) { return dim + dim % 2; }

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
  bool has_columns_ = false;
  const T* tile_ = nullptr;
  Ahead<T> ahead_;
};

}  // namespace contrastive_ops
