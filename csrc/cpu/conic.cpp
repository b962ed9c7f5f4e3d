// ConIC on CPUs: the operators `conic` and its backward, which contrastive_ops/reference.py specifies.
//
// Plan. Threads share out the rows of the weight; each walks its range of them a tile at a time, normalises
// the tile, and meets it with every panel of views:
//
//   forward    s = N x^T of the tile, then per view the running maximum, the partition sum of its negatives,
//              and the rank of its own row
//   backward   s again, g = d loss / d s in place of it, then grad views += N^T g, in a part of each range,
//              and the tile's own gradient += g x. That is complete when the tile has met all views: it is
//              differentiated through the norm and written, or spent on a step of SGD there and then.
//
// Ranges are merged in a fixed order, and a row of the weight belongs to one of them: equal input on equal
// threads gives equal bits. A view's own row is no negative: in forward its s is -inf, in backward its g is
// set apart.
//
// Bound by arithmetic. A pair costs 4 products of 2 D operations and 2 exponentials: at 512 x 65536 x 128
// that is 34 GFLOP, 73 ms on two cores of 234 GFLOP/s each, beside about 6 ms of exponentials; the weight is
// read twice and its gradient written once, 96 MiB.

#include <optional>

#include "operators.h"
#include "panel.h"
#include "product.h"
#include "sgd.h"

namespace contrastive_ops {
namespace {

constexpr int64_t kPartialBytes = 32 << 20;  // at most this for the views' gradients of separate ranges

template <typename Product>
class ConIC {
  using T = typename Product::Sum;
  using Operand = typename Product::Operand;

 public:
  ConIC(const at::Tensor& views, const at::Tensor& weight, const at::Tensor& target, const Settings& settings,
        bool weight_needs_grad = false)
      : views_(views),
        weight_(weight),
        settings_(settings),
        batch_(views.size(1)),
        dim_(views.size(2)),
        unit_views_(Rows::of(views.reshape({-1, dim_})), true, weight_needs_grad),
        tiles_(at::divup(weight.size(0), kTile)),
        ranges_(std::min<int64_t>(at::get_num_threads(), tiles_)),
        own_(unit_views_.panels * kPanel<T>, -1) {
    const at::Tensor targets = target.contiguous();
    for (int64_t row = 0; row < unit_views_.count; ++row)
      own_[row] = targets.const_data_ptr<int64_t>()[row % batch_];
    const int64_t a_panel = ranges_ * kPanel<T> * dim_ * static_cast<int64_t>(sizeof(T));
    block_ = std::clamp<int64_t>(kPartialBytes / a_panel, 1, unit_views_.panels);
  }

  LossTensors forward(const at::Tensor& target) {
    const at::Tensor own = weight_.index_select(0, target).repeat({views_.size(0), 1});
    const Positives<T> positive(unit_views_, Panels<Product>(Rows::of(own), true));

    std::vector<PanelStatistics<T>> parts(ranges_ * unit_views_.panels);  // (ranges, panels)
    for_each_tile(false, [&](const Step& step) {
      for (int64_t panel = 0; panel < unit_views_.panels; ++panel) {
        step.product.similarities(unit_views_.packed(panel), step.s);
        for_own_rows(step, panel, [](T& s, int64_t) { s = -std::numeric_limits<T>::infinity(); });
        add_tile<true, false, T>(step.s, nullptr, step.count, &positive.threshold[panel * kPanel<T>],
                                 settings_, parts[step.range * unit_views_.panels + panel]);
      }
    });

    const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
    const at::IntArrayRef shape = views_.sizes().slice(0, 2);
    at::Tensor classification = at::empty(shape, options), rank = at::empty(shape, options.dtype(at::kLong));
    at::Tensor statistics = at::empty({shape[0], shape[1], 3}, options.dtype(at::kDouble));
    for (int64_t row = 0; row < unit_views_.count; ++row) {
      const int64_t panel = row / kPanel<T>, lane = row % kPanel<T>;
      const FinishedRow finished = finish_row<true, false>(&parts[panel], ranges_, unit_views_.panels, lane,
                                                           positive.similarity[row], settings_);
      classification.mutable_data_ptr<T>()[row] = static_cast<T>(finished.instance_loss);
      int64_t above = 0;
      for (int64_t range = 0; range < ranges_; ++range)
        above += parts[range * unit_views_.panels + panel].rank[lane];
      rank.mutable_data_ptr<int64_t>()[row] = above;
      double* out = statistics.mutable_data_ptr<double>() + 3 * row;
      // The only row has no negatives.
      out[0] = weight_.size(0) > 1 ? finished.max_s : positive.similarity[row];
      out[1] = finished.instance, out[2] = finished.grad_positive;
    }
    auto [loss, consistency] = finish_losses(classification);
    return {loss, classification, consistency, rank, statistics};
  }

  // The gradients that are needed; with `step`, that of the weight is spent on it.
  std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_loss, const at::Tensor& statistics,
                                              bool views_need_grad, bool weight_needs_grad,
                                              const std::optional<SGD>& step) {
    const at::Tensor incoming = grad_loss.to(at::kDouble).contiguous();
    prepare_coefficients(incoming, statistics.contiguous());
    std::vector<T> parts(views_need_grad ? ranges_ * block_ * kPanel<T> * dim_ : 0);
    at::Tensor grad_views = at::empty({views_need_grad ? views_.size(0) : 0, batch_, dim_}, views_.options());
    at::Tensor grad_weight =
        at::empty({weight_needs_grad && !step ? weight_.size(0) : 0, dim_}, weight_.options());
    // Views that come in several blocks leave the weight's gradient unfinished in between.
    const bool several = block_ < unit_views_.panels && weight_needs_grad;
    std::vector<T> unfinished(several ? weight_.size(0) * dim_ : 0);

    for (int64_t first = 0; first < unit_views_.panels; first += block_) {
      const int64_t last = std::min(first + block_, unit_views_.panels);
      std::fill(parts.begin(), parts.end(), T(0));
      for_each_tile(views_need_grad, [&](Step& tile) {
        if (weight_needs_grad) std::fill(tile.grad.begin(), tile.grad.end(), T(0));
        for (int64_t panel = first; panel < last; ++panel) {
          tile.product.similarities(unit_views_.packed(panel), tile.s);
          replace_by_gradient<true, false, T>(tile.s, nullptr, tile.count, settings_, coefficients_[panel]);
          for_own_rows(tile, panel, [this](T& g, int64_t row) { g = grad_own_[row]; });
          if (views_need_grad)
            tile.product.accumulate(tile.s, &parts[(tile.range * block_ + panel - first) * kPanel<T> * dim_]);
          if (weight_needs_grad)
            tile.product.accumulate_keys(tile.s, unit_views_.packed_rows(panel), tile.grad.data());
        }
        if (!weight_needs_grad) return;
        std::vector<T>& row = tile.row;
        for (int64_t key = 0; key < tile.count; ++key) {
          tile.product.copy_key_grad(tile.grad.data(), key, row.data());
          const int64_t index = tile.begin + key;
          if (several) {
            T* sum = &unfinished[index * dim_];
            for (int64_t d = 0; d < dim_; ++d) sum[d] = row[d] += sum[d];
          }
          if (last < unit_views_.panels) continue;
          for (T& x : row) x = static_cast<T>(x / scale_);
          differentiate_norm(row.data(), &tile.unit[key * dim_], tile.norm[key], dim_);
          if (step)
            step->take(index, row.data());
          else
            write_row(grad_weight, index, row.data());
        }
      });
      if (views_need_grad) finish_views(first, last, parts, incoming.const_data_ptr<double>(), grad_views);
    }
    return {grad_views, grad_weight};
  }

 private:
  // A tile of the weight, normalised, and a thread's room for meeting it with panels of views.
  struct Step {
    Product& product;
    std::vector<T>&unit, &grad, &row;
    std::vector<double>& norm;
    T* s;  // (kTile x kPanel)
    int64_t range = 0, begin = 0, count = 0;
  };

  template <typename Function>
  void for_each_tile(bool transposed_too, const Function& function) const {
    const Rows weight = Rows::of(weight_);
    at::parallel_for(0, ranges_, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> unit(kTile * dim_), grad(Product::keys_grad_elements(dim_)), row(dim_),
          s(kTile * kPanel<T>);
      std::vector<double> norm(kTile);
      std::vector<Operand> buffer(Product::tile_elements(dim_));
      Product product(dim_, buffer.data());
      Step step{product, unit, grad, row, norm, s.data()};
      for (step.range = begin; step.range < end; ++step.range)
        for (int64_t tile = step.range * tiles_ / ranges_; tile < (step.range + 1) * tiles_ / ranges_;
             ++tile) {
          step.begin = tile * kTile;
          const Rows rows = weight.slice(step.begin, std::min(step.begin + kTile, weight.count));
          step.count = rows.count;
          copy(rows, unit.data(), dim_, 1);
          for (int64_t key = 0; key < rows.count; ++key) norm[key] = normalize(&unit[key * dim_], dim_);
          product.load(Rows::of(unit.data(), rows.count, dim_), transposed_too);
          function(step);
        }
    });
  }

  // Calls `function` with the entry of `step.s` where a view of the panel meets its own row, and the view.
  template <typename Function>
  void for_own_rows(const Step& step, int64_t panel, const Function& function) const {
    for (int64_t lane = 0; lane < kPanel<T>; ++lane) {
      const int64_t view = panel * kPanel<T> + lane, key = own_[view] - step.begin;
      if (own_[view] >= 0 && key >= 0 && key < step.count) function(step.s[key * kPanel<T> + lane], view);
    }
  }

  // 1 - x^i.x^j of an instance's two views.
  double disagreement(int64_t i, int64_t j, int64_t instance) const {
    const T *a = unit_views_.unit(i * batch_ + instance), *b = unit_views_.unit(j * batch_ + instance);
    return 1 - sum_of(dim_, [&](int64_t d) { return static_cast<double>(a[d]) * b[d]; });
  }

  // Loss and consistency loss of every instance.
  std::tuple<at::Tensor, at::Tensor> finish_losses(const at::Tensor& classification) const {
    at::Tensor loss = at::empty({batch_}, classification.options()), consistency = at::empty_like(loss);
    for (int64_t instance = 0; instance < batch_; ++instance) {
      double of_views = 0, of_pairs = 0;
      for (int64_t i = 0; i < views_.size(0); ++i) {
        of_views += classification.const_data_ptr<T>()[i * batch_ + instance];
        for (int64_t j = 0; j < i; ++j) of_pairs += 2 * std::pow(disagreement(i, j, instance), 2);
      }
      loss.mutable_data_ptr<T>()[instance] =
          static_cast<T>(of_views + settings_.consistency_weight * of_pairs);
      consistency.mutable_data_ptr<T>()[instance] = static_cast<T>(of_pairs);
    }
    return {loss, consistency};
  }

  // What the second pass multiplies e^{(s - m)/tau} by, and the g of a view's own row, both scaled by a power
  // of two that keeps them within half precision: a g is less than the incoming gradient over tau.
  void prepare_coefficients(const at::Tensor& grad_loss, const at::Tensor& statistics) {
    const double *incoming = grad_loss.const_data_ptr<double>(), *of = statistics.const_data_ptr<double>();
    double largest = 0;
    for (int64_t instance = 0; instance < batch_; ++instance)
      largest = std::max(largest, std::abs(incoming[instance]));
    scale_ = scale_to_half(largest / settings_.temperature);
    coefficients_.resize(unit_views_.panels), grad_own_.resize(own_.size());
    for (int64_t row = 0; row < unit_views_.count; ++row, of += 3) {
      coefficients_[row / kPanel<T>].set(
          row % kPanel<T>, {.max_s = of[0], .instance = scale_ * incoming[row % batch_] * of[1]});
      grad_own_[row] = static_cast<T>(scale_ * incoming[row % batch_] * of[2]);
    }
  }

  // dL/dx^ = sum_j g_j n_j - 4 alpha sum_j (1 - x^.x^j) x^j, then the derivative of the norm.
  void finish_views(int64_t first_panel, int64_t last_panel, const std::vector<T>& parts,
                    const double* incoming, at::Tensor& out) const {
    const int64_t last = std::min(last_panel * kPanel<T>, unit_views_.count);
    at::parallel_for(first_panel * kPanel<T>, last, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> grad(dim_);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t panel = row / kPanel<T> - first_panel, lane = row % kPanel<T>;
        for (int64_t d = 0; d < dim_; ++d) {
          grad[d] = 0;
          for (int64_t range = 0; range < ranges_; ++range)
            grad[d] += parts[((range * block_ + panel) * dim_ + d) * kPanel<T> + lane];
          grad[d] /= scale_;
        }
        const int64_t view = row / batch_, instance = row % batch_;
        for (int64_t other = 0; other < views_.size(0); ++other) {
          if (other == view || settings_.consistency_weight == 0) continue;
          const double factor =
              -4 * settings_.consistency_weight * disagreement(view, other, instance) * incoming[instance];
          const T* x = unit_views_.unit(other * batch_ + instance);
          for (int64_t d = 0; d < dim_; ++d) grad[d] += factor * x[d];
        }
        differentiate_norm(grad.data(), unit_views_.unit(row), unit_views_.norm[row], dim_);
        write_row(out, row, grad.data());
      }
    });
  }

  const at::Tensor views_, weight_;
  const Settings settings_;
  const int64_t batch_, dim_;
  const Panels<Product> unit_views_;
  const int64_t tiles_, ranges_;
  std::vector<int64_t> own_;  // of each view its row of the weight; -1 for what pads the last panel
  int64_t block_ = 0;         // panels that backward walks the weight with
  double scale_ = 1;
  std::vector<PanelCoefficients<T>> coefficients_;
  std::vector<T> grad_own_;
};

auto backward(const at::Tensor& grad_loss, const at::Tensor& views, const at::Tensor& weight,
              const at::Tensor& target, const at::Tensor& statistics, double temperature,
              double consistency_weight, bool views_need_grad, bool weight_needs_grad,
              const std::optional<SGD>& step) {
  const Settings settings{.temperature = temperature, .consistency_weight = consistency_weight};
  return with_product(views.scalar_type(), true, [&](auto product) {
    return ConIC<typename decltype(product)::type>(views, weight, target, settings, weight_needs_grad)
        .backward(grad_loss, statistics, views_need_grad, weight_needs_grad, step);
  });
}

}  // namespace

LossTensors conic(const at::Tensor& views, const at::Tensor& weight, const at::Tensor& target,
                  double temperature, double compensation, double consistency_weight) {
  const Settings settings{
      .temperature = temperature, .consistency_weight = consistency_weight, .compensation = compensation};
  return with_product(views.scalar_type(), true, [&](auto product) {
    return ConIC<typename decltype(product)::type>(views, weight, target, settings).forward(target);
  });
}

std::tuple<at::Tensor, at::Tensor> conic_backward(const at::Tensor& grad_loss, const at::Tensor& views,
                                                  const at::Tensor& weight, const at::Tensor& target,
                                                  const at::Tensor& statistics, double temperature,
                                                  double consistency_weight, bool views_need_grad,
                                                  bool weight_needs_grad) {
  return backward(grad_loss, views, weight, target, statistics, temperature, consistency_weight,
                  views_need_grad, weight_needs_grad, std::nullopt);
}

at::Tensor conic_backward_sgd_(const at::Tensor& grad_loss, const at::Tensor& views, const at::Tensor& weight,
                               const at::Tensor& momentum_buffer, const at::Tensor& target,
                               const at::Tensor& statistics, double temperature, double consistency_weight,
                               double lr, double momentum, double weight_decay, bool nesterov) {
  const SGD step(weight, momentum_buffer, lr, momentum, weight_decay, nesterov);
  const at::Tensor grad_views = std::get<0>(backward(grad_loss, views, weight, target, statistics,
                                                     temperature, consistency_weight, true, true, step));
  mark_written({momentum_buffer, weight});
  return grad_views;
}

}  // namespace contrastive_ops
