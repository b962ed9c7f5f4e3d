// A step of SGD on the classifier's weight. contrastive_ops/gpu/sgd.py is the host's side.
//
// A block of threads takes BLOCK numbers, four of each thread's at a time, so that twelve loads are on their
// way at once. Bound by memory: five numbers move for each of the weight's. It has not been measured on a GPU
// yet.
#pragma once

#include "../sgd_math.h"
#include "elements.h"

namespace contrastive_ops {

// Where the number of an index lies, in the order of rows.
template <bool kContiguous, typename T>
__device__ T& element(const Matrix<T>& matrix, int64 index, int64 dim) {
  if constexpr (kContiguous)
    return matrix.data[index];
  else
    return matrix.at(index / dim, index % dim);
}

template <int kBlock, bool kContiguous, typename Weight, typename Grad>
__device__ void sgd(const Matrix<Weight>& weight, const Matrix<Weight>& momentum_buffer,
                    const Matrix<Grad>& grad, int64 count, int64 dim, const SGDSettings& settings) {
  using T = typename ComputeType<Weight>::type;
  constexpr int kAtOnce = 4;
  const SGDStep<T> step(settings);
  const int64 first = blockIdx.x * static_cast<int64>(kBlock);
  for (int begin = threadIdx.x; begin < kBlock; begin += kAtOnce * blockDim.x) {
    T w[kAtOnce], v[kAtOnce], g[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64 index = first + begin + i * static_cast<int64>(blockDim.x);
      if (index >= count) break;
      w[i] = convert<T>(element<kContiguous>(weight, index, dim));
      v[i] = convert<T>(element<kContiguous>(momentum_buffer, index, dim));
      g[i] = convert<T>(element<kContiguous>(grad, index, dim));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64 index = first + begin + i * static_cast<int64>(blockDim.x);
      if (index >= count) break;
      step.take(g[i], w[i], v[i]);
      element<kContiguous>(momentum_buffer, index, dim) = convert<Weight>(v[i]);
      element<kContiguous>(weight, index, dim) = convert<Weight>(w[i]);
    }
  }
}

// Arguments: weight, momentum_buffer, grad: Matrix (A, D) of any floating dtypes, the first two of the same;
// CONTIGUOUS if all three are. count: A D. dim: D. lr, momentum, weight_decay, NESTEROV: SGDSettings.
template <typename Arguments>
__device__ void sgd(const Arguments& a) {
  sgd<Arguments::BLOCK, Arguments::CONTIGUOUS>(
      a.weight, a.momentum_buffer, a.grad, a.count, a.dim,
      SGDSettings{a.lr, a.momentum, a.weight_decay, Arguments::NESTEROV});
}

}  // namespace contrastive_ops
