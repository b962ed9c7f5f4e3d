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

// What 8 neighbouring lanes find out of two rows, each of which has an eighth of the dimensions; the same in all.
struct Products {
  double xx, yy, xy;
};
template <typename X, typename Y>
__device__ Products products_of(const Rows<X>& x_rows, int64 x_row, const Rows<Y>& y_rows, int64 y_row) {
  Products sums{};
  if (x_row < x_rows.count && y_row < y_rows.count)
    for (int64 column = threadIdx.x % 8; column < x_rows.dim; column += 8) {
      const double x = to_float(x_rows.matrix.at(x_row, column)), y = to_float(y_rows.matrix.at(y_row, column));
      sums.xx += x * x, sums.yy += y * y, sums.xy += x * y;
    }
  return {sum_of_lanes<8>(sums.xx), sum_of_lanes<8>(sums.yy), sum_of_lanes<8>(sums.xy)};
}

__device__ inline double norm_of(double squares) {
  return fmax(sqrt(squares), kNormEpsilon);
}

}  // namespace contrastive_ops
