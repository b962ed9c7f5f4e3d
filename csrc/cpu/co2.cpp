// CO2 and InfoNCE on CPUs: the operator that contrastive_ops/reference.py specifies.
//
// Plan. Threads share out (block of query rows) x (range of keys). Each walks its range twice, a tile of keys
// at a time, and for each tile over the panels of its block:
//
//   1. statistics   s = N q^T and y = N k^T of the tile, then per row the running maxima, the three partition
//                   sums, both means of d = s - y, and the rank of the positive;
//   2. gradient     s and y again, g of every pair in place of s, then grad += N^T g.
//
// Between them the ranges' statistics are merged, and after them their gradients, in a fixed order: equal
// input on equal threads gives equal bits. Nothing is ever kept per pair but one tile of one panel.
//
// Bound by arithmetic. A pair costs 5 products of 2 D operations and 6 exponentials: at 256 x 65536 x 128
// that is 21.5 GFLOP, 46 ms on two cores of 234 GFLOP/s each, beside about 6 ms of exponentials and sums; a
// tile is read from memory once a pass (64 MiB in all). docs/performance.md has what was measured.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "co2_panel.h"
#include "product.h"

namespace contrastive_ops {
namespace {

constexpr double kNormEpsilon = 1e-12;
constexpr int64_t kBlockPanels = 8;           // panels that share a loaded tile
constexpr int64_t kPartialBytes = 16 << 20;   // at most this for gradients of separate key ranges
constexpr int64_t kTaskOperations = 1 << 21;  // multiply-adds that are worth a thread

// The whole call, for one product engine and one choice of terms.
template <typename Product, bool kInstance, bool kConsistency>
class CO2 {
  using T = typename Product::Sum;
  using Operand = typename Product::Operand;

 public:
  CO2(const Rows& query, const Rows& key, const Rows& queue, const Settings& settings)
      : query_(query),
        key_(key),
        queue_(queue),
        settings_(settings),
        panels_(at::divup(query.count, kPanel<T>)),
        rows_(panels_ * kPanel<T>),
        dim_(query.dim),
        operand_(Product::padded_dim(query.dim) * kPanel<T>),
        tiles_(at::divup(queue.count, kTile)) {
    share_out();
  }

  // loss, instance loss, consistency loss, rank, gradient
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> operator()() {
    prepare_rows();

    statistics_.resize(ranges_ * panels_);
    for_each_tile([this](const Step& step) {
      step.product.load(step.keys, false);
      for (int64_t panel = step.first_panel; panel < step.last_panel; ++panel) {
        similarities(step, panel);
        add_tile<kInstance, kConsistency>(step.s, step.y, step.keys.count, &threshold_[panel * kPanel<T>],
                                          settings_, statistics_[step.range * panels_ + panel]);
      }
    });
    finish_losses();

    const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
    gradient_ = at::empty({settings_.compute_gradient ? query_.count : 0, dim_}, options);
    if (settings_.compute_gradient) {
      partial_.resize(ranges_ * rows_ * dim_);
      for_each_tile([this](const Step& step) {
        step.product.load(step.keys, true);
        for (int64_t panel = step.first_panel; panel < step.last_panel; ++panel) {
          similarities(step, panel);
          replace_by_gradient<kInstance, kConsistency>(step.s, step.y, step.keys.count, settings_,
                                                       coefficients_[panel]);
          step.product.accumulate(step.s, &partial_[(step.range * panels_ + panel) * kPanel<T> * dim_]);
        }
      });
      finish_gradient();
    }
    return {loss_, instance_loss_, consistency_loss_, rank_, gradient_};
  }

 private:
  // One tile of keys, met by the panels of one block.
  struct Step {
    Product& product;
    Rows keys;
    int64_t range, first_panel, last_panel;
    T *s, *y;  // (kTile x kPanel) each
  };

  // Gives every thread as many (block of rows) x (range of keys) as every other, and bounds the partial
  // gradients that separate ranges need.
  void share_out() {
    const int64_t operations = rows_ * queue_.count * dim_;
    const int64_t threads = std::clamp<int64_t>(operations / kTaskOperations, 1, at::get_num_threads());
    block_panels_ = std::min(panels_, kBlockPanels);
    blocks_ = at::divup(panels_, block_panels_);
    const int64_t most =
        std::max<int64_t>(1, kPartialBytes / (rows_ * dim_ * static_cast<int64_t>(sizeof(T))));
    ranges_ = std::min({threads / std::gcd(threads, blocks_), most, tiles_});
    if (blocks_ * ranges_ < threads) {
      block_panels_ = std::max<int64_t>(1, panels_ * ranges_ / threads);
      blocks_ = at::divup(panels_, block_panels_);
    }
  }

  template <typename Function>
  void for_each_tile(const Function& function) const {
    at::parallel_for(0, blocks_ * ranges_, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> s(kTile * kPanel<T>), y(kConsistency ? s.size() : 0);
      std::vector<Operand> buffer(Product::tile_elements(dim_));
      Product product(dim_, buffer.data());
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / ranges_ * block_panels_, last = std::min(first + block_panels_, panels_);
        const int64_t range = task % ranges_;
        for (int64_t tile = range * tiles_ / ranges_; tile < (range + 1) * tiles_ / ranges_; ++tile) {
          const Rows keys = queue_.slice(tile * kTile, std::min((tile + 1) * kTile, queue_.count));
          function(Step{product, keys, range, first, last, s.data(), y.data()});
        }
      }
    });
  }

  void similarities(const Step& step, int64_t panel) const {
    step.product.similarities(&packed_query_[panel * operand_], step.s);
    if constexpr (kConsistency) step.product.similarities(&packed_key_[panel * operand_], step.y);
  }

  // Normalised rows as numbers (the last panel padded with zero rows) and as the product's operands; s_+.
  void prepare_rows() {
    unit_query_.resize(rows_ * dim_), unit_key_.resize(rows_ * dim_);
    norm_.resize(rows_, 1), positive_.resize(rows_), threshold_.resize(rows_);
    packed_query_.resize(panels_ * operand_), packed_key_.resize(kConsistency ? panels_ * operand_ : 0);

    at::parallel_for(0, panels_, 1, [&](int64_t begin, int64_t end) {
      static_assert(kPanel<T> <= kTile);
      std::vector<T> similarity(kPanel<T> * kPanel<T>);
      std::vector<Operand> buffer(Product::tile_elements(dim_));
      Product product(dim_, buffer.data());
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kPanel<T>, last = std::min(first + kPanel<T>, query_.count);
        T *queries = &unit_query_[first * dim_], *keys = &unit_key_[first * dim_];
        copy(query_.slice(first, last), queries, dim_, 1);
        copy(key_.slice(first, last), keys, dim_, 1);
        for (int64_t row = first; row < last; ++row) {
          T *q = &unit_query_[row * dim_], *k = &unit_key_[row * dim_];
          if (settings_.normalize) norm_[row] = normalize(q), normalize(k);
          // In double: this error would be divided by tau, and no sum over keys averages it.
          for (int64_t d = 0; d < dim_; ++d) positive_[row] += static_cast<double>(q[d]) * k[d];
        }
        Product::pack(queries, dim_, &packed_query_[panel * operand_]);
        if constexpr (kConsistency) Product::pack(keys, dim_, &packed_key_[panel * operand_]);
        // For the rank s_+ comes from the product that gives every s_j, so that a negative equal to the key
        // ties.
        product.load({keys, c10::CppTypeToScalarType<T>::value, kPanel<T>, dim_, dim_, 1}, false);
        product.similarities(&packed_query_[panel * operand_], similarity.data());
        for (int64_t row = 0; row < kPanel<T>; ++row)
          threshold_[first + row] = similarity[row * kPanel<T> + row];
      }
    });
  }

  // x <- x / max(|x|, epsilon); returns |x|. The sum is in double, which no float overflows; for double
  // itself x is scaled first.
  double normalize(T* x) const {
    double scale = 1, sum = 0;
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t d = 0; d < dim_; ++d) scale = std::max(scale, std::abs(x[d]));
    }
    for (int64_t d = 0; d < dim_; ++d) sum += (x[d] / scale) * (x[d] / scale);
    const double norm = scale * std::sqrt(sum), divisor = std::max(norm, kNormEpsilon);
    for (int64_t d = 0; d < dim_; ++d) x[d] = static_cast<T>(x[d] / divisor);
    return norm;
  }

  void finish_losses() {
    const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
    loss_ = at::empty({query_.count}, options);
    instance_loss_ = at::empty({query_.count}, options);
    consistency_loss_ = at::empty({query_.count}, options);
    rank_ = at::empty({query_.count}, options.dtype(at::kLong));
    coefficients_.resize(panels_), grad_positive_.resize(rows_);
    for (int64_t row = 0; row < query_.count; ++row) {
      const int64_t panel = row / kPanel<T>, lane = row % kPanel<T>;
      const RowLosses losses = finish_row<kInstance, kConsistency>(
          &statistics_[panel], ranges_, panels_, lane, positive_[row], settings_, coefficients_[panel]);
      int64_t rank = 0;
      for (int64_t range = 0; range < ranges_; ++range)
        rank += statistics_[range * panels_ + panel].rank[lane];
      grad_positive_[row] = losses.grad_positive;
      loss_.mutable_data_ptr<T>()[row] = static_cast<T>(settings_.instance_weight * losses.instance +
                                                        settings_.consistency_weight * losses.consistency);
      instance_loss_.mutable_data_ptr<T>()[row] = static_cast<T>(losses.instance);
      consistency_loss_.mutable_data_ptr<T>()[row] = static_cast<T>(losses.consistency);
      rank_.mutable_data_ptr<int64_t>()[row] = rank;
    }
  }

  // dL/dq^ = sum_j g_j n_j + (dL/ds_+) k^, then dq = (dq^ - q^ (q^.dq^)) / |q|.
  void finish_gradient() {
    at::parallel_for(0, query_.count, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> grad(dim_);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t panel = row / kPanel<T>, lane = row % kPanel<T>;
        const T *q = &unit_query_[row * dim_], *k = &unit_key_[row * dim_];
        double radial = 0;
        for (int64_t d = 0; d < dim_; ++d) {
          grad[d] = grad_positive_[row] * k[d];
          for (int64_t range = 0; range < ranges_; ++range)
            grad[d] += partial_[((range * panels_ + panel) * dim_ + d) * kPanel<T> + lane];
          radial += grad[d] * q[d];
        }
        // A row below the epsilon was only scaled, so it has no projection.
        if (!settings_.normalize || norm_[row] < kNormEpsilon) radial = 0;
        const double divisor = settings_.normalize ? std::max(norm_[row], kNormEpsilon) : 1;
        T* out = gradient_.mutable_data_ptr<T>() + row * dim_;
        for (int64_t d = 0; d < dim_; ++d) out[d] = static_cast<T>((grad[d] - q[d] * radial) / divisor);
      }
    });
  }

  const Rows query_, key_, queue_;
  const Settings settings_;
  const int64_t panels_, rows_, dim_;  // rows_ counts the padding of the last panel
  const int64_t operand_;              // elements of a packed panel
  const int64_t tiles_;
  int64_t block_panels_ = 0, blocks_ = 0, ranges_ = 0;
  std::vector<T> unit_query_, unit_key_, threshold_, partial_;
  std::vector<double> norm_, positive_, grad_positive_;
  std::vector<Operand> packed_query_, packed_key_;
  std::vector<PanelStatistics<T>> statistics_;      // (ranges, panels)
  std::vector<PanelCoefficients<T>> coefficients_;  // (panels)
  at::Tensor loss_, instance_loss_, consistency_loss_, rank_, gradient_;
};

Rows rows_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type(), tensor.size(0),
          tensor.size(1),          tensor.stride(0),     tensor.stride(1)};
}

template <typename Product>
auto run(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue, const Settings& settings) {
  const Rows q = rows_of(query), k = rows_of(key), n = rows_of(queue);
  if (settings.consistency_weight == 0) return CO2<Product, true, false>(q, k, n, settings)();
  if (settings.instance_weight == 0) return CO2<Product, false, true>(q, k, n, settings)();
  return CO2<Product, true, true>(q, k, n, settings)();
}

auto co2(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue, double temperature,
         double consistency_temperature, double instance_weight, double consistency_weight,
         bool include_positive, bool normalize, bool compute_gradient) {
  for (const auto& tensor : {query, key, queue})
    TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.device().is_cpu() && tensor.size(1) == query.size(1) &&
                          tensor.numel() > 0,
                      "co2: query, key (B, D) and queue (K, D) must be non-empty CPU tensors, got ",
                      query.sizes(), ", ", key.sizes(), " and ", queue.sizes());
  TORCH_CHECK_VALUE(key.size(0) == query.size(0), "co2: key must have the shape of query");
  const Settings settings{temperature,        consistency_temperature, instance_weight,
                          consistency_weight, include_positive,        normalize,
                          compute_gradient};
  const auto both = [&](at::ScalarType dtype) {
    return query.scalar_type() == dtype && queue.scalar_type() == dtype;
  };
  if (query.scalar_type() == at::kDouble) return run<DirectProduct<double>>(query, key, queue, settings);
  if (both(at::kBFloat16) && LibraryProduct<at::BFloat16>::available())
    return run<LibraryProduct<at::BFloat16>>(query, key, queue, settings);
  if (both(at::kHalf) && LibraryProduct<at::Half>::available())
    return run<LibraryProduct<at::Half>>(query, key, queue, settings);
  return run<DirectProduct<float>>(query, key, queue, settings);
}

}  // namespace
}  // namespace contrastive_ops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("co2", &contrastive_ops::co2, pybind11::call_guard<pybind11::gil_scoped_release>());
}
