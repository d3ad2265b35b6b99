// The CUDA driver API, opened at run time: nothing of CUDA is needed to build, install or import jax_mpk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace jax_mpk::cuda {

// Names and values are the driver's own.
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUresult = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;

enum : CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_OUT_OF_MEMORY = 2 };

enum : int {
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE = 36,        // kHz
  CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH = 37,  // bits
  CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH = 95,
  CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
};

enum : int {
  CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 0,
  CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1,
  CU_FUNC_ATTRIBUTE_NUM_REGS = 4,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
};

enum : unsigned { CU_STREAM_NON_BLOCKING = 1, CU_MEMHOSTALLOC_PORTABLE = 1, CU_MEMHOSTALLOC_DEVICEMAP = 2 };

// What can go wrong, told apart as Python's exceptions are.
struct Failure : std::runtime_error {
  enum class Kind {
    kProgram,   // the program cannot be read, or does not fit the call
    kTarget,    // the device is not one that the program was made for
    kMemory,    // no device memory left
    kLaunch,    // the driver refused something
    kDeadline,  // a wait in a kernel passed its deadline
  };
  Failure(Kind kind, const std::string& text) : std::runtime_error(text), kind(kind) {}
  Kind kind;
};

// X(name, symbol, parameters): every function that is used. `symbol` is what the library exports.
#define JAX_MPK_CUDA_FUNCTIONS(X)                                                                              \
  X(cuInit, "cuInit", (unsigned))                                                                              \
  X(cuGetErrorName, "cuGetErrorName", (CUresult, const char**))                                                \
  X(cuGetErrorString, "cuGetErrorString", (CUresult, const char**))                                            \
  X(cuDriverGetVersion, "cuDriverGetVersion", (int*))                                                          \
  X(cuDeviceGet, "cuDeviceGet", (CUdevice*, int))                                                              \
  X(cuDeviceGetName, "cuDeviceGetName", (char*, int, CUdevice))                                                \
  X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int*, int, CUdevice))                                       \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext))                                                      \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext*))                                                       \
  X(cuCtxGetDevice, "cuCtxGetDevice", (CUdevice*))                                                             \
  X(cuCtxSynchronize, "cuCtxSynchronize", ())                                                                  \
  X(cuModuleLoadData, "cuModuleLoadData", (CUmodule*, const void*))                                            \
  X(cuModuleUnload, "cuModuleUnload", (CUmodule))                                                              \
  X(cuModuleGetFunction, "cuModuleGetFunction", (CUfunction*, CUmodule, const char*))                          \
  X(cuFuncGetAttribute, "cuFuncGetAttribute", (int*, int, CUfunction))                                         \
  X(cuFuncSetAttribute, "cuFuncSetAttribute", (CUfunction, int, int))                                          \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor, "cuOccupancyMaxActiveBlocksPerMultiprocessor",                \
    (int*, CUfunction, int, size_t))                                                                           \
  X(cuLaunchCooperativeKernel, "cuLaunchCooperativeKernel",                                                    \
    (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**))      \
  X(cuMemAlloc, "cuMemAlloc_v2", (CUdeviceptr*, size_t))                                                       \
  X(cuMemFree, "cuMemFree_v2", (CUdeviceptr))                                                                  \
  X(cuMemHostAlloc, "cuMemHostAlloc", (void**, size_t, unsigned))                                              \
  X(cuMemFreeHost, "cuMemFreeHost", (void*))                                                                   \
  X(cuMemHostGetDevicePointer, "cuMemHostGetDevicePointer_v2", (CUdeviceptr*, void*, unsigned))                \
  X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (CUdeviceptr, const void*, size_t, CUstream))                   \
  X(cuMemsetD8Async, "cuMemsetD8Async", (CUdeviceptr, unsigned char, size_t, CUstream))                        \
  X(cuStreamCreate, "cuStreamCreate", (CUstream*, unsigned))                                                   \
  X(cuStreamDestroy, "cuStreamDestroy_v2", (CUstream))                                                         \
  X(cuStreamGetCtx, "cuStreamGetCtx", (CUstream, CUcontext*))                                                  \
  X(cuStreamIsCapturing, "cuStreamIsCapturing", (CUstream, int*))                                              \
  X(cuStreamSynchronize, "cuStreamSynchronize", (CUstream))

class Driver {
 public:
  // Opens and initialises the driver. The library stays open: nothing can be said about who else uses it.
  // Throws Failure if there is none, or no device.
  explicit Driver(const std::string& library = "libcuda.so.1");

#define X(name, symbol, parameters) CUresult(*name) parameters = nullptr;
  JAX_MPK_CUDA_FUNCTIONS(X)
#undef X

  // Throws Failure with the driver's own words if a call did not succeed.
  void check(CUresult result, const char* what) const;
  std::string describe(CUresult result) const;
  int attribute(int attribute, CUdevice device) const;
  std::string device_name(CUdevice device) const;
};

// Makes a context current as long as it lives.
class ContextScope {
 public:
  ContextScope(const Driver& driver, CUcontext context);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const Driver& driver_;
};

// What a target description needs to know of a device.
struct DeviceInfo {
  std::string name;
  int major, minor;       // compute capability
  int multiprocessors;
  int64_t shared_bytes;   // that one block can ask for
  int64_t l2_bytes;
  double peak_bandwidth;  // of the memory, bytes per second, as clock and width say; 0: not known
};

DeviceInfo device_info(const Driver& driver, int ordinal);

}  // namespace jax_mpk::cuda
