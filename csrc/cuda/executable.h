// Runs CUDA programs: what a program needs on a device, made before the first launch there and freed with it.
//
// An Executable belongs to one call site of one XLA executable and is shared by all devices and streams that run it.
// initialize() comes before every run of the call site and makes what is missing: the loaded module and the tables of
// a device, the state of a stream. launch() only launches, so it can be captured into a graph.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/driver.h"
#include "cuda/program.h"
#include "device/launch.cuh"

namespace jax_mpk::cuda {

class Executable;

// Settings of the process; see jax_mpk/config.py.
struct Settings {
  std::atomic<bool> sync{false};         // wait for every launch and raise its failure at once
  std::atomic<uint64_t> deadline_ns{0};  // of one wait; 0: none
};
Settings& settings();

// Time that modules and tables took to load so far.
std::atomic<uint64_t>& load_nanoseconds();

// What a program has on one device.
struct Module {
  CUcontext context = nullptr;
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  CUdeviceptr tables = 0;
};

// What a program has for one stream: memory that outlives launches, and where they report.
struct State {
  const Executable* owner = nullptr;
  const Module* module = nullptr;
  int32_t ordinal = 0;
  CUstream stream = nullptr;
  CUdeviceptr memory = 0;
  mpk::Record* record = nullptr;  // host memory
  CUdeviceptr device_record = 0;  // the same, for the device
  bool aborted = false;           // has to be zeroed before the next launch; guarded by the Runtime
};

// The driver, and all states: failures of launches are found here, whichever executable they belong to.
class Runtime {
 public:
  explicit Runtime(const std::string& library = "libcuda.so.1") : driver(library) {}

  // That of the process; opens the driver when it is first asked for. Throws Failure if there is none.
  static std::shared_ptr<Runtime> instance();
  // The same if it is open already, or null.
  static std::shared_ptr<Runtime> opened();

  // Throws the first failure that no one has seen yet among the launches on a device.
  void raise(int32_t ordinal);
  void raise(State& state);
  // Waits for everything on the streams of all states; returns the texts of all failures not seen yet.
  std::vector<std::string> check();

  void add(State& state);
  // Keeps its failure, if there is one, for raise() and check(). Not readable: its memory is gone.
  void remove(State& state, bool readable);
  // Whether a state has to be zeroed; from then on it counts as zeroed.
  bool take_aborted(State& state);

  const Driver driver;

 private:
  bool take(State& state, std::string* text);

  std::mutex mutex_;
  std::vector<State*> states_;
  std::vector<std::pair<int32_t, std::string>> left_behind_;  // failures of states that are gone, with the device
};

class Executable {
 public:
  // Without a runtime: that of the process, opened by the first initialize().
  explicit Executable(Program program, std::shared_ptr<Runtime> runtime = nullptr);
  ~Executable();
  Executable(const Executable&) = delete;
  Executable& operator=(const Executable&) = delete;

  const Program& program() const { return program_; }

  // Makes ready for launches of a run on this stream. Throws failures of earlier launches on the device, and where
  // the program cannot run there.
  void initialize(int32_t ordinal, CUstream stream);

  // Launches on the stream, which may be one that only captures: the state is then that of the stream that this
  // thread called initialize() for. Neither allocates nor waits for the device (unless settings().sync).
  void launch(int32_t ordinal, CUstream stream, std::span<void* const> buffers);

  // What a record means, in words.
  std::string describe(const mpk::Record& record) const;

 private:
  using Key = std::pair<int32_t, CUstream>;

  const Module& load(int32_t ordinal, CUstream stream);
  void check_fits(const DeviceInfo& device, int32_t ordinal) const;
  void set_up(Module& module, const DeviceInfo& device) const;
  State& make_state(const Module& module, int32_t ordinal, CUstream stream);
  void upload(CUdeviceptr to, const std::string* bytes, uint64_t size) const;
  void release(State& state) noexcept;
  void release(Module& module) const noexcept;
  State& find(int32_t ordinal, CUstream stream);

  const Program program_;
  std::shared_ptr<Runtime> runtime_;
  std::mutex mutex_;  // of what follows; taken before the Runtime's
  std::map<int32_t, std::unique_ptr<Module>> modules_;
  std::map<Key, std::unique_ptr<State>> states_;
};

}  // namespace jax_mpk::cuda
