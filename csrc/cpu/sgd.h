// A step of SGD on rows of a weight, each touched once.
#pragma once

#include <type_traits>

#include "../sgd_math.h"
#include "matrix.h"

namespace contrastive_ops {

// `SGDStep` on a row of a weight of any dtype and strides.
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
      const SGDStep<T> step(settings_);
      for (int64_t d = 0; d < dim; ++d) {
        T weight = static_cast<T>(w[d]), velocity = static_cast<T>(v[d]);
        step.take(static_cast<T>(grad[d]), weight, velocity);
        v[d] = static_cast<weight_t>(velocity), w[d] = static_cast<weight_t>(weight);
      }
    });
  }

 private:
  const at::Tensor weight_, buffer_;
  const SGDSettings settings_;
};

}  // namespace contrastive_ops
