// NT-Xent and CO2 on it on CPUs: the operators `nt_xent` and its backward, which contrastive_ops/reference.py
// specifies.
//
// Plan. Rows come in groups: kPanel instances, whose first views are one panel and whose second views the
// next. A group is a pair of panels of queries, and also a tile of keys. For every two groups, the tile of
// the one meets the panels of the other, once for both:
//
//   forward    s and y, the similarities to the panel of first views and to that of second views. As s_ij is
//              s_ji, they and their transpose give the statistics of the rows of both groups; and as an
//              instance's two rows have the same negatives, y is what s is compared with for consistency
//   backward   s and y again, H = G + G^T with G = d loss / d s in place of them, then grad += N^T H for the
//              panels and grad += H q for the tile
//
// Groups are shared out to blocks, two for each thread, which meet as in a round-robin tournament: in every
// round each block is in one pair. So sums of a row are added up in place, by one thread at a time and in a
// fixed order: equal input on equal threads gives equal bits. Nothing is kept per pair of rows but one tile
// of two panels.
//
// Bound by arithmetic. With M rows, M^2 pairs cost two products of 2 D operations: half of one in forward,
// where each similarity serves two rows, and one and a half in backward. Each pair takes 4 exponentials, 2
// without consistency. At M = 4096, D = 128 that is 8.6 GFLOP, 18 ms on two cores of 234 GFLOP/s each, beside
// about 6 ms of exponentials and sums; all rows together are 2 MiB. docs/performance.md has what was
// measured.

#include <tuple>

#include "operators.h"
#include "panel.h"
#include "product.h"

namespace contrastive_ops {
namespace {

// In a tile's similarities, from its first views' to its second views'.
template <typename T>
inline constexpr int64_t kOtherView = kPanel<T> * kPanel<T>;

// Replaces similarities by H. `rows` and `keys` are those of both views of a group.
template <bool kConsistency, typename T>
void replace_by_both_gradients(T* s, T* y, const Settings& settings, const PanelCoefficients<T>* rows,
                               const PanelCoefficients<T>* keys) {
  const Scales<T> scales(settings);
  // Adds what an instance's two rows contribute to the gradient of their similarities to a third row.
  const auto add = [&scales](Vec<T> first, Vec<T> second, const Coefficients<T>& of_first,
                             const Coefficients<T>& of_second, Vec<T>& g_first, Vec<T>& g_second) {
    const auto a = first - of_first.max_s, b = second - of_second.max_s, d = a - b;
    Vec<T> e_first(T(0)), e_second(T(0));
    if constexpr (kConsistency) {
      e_first = exp2_nonpositive(a * scales.consistency);
      e_second = exp2_nonpositive(b * scales.consistency);
    }
    g_first = g_first + gradient<true, kConsistency>(a, d, e_first, e_second, of_first, scales);
    g_second = g_second + gradient<true, kConsistency>(b, d.neg(), e_second, e_first, of_second, scales);
  };

  for (int64_t lane = 0; lane < kPanel<T>; lane += kWidth<T>) {
    const auto row1 = rows[0].lanes(lane), row2 = rows[1].lanes(lane);
    for (int64_t j = 0; j < kPanel<T>; ++j) {
      T *s_at = s + j * kPanel<T> + lane, *y_at = y + j * kPanel<T> + lane;
      const auto s1 = Vec<T>::loadu(s_at), s2 = Vec<T>::loadu(s_at + kOtherView<T>);
      const auto y1 = Vec<T>::loadu(y_at), y2 = Vec<T>::loadu(y_at + kOtherView<T>);
      const auto key1 = keys[0].row(j), key2 = keys[1].row(j);
      Vec<T> g_s1(T(0)), g_s2(T(0)), g_y1(T(0)), g_y2(T(0));
      add(s1, y1, row1, row2, g_s1, g_y1);
      add(s2, y2, row1, row2, g_s2, g_y2);
      add(s1, s2, key1, key2, g_s1, g_s2);
      add(y1, y2, key1, key2, g_y1, g_y2);
      g_s1.store(s_at), g_s2.store(s_at + kOtherView<T>);
      g_y1.store(y_at), g_y2.store(y_at + kOtherView<T>);
    }
  }
}

// A square of one vector's width: after log2(width) perfect shuffles of its rows, what was column is row.
template <typename T>
inline void transpose_square(const T* from, T* to) {
  constexpr int64_t kW = kWidth<T>;
  Vec<T> rows[kW], shuffled[kW];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kW; ++i) rows[i] = Vec<T>::loadu(from + i * kPanel<T>);
#pragma GCC unroll 4
  for (int64_t step = 1; step < kW; step *= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kW / 2; ++i)
      std::tie(shuffled[2 * i], shuffled[2 * i + 1]) = at::vec::interleave2(rows[i], rows[i + kW / 2]);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kW; ++i) rows[i] = shuffled[i];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kW; ++i) rows[i].store(to + i * kPanel<T>);
}

// (kPanel x kPanel)
template <typename T>
void transpose_panel(const T* from, T* to) {
  for (int64_t i = 0; i < kPanel<T>; i += kWidth<T>)
    for (int64_t j = 0; j < kPanel<T>; j += kWidth<T>)
      transpose_square(from + i * kPanel<T> + j, to + j * kPanel<T> + i);
}

template <typename Product, bool kConsistency>
class NTXent {
  using T = typename Product::Sum;
  using Operand = typename Product::Operand;

  static constexpr int64_t kKeys = 2 * kPanel<T>;  // of a tile
  static_assert(kKeys <= kTile);
  // The similarity of pairs that are no negatives. Every power of it is 0, and differences are finite.
  static constexpr T kExcluded = std::numeric_limits<T>::lowest() / 4;

 public:
  NTXent(const at::Tensor& views, const Settings& settings, bool backward)
      : views_(views),
        settings_(settings),
        batch_(views.size(1)),
        dim_(views.size(2)),
        groups_(at::divup(batch_, kPanel<T>)),
        rows_(2 * batch_, 2 * groups_, dim_, settings.normalize, backward, panels_of(views)) {
    // There are twice as many rounds as threads, and each is to be worth it.
    const double tasks = static_cast<double>(rows_.count) * rows_.count * dim_ / kTaskOperations;
    const auto threads = std::clamp<int64_t>(std::sqrt(tasks), 1, at::get_num_threads());
    blocks_ = 2 * std::min(threads, at::divup(groups_, 2));
  }

  LossTensors forward() const {
    const Positives<T> positive(rows_, rows_, [](int64_t panel) { return panel ^ 1; });
    std::vector<PanelStatistics<T>> statistics(rows_.panels);
    const auto add = [&](const T* s, const T* y, int64_t group) {
      const T* threshold = &positive.threshold[group * kKeys];
      add_tile<true, kConsistency>(s, y, kKeys, threshold, settings_, statistics[2 * group]);
      add_tile<true, false>(y, s, kKeys, threshold + kPanel<T>, settings_, statistics[2 * group + 1]);
    };
    for_each_tile(false, [&](const Tile& tile) {
      std::vector<T> s_transposed(kKeys * kPanel<T>), y_transposed(kKeys * kPanel<T>);
      for (int64_t group = tile.first_group; group < tile.last_group; ++group) {
        similarities(tile, group);
        add(tile.s, tile.y, group);
        if (group == tile.group) continue;
        transpose_panel(tile.s, &s_transposed[0]);
        transpose_panel(tile.y, &s_transposed[kOtherView<T>]);
        transpose_panel(tile.s + kOtherView<T>, &y_transposed[0]);
        transpose_panel(tile.y + kOtherView<T>, &y_transposed[kOtherView<T>]);
        add(s_transposed.data(), y_transposed.data(), tile.group);
      }
    });
    return finish_losses(statistics, positive);
  }

  at::Tensor backward(const at::Tensor& grad_loss, const at::Tensor& statistics) const {
    const at::Tensor incoming = grad_loss.to(at::kDouble).contiguous(), fields = statistics.contiguous();
    const double *weight = incoming.const_data_ptr<double>(), *of = fields.const_data_ptr<double>();
    const double scale = scale_to_half(largest_gradient(weight, of));
    const auto coefficients = coefficients_of(weight, of, scale);
    // The same gradient in two parts: of rows as queries, (panels, dim, lanes), and as keys, (rows, dim).
    std::vector<T> of_queries(groups_ * kKeys * dim_), of_keys(of_queries.size());
    const auto of_panel = [&](int64_t panel) { return &of_queries[panel * kPanel<T> * dim_]; };
    for_each_tile(true, [&](const Tile& tile) {
      std::vector<T> grad(Product::keys_grad_elements(dim_)), row(dim_);
      for (int64_t group = tile.first_group; group < tile.last_group; ++group) {
        similarities(tile, group);
        replace_by_both_gradients<kConsistency>(tile.s, tile.y, settings_, &coefficients[2 * group],
                                                &coefficients[2 * tile.group]);
        tile.product.accumulate(tile.s, of_panel(2 * group));
        tile.product.accumulate(tile.y, of_panel(2 * group + 1));
        if (group == tile.group) continue;
        tile.product.accumulate_keys(tile.s, rows_.packed_rows(2 * group), grad.data());
        tile.product.accumulate_keys(tile.y, rows_.packed_rows(2 * group + 1), grad.data());
      }
      for (int64_t key = 0; key < kKeys; ++key) {
        tile.product.copy_key_grad(grad.data(), key, row.data());
        T* sum = &of_keys[(tile.group * kKeys + key) * dim_];
        for (int64_t d = 0; d < dim_; ++d) sum[d] += row[d];
      }
    });

    const double inverse_scale = 1 / scale;
    at::Tensor grad_views = at::empty(views_.sizes(), views_.options());
    at::parallel_for(0, 2 * batch_, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> grad(dim_);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t other = other_view(index), row = row_of(index), lane = row % kPanel<T>;
        // Of the similarity to its positive, which is the positive's similarity to it.
        const double of_positive = weight[index] * of[5 * index + 4] + weight[other] * of[5 * other + 4];
        const T *query = of_panel(row / kPanel<T>), *key = &of_keys[row * dim_],
                *positive = rows_.unit(row_of(other));
        for (int64_t d = 0; d < dim_; ++d)
          grad[d] = inverse_scale * (static_cast<double>(query[d * kPanel<T> + lane]) + key[d]) +
                    of_positive * positive[d];
        if (settings_.normalize) differentiate_norm(grad.data(), rows_.unit(row), rows_.norm[row], dim_);
        write_row(grad_views, index, grad.data());
      }
    });
    return grad_views;
  }

 private:
  // The rows of a group, met as keys by the groups of a block.
  struct Tile {
    Product& product;
    T *s, *y;  // (kKeys x kPanel)
    int64_t group, first_group, last_group;
  };

  // A function that gives the rows of a panel.
  static auto panels_of(const at::Tensor& views) {
    return [view1 = Rows::of(views[0]), view2 = Rows::of(views[1])](int64_t panel) {
      const Rows& view = panel % 2 ? view2 : view1;
      const int64_t first = panel / 2 * kPanel<T>;
      return view.slice(first, std::min(first + kPanel<T>, view.count));
    };
  }

  // Of row `index` of both views: where it stands among the groups, and the index of its positive.
  int64_t row_of(int64_t index) const {
    const int64_t view = index / batch_, instance = index % batch_;
    return (instance / kPanel<T> * 2 + view) * kPanel<T> + instance % kPanel<T>;
  }
  int64_t other_view(int64_t index) const { return index < batch_ ? index + batch_ : index - batch_; }

  // Calls `function` with tiles and the groups that they are to meet, so that every two groups, and each
  // group with itself, meet once.
  template <typename Function>
  void for_each_tile(bool transposed_too, const Function& function) const {
    const auto meet = [&](int64_t lower, int64_t upper) {
      std::vector<T> s(kKeys * kPanel<T>), y(s.size());
      std::vector<Operand> buffer(Product::tile_elements(dim_));
      Product product(dim_, buffer.data());
      const auto first_group = [this](int64_t block) { return block * groups_ / blocks_; };
      for (int64_t group = first_group(upper); group < first_group(upper + 1); ++group) {
        product.load(Rows::of(rows_.unit(group * kKeys), kKeys, dim_), transposed_too);
        const int64_t last = lower == upper ? group + 1 : first_group(lower + 1);
        function(Tile{product, s.data(), y.data(), group, first_group(lower), last});
      }
    };
    // The circle method: the last block stays, the others go round it.
    const int64_t circle = blocks_ - 1;
    for (int64_t round = 0; round < circle; ++round)
      at::parallel_for(0, blocks_ / 2, 1, [&](int64_t begin, int64_t end) {
        for (int64_t pair = begin; pair < end; ++pair) {
          const int64_t one = (round + pair) % circle;
          const int64_t other = pair == 0 ? circle : (round - pair + circle) % circle;
          if (round == 0) meet(one, one), meet(other, other);
          meet(std::min(one, other), std::max(one, other));
        }
      });
  }

  // Of a tile to both panels of a group.
  void similarities(const Tile& tile, int64_t group) const {
    tile.product.similarities(rows_.packed(2 * group), tile.s);
    tile.product.similarities(rows_.packed(2 * group + 1), tile.y);
    const int64_t instances = std::min(kPanel<T>, batch_ - tile.group * kPanel<T>);
    for (T* x : {tile.s, tile.y})
      for (T* of_view : {x, x + kOtherView<T>}) {
        std::fill(of_view + instances * kPanel<T>, of_view + kOtherView<T>, kExcluded);
        for (int64_t i = 0; group == tile.group && i < instances; ++i) of_view[i * kPanel<T> + i] = kExcluded;
      }
  }

  LossTensors finish_losses(const std::vector<PanelStatistics<T>>& statistics,
                            const Positives<T>& positive) const {
    const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
    at::Tensor loss = at::empty({2 * batch_}, options), instance_loss = at::empty_like(loss),
               consistency_loss = at::empty_like(loss),
               rank = at::empty({2 * batch_}, options.dtype(at::kLong)),
               fields = at::empty({2 * batch_, 5}, options.dtype(at::kDouble));
    T *losses = loss.mutable_data_ptr<T>(), *instance_losses = instance_loss.mutable_data_ptr<T>(),
      *consistency_losses = consistency_loss.mutable_data_ptr<T>();
    auto* ranks = rank.mutable_data_ptr<int64_t>();
    auto* out = fields.mutable_data_ptr<double>();
    const auto write = [&](int64_t index, const FinishedRow& row) {
      losses[index] = static_cast<T>(row.instance_loss + settings_.consistency_weight * row.consistency_loss);
      instance_losses[index] = static_cast<T>(row.instance_loss);
      consistency_losses[index] = static_cast<T>(row.consistency_loss);
      const int64_t at = row_of(index);
      ranks[index] = statistics[at / kPanel<T>].rank[at % kPanel<T>];
      // In a batch of one nothing was a negative.
      const bool alone = batch_ == 1;
      const double of[] = {alone ? positive.similarity[at] : row.max_s, row.instance, alone ? 0 : row.query,
                           row.mean, row.grad_positive};
      std::copy_n(of, 5, out + 5 * index);
    };
    at::parallel_for(0, batch_, kPanel<T>, [&](int64_t begin, int64_t end) {
      for (int64_t instance = begin; instance < end; ++instance) {
        const int64_t at = row_of(instance), panel = at / kPanel<T>, lane = at % kPanel<T>;
        const double similarity = positive.similarity[at];
        const auto first =
            finish_row<true, kConsistency>(&statistics[panel], 1, 1, lane, similarity, settings_);
        auto second = finish_row<true, false>(&statistics[panel + 1], 1, 1, lane, similarity, settings_);
        // Its Q is the first row's P, and its d the first row's with the other sign.
        second.consistency_loss = first.consistency_loss;
        second.query = first.key, second.mean = -first.mean_of_key;
        write(instance, first), write(instance + batch_, second);
      }
    });
    return {loss, instance_loss, consistency_loss, rank, fields};
  }

  std::vector<PanelCoefficients<T>> coefficients_of(const double* weight, const double* of,
                                                    double scale) const {
    std::vector<PanelCoefficients<T>> coefficients(rows_.panels);
    for (int64_t index = 0; index < 2 * batch_; ++index) {
      const double *row = of + 5 * index, *other = of + 5 * other_view(index), w = scale * weight[index];
      const int64_t at = row_of(index);
      coefficients[at / kPanel<T>].set(at % kPanel<T>, {.max_s = row[0],
                                                        .instance = w * row[1],
                                                        .query = w * row[2],
                                                        .key = w * other[2],
                                                        .mean = row[3]});
    }
    return coefficients;
  }

  // What no |d loss / d s| of a pair of negatives exceeds.
  double largest_gradient(const double* weight, const double* of) const {
    double longest = 1;  // |z|^2 of a row, and so a bound of similarities
    for (int64_t row = 0; row < groups_ * kKeys && !settings_.normalize; ++row) {
      const T* z = rows_.unit(row);
      longest = std::max(longest, sum_of(dim_, [&](int64_t d) { return static_cast<double>(z[d]) * z[d]; }));
    }
    const double lead = 1 + 4 * longest / settings_.consistency_temperature;
    double largest = 0;
    for (int64_t index = 0; index < 2 * batch_; ++index) {
      const double *row = of + 5 * index, *other = of + 5 * other_view(index);
      largest = std::max(largest, std::abs(weight[index]) * (row[1] + row[2] * lead + other[2]));
    }
    return largest;
  }

  const at::Tensor views_;
  const Settings settings_;
  const int64_t batch_, dim_, groups_;
  const Panels<Product> rows_;  // panels 2 g and 2 g + 1 are both views of group g
  int64_t blocks_ = 0;
};

// Calls `function` with the implementation for these views and settings.
template <typename Function>
auto with_implementation(const at::Tensor& views, const Settings& settings, bool backward,
                         const Function& function) {
  return with_product(views.scalar_type(), true, [&](auto product) {
    using Product = typename decltype(product)::type;
    if (settings.consistency_weight == 0) return function(NTXent<Product, false>(views, settings, backward));
    return function(NTXent<Product, true>(views, settings, backward));
  });
}

}  // namespace

LossTensors nt_xent(const at::Tensor& views, double temperature, double consistency_temperature,
                    double consistency_weight, bool normalize) {
  const Settings settings{.temperature = temperature,
                          .consistency_temperature = consistency_temperature,
                          .consistency_weight = consistency_weight,
                          .normalize = normalize};
  return with_implementation(views, settings, false, [](const auto& loss) { return loss.forward(); });
}

at::Tensor nt_xent_backward(const at::Tensor& grad_loss, const at::Tensor& views,
                            const at::Tensor& statistics, double temperature, double consistency_temperature,
                            double consistency_weight, bool normalize) {
  const Settings settings{.temperature = temperature,
                          .consistency_temperature = consistency_temperature,
                          .consistency_weight = consistency_weight,
                          .normalize = normalize};
  return with_implementation(views, settings, true,
                             [&](const auto& loss) { return loss.backward(grad_loss, statistics); });
}

}  // namespace contrastive_ops
