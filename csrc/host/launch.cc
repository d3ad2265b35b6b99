#include "host/launch.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <utility>

namespace jax_mpk::host {
namespace {

// A thread that finds nothing ready this often in a row checks whether anybody can move at all.
constexpr uint32_t kIdleStepsBeforeCheck = 16;
constexpr int kUnlimited = 1 << 30;
constexpr size_t kWorkersInMessage = 8;

}  // namespace

class Launch::Seat final : public Job::Seat {
 public:
  Seat(Launch& launch, int index)
      : random(launch.options_.chaos_seed.value_or(0) ^ (0xd1342543de82ef95u * static_cast<uint64_t>(index))),
        executable_(launch.executable_), scratch_(executable_->take_scratch()) {
    const int seats = launch.seats_;
    const int64_t workers = launch.workers_count_;
    const int place = std::min(index, seats - 1);
    first = static_cast<int32_t>(workers * place / seats);
    own = static_cast<int32_t>(workers * (place + 1) / seats) - first;
  }
  ~Seat() override { executable_->give_scratch(std::move(scratch_)); }

  Scratch& scratch() { return *scratch_; }

  int32_t first, own;  // workers this thread prefers: caches stay warm
  uint32_t idle = 0;
  Random random;

 private:
  std::shared_ptr<Executable> executable_;
  std::unique_ptr<Scratch> scratch_;
};

Launch::Launch(std::shared_ptr<Executable> executable, std::vector<std::byte*> base, const LaunchOptions& options,
               int helpers)
    : Job(helpers), executable_(std::move(executable)), program_(executable_->program()), base_(std::move(base)),
      options_(options), workers_count_(program_.workers), seats_(helpers + 1),
      workers_(new Worker[static_cast<size_t>(workers_count_)]),
      events_(new Counter[static_cast<size_t>(program_.events())]()),
      tags_(new Tag[static_cast<size_t>(program_.tags)]()) {
  for (int32_t i = 0; i < workers_count_; ++i) {
    Worker& worker = workers_[i];
    worker.index = i;
    worker.segment_runs.resize(static_cast<size_t>(program_.segments));
    worker.frames.push_back({&program_.schedule, nullptr, 0, 0, Frame::Role::kTop});
    start_list(worker);
  }
}

std::unique_ptr<Job::Seat> Launch::sit(int index) { return std::make_unique<Seat>(*this, index); }

// --- Threads -----------------------------------------------------------------------------------------------

Job::Step Launch::step(Job::Seat& job_seat) {
  Seat& seat = static_cast<Seat&>(job_seat);
  if (finished()) return Step::kFinished;
  const bool chaos = options_.chaos_seed.has_value();
  const Step result = chaos ? step_at_random(seat) : step_in_order(seat);
  if (result != Step::kIdle) {
    seat.idle = 0;
  } else if (++seat.idle % kIdleStepsBeforeCheck == 0 && resolve_standstill()) {
    ThreadPool::wake();
    return Step::kProgress;
  }
  return result;
}

Job::Step Launch::step_in_order(Seat& seat) {
  bool moved = false;
  for (int32_t i = 0; i < workers_count_; ++i) {
    int32_t w = seat.first + i;
    if (w >= workers_count_) w -= workers_count_;
    Worker& worker = workers_[w];
    if (!looks_ready(worker) || !try_claim(worker)) continue;
    // Work of other threads' workers is taken one task at a time: their threads may come, and ours get ready.
    const bool own = i < seat.own;
    const bool moved_now = advance(worker, seat, own ? kUnlimited : 1);
    release(worker);
    moved |= moved_now;
    if (moved_now && !own) break;
  }
  if (finished()) return Step::kFinished;
  return moved ? Step::kProgress : Step::kIdle;
}

Job::Step Launch::step_at_random(Seat& seat) {
  const uint32_t count = static_cast<uint32_t>(workers_count_);
  const uint32_t start = seat.random.below(count);
  const uint32_t stride = seat.random.below(2) == 0 ? 1 : count - 1;
  bool moved = false;
  for (uint32_t i = 0; i < count && !moved; ++i) {
    Worker& worker = workers_[(start + i * stride) % count];
    if (!looks_ready(worker) || !try_claim(worker)) continue;
    moved = advance(worker, seat, 1);
    release(worker);
  }
  if (finished()) return Step::kFinished;
  return moved ? Step::kProgress : Step::kIdle;
}

bool Launch::looks_ready(const Worker& worker) const {
  if (worker.claimed.load(std::memory_order_relaxed) || worker.done.load(std::memory_order_relaxed)) return false;
  return !blocked(worker, std::memory_order_relaxed) || failed_.load(std::memory_order_relaxed);
}

bool Launch::waits(const Worker& worker) {
  return worker.wait_for.load(std::memory_order_relaxed) != nullptr ||
         worker.wait_tag.load(std::memory_order_relaxed) != nullptr;
}

bool Launch::blocked(const Worker& worker, std::memory_order order) {
  const uint64_t until = worker.wait_until.load(std::memory_order_relaxed);
  if (const Counter* counter = worker.wait_for.load(std::memory_order_relaxed)) return counter->load(order) < until;
  if (const Tag* tag = worker.wait_tag.load(std::memory_order_relaxed)) return tag->load(order) != until;
  return false;
}

bool Launch::try_claim(Worker& worker) {
  if (worker.claimed.exchange(true, std::memory_order_acq_rel)) return false;
  if (!worker.done.load(std::memory_order_relaxed)) return true;
  worker.claimed.store(false, std::memory_order_release);
  return false;
}

void Launch::release(Worker& worker) {
  worker.claimed.store(false, std::memory_order_seq_cst);
  // A worker put aside while it could go on is work for others.
  if (!worker.done.load(std::memory_order_relaxed) && !waits(worker)) ThreadPool::wake();
}

uint64_t Launch::total_moves() const {
  uint64_t total = 0;
  for (int32_t i = 0; i < workers_count_; ++i) total += workers_[i].moves.load(std::memory_order_acquire);
  return total;
}

// If every worker is done or blocked, and none moved while this thread looked, lets what is held go on or else
// declares a deadlock, and returns true.
//
// Why looking at one after the other is enough: the first move after the first total would be by a worker that
// was seen blocked (had it moved before it was looked at, its `moves` would differ), and what unblocked it would
// be an earlier move of another worker. Claims are kept, so that a description is of one moment.
bool Launch::resolve_standstill() {
  const uint64_t before = total_moves();
  int32_t claimed = 0;
  bool standstill = !failed_.load(std::memory_order_relaxed);
  for (; standstill && claimed < workers_count_; ++claimed) {
    Worker& worker = workers_[claimed];
    if (worker.claimed.exchange(true, std::memory_order_acq_rel)) {
      standstill = false;
      break;
    }
    standstill = worker.done.load(std::memory_order_relaxed) || blocked(worker, std::memory_order_acquire);
  }
  standstill = standstill && total_moves() == before && !finished();
  if (standstill) {
    const bool holding = options_.held_task >= 0 || options_.held_stores >= 0;
    if (holding && held_.load(std::memory_order_relaxed) == 0) {
      held_.fetch_add(1, std::memory_order_seq_cst);
    } else {
      fail(describe_deadlock());
    }
  }
  for (int32_t i = 0; i < claimed; ++i) workers_[i].claimed.store(false, std::memory_order_seq_cst);
  return standstill;
}

// --- Workers -----------------------------------------------------------------------------------------------

// Runs a claimed worker for at most `budget` tasks (in chaos mode every decision counts as one). Returns whether
// it got on at all.
bool Launch::advance(Worker& worker, Seat& seat, int budget) {
  const bool chaos = options_.chaos_seed.has_value();
  bool moved = false;
  if (waits(worker)) {
    if (!failed_.load(std::memory_order_relaxed) && blocked(worker, std::memory_order_acquire)) return false;
    worker.wait_for.store(nullptr, std::memory_order_relaxed);
    worker.wait_tag.store(nullptr, std::memory_order_relaxed);
    moved = true;
  }
  bool stopped = false;
  while (!stopped && budget > 0) {
    if (failed_.load(std::memory_order_relaxed)) worker.next = Next::kDone;
    switch (worker.next) {
      case Next::kTasks:
        stopped = !run_tasks(worker, seat, budget, moved);
        break;
      case Next::kItem:
        start_item(worker);
        stopped = waits(worker);
        moved = true;
        budget -= chaos;
        break;
      case Next::kPredicate:
        read_predicate(worker);
        stopped = waits(worker);
        moved = true;
        budget -= chaos;
        break;
      case Next::kDone:
        finish_worker(worker);
        moved = true;
        stopped = true;
        break;
    }
  }
  if (moved) worker.moves.store(worker.moves.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  return moved;
}

// Runs tasks of the current segment. Returns false when the worker has to wait.
bool Launch::run_tasks(Worker& worker, Seat& seat, int& budget, bool& moved) {
  while (worker.position < worker.end) {
    if (budget <= 0) return true;
    const int32_t task = worker.queue[worker.position];
    if (worker.ran) {
      if (!show_late(worker)) return false;
    } else {
      if (!may_run(worker, task)) return false;
      const bool late = program_.tags > 0 && stores_late(worker, task, seat);
      if (!(late ? run_late(worker, task, seat) : run_one(task, seat))) return true;
      if (program_.tags > 0) publish_tags(worker, task);
      moved = true;
      if (late && program_.signal_start[task] != program_.signal_start[task + 1]) {
        worker.ran = true;
        --budget;
        continue;
      }
    }
    signal(task);
    worker.ran = false;
    worker.wait = worker.region = -1;
    ++worker.position;
    --budget;
    moved = true;
  }
  if (!show_late(worker)) return false;
  finish_item(worker);
  moved = true;
  return !waits(worker);
}

// Whether everything a task waits for is there; if not, the worker is blocked until the next of it is.
bool Launch::may_run(Worker& worker, int32_t task) {
  if (task == options_.held_task && held_.load(std::memory_order_relaxed) == 0) {
    wait(worker, held_, 1);
    return false;
  }
  int32_t& entry = worker.wait;
  if (entry < 0) entry = program_.wait_start[task];
  for (const int32_t end = program_.wait_start[task + 1]; entry < end; ++entry) {
    const int32_t event = program_.wait_event[entry];
    const uint64_t until = worker.sequence * static_cast<uint64_t>(program_.event_threshold[event]);
    if (wait(worker, events_[event], until)) return false;
  }
  return program_.tags == 0 || !wait_for_tags(worker, task);
}

// Returns whether it went well.
bool Launch::run_one(int32_t task, Seat& seat) {
  try {
    if (options_.chaos_seed.has_value()) seat.scratch().poison();
    run_task(program_, task, Memory{base_.data()}, seat.scratch());
  } catch (const std::exception& error) {
    fail({Outcome::Kind::kFailed, "task " + std::to_string(task) + label(task) + ": " + error.what()});
    return false;
  }
  return true;
}

// Whether the other workers are to see what a task stores later than its tags. If not, stores that are still late
// show now: this worker's are seen in their order.
bool Launch::stores_late(Worker& worker, int32_t task, Seat& seat) {
  if (held_.load(std::memory_order_relaxed) == 0) {
    worker.late_held |= task == options_.held_stores;
    if (worker.late_held) return true;
  }
  const bool late = options_.chaos_seed.has_value() && seat.random.below(2) == 0;
  if (!late) show_late(worker);
  return late;
}

// Runs a task that sees all its worker's stores while the others still see what was there before.
bool Launch::run_late(Worker& worker, int32_t task, Seat& seat) {
  std::vector<int32_t> regions = worker.late_regions;
  for (int32_t r = program_.writes.start[task]; r < program_.writes.start[task + 1]; ++r) {
    if (program_.arrays[program_.writes.array[r]].first_tag < 0) regions.push_back(r);
  }
  const std::vector<std::byte> before = gather(regions);
  scatter(worker.late_regions, worker.late_bytes);
  if (!run_one(task, seat)) return false;
  worker.late_bytes = gather(regions);
  scatter(regions, before);
  worker.late_regions = std::move(regions);
  return true;
}

void Launch::signal(int32_t task) {
  const int32_t end = program_.signal_start[task + 1];
  for (int32_t i = program_.signal_start[task]; i < end; ++i) {
    events_[program_.signal_event[i]].fetch_add(1, std::memory_order_seq_cst);
  }
  if (end != program_.signal_start[task]) ThreadPool::wake();
}

// Blocks the worker unless the counter has come far enough already. Returns whether it has to wait.
bool Launch::wait(Worker& worker, const Counter& counter, uint64_t until) {
  if (counter.load(std::memory_order_acquire) >= until) return false;
  worker.wait_until.store(until, std::memory_order_relaxed);
  worker.wait_for.store(&counter, std::memory_order_relaxed);
  return true;
}

// Meets the other workers, then does `next`.
void Launch::arrive(Worker& worker, Next next) {
  worker.next = next;
  ++worker.barriers;
  const uint64_t all = worker.barriers * static_cast<uint64_t>(workers_count_);
  const bool last = arrivals_.fetch_add(1, std::memory_order_seq_cst) + 1 >= all;
  if (last) {
    ThreadPool::wake();
  } else {
    wait(worker, arrivals_, all);
  }
}

void Launch::start_item(Worker& worker) {
  Frame& frame = worker.frames.back();
  const ScheduleNode& node = (*frame.list)[frame.item];
  switch (node.kind) {
    case ScheduleNode::Kind::kSegment: {
      const std::vector<int32_t>& queue = node.queues[static_cast<size_t>(worker.index)];
      worker.queue = queue.data();
      worker.position = 0;
      worker.end = static_cast<int32_t>(queue.size());
      worker.wait = -1;
      worker.sequence = ++worker.segment_runs[static_cast<size_t>(node.segment)];
      worker.next = Next::kTasks;
      return;
    }
    case ScheduleNode::Kind::kLoop:
      if (node.predicate >= 0) {
        worker.frames.push_back({&node.cond, &node, 0, 0, Frame::Role::kCond});
      } else if (node.trips > 0 && !node.body.empty()) {
        worker.frames.push_back({&node.body, &node, 0, 0, Frame::Role::kBody});
      } else {
        finish_item(worker);
        return;
      }
      break;
    case ScheduleNode::Kind::kBranch: {
      int32_t arm = 0;
      std::memcpy(&arm, base_[static_cast<size_t>(node.index)], sizeof arm);
      arm = std::clamp(arm, 0, static_cast<int32_t>(node.arms.size()) - 1);
      worker.frames.push_back({&node.arms[static_cast<size_t>(arm)], &node, 0, 0, Frame::Role::kArm});
      break;
    }
  }
  start_list(worker);
}

// At the first item of the innermost frame, which may have none.
void Launch::start_list(Worker& worker) {
  if (worker.frames.back().list->empty()) {
    finish_list(worker);
  } else {
    worker.next = Next::kItem;
  }
}

void Launch::finish_item(Worker& worker) {
  Frame& frame = worker.frames.back();
  if (++frame.item < frame.list->size()) {
    arrive(worker, Next::kItem);
  } else {
    finish_list(worker);
  }
}

void Launch::finish_list(Worker& worker) {
  Frame& frame = worker.frames.back();
  switch (frame.role) {
    case Frame::Role::kTop:
      worker.next = Next::kDone;
      return;
    case Frame::Role::kArm:
      worker.frames.pop_back();
      finish_item(worker);
      return;
    case Frame::Role::kCond:
      arrive(worker, Next::kPredicate);
      return;
    case Frame::Role::kBody:
      frame.item = 0;
      ++frame.round;
      if (frame.owner->predicate >= 0) {
        frame.role = Frame::Role::kCond;
        frame.list = &frame.owner->cond;
        // An empty condition has nothing to start after the barrier but the predicate itself.
        arrive(worker, frame.list->empty() ? Next::kPredicate : Next::kItem);
      } else if (frame.round < frame.owner->trips) {
        arrive(worker, Next::kItem);
      } else {
        worker.frames.pop_back();
        finish_item(worker);
      }
      return;
  }
}

void Launch::read_predicate(Worker& worker) {
  Frame& frame = worker.frames.back();
  const std::byte value = *base_[static_cast<size_t>(frame.owner->predicate)];
  if (value == std::byte{0}) {
    worker.frames.pop_back();
    finish_item(worker);
    return;
  }
  frame.role = Frame::Role::kBody;
  frame.list = &frame.owner->body;
  frame.item = 0;
  start_list(worker);
}

void Launch::finish_worker(Worker& worker) {
  worker.done.store(true, std::memory_order_relaxed);
  if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 != workers_count_) return;
  finished_.store(true, std::memory_order_seq_cst);
  ThreadPool::wake();
}

// --- What went wrong ---------------------------------------------------------------------------------------

// Every worker then goes to its end without doing anything; whoever looks at a blocked one lets it go.
void Launch::fail(Outcome outcome) {
  std::lock_guard lock(mutex_);
  if (outcome_.kind != Outcome::Kind::kOk) return;
  outcome_ = std::move(outcome);
  failed_.store(true, std::memory_order_seq_cst);
}

Outcome Launch::describe_deadlock() const {
  Outcome outcome;
  outcome.kind = Outcome::Kind::kDeadlock;
  std::vector<std::string> lines;
  int32_t blocked = 0;
  for (int32_t i = 0; i < workers_count_; ++i) {
    const Worker& worker = workers_[i];
    if (worker.done.load(std::memory_order_relaxed)) continue;
    ++blocked;
    if (worker.next == Next::kTasks && outcome.worker < 0) {
      outcome.worker = i;
      outcome.task = worker.queue[worker.position];
      outcome.expected = worker.wait_until.load(std::memory_order_relaxed);
      if (const Tag* tag = worker.wait_tag.load(std::memory_order_relaxed)) {
        const Array& array = program_.arrays[program_.tag_reads.array[worker.region]];
        outcome.value = array.value;
        outcome.element = tag - tags_.get() - array.first_tag;
        outcome.seen = tag->load(std::memory_order_relaxed);
      } else {
        outcome.event = program_.wait_event[worker.wait];
        outcome.seen = events_[outcome.event].load(std::memory_order_relaxed);
      }
      lines.insert(lines.begin(), describe_wait(worker));
    } else {
      lines.push_back(describe_wait(worker));
    }
  }
  outcome.message = "deadlock: no worker can go on";
  for (size_t i = 0; i < std::min(lines.size(), kWorkersInMessage); ++i) outcome.message += "\n  " + lines[i];
  if (lines.size() > kWorkersInMessage) {
    outcome.message += "\n  and " + std::to_string(lines.size() - kWorkersInMessage) + " more";
  }
  const int32_t done = workers_count_ - blocked;
  if (done > 0) outcome.message += "\n  " + std::to_string(done) + " of " + std::to_string(workers_count_) + " are done";
  return outcome;
}

std::string Launch::describe_wait(const Worker& worker) const {
  const std::string expected = std::to_string(worker.wait_until.load(std::memory_order_relaxed));
  const std::string who = "worker " + std::to_string(worker.index);
  if (worker.next != Next::kTasks) {
    return who + " at barrier " + std::to_string(worker.barriers) + ": expected " + expected + " arrivals, seen " +
           std::to_string(arrivals_.load(std::memory_order_relaxed));
  }
  const int32_t task = worker.queue[worker.position];
  std::string what;
  uint64_t seen = 0;
  if (const Tag* tag = worker.wait_tag.load(std::memory_order_relaxed)) {
    const Array& array = program_.arrays[program_.tag_reads.array[worker.region]];
    int64_t rest = tag - tags_.get() - array.first_tag;
    std::string element;
    for (size_t d = array.extents.size(); d-- > 0; rest /= array.extents[d]) {
      element = std::to_string(rest % array.extents[d]) + (element.empty() ? "" : ", ") + element;
    }
    what = "tag of value " + std::to_string(array.value) + "[" + element + "]";
    seen = tag->load(std::memory_order_relaxed);
  } else {
    const int32_t event = program_.wait_event[worker.wait];
    what = "event " + std::to_string(event);
    seen = events_[event].load(std::memory_order_relaxed);
  }
  return who + " at task " + std::to_string(task) + label(task) + ", " + what + ": expected " + expected + ", seen " +
         std::to_string(seen);
}

std::string Launch::label(int32_t task) const {
  const auto routine = static_cast<size_t>(program_.task_routine[task]);
  if (routine >= program_.routine_label.size() || program_.routine_label[routine].empty()) return "";
  return " (" + program_.routine_label[routine] + ")";
}

}  // namespace jax_mpk::host
