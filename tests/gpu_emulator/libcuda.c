/* A CUDA driver without a GPU, as far as Triton and the CUDA C++ backend call it. What it loads is PTX, and a launch is handed on;
   where nobody takes launches, they do nothing, and what is loaded is any image. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef int CUdevice;
typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void *stream, *attributes;
  unsigned attribute_count;
} LaunchConfig;
typedef void (*Launcher)(const char *ptx, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared,
                         void **parameters);

static Launcher launcher;
static int major, minor, multiprocessors;
static long launches;
static int driver_version = 13000;

void emulate(Launcher with, int capability_major, int capability_minor, int count) {
  launcher = with, major = capability_major, minor = capability_minor, multiprocessors = count;
}
void set_driver_version(int version) { driver_version = version; }

/* What a real driver refuses: launches in a thread without a context, loading while a stream is captured unless
   the thread's mode is relaxed (2), and more shared memory than was allowed. */
static __thread int without_context, capture_mode;
static int is_capturing;

typedef struct {
  int allowed_shared;
  char image[];
} Kernel; /* which is its module, too */

void forget_context(void) { without_context = 1; }
void set_capturing(int capturing) { is_capturing = capturing; }
long launch_count(void) { return launches; }
static void *stream_of_last_launch;
void *last_stream(void) { return stream_of_last_launch; }

/* NVIDIA's Python package asks for every function by name, and does without those that are not here. */
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (found) *found = *function ? 0 : 1;
  return *function ? 0 : 500;
}

/* NVRTC looks for functions that have no names, and does without: a table begins with its size in bytes. */
CUresult cuGetExportTable(const void **table, const void *id) {
  static const uint64_t empty[] = {sizeof(uint64_t)};
  return *table = empty, 0;
}

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { return *version = driver_version, 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, 0; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, 0; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, 0; }
CUresult cuCtxGetCurrent(void **context) { return *context = (void *)(uintptr_t)!without_context, 0; }
CUresult cuCtxSetCurrent(void *context) { return without_context = !context, 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { return *value = 1 << 20, 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, CUdevice device) { return *context = (void *)1, 0; }
CUresult cuGetErrorString(int error, const char **text) { return *text = "an error of the emulator", 0; }

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
  switch (attribute) {
  case 1: *value = 1024; break;   /* threads of a block */
  case 8: *value = 49152; break;  /* shared bytes of a block */
  case 10: *value = 32; break;    /* threads of a warp */
  case 12: *value = 65536; break; /* registers of a block */
  case 16: *value = multiprocessors; break;
  case 75: *value = major; break;
  case 76: *value = minor; break;
  case 81: *value = major == 9 ? 233472 : 167936; break; /* shared bytes of a multiprocessor */
  case 97: *value = major == 9 ? 232448 : 166912; break; /* shared bytes that a block may ask for */
  default: *value = 1000;
  }
  return 0;
}

CUresult cuModuleLoadData(void **module, const void *image) {
  if (without_context) return 201;
  if (is_capturing && capture_mode != 2) return 900;
  Kernel *kernel = malloc(sizeof(Kernel) + strlen(image) + 1);
  kernel->allowed_shared = 49152;
  strcpy(kernel->image, image);
  return *module = kernel, 0;
}
CUresult cuModuleUnload(void *module) { return free(module), 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { return *function = module, 0; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  return *value = attribute == 0 ? 1024 : 0, 0; /* threads of a block */
}
CUresult cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute != 8) return 1; /* newer ways to allow more of it, which callers do without */
  return ((Kernel *)function)->allowed_shared = value, 0;
}
CUresult cuFuncLoad(void *function) { return 0; }
CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
  int before = capture_mode;
  return capture_mode = *mode, *mode = before, 0;
}
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { return *count = 1, 0; }
CUresult cuTensorMapEncodeTiled(void) { return 1; }
CUresult cuTensorMapEncodeIm2col(void) { return 1; }
CUresult cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  return *(uint64_t *)value = pointer, 0;
}

CUresult cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
  launches++, stream_of_last_launch = config->stream;
  if (launcher)
    launcher(((Kernel *)function)->image, config->grid_x, config->grid_y, config->grid_z,
             config->block_x * config->block_y * config->block_z, config->shared_bytes, parameters);
  return 0;
}

CUresult cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream,
                        void **parameters, void **extra) {
  if (without_context) return 201;
  if (shared_bytes > ((Kernel *)function)->allowed_shared) return 1;
  launches++, stream_of_last_launch = stream;
  if (launcher)
    launcher(((Kernel *)function)->image, grid_x, grid_y, grid_z, block_x * block_y * block_z, shared_bytes, parameters);
  return 0;
}
