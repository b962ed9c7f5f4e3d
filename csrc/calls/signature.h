// What a call's checks and plans depend on, as bytes that are equal for calls of one kind.

#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

namespace contrastive_ops {

// Whether PyTorch's dispatcher would come to nothing but an operator's autograd and its kernel: no mode, no
// transform, no tracer and no profiler of this thread is there to see the call. All but the last have keys of
// their own by which PyTorch dispatches.
inline bool dispatch_is_unobserved() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return keys.included_ - c10::autocast_dispatch_keyset == c10::default_included_set &&
         (keys.excluded_ & c10::autograd_dispatch_keyset).empty() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 && !at::hasCallbacks();
}

// Whether a tensor is nothing but numbers on a CPU or a GPU of NVIDIA's: no fake, negated, functional,
// batched, sparse or inference tensor.
inline bool is_plain(const at::Tensor& tensor) {
  using c10::DispatchKey, c10::DispatchKeySet;
  static const DispatchKeySet kCpu(
      {DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  static const DispatchKeySet kCuda({DispatchKey::CUDA, DispatchKey::ADInplaceOrView,
                                     DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA});
  return tensor.key_set() == kCpu || tensor.key_set() == kCuda;
}

// Bytes from the first element of a tensor to behind its last.
inline int64_t reach(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); i++) last += (tensor.size(i) - 1) * tensor.stride(i);
  return (last + 1) * static_cast<int64_t>(tensor.itemsize());
}

// Describes the arguments of a call.
//
// Of a tensor it says dtype, device, sizes and strides, whether it requires a gradient, whether it lies
// within its storage, and how far from an address divisible by 16 it begins; nothing else of its place, and
// nothing of its values. Numbers, flags, names and tuples of them stand for themselves, with their types, for
// 1, 1.0 and True are equal.
class Signature {
 public:
  Signature() {
    add(c10::GradMode::is_enabled());
    for (const auto device : {at::kCPU, at::kCUDA}) add(at::autocast::is_autocast_enabled(device));
  }

  // False where an argument is something else, of which more may matter than that: a tensor that is not
  // plain, an object of a class of its own, or a tuple that has a tensor.
  bool describe(PyObject* arguments) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); i++) {
      PyObject* argument = PyTuple_GET_ITEM(arguments, i);
      const bool is_tensor = THPVariable_CheckExact(argument);
      if (!(is_tensor ? describe_tensor(THPVariable_Unpack(argument)) : describe_setting(argument)))
        return false;
    }
    return true;
  }

  PyObject* bytes() const {
    return PyBytes_FromStringAndSize(bytes_.data(), static_cast<Py_ssize_t>(bytes_.size()));
  }

 private:
  bool describe_tensor(const at::Tensor& tensor) {
    if (!is_plain(tensor)) return false;
    const int64_t begin = tensor.storage_offset() * static_cast<int64_t>(tensor.itemsize());
    const bool lies_within = begin + reach(tensor) <= static_cast<int64_t>(tensor.storage().nbytes());
    const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    add('T'), add(tensor.scalar_type()), add(tensor.device().type()), add(tensor.device().index());
    add(tensor.requires_grad()), add(lies_within), add(static_cast<uint8_t>(address % 16));
    add(tensor.dim());
    for (const int64_t size : tensor.sizes()) add(size);
    for (const int64_t stride : tensor.strides()) add(stride);
    return true;
  }

  bool describe_setting(PyObject* setting) {
    if (setting == Py_None) return add('n'), true;
    if (PyBool_Check(setting)) return add(setting == Py_True ? 't' : 'f'), true;
    if (PyFloat_CheckExact(setting)) return add('d'), add(PyFloat_AS_DOUBLE(setting)), true;
    if (PyLong_CheckExact(setting)) {
      int overflow;
      const long long value = PyLong_AsLongLongAndOverflow(setting, &overflow);
      return add('i'), add(value), overflow == 0;
    }
    if (PyUnicode_CheckExact(setting)) {
      Py_ssize_t size;
      const char* text = PyUnicode_AsUTF8AndSize(setting, &size);
      if (text == nullptr) return PyErr_Clear(), false;
      add('s'), add(size), bytes_.append(text, text + size);
      return true;
    }
    if (!PyTuple_Check(setting)) return false;
    add('('), add(PyTuple_GET_SIZE(setting));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(setting); i++) {
      if (!describe_setting(PyTuple_GET_ITEM(setting, i))) return false;
    }
    return true;
  }

  template <typename T>
  void add(const T& value) {
    const char* data = reinterpret_cast<const char*>(&value);
    bytes_.append(data, data + sizeof(T));
  }

  c10::SmallVector<char, 512> bytes_;
};

}  // namespace contrastive_ops
