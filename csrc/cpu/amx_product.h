// Products on Intel's AMX: of bfloat16, and of float32 as six products of bfloat16.
//
// An instruction adds the products of 16 x 32 and 32 x 16 bfloat16 numbers to 16 x 16 sums in float32, at 16
// times the rate of multiply-adds of float32 in vectors. A float32 of 24 bits is the sum of three bfloat16 of
// 8 bits, a = a1 + a2 + a3, exactly, so that
//
//   a b = a1 b1 + (a1 b2 + a2 b1) + (a1 b3 + a2 b2 + a3 b1) + terms of at most 2^-24 |a b| together,
//
// which is what one rounding of float32 may lose: the six come out as exact as multiply-adds do. (The unit
// takes numbers below 2^-126 for zero, and so what is below of the parts of others.) They are not added up in
// the same order where a and b change places.
#pragma once

#ifdef CONTRASTIVE_OPS_WITH_AMX  // setup.py defines it where the compiler knows the instructions
#define CONTRASTIVE_OPS_AMX [[gnu::target("amx-tile,amx-bf16")]]

#include <ATen/cpu/Utils.h>
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "direct_product.h"

namespace contrastive_ops {
namespace amx {

// A block is what a register holds: 16 rows of 32 bfloat16, or of 16 pairs. Operands are rows of blocks,
// along the depth of the product; where numbers have several parts, those of a block follow each other.
inline constexpr int64_t kRows = 16, kDepth = 32, kBlock = kRows * kDepth, kRowBytes = 64, kBlockBytes = 1024;
// Registers are used as two by two blocks of sums.
inline constexpr int64_t kSquare = 2 * kRows;

inline int64_t steps(int64_t depth) {
  return at::divup(depth, kDepth);
}
inline int64_t squares(int64_t rows) {
  return at::divup(rows, kSquare);
}

// Of an operand of so many rows.
template <int kParts>
int64_t elements(int64_t rows, int64_t depth) {
  return squares(rows) * 2 * steps(depth) * kParts * kBlock;
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

  template <int kParts>
  static Blocks in_order(const void* data, int64_t depth) {
    return {data, kRowBytes, steps(depth) * kParts * kBlockBytes, kParts * kBlockBytes};
  }

  const std::byte* at(int64_t rows_index, int64_t step_index) const {
    return static_cast<const std::byte*>(data) + rows_index * rows + step_index * step;
  }
};

CONTRASTIVE_OPS_AMX [[gnu::always_inline]] inline void load_left(const std::byte* upper, const Blocks& a) {
  const std::byte* lower = upper + a.rows;
  _tile_loadd(4, upper, a.row);
  _tile_loadd(5, lower, a.row);
}

CONTRASTIVE_OPS_AMX [[gnu::always_inline]] inline void load_right(const std::byte* left, const Blocks& b) {
  const std::byte* right = left + b.rows;
  _tile_loadd(6, left, b.row);
  _tile_loadd(7, right, b.row);
}

CONTRASTIVE_OPS_AMX [[gnu::always_inline]] inline void multiply_registers() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// sums (kSquare x kSquare) = or += the products of two rows of blocks of a, from this one on, and two of b.
template <int kParts, bool kAdd>
CONTRASTIVE_OPS_AMX void multiply_square(int64_t steps, const Blocks& a, int64_t a_index, const Blocks& b,
                                         int64_t b_index, float* sums, int64_t row_stride) {
  const int64_t bytes = row_stride * static_cast<int64_t>(sizeof(float));
  float *right_sums = sums + kRows, *lower = sums + kRows * row_stride, *lower_right = lower + kRows;
  asm volatile("" ::: "memory");  // gcc's loads of blocks do not say that they read memory
  if constexpr (kAdd) {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, right_sums, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower_right, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const std::byte *left = a.at(a_index, step), *right = b.at(b_index, step);
    load_left(left, a);
    if constexpr (kParts == 3) {  // the largest last, each with an operand of the one before
      load_right(right + 2 * kBlockBytes, b), multiply_registers();
      load_right(right + kBlockBytes, b), multiply_registers();
      load_left(left + kBlockBytes, a), multiply_registers();
      load_right(right, b), multiply_registers();
      load_left(left + 2 * kBlockBytes, a), multiply_registers();
      load_left(left, a), multiply_registers();
    } else {
      load_right(right, b), multiply_registers();
    }
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, right_sums, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower_right, bytes);
}

// out (rows x columns) = or += a . b, the columns in whole squares. What is ahead is fetched meanwhile. Of
// float32 the sums of a call are added up before they are added to those in memory, or each of the six
// products would be rounded to a number as large.
template <int kParts, bool kAdd, typename T>
void multiply(int64_t rows, int64_t columns, int64_t steps, const Blocks& a, const Blocks& b, float* out,
              int64_t row_stride, Ahead<T>& ahead) {
  alignas(64) float apart[kSquare * kSquare];
  for (int64_t row = 0; row < rows; row += kSquare)
    for (int64_t column = 0; column < columns; column += kSquare) {
      ahead.fetch_some();
      const int64_t a_index = row / kRows, b_index = column / kRows;
      float* to = out + row * row_stride + column;
      if (row + kSquare <= rows && !(kAdd && kParts > 1)) {
        multiply_square<kParts, kAdd>(steps, a, a_index, b, b_index, to, row_stride);
        continue;
      }
      multiply_square<kParts, false>(steps, a, a_index, b, b_index, apart, kSquare);
      for (int64_t r = 0; r < std::min(kSquare, rows - row); ++r)
        for (int64_t c = 0; c < kSquare; c += kRows) {
          const __m512 sum = _mm512_load_ps(apart + r * kSquare + c);
          float* at = to + r * row_stride + c;
          _mm512_storeu_ps(at, kAdd ? _mm512_add_ps(_mm512_loadu_ps(at), sum) : sum);
        }
    }
}

// The first so many of 16 or 32 lanes.
template <typename Lanes>
Lanes first_lanes(int64_t count) {
  return static_cast<Lanes>((uint64_t{1} << std::clamp<int64_t>(count, 0, 8 * sizeof(Lanes))) - 1);
}

// Rounded to bfloat16 in the upper half of its bits; the lower is to be cleared.
template <bool kMayBeNaN>
inline __m512i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), half = _mm512_set1_epi32(0x8000);
  if constexpr (!kMayBeNaN) return _mm512_add_epi32(bits, half);
  return _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), bits, half);  // or a NaN might end
}

// Writes a row of each part of 16 pairs of numbers, rounded to nearest but for the last of three, of which no
// bit is left. That one keeps what a NaN is.
template <int kParts>
inline void split(__m512 first, __m512 second, std::byte* out) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    __m512i low = _mm512_castps_si512(first), high = _mm512_castps_si512(second);
    if (part < 2) low = rounded<kParts == 1>(first), high = rounded<kParts == 1>(second);
    high = _mm512_and_si512(high, upper);
    _mm512_store_si512(out + part * kBlockBytes, _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
    if (part + 1 == kParts) break;
    first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_and_si512(low, upper)));
    second = _mm512_sub_ps(second, _mm512_castsi512_ps(high));
  }
}

inline __m512i any_of(__m512i bits, __m512i more, __m512i others) {
  return _mm512_ternarylogic_epi32(bits, more, others, 0xfe);
}

// 16 rows of 16 become columns.
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

// How numbers of a dtype are multiplied. Those that stand together in a pair, along the depth, are neighbours
// where a register takes them from memory as they lie; where they are split they are 16 apart, which takes no
// permutation.
template <typename T>
inline constexpr int kPartsOf = std::is_same_v<T, float> ? 3 : 1;
template <typename T>
inline constexpr int64_t kApart = std::is_same_v<T, float> ? 16 : 1;
template <typename T>
inline int64_t first_of_pair(int64_t pair) {
  return kApart<T> == 1 ? 2 * pair : pair;
}

// A matrix (rows x depth) whose rows are contiguous becomes an operand, padded with zeros. Returns the bits
// that any of its floats has.
template <typename T>
uint32_t take_rows(const T* from, int64_t row_stride, int64_t rows, int64_t depth, std::byte* out) {
  constexpr int64_t kStepBytes = kPartsOf<T> * kBlockBytes;
  const int64_t all_steps = steps(depth), last = depth - (all_steps - 1) * kDepth;
  __m512i bits = _mm512_setzero_si512();
  for (int64_t r = 0; r < squares(rows) * kSquare; ++r) {
    std::byte* to = out + r / kRows * all_steps * kStepBytes + r % kRows * kRowBytes;
    const T* at = from + r * row_stride;
    for (int64_t step = 0; step < all_steps; ++step, to += kStepBytes, at += kDepth) {
      const int64_t count = r >= rows ? 0 : step + 1 < all_steps ? kDepth : last;
      if constexpr (std::is_same_v<T, float>) {
        const __m512 low = _mm512_maskz_loadu_ps(first_lanes<__mmask16>(count), at);
        const __m512 high = _mm512_maskz_loadu_ps(first_lanes<__mmask16>(count - kRows), at + kRows);
        bits = any_of(bits, _mm512_castps_si512(low), _mm512_castps_si512(high));
        split<kPartsOf<T>>(low, high, to);
      } else {
        _mm512_store_si512(to, _mm512_maskz_loadu_epi16(first_lanes<__mmask32>(count), at));
      }
    }
  }
  return static_cast<uint32_t>(_mm512_reduce_or_epi32(bits));
}

// The same of the transpose of a matrix (depth x rows).
template <typename T>
uint32_t take_columns(const T* from, int64_t row_stride, int64_t rows, int64_t depth, std::byte* out) {
  constexpr int64_t kStepBytes = kPartsOf<T> * kBlockBytes;
  const int64_t block_row = steps(depth) * kStepBytes;
  __m512i bits = _mm512_setzero_si512();
  for (int64_t step = 0; step < steps(depth); ++step)
    for (int64_t r = 0; r < rows; r += kSquare) {
      const T* at = from + step * kDepth * row_stride + r;
      std::byte* to = out + r / kRows * block_row + step * kStepBytes;
      const int64_t count = std::min(kDepth, depth - step * kDepth);
      if constexpr (std::is_same_v<T, float>) {
        for (int64_t half = 0; half < 2; ++half, at += kRows, to += block_row) {
          const auto lanes = first_lanes<__mmask16>(rows - r - half * kRows);
          __m512i low[kRows], high[kRows];
          for (int64_t i = 0; i < kRows; ++i) {
            low[i] = _mm512_maskz_loadu_epi32(i < count ? lanes : 0, at + i * row_stride);
            high[i] = _mm512_maskz_loadu_epi32(i + kRows < count ? lanes : 0, at + (i + kRows) * row_stride);
            bits = any_of(bits, low[i], high[i]);
          }
          transpose(low), transpose(high);
          for (int64_t i = 0; i < kRows; ++i)
            split<kPartsOf<T>>(_mm512_castsi512_ps(low[i]), _mm512_castsi512_ps(high[i]), to + i * kRowBytes);
        }
      } else {
        const auto lanes = first_lanes<__mmask32>(rows - r);
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        __m512i even[kRows], odd[kRows];  // of the matrix's columns
        for (int64_t i = 0; i < kRows; ++i, at += 2 * row_stride) {
          const __m512i low = _mm512_maskz_loadu_epi16(2 * i < count ? lanes : 0, at);
          const __m512i high = _mm512_maskz_loadu_epi16(2 * i + 1 < count ? lanes : 0, at + row_stride);
          even[i] = _mm512_or_si512(_mm512_andnot_si512(upper, low), _mm512_slli_epi32(high, 16));
          odd[i] = _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_and_si512(upper, high));
        }
        transpose(even), transpose(odd);
        for (int64_t i = 0; i < kRows; ++i) {
          std::byte* row = to + 2 * i / kRows * block_row + 2 * i % kRows * kRowBytes;
          _mm512_store_si512(row, even[i]);
          _mm512_store_si512(row + kRowBytes, odd[i]);
        }
      }
    }
  return static_cast<uint32_t>(_mm512_reduce_or_epi32(bits));
}

}  // namespace amx

template <typename T>
class AMXProduct {
  static constexpr int kParts = amx::kPartsOf<T>;
  static constexpr bool kSplits = kParts > 1;

 public:
  using Sum = float;
  using Operand = at::BFloat16;
  // A tile of floats is 72 KiB with D = 128, and its transpose as much; those of bfloat16 are two thirds of
  // it.
  static constexpr int64_t kTile = kSplits ? 96 : 192;
  static constexpr bool kDearerThanMemory = kSplits;
  static constexpr int64_t kColumns = kPanel<float>;
  static_assert(kColumns == amx::kSquare && kTile % amx::kSquare == 0);
  static int64_t packed_elements(int64_t dim) { return amx::elements<kParts>(kColumns, dim); }
  static int64_t packed_rows_elements(int64_t dim) { return amx::elements<kParts>(dim, kColumns); }
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
        rows_(amx::elements<kParts>(kTile, dim)),
        columns_(amx::elements<kParts>(dim, kTile)),
        weights_(amx::elements<kParts>(kColumns, kTile)) {}

  // rows (kPanel x dim) -> an operand of which every block is transposed
  static void pack(const float* rows, int64_t dim, Operand* out) {
    if constexpr (kSplits) {
      amx::take_rows(rows, dim, kColumns, dim, bytes(out));
    } else {
      Array<T> rounded(kColumns * dim);
      convert(rows, rounded.data(), kColumns * dim);
      amx::take_rows(rounded.data(), dim, kColumns, dim, bytes(out));
    }
    for (int64_t block = 0; block < packed_elements(dim) / amx::kBlock; ++block)
      amx::transpose(reinterpret_cast<__m512i*>(out + block * amx::kBlock));
  }

  // rows (kPanel x dim) -> an operand whose rows are dimensions; a pair are rows 16 apart
  static void pack_rows(const float* rows, int64_t dim, Operand* out) {
    for (int64_t d = 0; d < padded_dim(dim); d += amx::kRows) {
      const __mmask16 lanes = amx::first_lanes<__mmask16>(dim - d);
      for (int64_t i = 0; i < amx::kRows; ++i)
        amx::split<kParts>(_mm512_maskz_loadu_ps(lanes, rows + i * dim + d),
                           _mm512_maskz_loadu_ps(lanes, rows + (i + amx::kRows) * dim + d),
                           bytes(out) + d / amx::kRows * kParts * amx::kBlockBytes + i * amx::kRowBytes);
    }
  }

  // `next` is the tile that is to be loaded after this one, if there is one.
  void load(const Matrix& keys, const Matrix* next = nullptr) {
    count_ = keys.rows;
    ahead_ = next ? Ahead<T>(*next) : Ahead<T>();
    tile_ = Tile<T>(keys, kTile, copied_);
    has_rows_ = has_columns_ = false;
    apart_.clear();
  }

  void similarities(const Operand* queries, float* out) {
    const amx::Blocks keys = rows();
    if (!all_apart())
      amx::multiply<kParts, false>(count_, kColumns, amx::steps(dim_), keys,
                                   amx::Blocks::in_order<kParts>(queries, dim_), out, kColumns, ahead_);
    if constexpr (kSplits) {
      if (apart_.empty()) return;
      Array<float> unpacked(dim_ * kColumns);
      unpack(queries, unpacked.data());
      for (const auto& [begin, end] : apart_)
        product<false>(end - begin, dim_, apart_tile_.data + begin * apart_tile_.row_stride,
                       apart_tile_.row_stride, apart_tile_.column_stride, unpacked.data(),
                       out + begin * kColumns, ahead_);
    }
  }

  void accumulate(const float* weights, float* grad) {
    const amx::Blocks transpose = columns();
    if (!all_apart())
      amx::multiply<kParts, true>(dim_, kColumns, amx::steps(count_), transpose, take_weights(weights), grad,
                                  kColumns, ahead_);
    if constexpr (kSplits)
      for (const auto& [begin, end] : apart_)
        product<true>(dim_, end - begin, apart_tile_.data + begin * apart_tile_.row_stride,
                      apart_tile_.column_stride, apart_tile_.row_stride, weights + begin * kColumns, grad,
                      ahead_);
  }

  // Several panels that lie one after another are multiplied at once: with one at a time, what takes longest
  // is to read and write `grad`.
  void accumulate_keys(const float* weights, const Operand* rows, float* grad) {
    const bool follows = rows == waiting_rows_ + waiting_ * packed_rows_elements(dim_);
    if (waiting_ == kTogether || !follows) finish_keys(grad);
    if (waiting_ == 0) waiting_rows_ = rows;
    waiting_weights_.resize(amx::elements<kParts>(kTile, kTogether * kColumns));
    std::byte* to = bytes(waiting_weights_.data()) + waiting_++ * kParts * amx::kBlockBytes;
    for (int64_t key = 0; key < count_; ++key)
      amx::split<kParts>(
          _mm512_loadu_ps(weights + key * kColumns), _mm512_loadu_ps(weights + key * kColumns + amx::kRows),
          to + key / amx::kRows * kTogether * kParts * amx::kBlockBytes + key % amx::kRows * amx::kRowBytes);
  }

  void finish_keys(float* grad) {
    const int64_t panels = std::exchange(waiting_, 0);
    if (panels == 0) return;
    const int64_t panel_bytes = packed_rows_elements(dim_) * static_cast<int64_t>(sizeof(Operand));
    amx::multiply<kParts, true>(amx::squares(count_) * amx::kSquare, padded_dim(dim_), panels,
                                amx::Blocks::in_order<kParts>(waiting_weights_.data(), kTogether * kColumns),
                                {waiting_rows_, amx::kRowBytes, kParts * amx::kBlockBytes, panel_bytes}, grad,
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

  // The tile as left operand of either product, made when it is asked for first; or as it lies.
  amx::Blocks rows() {
    if constexpr (!kSplits)
      if (!tile_.by_column && count_ % amx::kSquare == 0 && dim_ % amx::kDepth == 0) {
        const int64_t row = tile_.row_stride * static_cast<int64_t>(sizeof(T));
        return {tile_.data, row, amx::kRows * row, amx::kRowBytes};
      }
    if (!std::exchange(has_rows_, true)) take(false, rows_);
    return amx::Blocks::in_order<kParts>(rows_.data(), dim_);
  }

  amx::Blocks columns() {
    if (!std::exchange(has_columns_, true)) take(true, columns_);
    return amx::Blocks::in_order<kParts>(columns_.data(), count_);
  }

  // The tile, or its transpose, as an operand.
  void take(bool transposed, Array<Operand>& out) {
    const uint32_t bits = take_as_it_is(transposed, out);
    if constexpr (kSplits)
      if (reaches_2(bits)) set_apart(), take_as_it_is(transposed, out);
  }

  uint32_t take_as_it_is(bool transposed, Array<Operand>& out) const {
    const int64_t rows = transposed ? dim_ : count_, depth = transposed ? count_ : dim_;
    if (transposed == tile_.by_column)
      return amx::take_rows(tile_.data, long_stride(tile_), rows, depth, bytes(out.data()));
    return amx::take_columns(tile_.data, long_stride(tile_), rows, depth, bytes(out.data()));
  }

  static int64_t long_stride(const Tile<T>& tile) {
    return tile.by_column ? tile.column_stride : tile.row_stride;
  }

  // The right operand of a product with the transpose. A pair are weights of two keys.
  amx::Blocks take_weights(const float* weights) {
    const __m512 zero = _mm512_setzero_ps();
    std::byte* to = bytes(weights_.data());
    for (int64_t column = 0; column < kColumns; column += amx::kRows)
      for (int64_t step = 0; step < amx::steps(count_); ++step, to += kParts * amx::kBlockBytes)
        for (int64_t pair = 0; pair < amx::kRows; ++pair) {
          const int64_t first = step * amx::kDepth + amx::first_of_pair<T>(pair);
          const int64_t second = first + amx::kApart<T>;
          const float* at = weights + column;
          amx::split<kParts>(first < count_ ? _mm512_loadu_ps(at + first * kColumns) : zero,
                             second < count_ ? _mm512_loadu_ps(at + second * kColumns) : zero,
                             to + pair * amx::kRowBytes);
        }
    return amx::Blocks::in_order<kParts>(weights_.data(), count_);
  }

  // Whether a float of these bits may be none, or 2 or more: the exponent's first bit says so.
  static bool reaches_2(uint32_t bits) { return (bits >> 30 & 1) != 0; }

  // Keys with a number that is no number, or so large that its parts might be none, are zero in the products
  // of parts and multiplied apart. In rows of unit length there is none.
  void set_apart() {
    apart_tile_ = tile_;
    without_.resize(kTile * dim_);
    for (int64_t key = 0; key < count_; ++key) {
      float* copy = &without_[key * dim_];
      uint32_t bits = 0;
      for (int64_t d = 0; d < dim_; ++d) {
        copy[d] = tile_.data[key * tile_.row_stride + d * tile_.column_stride];
        bits |= std::bit_cast<uint32_t>(copy[d]);
      }
      if (!reaches_2(bits)) continue;
      std::fill_n(copy, dim_, 0.f);
      if (apart_.empty() || apart_.back().second != key) apart_.emplace_back(key, key);
      ++apart_.back().second;
    }
    tile_ = Tile<T>(without_.data(), dim_);
  }

  bool all_apart() const {
    return kSplits && count_ > 0 && apart_.size() == 1 && apart_[0] == std::pair<int64_t, int64_t>(0, count_);
  }

  // What `pack` has made of floats (D x panel): the sum of their parts.
  void unpack(const Operand* queries, float* out) const {
    for (int64_t d = 0; d < dim_; ++d)
      for (int64_t r = 0; r < kColumns; ++r) {
        const int64_t block = r / amx::kRows * amx::steps(dim_) + d / amx::kDepth;
        const int64_t pair = d % amx::kDepth % amx::kRows, second = d % amx::kDepth / amx::kRows;
        const Operand* at =
            queries + block * kParts * amx::kBlock + (pair * amx::kRows + r % amx::kRows) * 2 + second;
        float sum = 0;
        for (int part = kParts; part-- > 0;) sum += static_cast<float>(at[part * amx::kBlock]);
        out[d * kColumns + r] = sum;
      }
  }

  static constexpr int64_t kTogether = 4;  // panels that accumulate_keys multiplies at once

  int64_t dim_, count_ = 0, waiting_ = 0;
  bool has_rows_ = false, has_columns_ = false;
  Tile<T> tile_, apart_tile_;
  Ahead<T> ahead_;
  std::vector<std::pair<int64_t, int64_t>> apart_;  // runs of keys
  Array<T> copied_, without_;
  Array<Operand> rows_, columns_, weights_, waiting_weights_;
  const Operand* waiting_rows_ = nullptr;
  const amx::Registers registers_;
};

}  // namespace contrastive_ops

#endif
