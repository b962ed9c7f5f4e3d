// CO2 and InfoNCE on CPUs: the operator `co2` and its three steps, specified by contrastive_ops/reference.py.
//
// Plan. Threads share out (block of query rows) x (range of keys). Each walks its range twice, a tile of keys
// at a time, and for each tile over the panels of its block:
//
//   1. statistics   s = N q^T and y = N k^T of the tile, then per row the running maxima, the three partition
//                   sums, both means of d = s - y, and the rank of the positive;
//   2. gradient     s and y again, g of every pair in place of s, then grad += N^T g.
//
// Between them the ranges' statistics are merged, and after them their gradients, in a fixed order: equal
// input on equal threads gives equal bits. Nothing is kept per pair but one tile of one panel, unless s and y
// of all pairs fit kKeptBytes: then the second pass has them from the first, if a product takes longer than
// to write and read what it gives.
//
// InfoNCE alone, which has no consistency term, takes one pass: its gradient is sum_j e^{s_j/tau} n_j but for
// a factor of the row, so what was added up moves with the row's maximum, as its sum does.
//
// Bound by arithmetic. A pair costs 5 products of 2 D operations and 6 exponentials: at 256 x 65536 x 128
// that is 21.5 GFLOP, 46 ms on two cores of 234 GFLOP/s each, beside about 6 ms of exponentials and sums; a
// tile is read from memory once a pass (64 MiB in all). InfoNCE takes 2 products and 1 exponential.
// docs/performance.md has what was measured.

#include <numeric>
#include <optional>
#include <utility>

#include "kept_pairs.h"
#include "losses.h"
#include "operators.h"
#include "panels.h"
#include "spare_memory.h"
#include "tile_math.h"

namespace contrastive_ops {
namespace {

constexpr int64_t kBlockPanels = 8;          // panels that share a loaded tile
constexpr int64_t kPartialBytes = 16 << 20;  // at most this for gradients of separate key ranges
constexpr int64_t kKeptBytes = 32 << 20;     // at most this for similarities from one pass to the next

// The passes over the queue, for one product engine and one choice of terms.
template <typename Product, bool kInstance, bool kConsistency>
class CO2 {
  using Operand = typename Product::Operand;
  static constexpr int64_t kTile = Product::kTile;

 public:
  using T = typename Product::Sum;
  static constexpr bool kInOnePass = !kConsistency;

  CO2(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue, const CO2Settings& settings)
      : query_(Matrix(query), settings.normalize),
        key_(Matrix(key), settings.normalize),
        queue_(queue),
        normalize_(settings.normalize),
        temperatures_{settings.temperature, settings.consistency_temperature},
        panels_(query_.panels),
        rows_(panels_ * kPanel<T>),
        dim_(query_.dim),
        tiles_(at::divup(queue_.rows, kTile)) {
    share_out();
  }

  // The similarities s and y of all pairs, from one pass to the next; none where there are too many.
  class Kept {
   public:
    Kept() = default;
    explicit Kept(const CO2& passes) {
      const int64_t keys = passes.queue_.rows, bytes = KeptPairs<T>::bytes(passes.panels_, keys);
      if (!Product::kDearerThanMemory || 2 * bytes > kKeptBytes) return;
      memory_.emplace(2 * bytes);
      s = {memory_->data(), keys}, y = {static_cast<std::byte*>(memory_->data()) + bytes, keys};
    }

    KeptPairs<T> s, y;

   private:
    std::optional<SpareMemory> memory_;
  };

  // The statistics of each range of keys (ranges, B, 8), and what is known of the rows without keys (B, 11).
  std::tuple<at::Tensor, at::Tensor> statistics(const Kept& kept = {}) const {
    const Positives<T> positive(query_, key_);
    Array<PanelStatistics<T>> statistics(ranges_ * panels_);  // (ranges, panels)
    for_each_tile([&](const Step& step) {
      step.product.load(step.keys, step.next);
      for (int64_t panel = step.first_panel; panel < step.last_panel; ++panel) {
        const auto [s, y] = pairs(step, panel, kept);
        similarities(step, panel, s, y);
        add_tile<kInstance, kConsistency>(s, y, step.keys.rows, &positive.threshold[panel * kPanel<T>],
                                          temperatures_, statistics[step.range * panels_ + panel],
                                          step.fetch_ahead());
      }
    });
    return records(statistics, positive);
  }

  // dL/dq (B, D), of completed rows, with what the pass for the statistics has kept.
  at::Tensor gradient(const at::Tensor& rows, const Kept& kept = {}) const {
    const Records<CO2Row> known(rows);
    Array<PanelCoefficients<T>> panel_coefficients(panels_);
    for (int64_t row = 0; row < query_.count; ++row)
      panel_coefficients[row / kPanel<T>].set(row % kPanel<T>, coefficients(known[row]));

    Array<T> parts(ranges_ * rows_ * dim_);
    for_each_tile([&](const Step& step) {
      step.product.load(step.keys, step.next);
      for (int64_t panel = step.first_panel; panel < step.last_panel; ++panel) {
        const auto [s, y] = pairs(step, panel, kept);
        if (!kept.s) similarities(step, panel, s, y);
        gradient_of_tile<kInstance, kConsistency>(s, y, step.keys.rows, temperatures_,
                                                  panel_coefficients[panel], step.s, step.fetch_ahead());
        step.product.accumulate(step.s, part(parts, step.range, panel));
      }
    });
    return finish_gradient(known, parts, [](int64_t, int64_t) { return 1.0; });
  }

  // Both at once, of the instance term alone: its gradient is sum_j e^{s_j/tau} n_j but for a factor, which
  // `complete` tells by giving the completed rows (B, 11) for the statistics.
  template <typename Complete>
  at::Tensor statistics_and_gradient(const Complete& complete) const
    requires(kInOnePass)
  {
    // As large as half precision takes them: of float16 those below 6e-8 would be lost.
    constexpr T kScale = std::is_same_v<Operand, at::Half> ? T(1 << 14) : T(1);
    const Positives<T> positive(query_, key_);
    Array<PanelStatistics<T>> statistics(ranges_ * panels_);  // (ranges, panels)
    Array<T> parts(ranges_ * rows_ * dim_);
    for_each_tile([&](const Step& step) {
      step.product.load(step.keys, step.next);
      for (int64_t panel = step.first_panel; panel < step.last_panel; ++panel) {
        similarities(step, panel, step.s, step.y);
        Exponentials<T> exponentials{step.s, kScale};
        add_tile<kInstance, kConsistency>(
            step.s, step.y, step.keys.rows, &positive.threshold[panel * kPanel<T>], temperatures_,
            statistics[step.range * panels_ + panel], step.fetch_ahead(), exponentials);
        T* sums = part(parts, step.range, panel);
        scale_lanes(sums, dim_, exponentials.of_older);
        step.product.accumulate(step.s, sums);
      }
    });
    const at::Tensor rows = std::apply(complete, records(statistics, positive));
    const Records<CO2Row> known(rows);
    return finish_gradient(known, parts, [&](int64_t range, int64_t row) {
      const double max_s = statistics[range * panels_ + row / kPanel<T>].max_s[row % kPanel<T>];
      return known[row].instance / kScale * std::exp((max_s - known[row].max_s) / temperatures_.instance);
    });
  }

 private:
  // One tile of keys, met by the panels of one block.
  struct Step {
    Product& product;
    Matrix keys;
    const Matrix* next;  // the keys after them, if there are any in the range
    int64_t range, tile, first_panel, last_panel;
    T *s, *y;  // (kTile x kPanel) each

    auto fetch_ahead() const {
      return [this] { product.fetch_ahead(); };
    }
  };

  // Gives every thread as many (block of rows) x (range of keys) as every other, and bounds the partial
  // gradients that separate ranges need. There is a range where there are no keys, and no block without rows.
  void share_out() {
    const int64_t operations = rows_ * queue_.rows * dim_;
    const int64_t threads = std::clamp<int64_t>(operations / kTaskOperations, 1, at::get_num_threads());
    const int64_t row_bytes = std::max<int64_t>(1, rows_ * dim_ * static_cast<int64_t>(sizeof(T)));
    block_panels_ = std::clamp<int64_t>(panels_, 1, kBlockPanels);
    blocks_ = at::divup(panels_, block_panels_);
    ranges_ = std::min({threads / std::gcd(threads, blocks_), kPartialBytes / row_bytes, tiles_});
    ranges_ = std::max<int64_t>(1, ranges_);
    if (blocks_ * ranges_ < threads) {
      block_panels_ = std::max<int64_t>(1, panels_ * ranges_ / threads);
      blocks_ = at::divup(panels_, block_panels_);
    }
  }

  template <typename Function>
  void for_each_tile(const Function& function) const {
    at::parallel_for(0, blocks_ * ranges_, 1, [&](int64_t begin, int64_t end) {
      Array<T> s(kTile * kPanel<T>), y(kConsistency ? s.size() : 0);
      Product product(dim_);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / ranges_ * block_panels_, last = std::min(first + block_panels_, panels_);
        const int64_t range = task % ranges_;
        const int64_t end_tile = (range + 1) * tiles_ / ranges_;
        const auto keys_of = [this](int64_t tile) {
          return queue_.slice(tile * kTile, std::min((tile + 1) * kTile, queue_.rows));
        };
        for (int64_t tile = range * tiles_ / ranges_; tile < end_tile; ++tile) {
          const bool is_last = tile + 1 == end_tile;
          const Matrix next = keys_of(is_last ? tile : tile + 1);
          function(Step{product, keys_of(tile), is_last ? nullptr : &next, range, tile, first, last, s.data(),
                        y.data()});
        }
      }
    });
  }

  std::tuple<at::Tensor, at::Tensor> records(const Array<PanelStatistics<T>>& statistics,
                                             const Positives<T>& positive) const {
    auto [partial, part] = empty_records<CO2Partial>({ranges_, query_.count});
    for (int64_t range = 0; range < ranges_; ++range)
      for (int64_t row = 0; row < query_.count; ++row)
        *part++ = statistics[range * panels_ + row / kPanel<T>].row(row % kPanel<T>);
    auto [rows, known] = empty_records<CO2Row>({query_.count});
    for (int64_t row = 0; row < query_.count; ++row)
      known[row] = {
          .norm_query = query_.norm[row], .norm_key = key_.norm[row], .positive = positive.similarity[row]};
    return {partial, rows};
  }

  // What a range of keys adds to the gradient of a panel (D, lanes), of all parts (ranges, panels, D, lanes).
  T* part(Array<T>& parts, int64_t range, int64_t panel) const {
    return &parts[(range * panels_ + panel) * kPanel<T> * dim_];
  }

  // dL/dq^ = sum_j g_j n_j + (dL/ds_+) k^, then dq = (dq^ - q^ (q^.dq^)) / |q|. The sums over keys are those
  // of the ranges, each times `factor(range, row)`.
  template <typename Factor>
  at::Tensor finish_gradient(const Records<CO2Row>& known, const Array<T>& parts,
                             const Factor& factor) const {
    at::Tensor gradient = empty({query_.count, dim_}, c10::CppTypeToScalarType<T>::value);
    T* out = gradient.mutable_data_ptr<T>();
    at::parallel_for(0, query_.count, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> grad(dim_);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t panel = row / kPanel<T>, lane = row % kPanel<T>;
        for (int64_t d = 0; d < dim_; ++d) grad[d] = known[row].grad_positive * key_.unit(row)[d];
        for (int64_t range = 0; range < ranges_; ++range) {
          const double times = factor(range, row);
          const T* sums = &parts[(range * panels_ + panel) * kPanel<T> * dim_ + lane];
          for (int64_t d = 0; d < dim_; ++d) grad[d] += times * sums[d * kPanel<T>];
        }
        if (normalize_) differentiate_norm(grad.data(), query_.unit(row), query_.norm[row], dim_);
        std::copy(grad.begin(), grad.end(), out + row * dim_);
      }
    });
    return gradient;
  }

  // Where s and y of a tile and a panel are, (kTile x kPanel) each.
  static std::pair<T*, T*> pairs(const Step& step, int64_t panel, const Kept& kept) {
    if (!kept.s) return {step.s, step.y};
    const int64_t first_key = step.tile * kTile;
    return {kept.s.at(panel, first_key), kept.y.at(panel, first_key)};
  }

  void similarities(const Step& step, int64_t panel, T* s, T* y) const {
    step.product.similarities(query_.packed(panel), s);
    if constexpr (kConsistency) step.product.similarities(key_.packed(panel), y);
  }

  const Panels<Product> query_, key_;
  const Matrix queue_;
  const bool normalize_;
  const Temperatures temperatures_;
  const int64_t panels_, rows_, dim_;  // rows_ counts the padding of the last panel
  const int64_t tiles_;
  int64_t block_panels_ = 0, blocks_ = 0, ranges_ = 0;
};

// The losses in the dtype T, and the completed rows.
template <typename T>
Losses merge_rows(const at::Tensor& partial, const at::Tensor& rows, const CO2Settings& settings) {
  const Records<CO2Partial> parts(partial);
  const Records<CO2Row> known(rows);
  const int64_t batch = rows.size(0);
  LossWriter<T> losses(batch);
  auto [completed, row] = empty_records<CO2Row>({batch});
  for (int64_t i = 0; i < batch; ++i) {
    const CO2Partial sums = merge(&parts[i], {partial.size(0), batch}, settings);
    row[i] = known[i];
    losses.write(i, finish(sums, settings, row[i]), sums.rank);
  }
  return losses.with(completed);
}

// Calls `function` with the passes for these tensors and settings.
template <typename Function>
auto with_passes(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue,
                 const CO2Settings& settings, const Function& function) {
  // Rows are multiplied in the query's dtype, the queue rounded to it a tile at a time as it is loaded; but
  // float16 may not hold what a queue of another dtype does.
  const bool holds = query.scalar_type() != at::kHalf || queue.scalar_type() == at::kHalf;
  return with_product(query.scalar_type(), holds, [&](auto product) {
    using Product = typename decltype(product)::type;
    if (settings.consistency_weight == 0)
      return function(CO2<Product, true, false>(query, key, queue, settings));
    if (settings.instance_weight == 0)
      return function(CO2<Product, false, true>(query, key, queue, settings));
    return function(CO2<Product, true, true>(query, key, queue, settings));
  });
}

}  // namespace

Losses co2(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue,
           const CO2Settings& settings, bool compute_gradient) {
  return with_passes(query, key, queue, settings, [&](const auto& passes) {
    using Passes = std::decay_t<decltype(passes)>;
    using T = typename Passes::T;
    if constexpr (Passes::kInOnePass)
      if (compute_gradient) {
        Losses losses;
        std::get<4>(losses) = passes.statistics_and_gradient([&](const auto& partial, const auto& rows) {
          losses = merge_rows<T>(partial, rows, settings);
          return std::get<4>(losses);
        });
        return losses;
      }
    using Kept = typename Passes::Kept;
    const Kept kept = compute_gradient ? Kept(passes) : Kept();
    const auto [partial, rows] = passes.statistics(kept);
    const auto [loss, instance, consistency, rank, completed] = merge_rows<T>(partial, rows, settings);
    const at::Tensor gradient = compute_gradient
                                    ? passes.gradient(completed, kept)
                                    : empty({0, query.size(1)}, c10::CppTypeToScalarType<T>::value);
    return Losses(loss, instance, consistency, rank, gradient);
  });
}

std::tuple<at::Tensor, at::Tensor> co2_statistics(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& queue, const CO2Settings& settings) {
  const auto [partial, rows] =
      with_passes(query, key, queue, settings, [](const auto& passes) { return passes.statistics(); });
  return {joined<CO2Partial>(partial, settings), rows};
}

Losses co2_merge(const at::Tensor& partial, const at::Tensor& rows, const CO2Settings& settings) {
  return merge_rows<double>(partial, rows, settings);
}

at::Tensor co2_gradient(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue,
                        const at::Tensor& rows, const CO2Settings& settings) {
  return with_passes(query, key, queue, settings, [&](const auto& passes) { return passes.gradient(rows); });
}

}  // namespace contrastive_ops
