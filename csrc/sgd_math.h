// A step of SGD on one number of a weight, for host and device compilers.
#pragma once

#include "host_device.h"
#include "records.h"

namespace contrastive_ops {

// g = grad + lambda w;  v <- m v + g;  w <- w - eta v, or with nesterov w - eta (g + m v); all in T.
template <typename T>
class SGDStep {
 public:
  CONTRASTIVE_OPS_HOST_DEVICE explicit SGDStep(const SGDSettings& settings)
      : lr_(static_cast<T>(settings.lr)),
        momentum_(static_cast<T>(settings.momentum)),
        weight_decay_(static_cast<T>(settings.weight_decay)),
        nesterov_(settings.nesterov) {}

  CONTRASTIVE_OPS_HOST_DEVICE void take(T grad, T& w, T& v) const {
    const T g = grad + weight_decay_ * w;
    v = momentum_ * v + g;
    w -= lr_ * (nesterov_ ? g + momentum_ * v : v);
  }

 private:
  T lr_, momentum_, weight_decay_;
  bool nesterov_;
};

}  // namespace contrastive_ops
