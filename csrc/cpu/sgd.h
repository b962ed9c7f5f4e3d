// A step of SGD on rows of a weight, each touched once.
#pragma once

#include <type_traits>

#include "../records.h"
#include "matrix.h"

namespace contrastive_ops {

// g = grad + lambda w;  v <- m v + g;  w <- w - eta v, or with nesterov w - eta (g + m v).
class SGD {
 public:
  SGD(const at::Tensor& weight, const at::Tensor& momentum_buffer, const SGDSettings& settings)
      : weight_(weight), buffer_(momentum_buffer), settings_(settings) {}

  // A row's step, given its gradient.
  template <typename Grad>
  void take(int64_t row, const Grad* grad) const {
    with_dtype(weight_.scalar_type(), [&](auto element) {
      using weight_t = decltype(element);
      using T = std::conditional_t<std::is_same_v<weight_t, double>, double, float>;
      const int64_t dim = weight_.size(1);
      const Strided<weight_t> w{weight_.mutable_data_ptr<weight_t>() + row * weight_.stride(0),
                                weight_.stride(1)};
      const Strided<weight_t> v{buffer_.mutable_data_ptr<weight_t>() + row * buffer_.stride(0),
                                buffer_.stride(1)};
      const T lr = static_cast<T>(settings_.lr), momentum = static_cast<T>(settings_.momentum);
      const T weight_decay = static_cast<T>(settings_.weight_decay);
      // The step is lr (along_gradient g + along_velocity v).
      const T along_gradient = settings_.nesterov ? T(1) : T(0);
      const T along_velocity = settings_.nesterov ? momentum : T(1);
      for (int64_t d = 0; d < dim; ++d) {
        const T g = static_cast<T>(grad[d]) + weight_decay * static_cast<T>(w[d]);
        const T moved = momentum * static_cast<T>(v[d]) + g;
        v[d] = static_cast<weight_t>(moved);
        w[d] =
            static_cast<weight_t>(static_cast<T>(w[d]) - lr * (along_gradient * g + along_velocity * moved));
      }
    });
  }

 private:
  const at::Tensor weight_, buffer_;
  const SGDSettings settings_;
};

}  // namespace contrastive_ops
