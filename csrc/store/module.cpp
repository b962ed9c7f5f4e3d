// contrastive_ops._store: the rows of instance classification outside PyTorch; NumPy arrays in and out.
//
// ActiveSet keeps the interpreter's lock, which is what makes its calls atomic; they take microseconds. The
// others release it.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "active_set.h"
#include "initial_rows.h"
#include "philox.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace contrastive_ops {
namespace {

void require_contiguous(const py::array& array, const std::string& name) {
  if (!(array.flags() & py::array::c_style)) throw py::value_error(name + " must be C-contiguous");
}

// The numbers of a contiguous int64 (n,) array.
const int64_t* numbers(const py::array& array, const std::string& name) {
  if (!py::array_t<int64_t>::check_(array)) {
    throw py::type_error(name + " must be int64, got " + std::string(py::str(array.dtype())));
  }
  if (array.ndim() != 1) {
    throw py::value_error(name + " must have one dimension, got " + std::to_string(array.ndim()));
  }
  require_contiguous(array, name);
  return static_cast<const int64_t*>(array.data());
}

py::array_t<int64_t> copy(const std::vector<int64_t>& values) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <typename T>
void fill(uint64_t seed, const int64_t* instances, py::array& out) {
  const auto size = static_cast<py::ssize_t>(sizeof(T));
  if ((out.shape(1) > 1 && out.strides(1) != size) || out.strides(0) % size != 0) {
    throw py::value_error("the last dimension of out must be contiguous");
  }
  const int64_t count = out.shape(0), dim = out.shape(1), stride = out.strides(0) / size;
  T* data = static_cast<T*>(out.mutable_data());
  py::gil_scoped_release release;
  initial_rows(seed, instances, count, dim, data, stride);
}

void initial_rows_of(uint64_t seed, const py::array& instances, py::array out) {
  const int64_t* indices = numbers(instances, "instances");
  if (out.ndim() != 2 || out.shape(0) != instances.size()) {
    throw py::value_error("out must be (" + std::to_string(instances.size()) + ", dim), got " +
                          std::string(py::str(out.attr("shape"))));
  }
  if (std::any_of(indices, indices + instances.size(), [](int64_t i) { return i < 0; })) {
    throw py::value_error("instances must not be negative");
  }
  if (py::array_t<float>::check_(out)) {
    fill<float>(seed, indices, out);
  } else if (py::array_t<double>::check_(out)) {
    fill<double>(seed, indices, out);
  } else {
    throw py::type_error("out must be float32 or float64, got " + std::string(py::str(out.dtype())));
  }
}

py::dict state(const ActiveSet& set) {
  return py::dict("instances"_a = copy(set.instances()), "order"_a = copy(set.order()),
                  "protected"_a = copy({set.protected_rows()}));
}

void load(ActiveSet& set, const py::dict& state) {
  const auto entry = [&](const char* name, int64_t size) {
    if (!state.contains(name) || !py::isinstance<py::array>(state[name])) {
      throw py::value_error(std::string("state must hold an array '") + name + "'");
    }
    const auto array = state[name].cast<py::array>();
    if (array.size() != size) {
      throw py::value_error(std::string("state's ") + name + " must have " + std::to_string(size) +
                            " elements, got " + std::to_string(array.size()));
    }
    return numbers(array, std::string("state's ") + name);
  };
  const int64_t *instances = entry("instances", set.active()), *order = entry("order", set.active());
  set.load(instances, order, *entry("protected", 1));
}

}  // namespace

PYBIND11_MODULE(_store, module) {
  module.def(
      "philox",
      [](const std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>& c,
         const std::tuple<uint32_t, uint32_t>& k) {
        const Counter words = philox({std::get<0>(c), std::get<1>(c), std::get<2>(c), std::get<3>(c)},
                                     {std::get<0>(k), std::get<1>(k)});
        return std::tuple(words[0], words[1], words[2], words[3]);
      },
      "counter"_a, "key"_a, "The four words of Philox4x32-10.");
  module.def("initial_rows", &initial_rows_of, "seed"_a, "instances"_a, "out"_a,
             "Fill out (n, dim) with the initial unit rows of the instances (n,).");

  py::class_<Plan>(module, "Plan", "What ActiveSet.commit would change.")
      .def_property_readonly("target", [](const Plan& plan) { return copy(plan.target); })
      .def_property_readonly("slots", [](const Plan& plan) { return copy(plan.slots); })
      .def_property_readonly("incoming", [](const Plan& plan) { return copy(plan.incoming); })
      .def_property_readonly("evicted", [](const Plan& plan) { return copy(plan.evicted); });

  py::class_<ActiveSet>(module, "ActiveSet", "Which instance is in which slot, by order of last sampling.")
      .def(py::init<int64_t, int64_t, uint64_t>(), "num_instances"_a, "active"_a, "seed"_a)
      .def_property_readonly("num_instances", &ActiveSet::num_instances)
      .def_property_readonly("active", &ActiveSet::active)
      .def_property_readonly("instances", [](const ActiveSet& set) { return copy(set.instances()); })
      .def(
          "find",
          [](const ActiveSet& set, const py::array& indices) {
            return copy(set.find(numbers(indices, "indices"), indices.size()));
          },
          "indices"_a, "The slot of each index, -1 where it is not active.")
      .def(
          "plan",
          [](const ActiveSet& set, const py::array& indices) {
            return set.plan(numbers(indices, "indices"), indices.size());
          },
          "indices"_a, "What activating the indices takes; changes nothing.")
      .def("awaits", &ActiveSet::awaits, "plan"_a, "Whether the plan can be committed, and was not yet.")
      .def("commit", &ActiveSet::commit, "plan"_a, "protect"_a = true,
           "Make it so; with protect, the rows of the batch are not evicted before a release.")
      .def("release", &ActiveSet::release, "Unprotect all rows.")
      .def("state", &state)
      .def("load", &load, "state"_a);
}

}  // namespace contrastive_ops
