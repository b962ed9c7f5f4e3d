// The scalar mathematics of a row: how the sums of several parts of the keys merge, and what its losses and
// the coefficients of its gradient are. contrastive_ops/reference.py has the formulas of the losses,
// contrastive_ops/_contract.py those of the fields; a, b, d, Q and P are as there.
//
// For host and device compilers alike, so free of torch and of all of the standard library but <math.h>,
// which NVRTC has built in. Everything is in double: a row costs a few exponentials, and its error is that of
// a loss.
#pragma once

#ifndef __CUDACC_RTC__
#include <math.h>
#endif

#include "host_device.h"
#include "records.h"

namespace contrastive_ops {

constexpr double kLowest = -0x1.fffffffffffffp1023;  // the maximum of no keys

// std::max and std::min, for NaN too: the result is `a` where either is one.
CONTRASTIVE_OPS_HOST_DEVICE inline double larger(double a, double b) {
  return a < b ? b : a;
}
CONTRASTIVE_OPS_HOST_DEVICE inline double smaller(double a, double b) {
  return b < a ? b : a;
}

// ---- Parts of the keys. The records of a row in `count` parts lie `stride` records apart. ----

struct Parts {
  long long count, stride;
};

// e^x; where a part has the maxima of all, as it has where none was looked for, no exponential is needed.
CONTRASTIVE_OPS_HOST_DEVICE inline double exponential(double x) {
  return x == 0 ? 1 : exp(x);
}

// A part's sums are relative to its own maxima: they move to those of the total, which are the maxima of all
// parts, and so does every d.
CONTRASTIVE_OPS_HOST_DEVICE inline void raise(CO2Partial& total, const CO2Partial& part) {
  total.max_s = larger(part.max_s, total.max_s), total.max_y = larger(part.max_y, total.max_y);
}
CONTRASTIVE_OPS_HOST_DEVICE inline void add(CO2Partial& total, const CO2Partial& part,
                                            const CO2Settings& settings) {
  const double tau_c = settings.consistency_temperature;
  const double moved_s = part.max_s - total.max_s, moved_y = part.max_y - total.max_y;
  total.rank += part.rank;
  total.z_instance += part.z_instance * exponential(moved_s / settings.temperature);
  if (part.z_query == 0) return;  // no term, or a part without keys, whose maxima are none
  const double shift = moved_s - moved_y;
  const double scale_query = exponential(moved_s / tau_c), scale_key = exponential(moved_y / tau_c);
  total.d_query += (part.d_query + shift * part.z_query) * scale_query;
  total.d_key += (part.d_key + shift * part.z_key) * scale_key;
  total.z_query += part.z_query * scale_query;
  total.z_key += part.z_key * scale_key;
}

// `max_y` is the maximum of the row's positive, which the row's d is relative to as well.
CONTRASTIVE_OPS_HOST_DEVICE inline void add(NTXentPartial& total, double max_y, const NTXentPartial& part,
                                            double part_max_y, const NTXentSettings& settings) {
  const double moved_s = part.max_s - total.max_s, moved_y = part_max_y - max_y;
  total.rank += part.rank;
  total.z_instance += part.z_instance * exponential(moved_s / settings.temperature);
  if (part.z_query == 0) return;
  const double scale = exponential(moved_s / settings.consistency_temperature);
  total.d_query += (part.d_query + (moved_s - moved_y) * part.z_query) * scale;
  total.z_query += part.z_query * scale;
}

CONTRASTIVE_OPS_HOST_DEVICE inline void add(ConICPartial& total, const ConICPartial& part,
                                            const ConICSettings& settings) {
  total.z_instance += part.z_instance * exponential((part.max_s - total.max_s) / settings.temperature);
  total.rank += part.rank;
}

// The sums over all parts. Where there is but one, it is the total.
CONTRASTIVE_OPS_HOST_DEVICE inline CO2Partial merge(const CO2Partial* row, Parts parts,
                                                    const CO2Settings& settings) {
  if (parts.count == 1) return row[0];
  CO2Partial total{.max_s = kLowest, .max_y = kLowest};
  for (long long p = 0; p < parts.count; ++p) raise(total, row[p * parts.stride]);
  for (long long p = 0; p < parts.count; ++p) add(total, row[p * parts.stride], settings);
  return total;
}

// `other` is the row's positive.
CONTRASTIVE_OPS_HOST_DEVICE inline NTXentPartial merge(const NTXentPartial* row, const NTXentPartial* other,
                                                       Parts parts, const NTXentSettings& settings) {
  if (parts.count == 1) return row[0];
  NTXentPartial total{.max_s = kLowest};
  double max_y = kLowest;
  for (long long p = 0; p < parts.count; ++p) {
    total.max_s = larger(row[p * parts.stride].max_s, total.max_s);
    max_y = larger(other[p * parts.stride].max_s, max_y);
  }
  for (long long p = 0; p < parts.count; ++p)
    add(total, max_y, row[p * parts.stride], other[p * parts.stride].max_s, settings);
  return total;
}

CONTRASTIVE_OPS_HOST_DEVICE inline ConICPartial merge(const ConICPartial* row, Parts parts,
                                                      const ConICSettings& settings) {
  if (parts.count == 1) return row[0];
  ConICPartial total{.max_s = kLowest};
  for (long long p = 0; p < parts.count; ++p) total.max_s = larger(row[p * parts.stride].max_s, total.max_s);
  for (long long p = 0; p < parts.count; ++p) add(total, row[p * parts.stride], settings);
  return total;
}

// ---- Losses, and the coefficients of their gradients ----

struct InstanceTerm {
  double loss, coefficient, grad_positive;  // dL/ds_j = coefficient e^{a/tau}
};

struct InstanceSettings {
  double temperature, weight = 1, compensation = 1;  // beta: how many negatives each counts for
};

// L_ins = -s_+/tau + log(e^{s_+/tau} + beta sum_j e^{s_j/tau}), and its gradient times its weight.
// Exponentials are relative to the largest logit, be it the positive's; log1p keeps a small loss's digits.
CONTRASTIVE_OPS_HOST_DEVICE inline InstanceTerm instance_term(double max_s, double z, double positive,
                                                              const InstanceSettings& settings) {
  const double gap = (positive - max_s) / settings.temperature;
  const double to_top = settings.compensation * exp(smaller(-gap, 0.));
  const double negatives = z * to_top, sum = negatives + exp(smaller(gap, 0.));
  const double scale = settings.weight / settings.temperature / sum;
  return {.loss = gap > 0 ? log1p(negatives) : log(sum) - gap,
          .coefficient = scale * to_top,         // p_j/tau = coefficient e^{a/tau}
          .grad_positive = -scale * negatives};  // (p_+ - 1)/tau
}

struct ConsistencyTerm {
  double loss, mean, query, key, grad_positive;
};

// L_con = (KL(P|Q) + KL(Q|P)) / 2 = (E_Q[d] - E_P[d]) / (2 tau_c), and its gradient times its weight.
CONTRASTIVE_OPS_HOST_DEVICE inline ConsistencyTerm consistency_term(CO2Partial sums, double positive,
                                                                    const CO2Settings& settings) {
  const double tau_c = settings.consistency_temperature;
  const double d_positive = sums.max_y - sums.max_s;  // (s_+ - max_s) - (s_+ - max_y)
  double scale_query = 1, scale_key = 1, e_query = 0, e_key = 0;
  if (settings.include_positive) {  // s_+ joins both lists, where it may be the largest entry
    const double top_query = larger(sums.max_s, positive), top_key = larger(sums.max_y, positive);
    scale_query = exp((sums.max_s - top_query) / tau_c), scale_key = exp((sums.max_y - top_key) / tau_c);
    e_query = exp((positive - top_query) / tau_c), e_key = exp((positive - top_key) / tau_c);
    sums.z_query = sums.z_query * scale_query + e_query;
    sums.d_query = sums.d_query * scale_query + d_positive * e_query;
    sums.z_key = sums.z_key * scale_key + e_key;
    sums.d_key = sums.d_key * scale_key + d_positive * e_key;
  }
  const double weight = settings.consistency_weight / (2 * tau_c);
  const double mean = sums.d_query / sums.z_query, mean_of_key = sums.d_key / sums.z_key;
  return {.loss = (mean - mean_of_key) / (2 * tau_c),
          .mean = mean,
          .query = weight * scale_query / sums.z_query,
          .key = weight * scale_key / sums.z_key,
          .grad_positive =
              weight * (e_query / sums.z_query * ((d_positive - mean) / tau_c + 1) - e_key / sums.z_key)};
}

struct RowLosses {
  double loss, instance, consistency;
};

// Completes the row's record. A term of weight 0 is left out.
CONTRASTIVE_OPS_HOST_DEVICE inline RowLosses finish(const CO2Partial& sums, const CO2Settings& settings,
                                                    CO2Row& row) {
  InstanceTerm instance{};
  ConsistencyTerm consistency{};
  if (settings.instance_weight != 0)
    instance = instance_term(sums.max_s, sums.z_instance, row.positive,
                             {.temperature = settings.temperature, .weight = settings.instance_weight});
  if (settings.consistency_weight != 0) consistency = consistency_term(sums, row.positive, settings);
  row.max_s = sums.max_s, row.max_y = sums.max_y, row.mean = consistency.mean;
  row.instance = instance.coefficient, row.query = consistency.query, row.key = consistency.key;
  row.scale = 1;
  row.grad_positive = instance.grad_positive + consistency.grad_positive;
  return {.loss = settings.instance_weight * instance.loss + settings.consistency_weight * consistency.loss,
          .instance = instance.loss,
          .consistency = consistency.loss};
}

// `other` has the sums of the row's positive: its Q is the row's P, and its d the row's with the other sign.
CONTRASTIVE_OPS_HOST_DEVICE inline RowLosses finish(const NTXentPartial& sums, const NTXentPartial& other,
                                                    double positive, const NTXentSettings& settings,
                                                    NTXentCoefficients& row) {
  const InstanceTerm instance =
      instance_term(sums.max_s, sums.z_instance, positive, {.temperature = settings.temperature});
  const bool alone = sums.z_instance == 0;  // nothing is a negative of an instance alone
  row = {.max_s = alone ? positive : sums.max_s,
         .instance = instance.coefficient,
         .query = 0,
         .mean = 0,
         .grad_positive = instance.grad_positive};
  double consistency = 0;
  if (settings.consistency_weight != 0 && !alone) {
    const double tau_c = settings.consistency_temperature;
    row.query = settings.consistency_weight / (2 * tau_c) / sums.z_query;
    row.mean = sums.d_query / sums.z_query;
    consistency = (row.mean + other.d_query / other.z_query) / (2 * tau_c);
  }
  return {.loss = instance.loss + settings.consistency_weight * consistency,
          .instance = instance.loss,
          .consistency = consistency};
}

// The classification loss of a view.
CONTRASTIVE_OPS_HOST_DEVICE inline double finish(const ConICPartial& sums, double positive,
                                                 const ConICSettings& settings, ConICCoefficients& view) {
  const InstanceTerm instance =
      instance_term(sums.max_s, sums.z_instance, positive,
                    {.temperature = settings.temperature, .compensation = settings.compensation});
  view = {.max_s = sums.z_instance == 0 ? positive : sums.max_s,  // the only row has no negatives
          .instance = instance.coefficient,
          .grad_positive = instance.grad_positive};
  return instance.loss;
}

// ---- What a row's gradient multiplies exponentials with ----

// dL/ds_j = instance e^{a/tau} + Q - P + Q (d - mean)/tau_c,   Q = query e^{a/tau_c},   P = key e^{b/tau_c}
struct Coefficients {
  double max_s = 0, max_y = 0, mean = 0, instance = 0, query = 0, key = 0;
};

CONTRASTIVE_OPS_HOST_DEVICE inline Coefficients coefficients(const CO2Row& row) {
  return {.max_s = row.max_s,
          .max_y = row.max_y,
          .mean = row.mean,
          .instance = row.scale * row.instance,
          .query = row.scale * row.query,
          .key = row.scale * row.key};
}

// Coefficients of `weight` times the row's loss; b is relative to the maximum of `other`, the row's positive.
CONTRASTIVE_OPS_HOST_DEVICE inline Coefficients coefficients(const NTXentCoefficients& row,
                                                             const NTXentCoefficients& other, double weight) {
  return {.max_s = row.max_s,
          .max_y = other.max_s,
          .mean = row.mean,
          .instance = weight * row.instance,
          .query = weight * row.query,
          .key = weight * other.query};
}

CONTRASTIVE_OPS_HOST_DEVICE inline Coefficients coefficients(const ConICCoefficients& view, double weight) {
  return {.max_s = view.max_s, .instance = weight * view.instance};
}

// What no |dL/ds_j| of a row exceeds, where no |s_j| or |y_j| exceeds `largest`: |d - mean| <= 4 largest.
CONTRASTIVE_OPS_HOST_DEVICE inline double gradient_bound(const Coefficients& row, double largest,
                                                         double consistency_temperature) {
  return row.instance + row.query * (1 + 4 * largest / consistency_temperature) + row.key;
}

// A power of two that takes numbers up to `bound` to the upper end of half precision, with room for a sum.
CONTRASTIVE_OPS_HOST_DEVICE inline double scale_to_half(double bound) {
  const bool usable = bound > 0 && bound <= -kLowest;
  return usable ? exp2(14 - ceil(log2(bound))) : 1;
}

}  // namespace contrastive_ops
