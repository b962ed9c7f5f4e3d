// The operators on CPUs and the steps that losses are made of: contrastive_ops/reference.py specifies each
// under its name, contrastive_ops/_contract.py what they hand to each other.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "../records.h"

namespace contrastive_ops {

// loss, instance loss, consistency loss, rank, and what the gradient needs (from `co2` the gradient itself)
using Losses = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Losses co2(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue,
           const CO2Settings& settings, bool compute_gradient);
std::tuple<at::Tensor, at::Tensor> co2_statistics(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& queue, const CO2Settings& settings);
Losses co2_merge(const at::Tensor& partial, const at::Tensor& rows, const CO2Settings& settings);
at::Tensor co2_gradient(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue,
                        const at::Tensor& rows, const CO2Settings& settings);

struct NTXentKeys {
  at::Tensor views, target;
  std::optional<at::Tensor> grad_loss, coefficients;
};

Losses nt_xent(const at::Tensor& views, const NTXentSettings& settings);
std::tuple<at::Tensor, at::Tensor> nt_xent_statistics(const at::Tensor& views, const NTXentSettings& settings,
                                                      const std::optional<NTXentKeys>& keys);
Losses nt_xent_merge(const at::Tensor& partial, const at::Tensor& positive, const NTXentSettings& settings);
at::Tensor nt_xent_gradient(const at::Tensor& grad_loss, const at::Tensor& views,
                            const at::Tensor& statistics, const NTXentSettings& settings,
                            const std::optional<NTXentKeys>& keys);

Losses conic(const at::Tensor& views, const at::Tensor& weight, const at::Tensor& target,
             const ConICSettings& settings);
at::Tensor conic_positives(const at::Tensor& views, const at::Tensor& weight, const at::Tensor& target);
at::Tensor conic_statistics(const at::Tensor& views, const at::Tensor& weight, const at::Tensor& target,
                            const at::Tensor& positives, const ConICSettings& settings);
Losses conic_merge(const at::Tensor& partial, const at::Tensor& positives, const at::Tensor& views,
                   const ConICSettings& settings);
std::tuple<at::Tensor, at::Tensor> conic_gradient(const at::Tensor& grad_loss, const at::Tensor& views,
                                                  const at::Tensor& weight, const at::Tensor& target,
                                                  const at::Tensor& statistics, const ConICSettings& settings,
                                                  bool views_need_grad, bool weight_needs_grad);
at::Tensor conic_gradient_sgd_(const at::Tensor& grad_loss, const at::Tensor& views, const at::Tensor& weight,
                               const at::Tensor& momentum_buffer, const at::Tensor& target,
                               const at::Tensor& statistics, const ConICSettings& settings,
                               const SGDSettings& sgd);

void sgd_(const at::Tensor& weight, const at::Tensor& momentum_buffer, const at::Tensor& grad,
          const SGDSettings& sgd);
void exchange_rows_(const at::Tensor& weight, const at::Tensor& momentum_buffer, const at::Tensor& slots,
                    const at::Tensor& incoming, const at::Tensor& incoming_rows,
                    const at::Tensor& coefficients, const at::Tensor& outgoing,
                    const at::Tensor& outgoing_rows);

// Moves on the versions of tensors that an operator has written, which autograd compares. The last act of the
// operator, and the weight's come last of all: who is interrupted in the interpreter can tell by them whether
// the operator has run.
inline void mark_written(std::initializer_list<at::Tensor> tensors) {
  for (const auto& tensor : tensors)
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace contrastive_ops
