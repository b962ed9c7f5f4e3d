// Vectors of the widest instruction set this file is compiled for, and the exponential of the softmaxes.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace contrastive_ops {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
inline constexpr int64_t kWidth = Vec<T>::size();

// As many numbers as a vector has doubles, in double.
inline Vec<double> load_doubles(const double* from) {
  return Vec<double>::loadu(from);
}
inline Vec<double> load_doubles(const float* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  double numbers[kWidth<double>];
  std::copy_n(from, kWidth<double>, numbers);
  return Vec<double>::loadu(numbers);
#endif
}

// A panel is the group of query rows that share one pass over a tile of keys: two vectors wide, so that each
// key element broadcast from memory serves two multiply-adds.
template <typename T>
inline constexpr int64_t kPanel = 2 * kWidth<T>;

// The exponent of a softmax's terms, e^{a/tau}: a power of 2, of a times a factor.
template <typename T>
struct Exponent {
  static constexpr T kLeast = std::is_same_v<T, float> ? -127 : -1023;  // of a power that is 0
  Vec<T> factor, least;                                                 // a below `least` gives 0

  explicit Exponent(double temperature)
      : factor(static_cast<T>(M_LOG2E / temperature)),
        least(static_cast<T>(
            std::max<double>(kLeast * temperature / M_LOG2E, std::numeric_limits<T>::lowest()))) {}
};

// e^{a/tau} for a <= 0, to half a unit in the last place and what the factor's rounding does; 0 below the
// smallest normal number; NaN stays NaN.
//
// Adding 1.5 * 2^23 + 127 rounds x = a * factor to an integer n and leaves n + 127, the exponent field of
// 2^n, in the low bits; what remains, r = x - n in [-1/2, 1/2], goes into a minimax polynomial (relative
// error 2e-9 in float, 3e-18 in double). n = -127 makes the exponent field, and 2^n, zero.
template <typename T>
inline Vec<T> exp_nonpositive(Vec<T> a, const Exponent<T>& exponent);

template <>
inline Vec<float> exp_nonpositive(Vec<float> a, const Exponent<float>& exponent) {
  a = at::vec::clamp_min(a, exponent.least);
  const Vec<float> magic(0x1.8p23f + 127.f);
  const Vec<float> shifted = at::vec::fmadd(a, exponent.factor, magic);
  const Vec<float> r = at::vec::fmsub(a, exponent.factor, shifted - magic);
  Vec<float> p(1.534581348e-4f);
  p = at::vec::fmadd(p, r, Vec<float>(1.339993125e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(9.618488958e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(5.550328777e-2f));
  p = at::vec::fmadd(p, r, Vec<float>(2.402264689e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(6.931472057e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(1.f));
  const auto power = std::bit_cast<Vec<int32_t>>(shifted) << Vec<int32_t>(23);
  return p * std::bit_cast<Vec<float>>(power);
}

template <>
inline Vec<double> exp_nonpositive(Vec<double> a, const Exponent<double>& exponent) {
  a = at::vec::clamp_min(a, exponent.least);
  const Vec<double> magic(0x1.8p52 + 1023.);
  const Vec<double> shifted = at::vec::fmadd(a, exponent.factor, magic);
  const Vec<double> r = at::vec::fmsub(a, exponent.factor, shifted - magic);
  Vec<double> p(4.43527840433824252e-10);
  p = at::vec::fmadd(p, r, Vec<double>(7.0741055780738967e-9));
  p = at::vec::fmadd(p, r, Vec<double>(1.01781980516256904e-7));
  p = at::vec::fmadd(p, r, Vec<double>(1.32154330899539064e-6));
  p = at::vec::fmadd(p, r, Vec<double>(1.52527334899126854e-5));
  p = at::vec::fmadd(p, r, Vec<double>(1.54035304625136713e-4));
  p = at::vec::fmadd(p, r, Vec<double>(1.33335581467900063e-3));
  p = at::vec::fmadd(p, r, Vec<double>(9.61812910758833611e-3));
  p = at::vec::fmadd(p, r, Vec<double>(5.55041086648219712e-2));
  p = at::vec::fmadd(p, r, Vec<double>(2.40226506959101562e-1));
  p = at::vec::fmadd(p, r, Vec<double>(6.9314718055994533e-1));
  p = at::vec::fmadd(p, r, Vec<double>(1.));
  const auto power = std::bit_cast<Vec<int64_t>>(shifted) << Vec<int64_t>(52);
  return p * std::bit_cast<Vec<double>>(power);
}

}  // namespace contrastive_ops
