// A call of a loss that was recorded (contrastive_ops/gpu/launch.py), to be done again on other tensors: it
// allocates, and launches kernels that the driver has loaded.

#pragma once

#include <ATen/ATen.h>
#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace contrastive_ops {

// What is called of the CUDA driver. Its library is looked up when the first call is recorded: nothing of
// CUDA is needed to build this, or to load it.
class Driver {
 public:
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  int (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads_x,
                       unsigned threads_y, unsigned threads_z, unsigned shared_bytes, void* stream,
                       void** parameters, void** extra);

  // In a thread that has not called CUDA's runtime yet no context is.
  void make_context_current(int device) const {
    void* context;
    if (retain_context_(&context, device) != 0 || set_context_(context) != 0) {
      throw std::runtime_error("CUDA driver: there is no context on device " + std::to_string(device));
    }
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    if (library == nullptr) throw std::runtime_error("libcuda.so.1 cannot be loaded");
    find(library, "cuLaunchKernel", launch_kernel);
    find(library, "cuDevicePrimaryCtxRetain", retain_context_);
    find(library, "cuCtxSetCurrent", set_context_);
  }

  template <typename Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) throw std::runtime_error("libcuda.so.1 has no " + std::string(name));
  }

  int (*retain_context_)(void** context, int device);
  int (*set_context_)(void* context);
};

struct Allocation {
  std::vector<int64_t> shape;
  at::ScalarType dtype;
  at::Device device;
};

// The address of the tensor at a place, or else up to 8 bytes of a number, the first of them the lowest.
struct Parameter {
  int64_t place;  // -1 for a number
  uint64_t number;
};

struct Launch {
  std::string name;
  uint64_t function;
  std::vector<unsigned> grid;  // 3
  unsigned threads, shared_bytes;
  std::vector<Parameter> parameters;
};

// A tensor is known by its place: first those of the call, then those that are allocated.
class Replay {
 public:
  // `results` are the places of what the call returns, a tuple or a tensor.
  Replay(std::vector<Allocation> allocations, std::vector<Launch> launches, std::vector<size_t> results,
         bool returns_tuple, int device)
      : results(std::move(results)),
        returns_tuple(returns_tuple),
        allocations_(std::move(allocations)),
        launches_(std::move(launches)),
        device_(device),
        driver_(Driver::get()) {}

  const std::vector<size_t> results;
  const bool returns_tuple;

  void allocate(std::vector<at::Tensor>& tensors) const {
    for (const Allocation& each : allocations_) {
      tensors.push_back(at::empty(each.shape, at::TensorOptions(each.dtype).device(each.device)));
    }
  }

  // On a stream of the current device.
  void launch(const std::vector<at::Tensor>& tensors, uint64_t stream) const {
    c10::SmallVector<void*, 32> addresses;
    for (const at::Tensor& tensor : tensors) addresses.push_back(tensor.data_ptr());
    for (const Launch& each : launches_) {
      c10::SmallVector<void*, 64> parameters;
      for (const Parameter& parameter : each.parameters) {
        parameters.push_back(parameter.place < 0 ? const_cast<uint64_t*>(&parameter.number)
                                                 : static_cast<void*>(&addresses[parameter.place]));
      }
      int result = run(each, stream, parameters.data());
      if (result == kNoContext) {
        driver_.make_context_current(device_);
        result = run(each, stream, parameters.data());
      }
      if (result != 0) {
        throw std::runtime_error("CUDA driver: cannot launch " + each.name + ": error " +
                                 std::to_string(result));
      }
    }
  }

 private:
  static constexpr int kNoContext = 201;  // CUDA_ERROR_INVALID_CONTEXT

  int run(const Launch& launch, uint64_t stream, void** parameters) const {
    const std::vector<unsigned>& grid = launch.grid;
    return driver_.launch_kernel(reinterpret_cast<void*>(launch.function), grid[0], grid[1], grid[2],
                                 launch.threads, 1, 1, launch.shared_bytes, reinterpret_cast<void*>(stream),
                                 parameters, nullptr);
  }

  std::vector<Allocation> allocations_;
  std::vector<Launch> launches_;
  int device_;
  const Driver& driver_;
};

}  // namespace contrastive_ops
