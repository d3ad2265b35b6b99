#include "cuda/driver.h"

#include <dlfcn.h>

#include <array>

namespace jax_mpk::cuda {

Driver::Driver(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw Failure(Failure::Kind::kTarget, std::string("no NVIDIA driver: ") + dlerror());
  }
#define X(name, symbol, parameters)                                                                        \
  name = reinterpret_cast<decltype(name)>(dlsym(handle, symbol));                                          \
  if (name == nullptr) throw Failure(Failure::Kind::kTarget, "the NVIDIA driver is too old: it has no " symbol);
  JAX_MPK_CUDA_FUNCTIONS(X)
#undef X
  check(cuInit(0), "cuInit");
}

std::string Driver::describe(CUresult result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &text);
  return std::string(name != nullptr ? name : "unknown error") + (text != nullptr ? std::string(": ") + text : "");
}

void Driver::check(CUresult result, const char* what) const {
  if (result == CUDA_SUCCESS) return;
  const bool memory = result == CUDA_ERROR_OUT_OF_MEMORY;
  throw Failure(memory ? Failure::Kind::kMemory : Failure::Kind::kLaunch,
                std::string(what) + " failed with " + describe(result));
}

int Driver::attribute(int attribute, CUdevice device) const {
  int value = 0;
  check(cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

std::string Driver::device_name(CUdevice device) const {
  std::array<char, 256> name = {};
  check(cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1, device), "cuDeviceGetName");
  return name.data();
}

ContextScope::ContextScope(const Driver& driver, CUcontext context) : driver_(driver) {
  driver_.check(driver_.cuCtxPushCurrent(context), "cuCtxPushCurrent");
}

ContextScope::~ContextScope() {
  CUcontext popped = nullptr;
  driver_.cuCtxPopCurrent(&popped);
}

DeviceInfo device_info(const Driver& driver, int ordinal) {
  CUdevice device = 0;
  driver.check(driver.cuDeviceGet(&device, ordinal), "cuDeviceGet");
  const auto get = [&](int attribute) { return driver.attribute(attribute, device); };
  // Two transfers a clock.
  const double bandwidth = 2e3 * get(CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE) *
                           get(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH) / 8;
  return {driver.device_name(device),
          get(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
          get(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
          get(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
          get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
          get(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE),
          bandwidth};
}

}  // namespace jax_mpk::cuda
