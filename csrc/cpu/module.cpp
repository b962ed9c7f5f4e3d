#include <torch/csrc/utils/pybind.h>

#include "operators.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace contrastive_ops;
  const auto define = [&module](const char* name, auto function) {
    module.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>());
  };
  define("co2", &co2);
  define("nt_xent", &nt_xent);
  define("nt_xent_backward", &nt_xent_backward);
  define("conic", &conic);
  define("conic_backward", &conic_backward);
  define("conic_backward_sgd_", &conic_backward_sgd_);
  define("sgd_", &sgd_);
  define("exchange_rows_", &exchange_rows_);
}
