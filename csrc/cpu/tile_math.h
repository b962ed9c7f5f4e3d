// The mathematics of the losses where a tile of keys meets a panel of query rows: what a first pass adds up,
// and the gradients that a second one puts in place of the similarities. Sums are online, relative to maxima
// that grow as tiles go by. What follows from a row's sums is in csrc/row_math.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../row_math.h"
#include "vector.h"

namespace contrastive_ops {

// CO2 and NT-Xent have both; ConIC has no consistency term over keys.
struct Temperatures {
  double instance = 1, consistency = 1;
};

// Statistics of a panel's rows over the keys seen so far. With a = s - max_s, b = y - max_y and d = a - b:
//
//   z_instance = sum e^{a/tau}      z_query = sum e^{a/tau_c}      z_key = sum e^{b/tau_c}
//                                   d_query = sum d e^{a/tau_c}    d_key = sum d e^{b/tau_c}
//
// Taking the maxima off first keeps d small where it counts, so that the difference of its two means does not
// cancel. Sums over tiles are in double: a float sum of 65536 terms, one by one, would be off by 1e-5.
template <typename T>
struct PanelStatistics {
  T max_s[kPanel<T>], max_y[kPanel<T>];
  double z_instance[kPanel<T>] = {}, z_query[kPanel<T>] = {}, z_key[kPanel<T>] = {};
  double d_query[kPanel<T>] = {}, d_key[kPanel<T>] = {};
  int64_t rank[kPanel<T>] = {};  // keys with s > s_+

  PanelStatistics() {
    std::fill_n(max_s, kPanel<T>, std::numeric_limits<T>::lowest());
    std::fill_n(max_y, kPanel<T>, std::numeric_limits<T>::lowest());
  }

  CO2Partial row(int64_t lane) const {
    return {.max_s = max_s[lane],
            .max_y = max_y[lane],
            .z_instance = z_instance[lane],
            .z_query = z_query[lane],
            .z_key = z_key[lane],
            .d_query = d_query[lane],
            .d_key = d_key[lane],
            .rank = static_cast<double>(rank[lane])};
  }
};

// The coefficients of the second pass in vectors: those of a panel's rows in its lanes, or of one row in all.
template <typename T>
struct VectorCoefficients {
  Vec<T> max_s, max_y, instance, mean, query, query_low, minus_key, minus_key_low;
};

// The coefficients of a panel's rows. Where Q and P nearly agree, an error of their factors would be all that
// is left of them, and the same for every key: the factors are kept in two parts, high and low.
template <typename T>
struct PanelCoefficients {
  T max_s[kPanel<T>] = {}, max_y[kPanel<T>] = {}, instance[kPanel<T>] = {}, mean[kPanel<T>] = {};
  T query[kPanel<T>] = {}, query_low[kPanel<T>] = {}, minus_key[kPanel<T>] = {},
    minus_key_low[kPanel<T>] = {};

  void set(int64_t lane, const Coefficients& row) {
    max_s[lane] = static_cast<T>(row.max_s), max_y[lane] = static_cast<T>(row.max_y);
    instance[lane] = static_cast<T>(row.instance), mean[lane] = static_cast<T>(row.mean);
    query[lane] = static_cast<T>(row.query), minus_key[lane] = static_cast<T>(-row.key);
    query_low[lane] = static_cast<T>(row.query - query[lane]);
    minus_key_low[lane] = static_cast<T>(-row.key - minus_key[lane]);
  }

  VectorCoefficients<T> lanes(int64_t first) const {
    return vectors([first](const T* field) { return Vec<T>::loadu(field + first); });
  }

  VectorCoefficients<T> row(int64_t lane) const {
    return vectors([lane](const T* field) { return Vec<T>(field[lane]); });
  }

 private:
  template <typename Load>
  VectorCoefficients<T> vectors(const Load& load) const {
    return {load(max_s), load(max_y),     load(instance),  load(mean),
            load(query), load(query_low), load(minus_key), load(minus_key_low)};
  }
};

template <typename T>
struct Scales {
  Exponent<T> instance, consistency;
  Vec<T> inverse_tau_c;

  explicit Scales(const Temperatures& temperatures)
      : instance(temperatures.instance),
        consistency(temperatures.consistency),
        inverse_tau_c(static_cast<T>(1 / temperatures.consistency)) {}
};

// What add_tile does with a tile's e^{a/tau} but adding them up: nothing.
struct Dropped {
  static constexpr bool kKept = false;
};

// Or it puts them, times a scale, where s was, and says what its predecessors have to be multiplied with to
// be relative to the same maxima.
template <typename T>
struct Exponentials {
  static constexpr bool kKept = true;
  T* in_place_of_s;
  T scale;
  T of_older[kPanel<T>] = {};
};

inline constexpr int64_t kRun = 16;  // keys whose terms are summed before they join the tile's sums

// Adds a tile's similarities s and y (keys x panel). `threshold` holds each row's s_+, for the rank.
// Arithmetic leaves memory idle: `meanwhile` is called for every run of keys. (Within its callers it would be
// short of registers, by a tenth of ConIC's time.)
template <bool kInstance, bool kConsistency, typename T, typename Meanwhile, typename Kept = Dropped>
[[gnu::noinline]] void add_tile(const T* s, const T* y, int64_t keys, const T* threshold,
                                const Temperatures& temperatures, PanelStatistics<T>& total,
                                const Meanwhile& meanwhile, Kept&& kept = {}) {
  constexpr bool kKept = std::decay_t<Kept>::kKept;
  const Scales<T> scales(temperatures);
  const Vec<T> zero(T(0));
  for (int64_t lane = 0; lane < kPanel<T>; lane += kWidth<T>) {
    const auto load_s = [&](int64_t j) { return Vec<T>::loadu(s + j * kPanel<T> + lane); };
    const auto load_y = [&](int64_t j) { return Vec<T>::loadu(y + j * kPanel<T> + lane); };

    const auto old_s = Vec<T>::loadu(total.max_s + lane), old_y = Vec<T>::loadu(total.max_y + lane);
    Vec<T> max_s = old_s, max_y = old_y;
    // Unlike maximum(), this may lose a NaN, and so is one instruction. The sums keep it.
    for (int64_t j = 0; j < keys; ++j) {
      max_s = at::vec::clamp_min(load_s(j), max_s);
      if constexpr (kConsistency) max_y = at::vec::clamp_min(load_y(j), max_y);
    }
    max_s.store(total.max_s + lane), max_y.store(total.max_y + lane);

    const auto positive = Vec<T>::loadu(threshold + lane);
    Vec<T> z_instance = zero, z_query = zero, z_key = zero, d_query = zero, d_key = zero, rank = zero;
    for (int64_t run = 0; run < keys; run += kRun) {
      meanwhile();
      Vec<T> run_instance = zero, run_query = zero, run_key = zero, run_d_query = zero, run_d_key = zero;
      for (int64_t j = run; j < std::min(run + kRun, keys); ++j) {
        const auto s_j = load_s(j), a = s_j - max_s;
        rank = rank + s_j.gt(positive);
        if constexpr (kInstance) {
          const auto e_instance = exp_nonpositive(a, scales.instance);
          run_instance = run_instance + e_instance;
          if constexpr (kKept) (e_instance * kept.scale).store(kept.in_place_of_s + j * kPanel<T> + lane);
        }
        if constexpr (kConsistency) {
          const auto b = load_y(j) - max_y, d = a - b;
          const auto e_query = exp_nonpositive(a, scales.consistency),
                     e_key = exp_nonpositive(b, scales.consistency);
          run_query = run_query + e_query;
          run_key = run_key + e_key;
          run_d_query = at::vec::fmadd(e_query, d, run_d_query);
          run_d_key = at::vec::fmadd(e_key, d, run_d_key);
        }
      }
      z_instance = z_instance + run_instance;
      z_query = z_query + run_query, z_key = z_key + run_key;
      d_query = d_query + run_d_query, d_key = d_key + run_d_key;
    }

    // Older sums move to the new maxima: e^{(old - new)/tau} scales them, and every d shifts by the same
    // amount.
    const auto moved_s = old_s - max_s, moved_y = old_y - max_y;
    const auto merge = [lane](auto* sum, Vec<T> scale, Vec<T> tile) {
      T scales[kWidth<T>], tiles[kWidth<T>];
      scale.store(scales), tile.store(tiles);
      for (int64_t i = 0; i < kWidth<T>; ++i) sum[lane + i] = sum[lane + i] * scales[i] + tiles[i];
    };
    const auto shift = [lane](double* d_sum, const double* z, Vec<T> by) {
      T shifts[kWidth<T>];
      by.store(shifts);
      for (int64_t i = 0; i < kWidth<T>; ++i) d_sum[lane + i] += shifts[i] * z[lane + i];
    };
    merge(total.rank, Vec<T>(T(1)), rank);
    if constexpr (kInstance) {
      const auto of_older = exp_nonpositive(moved_s, scales.instance);
      merge(total.z_instance, of_older, z_instance);
      if constexpr (kKept) of_older.store(kept.of_older + lane);
    }
    if constexpr (kConsistency) {
      shift(total.d_query, total.z_query, moved_s - moved_y);
      shift(total.d_key, total.z_key, moved_s - moved_y);
      const auto scale_query = exp_nonpositive(moved_s, scales.consistency),
                 scale_key = exp_nonpositive(moved_y, scales.consistency);
      merge(total.z_query, scale_query, z_query), merge(total.d_query, scale_query, d_query);
      merge(total.z_key, scale_key, z_key), merge(total.d_key, scale_key, d_key);
    }
  }
}

// g = d loss / d s of a vector of pairs; e_query = e^{a/tau_c} and e_key = e^{b/tau_c}.
template <bool kInstance, bool kConsistency, typename T>
inline Vec<T> gradient(Vec<T> a, Vec<T> d, Vec<T> e_query, Vec<T> e_key, const VectorCoefficients<T>& row,
                       const Scales<T>& scales) {
  Vec<T> g(T(0));
  if constexpr (kConsistency) {
    const auto q = e_query * row.query;
    g = q + e_key * row.minus_key;  // not fused: equal terms must cancel
    g = at::vec::fmadd(e_query, row.query_low, g);
    g = at::vec::fmadd(e_key, row.minus_key_low, g);
    g = at::vec::fmadd(q, (d - row.mean) * scales.inverse_tau_c, g);
  }
  if constexpr (kInstance) g = at::vec::fmadd(exp_nonpositive(a, scales.instance), row.instance, g);
  return g;
}

// g of a tile (keys x panel), which may be written in place of its s. `meanwhile` as above.
template <bool kInstance, bool kConsistency, typename T, typename Meanwhile>
[[gnu::noinline]] void gradient_of_tile(const T* s, const T* y, int64_t keys,
                                        const Temperatures& temperatures,
                                        const PanelCoefficients<T>& coefficients, T* g,
                                        const Meanwhile& meanwhile) {
  const Scales<T> scales(temperatures);
  for (int64_t run = 0; run < keys; run += kRun) {  // of all lanes: s and y come in the order of memory
    for (int64_t lane = 0; lane < kPanel<T>; lane += kWidth<T>) {
      meanwhile();
      const auto rows = coefficients.lanes(lane);
      for (int64_t j = run; j < std::min(run + kRun, keys); ++j) {
        const int64_t at = j * kPanel<T> + lane;
        const auto a = Vec<T>::loadu(s + at) - rows.max_s;
        Vec<T> b(T(0)), e_query(T(0)), e_key(T(0));
        if constexpr (kConsistency) {
          b = Vec<T>::loadu(y + at) - rows.max_y;
          e_query = exp_nonpositive(a, scales.consistency), e_key = exp_nonpositive(b, scales.consistency);
        }
        gradient<kInstance, kConsistency>(a, a - b, e_query, e_key, rows, scales).store(g + at);
      }
    }
  }
}

}  // namespace contrastive_ops
