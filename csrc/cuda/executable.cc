#include "cuda/executable.h"

#include <chrono>

namespace jax_mpk::cuda {

namespace {

// The stream whose run this thread prepared last. XLA captures a call on a stream of its own that no initialize()
// has seen; the captured launch belongs to the run that the thread is preparing or executing.
thread_local std::pair<int32_t, CUstream> prepared{-1, nullptr};

[[noreturn]] void refuse(const std::string& why) { throw Failure(Failure::Kind::kTarget, why); }

std::string number(uint64_t n) { return std::to_string(n); }

// "sm_90a" of compute capability 9.0; what the letter stands for is never part of the number.
std::string arch_number(const std::string& arch) {
  return arch.substr(0, arch.find_last_of("0123456789") + 1);
}

}  // namespace

Executable::Executable(Program program, std::shared_ptr<Runtime> runtime)
    : program_(std::move(program)), runtime_(std::move(runtime)) {}

Executable::~Executable() {
  for (auto& [key, state] : states_) release(*state);
  for (auto& [ordinal, module] : modules_) release(*module);
}

void Executable::initialize(int32_t ordinal, CUstream stream) {
  State* state = nullptr;
  {
    const std::lock_guard lock(mutex_);
    if (runtime_ == nullptr) runtime_ = Runtime::instance();
    runtime_->raise(ordinal);
    const auto found = states_.find({ordinal, stream});
    state = found != states_.end() ? found->second.get() : &make_state(load(ordinal, stream), ordinal, stream);
  }
  prepared = {ordinal, stream};
  if (runtime_->take_aborted(*state)) {
    // On the stream: behind the launch that gave up, and before the next one.
    const Driver& driver = runtime_->driver;
    const ContextScope scope(driver, state->module->context);
    driver.check(driver.cuMemsetD8Async(state->memory, 0, program_.state_bytes, stream), "cuMemsetD8Async");
  }
}

void Executable::launch(int32_t ordinal, CUstream stream, std::span<void* const> buffers) {
  if (buffers.size() != program_.buffers()) {
    throw Failure(Failure::Kind::kProgram, "the call has " + number(buffers.size()) + " buffers, the program " +
                                               number(program_.buffers()));
  }
  State& state = find(ordinal, stream);
  const Driver& driver = runtime_->driver;
  const ContextScope scope(driver, state.module->context);
  // An mpk::Launch with as many buffers as there are.
  std::vector<uint64_t> launch = {state.module->tables, state.memory, state.device_record,
                                  settings().deadline_ns.load(std::memory_order_relaxed)};
  for (void* buffer : buffers) launch.push_back(reinterpret_cast<uintptr_t>(buffer));
  void* parameters[] = {launch.data()};
  driver.check(driver.cuLaunchCooperativeKernel(state.module->function, program_.workers, 1, 1, program_.threads, 1, 1,
                                                program_.shared_bytes, stream, parameters),
               "cuLaunchCooperativeKernel");
  if (!settings().sync.load(std::memory_order_relaxed)) return;
  int capturing = 0;
  driver.check(driver.cuStreamIsCapturing(stream, &capturing), "cuStreamIsCapturing");
  if (capturing != 0) return;
  driver.check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize");
  runtime_->raise(state);
}

State& Executable::find(int32_t ordinal, CUstream stream) {
  const std::lock_guard lock(mutex_);
  auto found = states_.find({ordinal, stream});
  if (found == states_.end() && prepared.first == ordinal) found = states_.find(prepared);
  if (found == states_.end()) throw Failure(Failure::Kind::kLaunch, "the stream was not prepared for launches");
  return *found->second;
}

const Module& Executable::load(int32_t ordinal, CUstream stream) {
  const auto found = modules_.find(ordinal);
  if (found != modules_.end()) return *found->second;
  const auto begin = std::chrono::steady_clock::now();
  const Driver& driver = runtime_->driver;
  auto module = std::make_unique<Module>();
  driver.check(driver.cuStreamGetCtx(stream, &module->context), "cuStreamGetCtx");
  const ContextScope scope(driver, module->context);
  CUdevice device = 0;
  driver.check(driver.cuCtxGetDevice(&device), "cuCtxGetDevice");
  const DeviceInfo info = device_info(driver, device);
  check_fits(info, device);
  try {
    set_up(*module, info);
  } catch (...) {
    release(*module);
    throw;
  }
  load_nanoseconds() += std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count();
  return *modules_.emplace(ordinal, std::move(module)).first->second;
}

// Refuses what needs no module to be seen.
void Executable::check_fits(const DeviceInfo& device, int32_t ordinal) const {
  const std::string planned = "; plan for this device (target=None) or run it where it was planned for";
  if (const std::string arch = "sm_" + number(device.major * 10 + device.minor); arch != arch_number(program_.arch)) {
    refuse("the program is for " + program_.arch + ", and " + device.name + " is " + arch + planned);
  }
  if (program_.workers > static_cast<uint32_t>(device.multiprocessors)) {
    refuse("the program is planned for " + number(program_.workers) + " SMs, and " + device.name + " has " +
           number(device.multiprocessors) + planned);
  }
  if (program_.shared_bytes > device.shared_bytes) {
    refuse("the program needs " + number(program_.shared_bytes) + " bytes of shared memory per SM, and " +
           device.name + " has " + number(device.shared_bytes) + planned);
  }
  if (runtime_->driver.attribute(CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, ordinal) == 0) {
    refuse(device.name + " has no cooperative launches, so nothing keeps all workers of a kernel running at a time");
  }
}

void Executable::set_up(Module& module, const DeviceInfo& device) const {
  const Driver& driver = runtime_->driver;
  if (const CUresult loaded = driver.cuModuleLoadData(&module.module, program_.cubin.data()); loaded != CUDA_SUCCESS) {
    int version = 0;
    driver.cuDriverGetVersion(&version);
    const std::string cuda = number(version / 1000) + "." + number(version % 1000 / 10);
    driver.check(loaded, ("loading a kernel into a driver of CUDA " + cuda +
                          ", which takes kernels of compilers up to that major version,").c_str());
  }
  driver.check(driver.cuModuleGetFunction(&module.function, module.module, program_.entry.c_str()),
               "cuModuleGetFunction");
  const auto get = [&](int attribute) {
    int value = 0;
    driver.check(driver.cuFuncGetAttribute(&value, attribute, module.function), "cuFuncGetAttribute");
    return value;
  };
  const std::string needs = "the kernel has " + number(program_.threads) + " threads with " +
                            number(get(CU_FUNC_ATTRIBUTE_NUM_REGS)) + " registers each, " +
                            number(get(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)) + " + " + number(program_.shared_bytes) +
                            " bytes of shared memory";
  if (program_.threads > static_cast<uint32_t>(get(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK))) {
    refuse(needs + ": more threads than an SM of " + device.name + " runs with so many registers");
  }
  driver.check(driver.cuFuncSetAttribute(module.function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                         static_cast<int>(program_.shared_bytes)),
               "cuFuncSetAttribute");
  int per_sm = 0;
  driver.check(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                   &per_sm, module.function, static_cast<int>(program_.threads), program_.shared_bytes),
               "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  if (per_sm < 1) refuse(needs + ": an SM of " + device.name + " cannot hold one worker");
  if (!program_.tables.empty()) {
    driver.check(driver.cuMemAlloc(&module.tables, program_.tables.size()), "allocating a program's tables");
    upload(module.tables, &program_.tables, program_.tables.size());
  }
}

State& Executable::make_state(const Module& module, int32_t ordinal, CUstream stream) {
  const Driver& driver = runtime_->driver;
  const ContextScope scope(driver, module.context);
  auto state = std::make_unique<State>();
  state->owner = this;
  state->module = &module;
  state->ordinal = ordinal;
  state->stream = stream;
  try {
    driver.check(driver.cuMemAlloc(&state->memory, program_.state_bytes), "allocating a kernel's state");
    upload(state->memory, nullptr, program_.state_bytes);
    void* record = nullptr;
    driver.check(driver.cuMemHostAlloc(&record, sizeof(mpk::Record),
                                       CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
                 "cuMemHostAlloc");
    state->record = new (record) mpk::Record{};
    driver.check(driver.cuMemHostGetDevicePointer(&state->device_record, record, 0), "cuMemHostGetDevicePointer");
  } catch (...) {
    if (state->memory != 0) driver.cuMemFree(state->memory);
    if (state->record != nullptr) driver.cuMemFreeHost(state->record);
    throw;
  }
  runtime_->add(*state);
  return *states_.emplace(Key{ordinal, stream}, std::move(state)).first->second;
}

// Writes bytes, or zeros, and waits until they are there: other streams will use them too. On a stream of its own, so
// that it need not wait for whatever XLA's streams have to do.
void Executable::upload(CUdeviceptr to, const std::string* bytes, uint64_t size) const {
  const Driver& driver = runtime_->driver;
  CUstream stream = nullptr;
  driver.check(driver.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
  CUresult result = bytes != nullptr ? driver.cuMemcpyHtoDAsync(to, bytes->data(), size, stream)
                                     : driver.cuMemsetD8Async(to, 0, size, stream);
  if (result == CUDA_SUCCESS) result = driver.cuStreamSynchronize(stream);
  driver.cuStreamDestroy(stream);
  driver.check(result, "writing to device memory");
}

// Errors have nobody to go to from here. Where the context is gone (the process ends), so is what was in it.
void Executable::release(State& state) noexcept {
  const Driver& driver = runtime_->driver;
  const bool alive = driver.cuCtxPushCurrent(state.module->context) == CUDA_SUCCESS;
  // The stream itself may be gone; its launches are over when the context is idle.
  if (alive) driver.cuCtxSynchronize();
  runtime_->remove(state, alive);
  if (!alive) return;
  driver.cuMemFree(state.memory);
  driver.cuMemFreeHost(state.record);
  CUcontext popped = nullptr;
  driver.cuCtxPopCurrent(&popped);
}

void Executable::release(Module& module) const noexcept {
  const Driver& driver = runtime_->driver;
  if (driver.cuCtxPushCurrent(module.context) != CUDA_SUCCESS) return;
  if (module.tables != 0) driver.cuMemFree(module.tables);
  if (module.module != nullptr) driver.cuModuleUnload(module.module);
  driver.cuCtxPopCurrent(&module.context);
}

std::string Executable::describe(const mpk::Record& record) const {
  const std::string task =
      record.task == mpk::kNoTask ? "between tasks" : "at task " + number(record.task) + program_.label(record.task);
  std::string what;
  switch (record.kind) {
    case mpk::kWaitEvent:
      what = "event " + number(record.what);
      break;
    case mpk::kWaitTag:
      what = "tag of value " + program_.value(record.what) + "[" + number(record.element) + "]";
      break;
    case mpk::kWaitBulkLoad:
      what = "bulk load " + number(record.what);
      break;
    case mpk::kWaitBarrier:
      what = "barrier " + number(record.what);
      break;
    case mpk::kWaitPredicate:
      what = "predicate or branch index " + number(record.what);
      break;
    default:
      what = "wait of kind " + number(record.kind) + ", " + number(record.what);
  }
  return "a wait passed its deadline (JAX_MPK_DEADLINE_MS): SM " + number(record.worker) + " " + task +
         ", " + what + ": expected " + number(record.expected) + ", seen " + number(record.seen) + "; the results of that launch are NaN, or the least value of their type";
}

}  // namespace jax_mpk::cuda
