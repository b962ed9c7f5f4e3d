// Numbers as matrices store them, and as kernels compute with them; for NVRTC and nvcc, without their
// headers.
//
// A kernel "co2.merge" is a function `co2_merge(arguments)` of a struct that the host declares: it has the
// host's arguments under their names, and those in capitals as constants.
#pragma once

namespace contrastive_ops {

using int64 = long long;

constexpr int kChunk = 16;  // bytes that a thread can read at once

// How rows are multiplied: as they are in half precision; float32 in TF32, or as exactly as float32 is.
enum class Precision { half, tf32, tf32x3 };

struct Half {  // float16
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

// A matrix of any strides, counted in numbers.
template <typename T>
struct Matrix {
  using Element = T;
  static constexpr bool kExists = true;

  T* data;
  int64 row, column;

  __device__ T& at(int64 i, int64 j) const { return data[i * row + j * column]; }
};
template <>
struct Matrix<void> {  // none
  static constexpr bool kExists = false;

  void* data;
  int64 row, column;
};

template <typename T>
struct Vector {
  using Element = T;
  static constexpr bool kExists = true;

  T* data;
  int64 stride;

  __device__ T& at(int64 i) const { return data[i * stride]; }
};
template <>
struct Vector<void> {
  static constexpr bool kExists = false;

  void* data;
  int64 stride;
};

// Both views of some instances, (2, B, D).
template <typename T>
struct Views {
  using Element = T;

  T* data;
  int64 view, row, column;

  __device__ Matrix<T> operator[](int64 i) const { return {data + i * view, row, column}; }
};

// Some rows of a matrix that has `count` of them, of `dim` numbers each; what is outside is read as 0.
template <typename T>
struct Rows {
  Matrix<T> matrix;
  int64 count, dim;

  __device__ bool has(int64 row, int64 column) const { return row < count && column < dim; }
};

constexpr float kLowestLogit = -1e38f;  // below every logit, yet finite: a difference of two is no NaN
constexpr double kNormEpsilon = 1e-12;  // a row shorter than this is divided by this, as in reference.py
constexpr float kLargestHalf = 65504.f;
constexpr float kLargestFloat = 0x1.fffffep127f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr double kLog2E = 1.4426950408889634;

// Whether a pointer among the arguments was given, or None.
template <typename T>
constexpr bool kGiven = true;
template <>
constexpr bool kGiven<decltype(nullptr)> = false;

__device__ inline float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ inline float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(double x) {
  return static_cast<float>(x);
}

__device__ inline double to_double(float x) {
  return x;
}
__device__ inline double to_double(double x) {
  return x;
}
template <typename T>
__device__ double to_double(T x) {
  return to_float(x);
}

// A float as it is stored. `to_operand` takes a finite number that float16 cannot hold to the nearest that it
// can, for what is multiplied must not be infinite where what was stored is not.
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline Half from_float<Half>(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
#if __CUDA_ARCH__ >= 800
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const unsigned bits = __float_as_uint(x);
  const unsigned rounded = x == x ? bits + 0x7fff + ((bits >> 16) & 1) : 0x7fffffff;
  return {static_cast<unsigned short>(rounded >> 16)};
#endif
}
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline double from_float<double>(float x) {
  return x;
}

template <typename Operand, typename T>
struct ToOperand {
  __device__ static Operand of(T x) { return from_float<Operand>(to_float(x)); }
};
template <typename T>
struct ToOperand<T, T> {
  __device__ static T of(T x) { return x; }
};
template <typename T>
struct ToOperand<Half, T> {
  __device__ static Half of(T stored) {
    const float x = to_float(stored);
    return from_float<Half>(fabsf(x) <= kLargestFloat ? fminf(fmaxf(x, -kLargestHalf), kLargestHalf) : x);
  }
};
template <>
struct ToOperand<Half, Half> {
  __device__ static Half of(Half x) { return x; }
};

template <typename Operand, typename T>
__device__ Operand to_operand(T x) {
  return ToOperand<Operand, T>::of(x);
}

// Two numbers in a register, the first in its lower half.
__device__ inline unsigned pack(unsigned short low, unsigned short high) {
  return low | static_cast<unsigned>(high) << 16;
}
template <typename Operand>
__device__ unsigned pack(float low, float high);
template <>
__device__ inline unsigned pack<Half>(float low, float high) {
#if __CUDA_ARCH__ >= 800
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return pack(from_float<Half>(low).bits, from_float<Half>(high).bits);
#endif
}
template <>
__device__ inline unsigned pack<BFloat16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return pack(from_float<BFloat16>(low).bits, from_float<BFloat16>(high).bits);
#endif
}

template <typename A, typename B>
struct IsSame {
  static constexpr bool value = false;
};
template <typename A>
struct IsSame<A, A> {
  static constexpr bool value = true;
};

template <bool kCondition, typename A, typename B>
struct Choose {
  using type = A;
};
template <typename A, typename B>
struct Choose<false, A, B> {
  using type = B;
};

// 2^x to the last digits but two, one instruction of a special-function unit; less than 2^-126 is 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// lambda (old - new) of two maxima, of which the older may be kLowestLogit.
__device__ inline float move(float old, float top, float scale) {
  return fmaxf((old - top) * scale, kLowestLogit);
}

__device__ inline double not_a_number() {
  return __longlong_as_double(0x7ff8000000000000ll);
}

__device__ inline int64 padded(int64 count, int64 block) {
  return (count + block - 1) / block * block;
}
__device__ inline int64 smaller(int64 a, int64 b) {
  return a < b ? a : b;
}

// A double as the sum of two floats.
struct Split {
  float high, low;
};
__device__ inline Split split(double x) {
  const float high = static_cast<float>(x);
  return {high, static_cast<float>(x - high)};
}

}  // namespace contrastive_ops
