// Products of matrices in half precision whose terms are multiplied and added in pairs:
//
//   out (rows x columns) = or += a (rows x depth) . b (depth x columns)
//
// `b` has pairs of rows interleaved, [depth / 2][columns][2]. Strides are numbers from a row to the next; of
// `b`, from a pair of rows to the next.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "vector.h"

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace contrastive_ops::pairs {

template <typename T>
struct Operands {
  const T *a, *b;
  int64_t a_stride, b_stride;
};

#if defined(CPU_CAPABILITY_AVX512)
// bfloat16, by an instruction that adds the products of 16 pairs to 16 sums.
#define CONTRASTIVE_OPS_AVX512_BF16 [[gnu::target("avx512f,avx512bf16")]]

// Blocks of at most so many rows and vectors have their sums in registers.
inline constexpr int64_t kMostRows = 8, kMostVectors = 2, kLanes = 16;

// `last` are the lanes of the last vector that there are. What `out` has is added last: it may be a sum over
// very many keys, and each term would round it.
template <bool kAdd, int kRows, int kVectors>
CONTRASTIVE_OPS_AVX512_BF16 inline void multiply_block(int64_t depth, const Operands<at::BFloat16>& from,
                                                       __mmask16 last, float* out, int64_t out_stride) {
  __m512 sum[kRows][kVectors];
  const auto lanes = [last](int v) { return v + 1 == kVectors ? last : static_cast<__mmask16>(0xffff); };
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth / 2; ++k) {
    __m512bh right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      right[v] = (__m512bh)_mm512_maskz_loadu_epi32(lanes(v), from.b + k * from.b_stride + 2 * v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, from.a + r * from.a_stride + 2 * k, sizeof(pair));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], right[v], (__m512bh)_mm512_set1_epi32(pair));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + r * out_stride + v * kLanes;
      if constexpr (kAdd) sum[r][v] = _mm512_add_ps(sum[r][v], _mm512_maskz_loadu_ps(lanes(v), to));
      _mm512_mask_storeu_ps(to, lanes(v), sum[r][v]);
    }
}

template <bool kAdd, int kVectors>
CONTRASTIVE_OPS_AVX512_BF16 void multiply_columns(int64_t rows, int64_t depth, Operands<at::BFloat16> from,
                                                  __mmask16 last, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + kMostRows <= rows; r += kMostRows, from.a += kMostRows * from.a_stride)
    multiply_block<kAdd, kMostRows, kVectors>(depth, from, last, out + r * out_stride, out_stride);
  for (; r < rows; ++r, from.a += from.a_stride)
    multiply_block<kAdd, 1, kVectors>(depth, from, last, out + r * out_stride, out_stride);
}

template <bool kAdd>
void multiply(int64_t rows, int64_t columns, int64_t depth, Operands<at::BFloat16> from, float* out,
              int64_t out_stride) {
  constexpr int64_t kColumns = kMostVectors * kLanes;
  for (int64_t c = 0; c < columns; c += kColumns, from.b += 2 * kColumns) {
    const int64_t left = columns - c;
    const auto lanes = [left](int64_t v) {
      return static_cast<__mmask16>((1u << std::clamp<int64_t>(left - v * kLanes, 0, kLanes)) - 1);
    };
    if (left > kLanes)
      multiply_columns<kAdd, 2>(rows, depth, from, lanes(1), out + c, out_stride);
    else
      multiply_columns<kAdd, 1>(rows, depth, from, lanes(0), out + c, out_stride);
  }
}
#endif

// float16, by ATen's `brgemm`, which is oneDNN's.
template <bool kAdd>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Operands<at::Half>& from, float* out,
              int64_t out_stride) {
  at::native::cpublas::brgemm(rows, columns, depth, from.a_stride, from.b_stride / 2, out_stride, kAdd,
                              from.a, from.b, out);
}

// Whether this chip multiplies T so.
template <typename T>
bool available() {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
#if defined(CPU_CAPABILITY_AVX512)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
  }
  // The library does it on AMX alone, and elsewhere reads the same memory as whole rows; or it throws, where
  // it is switched off or held back to an older instruction set.
  static const bool answer = [] {
#if defined(__x86_64__)
    constexpr int64_t kDepth = 4, kColumns = 32;
    at::Half a[kDepth], b[kDepth * kColumns];
    for (int64_t d = 0; d < kDepth; ++d) {
      a[d] = static_cast<float>(1 << d);
      for (int64_t c = 0; c < kColumns; ++c)
        b[(d / 2 * kColumns + c) * 2 + d % 2] = static_cast<float>((d + c) % 3);
    }
    float out[kColumns];
    try {
      multiply<false>(1, kColumns, kDepth, Operands<at::Half>{a, b, kDepth, 2 * kColumns}, out, kColumns);
      at::native::cpublas::brgemm_release();
    } catch (const c10::Error&) {
      return false;
    }
    for (int64_t c = 0; c < kColumns; ++c) {
      float sum = 0;
      for (int64_t d = 0; d < kDepth; ++d) sum += static_cast<float>((1 << d) * ((d + c) % 3));
      if (out[c] != sum) return false;
    }
    return true;
#else
    return false;
#endif
  }();
  return answer;
}

}  // namespace contrastive_ops::pairs
