// The operators on rows of a classifier: a step of SGD, and the exchange of rows with their storage.
//
// Both are bound by memory. `sgd_` reads weight, momentum and gradient once and writes the first two, 20
// bytes an element in float32; `exchange_rows_` reads and writes two records of 2 D elements for each row.

#include <ATen/Parallel.h>

#include "operators.h"
#include "sgd.h"

namespace contrastive_ops {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

const int64_t* checked_rows(const char* name, const at::Tensor& rows, int64_t count, int64_t bound) {
  TORCH_CHECK_VALUE(rows.device().is_cpu() && rows.scalar_type() == at::kLong && rows.is_contiguous() &&
                        rows.dim() == 1 && rows.size(0) == count,
                    "exchange_rows_: ", name, " must be a contiguous int64 CPU tensor of ", count,
                    " rows, got ", rows.sizes(), " ", rows.scalar_type());
  const int64_t* data = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK_VALUE(data[i] >= 0 && data[i] < bound, "exchange_rows_: ", name, " must be in [0, ", bound,
                      "), got ", data[i]);
  return data;
}

}  // namespace

void sgd_(const at::Tensor& weight, const at::Tensor& momentum_buffer, const at::Tensor& grad, double lr,
          double momentum, double weight_decay, bool nesterov) {
  TORCH_CHECK_VALUE(grad.sizes() == weight.sizes(), "sgd_: grad must have the shape of weight, ",
                    weight.sizes(), ", got ", grad.sizes());
  if (!weight.is_contiguous() || !momentum_buffer.is_contiguous()) {
    const at::Tensor w = weight.contiguous(), v = momentum_buffer.contiguous();
    sgd_(w, v, grad, lr, momentum, weight_decay, nesterov);
    weight.copy_(w), momentum_buffer.copy_(v);
    mark_written({momentum_buffer, weight});
    return;
  }
  const SGD step(weight, momentum_buffer, lr, momentum, weight_decay, nesterov);
  const at::Tensor rows = grad.contiguous();
  const int64_t dim = std::max<int64_t>(weight.size(1), 1);
  with_dtype(rows.scalar_type(), [&](auto element) {
    const auto* data = rows.const_data_ptr<decltype(element)>();
    at::parallel_for(0, weight.size(0), at::divup(kGrain, dim), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) step.take(row, data + row * dim);
    });
  });
  mark_written({momentum_buffer, weight});
}

void exchange_rows_(const at::Tensor& weight, const at::Tensor& momentum_buffer, const at::Tensor& slots,
                    const at::Tensor& incoming, const at::Tensor& incoming_rows,
                    const at::Tensor& coefficients, const at::Tensor& outgoing,
                    const at::Tensor& outgoing_rows) {
  const int64_t count = slots.numel(), dim = weight.size(1);
  for (const auto& tensor : {weight, momentum_buffer, incoming, outgoing})
    TORCH_CHECK_VALUE(
        tensor.device().is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == weight.scalar_type(),
        "exchange_rows_: weight, momentum_buffer, incoming and outgoing must be contiguous CPU "
        "tensors of one dtype");
  for (const auto& tensor : {incoming, outgoing})
    TORCH_CHECK_VALUE(tensor.dim() == 3 && tensor.size(1) == 2 && tensor.size(2) == dim,
                      "exchange_rows_: incoming and outgoing must be (rows, 2, ", dim, "), got ",
                      tensor.sizes());
  TORCH_CHECK_VALUE(coefficients.device().is_cpu() && coefficients.scalar_type() == at::kDouble &&
                        coefficients.is_contiguous() && coefficients.numel() == 4 * count,
                    "exchange_rows_: coefficients must be a contiguous float64 CPU tensor (", count,
                    ", 2, 2), got ", coefficients.sizes());
  const int64_t* slot = checked_rows("slots", slots, count, weight.size(0));
  const int64_t* from = checked_rows("incoming_rows", incoming_rows, count, incoming.size(0));
  const int64_t* to = checked_rows("outgoing_rows", outgoing_rows, count, outgoing.size(0));
  const double* matrices = coefficients.const_data_ptr<double>();

  with_dtype(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    T *weights = weight.mutable_data_ptr<T>(), *buffers = momentum_buffer.mutable_data_ptr<T>();
    const T* incoming_data = incoming.const_data_ptr<T>();
    T* outgoing_data = outgoing.mutable_data_ptr<T>();
    at::parallel_for(0, count, at::divup(kGrain, 4 * dim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T *w = weights + slot[i] * dim, *v = buffers + slot[i] * dim;
        T* leaving = outgoing_data + to[i] * 2 * dim;
        std::copy_n(w, dim, leaving), std::copy_n(v, dim, leaving + dim);
        const T* arriving = incoming_data + from[i] * 2 * dim;
        const double* c = matrices + 4 * i;
        for (int64_t d = 0; d < dim; ++d) {
          const double old_w = arriving[d], old_v = arriving[dim + d];
          w[d] = static_cast<T>(c[0] * old_w + c[1] * old_v);
          v[d] = static_cast<T>(c[2] * old_w + c[3] * old_v);
        }
      }
    });
  });
  mark_written({outgoing, momentum_buffer, weight});
}

}  // namespace contrastive_ops
