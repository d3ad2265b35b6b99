// Checks the executor's scheduling with programs made by hand, without the real task bodies: run_task() below
// calls a function of the test. Compiled and run by test_executor_native.py, also under a thread sanitizer.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <thread>

#include "host/executor.h"
#include "host/program.h"
#include "host/thread_pool.h"

namespace jax_mpk::host {

struct Bodies {
  std::function<void(int32_t, const Memory&)> run;
};
Program::Program() = default;
Program::~Program() = default;
Scratch::Scratch(const Program& program)
    : data_(static_cast<std::byte*>(std::malloc(static_cast<size_t>(program.scratch_bytes) + 1))),
      size_(static_cast<size_t>(program.scratch_bytes)) {}
Scratch::~Scratch() { std::free(data_); }
void Scratch::poison() { std::memset(data_, 0xff, size_); }
void run_task(const Program& program, int32_t task, const Memory& memory, Scratch& scratch) {
  scratch.data()[0] = std::byte{1};  // a thread sanitizer sees scratch memory that is shared
  program.bodies->run(task, memory);
}
FpEnvironment::FpEnvironment() : saved_(0) {}
FpEnvironment::~FpEnvironment() { (void)saved_; }

}  // namespace jax_mpk::host

using namespace jax_mpk::host;
using Kind = ScheduleNode::Kind;
using Body = std::function<void(int32_t, const Memory&)>;

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);   \
      std::exit(1);                                                          \
    }                                                                        \
  } while (0)

namespace {

// Orders in which a loop of more rounds than there are tags is run. A thread sanitizer takes seconds for each, and sees
// the others in short loops; that tags begin again is checked in all of them without it.
#ifdef __SANITIZE_THREAD__
constexpr uint64_t kOrdersOfLongLoop = 1;
#else
constexpr uint64_t kOrdersOfLongLoop = 4;
#endif

struct Task {
  int32_t worker;
  std::vector<int32_t> waits, signals;
  std::vector<int32_t> tag_reads = {};                    // arrays, whole
  std::vector<std::pair<int32_t, int32_t>> writes = {};  // elements of arrays
};

// A program under construction. Segments take the tasks added since the last one.
class Maker {
 public:
  explicit Maker(int32_t workers) : program_(std::make_unique<Program>()) { program_->workers = workers; }

  int32_t event() { return events_++; }
  int32_t task(Task t) {
    tasks_.push_back(std::move(t));
    return static_cast<int32_t>(tasks_.size()) - 1;
  }
  int32_t result(int32_t index, int64_t nbytes) {
    program_->storages.push_back({Storage::Kind::kOutput, index, -1, 0, nbytes});
    return static_cast<int32_t>(program_->storages.size()) - 1;
  }
  // An array of one element per worker.
  int32_t array(int32_t storage, bool tagged) {
    const int64_t n = program_->workers;
    const int64_t bytes = program_->storages[static_cast<size_t>(storage)].nbytes / n;
    program_->arrays.push_back({int32_t{7}, storage, bytes, {n}, n, tagged ? program_->tags : -1});
    if (tagged) program_->tags += n;
    return static_cast<int32_t>(program_->arrays.size()) - 1;
  }
  ScheduleNode segment() {
    ScheduleNode node;
    node.kind = Kind::kSegment;
    node.segment = program_->segments++;
    node.queues.resize(static_cast<size_t>(program_->workers));
    for (; segmented_ < tasks_.size(); ++segmented_) {
      node.queues[static_cast<size_t>(tasks_[segmented_].worker)].push_back(static_cast<int32_t>(segmented_));
      segment_of_.push_back(node.segment);
    }
    return node;
  }
  std::shared_ptr<Executable> finish(ScheduleNode::List schedule, Body body) {
    Program& p = *program_;
    p.event_threshold.resize(static_cast<size_t>(events_));
    p.event_segment.resize(static_cast<size_t>(events_));
    p.wait_start = p.signal_start = p.tag_reads.start = p.writes.start = {0};
    // Row w is element w, the last one the whole array.
    p.region_rank = 1;
    for (int32_t w = 0; w < p.workers; ++w) p.region_boxes.insert(p.region_boxes.end(), {w, w + 1});
    p.region_boxes.insert(p.region_boxes.end(), {0, p.workers});
    auto add = [](Regions& regions, int32_t array, int32_t row) {
      regions.array.push_back(array);
      regions.row.push_back(row);
    };
    for (size_t t = 0; t < tasks_.size(); ++t) {
      p.task_routine.push_back(0);
      p.task_worker.push_back(tasks_[t].worker);
      for (int32_t e : tasks_[t].waits) p.wait_event.push_back(e);
      for (int32_t e : tasks_[t].signals) {
        p.signal_event.push_back(e);
        ++p.event_threshold[static_cast<size_t>(e)];
        p.event_segment[static_cast<size_t>(e)] = segment_of_[t];
      }
      for (int32_t a : tasks_[t].tag_reads) add(p.tag_reads, a, p.workers);
      for (auto [a, w] : tasks_[t].writes) add(p.writes, a, w);
      p.wait_start.push_back(static_cast<int32_t>(p.wait_event.size()));
      p.signal_start.push_back(static_cast<int32_t>(p.signal_event.size()));
      p.tag_reads.start.push_back(static_cast<int32_t>(p.tag_reads.array.size()));
      p.writes.start.push_back(static_cast<int32_t>(p.writes.array.size()));
    }
    for (auto& threshold : p.event_threshold) threshold = threshold == 0 ? 1 : threshold;
    p.routine_label = {"here.py:1 step"};
    p.scratch_bytes = 64;
    p.schedule = std::move(schedule);
    p.bodies.reset(new Bodies{std::move(body)});
    return std::make_shared<Executable>(std::move(program_));
  }

 private:
  std::unique_ptr<Program> program_;
  std::vector<Task> tasks_;
  std::vector<int32_t> segment_of_;
  size_t segmented_ = 0;
  int32_t events_ = 0;
};

ScheduleNode loop(ScheduleNode::List cond, ScheduleNode::List body, int32_t predicate, int64_t trips) {
  ScheduleNode node;
  node.kind = Kind::kLoop;
  node.cond = std::move(cond);
  node.body = std::move(body);
  node.predicate = predicate;
  node.trips = trips;
  return node;
}

ScheduleNode branch(int32_t index, std::vector<ScheduleNode::List> arms) {
  ScheduleNode node;
  node.kind = Kind::kBranch;
  node.index = index;
  node.arms = std::move(arms);
  return node;
}

Buffer buffer(std::vector<std::byte>& bytes) { return {bytes.data(), static_cast<int64_t>(bytes.size())}; }

// Every worker adds 1 to its own cell in every phase and checks that all cells were at the phase's number.
std::shared_ptr<Executable> phases(int32_t workers, int32_t count, int32_t work) {
  Maker maker(workers);
  maker.result(0, workers * 8);
  int32_t previous = -1;
  for (int32_t p = 0; p < count; ++p) {
    const int32_t event = maker.event();
    for (int32_t w = 0; w < workers; ++w) {
      Task t{w, {}, {event}};
      if (previous >= 0) t.waits.push_back(previous);
      maker.task(t);
    }
    previous = event;
  }
  ScheduleNode::List schedule;
  schedule.push_back(maker.segment());
  return maker.finish(std::move(schedule), [workers, work](int32_t task, const Memory& memory) {
    auto* cells = reinterpret_cast<std::atomic<int64_t>*>(memory.base[0]);
    const int64_t phase = task / workers;
    if (phase == 0) cells[task % workers].store(0, std::memory_order_relaxed);
    for (int32_t w = 0; phase > 0 && w < workers; ++w) {
      const int64_t seen = cells[w].load(std::memory_order_relaxed);
      CHECK(seen == phase || seen == phase + 1);
    }
    for (int32_t i = 0; i < work; ++i) {
      asm volatile("");
    }
    cells[task % workers].store(phase + 1, std::memory_order_relaxed);
  });
}

void run_phases(const std::shared_ptr<Executable>& executable, int32_t workers, int32_t count, LaunchOptions options) {
  std::vector<std::byte> out(static_cast<size_t>(workers) * 8);
  const Buffer result = buffer(out);
  const Outcome outcome = executable->launch({}, {&result, 1}, options);
  CHECK(outcome.kind == Outcome::Kind::kOk);
  for (int32_t w = 0; w < workers; ++w) {
    int64_t value;
    std::memcpy(&value, out.data() + 8 * w, 8);
    CHECK(value == count);
  }
}

double seconds(const std::function<void()>& what) {
  const auto start = std::chrono::steady_clock::now();
  what();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void test_phases() {
  for (int32_t workers : {1, 2, 3, 8, 64}) {
    const auto executable = phases(workers, 50, 0);
    for (int i = 0; i < 20; ++i) run_phases(executable, workers, 50, {});
    for (uint64_t seed = 0; seed < 10; ++seed) {
      LaunchOptions options;
      options.chaos_seed = seed;
      run_phases(executable, workers, 50, options);
    }
  }
}

// while i < trips: i += 1, with the body's task on another worker than the condition's.
void test_while(int32_t workers, int64_t trips) {
  Maker maker(workers);
  const int32_t i = maker.result(0, 8), predicate = maker.result(1, 1);
  maker.task({0, {}, {}});
  ScheduleNode::List top, cond, body;
  top.push_back(maker.segment());
  maker.task({0, {}, {}});
  cond.push_back(maker.segment());
  maker.task({workers - 1, {}, {}});
  body.push_back(maker.segment());
  top.push_back(loop(std::move(cond), std::move(body), predicate, -1));
  const auto executable = maker.finish(std::move(top), [=](int32_t task, const Memory& memory) {
    auto* value = reinterpret_cast<int64_t*>(memory.base[i]);
    if (task == 0) *value = 0;
    if (task == 1) *memory.base[predicate] = std::byte{*value < trips};
    if (task == 2) ++*value;
  });
  for (bool chaos : {false, true}) {
    if (chaos && trips > 10000) continue;
    std::vector<std::byte> out(8), flag(1);
    const Buffer results[] = {buffer(out), buffer(flag)};
    LaunchOptions options;
    if (chaos) options.chaos_seed = 5;
    CHECK(executable->launch({}, results, options).kind == Outcome::Kind::kOk);
    int64_t value;
    std::memcpy(&value, out.data(), 8);
    CHECK(value == trips);
  }
}

// for 5 rounds: switch (round % 4) of arms {nothing, one task, a loop of 3 rounds}, index clamped.
void test_nested(int32_t workers) {
  Maker maker(workers);
  const int32_t cells = maker.result(0, 32), index = maker.result(1, 4);
  maker.task({0, {}, {}});
  ScheduleNode::List top, body, one, inner, looped;
  top.push_back(maker.segment());
  const int32_t e = maker.event();
  maker.task({workers - 1, {}, {e}});
  maker.task({0, {e}, {}});
  body.push_back(maker.segment());
  maker.task({0, {}, {}});
  one.push_back(maker.segment());
  maker.task({workers / 2, {}, {}});
  inner.push_back(maker.segment());
  looped.push_back(loop({}, std::move(inner), -1, 3));
  std::vector<ScheduleNode::List> arms(3);
  arms[1] = std::move(one);
  arms[2] = std::move(looped);
  body.push_back(branch(index, std::move(arms)));
  body.push_back(loop({}, {}, -1, 1000));
  top.push_back(loop({}, std::move(body), -1, 5));
  top.push_back(loop({}, {}, -1, 0));
  const auto executable = maker.finish(std::move(top), [=](int32_t task, const Memory& memory) {
    auto* count = reinterpret_cast<int64_t*>(memory.base[cells]);
    if (task == 0) std::memset(count, 0, 32);
    if (task == 1) ++count[0];
    if (task == 2) {
      const auto choice = static_cast<int32_t>((count[0] - 1) % 4);  // 3 is clamped to 2
      std::memcpy(memory.base[index], &choice, 4);
    }
    if (task == 3) ++count[1];
    if (task == 4) ++count[2];
  });
  for (uint64_t seed = 0; seed < 20; ++seed) {
    std::vector<std::byte> out(32), choice(4);
    const Buffer results[] = {buffer(out), buffer(choice)};
    LaunchOptions options;
    if (seed > 0) options.chaos_seed = seed;
    CHECK(executable->launch({}, results, options).kind == Outcome::Kind::kOk);
    int64_t count[4];
    std::memcpy(count, out.data(), 32);
    CHECK(count[0] == 5 && count[1] == 1 && count[2] == 6);
  }
}

void test_deadlock() {
  for (int32_t workers : {1, 2, 8}) {
    Maker maker(workers);
    const int32_t never = maker.event(), fine = maker.event();
    maker.task({0, {}, {fine}});
    maker.task({workers - 1, {fine, never}, {}});
    maker.task({0, {}, {}});
    ScheduleNode::List schedule;
    schedule.push_back(maker.segment());
    const auto executable = maker.finish(std::move(schedule), [](int32_t, const Memory&) {});
    for (int i = 0; i < 50; ++i) {
      LaunchOptions options;
      if (i % 2 == 1) options.chaos_seed = static_cast<uint64_t>(i);
      const Outcome outcome = executable->launch({}, {}, options);
      CHECK(outcome.kind == Outcome::Kind::kDeadlock);
      CHECK(outcome.worker == workers - 1 && outcome.task == 1 && outcome.event == never);
      CHECK(outcome.expected == 1 && outcome.seen == 0);
      CHECK(outcome.message.find("here.py:1 step") != std::string::npos);
    }
  }
}

void test_failing_task() {
  Maker maker(3);
  for (int32_t w = 0; w < 3; ++w) maker.task({w, {}, {}});
  ScheduleNode::List body, schedule;
  body.push_back(maker.segment());
  schedule.push_back(loop({}, std::move(body), -1, 1'000'000'000'000));
  std::atomic<int> calls{0};
  const auto executable = maker.finish(std::move(schedule), [&calls](int32_t, const Memory&) {
    if (++calls == 1000) throw std::runtime_error("does not fit");
  });
  const Outcome outcome = executable->launch({}, {}, {});
  CHECK(outcome.kind == Outcome::Kind::kFailed);
  CHECK(outcome.message.find("does not fit") != std::string::npos);
}

// Task 1 should wait for task 0 and does not: held back, task 0 comes second.
void test_held_task() {
  Maker maker(2);
  maker.result(0, 8);
  maker.task({0, {}, {}});
  maker.task({1, {}, {}});
  ScheduleNode::List schedule;
  schedule.push_back(maker.segment());
  std::atomic<int> order{0}, first{-1};
  const auto executable = maker.finish(std::move(schedule), [&](int32_t task, const Memory&) {
    if (order++ == 0) first = task;
  });
  for (int32_t held : {0, 1}) {
    order = 0;
    std::vector<std::byte> out(8);
    const Buffer result = buffer(out);
    LaunchOptions options;
    options.held_task = held;
    options.max_threads = 1;
    CHECK(executable->launch({}, {&result, 1}, options).kind == Outcome::Kind::kOk);
    CHECK(first == 1 - held);
  }
}

// In every round each worker tags its element of an array, then adds up all elements, the sum being a plain store.
void test_tags(int32_t workers, int64_t rounds, uint64_t orders = 4) {
  Maker maker(workers);
  const int32_t sums = maker.array(maker.result(0, workers * 8), false);
  const int32_t passed = maker.array(maker.result(1, workers * 4), true);
  for (int32_t w = 0; w < workers; ++w) maker.task({w, {}, {}, {}, {{passed, w}}});
  for (int32_t w = 0; w < workers; ++w) maker.task({w, {}, {}, {passed}, {{sums, w}}});
  ScheduleNode::List body, schedule;
  body.push_back(maker.segment());
  schedule.push_back(loop({}, std::move(body), -1, rounds));
  std::vector<int32_t> round(static_cast<size_t>(workers));
  const auto executable = maker.finish(std::move(schedule), [&](int32_t task, const Memory& memory) {
    const auto w = static_cast<size_t>(task % workers);
    int64_t& sum = reinterpret_cast<int64_t*>(memory.base[0])[w];
    auto* cells = reinterpret_cast<int32_t*>(memory.base[1]);
    if (task < workers) {
      cells[w] = ++round[w];
      return;
    }
    if (round[w] == 1) sum = 0;
    for (int32_t i = 0; i < workers; ++i) {
      CHECK(cells[i] == round[w]);
      sum += cells[i];
    }
  });
  for (uint64_t seed = 0; seed < orders; ++seed) {
    std::fill(round.begin(), round.end(), 0);
    std::vector<std::byte> first(static_cast<size_t>(workers) * 8), second(static_cast<size_t>(workers) * 4);
    const Buffer results[] = {buffer(first), buffer(second)};
    LaunchOptions options;
    if (seed > 0) options.chaos_seed = seed;
    CHECK(executable->launch({}, results, options).kind == Outcome::Kind::kOk);
    for (int32_t w = 0; w < workers; ++w) {
      int64_t sum;
      std::memcpy(&sum, first.data() + 8 * w, 8);
      CHECK(sum == workers * rounds * (rounds + 1) / 2);
    }
  }
}

// Nobody writes what the only task waits for.
void test_missing_tag() {
  Maker maker(2);
  const int32_t array = maker.array(maker.result(0, 8), true);
  maker.task({1, {}, {}, {array}, {}});
  ScheduleNode::List schedule;
  schedule.push_back(maker.segment());
  const auto executable = maker.finish(std::move(schedule), [](int32_t, const Memory&) {});
  std::vector<std::byte> out(8);
  const Buffer result = buffer(out);
  const Outcome outcome = executable->launch({}, {&result, 1}, {});
  CHECK(outcome.kind == Outcome::Kind::kDeadlock);
  CHECK(outcome.worker == 1 && outcome.task == 0 && outcome.event == -1);
  CHECK(outcome.value == 7 && outcome.element == 0 && outcome.expected == 2 && outcome.seen == 0);
  CHECK(outcome.message.find("worker 1 at task 0 (here.py:1 step), tag of value 7[0]: expected 2, seen 0") !=
        std::string::npos);
}

void test_wrong_buffers() {
  Maker maker(1);
  maker.result(0, 8);
  const auto executable = maker.finish({}, [](int32_t, const Memory&) {});
  std::vector<std::byte> out(4);
  const Buffer result = buffer(out);
  CHECK(executable->launch({}, {&result, 1}, {}).kind == Outcome::Kind::kFailed);
  CHECK(executable->launch({}, {}, {}).kind == Outcome::Kind::kFailed);
}

// More callers than threads may work, several programs at once.
void test_concurrent_launches(int limit, int callers) {
  ThreadPool::instance().set_limit(limit);
  std::vector<std::shared_ptr<Executable>> executables = {phases(1, 40, 10), phases(2, 40, 10), phases(5, 40, 10)};
  const int32_t workers[] = {1, 2, 5};
  std::vector<std::thread> threads;
  for (int c = 0; c < callers; ++c) {
    threads.emplace_back([&, c] {
      for (int i = 0; i < 50; ++i) {
        const size_t which = static_cast<size_t>(c + i) % 3;
        LaunchOptions options;
        if (i % 7 == 0) options.chaos_seed = static_cast<uint64_t>(i);
        run_phases(executables[which], workers[which], 40, options);
        if (i % 10 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

// Tasks long enough that idle threads go to sleep beside the job.
void test_sleeping_beside_a_job(int limit) {
  ThreadPool::instance().set_limit(limit);
  Maker maker(2);
  int32_t previous = -1;
  for (int32_t i = 0; i < 20; ++i) {
    const int32_t event = maker.event();
    Task t{i % 2, {}, {event}};
    if (previous >= 0) t.waits.push_back(previous);
    maker.task(t);
    previous = event;
  }
  ScheduleNode::List schedule;
  schedule.push_back(maker.segment());
  std::atomic<int> calls{0};
  const auto executable = maker.finish(std::move(schedule), [&](int32_t task, const Memory&) {
    CHECK(calls++ == task);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  CHECK(executable->launch({}, {}, {}).kind == Outcome::Kind::kOk);
}

void report_speed() {
  for (int limit : {1, 2}) {
    ThreadPool::instance().set_limit(limit);
    for (int32_t work : {0, 30000}) {
      const auto executable = phases(2, 200, work);
      run_phases(executable, 2, 200, {});
      double best = 1e9;
      for (int i = 0; i < 10; ++i) best = std::min(best, seconds([&] { run_phases(executable, 2, 200, {}); }));
      std::printf("threads %d work %d: %.3f us a phase\n", limit, work, best / 200 * 1e6);
    }
    for (int32_t workers : {1, 2, 8}) {
      std::printf("threads %d workers %d: while loop of 10^6 trips %.2f s\n", limit, workers,
                  seconds([&] { test_while(workers, 1'000'000); }));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "speed") == 0) {
    report_speed();
    return 0;
  }
  for (int limit : {1, 2, 4}) {
    ThreadPool::instance().set_limit(limit);
    test_phases();
    for (int32_t workers : {1, 2, 8}) {
      test_while(workers, 0);
      test_while(workers, 1000);
      test_nested(workers);
    }
    test_deadlock();
    test_failing_task();
    test_held_task();
    for (int32_t workers : {1, 2, 8}) test_tags(workers, 300);
    if (limit == 2) test_tags(2, 70'000, kOrdersOfLongLoop);  // more rounds than tags
    test_missing_tag();
    test_wrong_buffers();
    test_sleeping_beside_a_job(limit);
    for (int callers : {2, 8}) test_concurrent_launches(limit, callers);
  }
  std::puts("ok");
  return 0;
}
