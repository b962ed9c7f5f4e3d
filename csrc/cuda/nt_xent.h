// NT-Xent, and CO2 on it, on GPUs by CUDA C++: what contrastive_ops/reference.py specifies, without the
// similarities of all rows with all.
//
// Plan. Rows are kept in the order of instances, so that a key and its partner are neighbours. A program
// holds a block of instances, as many rows of each view, and walks a range of keys, which are the rows of
// both views: s = z Z^T of the first views and y = z Z^T of the second ones. A row and its partner have the
// same negatives, and s - y is what CO2 needs of either. Nothing of size M x M, where M = 2 B, leaves a
// program.
//
// Forward
//   1. prepare      z, padded with zeros, and s_ip(i), in float64.
//   2. statistics   s and y of each tile; per row the maximum, sum e^{s/tau}, and the rank of the positive;
//                   with the consistency term also sum e^{s/tau_c} and sum d e^{s/tau_c}. Each range writes
//                   these.
//   3. merge        the ranges' numbers, in a fixed order and in float64: losses, rank, what backward needs.
//
// Backward
//   1. prepare      z again, and the coefficients of each row's gradient.
//   2. gradient     s and y again. Those of an instance's two views with a key and its partner give H = G +
//                   G^T of all four pairs, G = dL/ds being what the rows' losses pull and G^T what the keys'
//                   do. Adds up H Z. Each range writes its part.
//   3. finish       adds the parts up in a fixed order, adds the positive's, differentiates the
//   normalisation.
//
// Rows and keys are the same, unless some instances are given as keys (`target`), which then are prepared as
// well. There are no atomics: equal input gives equal bits.
//
//   G_ij = c_i e^{s_ij/tau} + e^{s_ij/tau_c} (k_i + b_i (s_ij - s_p(i)j)) - p_i e^{s_p(i)j/tau_c}
//
// Where rows are normalised and no temperature is below 0.0226, these exponentials need no maximum, which
// then is in the coefficients. So G and G^T share them: two a pair in place of four. Other rows, and float32
// multiplied exactly, have them relative to each row's maximum, as the statistics may.
//
// In float16 a probability of 1e-5, times an incoming gradient of 1/M, would vanish. So all of H is
// multiplied by a power of two, in the exponents, where it takes no instruction more.
//
// What stays in registers. A thread has two instances and a quarter of a tile's keys, both views of each: s
// and y (KEYS/2 numbers each), and five sums a row (statistics) or the gradients (32 x D numbers a warp). Up
// to D = 256 the statistics have z of the instances there, too.
//
// Bounds. A pair of row and key costs 3 products of 2 D operations (1 in the statistics, 2 in the gradient)
// and 4 exponentials, or 2 without the consistency term. As compiled for D = 128 in half precision, with the
// clocks of a multiprocessor that a pair takes of its schedulers, special-function units, shared memory and
// tensor cores:
//
//                  7.0, a V100                  7.5, a T4                    8.0, an A100
//   statistics     0.24  0.125  0.258  0.250    0.21  0.125  0.156  0.250    0.15  0.125  0.097  0.125
//   gradient       0.48  0.125  0.430  0.500    0.25  0.125  0.406  0.500    0.21  0.125  0.222  0.250
//   plain          0.40  0.062  0.430  0.500    0.19  0.062  0.531  0.500    0.13  0.062  0.222  0.250
//
// It has not been measured on a GPU yet.
#pragma once

#include "../row_math.h"
#include "rows.h"
#include "walk.h"

namespace contrastive_ops {

constexpr int kNTXentPartialFields = sizeof(NTXentPartial) / sizeof(double);

// What the gradient needs of both views of an instance, (padded instances,) float32. Those from `top` on
// only where exponentials are relative to maxima; the last is unused.
struct BothViews {
  float of[2];
};
struct NTXentPull {
  BothViews instance;
  BothViews query;               // what multiplies Q, less its slope times E_Q[d]
  BothViews slope;               // of Q in d
  BothViews key;                 // what multiplies P
  BothViews top;                 // m
  BothViews query_low, key_low;  // what float32 loses of `query` and `key`
  BothViews unused;
};

// In float16 H is multiplied by a power of two. The largest of the rows' sizes, which is what all pairs of a
// row pull together, then lies in (2^5, 2^6], and |H| is at most twice that times 1 + 4/tau_c: with the
// lowest tau_c that needs no maximum, 0.0226, it is 128 x 178 = 22784, and float16 holds 65504. The largest
// factor is 2^60, for sizes of 2^-54 and less: times e^{s/tau}, which is up to 2^64, float32 still holds it.
constexpr float kLog2UnitSize = 6, kLeastLog2Size = -54;

// nt_xent.prepare: z of both views of some instances, padded with zeros, and what is known of them. What is
// None is left out.
//
// Arguments: views: Views (2, B, D). grad_loss: Vector (2 B,).
//            coefficients: NTXentCoefficients (2 B, 5) float64.
//            rows: unit: Matrix (padded rows, padded dimensions), row 2 b + v is view v of instance b;
//                  pull: NTXentPull (padded instances,); sizes: (padded rows,) float32.
//            norm: (2 B,) float64. positive: (2 B,) float64, s_ip(i).
//            batch, dim. scale, scale_c: log2(e)/tau and log2(e)/tau_c. tau_c.
//            consistency_size: what a row's consistency pulls at either of its terms, all keys together.
//            NORMALIZE, RELATIVE. BLOCK instances of a program, a warp for each at a time.
template <typename Arguments>
__device__ void nt_xent_prepare(const Arguments& x) {
  using T = typename decltype(x.views)::Element;
  const Rows<T> view1{x.views[0], x.batch, x.dim}, view2{x.views[1], x.batch, x.dim};
  const int64 first = static_cast<int64>(blockIdx.x) * Arguments::BLOCK;
  for (int64 instance = first + threadIdx.x / 32; instance < first + Arguments::BLOCK;
       instance += blockDim.x / 32) {
    const bool inside = instance < x.batch;
    const Products sums = products_of<32>(view1, instance, view2, instance);
    const double norm1 = Arguments::NORMALIZE ? norm_of(sums.xx) : 1;
    const double norm2 = Arguments::NORMALIZE ? norm_of(sums.yy) : 1;
    store_unit<32>(x.rows.unit, 2 * instance, view1, instance, norm1);
    store_unit<32>(x.rows.unit, 2 * instance + 1, view2, instance, norm2);
    if (threadIdx.x % 32 != 0) continue;
    if constexpr (kGiven<decltype(x.positive)>) {
      if (inside) x.positive[instance] = x.positive[x.batch + instance] = sums.xy / norm2 / norm1;
    }
    if constexpr (kGiven<decltype(x.norm)>) {
      if (inside) x.norm[instance] = norm1, x.norm[x.batch + instance] = norm2;
    }
    if constexpr (kGiven<decltype(x.rows.pull)>) {
      NTXentPull pull{};
      for (int view = 0; view < 2; ++view) {
        float size = 0;
        if (inside) {
          const auto* records = reinterpret_cast<const NTXentCoefficients*>(x.coefficients);
          const NTXentCoefficients known = records[instance + view * x.batch];
          const NTXentCoefficients other = records[instance + (1 - view) * x.batch];
          const double grad = to_double(x.grad_loss.at(instance + view * x.batch));
          Coefficients row = coefficients(known, other, grad);
          // No pair's exponential, times its coefficient, is larger than those of all pairs together.
          size = static_cast<float>(fabs(grad) * (fabs(known.grad_positive) + 2 * x.consistency_size));
          if constexpr (!Arguments::RELATIVE) {
            row.instance *= exp2(-row.max_s * x.scale);
            row.query *= exp2(-row.max_s * x.scale_c), row.key *= exp2(-row.max_y * x.scale_c);
            row.mean += row.max_s - row.max_y;
          }
          // Logits of millions leave Q one key, whose d - mean is 0, not the rounding of two such numbers.
          const double slope = fabs(row.mean) < 1e6 * x.tau_c ? row.query / x.tau_c : 0;
          const Split query = split(row.query - slope * row.mean), key = split(row.key);
          pull.instance.of[view] = static_cast<float>(row.instance);
          pull.slope.of[view] = static_cast<float>(slope);
          pull.query.of[view] = query.high, pull.query_low.of[view] = query.low;
          pull.key.of[view] = key.high, pull.key_low.of[view] = key.low;
          pull.top.of[view] = static_cast<float>(row.max_s);
        }
        x.rows.sizes[2 * instance + view] = size;
      }
      reinterpret_cast<NTXentPull*>(x.rows.pull)[instance] = pull;
    }
  }
}

// The key instance that an instance owns, -1 for none. Without a target rows and keys are the same instances.
template <typename Target>
__device__ int64 own_key(const Target& target, int64 instance, int64 batch) {
  if constexpr (Target::kExists)
    return instance < batch ? target.at(instance) : -1;
  else
    return instance;
}

// The two blocks of a program are views of the same instances. They are walked past the rows of both views.
template <class Arguments, class Unit, int kGradients>
using ViewsTile = WalkTile<typename Arguments::TILE, 2, Arguments::TILE::rows, kGradients, Arguments::STAGES,
                           IsSame<Unit, typename Arguments::TILE::dtype>::value>;

template <class Tile, typename T>
__device__ Walk<Tile, T, T, T> walk_of_views(const Matrix<T>& unit, const Matrix<T>& key_unit, int64 begin,
                                             int64 end, int64 first_column) {
  const int64 first = static_cast<int64>(blockIdx.x) * Tile::kRows;
  const Rows<T> view1{{unit.data, 2 * unit.row, 1}, first + Tile::kRows, unit.row};
  const Rows<T> view2{{unit.data + unit.row, 2 * unit.row, 1}, first + Tile::kRows, unit.row};
  return Walk<Tile, T, T, T>(view1, view2, first, first, {key_unit, padded(end, Tile::kKeys), unit.row},
                             begin, end, first_column);
}

template <class Tile>
__device__ int64 instance_of_thread(int slot) {
  return static_cast<int64>(blockIdx.x) * Tile::kRows + 16 * warp_index() + Tile::Places::row(slot);
}

// What a lane knows of an instance's two rows: the sums over its keys, relative to its own maxima.
struct PairSums {
  float top[2], instance[2], z[2], d[2], rank[2];  // d of 2^a d and 2^b d, with d = a - b

  __device__ void move_to(const float (&tops)[2], float scale, float ratio) {
    const float moved[2] = {move(top[0], tops[0], scale), move(top[1], tops[1], scale)};
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      const float factor = exp2_fast(moved[view]);
      instance[view] *= exp2_fast(moved[view] * ratio);
      d[view] = (d[view] + (moved[0] - moved[1]) * z[view]) * factor;
      z[view] *= factor;
      top[view] = tops[view];
    }
  }
  __device__ void merge_lane(int mask, float scale, float ratio) {
    float tops[2];
#pragma unroll
    for (int view = 0; view < 2; ++view)
      tops[view] = fmaxf(top[view], __shfl_xor_sync(0xffffffff, top[view], mask));
    move_to(tops, scale, ratio);
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      instance[view] += __shfl_xor_sync(0xffffffff, instance[view], mask);
      z[view] += __shfl_xor_sync(0xffffffff, z[view], mask);
      d[view] += __shfl_xor_sync(0xffffffff, d[view], mask);
      rank[view] += __shfl_xor_sync(0xffffffff, rank[view], mask);
    }
  }
};

// nt_xent.statistics: s of a block's first views and y of its second ones; what a range of keys knows of
// both.
//
// Arguments: unit: Matrix (padded rows, padded dimensions), z. key_unit: the same of the keys.
//            target: Vector (B,) int64 or None; see `own_key`. positive: (2 B,) float64.
//            partial: NTXentPartial (ranges, 2 B, 5) float32, with d in units of 1/scale.
//            batch, keys: numbers of instances. padded_rows, keys_a_range. TILE, STAGES, CONSISTENCY.
//            scale, ratio: log2(e)/tau_c and tau_c/tau; without the consistency term log2(e)/tau and 1.
//            BOUNDED: whether float32 holds the exponentials as they are: no maximum is looked for.
template <typename Arguments>
__device__ void nt_xent_statistics(const Arguments& x) {
  using Tile = ViewsTile<Arguments, typename decltype(x.unit)::Element, 0>;
  constexpr bool kBounded = Arguments::BOUNDED, kConsistency = Arguments::CONSISTENCY;
  constexpr int kEach = Tile::kNumbers / 2;
  const int64 part = blockIdx.y, keys = 2 * x.keys;
  const int64 begin = part * x.keys_a_range, end = smaller(begin + x.keys_a_range, keys);
  const float scale = static_cast<float>(x.scale), ratio = static_cast<float>(x.ratio);

  PairSums sums[2] = {};
  float threshold[2];
  int64 own[2];
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int64 instance = instance_of_thread<Tile>(slot);
    own[slot] = own_key(x.target, instance, x.batch);
    threshold[slot] = static_cast<float>(x.positive[smaller(instance, x.batch - 1)]);
    sums[slot].top[0] = sums[slot].top[1] = kBounded ? 0 : kLowestLogit;
  }
  auto walk = walk_of_views<Tile>(x.unit, x.key_unit, begin, end, 0);
  walk.hold();
  walk.each_tile([&](float (&s)[2][Tile::kNumbers], int64 key) {
    const int64 left = keys - key;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      PairSums& row = sums[slot];
      const int64 first_own = 2 * own[slot] - key;
      const bool has_excluded = left < Tile::kKeys || (first_own >= 0 && first_own < Tile::kKeys);
      const auto is_excluded = [&](int i) {
        const int column = Tile::Places::column(number_of(0, i));
        return column >= left || (column & ~1) == first_own;
      };
      if (has_excluded) {
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          if (is_excluded(i)) s[0][number_of(slot, i)] = s[1][number_of(slot, i)] = -kLargestFloat;
      }
      if constexpr (!kBounded) {
        float tops[2] = {row.top[0], row.top[1]};
#pragma unroll
        for (int view = 0; view < 2; ++view)
#pragma unroll
          for (int i = 0; i < kEach; ++i) tops[view] = fmaxf(tops[view], s[view][number_of(slot, i)]);
        row.move_to(tops, scale, ratio);
      }
#pragma unroll
      for (int view = 0; view < 2; ++view)
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          float& a = s[view][number_of(slot, i)];
          if (a > threshold[slot]) row.rank[view] += 1;
          a = (kBounded ? a : a - row.top[view]) * scale;
        }
      if (has_excluded) {
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          if (is_excluded(i)) s[0][number_of(slot, i)] = s[1][number_of(slot, i)] = kLowestLogit;
      }
      float instance[2] = {}, z[2] = {}, d[2] = {};  // of the tile: short sums lose less
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float a = s[0][number_of(slot, i)], b = s[1][number_of(slot, i)];
        instance[0] += exp2_fast(kConsistency ? a * ratio : a);
        instance[1] += exp2_fast(kConsistency ? b * ratio : b);
        if constexpr (kConsistency) {
          const float e0 = exp2_fast(a), e1 = exp2_fast(b);
          z[0] += e0, z[1] += e1;
          d[0] = fmaf(e0, a - b, d[0]), d[1] = fmaf(e1, a - b, d[1]);
        }
      }
#pragma unroll
      for (int view = 0; view < 2; ++view)
        row.instance[view] += instance[view], row.z[view] += z[view], row.d[view] += d[view];
    }
  });

#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    PairSums& row = sums[slot];
    for (int i = 0; i < 2; ++i) row.merge_lane(Tile::Places::mask(i), scale, ratio);
    const int64 instance = instance_of_thread<Tile>(slot);
    if (!Tile::Places::is_first() || instance >= x.batch) continue;
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      float* record = x.partial + ((2 * part + view) * x.batch + instance) * kNTXentPartialFields;
      record[0] = row.top[view], record[1] = row.rank[view], record[2] = row.instance[view];
      record[3] = row.z[view],
      record[4] = view == 0 ? row.d[0] : -row.d[1];  // of its own logits, less its partner's
    }
  }
}

// nt_xent.merge: a view of some instances, all in float64; a warp for each row.
//
// Arguments: partial: NTXentPartial (parts, 2 B, 5) float32. positive: (2 B,) float64.
//            losses: `Losses` of pointers, (2 B,) each; coefficients: NTXentCoefficients (2 B, 5) float64.
//            batch, parts. scale, ratio: as of the statistics. tau, tau_c, consistency_weight.
template <typename Arguments>
__device__ void nt_xent_merge(const Arguments& x) {
  const int64 instance = row_of_warp();
  if (instance >= x.batch) return;
  const int64 row = blockIdx.y * x.batch + instance,
              partner = (1 - static_cast<int64>(blockIdx.y)) * x.batch + instance;
  const NTXentSettings settings{
      .temperature = x.tau, .consistency_temperature = x.tau_c, .consistency_weight = x.consistency_weight};
  const auto read = [&](int64 part, int64 of) {
    const float* record = x.partial + (part * 2 * x.batch + of) * kNTXentPartialFields;
    return NTXentPartial{.max_s = record[0],
                         .rank = record[1],
                         .z_instance = record[2],
                         .z_query = record[3],
                         .d_query = record[4] / x.scale};
  };
  NTXentPartial own{.max_s = kLowest}, other{.max_s = kLowest};
  if (x.parts == 1) {
    own = read(0, row), other = read(0, partner);
  } else {
#pragma unroll 4
    for (int64 part = threadIdx.x % 32; part < x.parts; part += 32) {
      own.max_s = larger(read(part, row).max_s, own.max_s);
      other.max_s = larger(read(part, partner).max_s, other.max_s);
    }
    const double max_s = max_of_lanes(own.max_s), max_y = max_of_lanes(other.max_s);
    own.max_s = max_s, other.max_s = max_y;
#pragma unroll 4
    for (int64 part = threadIdx.x % 32; part < x.parts; part += 32) {
      const NTXentPartial of_row = read(part, row), of_partner = read(part, partner);
      add(own, max_y, of_row, of_partner.max_s, settings);
      add(other, max_s, of_partner, of_row.max_s, settings);
    }
    own = sum_of_records(own), other = sum_of_records(other);
    own.max_s = max_s, other.max_s = max_y;
  }
  if (threadIdx.x % 32 != 0) return;
  NTXentCoefficients coefficients;
  const RowLosses losses = finish(own, other, x.positive[row], settings, coefficients);
  x.losses.loss[row] = losses.loss;
  x.losses.instance_loss[row] = losses.instance;
  x.losses.consistency_loss[row] = losses.consistency;
  x.losses.positive_rank[row] = static_cast<int64>(own.rank);
  reinterpret_cast<NTXentCoefficients*>(x.losses.coefficients)[row] = coefficients;
}

// How exponentials and their coefficients make a pull.
struct PullScales {
  float instance, consistency, shift;  // log2(e)/tau, log2(e)/tau_c, log2 of what all is multiplied by
};

template <bool kConsistency, bool kRelative, bool kLow>
struct Pulled {
  // g + dL/ds of a row's similarity s, where y is that of its partner. `pull` is that of the row's instance,
  // and `view` tells which of its views the row is.
  __device__ static float add(float g, float s, float y, const NTXentPull& pull, int view,
                              PullScales scales) {
    if constexpr (kRelative) s -= pull.top.of[view], y -= pull.top.of[1 - view];
    g = fmaf(pull.instance.of[view], exp2_fast(fmaf(s, scales.instance, scales.shift)), g);
    if constexpr (kConsistency) {
      const float e_query = exp2_fast(fmaf(s, scales.consistency, scales.shift));
      const float e_key = exp2_fast(fmaf(y, scales.consistency, scales.shift));
      g = fmaf(-e_key, pull.key.of[view], g);
      g = fmaf(e_query, fmaf(pull.slope.of[view], s - y, pull.query.of[view]),
               g);  // Q (1 + (d - E_Q[d])/tau_c)
      // Where Q and P nearly cancel, what their weights lost would be left.
      if constexpr (kLow) g += e_query * pull.query_low.of[view] - e_key * pull.key_low.of[view];
    }
    return g;
  }
};

template <bool kRelative>
__device__ NTXentPull load_pull(const float* pulls, int64 instance) {
  NTXentPull pull{};
  const float4* from =
      reinterpret_cast<const float4*>(pulls) + instance * (sizeof(NTXentPull) / sizeof(float4));
  float4* to = reinterpret_cast<float4*>(&pull);
#pragma unroll
  for (int i = 0; i < (kRelative ? 4 : 2); ++i) to[i] = __ldg(from + i);
  return pull;
}

__device__ inline float largest_size(const float* sizes, int64 count) {
  float largest = 0;
  for (int64 row = threadIdx.x; row < count; row += blockDim.x) largest = fmaxf(largest, fabsf(sizes[row]));
  return max_of_block(largest);
}

// nt_xent.gradient, and nt_xent.plain without the consistency term: what a range of keys adds to dz of both
// views of a block of instances, for a chunk of dimensions.
//
// Arguments: rows, key_rows: as of `nt_xent.prepare`. target: Vector (B,) int64 or None; see `own_key`.
//            grad_parts: Matrix (ranges x padded rows, padded dimensions) float32.
//            batch, keys: numbers of instances. padded_rows, padded_keys. scale, scale_c: log2(e)/tau,
//            log2(e)/tau_c. keys_a_range. CONSISTENCY, RELATIVE, TILE, STAGES.
template <typename Arguments>
__device__ void nt_xent_gradient(const Arguments& x) {
  using Tile = ViewsTile<Arguments, typename decltype(x.rows.unit)::Element, 2>;
  constexpr bool kIsHalf = IsSame<typename Tile::Operand, Half>::value;
  constexpr bool kLow = Tile::kPrecision == Precision::tf32x3;
  using Pull = Pulled<Arguments::CONSISTENCY, Arguments::RELATIVE, kLow>;
  const int64 part = blockIdx.y, keys = 2 * x.keys;
  const int64 first_column = static_cast<int64>(blockIdx.z) * Tile::kWidth;
  const int64 begin = part * x.keys_a_range, end = smaller(begin + x.keys_a_range, keys);

  PullScales scales{static_cast<float>(x.scale), static_cast<float>(x.scale_c), 0};
  if constexpr (kIsHalf) {
    float largest = largest_size(x.rows.sizes, x.padded_rows);
    if constexpr (decltype(x.target)::kExists)
      largest = fmaxf(largest, largest_size(x.key_rows.sizes, x.padded_keys));
    scales.shift = kLog2UnitSize - ceilf(fmaxf(log2f(largest), kLeastLog2Size));
  }
  NTXentPull pulls[2];
  int64 own[2];
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int64 instance = instance_of_thread<Tile>(slot);
    pulls[slot] = load_pull<Arguments::RELATIVE>(x.rows.pull, instance);
    own[slot] = own_key(x.target, instance, x.batch);
  }
  auto walk = walk_of_views<Tile>(x.rows.unit, x.key_rows.unit, begin, end, first_column);
  walk.hold();
  float grad[2][Tile::kWidth / 2] = {};
  walk.add_gradients(grad, [&](float (&s)[2][Tile::kNumbers], int64 key) {
    const int64 left = keys - key;
    // A key and its partner are neighbours, which one thread has, as it does a row and its partner.
#pragma unroll
    for (int i = 0; i < Tile::kNumbers / 2; i += 2) {
      const int column = Tile::Places::column(number_of(0, i));
      const NTXentPull of_key = load_pull<Arguments::RELATIVE>(x.key_rows.pull, (key + column) / 2);
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const int n = number_of(slot, i);
        const NTXentPull& of_row = pulls[slot];
        const float s1 = s[0][n], s2 = s[0][n + 1], y1 = s[1][n], y2 = s[1][n + 1];
        // What the rows' losses pull, and what the keys' do.
        float g11 = Pull::add(Pull::add(0.f, s1, y1, of_row, 0, scales), s1, s2, of_key, 0, scales);
        float g12 = Pull::add(Pull::add(0.f, s2, y2, of_row, 0, scales), s2, s1, of_key, 1, scales);
        float g21 = Pull::add(Pull::add(0.f, y1, s1, of_row, 1, scales), y1, y2, of_key, 0, scales);
        float g22 = Pull::add(Pull::add(0.f, y2, s2, of_row, 1, scales), y2, y1, of_key, 1, scales);
        if (column == 2 * own[slot] - key || column >= left) g11 = g12 = g21 = g22 = 0;
        s[0][n] = g11, s[0][n + 1] = g12, s[1][n] = g21, s[1][n + 1] = g22;
      }
    }
    if constexpr (kIsHalf && Arguments::RELATIVE) {
#pragma unroll
      for (int view = 0; view < 2; ++view)
#pragma unroll
        for (float& g : s[view]) g = g == g ? fminf(fmaxf(g, -kLargestHalf), kLargestHalf) : g;
    }
  });

  const float factor = exp2f(-scales.shift);
#pragma unroll
  for (int view = 0; view < 2; ++view)
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      float* to =
          &x.grad_parts.at(part * x.padded_rows + 2 * instance_of_thread<Tile>(slot) + view, first_column);
      store_share<Tile>(to, grad[view], slot, factor);
    }
}

template <typename Arguments>
__device__ void nt_xent_plain(const Arguments& x) {
  nt_xent_gradient(x);
}

// nt_xent.finish: the gradient of some rows of a view: the ranges' parts, the positive's pull, and the chain
// rule; a program takes one after the other.
//
// Arguments: views: Views (2, B, D). gradient: (2, B, D). norm: (2 B,) float64.
//            grad_parts: Matrix (ranges x padded rows, padded dimensions) float32.
//            coefficients: NTXentCoefficients (2 B, 5) float64.
//            grad_loss: Vector (2 B,). target: Vector (B,) int64 or None; see `own_key`.
//            batch, dim, padded_rows, ranges. NORMALIZE. ROWS of a program.
template <typename Arguments>
__device__ void nt_xent_finish(const Arguments& x) {
  using T = typename decltype(x.views)::Element;
  const int64 view = blockIdx.y, first = static_cast<int64>(blockIdx.x) * Arguments::ROWS;
  const Rows<T> x_rows{x.views[view], x.batch, x.dim}, y_rows{x.views[1 - view], x.batch, x.dim};
  const auto* records = reinterpret_cast<const NTXentCoefficients*>(x.coefficients);
  for (int64 instance = first; instance < smaller(first + Arguments::ROWS, x.batch); ++instance) {
    const int64 own = view * x.batch + instance, partner = (1 - view) * x.batch + instance;
    RowGradient gradient;
    gradient.sum_parts(x.grad_parts, 2 * instance + view, x.padded_rows, x.ranges, x.dim);
    // s_ip(i) is in the loss of both, and counts with the keys that have the row's own instance.
    double pull = to_double(x.grad_loss.at(own)) * records[own].grad_positive +
                  to_double(x.grad_loss.at(partner)) * records[partner].grad_positive;
    if constexpr (decltype(x.target)::kExists)
      if (x.target.at(instance) < 0) pull = 0;
    double numbers[RowGradient::kEach];
    gradient.load(numbers, y_rows, instance, x.norm[partner]);
    gradient.add(numbers, pull);
    if constexpr (Arguments::NORMALIZE) {
      gradient.load(numbers, x_rows, instance, x.norm[own]);
      gradient.through_norm(numbers, x.norm[own]);
    }
    gradient.store(Matrix<T>{x.gradient + view * x.batch * x.dim, x.dim, 1}, instance, x.dim);
  }
}

}  // namespace contrastive_ops
