#include <torch/csrc/utils/pybind.h>

#include "operators.h"

namespace pybind11::detail {

// A NamedTuple of contrastive_ops/_contract.py as the struct of its name, which has its fields in its order.
template <typename Struct, typename... Fields>
struct NamedTupleCaster {
  PYBIND11_TYPE_CASTER(Struct, const_name("tuple"));

  bool load(handle source, bool convert) {
    make_caster<std::tuple<Fields...>> fields;
    if (!fields.load(source, convert)) return false;
    const auto aggregate = [](auto&&... field) { return Struct{std::move(field)...}; };
    value = std::apply(aggregate, cast_op<std::tuple<Fields...>>(std::move(fields)));
    return true;
  }
};

template <>
struct type_caster<contrastive_ops::CO2Settings>
    : NamedTupleCaster<contrastive_ops::CO2Settings, double, double, double, double, bool, bool> {};
template <>
struct type_caster<contrastive_ops::NTXentSettings>
    : NamedTupleCaster<contrastive_ops::NTXentSettings, double, double, double, bool> {};
template <>
struct type_caster<contrastive_ops::NTXentKeys>
    : NamedTupleCaster<contrastive_ops::NTXentKeys, at::Tensor, at::Tensor, std::optional<at::Tensor>,
                       std::optional<at::Tensor>> {};
template <>
struct type_caster<contrastive_ops::ConICSettings>
    : NamedTupleCaster<contrastive_ops::ConICSettings, double, double, double> {};
template <>
struct type_caster<contrastive_ops::SGDSettings>
    : NamedTupleCaster<contrastive_ops::SGDSettings, double, double, double, bool> {};

}  // namespace pybind11::detail

namespace contrastive_ops {
namespace {

// The names of each record's fields: whoever loads this module compares them with
// contrastive_ops/_contract.py.
pybind11::dict records() {
  pybind11::dict names;
  const auto add = [&names](const char* record, const char* fields) {
    names[record] = pybind11::tuple(pybind11::str(fields).attr("split")(", "));
  };
  add("CO2Partial", CO2Partial::kFields);
  add("CO2Row", CO2Row::kFields);
  add("NTXentPartial", NTXentPartial::kFields);
  add("NTXentCoefficients", NTXentCoefficients::kFields);
  add("ConICPositives", ConICPositives::kFields);
  add("ConICPartial", ConICPartial::kFields);
  add("ConICCoefficients", ConICCoefficients::kFields);
  return names;
}

}  // namespace
}  // namespace contrastive_ops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace contrastive_ops;
  const auto define = [&module](const char* name, auto function, const auto&... defaults) {
    module.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>(), defaults...);
  };
  module.attr("records") = records();
  define("co2", &co2);
  define("co2_statistics", &co2_statistics);
  define("co2_merge", &co2_merge);
  define("co2_gradient", &co2_gradient);
  using pybind11::arg;
  define("nt_xent", &nt_xent);
  define("nt_xent_statistics", &nt_xent_statistics, arg("views"), arg("settings"),
         arg("keys") = pybind11::none());
  define("nt_xent_merge", &nt_xent_merge);
  define("nt_xent_gradient", &nt_xent_gradient, arg("grad_loss"), arg("views"), arg("statistics"),
         arg("settings"), arg("keys") = pybind11::none());
  define("conic", &conic);
  define("conic_positives", &conic_positives);
  define("conic_statistics", &conic_statistics);
  define("conic_merge", &conic_merge);
  define("conic_gradient", &conic_gradient);
  define("conic_gradient_sgd_", &conic_gradient_sgd_);
  define("sgd_", &sgd_);
  define("exchange_rows_", &exchange_rows_);
}
