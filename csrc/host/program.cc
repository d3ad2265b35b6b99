#include "host/program.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "host/bodies.h"
#include "host/decode.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace jax_mpk::host {
namespace {

constexpr int64_t kMagic = 0x6b706d5f78616a;  // "jax_mpk" in ASCII

class Parser {
 public:
  Parser(std::span<const int64_t> words, Program& program, Bodies& bodies)
      : reader_(words), program_(program), bodies_(bodies) {}

  void run() {
    header();
    symbols_ = decode_symbols(reader_);
    storages();
    const int64_t codes = reader_.count("number of codes", 8);
    for (int64_t i = 0; i < codes; ++i) bodies_.codes.push_back(decode_code(reader_, symbols_));
    const int64_t routines = reader_.count("number of routines", 3);
    for (int64_t i = 0; i < routines; ++i) {
      program_.routine_label.push_back(reader_.text("label of a routine"));
      bodies_.routines.push_back(decode_routine(reader_, symbols_, program_.storages, bodies_));
    }
    box_rows_ = boxes(bodies_.box_rank, bodies_.boxes);
    tasks();
    events();
    regions();
    placed_.assign(static_cast<size_t>(program_.tasks()), -1);
    program_.schedule = list(0);
    check_order();
    reader_.require(reader_.position() == reader_.total(), "words are left over");
    program_.scratch_bytes = bodies_.local_bytes + bodies_.tile_bytes + bodies_.walk_bytes + bodies_.sort_bytes;
  }

 private:
  void header() {
    reader_.require(reader_.any("magic number") == kMagic, "this is no program of jax_mpk");
    const int64_t version = reader_.any("version");
    if (version != kProgramVersion) {
      reader_.fail("it has version " + std::to_string(version) + ", this build reads version " +
                   std::to_string(kProgramVersion));
    }
    const int64_t total = reader_.any("length");
    if (total != static_cast<int64_t>(reader_.total())) {
      reader_.fail("it should have " + std::to_string(total) + " words and has " + std::to_string(reader_.total()));
    }
    program_.workers = reader_.in32(1, 1 << 20, "number of workers");
    program_.workspace_bytes = reader_.size("workspace size");
    bodies_.local_bytes = round_up(reader_.in(0, int64_t{1} << 40, "scratch size"), 64);
  }

  void storages() {
    const int64_t n = reader_.count("number of storages", 6);
    for (int64_t i = 0; i < n; ++i) {
      Storage s;
      s.kind = Storage::Kind(decode_word(reader_, symbols_, Word::kInput, Word::kWorkspace, "kind of a storage"));
      const bool workspace = s.kind == Storage::Kind::kWorkspace;
      s.index = reader_.in32(workspace ? -1 : 0, workspace ? -1 : INT32_MAX, "number of an argument or result");
      s.argument = reader_.in32(-1, s.kind == Storage::Kind::kOutput ? INT32_MAX : -1, "aliased argument");
      s.offset = reader_.in(0, workspace ? program_.workspace_bytes : 0, "offset of a storage");
      s.nbytes = reader_.in(0, workspace ? program_.workspace_bytes - s.offset : int64_t{1} << 60, "size of a storage");
      reader_.require(s.offset % 16 == 0, "a storage is not aligned to 16 bytes");
      s.tagged = reader_.flag("whether a storage is tagged");
      reader_.require(workspace || !s.tagged, "a tagged storage lies outside of the workspace");
      program_.storages.push_back(s);
    }
  }

  // Returns how many there are.
  int64_t boxes(int& rank, std::vector<int64_t>& boxes) {
    rank = reader_.in32(0, kMaxAxes, "rank of boxes");
    const bool wide = reader_.flag("width of boxes");
    const int64_t per_row = 2 * int64_t{rank};
    if (wide) {
      const int64_t rows = reader_.count("number of boxes", per_row);
      for (int64_t i = 0; i < rows * per_row; ++i) boxes.push_back(reader_.size("corner of a box"));
      return rows;
    }
    const int64_t rows = reader_.count("number of boxes", 0);
    const std::vector<int32_t> corners = reader_.packed(0, INT32_MAX, "corner of a box");
    reader_.require(static_cast<int64_t>(corners.size()) == rows * per_row, "boxes are incomplete");
    boxes.assign(corners.begin(), corners.end());
    return rows;
  }

  void tasks() {
    const int64_t routines = static_cast<int64_t>(bodies_.routines.size());
    program_.task_routine = reader_.packed(0, routines - 1, "routine of a task");
    program_.task_worker = reader_.packed(0, program_.workers - 1, "worker of a task");
    bodies_.task_box = reader_.packed(0, box_rows_ - 1, "box of a task");
    const size_t n = program_.task_routine.size();
    reader_.require(program_.task_worker.size() == n, "tasks have no worker each");
    bodies_.task_box_start.push_back(0);
    for (size_t t = 0; t < n; ++t) {
      const size_t members = bodies_.routines[program_.task_routine[t]].members.size();
      bodies_.task_box_start.push_back(bodies_.task_box_start.back() + static_cast<int32_t>(members));
      reader_.require(static_cast<size_t>(bodies_.task_box_start.back()) <= bodies_.task_box.size(), "tasks lack boxes");
      check_boxes(reader_, bodies_, bodies_.routines[program_.task_routine[t]], static_cast<int32_t>(t));
    }
    reader_.require(static_cast<size_t>(bodies_.task_box_start.back()) == bodies_.task_box.size(),
                    "boxes belong to no task");
  }

  void csr(std::vector<int32_t>& start, std::vector<int32_t>& items, int64_t limit, std::string_view what) {
    start = reader_.packed(0, INT32_MAX, what);
    items = reader_.packed(0, limit - 1, what);
    const bool fits = start.size() == program_.task_routine.size() + 1 && start.front() == 0 &&
                      std::is_sorted(start.begin(), start.end()) && static_cast<size_t>(start.back()) == items.size();
    if (!fits) reader_.fail(std::string(what) + " do not fit the tasks");
  }

  void events() {
    events_ = reader_.in32(0, INT32_MAX - 1, "number of events");
    csr(program_.wait_start, program_.wait_event, events_, "waits");
    csr(program_.signal_start, program_.signal_event, events_, "signals");
    // Every event has a signal, which also bounds their number.
    reader_.require(static_cast<size_t>(events_) <= program_.signal_event.size(), "an event is never signalled");
    program_.event_threshold.assign(static_cast<size_t>(events_), 0);
    program_.event_segment.assign(static_cast<size_t>(events_), -1);
    for (int32_t e : program_.signal_event) ++program_.event_threshold[e];
    for (int32_t threshold : program_.event_threshold) reader_.require(threshold > 0, "an event is never signalled");
  }

  void regions() {
    const int64_t n = reader_.count("number of arrays", 4);
    if (n == 0) return;
    std::vector<bool> has_tags(program_.storages.size());
    for (int64_t i = 0; i < n; ++i) {
      Array a;
      a.value = reader_.in32(INT32_MIN, INT32_MAX, "value of an array");
      a.storage = reader_.in32(0, static_cast<int64_t>(program_.storages.size()) - 1, "storage of an array");
      a.item_bytes = reader_.in(1, 16, "size of an element");
      const int64_t rank = reader_.in(0, kMaxAxes, "rank of an array");
      a.elements = 1;
      const Storage& storage = program_.storages[a.storage];
      for (int64_t d = 0; d < rank; ++d) {
        a.extents.push_back(reader_.in(0, storage.nbytes, "extent of an array"));
        reader_.require(a.elements <= storage.nbytes / a.item_bytes / std::max<int64_t>(a.extents.back(), 1),
                        "an array is larger than its storage");
        a.elements *= a.extents.back();
      }
      reader_.require(a.elements <= storage.nbytes / a.item_bytes, "an array is larger than its storage");
      if (storage.tagged) {
        reader_.require(!has_tags[a.storage], "two arrays share a tagged storage");
        has_tags[a.storage] = true;
        a.first_tag = program_.tags;
        program_.tags += a.elements;
      }
      program_.arrays.push_back(std::move(a));
    }
    const int64_t rows = boxes(program_.region_rank, program_.region_boxes);
    regions(program_.tag_reads, rows, "tagged reads");
    regions(program_.writes, rows, "writes");
    for (int32_t a : program_.tag_reads.array) {
      reader_.require(program_.arrays[a].first_tag >= 0, "a task waits for tags of an array that has none");
    }
    for (int32_t a : program_.writes.array) {
      const Storage& storage = program_.storages[program_.arrays[a].storage];
      reader_.require(storage.kind != Storage::Kind::kInput, "a task writes an argument");
    }
  }

  void regions(Regions& out, int64_t rows, std::string_view what) {
    csr(out.start, out.array, static_cast<int64_t>(program_.arrays.size()), what);
    out.row = reader_.packed(0, rows - 1, what);
    reader_.require(out.row.size() == out.array.size(), "regions have no box each");
    for (size_t i = 0; i < out.row.size(); ++i) {
      const std::vector<int64_t>& extents = program_.arrays[out.array[i]].extents;
      reader_.require(extents.size() <= static_cast<size_t>(program_.region_rank), "boxes have fewer axes than an array");
      const size_t at = static_cast<size_t>(out.row[i]) * 2 * static_cast<size_t>(program_.region_rank);
      for (size_t d = 0; d < extents.size(); ++d) {
        const int64_t low = program_.region_boxes[at + d];
        const int64_t high = program_.region_boxes[at + static_cast<size_t>(program_.region_rank) + d];
        reader_.require(low >= 0 && low < high && high <= extents[d], "a region is empty or lies outside of its array");
      }
    }
  }

  int32_t scalar(std::string_view what, int64_t bytes) {
    const int32_t storage = reader_.in32(0, static_cast<int64_t>(program_.storages.size()) - 1, what);
    if (program_.storages[storage].nbytes < bytes) reader_.fail(std::string(what) + " is in a storage without bytes");
    return storage;
  }

  ScheduleNode::List list(int depth) {
    reader_.require(depth < 64, "schedules are nested too deeply");
    const int64_t n = reader_.count("length of a schedule", 2);
    ScheduleNode::List out;
    for (int64_t i = 0; i < n; ++i) out.push_back(node(depth));
    return out;
  }

  ScheduleNode node(int depth) {
    ScheduleNode out;
    out.kind = ScheduleNode::Kind(decode_word(reader_, symbols_, Word::kSegment, Word::kBranch, "kind of a schedule item"));
    switch (out.kind) {
      case ScheduleNode::Kind::kSegment: segment(out); break;
      case ScheduleNode::Kind::kLoop: {
        const bool counted = reader_.flag("whether a loop is counted");
        if (counted) {
          out.trips = reader_.size("rounds of a loop");
        } else {
          out.predicate = scalar("predicate of a loop", 1);
          out.cond = list(depth + 1);
        }
        out.body = list(depth + 1);
        break;
      }
      case ScheduleNode::Kind::kBranch: {
        out.index = scalar("index of a branch", 4);
        const int64_t arms = reader_.count("number of arms");
        reader_.require(arms > 0, "a branch without arms");
        for (int64_t i = 0; i < arms; ++i) out.arms.push_back(list(depth + 1));
      }
    }
    return out;
  }

  void segment(ScheduleNode& out) {
    out.segment = program_.segments++;
    for (int32_t w = 0; w < program_.workers; ++w) {
      out.queues.push_back(reader_.packed(0, program_.tasks() - 1, "task of a queue"));
      for (int32_t t : out.queues.back()) {
        if (program_.task_worker[t] != w) reader_.fail("task " + std::to_string(t) + " is in another worker's queue");
        if (placed_[t] >= 0) reader_.fail("task " + std::to_string(t) + " is in two queues");
        placed_[t] = out.segment;
      }
    }
  }

  // Every task is somewhere, and events do not cross segments.
  void check_order() {
    for (int32_t t = 0; t < program_.tasks(); ++t) {
      if (placed_[t] < 0) reader_.fail("task " + std::to_string(t) + " is in no queue");
      for (int32_t i = program_.signal_start[t]; i < program_.signal_start[t + 1]; ++i) {
        int32_t& segment = program_.event_segment[program_.signal_event[i]];
        if (segment >= 0 && segment != placed_[t]) crossing(t, program_.signal_event[i]);
        segment = placed_[t];
      }
    }
    for (int32_t t = 0; t < program_.tasks(); ++t) {
      for (int32_t i = program_.wait_start[t]; i < program_.wait_start[t + 1]; ++i) {
        if (program_.event_segment[program_.wait_event[i]] != placed_[t]) crossing(t, program_.wait_event[i]);
      }
    }
  }
  void crossing(int32_t task, int32_t event) {
    reader_.fail("task " + std::to_string(task) + " of segment " + std::to_string(placed_[task]) + " uses event " +
                 std::to_string(event) + " of another segment");
  }

  WordReader reader_;
  Program& program_;
  Bodies& bodies_;
  std::vector<Symbol> symbols_;
  std::vector<int32_t> placed_;  // segment of each task
  int64_t box_rows_ = 0;
  int32_t events_ = 0;
};

}  // namespace

Program::Program() = default;
Program::~Program() = default;

std::unique_ptr<Program> Program::parse(std::span<const int64_t> words) {
  auto program = std::make_unique<Program>();
  auto bodies = std::make_unique<Bodies>();
  Parser(words, *program, *bodies).run();
  program->bodies = std::move(bodies);
  return program;
}

Scratch::Scratch(const Program& program) : size_(static_cast<size_t>(round_up(program.scratch_bytes, 64) + 64)) {
  data_ = static_cast<std::byte*>(::operator new(size_, std::align_val_t(64)));
}
Scratch::~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
void Scratch::poison() { std::memset(data_, 0xff, size_); }

Operand Context::resolve(const Tensor& tensor) const {
  if (!tensor.local) return {memory.base[tensor.id], 0, tensor.elements};
  const Local& local = routine.locals[tensor.id];
  const int64_t* origin = low(local.producer);
  int64_t first = 0;
  for (int d = 0; d < local.rank; ++d) first += origin[d] * local.strides[d];
  return {locals() + local.offset - first * bytes_of(tensor.type), first, first + local.elements};
}

void Context::strides(const Tensor& tensor, int64_t* out) const {
  if (tensor.local) {
    const Local& local = routine.locals[tensor.id];
    std::copy(local.strides, local.strides + local.rank, out);
    return;
  }
  int64_t stride = 1;
  for (int d = tensor.rank - 1; d >= 0; --d) out[d] = stride, stride *= tensor.dims[d];
}

void run_task(const Program& program, int32_t task, const Memory& memory, Scratch& scratch) {
  const Bodies& bodies = *program.bodies;
  const Routine& routine = bodies.routines[program.task_routine[task]];
  const Context context{program, bodies, routine, memory, scratch, &bodies.task_box[bodies.task_box_start[task]]};
  for (int m = 0; m < static_cast<int>(routine.members.size()); ++m) {
    switch (routine.members[m].kind) {
      case Member::Kind::kMap: run_map(context, m); break;
      case Member::Kind::kReduce: run_reduce(context, m); break;
      case Member::Kind::kContract: run_contract(context, m); break;
      case Member::Kind::kUpdate: run_update(context, m); break;
      case Member::Kind::kCumulative: run_cumulative(context, m); break;
      case Member::Kind::kSort: run_sort(context, m); break;
    }
  }
}

FpEnvironment::FpEnvironment() : saved_(0) {
#if defined(__x86_64__)
  saved_ = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8040);  // all exceptions masked, to nearest; flush to zero, denormals are zero
#elif defined(__aarch64__)
  __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
  __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{1} << 24));
#endif
}

FpEnvironment::~FpEnvironment() {
#if defined(__x86_64__)
  _mm_setcsr(static_cast<unsigned>(saved_));
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(saved_));
#endif
}

}  // namespace jax_mpk::host
