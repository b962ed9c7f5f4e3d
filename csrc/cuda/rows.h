// What kernels compute of rows outside of the walk: norms, sums over parts, and the chain rule.
#pragma once

#include "numbers.h"

namespace contrastive_ops {

// Sum over `kLanes` neighbouring lanes, the same in all of them.
template <int kLanes, typename T>
__device__ T sum_of_lanes(T x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffff, x, mask);
  return x;
}

// Sum over a block's threads, the same in all of them.
template <typename T>
__device__ T sum_of_block(T x) {
  __shared__ T sums[32];
  x = sum_of_lanes<32>(x);
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x += sums[warp];
  return x;
}

template <typename T>
__device__ T max_of_block(T x) {
  __shared__ T largest[32];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, mask));
  __syncthreads();
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = x;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x = fmaxf(x, largest[warp]);
  return x;
}

// The row of a warp, where each has one.
__device__ inline int64 row_of_warp() {
  return static_cast<int64>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
}

// 16 bytes of a row, or what becomes of as many numbers.
template <typename T, int kCount = kChunk / static_cast<int>(sizeof(T))>
struct alignas(kCount * sizeof(T)) Numbers {
  static constexpr int kNumbers = kCount;
  T of[kCount];
};

// Whether rows consist of `Numbers`, each at a multiple of 16 bytes.
template <typename T>
__device__ bool has_chunks(const Rows<T>& rows) {
  return rows.matrix.column == 1 && rows.dim % Numbers<T>::kNumbers == 0 &&
         rows.matrix.row % Numbers<T>::kNumbers == 0 &&
         reinterpret_cast<unsigned long long>(rows.matrix.data) % kChunk == 0;
}
template <typename T>
__device__ Numbers<T> chunk_at(const Rows<T>& rows, int64 row, int64 column) {
  return *reinterpret_cast<const Numbers<T>*>(rows.matrix.data + row * rows.matrix.row + column);
}

// What `kLanes` neighbouring lanes find out of two rows, each of which has its part of the dimensions; the
// same in all. float64 holds any square, but many chips have few units for it: float32 holds all of
// float16's, and has the digits that its rows need. A row outside is 0.
struct Products {
  double xx, yy, xy;
};
template <int kLanes, typename X, typename Y>
__device__ Products products_of(const Rows<X>& x_rows, int64 x_row, const Rows<Y>& y_rows, int64 y_row) {
  constexpr bool kInFloat = IsSame<X, Half>::value && IsSame<Y, Half>::value;
  using Sum = typename Choose<kInFloat, float, double>::type;
  Sum xx = 0, yy = 0, xy = 0;
  const auto add = [&](Sum x, Sum y) { xx += x * x, yy += y * y, xy += x * y; };
  const bool has_x = x_rows.has(x_row, 0), has_y = y_rows.has(y_row, 0);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  if (sizeof(X) == sizeof(Y) && has_chunks(x_rows) && has_chunks(y_rows)) {
    constexpr int kEach = Numbers<X>::kNumbers;
#pragma unroll 2
    for (int64 column = lane * kEach; column < x_rows.dim; column += kLanes * kEach) {
      Numbers<X> x{};
      Numbers<Y> y{};
      if (has_x) x = chunk_at(x_rows, x_row, column);
      if (has_y) y = chunk_at(y_rows, y_row, column);
#pragma unroll
      for (int i = 0; i < kEach; ++i) add(to_float(x.of[i]), to_float(y.of[i % Numbers<Y>::kNumbers]));
    }
  } else {
#pragma unroll 4
    for (int64 column = lane; column < x_rows.dim; column += kLanes)
      add(has_x ? to_float(x_rows.matrix.at(x_row, column)) : 0,
          has_y ? to_float(y_rows.matrix.at(y_row, column)) : 0);
  }
  return {sum_of_lanes<kLanes, double>(xx), sum_of_lanes<kLanes, double>(yy),
          sum_of_lanes<kLanes, double>(xy)};
}

// The sum of a row's squares, by `kLanes` neighbouring lanes, to more digits than float32 has: roundings are
// summed as well. Where float32 does not hold the squares, it is computed again in float64.
template <int kLanes, typename T>
__device__ double squares_of(const Rows<T>& rows, int64 row) {
  float sum = 0, rest = 0;
  const auto add = [&](float x) {
    const float square = x * x, larger = sum + square, added = larger - sum;
    rest += (sum - (larger - added)) + (square - added) + fmaf(x, x, -square);
    sum = larger;
  };
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64 dim = row < rows.count ? rows.dim : 0;
  if (has_chunks(rows)) {
    constexpr int kEach = Numbers<T>::kNumbers;
    for (int64 column = lane * kEach; column < dim; column += kLanes * kEach) {
      const Numbers<T> x = chunk_at(rows, row, column);
#pragma unroll
      for (int i = 0; i < kEach; ++i) add(to_float(x.of[i]));
    }
  } else {
    for (int64 column = lane; column < dim; column += kLanes) add(to_float(rows.matrix.at(row, column)));
  }
  const double total = sum_of_lanes<kLanes, double>(static_cast<double>(sum) + rest);
  const bool is_held = total > 1e-24 && total < 1e36;
  if (__all_sync(0xffffffff, is_held || dim == 0)) return total;
  double squares = 0;
  for (int64 column = lane; column < dim; column += kLanes) {
    const double x = to_float(rows.matrix.at(row, column));
    squares += x * x;
  }
  squares = sum_of_lanes<kLanes>(squares);
  return is_held ? total : squares;
}

__device__ inline double norm_of(double squares) {
  return fmax(sqrt(squares), kNormEpsilon);
}

// Neighbouring lanes' part in writing x^ of a row: (padded) dimensions past its own are 0, as are rows
// outside.
template <int kLanes, typename Unit, typename T>
__device__ void store_unit(const Matrix<Unit>& unit, int64 unit_row, const Rows<T>& rows, int64 row,
                           double norm) {
  const double inverse = 1 / norm;
  // What is rounded to half precision needs no more than float32, and many chips have few units for more.
  const bool in_float = sizeof(Unit) == 2 && norm < 1e30;
  const auto scaled = [&](float x) {
    return from_float<Unit>(in_float ? x * static_cast<float>(inverse) : static_cast<float>(x * inverse));
  };
  Unit* const to = unit.data + unit_row * unit.row;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  int64 column = lane;
  constexpr int kEach = Numbers<T>::kNumbers;
  if (has_chunks(rows) && unit.row % kEach == 0 && rows.has(row, 0)) {
    for (int64 first = lane * kEach; first < rows.dim; first += kLanes * kEach) {
      const Numbers<T> x = chunk_at(rows, row, first);
      Numbers<Unit, kEach> y;
#pragma unroll
      for (int i = 0; i < kEach; ++i) y.of[i] = scaled(to_float(x.of[i]));
      *reinterpret_cast<Numbers<Unit, kEach>*>(to + first) = y;
    }
    column += rows.dim;
  }
  for (; column < unit.row; column += kLanes)
    to[column] = scaled(rows.has(row, column) ? to_float(rows.matrix.at(row, column)) : 0);
}

__device__ inline double max_of_lanes(double x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmax(x, __shfl_xor_sync(0xffffffff, x, mask));
  return x;
}

// The sums of a warp's records, field by field.
template <typename Record>
__device__ Record sum_of_records(const Record& x) {
  Record sum;
  const double* from = reinterpret_cast<const double*>(&x);
  double* to = reinterpret_cast<double*>(&sum);
#pragma unroll
  for (int field = 0; field < static_cast<int>(sizeof(Record) / sizeof(double)); ++field)
    to[field] = sum_of_lanes<32>(from[field]);
  return sum;
}

// The gradient of a row of up to 1024 dimensions, in float64, over the threads of a block of 128.
struct RowGradient {
  static constexpr int kThreads = 128, kEach = 8;
  double grad[kEach];

  __device__ static int64 column(int i) { return kThreads * i + static_cast<int64>(threadIdx.x); }

  // What the ranges of keys added, added up in their order. `parts` has `padded_rows` rows for each.
  __device__ void sum_parts(const Matrix<float>& parts, int64 row, int64 padded_rows, int64 ranges,
                            int64 dim) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float total = 0;
      if (column(i) < dim) {
        const float* from = &parts.at(row, column(i));
#pragma unroll 8
        for (int64 part = 0; part < ranges; ++part) total += from[part * padded_rows * parts.row];
      }
      grad[i] = total;
    }
  }
  template <typename T>
  __device__ static void load(double (&x)[kEach], const Rows<T>& rows, int64 row, double norm) {
    const double inverse = 1 / norm;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      x[i] = rows.has(row, column(i)) ? to_float(rows.matrix.at(row, column(i))) * inverse : 0;
  }
  __device__ static double dot(const double (&x)[kEach], const double (&y)[kEach]) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += x[i] * y[i];
    return sum_of_block(sum);
  }
  __device__ void add(const double (&x)[kEach], double factor) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) grad[i] += factor * x[i];
  }
  // dx = (dx^ - x^ (x^.dx^)) / |x|; a row below the epsilon was only scaled, so it has no projection.
  __device__ void through_norm(const double (&unit)[kEach], double norm) {
    const double radial = norm > kNormEpsilon ? dot(unit, grad) : 0, inverse = 1 / norm;
#pragma unroll
    for (int i = 0; i < kEach; ++i) grad[i] = (grad[i] - unit[i] * radial) * inverse;
  }
  template <typename T>
  __device__ void store(const Matrix<T>& to, int64 row, int64 dim) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (column(i) < dim) to.at(row, column(i)) = from_float<T>(static_cast<float>(grad[i]));
  }
};

}  // namespace contrastive_ops
