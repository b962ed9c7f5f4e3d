// CO2 and InfoNCE on CPUs: the operator that contrastive_ops/reference.py specifies.
//
// Plan. Threads share out (block of query rows) x (range of keys). Each walks its range twice, a tile of keys at
// a time, and for each tile over the panels of its block:
//
//   1. statistics   s = N q^T and y = N k^T of the tile, then per row the running maxima, the three partition
//                   sums, both means of d = s - y, and the rank of the positive;
//   2. gradient     s and y again, g of every pair in place of s, then grad += N^T g.
//
// Between them the ranges' statistics are merged, and after them their gradients, in a fixed order: equal input
// on equal threads gives equal bits. Nothing is ever kept per pair but one tile of one panel.
//
// Bound by arithmetic. A pair costs 5 products of 2 D operations and 6 exponentials: at 256 x 65536 x 128 that
// is 21.5 GFLOP, 46 ms on two cores of 234 GFLOP/s each, beside about 6 ms of exponentials and sums; a tile is
// read from memory once a pass (64 MiB in all). docs/performance.md has what was measured.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "product.h"

namespace contrastive_ops {
namespace {

constexpr double kNormEpsilon = 1e-12;
constexpr int64_t kBlockPanels = 8;              // panels that share a loaded tile
constexpr int64_t kPartialBytes = 16 << 20;      // at most this for gradients of separate key ranges
constexpr int64_t kRun = 16;                     // keys whose terms are summed before they join the tile's sums
constexpr int64_t kTaskOperations = 1 << 21;     // multiply-adds that are worth a thread

struct Settings {
  double temperature, consistency_temperature, instance_weight, consistency_weight;
  bool include_positive, normalize, compute_gradient;
};

// The statistics of query rows over a range of keys; one array entry a row. Sums are relative to the maxima:
//   z_instance = sum e^{(s - max_s)/tau}   z_query = sum e^{(s - max_s)/tau_c}   z_key = sum e^{(y - max_y)/tau_c}
//   mean_query = sum d e^{(s - max_s)/tau_c}   mean_key = sum d e^{(y - max_y)/tau_c}
// with d = (s - max_s) - (y - max_y). Subtracting the maxima first keeps d small where it counts, so that the
// difference of the two means does not cancel. Sums over tiles are in double: a float sum of 65536 terms would
// be off by 1e-5.
template <typename T>
struct Statistics {
  T *max_s, *max_y;
  double *z_instance, *z_query, *z_key, *mean_query, *mean_key, *rank;

  static constexpr int64_t kBytes = 2 * sizeof(T) + 6 * sizeof(double);

  Statistics(char* memory, int64_t rows) {
    auto* wide = reinterpret_cast<double*>(memory);
    for (double** field : {&z_instance, &z_query, &z_key, &mean_query, &mean_key, &rank}) {
      *field = wide;
      wide += rows;
    }
    max_s = reinterpret_cast<T*>(wide);
    max_y = max_s + rows;
  }

  Statistics at(int64_t row) const {
    Statistics out = *this;
    out.max_s += row, out.max_y += row, out.z_instance += row, out.z_query += row, out.z_key += row;
    out.mean_query += row, out.mean_key += row, out.rank += row;
    return out;
  }

  void clear(int64_t rows) {
    for (double* field : {z_instance, z_query, z_key, mean_query, mean_key, rank}) std::fill_n(field, rows, 0.);
    std::fill_n(max_s, rows, std::numeric_limits<T>::lowest());
    std::fill_n(max_y, rows, std::numeric_limits<T>::lowest());
  }
};

// What the second pass needs of a row, so that with a = s - max_s, b = y - max_y, d = a - b
//   Q = e^{a/tau_c} query    P = e^{b/tau_c} key    g = e^{a/tau} instance + Q - P + Q (d - mean)/tau_c
// is d loss / d s. Where Q and P nearly agree, an error in their factors would be all that is left, and it is the
// same for every key: the factors are kept in two parts, high and low.
template <typename T>
struct Coefficients {
  T *max_s, *max_y, *instance, *mean, *query, *query_low, *minus_key, *minus_key_low;

  static constexpr int64_t kFields = 8;

  Coefficients(T* memory, int64_t rows) {
    for (T** field : {&max_s, &max_y, &instance, &mean, &query, &query_low, &minus_key, &minus_key_low}) {
      *field = memory;
      memory += rows;
    }
  }
};

// Adds a tile's similarities s and y (keys x panel) to the statistics of the panel's rows.
template <bool kInstance, bool kConsistency, typename T>
void add_statistics(
    const T* s, const T* y, int64_t keys, const T* rank_threshold, const Settings& settings, const Statistics<T>& total) {
  constexpr int64_t kW = kWidth<T>;
  const Vec<T> scale(static_cast<T>(M_LOG2E / settings.temperature));
  const Vec<T> scale_c(static_cast<T>(M_LOG2E / settings.consistency_temperature));
  for (int64_t row = 0; row < kPanel<T>; row += kW) {
    const auto old_s = Vec<T>::loadu(total.max_s + row), old_y = Vec<T>::loadu(total.max_y + row);
    Vec<T> max_s = old_s, max_y = old_y;
    for (int64_t j = 0; j < keys; ++j) {
      max_s = at::vec::maximum(max_s, Vec<T>::loadu(s + j * kPanel<T> + row));
      if constexpr (kConsistency) max_y = at::vec::maximum(max_y, Vec<T>::loadu(y + j * kPanel<T> + row));
    }

    const auto threshold = Vec<T>::loadu(rank_threshold + row);
    const Vec<T> zero(T(0));
    Vec<T> z_instance = zero, z_query = zero, z_key = zero, mean_query = zero, mean_key = zero, rank = zero;
    for (int64_t run = 0; run < keys; run += kRun) {
      Vec<T> run_instance = zero, run_query = zero, run_key = zero, run_mean_query = zero, run_mean_key = zero;
      for (int64_t j = run; j < std::min(run + kRun, keys); ++j) {
        const auto s_j = Vec<T>::loadu(s + j * kPanel<T> + row);
        const auto a = s_j - max_s;
        rank = rank + s_j.gt(threshold);
        if constexpr (kInstance) run_instance = run_instance + exp2_nonpositive(a * scale);
        if constexpr (kConsistency) {
          const auto b = Vec<T>::loadu(y + j * kPanel<T> + row) - max_y;
          const auto d = a - b;
          const auto e_query = exp2_nonpositive(a * scale_c), e_key = exp2_nonpositive(b * scale_c);
          run_query = run_query + e_query;
          run_key = run_key + e_key;
          run_mean_query = at::vec::fmadd(e_query, d, run_mean_query);
          run_mean_key = at::vec::fmadd(e_key, d, run_mean_key);
        }
      }
      z_instance = z_instance + run_instance, z_query = z_query + run_query, z_key = z_key + run_key;
      mean_query = mean_query + run_mean_query, mean_key = mean_key + run_mean_key;
    }

    // The old sums move to the new maxima: factors e^{(old - new)/tau}, and d by shift = how much it changed.
    const auto moved_s = old_s - max_s, moved_y = old_y - max_y;
    T tile[9][kW];
    z_instance.store(tile[0]), z_query.store(tile[1]), z_key.store(tile[2]);
    mean_query.store(tile[3]), mean_key.store(tile[4]), rank.store(tile[5]);
    exp2_nonpositive(moved_s * scale_c).store(tile[6]), exp2_nonpositive(moved_y * scale_c).store(tile[7]);
    (moved_s - moved_y).store(tile[8]);
    T factor[kW];
    exp2_nonpositive(moved_s * scale).store(factor);
    max_s.store(total.max_s + row), max_y.store(total.max_y + row);
    const Statistics<T> at = total.at(row);
    for (int64_t i = 0; i < kW; ++i) {
      at.rank[i] += tile[5][i];
      if constexpr (kInstance) at.z_instance[i] = at.z_instance[i] * factor[i] + tile[0][i];
      if constexpr (kConsistency) {
        const double shift = tile[8][i];
        at.mean_query[i] = (at.mean_query[i] + shift * at.z_query[i]) * tile[6][i] + tile[3][i];
        at.mean_key[i] = (at.mean_key[i] + shift * at.z_key[i]) * tile[7][i] + tile[4][i];
        at.z_query[i] = at.z_query[i] * tile[6][i] + tile[1][i];
        at.z_key[i] = at.z_key[i] * tile[7][i] + tile[2][i];
      }
    }
  }
}

// Replaces s by d loss / d s.
template <bool kInstance, bool kConsistency, typename T>
void replace_by_gradient(
    T* s, const T* y, int64_t keys, const Settings& settings, const Coefficients<T>& of, int64_t first_row) {
  constexpr int64_t kW = kWidth<T>;
  const Vec<T> scale(static_cast<T>(M_LOG2E / settings.temperature));
  const Vec<T> scale_c(static_cast<T>(M_LOG2E / settings.consistency_temperature));
  const Vec<T> inverse_tau_c(static_cast<T>(1 / settings.consistency_temperature));
  for (int64_t row = 0; row < kPanel<T>; row += kW) {
    const auto load = [&](const T* field) { return Vec<T>::loadu(field + first_row + row); };
    const auto max_s = load(of.max_s), max_y = load(of.max_y), instance = load(of.instance);
    const auto mean = load(of.mean), query = load(of.query), query_low = load(of.query_low);
    const auto minus_key = load(of.minus_key), minus_key_low = load(of.minus_key_low);
    for (int64_t j = 0; j < keys; ++j) {
      T* at = s + j * kPanel<T> + row;
      const auto a = Vec<T>::loadu(at) - max_s;
      Vec<T> g(T(0));
      if constexpr (kConsistency) {
        const auto b = Vec<T>::loadu(y + j * kPanel<T> + row) - max_y;
        const auto e_query = exp2_nonpositive(a * scale_c), e_key = exp2_nonpositive(b * scale_c);
        const auto q = e_query * query;
        g = q + e_key * minus_key;  // not fused: equal terms must cancel
        g = at::vec::fmadd(e_query, query_low, g);
        g = at::vec::fmadd(e_key, minus_key_low, g);
        g = at::vec::fmadd(q, (a - b - mean) * inverse_tau_c, g);
      }
      if constexpr (kInstance) g = at::vec::fmadd(exp2_nonpositive(a * scale), instance, g);
      g.store(at);
    }
  }
}

// The whole call, for one product engine and one choice of terms.
template <typename Product, bool kInstance, bool kConsistency>
class CO2 {
  using T = typename Product::Sum;
  using Operand = typename Product::Operand;

 public:
  CO2(const Rows& query, const Rows& key, const Rows& queue, const Settings& settings, const at::TensorOptions& options)
      : query_(query),
        key_(key),
        queue_(queue),
        settings_(settings),
        options_(options.dtype(c10::CppTypeToScalarType<T>::value)),
        panels_(at::divup(query.count, kPanel<T>)),
        rows_(panels_ * kPanel<T>),
        dim_(query.dim),
        tiles_(at::divup(queue.count, kTile)) {
    plan();
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> operator()() {
    prepare_rows();
    statistics_ = at::empty({ranges_, rows_ * Statistics<T>::kBytes}, options_.dtype(at::kByte));
    for (int64_t range = 0; range < ranges_; ++range) statistics(range).clear(rows_);
    for_each_tile([this](const Step& step) { collect_statistics(step); });
    finish_losses();
    gradient_ = at::empty({settings_.compute_gradient ? query_.count : 0, dim_}, options_);
    if (settings_.compute_gradient) {
      partial_ = at::zeros({ranges_, rows_ * dim_}, options_);
      for_each_tile([this](const Step& step) { collect_gradient(step); });
      finish_gradient();
    }
    return {loss_, instance_loss_, consistency_loss_, rank_, gradient_};
  }

 private:
  // Shares the work out: every thread gets as many (block of rows) x (range of keys) as every other, and the
  // partial gradients that separate ranges need stay bounded.
  void plan() {
    const int64_t operations = rows_ * queue_.count * dim_;
    const int64_t threads = std::clamp<int64_t>(operations / kTaskOperations, 1, at::get_num_threads());
    block_panels_ = std::min(panels_, kBlockPanels);
    blocks_ = at::divup(panels_, block_panels_);
    const int64_t most = std::max<int64_t>(1, kPartialBytes / (rows_ * dim_ * static_cast<int64_t>(sizeof(T))));
    ranges_ = std::min({threads / std::gcd(threads, blocks_), most, tiles_});
    if (blocks_ * ranges_ < threads) {
      block_panels_ = std::max<int64_t>(1, panels_ * ranges_ / threads);
      blocks_ = at::divup(panels_, block_panels_);
    }
  }

  // One tile of keys, met by the panels of one block.
  struct Step {
    Product& product;
    Rows keys;
    int64_t range, first_panel, last_panel;
    T *s, *y;  // (kTile x kPanel) each
  };

  template <typename Function>
  void for_each_tile(const Function& function) {
    at::parallel_for(0, blocks_ * ranges_, 1, [&](int64_t begin, int64_t end) {
      const int64_t pair_elements = kTile * kPanel<T>;
      std::vector<char> memory(64 + 2 * pair_elements * sizeof(T) + Product::tile_elements(dim_) * sizeof(Operand));
      void* start = memory.data();
      size_t space = memory.size();
      auto* s = static_cast<T*>(std::align(64, 1, start, space));
      Product product(dim_, reinterpret_cast<Operand*>(s + 2 * pair_elements));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / ranges_ * block_panels_, last = std::min(first + block_panels_, panels_);
        const int64_t range = task % ranges_;
        for (int64_t tile = range * tiles_ / ranges_; tile < (range + 1) * tiles_ / ranges_; ++tile) {
          const Rows keys = queue_.slice(tile * kTile, std::min((tile + 1) * kTile, queue_.count));
          function(Step{product, keys, range, first, last, s, s + pair_elements});
        }
      }
    });
  }

  // Normalised rows as numbers (padded with zero rows) and as the product's operands; s_+.
  void prepare_rows() {
    unit_query_ = at::zeros({rows_, dim_}, options_);
    unit_key_ = at::zeros({rows_, dim_}, options_);
    norm_ = at::ones({rows_}, options_.dtype(at::kDouble));
    positive_ = at::zeros({rows_}, options_.dtype(at::kDouble));
    rank_threshold_ = at::empty({rows_}, options_);
    const int64_t operand = Product::padded_dim(dim_) * kPanel<T>;
    const auto operand_options = options_.dtype(c10::CppTypeToScalarType<Operand>::value);
    packed_query_ = at::empty({panels_, operand}, operand_options);
    packed_key_ = at::empty({kConsistency ? panels_ : 0, operand}, operand_options);

    at::parallel_for(0, panels_, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> similarity(kTile * kPanel<T>);
      std::vector<Operand> buffer(Product::tile_elements(dim_));
      Product product(dim_, buffer.data());
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kPanel<T>, last = std::min(first + kPanel<T>, query_.count);
        T* q = unit_query_.template mutable_data_ptr<T>() + first * dim_;
        T* k = unit_key_.template mutable_data_ptr<T>() + first * dim_;
        copy(query_.slice(first, last), q, dim_, 1);
        copy(key_.slice(first, last), k, dim_, 1);
        if (settings_.normalize)
          for (int64_t row = first; row < last; ++row) {
            norm_.template mutable_data_ptr<double>()[row] = normalize(q + (row - first) * dim_);
            normalize(k + (row - first) * dim_);
          }
        // The loss takes s_+ in double, since its error is divided by tau and not averaged over keys.
        for (int64_t row = first; row < last; ++row)
          positive_.template mutable_data_ptr<double>()[row] =
              dot(q + (row - first) * dim_, k + (row - first) * dim_);
        Operand* packed = packed_query_.template mutable_data_ptr<Operand>() + panel * operand;
        Product::pack(q, dim_, packed);
        if constexpr (kConsistency)
          Product::pack(k, dim_, packed_key_.template mutable_data_ptr<Operand>() + panel * operand);
        // The rank takes it from the product that gives every s_j, so that a negative equal to the key ties.
        static_assert(kPanel<T> <= kTile);
        product.load({k, c10::CppTypeToScalarType<T>::value, kPanel<T>, dim_, dim_, 1}, false);
        product.similarities(packed, similarity.data());
        for (int64_t row = 0; row < kPanel<T>; ++row)
          rank_threshold_.template mutable_data_ptr<T>()[first + row] = similarity[row * kPanel<T> + row];
      }
    });
  }

  double dot(const T* x, const T* y) const {
    double sum = 0;
    for (int64_t d = 0; d < dim_; ++d) sum += static_cast<double>(x[d]) * y[d];
    return sum;
  }

  // x <- x / max(|x|, epsilon); returns the norm. In double, so float input cannot overflow; double input is
  // scaled for the same reason.
  double normalize(T* x) const {
    double scale = 1;
    if constexpr (std::is_same_v<T, double>) {
      double largest = 0;
      for (int64_t d = 0; d < dim_; ++d) largest = std::max(largest, std::abs(x[d]));
      if (largest > 0) scale = largest;
    }
    double sum = 0;
    for (int64_t d = 0; d < dim_; ++d) sum += (x[d] / scale) * (x[d] / scale);
    const double norm = scale * std::sqrt(sum), divisor = std::max(norm, kNormEpsilon);
    for (int64_t d = 0; d < dim_; ++d) x[d] = static_cast<T>(x[d] / divisor);
    return norm;
  }

  Statistics<T> statistics(int64_t range) const {
    return {static_cast<char*>(statistics_.mutable_data_ptr()) + range * rows_ * Statistics<T>::kBytes, rows_};
  }

  void collect_statistics(const Step& step) const {
    const Statistics<T> total = statistics(step.range);
    step.product.load(step.keys, false);
    for (int64_t panel = step.first_panel; panel < step.last_panel; ++panel) {
      const int64_t row = panel * kPanel<T>;
      similarities(step, panel);
      add_statistics<kInstance, kConsistency>(
          step.s, step.y, step.keys.count, rank_threshold_.template const_data_ptr<T>() + row, settings_, total.at(row));
    }
  }

  void collect_gradient(const Step& step) const {
    const Coefficients<T> coefficients(coefficients_.template mutable_data_ptr<T>(), rows_);
    T* partial = partial_.template mutable_data_ptr<T>() + step.range * rows_ * dim_;
    step.product.load(step.keys, true);
    for (int64_t panel = step.first_panel; panel < step.last_panel; ++panel) {
      const int64_t row = panel * kPanel<T>;
      similarities(step, panel);
      replace_by_gradient<kInstance, kConsistency>(
          step.s, step.y, step.keys.count, settings_, coefficients, row);
      step.product.accumulate(step.s, partial + row * dim_);
    }
  }

  void similarities(const Step& step, int64_t panel) const {
    const int64_t operand = Product::padded_dim(dim_) * kPanel<T>;
    step.product.similarities(packed_query_.template const_data_ptr<Operand>() + panel * operand, step.s);
    if constexpr (kConsistency)
      step.product.similarities(packed_key_.template const_data_ptr<Operand>() + panel * operand, step.y);
  }

  // Merges the ranges' statistics, adds the positive, and gives the losses and the second pass's coefficients.
  void finish_losses() {
    loss_ = at::empty({query_.count}, options_);
    instance_loss_ = at::zeros({query_.count}, options_);
    consistency_loss_ = at::zeros({query_.count}, options_);
    rank_ = at::empty({query_.count}, options_.dtype(at::kLong));
    coefficients_ = at::zeros({Coefficients<T>::kFields, rows_}, options_);
    grad_positive_ = at::zeros({rows_}, options_.dtype(at::kDouble));
    const double tau = settings_.temperature, tau_c = settings_.consistency_temperature;

    for (int64_t row = 0; row < query_.count; ++row) {
      Coefficients<T> out(coefficients_.template mutable_data_ptr<T>() + row, rows_);
      double max_s = std::numeric_limits<T>::lowest(), max_y = max_s, rank = 0;
      for (int64_t range = 0; range < ranges_; ++range) {
        const auto part = statistics(range).at(row);
        max_s = std::max<double>(*part.max_s, max_s);  // in this order a NaN stays
        max_y = std::max<double>(*part.max_y, max_y);
        rank += *part.rank;
      }
      double z_instance = 0, z_query = 0, z_key = 0, mean_query = 0, mean_key = 0;
      for (int64_t range = 0; range < ranges_; ++range) {
        const auto part = statistics(range).at(row);
        const double moved_s = *part.max_s - max_s, moved_y = *part.max_y - max_y, shift = moved_s - moved_y;
        const double factor_query = std::exp(moved_s / tau_c), factor_key = std::exp(moved_y / tau_c);
        z_instance += *part.z_instance * std::exp(moved_s / tau);
        mean_query += (*part.mean_query + shift * *part.z_query) * factor_query;
        mean_key += (*part.mean_key + shift * *part.z_key) * factor_key;
        z_query += *part.z_query * factor_query;
        z_key += *part.z_key * factor_key;
      }

      const double positive = positive_.template const_data_ptr<double>()[row];
      double instance = 0, consistency = 0, grad_positive = 0;
      *out.max_s = static_cast<T>(max_s), *out.max_y = static_cast<T>(max_y);
      if constexpr (kInstance) {
        // Relative to the largest logit, the positive's included; log1p keeps a small loss's digits.
        const double gap = (positive - max_s) / tau;
        const double top = std::exp(std::min(gap, 0.)), negatives = z_instance * std::exp(std::min(-gap, 0.));
        instance = gap > 0 ? std::log1p(negatives) : std::log(negatives + top) - gap;
        const double scale = settings_.instance_weight / tau / (negatives + top);
        *out.instance = static_cast<T>(scale * std::exp(std::min(-gap, 0.)));
        grad_positive -= scale * negatives;  // (p_+ - 1)/tau
      }
      if constexpr (kConsistency) {
        // With `include_positive`, s_+ stands in both lists, where it may also be the largest entry.
        const double top_query = settings_.include_positive ? std::max(max_s, positive) : max_s;
        const double top_key = settings_.include_positive ? std::max(max_y, positive) : max_y;
        const double factor_query = std::exp((max_s - top_query) / tau_c), factor_key = std::exp((max_y - top_key) / tau_c);
        const double d_positive = max_y - max_s;  // (s_+ - max_s) - (s_+ - max_y)
        const double e_query = settings_.include_positive ? std::exp((positive - top_query) / tau_c) : 0;
        const double e_key = settings_.include_positive ? std::exp((positive - top_key) / tau_c) : 0;
        const double sum_query = z_query * factor_query + e_query, sum_key = z_key * factor_key + e_key;
        const double mean = (mean_query * factor_query + d_positive * e_query) / sum_query;
        consistency = (mean - (mean_key * factor_key + d_positive * e_key) / sum_key) / (2 * tau_c);
        const double scale = settings_.consistency_weight / (2 * tau_c);
        const double query_factor = scale * factor_query / sum_query, key_factor = -scale * factor_key / sum_key;
        *out.mean = static_cast<T>(mean);
        *out.query = static_cast<T>(query_factor);
        *out.query_low = static_cast<T>(query_factor - *out.query);
        *out.minus_key = static_cast<T>(key_factor);
        *out.minus_key_low = static_cast<T>(key_factor - *out.minus_key);
        grad_positive += scale * (e_query / sum_query * ((d_positive - mean) / tau_c + 1) - e_key / sum_key);
      }
      grad_positive_.template mutable_data_ptr<double>()[row] = grad_positive;
      instance_loss_.template mutable_data_ptr<T>()[row] = static_cast<T>(instance);
      consistency_loss_.template mutable_data_ptr<T>()[row] = static_cast<T>(consistency);
      loss_.template mutable_data_ptr<T>()[row] =
          static_cast<T>(settings_.instance_weight * instance + settings_.consistency_weight * consistency);
      rank_.mutable_data_ptr<int64_t>()[row] = static_cast<int64_t>(rank);
    }
  }

  // dL/dq^ = sum_j g_j n_j + (dL/ds_+) k^, then dq = (dq^ - q^ (q^.dq^)) / |q|.
  void finish_gradient() {
    const auto* partial = partial_.template const_data_ptr<T>();
    const auto* unit_query = unit_query_.template const_data_ptr<T>();
    const auto* unit_key = unit_key_.template const_data_ptr<T>();
    const auto* norms = norm_.template const_data_ptr<double>();
    const auto* grad_positive = grad_positive_.template const_data_ptr<double>();
    at::parallel_for(0, query_.count, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> grad(dim_);
      for (int64_t row = begin; row < end; ++row) {
        const T *q = unit_query + row * dim_, *k = unit_key + row * dim_;
        double radial = 0;
        for (int64_t d = 0; d < dim_; ++d) {
          grad[d] = grad_positive[row] * k[d];
          for (int64_t range = 0; range < ranges_; ++range)
            grad[d] += partial[((range * panels_ + row / kPanel<T>)*dim_ + d) * kPanel<T> + row % kPanel<T>];
          radial += grad[d] * q[d];
        }
        const double norm = norms[row], scale = settings_.normalize ? 1 / std::max(norm, kNormEpsilon) : 1;
        if (!settings_.normalize || norm < kNormEpsilon) radial = 0;
        for (int64_t d = 0; d < dim_; ++d)
          gradient_.template mutable_data_ptr<T>()[row * dim_ + d] = static_cast<T>((grad[d] - q[d] * radial) * scale);
      }
    });
  }

  const Rows query_, key_, queue_;
  const Settings settings_;
  const at::TensorOptions options_;
  const int64_t panels_, rows_, dim_, tiles_;  // rows_ counts the padding of the last panel
  int64_t block_panels_ = 0, blocks_ = 0, ranges_ = 0;
  at::Tensor unit_query_, unit_key_, norm_, positive_, rank_threshold_, packed_query_, packed_key_, statistics_, coefficients_;
  at::Tensor grad_positive_, partial_, loss_, instance_loss_, consistency_loss_, rank_, gradient_;
};

Rows rows_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

template <typename Product>
auto run(const at::Tensor& query, const at::Tensor& key, const at::Tensor& queue, const Settings& settings) {
  const Rows q = rows_of(query), k = rows_of(key), n = rows_of(queue);
  if (settings.consistency_weight == 0) return CO2<Product, true, false>(q, k, n, settings, query.options())();
  if (settings.instance_weight == 0) return CO2<Product, false, true>(q, k, n, settings, query.options())();
  return CO2<Product, true, true>(q, k, n, settings, query.options())();
}

auto co2(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& queue,
    double temperature,
    double consistency_temperature,
    double instance_weight,
    double consistency_weight,
    bool include_positive,
    bool normalize,
    bool compute_gradient) {
  for (const auto& tensor : {query, key, queue})
    TORCH_CHECK_VALUE(
        tensor.dim() == 2 && tensor.device().is_cpu() && tensor.size(1) == query.size(1) && tensor.numel() > 0,
        "co2: query, key (B, D) and queue (K, D) must be non-empty CPU tensors, got ", query.sizes(), ", ", key.sizes(),
        " and ", queue.sizes());
  TORCH_CHECK_VALUE(key.size(0) == query.size(0), "co2: key must have the shape of query");
  const Settings settings{
      temperature,      consistency_temperature, instance_weight, consistency_weight,
      include_positive, normalize,               compute_gradient};
  const auto both = [&](at::ScalarType dtype) { return query.scalar_type() == dtype && queue.scalar_type() == dtype; };
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
