// The settings and records of contrastive_ops/_contract.py, which has their meaning, in the same order. Free
// of torch and of the standard library: host and device compilers read it.
#pragma once

namespace contrastive_ops {

struct CO2Settings {
  double temperature, consistency_temperature, instance_weight, consistency_weight;
  bool include_positive, normalize;
};

struct NTXentSettings {
  double temperature, consistency_temperature, consistency_weight;
  bool normalize;
};

struct ConICSettings {
  double temperature, consistency_weight, compensation;
};

struct SGDSettings {
  double lr, momentum, weight_decay;
  bool nesterov;
};

// A record is the last dimension of a float64 tensor. `kFields` names its fields, as the source has them.
#define CONTRASTIVE_OPS_RECORD(Name, ...)                \
  struct Name {                                          \
    double __VA_ARGS__;                                  \
    static constexpr const char* kFields = #__VA_ARGS__; \
  }

CONTRASTIVE_OPS_RECORD(CO2Partial, max_s, max_y, z_instance, z_query, z_key, d_query, d_key, rank);
CONTRASTIVE_OPS_RECORD(CO2Row, norm_query, norm_key, positive, max_s, max_y, mean, instance, query, key,
                       scale, grad_positive);
CONTRASTIVE_OPS_RECORD(NTXentPartial, max_s, rank, z_instance, z_query, d_query);
CONTRASTIVE_OPS_RECORD(NTXentCoefficients, max_s, instance, query, mean, grad_positive);
CONTRASTIVE_OPS_RECORD(ConICPositives, positive, threshold);
CONTRASTIVE_OPS_RECORD(ConICPartial, max_s, z_instance, rank);
CONTRASTIVE_OPS_RECORD(ConICCoefficients, max_s, instance, grad_positive);

#undef CONTRASTIVE_OPS_RECORD

}  // namespace contrastive_ops
