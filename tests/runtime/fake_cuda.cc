// A stand-in for libcuda.so.1: writes every call down, and does with ordinary memory what the driver does with a
// device's. A launch runs on the spot. It does what the first word of the tables says.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mutex>
#include <string>

#include "device/launch.cuh"

namespace {

std::mutex mutex;
std::string calls;
long long live_bytes = 0;
int live_modules = 0;

// What a test sets beforehand.
struct Device {
  int major = 9, minor = 0, multiprocessors = 132, shared_bytes = 232448, cooperative = 1;
  int occupancy = 1, unreadable = 0, max_threads = 1024, capturing = 0;
  long long memory = 1ll << 40;
} device;

void note(const std::string& call) {
  const std::lock_guard<std::mutex> lock(mutex);
  calls += call + "\n";
}

// Each block knows its size.
uint64_t* allocate(size_t size) {
  auto* block = static_cast<uint64_t*>(malloc(size + 256));
  block[0] = size;
  memset(block + 2, 0xab, size);  // nothing is zero by itself
  live_bytes += static_cast<long long>(size);
  return block + 2;
}

void release(void* memory) {
  auto* block = static_cast<uint64_t*>(memory) - 2;
  live_bytes -= static_cast<long long>(block[0]);
  memset(memory, 0xcd, block[0]);
  free(block);
}

std::string text(uint64_t n) { return std::to_string(n); }

}  // namespace

extern "C" {

const char* fake_calls() { return calls.c_str(); }
void fake_forget() { calls.clear(); }
long long fake_live_bytes() { return live_bytes; }
int fake_live_modules() { return live_modules; }
void fake_reset() { device = Device(); }
void fake_set(const char* name, long long value) {
  const std::string field = name;
  if (field == "minor") device.minor = static_cast<int>(value);
  if (field == "multiprocessors") device.multiprocessors = static_cast<int>(value);
  if (field == "shared_bytes") device.shared_bytes = static_cast<int>(value);
  if (field == "cooperative") device.cooperative = static_cast<int>(value);
  if (field == "occupancy") device.occupancy = static_cast<int>(value);
  if (field == "max_threads") device.max_threads = static_cast<int>(value);
  if (field == "unreadable") device.unreadable = static_cast<int>(value);
  if (field == "capturing") device.capturing = static_cast<int>(value);
  if (field == "memory") device.memory = value;
}

int cuInit(unsigned) { return 0; }
int cuGetErrorName(int error, const char** name) {
  *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN";
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "as the driver says";
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = 12040;
  return 0;
}
int cuDeviceGet(int* out, int ordinal) {
  *out = ordinal;
  return 0;
}
int cuDeviceGetName(char* name, int size, int) {
  snprintf(name, static_cast<size_t>(size), "Fake GPU");
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16: *value = device.multiprocessors; break;
    case 36: *value = 2619000; break;
    case 37: *value = 5120; break;
    case 38: *value = 50 << 20; break;
    case 75: *value = device.major; break;
    case 76: *value = device.minor; break;
    case 95: *value = device.cooperative; break;
    case 97: *value = device.shared_bytes; break;
    default: return 1;
  }
  return 0;
}
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void** context) {
  *context = nullptr;
  return 0;
}
int cuCtxGetDevice(int* out) {
  *out = 0;
  return 0;
}
int cuCtxSynchronize() {
  note("synchronize context");
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  if (device.unreadable) return 222;
  note("load " + std::string(static_cast<const char*>(image)));
  ++live_modules;
  *module = &device;
  return 0;
}
int cuModuleUnload(void*) {
  note("unload");
  --live_modules;
  return 0;
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  note("function " + std::string(name));
  *function = &device;
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void*) {
  *value = attribute == 0 ? device.max_threads : attribute == 4 ? 168 : 1024;
  return 0;
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  note("attribute " + text(attribute) + " = " + text(value));
  return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
  *blocks = device.occupancy;
  return 0;
}
int cuLaunchCooperativeKernel(void*, unsigned x, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                              unsigned shared, void* stream, void** parameters) {
  note("launch " + text(x) + "x" + text(threads) + " shared " + text(shared) + " stream " +
       text(reinterpret_cast<uintptr_t>(stream)));
  const auto* launch = static_cast<const mpk::Launch<2>*>(parameters[0]);
  auto* header = static_cast<mpk::StateHeader*>(launch->state);
  const auto* in = static_cast<const uint32_t*>(launch->buffers[0]);
  auto* out = static_cast<uint32_t*>(launch->buffers[1]);
  // Results: the argument, launches so far, the deadline; or poison.
  if (header->abort == 0 && in[0] == 0) {  // the argument asks for a failure
    header->abort = 1;
    mpk::Record* record = launch->record;
    *record = {0, 17, 120, in[1], 5, 132, 131, 0, 7};
    record->set = 1;
  }
  if (header->abort != 0) {
    out[0] = 0xffffffffu;
    return 0;
  }
  out[0] = in[0];
  out[1] = static_cast<uint32_t>(header->launches++);
  out[2] = static_cast<uint32_t>(launch->deadline_ns);
  out[3] = launch->tables[0];
  return 0;
}
int cuMemAlloc_v2(unsigned long long* memory, size_t size) {
  note("allocate " + text(size));
  if (live_bytes + static_cast<long long>(size) > device.memory) return 2;
  *memory = reinterpret_cast<uintptr_t>(allocate(size));
  return 0;
}
int cuMemFree_v2(unsigned long long memory) {
  note("free");
  release(reinterpret_cast<void*>(memory));
  return 0;
}
int cuMemHostAlloc(void** memory, size_t size, unsigned flags) {
  note("allocate host " + text(flags));
  *memory = allocate(size);
  return 0;
}
int cuMemFreeHost(void* memory) {
  note("free host");
  release(memory);
  return 0;
}
int cuMemHostGetDevicePointer_v2(unsigned long long* out, void* memory, unsigned) {
  *out = reinterpret_cast<uintptr_t>(memory);
  return 0;
}
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t size, void*) {
  note("upload " + text(size));
  memcpy(reinterpret_cast<void*>(to), from, size);
  return 0;
}
int cuMemsetD8Async(unsigned long long to, unsigned char value, size_t size, void* stream) {
  note("fill " + text(size) + " stream " + text(reinterpret_cast<uintptr_t>(stream)));
  memset(reinterpret_cast<void*>(to), value, size);
  return 0;
}
int cuStreamCreate(void** stream, unsigned flags) {
  note("create stream " + text(flags));
  *stream = reinterpret_cast<void*>(999);
  return 0;
}
int cuStreamDestroy_v2(void* stream) {
  note("destroy stream " + text(reinterpret_cast<uintptr_t>(stream)));
  return 0;
}
int cuStreamGetCtx(void*, void** context) {
  *context = &device;
  return 0;
}
int cuStreamIsCapturing(void*, int* status) {
  *status = device.capturing;
  return 0;
}
int cuStreamSynchronize(void* stream) {
  note("synchronize stream " + text(reinterpret_cast<uintptr_t>(stream)));
  return 0;
}

}  // extern "C"
