// Products of bfloat16 on Intel's AMX, whose registers are blocks of a matrix: an instruction adds the
// products of 16 x 32 and 32 x 16 numbers to 16 x 16 sums in float32.
#pragma once

#ifdef CONTRASTIVE_OPS_WITH_AMX  // setup.py defines it where the compiler knows the instructions
#define CONTRASTIVE_OPS_AMX [[gnu::target("amx-tile,amx-bf16")]]

#include <ATen/cpu/Utils.h>
#include <immintrin.h>

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>

#include "direct_product.h"

namespace contrastive_ops {
namespace amx {

// A block is what a register holds: 16 rows of 32 bfloat16, or of 16 pairs. Operands are rows of blocks,
// along the depth of the product.
inline constexpr int64_t kRows = 16, kDepth = 32, kBlock = kRows * kDepth, kRowBytes = 64, kBlockBytes = 1024;
inline constexpr int64_t kSquare = 2 * kRows;  // of sums, in four registers; two more are for each operand

inline int64_t steps(int64_t depth) {
  return at::divup(depth, kDepth);
}
inline int64_t squares(int64_t rows) {
  return at::divup(rows, kSquare);
}

// Of an operand of so many rows.
inline int64_t elements(int64_t rows, int64_t depth) {
  return squares(rows) * 2 * steps(depth) * kBlock;
}

// A thread's registers, ready for blocks.
class Registers {
 public:
  CONTRASTIVE_OPS_AMX Registers() { _tile_loadconfig(&kConfiguration); }
  CONTRASTIVE_OPS_AMX ~Registers() { _tile_release(); }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static constexpr int kB = kRowBytes, kR = kRows;
  // In memory for good: gcc takes the instruction to read eight bytes of it.
  static constexpr Configuration kConfiguration = {
      1, 0, {}, {kB, kB, kB, kB, kB, kB, kB, kB}, {kR, kR, kR, kR, kR, kR, kR, kR}};
};

// Where the blocks of an operand are: bytes from a row of a block to the next, from a row of blocks to the
// next, and from a step along the depth to the next.
struct Blocks {
  const void* data;
  int64_t row, rows, step;

  static Blocks in_order(const void* data, int64_t depth) {
    return {data, kRowBytes, steps(depth) * kBlockBytes, kBlockBytes};
  }

  const std::byte* at(int64_t rows_index, int64_t step_index) const {
    return static_cast<const std::byte*>(data) + rows_index * rows + step_index * step;
  }
};

// sums (kSquare x kSquare) = or += the products of two rows of blocks of a, from this one on, and two of b.
template <bool kAdd>
CONTRASTIVE_OPS_AMX void multiply_square(int64_t steps, const Blocks& a, int64_t a_index, const Blocks& b,
                                         int64_t b_index, float* sums, int64_t row_stride) {
  const int64_t bytes = row_stride * static_cast<int64_t>(sizeof(float));
  float *right_sums = sums + kRows, *lower_sums = sums + kRows * row_stride, *last_sums = lower_sums + kRows;
  asm volatile("" ::: "memory");  // gcc's loads of blocks do not say that they read memory
  if constexpr (kAdd) {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, right_sums, bytes);
    _tile_loadd(2, lower_sums, bytes);
    _tile_loadd(3, last_sums, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const std::byte *upper = a.at(a_index, step), *lower = a.at(a_index + 1, step);
    const std::byte *left = b.at(b_index, step), *right = b.at(b_index + 1, step);
    _tile_loadd(4, upper, a.row);
    _tile_loadd(5, lower, a.row);
    _tile_loadd(6, left, b.row);
    _tile_loadd(7, right, b.row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, right_sums, bytes);
  _tile_stored(2, lower_sums, bytes);
  _tile_stored(3, last_sums, bytes);
}

// out (rows x columns) = or += a . b, the columns in whole squares. What is ahead is fetched meanwhile.
template <bool kAdd>
void multiply(int64_t rows, int64_t columns, int64_t steps, const Blocks& a, const Blocks& b, float* out,
              int64_t row_stride, Ahead<at::BFloat16>& ahead) {
  for (int64_t row = 0; row < rows; row += kSquare)
    for (int64_t column = 0; column < columns; column += kSquare) {
      ahead.fetch_some();
      const int64_t a_index = row / kRows, b_index = column / kRows;
      float* to = out + row * row_stride + column;
      if (row + kSquare <= rows) {
        multiply_square<kAdd>(steps, a, a_index, b, b_index, to, row_stride);
        continue;
      }
      alignas(64) float apart[kSquare * kSquare];
      multiply_square<false>(steps, a, a_index, b, b_index, apart, kSquare);
      for (int64_t r = 0; r < rows - row; ++r)
        for (int64_t c = 0; c < kSquare; c += kRows) {
          const __m512 sum = _mm512_load_ps(apart + r * kSquare + c);
          float* at = to + r * row_stride + c;
          _mm512_storeu_ps(at, kAdd ? _mm512_add_ps(_mm512_loadu_ps(at), sum) : sum);
        }
    }
}

// The first so many of a vector's lanes.
template <typename Lanes>
Lanes first_lanes(int64_t count) {
  return static_cast<Lanes>((uint64_t{1} << std::clamp<int64_t>(count, 0, 8 * sizeof(Lanes))) - 1);
}

inline __m512i upper_halves() {
  return _mm512_set1_epi32(static_cast<int>(0xffff0000));
}

// Writes 16 pairs of numbers, rounded to nearest. A NaN, which might become a number so, loses its lower
// bits.
inline void write_pairs(__m512 first, __m512 second, std::byte* out) {
  const auto rounded = [](__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    return _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), bits, _mm512_set1_epi32(0x8000));
  };
  const __m512i low = _mm512_srli_epi32(rounded(first), 16);
  _mm512_store_si512(out, _mm512_or_si512(low, _mm512_and_si512(rounded(second), upper_halves())));
}

// 16 rows of 16 pairs become columns.
inline void transpose(__m512i* rows) {
  __m512i other[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
    rows[i + 12] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0xdd);
  }
}

// A matrix (rows x depth) whose rows are contiguous becomes an operand, padded with zeros.
inline void take_rows(const at::BFloat16* from, int64_t row_stride, int64_t rows, int64_t depth,
                      std::byte* out) {
  for (int64_t r = 0; r < squares(rows) * kSquare; ++r)
    for (int64_t step = 0; step < steps(depth); ++step) {
      const auto lanes = first_lanes<__mmask32>(r < rows ? depth - step * kDepth : 0);
      std::byte* to = out + (r / kRows * steps(depth) + step) * kBlockBytes + r % kRows * kRowBytes;
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(lanes, from + r * row_stride + step * kDepth));
    }
}

// The same of the transpose of a matrix (depth x rows).
inline void take_columns(const at::BFloat16* from, int64_t row_stride, int64_t rows, int64_t depth,
                         std::byte* out) {
  for (int64_t step = 0; step < steps(depth); ++step)
    for (int64_t r = 0; r < rows; r += kSquare) {
      const at::BFloat16* at = from + step * kDepth * row_stride + r;
      std::byte* to = out + (r / kRows * steps(depth) + step) * kBlockBytes;
      const int64_t count = depth - step * kDepth;
      const auto lanes = first_lanes<__mmask32>(rows - r);
      __m512i even[kRows], odd[kRows];  // of the matrix's columns
      for (int64_t i = 0; i < kRows; ++i, at += 2 * row_stride) {
        const __m512i first = _mm512_maskz_loadu_epi16(2 * i < count ? lanes : 0, at);
        const __m512i second = _mm512_maskz_loadu_epi16(2 * i + 1 < count ? lanes : 0, at + row_stride);
        even[i] = _mm512_or_si512(_mm512_andnot_si512(upper_halves(), first), _mm512_slli_epi32(second, 16));
        odd[i] = _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(upper_halves(), second));
      }
      transpose(even), transpose(odd);
      for (int64_t i = 0; i < kRows; ++i) {
        std::byte* row = to + 2 * i / kRows * steps(depth) * kBlockBytes + 2 * i % kRows * kRowBytes;
        _mm512_store_si512(row, even[i]);
        _mm512_store_si512(row + kRowBytes, odd[i]);
      }
    }
}

}  // namespace amx

class AMXProduct {
 public:
  using Sum = float;
  using Operand = at::BFloat16;
  // Of D = 128 a tile is 48 KiB, and what a panel and it have in common 24 KiB.
  static constexpr int64_t kTile = 192;
  static constexpr bool kDearerThanMemory = false;
  static constexpr int64_t kColumns = kPanel<float>;
  static_assert(kColumns == amx::kSquare && kTile % amx::kSquare == 0);
  static int64_t packed_elements(int64_t dim) { return amx::elements(kColumns, dim); }
  static int64_t packed_rows_elements(int64_t dim) { return amx::elements(dim, kColumns); }
  static int64_t keys_grad_elements(int64_t dim) { return kTile * padded_dim(dim); }

  // Whether this chip has AMX, the system lets us at it, and oneDNN is not held back to less.
  static bool available() {
    static const bool answer = [] {
      const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
      if (limit == nullptr) limit = std::getenv("DNNL_MAX_CPU_ISA");
      std::string isa = limit == nullptr ? "" : limit;
      for (char& letter : isa) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
      const auto has = [&isa](const char* name) { return isa.find(name) != isa.npos; };
      if ((has("AVX") || has("SSE")) && !has("AMX")) return false;
      return __builtin_cpu_supports("amx-bf16") && at::cpu::init_amx();
    }();
    return answer;
  }

  explicit AMXProduct(int64_t dim)
      : dim_(dim),
        rows_(amx::elements(kTile, dim)),
        columns_(amx::elements(dim, kTile)),
        weights_(amx::elements(kColumns, kTile)) {}

  // rows (kPanel x dim) -> an operand of which every block is transposed
  static void pack(const float* rows, int64_t dim, Operand* out) {
    Array<Operand> rounded(kColumns * dim);
    convert(rows, rounded.data(), kColumns * dim);
    amx::take_rows(rounded.data(), dim, kColumns, dim, bytes(out));
    for (int64_t block = 0; block < packed_elements(dim) / amx::kBlock; ++block)
      amx::transpose(reinterpret_cast<__m512i*>(out + block * amx::kBlock));
  }

  // rows (kPanel x dim) -> an operand whose rows are dimensions; a pair are rows 16 apart
  static void pack_rows(const float* rows, int64_t dim, Operand* out) {
    for (int64_t d = 0; d < padded_dim(dim); d += amx::kRows) {
      const auto lanes = amx::first_lanes<__mmask16>(dim - d);
      for (int64_t i = 0; i < amx::kRows; ++i)
        amx::write_pairs(_mm512_maskz_loadu_ps(lanes, rows + i * dim + d),
                         _mm512_maskz_loadu_ps(lanes, rows + (i + amx::kRows) * dim + d),
                         bytes(out) + d / amx::kRows * amx::kBlockBytes + i * amx::kRowBytes);
    }
  }

  // `next` is the tile that is to be loaded after this one, if there is one.
  void load(const Matrix& keys, const Matrix* next = nullptr) {
    count_ = keys.rows;
    ahead_ = next ? Ahead<Operand>(*next) : Ahead<Operand>();
    tile_ = Tile<Operand>(keys, kTile, copied_);
    has_rows_ = has_columns_ = false;
  }

  void similarities(const Operand* queries, float* out) {
    amx::multiply<false>(count_, kColumns, amx::steps(dim_), rows(), amx::Blocks::in_order(queries, dim_),
                         out, kColumns, ahead_);
  }

  void accumulate(const float* weights, float* grad) {
    amx::multiply<true>(dim_, kColumns, amx::steps(count_), columns(), take_weights(weights), grad, kColumns,
                        ahead_);
  }

  // Several panels that lie one after another are multiplied at once: with one at a time, what takes longest
  // is to read and write `grad`.
  void accumulate_keys(const float* weights, const Operand* rows, float* grad) {
    const bool follows = rows == waiting_rows_ + waiting_ * packed_rows_elements(dim_);
    if (waiting_ == kTogether || !follows) finish_keys(grad);
    if (waiting_ == 0) waiting_rows_ = rows;
    waiting_weights_.resize(amx::elements(kTile, kTogether * kColumns));
    std::byte* to = bytes(waiting_weights_.data()) + waiting_++ * amx::kBlockBytes;
    for (int64_t key = 0; key < count_; ++key)
      amx::write_pairs(
          _mm512_loadu_ps(weights + key * kColumns), _mm512_loadu_ps(weights + key * kColumns + amx::kRows),
          to + key / amx::kRows * kTogether * amx::kBlockBytes + key % amx::kRows * amx::kRowBytes);
  }

  void finish_keys(float* grad) {
    const int64_t panels = std::exchange(waiting_, 0);
    if (panels == 0) return;
    const int64_t panel_bytes = packed_rows_elements(dim_) * static_cast<int64_t>(sizeof(Operand));
    amx::multiply<true>(amx::squares(count_) * amx::kSquare, padded_dim(dim_), panels,
                        amx::Blocks::in_order(waiting_weights_.data(), kTogether * kColumns),
                        {waiting_rows_, amx::kRowBytes, amx::kBlockBytes, panel_bytes}, grad,
                        padded_dim(dim_), ahead_);
  }

  void fetch_ahead() { ahead_.fetch_some(); }

  // A key's row of what accumulate_keys has made.
  void copy_key_grad(const float* grad, int64_t key, float* out) const {
    std::copy_n(grad + key * padded_dim(dim_), dim_, out);
  }

 private:
  static std::byte* bytes(Operand* operand) { return reinterpret_cast<std::byte*>(operand); }
  static int64_t padded_dim(int64_t dim) { return amx::squares(dim) * amx::kSquare; }

  // The tile as left operand: as it lies, if it can be taken so.
  amx::Blocks rows() {
    if (!tile_.by_column && count_ % amx::kSquare == 0 && dim_ % amx::kDepth == 0) {
      const int64_t row = tile_.row_stride * static_cast<int64_t>(sizeof(Operand));
      return {tile_.data, row, amx::kRows * row, amx::kRowBytes};
    }
    return taken(false, has_rows_, rows_);
  }

  amx::Blocks columns() { return taken(true, has_columns_, columns_); }

  // The tile or its transpose, copied when it is asked for first.
  amx::Blocks taken(bool transposed, bool& has, Array<Operand>& out) const {
    const int64_t rows = transposed ? dim_ : count_, depth = transposed ? count_ : dim_;
    if (!std::exchange(has, true)) {
      if (transposed == tile_.by_column)
        amx::take_rows(tile_.data, tile_.long_stride(), rows, depth, bytes(out.data()));
      else
        amx::take_columns(tile_.data, tile_.long_stride(), rows, depth, bytes(out.data()));
    }
    return amx::Blocks::in_order(out.data(), depth);
  }

  // The right operand of a product with the transpose: a pair are neighbouring keys.
  amx::Blocks take_weights(const float* weights) {
    std::byte* to = bytes(weights_.data());
    const auto of_key = [&](int64_t key, int64_t column) {
      return key < count_ ? _mm512_loadu_ps(weights + key * kColumns + column) : _mm512_setzero_ps();
    };
    for (int64_t column = 0; column < kColumns; column += amx::kRows)
      for (int64_t key = 0; key < amx::steps(count_) * amx::kDepth; key += 2, to += amx::kRowBytes)
        amx::write_pairs(of_key(key, column), of_key(key + 1, column), to);
    return amx::Blocks::in_order(weights_.data(), count_);
  }

  static constexpr int64_t kTogether = 4;  // panels that accumulate_keys multiplies at once

  int64_t dim_, count_ = 0, waiting_ = 0;
  bool has_rows_ = false, has_columns_ = false;
  Tile<Operand> tile_;
  Ahead<Operand> ahead_;
  Array<Operand> copied_, rows_, columns_, weights_, waiting_weights_;
  const Operand* waiting_rows_ = nullptr;
  const amx::Registers registers_;
};

}  // namespace contrastive_ops

#endif
