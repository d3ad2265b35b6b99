// Runs a Program: virtual SMs as resumable queues, stepped by however many OS threads there are.
//
// Each worker of the Program follows the whole schedule: it runs its tasks in order, waits for events, meets the
// other workers at barriers and reads loop predicates and branch indices for itself, as an SM would. A worker
// that has to wait is put aside (its position is a stack of schedule frames) and the thread turns to another, so
// any number of workers needs one thread only, and "nobody can move" is seen at once as a deadlock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "host/program.h"

namespace jax_mpk::host {

// A buffer of the caller's, in the order of the custom call's operands or results.
struct Buffer {
  std::byte* data;
  int64_t nbytes;
};

struct LaunchOptions {
  // Chaos mode: a ready worker is chosen at random and runs one task at a time; workspace, results and scratch
  // memory start as garbage; in a program with tagged values, plain stores reach the other workers late, up to the
  // next signal or barrier of theirs. Same seed and one thread: same interleaving.
  std::optional<uint64_t> chaos_seed;
  // A task that is put off for as long as anything else can run, or -1: shows what does not wait for it.
  int32_t held_task = -1;
  // A task whose plain stores, and its worker's later ones, the other workers do not see for as long as anything
  // else can run, or -1: shows what takes a tag of that worker for more than it is. For programs with tagged values.
  int32_t held_stores = -1;
  // Upper bound on the threads that work on this launch, the caller's included.
  int32_t max_threads = 1 << 30;
};

// How a launch ended.
struct Outcome {
  enum class Kind { kOk, kDeadlock, kFailed };
  Kind kind = Kind::kOk;
  std::string message;  // what went wrong; "" for kOk
  // kDeadlock: the first worker that waits for an event, or for the tag of an element of a value, or -1 where all
  // wait at barriers.
  int32_t worker = -1, task = -1, event = -1, value = -1;
  int64_t element = -1;
  uint64_t expected = 0, seen = 0;
};

// A Program and what its launches reuse. Thread safe: any number of launches may run at the same time.
class Executable : public std::enable_shared_from_this<Executable> {
 public:
  explicit Executable(std::unique_ptr<const Program> program);

  const Program& program() const { return *program_; }
  // Results that launch() expects: those of the function, then the workspace if there is any.
  int32_t results() const { return results_; }

  // Runs the program once. Every buffer must stay where it is until launch() returns.
  Outcome launch(std::span<const Buffer> arguments, std::span<const Buffer> results, const LaunchOptions& options);

 private:
  friend class Launch;
  std::unique_ptr<Scratch> take_scratch();
  void give_scratch(std::unique_ptr<Scratch> scratch);

  const std::unique_ptr<const Program> program_;
  int32_t arguments_ = 0;     // highest argument number used + 1
  int32_t results_ = 0;
  int32_t busy_workers_ = 0;  // workers that have any task
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> scratch_;
};

}  // namespace jax_mpk::host
