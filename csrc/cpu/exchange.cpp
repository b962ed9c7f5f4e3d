// The operator `exchange_rows_`, which moves records of a classifier's rows between slots and their storage.
// It is bound by memory: for each row it reads and writes two records of 2 D elements.

#include <ATen/Parallel.h>

#include <array>

#include "matrix.h"
#include "operators.h"

namespace contrastive_ops {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// The weight and the momentum of a record of `tensor`, whose data are `data`.
template <typename T>
std::array<Strided<T>, 2> halves(T* data, const at::Tensor& tensor, int64_t record) {
  T* first = data + record * tensor.stride(0);
  return {Strided<T>{first, tensor.stride(2)}, Strided<T>{first + tensor.stride(1), tensor.stride(2)}};
}

}  // namespace

void exchange_rows_(const at::Tensor& weight, const at::Tensor& momentum_buffer, const at::Tensor& slots,
                    const at::Tensor& incoming, const at::Tensor& incoming_rows,
                    const at::Tensor& coefficients, const at::Tensor& outgoing,
                    const at::Tensor& outgoing_rows) {
  const int64_t count = slots.size(0), dim = weight.size(1);
  const at::Tensor slot_list = slots.contiguous(), from_list = incoming_rows.contiguous(),
                   to_list = outgoing_rows.contiguous(), matrices = coefficients.contiguous();
  const auto *slot = slot_list.const_data_ptr<int64_t>(), *from = from_list.const_data_ptr<int64_t>(),
             *to = to_list.const_data_ptr<int64_t>();
  const auto* c = matrices.const_data_ptr<double>();

  with_dtype(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    T *weights = weight.mutable_data_ptr<T>(), *buffers = momentum_buffer.mutable_data_ptr<T>();
    const T* incoming_data = incoming.const_data_ptr<T>();
    T* outgoing_data = outgoing.mutable_data_ptr<T>();
    at::parallel_for(0, count, at::divup(kGrain, 4 * dim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Strided<T> w{weights + slot[i] * weight.stride(0), weight.stride(1)},
            v{buffers + slot[i] * momentum_buffer.stride(0), momentum_buffer.stride(1)};
        const auto [out_w, out_v] = halves(outgoing_data, outgoing, to[i]);
        const auto [in_w, in_v] = halves(incoming_data, incoming, from[i]);
        for (int64_t d = 0; d < dim; ++d) out_w[d] = w[d], out_v[d] = v[d];
        for (int64_t d = 0; d < dim; ++d) {
          const double old_w = in_w[d], old_v = in_v[d];
          w[d] = static_cast<T>(c[4 * i] * old_w + c[4 * i + 1] * old_v);
          v[d] = static_cast<T>(c[4 * i + 2] * old_w + c[4 * i + 3] * old_v);
        }
      }
    });
  });
  mark_written({outgoing, momentum_buffer, weight});
}

}  // namespace contrastive_ops
