// NT-Xent and CO2 on it on CPUs: the operators `nt_xent` and its backward and the three steps of the loss,
// which contrastive_ops/reference.py specifies.
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
// fixed order: equal input on equal threads gives equal bits. Nothing is kept per pair of rows but one
// tile of two panels.
//
// Where other instances are the keys, threads share out (block of groups of rows) x (range of groups of
// keys), and nothing is added to the keys.
//
// Bound by arithmetic. With M rows, M^2 pairs cost two products of 2 D operations: half of one in forward,
// where each similarity serves two rows, and one and a half in backward. Each pair takes 4 exponentials, 2
// without consistency. At M = 4096, D = 128 that is 8.6 GFLOP, 18 ms on two cores of 234 GFLOP/s each, beside
// about 6 ms of exponentials and sums; all rows together are 2 MiB. docs/performance.md has what was
// measured.

#include <numeric>
#include <optional>
#include <tuple>

#include "losses.h"
#include "operators.h"
#include "panels.h"
#include "tile_math.h"

namespace contrastive_ops {
namespace {

// In a tile's similarities, from its first views' to its second views'.
template <typename T>
inline constexpr int64_t kOtherView = kPanel<T> * kPanel<T>;

// Replaces similarities by H. `rows` and `keys` have the coefficients of both views of a group.
template <bool kConsistency, typename T>
void replace_by_both_gradients(T* s, T* y, const Temperatures& temperatures, const PanelCoefficients<T>* rows,
                               const PanelCoefficients<T>* keys) {
  const Scales<T> scales(temperatures);
  // Adds what an instance's two rows contribute to the gradient of their similarities to a third row.
  const auto add = [&scales](Vec<T> first, Vec<T> second, const VectorCoefficients<T>& row1,
                             const VectorCoefficients<T>& row2, Vec<T>& g_first, Vec<T>& g_second) {
    const auto a = first - row1.max_s, b = second - row2.max_s, d = a - b;
    Vec<T> e_first(T(0)), e_second(T(0));
    if constexpr (kConsistency) {
      e_first = exp_nonpositive(a, scales.consistency);
      e_second = exp_nonpositive(b, scales.consistency);
    }
    g_first = g_first + gradient<true, kConsistency>(a, d, e_first, e_second, row1, scales);
    g_second = g_second + gradient<true, kConsistency>(b, d.neg(), e_second, e_first, row2, scales);
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

// Transposes a square of one vector's width: after log2(width) perfect shuffles of rows, columns are rows.
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

constexpr int64_t kMergedRows = 16;  // instances that are worth a thread

// How the rows of both views of some instances stand in panels: 2 g and 2 g + 1 are the views of group g.
// Outside of panels, a row's index is view * batch + instance.
template <typename T>
struct Layout {
  int64_t batch;

  int64_t groups() const { return at::divup(batch, kPanel<T>); }
  int64_t row(int64_t index) const {
    const int64_t view = index / batch, instance = index % batch;
    return (instance / kPanel<T> * 2 + view) * kPanel<T> + instance % kPanel<T>;
  }
  int64_t other_view(int64_t index) const { return index < batch ? index + batch : index - batch; }
};

// The rows of both views (2, B, D) in panels of a layout. `for_keys`: also as accumulate_keys takes them.
template <typename Product>
Panels<Product> panels_of_views(const at::Tensor& views, bool normalized, bool for_keys) {
  using T = typename Product::Sum;
  const Matrix view1(views[0]), view2(views[1]);
  return {2 * view1.rows,
          2 * at::divup(view1.rows, kPanel<T>),
          view1.columns,
          normalized,
          for_keys,
          [&](int64_t panel) {
            const Matrix& view = panel % 2 ? view2 : view1;
            const int64_t first = panel / 2 * kPanel<T>;
            return view.slice(first, std::min(first + kPanel<T>, view.rows));
          }};
}

// The losses of some rows, as their gradients need them.
struct WeightedLosses {
  const at::Tensor grad_loss;  // (2 B,)
  const Records<NTXentCoefficients> rows;

  WeightedLosses(const at::Tensor& grad_loss, const at::Tensor& coefficients)
      : grad_loss(grad_loss.to(at::kDouble).contiguous()), rows(coefficients) {}

  double weight(int64_t index) const { return grad_loss.const_data_ptr<double>()[index]; }
  double grad_positive(int64_t index) const { return weight(index) * rows[index].grad_positive; }
};

// The passes over pairs of rows and keys, for one product engine. Without `keys` the rows are the keys.
template <typename Product, bool kConsistency>
class NTXent {
  using Operand = typename Product::Operand;

 public:
  using T = typename Product::Sum;

  static constexpr int64_t kKeys = 2 * kPanel<T>;  // of a tile
  static_assert(kKeys <= Product::kTile);
  // The similarity of pairs that are no negatives. Every power of it is 0, and differences are finite.
  static constexpr T kExcluded = std::numeric_limits<T>::lowest() / 4;

  NTXent(const at::Tensor& views, const NTXentSettings& settings, const std::optional<NTXentKeys>& keys,
         bool for_gradient)
      : views_(views),
        settings_(settings),
        temperatures_{settings.temperature, settings.consistency_temperature},
        dim_(views.size(2)),
        symmetric_(!keys),
        layout_{views.size(1)},
        key_layout_{keys ? keys->views.size(1) : layout_.batch},
        rows_(panels_of_views<Product>(views, settings.normalize, for_gradient && symmetric_)),
        own_(layout_.groups() * kPanel<T>, -1) {
    if (keys) {
      other_keys_.emplace(panels_of_views<Product>(keys->views, settings.normalize, false));
      const at::Tensor target = keys->target.contiguous();
      std::copy_n(target.const_data_ptr<int64_t>(), layout_.batch, own_.begin());
    } else {
      std::iota(own_.begin(), own_.begin() + layout_.batch, 0);
    }
    share_out();
  }

  // The statistics of each range of keys (ranges, 2 B, 5), and s_ip(i) (2 B,).
  std::tuple<at::Tensor, at::Tensor> statistics() const {
    const Positives<T> positive(rows_, rows_, [](int64_t panel) { return panel ^ 1; });
    Array<PanelStatistics<T>> statistics(ranges_ * rows_.panels);  // (ranges, panels)
    const auto add = [&](const T* s, const T* y, int64_t range, int64_t group) {
      const T* threshold = &positive.threshold[group * kKeys];
      PanelStatistics<T>* views = &statistics[range * rows_.panels + 2 * group];
      add_tile<true, kConsistency>(s, y, kKeys, threshold, temperatures_, views[0], [] {});
      add_tile<true, false>(y, s, kKeys, threshold + kPanel<T>, temperatures_, views[1], [] {});
    };
    for_each_tile([&](const Tile& tile) {
      Array<T> s_transposed(kKeys * kPanel<T>), y_transposed(kKeys * kPanel<T>);
      for (int64_t group = tile.first_group; group < tile.last_group; ++group) {
        similarities(tile, group);
        add(tile.s, tile.y, tile.range, group);
        if (!symmetric_ || group == tile.group) continue;
        transpose_panel(tile.s, &s_transposed[0]);
        transpose_panel(tile.y, &s_transposed[kOtherView<T>]);
        transpose_panel(tile.s + kOtherView<T>, &y_transposed[0]);
        transpose_panel(tile.y + kOtherView<T>, &y_transposed[kOtherView<T>]);
        add(s_transposed.data(), y_transposed.data(), tile.range, tile.group);
      }
    });

    at::Tensor similarity = empty({rows_.count}, at::kDouble);
    auto [partial, part] = empty_records<NTXentPartial>({ranges_, rows_.count});
    for (int64_t index = 0; index < rows_.count; ++index) {
      const int64_t row = layout_.row(index), panel = row / kPanel<T>, lane = row % kPanel<T>;
      similarity.mutable_data_ptr<double>()[index] = positive.similarity[row];
      for (int64_t range = 0; range < ranges_; ++range)
        part[range * rows_.count + index] =
            record(&statistics[range * rows_.panels + panel / 2 * 2], panel % 2, lane);
    }
    return {partial, similarity};
  }

  // The gradient in the views (2, B, D). `key_losses` are those of other instances that are the keys.
  at::Tensor gradient(const WeightedLosses& losses, const std::optional<WeightedLosses>& key_losses) const {
    double bound = largest_gradient(losses, layout_);
    if (key_losses) bound = std::max(bound, largest_gradient(*key_losses, key_layout_));
    const double scale = scale_to_half(bound);
    const auto row_coefficients = panel_coefficients(losses, layout_, scale);
    const auto other_coefficients =
        key_losses ? panel_coefficients(*key_losses, key_layout_, scale) : Array<PanelCoefficients<T>>();
    const auto& key_coefficients = symmetric_ ? row_coefficients : other_coefficients;

    // The gradient of rows as queries, (ranges, panels, D, lanes), and of the same rows as keys, (rows, D).
    const int64_t elements = rows_.panels * kPanel<T> * dim_;
    Array<T> as_queries(ranges_ * elements), as_keys(symmetric_ ? elements : 0);
    for_each_tile([&](const Tile& tile) {
      Array<T> grad(symmetric_ ? Product::keys_grad_elements(dim_) : 0), row(dim_);
      for (int64_t group = tile.first_group; group < tile.last_group; ++group) {
        similarities(tile, group);
        replace_by_both_gradients<kConsistency>(tile.s, tile.y, temperatures_, &row_coefficients[2 * group],
                                                &key_coefficients[2 * tile.group]);
        T* views = &as_queries[tile.range * elements + group * kKeys * dim_];
        tile.product.accumulate(tile.s, views);
        tile.product.accumulate(tile.y, views + kPanel<T> * dim_);
        if (!symmetric_ || group == tile.group) continue;
        tile.product.accumulate_keys(tile.s, rows_.packed_rows(2 * group), grad.data());
        tile.product.accumulate_keys(tile.y, rows_.packed_rows(2 * group + 1), grad.data());
      }
      if (symmetric_) tile.product.finish_keys(grad.data());
      for (int64_t key = 0; symmetric_ && key < kKeys; ++key) {
        tile.product.copy_key_grad(grad.data(), key, row.data());
        T* sum = &as_keys[(tile.group * kKeys + key) * dim_];
        for (int64_t d = 0; d < dim_; ++d) sum[d] += row[d];
      }
    });

    const double inverse_scale = 1 / scale;
    at::Tensor grad_views = empty(views_.sizes(), views_.scalar_type());
    at::parallel_for(0, rows_.count, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> grad(dim_);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t other = layout_.other_view(index), row = layout_.row(index), lane = row % kPanel<T>;
        const T* query = &as_queries[row / kPanel<T> * kPanel<T> * dim_ + lane];
        const T* key = symmetric_ ? &as_keys[row * dim_] : nullptr;
        const T* positive = rows_.unit(layout_.row(other));
        // s_ip(i) is in the loss of both views, and counts with the keys that have the row's own instance.
        const bool has_own = own_[index % layout_.batch] >= 0;
        const double grad_positive = has_own ? losses.grad_positive(index) + losses.grad_positive(other) : 0;
        for (int64_t d = 0; d < dim_; ++d) {
          double sum = query[d * kPanel<T>];
          for (int64_t range = 1; range < ranges_; ++range) sum += query[range * elements + d * kPanel<T>];
          if (key) sum += key[d];
          grad[d] = inverse_scale * sum;
          if (has_own) grad[d] += grad_positive * positive[d];
        }
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
    int64_t range, group, first_group, last_group;
  };

  // A thread's memory for tiles.
  struct Workspace {
    Array<T> s, y;
    Product product;

    explicit Workspace(int64_t dim) : s(kKeys * kPanel<T>), y(s.size()), product(dim) {}
  };

  const Panels<Product>& keys() const { return other_keys_ ? *other_keys_ : rows_; }

  void share_out() {
    const double tasks = static_cast<double>(rows_.count) * keys().count * dim_ / kTaskOperations;
    if (symmetric_) {  // there are twice as many rounds as threads, and each is to be worth it
      const auto threads = std::clamp<int64_t>(std::sqrt(tasks), 1, at::get_num_threads());
      blocks_ = 2 * std::min(threads, at::divup(layout_.groups(), 2));
      return;
    }
    const auto threads = std::clamp<int64_t>(tasks, 1, at::get_num_threads());
    blocks_ = std::min(threads, layout_.groups());
    ranges_ = std::clamp<int64_t>(key_layout_.groups(), 1, threads / std::max<int64_t>(1, blocks_));
  }

  int64_t first_group(int64_t block) const { return block * layout_.groups() / blocks_; }

  template <typename Function>
  void for_each_tile(const Function& function) const {
    if (symmetric_)
      for_each_tile_of_rows(function);
    else
      for_each_tile_of_keys(function);
  }

  // Calls `function` with tiles and the groups that they are to meet, so that every two groups, and each
  // group with itself, meet once.
  template <typename Function>
  void for_each_tile_of_rows(const Function& function) const {
    const auto meet = [&](int64_t lower, int64_t upper) {
      Workspace memory(dim_);
      for (int64_t group = first_group(upper); group < first_group(upper + 1); ++group) {
        memory.product.load(Matrix(rows_.unit(group * kKeys), kKeys, dim_));
        const int64_t last = lower == upper ? group + 1 : first_group(lower + 1);
        function(Tile{memory.product, memory.s.data(), memory.y.data(), 0, group, first_group(lower), last});
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

  // Calls `function` with tiles of other instances, for each block of groups of rows.
  template <typename Function>
  void for_each_tile_of_keys(const Function& function) const {
    at::parallel_for(0, blocks_ * ranges_, 1, [&](int64_t begin, int64_t end) {
      Workspace memory(dim_);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / ranges_, range = task % ranges_, groups = key_layout_.groups();
        const int64_t first = first_group(block), last = first_group(block + 1);
        for (int64_t group = range * groups / ranges_; group < (range + 1) * groups / ranges_; ++group) {
          memory.product.load(Matrix(other_keys_->unit(group * kKeys), kKeys, dim_));
          function(Tile{memory.product, memory.s.data(), memory.y.data(), range, group, first, last});
        }
      }
    });
  }

  // Computes the similarities of a tile to both panels of a group.
  void similarities(const Tile& tile, int64_t group) const {
    tile.product.similarities(rows_.packed(2 * group), tile.s);
    tile.product.similarities(rows_.packed(2 * group + 1), tile.y);
    const int64_t first = tile.group * kPanel<T>, instances = std::min(kPanel<T>, key_layout_.batch - first);
    for (T* x : {tile.s, tile.y})
      for (T* view : {x, x + kOtherView<T>}) {
        std::fill(view + instances * kPanel<T>, view + kOtherView<T>, kExcluded);
        if (symmetric_ && group != tile.group) continue;
        for (int64_t lane = 0; lane < kPanel<T>; ++lane) {
          const int64_t key = own_[group * kPanel<T> + lane] - first;
          if (key >= 0 && key < instances) view[key * kPanel<T> + lane] = kExcluded;
        }
      }
  }

  // The sums of a row from those of both panels of its group. Only the first view's have a consistency term:
  // what they know of its key is the second view's.
  static NTXentPartial record(const PanelStatistics<T>* views, int64_t view, int64_t lane) {
    const CO2Partial first = views[0].row(lane), own = views[view].row(lane);
    if (own.max_s <= kExcluded && !std::isnan(own.z_instance)) return {.max_s = kLowest};  // no negatives
    return {.max_s = own.max_s,
            .rank = own.rank,
            .z_instance = own.z_instance,
            .z_query = view ? first.z_key : first.z_query,
            .d_query = view ? -first.d_key : first.d_query};
  }

  static Array<PanelCoefficients<T>> panel_coefficients(const WeightedLosses& losses, const Layout<T>& layout,
                                                        double scale) {
    Array<PanelCoefficients<T>> panels(2 * layout.groups());
    for (int64_t index = 0; index < 2 * layout.batch; ++index) {
      const int64_t row = layout.row(index);
      const NTXentCoefficients& other = losses.rows[layout.other_view(index)];
      panels[row / kPanel<T>].set(row % kPanel<T>,
                                  coefficients(losses.rows[index], other, scale * losses.weight(index)));
    }
    return panels;
  }

  // What no similarity exceeds.
  double largest_similarity() const {
    double largest = 1;
    if (settings_.normalize) return largest;
    for (const Panels<Product>* panels : {&rows_, &keys()})
      for (int64_t row = 0; row < panels->panels * kPanel<T>; ++row) {
        const T* z = panels->unit(row);
        largest = std::max(largest, dot(z, z, dim_));
      }
    return largest;
  }

  // What no |d loss / d s| of a pair of negatives exceeds.
  double largest_gradient(const WeightedLosses& losses, const Layout<T>& layout) const {
    const double similarity = largest_similarity();
    double largest = 0;
    for (int64_t index = 0; index < 2 * layout.batch; ++index) {
      const NTXentCoefficients& other = losses.rows[layout.other_view(index)];
      const Coefficients row = coefficients(losses.rows[index], other, std::abs(losses.weight(index)));
      largest = std::max(largest, gradient_bound(row, similarity, temperatures_.consistency));
    }
    return largest;
  }

  const at::Tensor views_;
  const NTXentSettings settings_;
  const Temperatures temperatures_;
  const int64_t dim_;
  const bool symmetric_;  // the rows are the keys
  const Layout<T> layout_, key_layout_;
  const Panels<Product> rows_;
  std::optional<Panels<Product>> other_keys_;
  std::vector<int64_t>
      own_;  // for each row's instance, and the padding of the last group: which key it is, or -1
  int64_t blocks_ = 0, ranges_ = 1;
};

// The losses in the dtype T, and the coefficients of their gradients.
template <typename T>
Losses merge_rows(const at::Tensor& partial, const at::Tensor& positive, const NTXentSettings& settings) {
  const Records<NTXentPartial> parts(partial);
  const at::Tensor similarity = positive.contiguous();
  const int64_t rows = similarity.size(0), batch = rows / 2;
  const Parts ranges{partial.size(0), rows};
  LossWriter<T> losses(rows);
  auto [statistics, row] = empty_records<NTXentCoefficients>({rows});
  const auto write = [&, row = row](int64_t i, const NTXentPartial& sums, const NTXentPartial& other) {
    losses.write(i, finish(sums, other, similarity.const_data_ptr<double>()[i], settings, row[i]), sums.rank);
  };
  at::parallel_for(0, batch, kMergedRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const NTXentPartial *view1 = &parts[i], *view2 = &parts[batch + i];
      const NTXentPartial sums1 = merge(view1, view2, ranges, settings);
      const NTXentPartial sums2 = merge(view2, view1, ranges, settings);
      write(i, sums1, sums2), write(batch + i, sums2, sums1);
    }
  });
  return losses.with(statistics);
}

// Calls `function` with the passes for these views, keys and settings.
template <typename Function>
auto with_passes(const at::Tensor& views, const NTXentSettings& settings,
                 const std::optional<NTXentKeys>& keys, bool for_gradient, const Function& function) {
  return with_product(views.scalar_type(), true, [&](auto product) {
    using Product = typename decltype(product)::type;
    if (settings.consistency_weight == 0)
      return function(NTXent<Product, false>(views, settings, keys, for_gradient));
    return function(NTXent<Product, true>(views, settings, keys, for_gradient));
  });
}

}  // namespace

Losses nt_xent(const at::Tensor& views, const NTXentSettings& settings) {
  return with_passes(views, settings, std::nullopt, false, [&](const auto& passes) {
    const auto [partial, positive] = passes.statistics();
    return merge_rows<typename std::decay_t<decltype(passes)>::T>(partial, positive, settings);
  });
}

std::tuple<at::Tensor, at::Tensor> nt_xent_statistics(const at::Tensor& views, const NTXentSettings& settings,
                                                      const std::optional<NTXentKeys>& keys) {
  return with_passes(views, settings, keys, false, [](const auto& passes) { return passes.statistics(); });
}

Losses nt_xent_merge(const at::Tensor& partial, const at::Tensor& positive, const NTXentSettings& settings) {
  return merge_rows<double>(partial, positive, settings);
}

at::Tensor nt_xent_gradient(const at::Tensor& grad_loss, const at::Tensor& views,
                            const at::Tensor& statistics, const NTXentSettings& settings,
                            const std::optional<NTXentKeys>& keys) {
  const WeightedLosses losses(grad_loss, statistics);
  std::optional<WeightedLosses> key_losses;
  if (keys) {
    TORCH_CHECK_VALUE(keys->grad_loss && keys->coefficients,
                      "the gradient needs grad_loss and coefficients of the keys");
    key_losses.emplace(*keys->grad_loss, *keys->coefficients);
  }
  return with_passes(views, settings, keys, true,
                     [&](const auto& passes) { return passes.gradient(losses, key_losses); });
}

}  // namespace contrastive_ops
