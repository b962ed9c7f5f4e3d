// The losses of rows, as tensors.
#pragma once

#include "../row_math.h"
#include "matrix.h"
#include "operators.h"

namespace contrastive_ops {

// Writes losses of rows in the dtype T.
template <typename T>
class LossWriter {
 public:
  explicit LossWriter(int64_t rows)
      : loss_(empty({rows}, c10::CppTypeToScalarType<T>::value)),
        instance_(empty({rows}, c10::CppTypeToScalarType<T>::value)),
        consistency_(empty({rows}, c10::CppTypeToScalarType<T>::value)),
        rank_(empty({rows}, at::kLong)),
        to_{loss_.mutable_data_ptr<T>(), instance_.mutable_data_ptr<T>(), consistency_.mutable_data_ptr<T>()},
        ranks_(rank_.mutable_data_ptr<int64_t>()) {}

  void write(int64_t row, const RowLosses& losses, double rank) {
    to_.loss[row] = static_cast<T>(losses.loss);
    to_.instance[row] = static_cast<T>(losses.instance);
    to_.consistency[row] = static_cast<T>(losses.consistency);
    ranks_[row] = static_cast<int64_t>(rank);
  }

  // The losses, with what their gradients need.
  Losses with(const at::Tensor& coefficients) const {
    return {loss_, instance_, consistency_, rank_, coefficients};
  }

 private:
  const at::Tensor loss_, instance_, consistency_, rank_;
  const struct {
    T *loss, *instance, *consistency;
  } to_;
  int64_t* const ranks_;
};

// One part (1, rows, fields) of several.
template <typename Partial, typename Settings>
at::Tensor joined(const at::Tensor& partial, const Settings& settings) {
  const int64_t parts = partial.size(0), rows = partial.size(1);
  if (parts == 1) return partial;
  const Records<Partial> part(partial);
  auto [one, sums] = empty_records<Partial>({1, rows});
  for (int64_t row = 0; row < rows; ++row) *sums++ = merge(&part[row], {parts, rows}, settings);
  return one;
}

}  // namespace contrastive_ops
