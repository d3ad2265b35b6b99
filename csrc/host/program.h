// A decoded Program: what the CPU executor runs. The word stream is written by jax_mpk/codegen/encode.py.
//
// The executor walks `schedule`, keeps the event counters and calls run_task(); what a task computes is opaque
// to it (bodies.h). A Program is immutable once parsed and may be run by any number of threads and launches at
// the same time, each with a Memory per launch and a Scratch per OS thread.
//
// Denormals. XLA:CPU runs compiled code with flush-to-zero and denormals-are-zero set, and so must run_task:
// every thread that calls it needs MXCSR bits FTZ (0x8000) and DAZ (0x0040) set, round-to-nearest and all
// exceptions masked (FpEnvironment below does that and restores what was there). Conversions from and to f16
// keep f16 denormals in spite of these bits, as XLA's do; bodies also avoid libm calls that depend on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace jax_mpk::host {

// Changes whenever the meaning of a word does, here and in encode.py.
inline constexpr int64_t kProgramVersion = 3;

// Bytes that hold one value, or several that take turns.
struct Storage {
  enum class Kind : uint8_t { kInput, kOutput, kWorkspace };
  Kind kind;
  int32_t index;     // argument (kInput) or result (kOutput) number; -1 for workspace
  int32_t argument;  // kOutput: the donated argument whose buffer this is, or -1
  int64_t offset;    // first byte within the workspace; 0 for the other kinds
  int64_t nbytes;
  bool tagged = false;  // its elements carry tags; those of its one Array are the launch's
};

// A value, or accumulators, of which tasks read or write regions.
struct Array {
  int32_t value;  // number in the graph, for messages; -1 - k for accumulators k
  int32_t storage;
  int64_t item_bytes;
  std::vector<int64_t> extents;
  int64_t elements;
  int64_t first_tag = -1;  // where its tags begin among those of a launch, or -1: not tagged
};

// Boxes of arrays, in columns: task t has entries start[t] .. start[t + 1] of `array` and `row` (of
// Program::region_boxes).
struct Regions {
  std::vector<int32_t> start, array, row;
};

// One item of a schedule. Between two items, and between two rounds of a loop, lies a barrier of all workers.
struct ScheduleNode {
  enum class Kind : uint8_t { kSegment, kLoop, kBranch };
  using List = std::vector<ScheduleNode>;
  Kind kind;

  // kSegment: task ids in order, one queue per worker, and the number of this segment (0, 1, … in the order of
  // the word stream). Every task is in exactly one queue of one segment: its own worker's.
  int32_t segment = -1;
  std::vector<std::vector<int32_t>> queues;

  // kLoop: `cond` computes a b1 scalar in storage `predicate` that every worker reads before each round (first
  // byte, 0 or 1); or `predicate` is -1, `cond` is empty and `body` runs `trips` times.
  List cond, body;
  int32_t predicate = -1;
  int64_t trips = -1;

  // kBranch: the s32 in storage `index`, clamped to [0, arms.size()), picks the arm to run.
  int32_t index = -1;
  std::vector<List> arms;
};

struct Bodies;  // routines and boxes: bodies.h

struct Program {
  Program();
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  int32_t workers = 0;
  std::vector<Storage> storages;
  int64_t workspace_bytes = 0;  // one buffer for all storages of kind kWorkspace
  int64_t scratch_bytes = 0;    // what a Scratch for this program holds

  // Tasks, in columns. Task t waits for events wait_event[wait_start[t] .. wait_start[t + 1]) and adds one to
  // each of signal_event[signal_start[t] .. signal_start[t + 1]) when it has finished.
  std::vector<int32_t> task_routine, task_worker;
  std::vector<int32_t> wait_start, wait_event;
  std::vector<int32_t> signal_start, signal_event;

  // Per event: how many tasks signal it in one run of its segment (at least 1), and that segment. Tasks that
  // signal an event or wait for it are all in that segment; parse() refuses anything else.
  std::vector<int32_t> event_threshold, event_segment;

  // Tagged values. Task t starts when all elements of its tag_reads carry the tag of this run of its segment, and
  // then tags those of its writes that are of tagged arrays. All empty if nothing is tagged.
  std::vector<Array> arrays;
  int64_t tags = 0;  // of one launch
  int region_rank = 0;
  std::vector<int64_t> region_boxes;  // [rows][2][region_rank]; an array's axes are the first ones
  Regions tag_reads, writes;          // not empty, within their arrays

  ScheduleNode::List schedule;
  int32_t segments = 0;

  // What a routine computes, for error texts and profiles, e.g. "model.py:41 decode/layer_3 dot_general".
  std::vector<std::string> routine_label;

  std::unique_ptr<const Bodies> bodies;

  int32_t tasks() const { return static_cast<int32_t>(task_routine.size()); }
  int32_t events() const { return static_cast<int32_t>(event_threshold.size()); }

  // Decodes and checks everything a body relies on for memory safety. Throws std::runtime_error whose text says
  // what is wrong and at which word.
  static std::unique_ptr<Program> parse(std::span<const int64_t> words);
};

// The tag of the `sequence`-th run of a segment; never 0, so that zeroed memory carries none.
constexpr uint16_t tag_of(uint64_t sequence) { return static_cast<uint16_t>(1 + sequence % 65535); }

// Calls f(number in the box, offset in the array, count) for every run of consecutive elements of a region, from the
// element with number `from` on, until f returns false. Returns whether it never did.
template <class F>
bool for_each_run(const Program& program, const Array& array, int32_t row, int64_t from, const F& f) {
  const int64_t* low = &program.region_boxes[static_cast<size_t>(row) * 2 * static_cast<size_t>(program.region_rank)];
  const int64_t* high = low + program.region_rank;
  const size_t rank = array.extents.size();
  const int64_t length = rank > 0 ? high[rank - 1] - low[rank - 1] : 1;
  int64_t elements = 1;
  for (size_t d = 0; d < rank; ++d) elements *= high[d] - low[d];
  for (int64_t at = from; at < elements;) {
    int64_t rest = at, offset = 0, stride = 1;
    for (size_t d = rank; d-- > 0; stride *= array.extents[d]) {
      offset += (low[d] + rest % (high[d] - low[d])) * stride;
      rest /= high[d] - low[d];
    }
    const int64_t count = length - at % length;
    if (!f(at, offset, count)) return false;
    at += count;
  }
  return true;
}

// Where the storages lie in one launch: base[i] is storage i's first byte (Program::storages order), aligned to
// 16 bytes or more, nbytes long, or anything at all where nbytes is 0. Tasks never write storages of kind kInput.
struct Memory {
  std::byte* const* base = nullptr;
};

// Working memory of one OS thread: local values, accumulators, vector registers. Contents mean nothing between
// two tasks.
class Scratch {
 public:
  explicit Scratch(const Program& program);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::byte* data() const { return data_; }  // 64-byte aligned
  size_t size() const { return size_; }
  void poison();  // fills with 0xff, which reads as NaN, −1 and an invalid bool: for chaos mode

 private:
  std::byte* data_;
  size_t size_;
};

// Runs one task to its end. Thread safe for different tasks (each thread with its own Scratch). Throws
// std::runtime_error when a body finds a region that does not fit; a verified plan never does.
void run_task(const Program& program, int32_t task, const Memory& memory, Scratch& scratch);

// Sets the floating-point state that run_task needs and restores the caller's on destruction. One per thread
// around a whole launch, not per task: it costs a few tens of cycles.
class FpEnvironment {
 public:
  FpEnvironment();
  ~FpEnvironment();
  FpEnvironment(const FpEnvironment&) = delete;
  FpEnvironment& operator=(const FpEnvironment&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace jax_mpk::host
