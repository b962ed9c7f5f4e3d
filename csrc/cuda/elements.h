// Numbers of the dtypes that a weight may have, which include double, and what is computed in for them.
#pragma once

#include "numbers.h"

namespace contrastive_ops {

template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

// Through float, which holds every number of half precision; what is double already stays as it is.
template <typename To, typename From>
__device__ To convert(From x) {
  if constexpr (IsSame<To, From>::value)
    return x;
  else if constexpr (IsSame<To, double>::value)
    return to_float(x);
  else
    return from_float<To>(to_float(x));
}

}  // namespace contrastive_ops
