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

#include <numeric>

#include "operators.h"
#include "panel.h"
#include "product.h"

namespace contrastive_ops {
namespace {

constexpr int64_t kBlockPanels = 8;          // panels that share a loaded tile
constexpr int64_t kPartialBytes = 16 << 20;  // at most this for gradients of separate key ranges

// The whole call, for one product engine and one choice of terms.
template <typename Product, bool kInstance, bool kConsistency>
class CO2 {
  using T = typename Product::Sum;
  using Operand = typename Product::Operand;

 public:
  CO2(const Rows& query, const Rows& key, const Rows& queue, const Settings& settings)
      : query_(query, settings.normalize),
        key_(key, settings.normalize),
        positive_(query_, key_),
        queue_(queue),
        settings_(settings),
        panels_(query_.panels),
        rows_(panels_ * kPanel<T>),
        dim_(query.dim),
        tiles_(at::divup(queue.count, kTile)) {
    share_out();
  }

  // loss, instance loss, consistency loss, rank, gradient
  LossTensors operator()() {
    statistics_.resize(ranges_ * panels_);
    for_each_tile([this](const Step& step) {
      step.product.load(step.keys, false);
      for (int64_t panel = step.first_panel; panel < step.last_panel; ++panel) {
        similarities(step, panel);
        add_tile<kInstance, kConsistency>(step.s, step.y, step.keys.count,
                                          &positive_.threshold[panel * kPanel<T>], settings_,
                                          statistics_[step.range * panels_ + panel]);
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
    step.product.similarities(query_.packed(panel), step.s);
    if constexpr (kConsistency) step.product.similarities(key_.packed(panel), step.y);
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
      const FinishedRow finished = finish_row<kInstance, kConsistency>(
          &statistics_[panel], ranges_, panels_, lane, positive_.similarity[row], settings_);
      coefficients_[panel].set(lane, finished);
      int64_t rank = 0;
      for (int64_t range = 0; range < ranges_; ++range)
        rank += statistics_[range * panels_ + panel].rank[lane];
      grad_positive_[row] = finished.grad_positive;
      loss_.mutable_data_ptr<T>()[row] =
          static_cast<T>(settings_.instance_weight * finished.instance_loss +
                         settings_.consistency_weight * finished.consistency_loss);
      instance_loss_.mutable_data_ptr<T>()[row] = static_cast<T>(finished.instance_loss);
      consistency_loss_.mutable_data_ptr<T>()[row] = static_cast<T>(finished.consistency_loss);
      rank_.mutable_data_ptr<int64_t>()[row] = rank;
    }
  }

  // dL/dq^ = sum_j g_j n_j + (dL/ds_+) k^, then dq = (dq^ - q^ (q^.dq^)) / |q|.
  void finish_gradient() {
    at::parallel_for(0, query_.count, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> grad(dim_);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t panel = row / kPanel<T>, lane = row % kPanel<T>;
        for (int64_t d = 0; d < dim_; ++d) {
          grad[d] = grad_positive_[row] * key_.unit(row)[d];
          for (int64_t range = 0; range < ranges_; ++range)
            grad[d] += partial_[((range * panels_ + panel) * dim_ + d) * kPanel<T> + lane];
        }
        if (settings_.normalize) differentiate_norm(grad.data(), query_.unit(row), query_.norm[row], dim_);
        std::copy(grad.begin(), grad.end(), gradient_.mutable_data_ptr<T>() + row * dim_);
      }
    });
  }

  const Panels<Product> query_, key_;
  const Positives<T> positive_;
  const Rows queue_;
  const Settings settings_;
  const int64_t panels_, rows_, dim_;  // rows_ counts the padding of the last panel
  const int64_t tiles_;
  int64_t block_panels_ = 0, blocks_ = 0, ranges_ = 0;
  std::vector<T> partial_;
  std::vector<double> grad_positive_;
  std::vector<PanelStatistics<T>> statistics_;      // (ranges, panels)
  std::vector<PanelCoefficients<T>> coefficients_;  // (panels)
  at::Tensor loss_, instance_loss_, consistency_loss_, rank_, gradient_;
};

template <typename Product>
LossTensors run(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue,
                const Settings& settings) {
  const Rows q = Rows::of(query), k = Rows::of(key), n = Rows::of(queue);
  if (settings.consistency_weight == 0) return CO2<Product, true, false>(q, k, n, settings)();
  if (settings.instance_weight == 0) return CO2<Product, false, true>(q, k, n, settings)();
  return CO2<Product, true, true>(q, k, n, settings)();
}

}  // namespace

LossTensors co2(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue, double temperature,
                double consistency_temperature, double instance_weight, double consistency_weight,
                bool include_positive, bool normalize, bool compute_gradient) {
  const Settings settings{temperature,        consistency_temperature, instance_weight,
                          consistency_weight, include_positive,        normalize,
                          compute_gradient};
  // Rows are multiplied in the query's dtype, the queue rounded to it a tile at a time as it is loaded; but
  // float16 may not hold what a queue of another dtype does.
  const bool holds = query.scalar_type() != at::kHalf || queue.scalar_type() == at::kHalf;
  return with_product(query.scalar_type(), holds, [&](auto product) {
    LossTensors result = run<typename decltype(product)::type>(query, key, queue, settings);
    if (instance_weight == 0) std::get<1>(result).zero_();  // also where neither term was asked for
    return result;
  });
}

}  // namespace contrastive_ops
