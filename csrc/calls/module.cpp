// contrastive_ops._calls: what a call of a kind that was seen before needs of the host, in a few
// microseconds.

#include <torch/csrc/utils/pybind.h>

#include "replay.h"
#include "signature.h"

namespace py = pybind11;

namespace contrastive_ops {
namespace {

py::object describe(const py::tuple& arguments) {
  Signature signature;
  if (!signature.describe(arguments.ptr())) return py::none();
  return py::reinterpret_steal<py::object>(signature.bytes());
}

py::object describe_unobserved(const py::tuple& arguments) {
  return dispatch_is_unobserved() ? describe(arguments) : py::none();
}

py::object results(const Replay& replay, const std::vector<at::Tensor>& tensors) {
  const auto wrapped = [&](size_t place) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensors[place]));
  };
  if (!replay.returns_tuple) return wrapped(replay.results[0]);
  py::tuple tuple(replay.results.size());
  for (size_t i = 0; i < replay.results.size(); i++) tuple[i] = wrapped(replay.results[i]);
  return tuple;
}

std::vector<at::Tensor> tensors_among(const py::tuple& arguments) {
  std::vector<at::Tensor> tensors;
  for (const py::handle argument : arguments) {
    if (THPVariable_Check(argument.ptr())) tensors.push_back(THPVariable_Unpack(argument.ptr()));
  }
  return tensors;
}

}  // namespace
}  // namespace contrastive_ops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace contrastive_ops;
  module.def("describe", &describe);
  module.def("describe_unobserved", &describe_unobserved);
  py::class_<Allocation>(module, "Allocation")
      .def(py::init<std::vector<int64_t>, at::ScalarType, at::Device>());
  py::class_<Parameter>(module, "Parameter").def(py::init<int64_t, uint64_t>());
  py::class_<Launch>(module, "Launch")
      .def(py::init<std::string, uint64_t, std::vector<unsigned>, unsigned, unsigned,
                    std::vector<Parameter>>());
  py::class_<Replay>(module, "Replay")
      .def(py::init<std::vector<Allocation>, std::vector<Launch>, std::vector<size_t>, bool, int>())
      .def("allocate",
           [](const Replay& replay, const py::tuple& arguments) {
             auto tensors = tensors_among(arguments);
             return replay.allocate(tensors), tensors;
           })
      .def("launch", &Replay::launch)
      .def("results", &results)
      .def("__call__", [](const Replay& replay, const py::tuple& arguments, uint64_t stream) {
        auto tensors = tensors_among(arguments);
        {
          const py::gil_scoped_release release;
          replay.allocate(tensors);
          replay.launch(tensors, stream);
        }
        return results(replay, tensors);
      });
}
