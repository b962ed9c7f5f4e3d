// The operator `sgd_`. It is bound by memory: weight, momentum and gradient are read and the first two
// written, 20 bytes an element in float32.

#include "sgd.h"

#include <ATen/Parallel.h>

#include "operators.h"

namespace contrastive_ops {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

void sgd_(const at::Tensor& weight, const at::Tensor& momentum_buffer, const at::Tensor& grad,
          const SGDSettings& sgd) {
  const SGD step(weight, momentum_buffer, sgd);
  const at::Tensor rows = grad.contiguous();
  const int64_t dim = weight.size(1);
  with_dtype(rows.scalar_type(), [&](auto element) {
    const auto* data = rows.const_data_ptr<decltype(element)>();
    at::parallel_for(0, weight.size(0), at::divup(kGrain, dim), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) step.take(row, data + row * dim);
    });
  });
  mark_written({momentum_buffer, weight});
}

}  // namespace contrastive_ops
