// ConIC on CPUs: the operators `conic` and its backward and the steps of the loss, which
// contrastive_ops/reference.py specifies.
//
// Plan. Threads share out the rows of the weight; each walks its range of them a tile at a time, normalises
// the tile, and meets it with every panel of views:
//
//   forward    s = N x^T of the tile, then per view the running maximum, the partition sum of its negatives,
//              and the rank of its own row
//   backward   s again, unless forward has left it (csrc/cpu/kept_pairs.h); in place of it g = d loss / d s,
//              then grad views += N^T g, in a part of each range, and the tile's own gradient += g x. That is
//              complete when the tile has met all views: it is differentiated through the norm and written,
//              or spent on a step of SGD there and then.
//
// Ranges are merged in a fixed order, and a row of the weight belongs to one of them: equal input on equal
// threads gives equal bits. A view's own row is no negative: in forward its s is -inf, in backward its g is
// set apart.
//
// Bound by arithmetic. A pair costs 4 products of 2 D operations, or 3, and 2 exponentials: at 512 x 65536 x
// 128 that is 34 GFLOP, 73 ms on two cores of 234 GFLOP/s each, beside about 6 ms of exponentials; the weight
// is read twice and its gradient written once, 96 MiB. docs/performance.md has what was measured.

#include <limits>

#include "kept_pairs.h"
#include "losses.h"
#include "operators.h"
#include "panels.h"
#include "sgd.h"
#include "tile_math.h"

namespace contrastive_ops {
namespace {

constexpr int64_t kPartialBytes = 32 << 20;  // at most this for the views' gradients of separate ranges
constexpr int64_t kKeptBytes = 16 << 20;     // at most this for similarities from forward to backward

// The views (V, B, D) normalised, a row each, and what the loss makes of them without the weight.
template <typename Product>
struct UnitViews : Panels<Product> {
  using T = typename Product::Sum;

  UnitViews(const at::Tensor& views, bool for_keys)
      : Panels<Product>(Matrix(views.reshape({-1, views.size(2)})), true, for_keys),
        tensor(views),
        views(views.size(0)),
        batch(views.size(1)) {}

  // 1 - x^i.x^j of an instance's two views.
  double disagreement(int64_t i, int64_t j, int64_t instance) const {
    const T *a = this->unit(i * batch + instance), *b = this->unit(j * batch + instance);
    return 1 - dot(a, b, this->dim);
  }

  const at::Tensor tensor;
  const int64_t views, batch;
};

// Which gradients are asked for. With `sgd`, that of the weight is spent on a step.
struct Wanted {
  bool views, weight;
  const SGD* sgd = nullptr;
};

// The passes over the weight, for one product engine.
template <typename Product>
class ConIC {
  using T = typename Product::Sum;
  static constexpr int64_t kTile = Product::kTile;

 public:
  ConIC(const UnitViews<Product>& views, const at::Tensor& weight, const at::Tensor& target,
        const ConICSettings& settings)
      : views_(views),
        weight_(weight),
        target_(target.contiguous()),
        settings_(settings),
        temperatures_{.instance = settings.temperature},
        dim_(views.dim),
        tiles_(at::divup(weight.size(0), kTile)),
        ranges_(std::clamp<int64_t>(tiles_, 1, at::get_num_threads())),
        own_(views_.panels * kPanel<T>, -1) {
    for (int64_t row = 0; row < views_.count; ++row)
      own_[row] = target_.const_data_ptr<int64_t>()[row % views_.batch];
    const int64_t a_panel = ranges_ * kPanel<T> * dim_ * static_cast<int64_t>(sizeof(T));
    block_ = std::clamp<int64_t>(kPartialBytes / a_panel, 1, std::max<int64_t>(1, views_.panels));
  }

  // What the views have in common with their own rows (V B, 2).
  at::Tensor positives() const {
    auto [positives, record] = empty_records<ConICPositives>({views_.count});
    if (weight_.size(0) == 0) return positives.fill_(std::numeric_limits<double>::quiet_NaN());
    // A row that is elsewhere is replaced by any.
    const at::Tensor own = weight_.index_select(0, target_.clamp_min(0)).repeat({views_.views, 1});
    const Positives<T> positive(views_, Panels<Product>(Matrix(own), true));
    constexpr double kElsewhere = std::numeric_limits<double>::quiet_NaN();
    for (int64_t row = 0; row < views_.count; ++row) {
      record[row] = {.positive = positive.similarity[row], .threshold = positive.threshold[row]};
      if (own_[row] < 0) record[row] = {.positive = kElsewhere, .threshold = kElsewhere};
    }
    return positives;
  }

  // What forward leaves to backward: the norms of the weight's rows and, if a product takes longer than
  // memory and they are few, the similarities of all pairs; or nothing.
  struct Kept {
    KeptPairs<T> pairs;
    double* norms = nullptr;
  };

  // Coefficients that are to be written (V, B, 3), and room behind them for what they are made of.
  std::pair<at::Tensor, Kept> coefficients_and_kept() const {
    const auto [coefficients, memory] =
        appendix().template append<ConICCoefficients>({views_.views, views_.batch}, bytes_of_kept());
    return {coefficients, kept_in(memory)};
  }

  // The statistics of each range of the weight's rows (ranges, V B, 3).
  at::Tensor statistics(const at::Tensor& positives, const Kept& kept = {}) const {
    const Records<ConICPositives> positive(positives);
    Array<T> threshold(own_.size());
    for (int64_t row = 0; row < views_.count; ++row) threshold[row] = static_cast<T>(positive[row].threshold);

    Array<PanelStatistics<T>> statistics(ranges_ * views_.panels);  // (ranges, panels)
    for_each_tile(kept.norms, false, [&](const Step& step) {
      for (int64_t panel = 0; panel < views_.panels; ++panel) {
        T* s = kept.pairs ? kept.pairs.at(panel, step.begin) : step.s;
        step.product.similarities(views_.packed(panel), s);
        for_own_rows(step, panel, s, [](T& s, int64_t) { s = -std::numeric_limits<T>::infinity(); });
        add_tile<true, false, T>(s, nullptr, step.count, &threshold[panel * kPanel<T>], temperatures_,
                                 statistics[step.range * views_.panels + panel], step.fetch_ahead());
      }
    });

    auto [partial, part] = empty_records<ConICPartial>({ranges_, views_.count});
    for (int64_t range = 0; range < ranges_; ++range)
      for (int64_t row = 0; row < views_.count; ++row) {
        const CO2Partial sums = statistics[range * views_.panels + row / kPanel<T>].row(row % kPanel<T>);
        *part++ = {.max_s = sums.max_s, .z_instance = sums.z_instance, .rank = sums.rank};
      }
    return partial;
  }

  // The gradients in the views (V, B, D) and in the weight (A, D), without rows where not wanted or spent.
  // For that of the weight the views need to be prepared as keys are.
  std::tuple<at::Tensor, at::Tensor> gradient(const at::Tensor& grad_loss, const at::Tensor& statistics,
                                              const Wanted& wanted) {
    const at::Tensor weights = grad_loss.to(at::kDouble).contiguous();
    const double* loss_weight = weights.const_data_ptr<double>();
    prepare_coefficients(loss_weight, Records<ConICCoefficients>(statistics));
    const bool writes = wanted.weight && !wanted.sgd;
    at::Tensor grad_views =
        empty({wanted.views ? views_.views : 0, views_.batch, dim_}, views_.tensor.scalar_type());
    at::Tensor grad_weight = spare_empty({writes ? weight_.size(0) : 0, dim_}, weight_.scalar_type());
    Array<T> parts(wanted.views ? ranges_ * block_ * kPanel<T> * dim_ : 0);
    // Views that come in several blocks leave the weight's gradient unfinished in between.
    const bool several = block_ < views_.panels && wanted.weight;
    Array<T> unfinished(several ? weight_.size(0) * dim_ : 0);

    const Kept kept = kept_in(appendix().of(statistics, bytes_of_kept()));

    int64_t first = 0, last = 0;
    do {  // once where there are no views, too: the weight's gradient is 0
      first = last, last = std::min(first + block_, views_.panels);
      std::fill(parts.begin(), parts.end(), T(0));
      for_each_tile(kept.norms, kept.norms != nullptr, [&](const Step& tile) {
        if (wanted.weight) std::fill(tile.grad.begin(), tile.grad.end(), T(0));
        for (int64_t panel = first; panel < last; ++panel) {
          const T* s = kept.pairs ? kept.pairs.at(panel, tile.begin) : tile.s;
          if (!kept.pairs) tile.product.similarities(views_.packed(panel), tile.s);
          gradient_of_tile<true, false, T>(s, nullptr, tile.count, temperatures_, coefficients_[panel],
                                           tile.s, tile.fetch_ahead());
          for_own_rows(tile, panel, tile.s, [this](T& g, int64_t row) { g = grad_own_[row]; });
          if (wanted.views)
            tile.product.accumulate(tile.s, &parts[(tile.range * block_ + panel - first) * kPanel<T> * dim_]);
          if (wanted.weight)
            tile.product.accumulate_keys(tile.s, views_.packed_rows(panel), tile.grad.data());
        }
        if (!wanted.weight) return;
        tile.product.finish_keys(tile.grad.data());
        Array<T>& row = tile.row;
        for (int64_t key = 0; key < tile.count; ++key) {
          tile.product.copy_key_grad(tile.grad.data(), key, row.data());
          const int64_t index = tile.begin + key;
          if (several) {
            T* sum = &unfinished[index * dim_];
            for (int64_t d = 0; d < dim_; ++d) sum[d] = row[d] += sum[d];
          }
          if (last < views_.panels) continue;
          differentiate_norm(row.data(), &tile.unit[key * dim_], tile.norm[key], dim_, scale_);
          if (wanted.sgd)
            wanted.sgd->take(index, row.data());
          else
            write_row(grad_weight, index, row.data());
        }
      });
      if (wanted.views) finish_views(first, last, parts, loss_weight, grad_views);
    } while (last < views_.panels);
    return {grad_views, grad_weight};
  }

 private:
  // A tile of the weight, normalised, and a thread's room for meeting it with panels of views.
  struct Step {
    Product& product;
    Array<T>&unit, &grad, &row;
    T* s;  // (kTile x kPanel)
    int64_t range = 0, begin = 0, count = 0;
    double* norm = nullptr;  // of each row

    auto fetch_ahead() const {
      return [this] { product.fetch_ahead(); };
    }
  };

  // `norms` are those of the weight's rows, known or to be written; none where nobody asks for them.
  template <typename Function>
  void for_each_tile(double* norms, bool known, const Function& function) const {
    const Matrix weight(weight_);
    const auto rows_of = [&weight](int64_t tile) {
      return weight.slice(tile * kTile, std::min((tile + 1) * kTile, weight.rows));
    };
    at::parallel_for(0, ranges_, 1, [&](int64_t begin, int64_t end) {
      Array<T> unit(kTile * dim_), grad(Product::keys_grad_elements(dim_)), row(dim_), s(kTile * kPanel<T>);
      std::vector<double> norm(kTile);
      Product product(dim_);
      Step step{product, unit, grad, row, s.data()};
      for (step.range = begin; step.range < end; ++step.range) {
        const int64_t end_tile = (step.range + 1) * tiles_ / ranges_;
        for (int64_t tile = step.range * tiles_ / ranges_; tile < end_tile; ++tile) {
          const Matrix rows = rows_of(tile);
          step.begin = tile * kTile, step.count = rows.rows;
          step.norm = norms ? norms + step.begin : norm.data();
          for (int64_t key = 0; key < rows.rows; ++key) {
            T* x = &unit[key * dim_];
            copy(rows.slice(key, key + 1), x, dim_, 1);
            if (!known) step.norm[key] = norm_of(x, dim_);
            divide_by_norm(x, step.norm[key], dim_);
          }
          const bool is_last = tile + 1 == end_tile;
          const Matrix next = rows_of(is_last ? tile : tile + 1);
          product.load(Matrix(unit.data(), rows.rows, dim_), is_last ? nullptr : &next);
          function(step);
        }
      }
    });
  }

  Appendix appendix() const { return Appendix({views_.tensor, weight_}); }

  int64_t bytes_of_norms() const {
    return whole_lines(weight_.size(0) * static_cast<int64_t>(sizeof(double)));
  }

  int64_t bytes_of_pairs() const {
    const int64_t bytes = KeptPairs<T>::bytes(views_.panels, weight_.size(0));
    return Product::kDearerThanMemory && bytes <= kKeptBytes ? bytes : 0;
  }

  int64_t bytes_of_kept() const { return bytes_of_norms() + bytes_of_pairs(); }

  Kept kept_in(void* memory) const {
    if (memory == nullptr) return {};
    Kept kept{.norms = static_cast<double*>(memory)};
    if (bytes_of_pairs() > 0)
      kept.pairs = {static_cast<std::byte*>(memory) + bytes_of_norms(), weight_.size(0)};
    return kept;
  }

  // Calls `function` with the entry of the tile's s where a view of the panel meets its own row, and the
  // view.
  template <typename Function>
  void for_own_rows(const Step& step, int64_t panel, T* s, const Function& function) const {
    for (int64_t lane = 0; lane < kPanel<T>; ++lane) {
      const int64_t view = panel * kPanel<T> + lane, key = own_[view] - step.begin;
      if (own_[view] >= 0 && key >= 0 && key < step.count) function(s[key * kPanel<T> + lane], view);
    }
  }

  // What the second pass multiplies e^{(s - m)/tau} by, and the g of a view's own row, both scaled by a power
  // of two that keeps them within half precision: a g is less than the loss's weight over tau.
  void prepare_coefficients(const double* loss_weight, const Records<ConICCoefficients>& rows) {
    double largest = 0;
    for (int64_t instance = 0; instance < views_.batch; ++instance)
      largest = std::max(largest, std::abs(loss_weight[instance]));
    scale_ = scale_to_half(largest / settings_.temperature);
    coefficients_.resize(views_.panels), grad_own_.resize(own_.size());
    for (int64_t row = 0; row < views_.count; ++row) {
      const double weight = scale_ * loss_weight[row % views_.batch];
      coefficients_[row / kPanel<T>].set(row % kPanel<T>, coefficients(rows[row], weight));
      grad_own_[row] = static_cast<T>(weight * rows[row].grad_positive);
    }
  }

  // dL/dx^ = sum_j g_j n_j - 4 alpha sum_j (1 - x^.x^j) x^j, then the derivative of the norm.
  void finish_views(int64_t first_panel, int64_t last_panel, const Array<T>& parts, const double* loss_weight,
                    at::Tensor& out) const {
    const int64_t last = std::min(last_panel * kPanel<T>, views_.count);
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
        const int64_t view = row / views_.batch, instance = row % views_.batch;
        for (int64_t other = 0; other < views_.views; ++other) {
          if (other == view || settings_.consistency_weight == 0) continue;
          const double factor = -4 * settings_.consistency_weight *
                                views_.disagreement(view, other, instance) * loss_weight[instance];
          const T* x = views_.unit(other * views_.batch + instance);
          for (int64_t d = 0; d < dim_; ++d) grad[d] += factor * x[d];
        }
        differentiate_norm(grad.data(), views_.unit(row), views_.norm[row], dim_);
        write_row(out, row, grad.data());
      }
    });
  }

  const UnitViews<Product>& views_;
  const at::Tensor weight_, target_;
  const ConICSettings settings_;
  const Temperatures temperatures_;
  const int64_t dim_, tiles_, ranges_;
  std::vector<int64_t> own_;  // which row of the weight each view owns; -1 for one elsewhere, and for padding
  int64_t block_ = 0;         // panels that the gradient's pass walks the weight with
  double scale_ = 1;
  Array<PanelCoefficients<T>> coefficients_;
  Array<T> grad_own_;
};

// The losses in the dtype L, and the coefficients of their gradients, which are written to `statistics`.
template <typename L, typename Product>
Losses merge_rows(const at::Tensor& partial, const at::Tensor& positives, const UnitViews<Product>& views,
                  const ConICSettings& settings, const at::Tensor& statistics) {
  const Records<ConICPartial> parts(partial);
  const Records<ConICPositives> positive(positives);
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<L>::value;
  at::Tensor loss = empty({views.batch}, dtype), consistency = empty({views.batch}, dtype),
             classification = empty({views.views, views.batch}, dtype),
             rank = empty({views.views, views.batch}, at::kLong);
  auto* view = reinterpret_cast<ConICCoefficients*>(statistics.mutable_data_ptr<double>());
  L* view_losses = classification.mutable_data_ptr<L>();
  for (int64_t row = 0; row < views.count; ++row) {
    const ConICPartial sums = merge(&parts[row], {partial.size(0), views.count}, settings);
    view_losses[row] = static_cast<L>(finish(sums, positive[row].positive, settings, view[row]));
    rank.mutable_data_ptr<int64_t>()[row] = static_cast<int64_t>(sums.rank);
  }
  for (int64_t instance = 0; instance < views.batch; ++instance) {
    double classified = 0, disagreement = 0;
    for (int64_t i = 0; i < views.views; ++i) {
      classified += view_losses[i * views.batch + instance];
      for (int64_t j = 0; j < i; ++j) disagreement += 2 * std::pow(views.disagreement(i, j, instance), 2);
    }
    loss.mutable_data_ptr<L>()[instance] =
        static_cast<L>(classified + settings.consistency_weight * disagreement);
    consistency.mutable_data_ptr<L>()[instance] = static_cast<L>(disagreement);
  }
  return {loss, classification, consistency, rank, statistics};
}

// Calls `function` with the views as the engine of their dtype takes them.
template <typename Function>
auto with_views(const at::Tensor& views, bool for_keys, const Function& function) {
  return with_product(views.scalar_type(), true, [&](auto product) {
    return function(UnitViews<typename decltype(product)::type>(views, for_keys));
  });
}

}  // namespace

Losses conic(const at::Tensor& views, const at::Tensor& weight, const at::Tensor& target,
             const ConICSettings& settings) {
  return with_views(views, false, [&](const auto& unit_views) {
    const ConIC passes(unit_views, weight, target, settings);
    const auto [coefficients, kept] = passes.coefficients_and_kept();
    const at::Tensor positives = passes.positives(), partial = passes.statistics(positives, kept);
    return merge_rows<typename std::decay_t<decltype(unit_views)>::T>(partial, positives, unit_views,
                                                                      settings, coefficients);
  });
}

at::Tensor conic_positives(const at::Tensor& views, const at::Tensor& weight, const at::Tensor& target) {
  return with_views(views, false, [&](const auto& unit_views) {
    return ConIC(unit_views, weight, target, {.temperature = 1}).positives();
  });
}

at::Tensor conic_statistics(const at::Tensor& views, const at::Tensor& weight, const at::Tensor& target,
                            const at::Tensor& positives, const ConICSettings& settings) {
  return with_views(views, false, [&](const auto& unit_views) {
    return joined<ConICPartial>(ConIC(unit_views, weight, target, settings).statistics(positives), settings);
  });
}

Losses conic_merge(const at::Tensor& partial, const at::Tensor& positives, const at::Tensor& views,
                   const ConICSettings& settings) {
  return with_views(views, false, [&](const auto& unit_views) {
    const auto coefficients = empty_records<ConICCoefficients>({unit_views.views, unit_views.batch});
    return merge_rows<double>(partial, positives, unit_views, settings, std::get<0>(coefficients));
  });
}

std::tuple<at::Tensor, at::Tensor> conic_gradient(const at::Tensor& grad_loss, const at::Tensor& views,
                                                  const at::Tensor& weight, const at::Tensor& target,
                                                  const at::Tensor& statistics, const ConICSettings& settings,
                                                  bool views_need_grad, bool weight_needs_grad) {
  return with_views(views, weight_needs_grad, [&](const auto& unit_views) {
    return ConIC(unit_views, weight, target, settings)
        .gradient(grad_loss, statistics, {.views = views_need_grad, .weight = weight_needs_grad});
  });
}

at::Tensor conic_gradient_sgd_(const at::Tensor& grad_loss, const at::Tensor& views, const at::Tensor& weight,
                               const at::Tensor& momentum_buffer, const at::Tensor& target,
                               const at::Tensor& statistics, const ConICSettings& settings,
                               const SGDSettings& sgd) {
  const SGD step(weight, momentum_buffer, sgd);
  const at::Tensor grad_views = with_views(views, true, [&](const auto& unit_views) {
    return std::get<0>(ConIC(unit_views, weight, target, settings)
                           .gradient(grad_loss, statistics, {.views = true, .weight = true, .sgd = &step}));
  });
  mark_written({momentum_buffer, weight});
  return grad_views;
}

}  // namespace contrastive_ops
