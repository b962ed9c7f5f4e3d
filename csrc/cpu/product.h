// The matrix products of a tile of keys with a panel of queries, in engines with one interface:
//
//   DirectProduct   float, double: register-blocked multiply-adds on the tile as it lies in memory
//   AMXProduct      bfloat16, on chips with AMX
//   PairProduct     bfloat16, float16: on other chips that multiply them
//
// An engine turns kPanel query rows into an `Operand` (pack), takes in a tile of keys (load), and then gives
//
//   similarities:     out (keys x panel)  = N (keys x D) . q^T (D x panel)
//   accumulate:       grad (D x panel)   += N^T (D x keys) . g (keys x panel)
//   accumulate_keys:  grad (keys x D)    += g (keys x panel) . q (panel x D), with q from pack_rows; the last
//                     may be added by finish_keys only
//
// Keys come first in `out`, so the lanes of a vector are query rows: statistics of a row never cross lanes.
#pragma once

#include <ATen/Parallel.h>

#include <type_traits>

#include "amx_product.h"
#include "direct_product.h"
#include "pair_product.h"

namespace contrastive_ops {

inline constexpr int64_t kTaskOperations = 1 << 21;  // multiply-adds that are worth a thread

// Calls `function` with the engine that multiplies rows of a dtype; half precision in hardware if allowed.
template <typename Function>
auto with_product(at::ScalarType dtype, bool half_precision, const Function& function) {
  if (dtype == at::kDouble) return function(std::type_identity<DirectProduct<double>>{});
#ifdef CONTRASTIVE_OPS_WITH_AMX
  if (half_precision && dtype == at::kBFloat16 && AMXProduct::available())
    return function(std::type_identity<AMXProduct>{});
#endif
#ifdef CPU_CAPABILITY_AVX512
  if (half_precision && dtype == at::kBFloat16 && PairProduct<at::BFloat16>::available())
    return function(std::type_identity<PairProduct<at::BFloat16>>{});
#endif
  if (half_precision && dtype == at::kHalf && PairProduct<at::Half>::available())
    return function(std::type_identity<PairProduct<at::Half>>{});
  return function(std::type_identity<DirectProduct<float>>{});
}

}  // namespace contrastive_ops
