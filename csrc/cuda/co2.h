// CO2 and InfoNCE on GPUs by CUDA C++: what contrastive_ops/reference.py specifies, in four launches.
//
// Plan. The grid is (block of query rows) x (range of keys), so that a batch of 32 fills the chip as one of
// 4096 does. A program walks its range a tile of keys at a time (walk.h); nothing of size B x K leaves it.
//
//   0. round        the queue in the query's half precision, where it has another dtype.
//      prepare      norms and s_+ of each row, in float64, on chips that are slow in it; else 1. does it.
//   1. statistics   s = q N^T and y = k N^T of each tile; per row both maxima, three partition sums, both
//                   sums of d, and the rank of the positive. Each range writes these eight numbers a row.
//   2. merge        the ranges' numbers, in a fixed order and in float64: losses, rank, and what a row's
//                   gradient needs.
//   3. gradient     computes s and y again, makes them g = dL/ds, and adds up g N. Each range writes its
//                   part.
//   4. finish       adds the parts up in a fixed order, adds the positive's, and differentiates the
//                   normalisation.
//
// Without a gradient the first two are all. There are no atomics: equal input gives equal bits.
//
// Rows are multiplied as stored, but a queue of another dtype is rounded to the query's; norms divide
// similarities, not rows. A pair of row and key has
//
//     a_j = lambda (s_j - max s)     b_j = lambda (y_j - max y)     d_j = a_j - b_j
//
// with lambda = log2(e)/tau_c,
// so that e^{s/tau_c} ~ 2^a, e^{y/tau_c} ~ 2^b and e^{s/tau} ~ 2^{a tau_c/tau}. InfoNCE alone has tau in
// place of tau_c. A partial has d in these units and max_s as it was multiplied, before the division by the
// norm, so that nothing of it is lost in float32; a row's record has all in those of csrc/records.h.
//
// What stays in registers. A thread has two rows and a quarter of a tile's keys: s and y (KEYS/2 numbers
// each), eight sums a row (statistics) or grad (16 x D numbers a warp), and q and k as they are multiplied,
// up to D = 256 (statistics) or 128 (gradient) in half precision. Longer rows are multiplied in chunks.
//
// Bounds. A pair costs 5 products of 2 D operations (2 in the statistics, 3 in the gradient) and 6
// exponentials; a block of rows reads the queue once a pass, 2 D bytes a key in half precision, mostly from
// the cache. As compiled for D = 128 in half precision (python -m bench.resources --backend cuda), with the
// clocks of a multiprocessor that a pair takes of its schedulers, special-function units, shared memory and
// tensor cores, and with the time at 256 x 65536 if the busiest of these never waited:
//
//                                                           V100     T4       A100
//   statistics   7.0    0.43   0.188   0.516   0.500        71 us                       shared memory
//                7.5    0.23   0.188   0.312   0.500                 132 us             products
//                8.0    0.20   0.188   0.193   0.250                          27 us     products
//   gradient     7.0    0.61   0.188   0.812   0.750        111 us                      shared memory
//                7.5    0.28   0.188   0.562   0.750                 198 us             products
//                8.0    0.22   0.188   0.318   0.375                          41 us     products
//
// On Hopper groups of four warps multiply (warpgroups.h). An H100 took 42 us for the statistics and 36 for
// the gradient, with two temperatures that need three exponentials a pair; Triton's kernels took 30 and 33.
// Their exponentials alone are 13.6 us each, their products 9 and 14: two groups on a multiprocessor, one of
// which multiplies while the other computes exponentials, do not keep both units busy. Other GPUs have not
// been measured.
#pragma once

#include "../row_math.h"
#include "rows.h"
#include "walk.h"

namespace contrastive_ops {

constexpr int kPartialFields = sizeof(CO2Partial) / sizeof(double);
// Sums of 2^a without those that float32 has no room for; were all of 2^24 below 2^-126, they would not
// count.
constexpr float kLeastSum = 0x1p-70f;
constexpr float kLargestSum = 0x1p100f;  // whose lanes may be added up, and which leaves room for d
// In float16 Q (d - E[d]) may be 256 times as large before it is clamped, and a million equal keys have
// 2^-12 each.
constexpr double kLargestPull = 256;

// lambda/|q| and lambda/|k|, which make logits of products of stored rows; every kernel rounds them alike.
struct Scales {
  float query, key;
};
__device__ inline Scales scales_of(double lambda, double norm_query, double norm_key) {
  return {static_cast<float>(lambda / norm_query), static_cast<float>(lambda / norm_key)};
}

// co2.round: some rows of the queue (K, D) as they are multiplied.
//
// Arguments: queue, rounded_queue: Matrix (K, D). keys, dim. ROWS of a program.
template <typename Arguments>
__device__ void co2_round(const Arguments& x) {
  using Rounded = typename decltype(x.rounded_queue)::Element;
  const int64 first = static_cast<int64>(blockIdx.x) * Arguments::ROWS;
  for (int64 row = first + threadIdx.x / 32; row < smaller(first + Arguments::ROWS, x.keys);
       row += blockDim.x / 32)
    for (int64 column = threadIdx.x % 32; column < x.dim; column += 32)
      x.rounded_queue.at(row, column) = to_operand<Rounded>(x.queue.at(row, column));
}

// The first three fields of a row's record, by `kLanes` neighbouring lanes.
template <int kLanes, bool kNormalize, typename Query, typename Key>
__device__ CO2Row measured_row(const Rows<Query>& query, const Rows<Key>& key, int64 row) {
  const Products sums = products_of<kLanes>(query, row, key, row);
  const double norm_query = kNormalize ? norm_of(sums.xx) : 1, norm_key = kNormalize ? norm_of(sums.yy) : 1;
  return {.norm_query = norm_query, .norm_key = norm_key, .positive = sums.xy / norm_key};
}

// co2.prepare: what the statistics need to know of the rows, where every range of keys would take long to
// find it out; a warp for each.
//
// Arguments: query, key: Matrix (B, D). row_records: CO2Row (B, 11) float64, of which it writes the first
//            three. batch, dim. NORMALIZE. ROWS of a program.
template <typename Arguments>
__device__ void co2_prepare(const Arguments& x) {
  const Rows<typename decltype(x.query)::Element> query{x.query, x.batch, x.dim};
  const Rows<typename decltype(x.key)::Element> key{x.key, x.batch, x.dim};
  const int64 first = static_cast<int64>(blockIdx.x) * Arguments::ROWS;
  for (int64 row = first + threadIdx.x / 32; row < smaller(first + Arguments::ROWS, x.batch);
       row += blockDim.x / 32) {
    const CO2Row measured = measured_row<32, Arguments::NORMALIZE>(query, key, row);
    if (threadIdx.x % 32 == 0) reinterpret_cast<CO2Row*>(x.row_records)[row] = measured;
  }
}

// What a lane knows of a row: the sums over its keys, relative to its own maxima.
struct RowSums {
  float top_s, top_y, z_instance, z_query, z_key, d_query, d_key, rank;

  __device__ void begin(float top) { *this = {.top_s = top, .top_y = top}; }

  // Takes the sums to other maxima. Every d moves with them.
  __device__ void move_to(float new_s, float new_y, Scales scales, float ratio) {
    const float moved_s = move(top_s, new_s, scales.query), moved_y = move(top_y, new_y, scales.key);
    const float factor_query = exp2_fast(moved_s), factor_key = exp2_fast(moved_y), shift = moved_s - moved_y;
    z_instance *= exp2_fast(moved_s * ratio);
    d_query = (d_query + shift * z_query) * factor_query, d_key = (d_key + shift * z_key) * factor_key;
    z_query *= factor_query, z_key *= factor_key;
    top_s = new_s, top_y = new_y;
  }

  // Adds what another lane knows, with that lane's maxima where these are higher.
  __device__ void merge_lane(int mask, Scales scales, float ratio) {
    move_to(fmaxf(top_s, __shfl_xor_sync(0xffffffff, top_s, mask)),
            fmaxf(top_y, __shfl_xor_sync(0xffffffff, top_y, mask)), scales, ratio);
    z_instance += __shfl_xor_sync(0xffffffff, z_instance, mask);
    z_query += __shfl_xor_sync(0xffffffff, z_query, mask);
    z_key += __shfl_xor_sync(0xffffffff, z_key, mask);
    d_query += __shfl_xor_sync(0xffffffff, d_query, mask);
    d_key += __shfl_xor_sync(0xffffffff, d_key, mask);
    rank += __shfl_xor_sync(0xffffffff, rank, mask);
  }

  // Whether float32 holds all sums of exponentials, also times d, and too few are too small for it.
  template <bool kInstance, bool kConsistency>
  __device__ bool are_held() const {
    return (!kInstance || is_held(z_instance, 0)) &&
           (!kConsistency || (is_held(z_query, d_query) && is_held(z_key, d_key)));
  }
  __device__ static bool is_held(float z, float d) {
    return z > kLeastSum && z < kLargestSum && fabsf(d) < kLargestSum;
  }
};

// A thread's two rows in the statistics.
struct Measured {
  Scales scales[2];
  float positive[2];  // similarity, as it is multiplied
};

// Adds a tile to the sums. `left` keys of it are keys.
template <class Tile, bool kInstance, bool kConsistency, bool kBounded, int kBlocks>
__device__ void add_tile(float (&s)[kBlocks][Tile::kNumbers], RowSums (&sums)[2], const Measured& measured,
                         float ratio, int64 left) {
  constexpr int kEach = Tile::kNumbers / 2;  // of a row
  constexpr int kY = kBlocks - 1;            // without the consistency term there is no y, and none is read
  const bool is_ragged = left < Tile::kKeys;
  if (is_ragged) {
#pragma unroll
    for (int n = 0; n < Tile::kNumbers; ++n)
      if (Tile::Places::column(n) >= left) s[0][n] = s[kY][n] = -kLargestFloat;
  }
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    RowSums& row = sums[slot];
    const Scales scales = measured.scales[slot];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (s[0][number_of(slot, i)] > measured.positive[slot]) row.rank += 1;
    if constexpr (!kBounded) {
      float top_s = row.top_s, top_y = row.top_y;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        top_s = fmaxf(top_s, s[0][number_of(slot, i)]);
        if constexpr (kConsistency) top_y = fmaxf(top_y, s[kY][number_of(slot, i)]);
      }
      row.move_to(top_s, top_y, scales, ratio);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float& a = s[0][number_of(slot, i)];
      // In this order it loses nothing near the maximum.
      a = (kBounded ? a : a - row.top_s) * scales.query;
      if constexpr (kConsistency) {
        float& b = s[kY][number_of(slot, i)];
        b = (kBounded ? b : b - row.top_y) * scales.key;
      }
    }
  }
  if (is_ragged) {
#pragma unroll
    for (int n = 0; n < Tile::kNumbers; ++n)
      if (Tile::Places::column(n) >= left) s[0][n] = s[kY][n] = kLowestLogit;
  }
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    // Of the tile: short sums lose less.
    float z_instance = 0, z_query = 0, z_key = 0, d_query = 0, d_key = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float a = s[0][number_of(slot, i)];
      if constexpr (kInstance) z_instance += exp2_fast(a * ratio);
      if constexpr (kConsistency) {
        const float b = s[kY][number_of(slot, i)];
        const float e_query = exp2_fast(a), e_key = exp2_fast(b), d = a - b;
        z_query += e_query, z_key += e_key;
        d_query = fmaf(e_query, d, d_query), d_key = fmaf(e_key, d, d_key);
      }
    }
    RowSums& row = sums[slot];
    row.z_instance += z_instance, row.z_query += z_query, row.z_key += z_key;
    row.d_query += d_query, row.d_key += d_key;
  }
}

// The sums of a warp's rows over a range, relative to the maxima of all their lanes.
template <class Tile, bool kInstance, bool kConsistency, bool kBounded, class Keys>
__device__ void sum_up(Keys& walk, RowSums (&sums)[2], const Measured& measured, float ratio, int64 end) {
  for (RowSums& row : sums) row.begin(kBounded ? 0 : kLowestLogit);
  walk.each_tile([&](float (&s)[kConsistency ? 2 : 1][Tile::kNumbers], int64 key) {
    add_tile<Tile, kInstance, kConsistency, kBounded>(s, sums, measured, ratio, end - key);
  });
#pragma unroll
  for (int slot = 0; slot < 2; ++slot)
    for (int i = 0; i < 2; ++i) sums[slot].merge_lane(Tile::Places::mask(i), measured.scales[slot], ratio);
}

// co2.statistics: what a range of keys knows of a block of rows.
//
// Arguments: query, key: Matrix (B, D). queue: Matrix (K, D).
//            partial: CO2Partial (ranges, B, 8) float32, in the units above.
//            row_records: CO2Row (B, 11) float64; it writes the first three fields, or reads them if
//            PREPARED.
//            batch, keys, dim. scale, ratio: lambda and tau_c/tau. keys_a_range.
//            INSTANCE, CONSISTENCY, NORMALIZE, TILE, STAGES. VECTORS: see TileCopy.
//            BOUNDED: whether float32 holds the exponentials of all logits as they are, if no key is longer
//            than 1. Where one is, the range is walked again.
template <typename Arguments>
__device__ void co2_statistics(const Arguments& x) {
  constexpr bool kInstance = Arguments::INSTANCE, kConsistency = Arguments::CONSISTENCY;
  using Tile = WalkTile<typename Arguments::TILE, kConsistency ? 2 : 1, Arguments::TILE::rows, 0,
                        Arguments::STAGES, Arguments::VECTORS>;
  using Query = typename decltype(x.query)::Element;
  using Key = typename decltype(x.key)::Element;
  using Queue = typename decltype(x.queue)::Element;
  const int64 first = static_cast<int64>(blockIdx.x) * Tile::kRows, part = blockIdx.y;
  const Rows<Query> query{x.query, x.batch, x.dim};
  const Rows<Key> key{x.key, x.batch, x.dim};

  __shared__ float scale_query[Tile::kRows], scale_key[Tile::kRows], positive[Tile::kRows];
  CO2Row* const records = reinterpret_cast<CO2Row*>(x.row_records);
#pragma unroll
  for (int i = threadIdx.x / 8; i < Tile::kRows; i += Tile::kThreads / 8) {
    CO2Row row;
    if constexpr (Arguments::PREPARED) {
      row = records[smaller(first + i, x.batch - 1)];
    } else {
      row = measured_row<8, Arguments::NORMALIZE>(query, key, first + i);
      if (part == 0 && threadIdx.x % 8 == 0 && first + i < x.batch) records[first + i] = row;
    }
    if (threadIdx.x % 8 == 0) {
      const Scales scales = scales_of(x.scale, row.norm_query, row.norm_key);
      scale_query[i] = scales.query, scale_key[i] = scales.key;
      positive[i] = static_cast<float>(row.positive);
    }
  }
  __syncthreads();
  Measured measured;
  int own[2];  // rows in the block
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    own[slot] = 16 * warp_index() + Tile::Places::row(slot);
    measured.scales[slot] = {scale_query[own[slot]], scale_key[own[slot]]};
    measured.positive[slot] = positive[own[slot]];
  }

  const int64 begin = part * x.keys_a_range;
  const int64 end = smaller(begin + x.keys_a_range, x.keys);
  Walk<Tile, Query, Key, Queue> walk(query, key, first, first, {x.queue, x.keys, x.dim}, begin, end, 0);
  walk.hold();
  const float ratio = static_cast<float>(x.ratio);
  RowSums sums[2];
  sum_up<Tile, kInstance, kConsistency, Arguments::BOUNDED>(walk, sums, measured, ratio, end);
  if constexpr (Arguments::BOUNDED) {
    bool held = true;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot)
      held =
          held && (first + own[slot] >= x.batch || sums[slot].template are_held<kInstance, kConsistency>());
    if (__syncthreads_or(!held))
      sum_up<Tile, kInstance, kConsistency, false>(walk, sums, measured, ratio, end);
  }

#pragma unroll
  for (int slot = 0; slot < 2; ++slot)
    if (Tile::Places::is_first() && first + own[slot] < x.batch) {
      float4* record =
          reinterpret_cast<float4*>(x.partial + (part * x.batch + first + own[slot]) * kPartialFields);
      const RowSums& row = sums[slot];
      record[0] = make_float4(row.top_s, row.top_y, row.z_instance, row.z_query);
      record[1] = make_float4(row.z_key, row.d_query, row.d_key, row.rank);
    }
}

// ---- The ranges' numbers, in the units of csrc/records.h ----

// A warp's row: what turns a partial's units into these, and back.
struct Units {
  double lambda, s, y;  // 1/|q| and 1/|k|, as the statistics rounded them

  __device__ static Units of(double lambda, const CO2Row& row) {
    const Scales scales = scales_of(lambda, row.norm_query, row.norm_key);
    return {lambda, scales.query / lambda, scales.key / lambda};
  }
  __device__ CO2Partial read(const float* part) const {
    return {.max_s = part[0] * s,
            .max_y = part[1] * y,
            .z_instance = part[2],
            .z_query = part[3],
            .z_key = part[4],
            .d_query = part[5] / lambda,
            .d_key = part[6] / lambda,
            .rank = part[7]};
  }
  __device__ void write(float* part, const CO2Partial& sums) const {
    part[0] = static_cast<float>(sums.max_s / s), part[1] = static_cast<float>(sums.max_y / y);
    part[2] = static_cast<float>(sums.z_instance), part[3] = static_cast<float>(sums.z_query);
    part[4] = static_cast<float>(sums.z_key), part[5] = static_cast<float>(sums.d_query * lambda);
    part[6] = static_cast<float>(sums.d_key * lambda), part[7] = static_cast<float>(sums.rank);
  }
};

// The sums over all parts, in all lanes of a warp, each of which has some of them.
__device__ inline CO2Partial sums_of_parts(const float* partial, int64 row, int64 batch, int64 parts,
                                           const Units& units, const CO2Settings& settings) {
  const auto read = [&](int64 part) { return units.read(partial + (part * batch + row) * kPartialFields); };
  if (parts == 1) return read(0);
  CO2Partial total{.max_s = kLowest, .max_y = kLowest};
#pragma unroll 4
  for (int64 part = threadIdx.x % 32; part < parts; part += 32) raise(total, read(part));
  const double max_s = max_of_lanes(total.max_s), max_y = max_of_lanes(total.max_y);
  total.max_s = max_s, total.max_y = max_y;
#pragma unroll 4
  for (int64 part = threadIdx.x % 32; part < parts; part += 32) add(total, read(part), settings);
  total = sum_of_records(total);
  total.max_s = max_s, total.max_y = max_y;
  return total;
}

// co2.join: one part of several, in the same units; a warp for each row.
//
// Arguments: partial: CO2Partial (parts, B, 8) float32. joined: (1, B, 8) float32.
//            row_records: CO2Row (B, 11) float64, of which it reads the norms. batch, parts, scale, ratio.
template <typename Arguments>
__device__ void co2_join(const Arguments& x) {
  const int64 row = row_of_warp();
  if (row >= x.batch) return;
  const Units units = Units::of(x.scale, reinterpret_cast<const CO2Row*>(x.row_records)[row]);
  const double tau_c = kLog2E / x.scale;
  const CO2Settings settings{.temperature = tau_c / x.ratio, .consistency_temperature = tau_c};
  const CO2Partial sums = sums_of_parts(x.partial, row, x.batch, x.parts, units, settings);
  if (threadIdx.x % 32 == 0) units.write(x.joined + row * kPartialFields, sums);
}

// co2.merge: the losses, and what the gradients need; a warp for each row, in float64: what a row's sums
// lose now, all of its gradient loses.
//
// Arguments: partial: CO2Partial (parts, B, 8) float32.
//            losses: `Losses` of pointers, (B,) each; its coefficients are CO2Row (B, 11) float64, whose
//            first three fields it reads, and writes all others. batch, parts, scale, ratio, tau, tau_c,
//            instance_weight, consistency_weight. INCLUDE_POSITIVE.
template <typename Arguments>
__device__ void co2_merge(const Arguments& x) {
  const int64 row = row_of_warp();
  if (row >= x.batch) return;
  CO2Row* const records = reinterpret_cast<CO2Row*>(x.losses.coefficients);
  CO2Row record = records[row];
  const Units units = Units::of(x.scale, record);
  const CO2Settings settings{.temperature = x.tau,
                             .consistency_temperature = x.tau_c,
                             .instance_weight = x.instance_weight,
                             .consistency_weight = x.consistency_weight,
                             .include_positive = Arguments::INCLUDE_POSITIVE};
  const CO2Partial sums = sums_of_parts(x.partial, row, x.batch, x.parts, units, settings);
  if (threadIdx.x % 32 != 0) return;
  const double measured = record.positive;
  record.positive *= units.s;
  const RowLosses losses = finish(sums, settings, record);
  x.losses.loss[row] = losses.loss;
  x.losses.instance_loss[row] = losses.instance;
  x.losses.consistency_loss[row] = losses.consistency;
  x.losses.positive_rank[row] = static_cast<int64>(sums.rank);

  // Relative to what all keys of a row, without its positive, pull together: of the largest one no more is
  // known where exponentials are relative to 0.
  const double together =
      record.instance * sums.z_instance + record.query * sums.z_query + record.key * sums.z_key;
  const double relative = together > 0 ? kLargestPull / together : 0;
  record.positive = measured;
  record.instance *= relative, record.query *= relative, record.key *= relative;
  record.scale = together / kLargestPull;
  records[row] = record;
}

// What a thread needs of a row for g.
struct RowPull {
  Scales scales;
  float top_s, top_y, mean, ln2, instance;
  Split query, key;
  float slope, base;  // Q (1 + (d - E_Q[d])/tau_c) is 2^a (base + slope d)

  __device__ void set(const CO2Row& row, double lambda) {
    const Units units = Units::of(lambda, row);
    scales = scales_of(lambda, row.norm_query, row.norm_key);
    top_s = static_cast<float>(row.max_s / units.s), top_y = static_cast<float>(row.max_y / units.y);
    mean = static_cast<float>(row.mean * lambda);
    // Logits of millions leave Q one key, whose d - mean is 0, not the rounding of two such numbers.
    ln2 = fabsf(mean) < 1e6f ? kLn2 : 0;
    instance = static_cast<float>(row.instance);
    query = split(row.query), key = split(row.key);
    slope = query.high * ln2, base = query.high - slope * mean;
  }
};

// s and y of a tile become g, in place of s.
template <class Tile, bool kInstance, bool kConsistency, int kBlocks>
__device__ void pull_tile(float (&s)[kBlocks][Tile::kNumbers], const RowPull (&rows)[2], float ratio,
                          int64 left) {
#pragma unroll
  for (int n = 0; n < Tile::kNumbers; ++n) {
    const RowPull& row = rows[(n >> 1) & 1];
    const float a = (s[0][n] - row.top_s) * row.scales.query;
    float pull = 0;
    if constexpr (kConsistency) {
      const float b = (s[kBlocks - 1][n] - row.top_y) * row.scales.key;
      const float e_query = exp2_fast(a), e_key = exp2_fast(b);
      if constexpr (Tile::kPrecision == Precision::tf32x3) {
        const float q = e_query * row.query.high;
        // Where Q and P nearly cancel, what their weights lost would be left.
        pull = q - e_key * row.key.high + (e_query * row.query.low - e_key * row.key.low);
        pull += q * ((a - b - row.mean) * row.ln2);
      } else {
        pull = e_query * fmaf(row.slope, a - b, row.base) - e_key * row.key.high;
      }
    }
    if constexpr (kInstance) pull = fmaf(exp2_fast(a * ratio), row.instance, pull);
    s[0][n] = pull;
  }
  if (left < Tile::kKeys) {
#pragma unroll
    for (int n = 0; n < Tile::kNumbers; ++n)
      if (Tile::Places::column(n) >= left) s[0][n] = 0;
  }
  if constexpr (IsSame<typename Tile::Operand, Half>::value) {
#pragma unroll
    for (int n = 0; n < Tile::kNumbers; ++n) s[0][n] = fminf(fmaxf(s[0][n], -kLargestHalf), kLargestHalf);
  }
}

// co2.gradient: what a range of keys adds to g N of a block of rows, for a chunk of dimensions.
//
// Arguments: query, key: Matrix (B, D). queue: Matrix (K, D). row_records: CO2Row (B, 11) float64.
//            grad_parts: (ranges, B, D) float32. The others are as of the statistics.
template <typename Arguments>
__device__ void co2_gradient(const Arguments& x) {
  constexpr bool kInstance = Arguments::INSTANCE, kConsistency = Arguments::CONSISTENCY;
  constexpr int kBlocks = kConsistency ? 2 : 1;
  using Tile = WalkTile<typename Arguments::TILE, kBlocks, Arguments::TILE::rows, 1, Arguments::STAGES,
                        Arguments::VECTORS>;
  using Query = typename decltype(x.query)::Element;
  using Key = typename decltype(x.key)::Element;
  using Queue = typename decltype(x.queue)::Element;
  const CO2Row* const records = reinterpret_cast<const CO2Row*>(x.row_records);
  const int64 first = static_cast<int64>(blockIdx.x) * Tile::kRows, part = blockIdx.y;
  const int64 first_column = static_cast<int64>(blockIdx.z) * Tile::kWidth;
  const int64 begin = part * x.keys_a_range;
  const int64 end = smaller(begin + x.keys_a_range, x.keys);

  RowPull rows[2];
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int64 row = first + 16 * warp_index() + Tile::Places::row(slot);
    rows[slot].set(records[smaller(row, x.batch - 1)], x.scale);
  }
  Walk<Tile, Query, Key, Queue> walk({x.query, x.batch, x.dim}, {x.key, x.batch, x.dim}, first, first,
                                     {x.queue, x.keys, x.dim}, begin, end, first_column);
  walk.hold();
  const float ratio = static_cast<float>(x.ratio);
  float grad[1][Tile::kWidth / 2] = {};
  walk.add_gradients(grad, [&](float (&s)[kBlocks][Tile::kNumbers], int64 key) {
    pull_tile<Tile, kInstance, kConsistency>(s, rows, ratio, x.keys - key);
  });

#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int64 row = first + 16 * warp_index() + Tile::Places::row(slot);
    if (row >= x.batch) continue;
    const float scale = static_cast<float>(records[row].scale);
    float* to = x.grad_parts + (part * x.batch + row) * x.dim;
#pragma unroll
    for (int i = 0; i < Tile::kWidth / 4; i += 2) {
      const int64 column = first_column + Tile::Places::column(number_of(0, i));
      const float2 pair =
          make_float2(grad[0][number_of(slot, i)] * scale, grad[0][number_of(slot, i + 1)] * scale);
      if (x.dim % 2 == 0) {
        if (column < x.dim) *reinterpret_cast<float2*>(to + column) = pair;
      } else {
        if (column < x.dim) to[column] = pair.x;
        if (column + 1 < x.dim) to[column + 1] = pair.y;
      }
    }
  }
}

// co2.finish: the gradient in a row: the ranges' parts, the positive's pull, and the chain rule; a program
// for each row.
//
// Arguments: query, key: Matrix (B, D). row_records: CO2Row (B, 11) float64. grad_parts: (ranges, B, D)
//            float32.
//            gradient: (B, D) float32. batch, dim, ranges. NORMALIZE.
template <typename Arguments>
__device__ void co2_finish(const Arguments& x) {
  constexpr int kThreads = 128, kEach = 8;  // dimensions of a thread, of at most 1024
  const int64 row = blockIdx.x;
  const CO2Row& record = reinterpret_cast<const CO2Row*>(x.row_records)[row];
  const float norm_query = static_cast<float>(record.norm_query);
  const float norm_key = static_cast<float>(record.norm_key), pull = static_cast<float>(record.grad_positive);
  float grad[kEach] = {}, unit[kEach] = {}, radial = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64 column = kThreads * i + static_cast<int>(threadIdx.x);
    if (column >= x.dim) break;
    const float* from = x.grad_parts + row * x.dim + column;
#pragma unroll 8
    for (int64 part = 0; part < x.ranges; ++part) grad[i] += from[part * x.batch * x.dim];
    unit[i] = to_float(x.query.at(row, column)) / norm_query;
    grad[i] += to_float(x.key.at(row, column)) / norm_key * pull;
    radial += unit[i] * grad[i];
  }
  if constexpr (Arguments::NORMALIZE) {
    // dq = (dq^ - q^ (q^.dq^)) / |q|; a row below the epsilon was only scaled, so it has no projection.
    radial = norm_query > static_cast<float>(kNormEpsilon) ? sum_of_block(radial) : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) grad[i] = (grad[i] - unit[i] * radial) / norm_query;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64 column = kThreads * i + static_cast<int>(threadIdx.x);
    if (column < x.dim) x.gradient[row * x.dim + column] = grad[i];
  }
}

}  // namespace contrastive_ops
