// The operators on CPUs: contrastive_ops/reference.py specifies each under its name.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace contrastive_ops {

// A loss's first output is its rows; the others are named in contrastive_ops/_ops.py.
using LossTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

LossTensors co2(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue, double temperature,
                double consistency_temperature, double instance_weight, double consistency_weight,
                bool include_positive, bool normalize, bool compute_gradient);

LossTensors nt_xent(const at::Tensor& views, double temperature, double consistency_temperature,
                    double consistency_weight, bool normalize);

at::Tensor nt_xent_backward(const at::Tensor& grad_loss, const at::Tensor& views,
                            const at::Tensor& statistics, double temperature, double consistency_temperature,
                            double consistency_weight, bool normalize);

LossTensors conic(const at::Tensor& views, const at::Tensor& weight, const at::Tensor& target,
                  double temperature, double compensation, double consistency_weight);

std::tuple<at::Tensor, at::Tensor> conic_backward(const at::Tensor& grad_loss, const at::Tensor& views,
                                                  const at::Tensor& weight, const at::Tensor& target,
                                                  const at::Tensor& statistics, double temperature,
                                                  double consistency_weight, bool views_need_grad,
                                                  bool weight_needs_grad);

at::Tensor conic_backward_sgd_(const at::Tensor& grad_loss, const at::Tensor& views, const at::Tensor& weight,
                               const at::Tensor& momentum_buffer, const at::Tensor& target,
                               const at::Tensor& statistics, double temperature, double consistency_weight,
                               double lr, double momentum, double weight_decay, bool nesterov);

void sgd_(const at::Tensor& weight, const at::Tensor& momentum_buffer, const at::Tensor& grad, double lr,
          double momentum, double weight_decay, bool nesterov);

void exchange_rows_(const at::Tensor& weight, const at::Tensor& momentum_buffer, const at::Tensor& slots,
                    const at::Tensor& incoming, const at::Tensor& incoming_rows,
                    const at::Tensor& coefficients, const at::Tensor& outgoing,
                    const at::Tensor& outgoing_rows);

}  // namespace contrastive_ops
