// ConIC on GPUs by CUDA C++: what contrastive_ops/reference.py specifies, without the V B x A similarities.
//
// Plan. The V B views are the rows, and the A rows of the weight their keys; s = x^ W^T is computed three
// times, tile by tile. Hats are taken before the product, in float32, and rounded once to the views' dtype,
// so that a row of any norm fits float16. They are padded with zeros, so that rows lie at multiples of 16
// bytes.
//
// Forward
//   1. prepare      x^, and s_n in float64.
//   2. unit         w^, and 1/|w|; the weight is read this once.
//   3. statistics   a program holds views and walks a range of keys; per view the maximum and sum of
//                   e^{s/tau} over its negatives, and how many of them are above s_n. Each range writes
//                   these three numbers.
//   4. merge        the ranges' numbers, in a fixed order and in float64: losses, rank, what backward needs
//                   to know of a view; and the consistency of an instance's views, straight from its
//                   formula.
//
// Backward
//   1. prepare      x^ again, and how large a view's gradients are.
//   2. unit         w^ again.
//   3. views        a program holds views and walks a range of keys: s, g = dL/ds, and a part of dx^ = g W^.
//   4. finish       adds the parts up in a fixed order, adds the consistency's, differentiates the
//                   normalisation.
//   5. weight       a program holds keys and walks the views: s, g, dw^ = g^T x^, and at the end dw; or a
//                   step of SGD in its place, for which it holds whole rows and has read all that it
//                   overwrites.
//
// A view whose own row is elsewhere (target -1) owns none of these keys. There are no atomics: equal input
// gives equal bits. A view's own key is left out of its negatives, never subtracted from them, where nothing
// of a small loss would be left.
//
// In float16 a probability of 1e-5, times an incoming gradient of 1/B, would vanish. So g is multiplied by
// 2^15, relative to the pull of a view's own key (views) or to the largest such pull of all views (weight).
//
// What stays in registers. A program holds two blocks of rows, so that keys from shared memory are
// multiplied twice. A thread has four rows and a quarter of a tile's keys: s (KEYS numbers), three sums a
// row (statistics) or the gradients (32 x D numbers a warp). Up to D = 256 the statistics have the rows
// there, too.
//
// Bounds. A pair costs 5 products of 2 D operations and 3 exponentials; a block of rows reads the unit weight
// once a pass, 2 D bytes a key in half precision, mostly from the cache. As compiled for D = 128 in half
// precision, with the clocks of a multiprocessor that a pair takes of its schedulers, special-function units,
// shared memory and tensor cores, of which these bind all three kernels:
//
//                  7.0, a V100                  7.5, a T4                    8.0, an A100
//   statistics     0.16  0.062  0.129  0.250    0.12  0.062  0.078  0.250    0.11  0.062  0.050  0.125
//   weight         0.42  0.062  0.430  0.500    0.19  0.062  0.406  0.500    0.14  0.062  0.225  0.250
//   views          0.37  0.062  0.430  0.500    0.15  0.062  0.406  0.500    0.11  0.062  0.225  0.250
//
// It has not been measured on a GPU yet.
#pragma once

#include "../row_math.h"
#include "rows.h"
#include "walk.h"

namespace contrastive_ops {

// Gradients are multiplied relative to the largest. In float16 this leaves them 30 powers of two.
constexpr float kUnitPull = 32768;
constexpr int kConICPartialFields = sizeof(ConICPartial) / sizeof(double);

// What the gradients need of a view, (padded rows,) float32.
struct ConICPull {
  float max_s, size, instance, share;  // size = |grad_loss dl_s/ds_n|, share = coefficient / |dl_s/ds_n|
};

// conic.prepare: x^ of some views, and what other kernels need of each. What is None is left out.
//
// Arguments: views: Matrix (count = V B, D). weight: Matrix (keys, D). target, grad_loss: Vector (B,).
//            positives: ConICPositives (V B, 2) float64, written if FIND.
//            coefficients: ConICCoefficients (V B, 3) float64.
//            unit: Matrix (padded rows, padded dimensions) for x^; what is past the last view is 0.
//            own: (padded rows,) int32, the key that each view owns, -1 for none.
//            threshold: (padded rows,) float32. norm: (V B,) float64. pull: ConICPull (padded rows,).
//            count, batch, keys, dim. FIND. ROWS of a program, a warp for each at a time.
template <typename Arguments>
__device__ void conic_prepare(const Arguments& x) {
  using View = typename decltype(x.views)::Element;
  using Weight = typename decltype(x.weight)::Element;
  const Rows<View> views{x.views, x.count, x.dim};
  const Rows<Weight> weight{x.weight, x.keys, x.dim};
  const bool is_first = threadIdx.x % 32 == 0;
  const int64 first = static_cast<int64>(blockIdx.x) * Arguments::ROWS;
  for (int64 row = first + threadIdx.x / 32; row < first + Arguments::ROWS; row += blockDim.x / 32) {
    const bool inside = row < x.count;
    const int64 instance = row % x.batch, target = inside ? x.target.at(instance) : -1;
    const bool exists = target >= 0 && target < x.keys;
    double norm, s = not_a_number();
    if constexpr (Arguments::FIND) {
      const Products sums = products_of<32>(views, row, weight, exists ? target : x.keys);
      norm = norm_of(sums.xx);
      if (exists) s = sums.xy / norm / norm_of(sums.yy);
    } else {
      norm = norm_of(squares_of<32>(views, row));
    }
    if constexpr (decltype(x.unit)::kExists) store_unit<32>(x.unit, row, views, row, norm);
    if (!is_first) continue;
    if constexpr (kGiven<decltype(x.own)>) x.own[row] = exists ? static_cast<int>(target) : -1;
    if constexpr (kGiven<decltype(x.norm)>) {
      if (inside) x.norm[row] = norm;
    }
    if constexpr (kGiven<decltype(x.pull)>) {
      ConICPull pull{};
      if (inside) {
        const ConICCoefficients known = reinterpret_cast<const ConICCoefficients*>(x.coefficients)[row];
        const double grad = to_double(x.grad_loss.at(instance));
        // dl_s/ds_n is less than 0, and as large as all others together.
        const double size = -known.grad_positive;
        pull = {.max_s = static_cast<float>(known.max_s),
                .size = static_cast<float>(grad * size),
                .instance = static_cast<float>(grad * known.instance),
                .share = size != 0 ? static_cast<float>(known.instance / size) : 0};
      }
      reinterpret_cast<ConICPull*>(x.pull)[row] = pull;
    }
    float threshold = 0;
    if constexpr (Arguments::FIND) {
      threshold = static_cast<float>(s);
      if (inside)
        reinterpret_cast<ConICPositives*>(x.positives)[row] = {.positive = s, .threshold = threshold};
    } else if constexpr (kGiven<decltype(x.positives)>) {
      if (inside)
        threshold = static_cast<float>(reinterpret_cast<const ConICPositives*>(x.positives)[row].threshold);
    }
    if constexpr (kGiven<decltype(x.threshold)>) x.threshold[row] = threshold;
  }
}

// conic.unit: w^ of some keys, rounded once, to the dtype of the views, and 1/|w|.
//
// Arguments: weight: Matrix (keys, D). inverse: (padded keys,) float32.
//            unit_weight: Matrix (padded keys, padded dimensions); what is past the last key is 0.
//            keys, dim. ROWS of a program, a quarter of a warp for each at a time.
template <typename Arguments>
__device__ void conic_unit(const Arguments& x) {
  using Weight = typename decltype(x.weight)::Element;
  const Rows<Weight> weight{x.weight, x.keys, x.dim};
  const int64 first = static_cast<int64>(blockIdx.x) * Arguments::ROWS;
  for (int64 row = first + threadIdx.x / 8; row < first + Arguments::ROWS; row += blockDim.x / 8) {
    const double norm = norm_of(squares_of<8>(weight, row));
    store_unit<8>(x.unit_weight, row, weight, row, norm);
    if (threadIdx.x % 8 == 0) x.inverse[row] = static_cast<float>(1 / norm);
  }
}

// A program's rows lie in two blocks, of which a thread has two rows each.
template <class Tile>
__device__ int row_of_thread(int block, int slot) {
  return block * Tile::kRows + 16 * warp_index() + Tile::Places::row(slot);
}

// Two blocks of unit rows, and whether they are stored as they are multiplied; then their padding is for
// vectors.
template <class Arguments, int kGradients>
using UnitTile =
    WalkTile<typename Arguments::TILE, 2, Arguments::TILE::rows / 2, kGradients, Arguments::STAGES,
             IsSame<typename decltype(Arguments::unit)::Element, typename Arguments::TILE::dtype>::value>;

// A walk of unit rows from `begin` to `end`, past a program's blocks of others. All are padded to whole
// blocks.
template <class Tile, int kBytesAfter = 0, typename T>
__device__ Walk<Tile, T, T, T, kBytesAfter> walk_of(const Matrix<T>& rows, const Matrix<T>& keys, int64 begin,
                                                    int64 end, int64 first_column) {
  const int64 first = static_cast<int64>(blockIdx.x) * 2 * Tile::kRows;
  const Rows<T> held{rows, first + 2 * Tile::kRows, rows.row};
  return Walk<Tile, T, T, T, kBytesAfter>(held, held, first, first + Tile::kRows,
                                          {keys, padded(end, Tile::kKeys), keys.row}, begin, end,
                                          first_column);
}

// conic.statistics: what a range of keys knows of a block of views.
//
// Arguments: unit: Matrix (padded rows, padded dimensions), x^. unit_weight: the same of the keys, w^.
//            own: (padded rows,) int32. threshold: (padded rows,) float32.
//            partial: ConICPartial (ranges, padded rows, 3) float32.
//            keys, padded_rows. scale: log2(e)/tau. keys_a_range. TILE, STAGES.
//            BOUNDED: whether float32 holds the exponentials as they are: no maximum is looked for.
template <typename Arguments>
__device__ void conic_statistics(const Arguments& x) {
  using Tile = UnitTile<Arguments, 0>;
  constexpr bool kBounded = Arguments::BOUNDED;
  constexpr int kEach = Tile::kNumbers / 2;
  const int64 first = static_cast<int64>(blockIdx.x) * Arguments::TILE::rows, part = blockIdx.y;
  const int64 begin = part * x.keys_a_range, end = smaller(begin + x.keys_a_range, x.keys);
  const float scale = static_cast<float>(x.scale);

  struct Sums {
    float top, z, rank, threshold;
    int own;
  } sums[2][2];
#pragma unroll
  for (int block = 0; block < 2; ++block)
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int64 row = first + row_of_thread<Tile>(block, slot);
      sums[block][slot] = {kBounded ? 0 : kLowestLogit, 0, 0, x.threshold[row], x.own[row]};
    }

  auto walk = walk_of<Tile>(x.unit, x.unit_weight, begin, end, 0);
  walk.hold();
  walk.each_tile([&](float (&s)[2][Tile::kNumbers], int64 key) {
    const int64 left = x.keys - key;
#pragma unroll
    for (int block = 0; block < 2; ++block)
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        Sums& row = sums[block][slot];
        const int64 own = row.own - key;
        if (left < Tile::kKeys || (own >= 0 && own < Tile::kKeys)) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            const int column = Tile::Places::column(number_of(0, i));
            if (column >= left || column == own) s[block][number_of(slot, i)] = -kLargestFloat;
          }
        }
        if constexpr (!kBounded) {
          float top = row.top;
#pragma unroll
          for (int i = 0; i < kEach; ++i) top = fmaxf(top, s[block][number_of(slot, i)]);
          row.z *= exp2_fast(move(row.top, top, scale));
          row.top = top;
        }
        float z = 0;  // of the tile: short sums lose less
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const float similarity = s[block][number_of(slot, i)];
          if (similarity > row.threshold) row.rank += 1;
          z += exp2_fast((kBounded ? similarity : similarity - row.top) * scale);
        }
        row.z += z;
      }
  });

#pragma unroll
  for (int block = 0; block < 2; ++block)
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      Sums& row = sums[block][slot];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int mask = Tile::Places::mask(i);
        const float top = fmaxf(row.top, __shfl_xor_sync(0xffffffff, row.top, mask));
        row.z *= exp2_fast(move(row.top, top, scale));
        row.z += __shfl_xor_sync(0xffffffff, row.z, mask);
        row.rank += __shfl_xor_sync(0xffffffff, row.rank, mask);
        row.top = top;
      }
      if (!Tile::Places::is_first()) continue;
      float* record =
          x.partial + (part * x.padded_rows + first + row_of_thread<Tile>(block, slot)) * kConICPartialFields;
      record[0] = row.top, record[1] = row.z, record[2] = row.rank;
    }
}

// The sums over all parts, in all lanes of a warp, each of which has some of them.
__device__ inline ConICPartial sums_of_parts(const float* row, int64 part_stride, int64 parts,
                                             const ConICSettings& settings) {
  const auto read = [&](int64 part) -> ConICPartial {
    const float* record = row + part * part_stride;
    return {.max_s = record[0], .z_instance = record[1], .rank = record[2]};
  };
  if (parts == 1) return read(0);
  ConICPartial total{.max_s = kLowest};
#pragma unroll 4
  for (int64 part = threadIdx.x % 32; part < parts; part += 32)
    total.max_s = larger(read(part).max_s, total.max_s);
  const double max_s = max_of_lanes(total.max_s);
  total.max_s = max_s;
#pragma unroll 4
  for (int64 part = threadIdx.x % 32; part < parts; part += 32) add(total, read(part), settings);
  total = sum_of_records(total);
  total.max_s = max_s;
  return total;
}

// conic.join: one part of several; a warp for each row.
//
// Arguments: partial: ConICPartial (parts, V B, 3) float32, with `part_stride` numbers from part to part.
//            joined: (1, V B, 3) float32. part_stride, rows, parts, scale.
template <typename Arguments>
__device__ void conic_join(const Arguments& x) {
  const int64 row = row_of_warp();
  if (row >= x.rows) return;
  const ConICSettings settings{.temperature = kLog2E / x.scale};
  const ConICPartial sums =
      sums_of_parts(x.partial + row * kConICPartialFields, x.part_stride, x.parts, settings);
  if (threadIdx.x % 32 != 0) return;
  float* record = x.joined + row * kConICPartialFields;
  record[0] = static_cast<float>(sums.max_s), record[1] = static_cast<float>(sums.z_instance);
  record[2] = static_cast<float>(sums.rank);
}

// conic.merge: the losses of some instances, all in float64; a warp for each.
//
// Arguments: partial: ConICPartial (parts, V B, 3) float32, with `part_stride` numbers from part to part.
//            positives: ConICPositives (V B, 2) float64. views: Matrix (V B, D).
//            losses: pointers to loss, consistency_loss (B,), classification_loss, positive_rank (V, B) and
//            coefficients: ConICCoefficients (V, B, 3) float64.
//            part_stride, views_count, batch, dim, parts, scale, tau, log_compensation, consistency_weight.
template <typename Arguments>
__device__ void conic_merge(const Arguments& x) {
  const int64 instance = row_of_warp();
  if (instance >= x.batch) return;
  const bool is_first = threadIdx.x % 32 == 0;
  const ConICSettings settings{.temperature = x.tau,
                               .consistency_weight = x.consistency_weight,
                               .compensation = exp(x.log_compensation)};
  double classification = 0, consistency = 0;
  for (int64 view = 0; view < x.views_count; ++view) {
    const int64 row = view * x.batch + instance;
    const ConICPartial sums =
        sums_of_parts(x.partial + row * kConICPartialFields, x.part_stride, x.parts, settings);
    ConICCoefficients coefficients;
    const double positive = reinterpret_cast<const ConICPositives*>(x.positives)[row].positive;
    const double loss = finish(sums, positive, settings, coefficients);
    classification += loss;
    if (!is_first) continue;
    x.losses.classification_loss[row] = loss;
    x.losses.positive_rank[row] = static_cast<int64>(sums.rank);
    reinterpret_cast<ConICCoefficients*>(x.losses.coefficients)[row] = coefficients;
  }
  const Rows<typename decltype(x.views)::Element> views{x.views, x.views_count * x.batch, x.dim};
  for (int64 i = 1; i < x.views_count; ++i)
    for (int64 j = 0; j < i; ++j) {
      const Products sums = products_of<32>(views, i * x.batch + instance, views, j * x.batch + instance);
      const double disagreement = 1 - sums.xy / norm_of(sums.xx) / norm_of(sums.yy);
      consistency += 2 * disagreement * disagreement;  // (i, j) and (j, i)
    }
  if (!is_first) return;
  x.losses.loss[instance] = classification + x.consistency_weight * consistency;
  x.losses.consistency_loss[instance] = consistency;
}

// lambda (s - m); bounded ones, of which rounding leaves enough, in one instruction.
template <bool kBounded>
__device__ float logit(float s, float top, float scale) {
  return kBounded ? fmaf(s, scale, -top * scale) : (s - top) * scale;
}

// conic.views: what a range of keys adds to dx^ of a block of views, for a chunk of dimensions.
//
// Arguments: unit, unit_weight, own, keys, padded_rows, scale, keys_a_range, BOUNDED, TILE, STAGES: as of
//            the statistics. pull: ConICPull (padded rows,).
//            grad_parts: Matrix (ranges x padded rows, padded dimensions) float32.
template <typename Arguments>
__device__ void conic_views(const Arguments& x) {
  using Tile = UnitTile<Arguments, 2>;
  constexpr int kEach = Tile::kNumbers / 2;
  const int64 first = static_cast<int64>(blockIdx.x) * Arguments::TILE::rows, part = blockIdx.y;
  const int64 first_column = static_cast<int64>(blockIdx.z) * Tile::kWidth;
  const int64 begin = part * x.keys_a_range, end = smaller(begin + x.keys_a_range, x.keys);
  const float scale = static_cast<float>(x.scale);
  const ConICPull* const pulls = reinterpret_cast<const ConICPull*>(x.pull);

  struct View {
    float max_s, share;
    int own;
  } views[2][2];
#pragma unroll
  for (int block = 0; block < 2; ++block)
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int64 row = first + row_of_thread<Tile>(block, slot);
      views[block][slot] = {pulls[row].max_s, pulls[row].share * kUnitPull, x.own[row]};
    }
  auto walk = walk_of<Tile>(x.unit, x.unit_weight, begin, end, first_column);
  walk.hold();
  float grad[2][Tile::kWidth / 2] = {};
  walk.add_gradients(grad, [&](float (&s)[2][Tile::kNumbers], int64 key) {
    const int64 left = x.keys - key;
#pragma unroll
    for (int block = 0; block < 2; ++block)
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const View& view = views[block][slot];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          float& g = s[block][number_of(slot, i)];
          g = exp2_fast(logit<Arguments::BOUNDED>(g, view.max_s, scale)) * view.share;
        }
        const int64 own = view.own - key;
        if (left < Tile::kKeys || (own >= 0 && own < Tile::kKeys)) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            const int column = Tile::Places::column(number_of(0, i));
            float& g = s[block][number_of(slot, i)];
            if (column == own) g = view.share == 0 ? 0 : -kUnitPull;
            // Where all negatives are below 0, no dtype holds g of a padded key.
            if (column >= left) g = 0;
          }
        }
      }
  });

#pragma unroll
  for (int block = 0; block < 2; ++block)
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int64 row = first + row_of_thread<Tile>(block, slot);
      const float size = pulls[row].size * (1 / kUnitPull);
      float* to = &x.grad_parts.at(part * x.padded_rows + row, first_column);
      store_share<Tile>(to, grad[block], slot, size);
    }
}

// conic.finish: dx of some views: the ranges' parts, the consistency's -4 a sum_j (1 - x^i.x^j) x^j, and the
// chain rule; a program takes one after the other.
//
// Arguments: views, gradient: Matrix (count = V B, D). norm: (V B,) float64. grad_loss: Vector (B,).
//            grad_parts: Matrix (ranges x padded rows, padded dimensions) float32.
//            count, batch, dim, padded_rows, ranges, consistency_weight. ROWS of a program.
template <typename Arguments>
__device__ void conic_finish(const Arguments& x) {
  const Rows<typename decltype(x.views)::Element> views{x.views, x.count, x.dim};
  const int64 first = static_cast<int64>(blockIdx.x) * Arguments::ROWS;
  for (int64 row = first; row < smaller(first + Arguments::ROWS, x.count); ++row) {
    RowGradient gradient;
    gradient.sum_parts(x.grad_parts, row, x.padded_rows, x.ranges, x.dim);
    double unit[RowGradient::kEach];
    gradient.load(unit, views, row, x.norm[row]);
    const int64 instance = row % x.batch;
    const double factor = -4 * x.consistency_weight * to_double(x.grad_loss.at(instance));
    for (int64 other = instance; other < x.count; other += x.batch) {
      if (other == row) continue;
      double y[RowGradient::kEach];
      gradient.load(y, views, other, x.norm[other]);
      gradient.add(y, factor * (1 - gradient.dot(unit, y)));
    }
    gradient.through_norm(unit, x.norm[row]);
    gradient.store(x.gradient, row, x.dim);
  }
}

// conic.weight: dw of a block of keys, for a chunk of dimensions; where there is a momentum buffer, a step
// of SGD in its place.
//
// Arguments: unit: Matrix (padded rows, padded dimensions), x^. unit_weight: the same of the keys, w^.
//            own: (padded rows,) int32. pull: ConICPull (padded rows,). inverse: (padded keys,) float32.
//            weight, gradient, momentum_buffer: Matrix (keys, D); one of the last two has no data.
//            keys, dim, padded_rows. scale: log2(e)/tau. lr, momentum, weight_decay, NESTEROV.
//            WHOLE_ROWS: whether a program has all dimensions of its keys. BOUNDED: as of the statistics.
//            TILE, STAGES: holds keys in its rows, and walks the views.
template <typename Arguments>
__device__ void conic_weight(const Arguments& x) {
  using Tile = UnitTile<Arguments, 2>;
  using Weight = typename decltype(x.weight)::Element;
  constexpr int kEach = Tile::kNumbers / 2;
  const int64 first = static_cast<int64>(blockIdx.x) * Arguments::TILE::rows;
  const int64 first_column = static_cast<int64>(blockIdx.y) * Tile::kWidth;
  const float scale = static_cast<float>(x.scale);
  const ConICPull* const pulls = reinterpret_cast<const ConICPull*>(x.pull);

  float unit_scale = 1;
  if constexpr (IsSame<typename Tile::Operand, Half>::value) {
    // The largest gradient becomes kUnitPull, or up to half of it.
    float largest = 0;
    for (int64 row = threadIdx.x; row < x.padded_rows; row += Tile::kThreads)
      largest = fmaxf(largest, fabsf(pulls[row].size));
    largest = max_of_block(largest);
    unit_scale = kUnitPull * exp2f(-ceilf(fmaxf(log2f(largest), -100)));
  }
  constexpr int kStride = Tile::kWidth + 8;  // of a key's gradient; the eight more spread them over the banks
  auto walk = walk_of<Tile, Tile::kRows * kStride * sizeof(float)>(x.unit_weight, x.unit, 0, x.padded_rows,
                                                                   first_column);
  walk.hold();
  float grad[2][Tile::kWidth / 2] = {}, radial[2][2] = {};
  walk.add_gradients(grad, [&](float (&s)[2][Tile::kNumbers], int64 view) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64 row = view + Tile::Places::column(number_of(0, i));
      const float4 pull =
          __ldg(reinterpret_cast<const float4*>(pulls + row));  // max_s, size, instance, share
      const float instance = pull.z * unit_scale;
      const int64 own = __ldg(x.own + row) - first;
#pragma unroll
      for (int block = 0; block < 2; ++block)
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
          float& g = s[block][number_of(slot, i)];
          const float similarity = g;
          g = exp2_fast(logit<Arguments::BOUNDED>(similarity, pull.x, scale)) * instance;
          if (own == row_of_thread<Tile>(block, slot)) g = pull.y * -unit_scale;
          if constexpr (!Arguments::WHOLE_ROWS)
            radial[block][slot] = fmaf(g, similarity, radial[block][slot]);
        }
    }
  });

  // dw = (dw^ - w^ (w^.dw^)) / |w|; a row below the epsilon was only scaled, so it has no projection. A warp
  // takes its keys one after the other, from shared memory, so that lanes read and write neighbouring
  // dimensions.
  const float lr = static_cast<float>(x.lr), momentum = static_cast<float>(x.momentum);
  const float weight_decay = static_cast<float>(x.weight_decay);
  float* const own_rows = walk.template scratch_of_warp<float, 16 * kStride>();
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    __syncwarp();
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      float* const row = own_rows + Tile::Places::row(slot) * kStride;
      store_share<Tile>(row, grad[block], slot, 1);
      float dot = radial[block][slot];
      for (int i = 0; i < 2; ++i) dot += __shfl_xor_sync(0xffffffff, dot, Tile::Places::mask(i));
      if (Tile::Places::is_first()) row[Tile::kWidth] = dot;
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      const int64 key = first + block * Tile::kRows + 16 * warp_index() + i;
      if (key >= x.keys) break;
      const float* const row = own_rows + i * kStride;
      const int count = static_cast<int>(smaller(x.dim - first_column, Tile::kWidth));
      const float inverse = x.inverse[key];
      float dot = row[Tile::kWidth];
      if constexpr (Arguments::WHOLE_ROWS) {
        dot = 0;
        for (int column = lane_index(); column < count; column += 32)
          dot += to_float(x.weight.at(key, column)) * row[column];
        dot = sum_of_lanes<32>(dot) * inverse;
      }
      if (inverse >= static_cast<float>(1 / kNormEpsilon)) dot = 0;
      const float factor = inverse / unit_scale, of_w = -inverse * dot * factor;
      for (int column = lane_index(); column < count; column += 32) {
        auto& stored = x.weight.at(key, first_column + column);
        const float w = to_float(stored);
        float dw = row[column] * factor + w * of_w;
        if constexpr (!decltype(x.momentum_buffer)::kExists) {
          using Gradient = typename decltype(x.gradient)::Element;
          x.gradient.at(key, first_column + column) = from_float<Gradient>(dw);
        } else {
          auto& buffer = x.momentum_buffer.at(key, first_column + column);
          dw += weight_decay * w;
          const float v = momentum * to_float(buffer) + dw;
          buffer = from_float<Weight>(v);
          stored = from_float<Weight>(w - lr * (Arguments::NESTEROV ? dw + momentum * v : v));
        }
      }
    }
  }
}

}  // namespace contrastive_ops
