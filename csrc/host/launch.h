// One launch of a Program: where every worker is, and how far every event has come.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "host/executor.h"
#include "host/program.h"
#include "host/thread_pool.h"

namespace jax_mpk::host {

using Counter = std::atomic<uint64_t>;
using Tag = std::atomic<uint16_t>;

// Small and fast; its quality is good enough to shuffle queues.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }

 private:
  uint64_t state_;
};

class Launch final : public Job, public std::enable_shared_from_this<Launch> {
 public:
  // `base`: one address for each storage of the program.
  Launch(std::shared_ptr<Executable> executable, std::vector<std::byte*> base, const LaunchOptions& options,
         int helpers);

  std::unique_ptr<Job::Seat> sit(int index) override;
  Step step(Job::Seat& seat) override;
  bool finished() const override { return finished_.load(std::memory_order_acquire); }

  // After the launch has finished.
  const Outcome& outcome() const { return outcome_; }

 private:
  class Seat;

  // One level of the schedule that a worker is in. `item` is being run, or is next after a barrier.
  struct Frame {
    enum class Role : uint8_t { kTop, kCond, kBody, kArm };
    const ScheduleNode::List* list;
    const ScheduleNode* owner;  // the loop or branch; null at the top
    size_t item = 0;
    int64_t round = 0;  // completed rounds of a loop
    Role role;
  };

  // What a worker does when it goes on.
  enum class Next : uint8_t { kTasks, kItem, kPredicate, kDone };

  // A worker belongs to whoever has claimed it; only `claimed`, the wait fields, `moves` and `done` are read by
  // others.
  struct alignas(64) Worker {
    std::atomic<bool> claimed{false};
    std::atomic<bool> done{false};
    // Blocked until *wait_for >= wait_until, or until *wait_tag == wait_until; not blocked when both are null. A
    // hint for others: the owner checks again.
    std::atomic<const Counter*> wait_for{nullptr};
    std::atomic<const Tag*> wait_tag{nullptr};
    std::atomic<uint64_t> wait_until{0};
    std::atomic<uint64_t> moves{0};  // grows whenever this worker gets on

    Next next = Next::kItem;
    int32_t index = 0;
    const int32_t* queue = nullptr;
    int32_t position = 0, end = 0;  // in `queue`
    int32_t wait = -1;              // entry in Program::wait_event to go on with, or -1: the task's first
    int32_t region = -1;            // entry in Program::tag_reads to go on with, or -1: the task's first
    int64_t element = 0;            // of that region, the first not yet seen with its tag
    uint64_t sequence = 0;          // how often the segment of `queue` has run, this time included
    uint64_t barriers = 0;          // barriers this worker has arrived at
    std::vector<Frame> frames;
    std::vector<uint64_t> segment_runs;

    // Stores that only this worker sees: entries in Program::writes, and what these regions hold.
    std::vector<int32_t> late_regions;
    std::vector<std::byte> late_bytes;
    bool late_held = false;  // those of the task whose stores are held are among them
    bool ran = false;        // the task at `position` has run; its signals are late, too
  };

  bool advance(Worker& worker, Seat& seat, int budget);
  bool run_tasks(Worker& worker, Seat& seat, int& budget, bool& moved);
  bool may_run(Worker& worker, int32_t task);
  bool run_one(int32_t task, Seat& seat);
  bool run_late(Worker& worker, int32_t task, Seat& seat);
  bool stores_late(Worker& worker, int32_t task, Seat& seat);
  bool show_late(Worker& worker);
  std::vector<std::byte> gather(const std::vector<int32_t>& regions) const;
  void scatter(const std::vector<int32_t>& regions, const std::vector<std::byte>& bytes) const;
  void publish_tags(const Worker& worker, int32_t task);
  void signal(int32_t task);
  bool wait(Worker& worker, const Counter& counter, uint64_t until);
  bool wait_for_tags(Worker& worker, int32_t task);
  static bool waits(const Worker& worker);
  static bool blocked(const Worker& worker, std::memory_order order);
  void arrive(Worker& worker, Next next);
  void start_item(Worker& worker);
  void start_list(Worker& worker);
  void finish_item(Worker& worker);
  void finish_list(Worker& worker);
  void read_predicate(Worker& worker);
  void finish_worker(Worker& worker);

  Step step_in_order(Seat& seat);
  Step step_at_random(Seat& seat);
  bool try_claim(Worker& worker);
  void release(Worker& worker);
  bool looks_ready(const Worker& worker) const;
  uint64_t total_moves() const;
  bool resolve_standstill();
  void fail(Outcome outcome);
  Outcome describe_deadlock() const;
  std::string describe_wait(const Worker& worker) const;
  std::string label(int32_t task) const;

  const std::shared_ptr<Executable> executable_;
  const Program& program_;
  const std::vector<std::byte*> base_;
  const LaunchOptions options_;
  const int32_t workers_count_;
  const int seats_;
  std::unique_ptr<Worker[]> workers_;
  std::unique_ptr<Counter[]> events_;
  std::unique_ptr<Tag[]> tags_;
  alignas(64) Counter arrivals_{0};  // at barriers; the k-th is open once all workers have arrived k times
  alignas(64) Counter published_{0};  // tasks that have written tags
  alignas(64) Counter held_{0};       // 1: what is held may go on
  std::atomic<int32_t> done_{0};
  std::atomic<bool> failed_{false};
  std::atomic<bool> finished_{false};
  std::mutex mutex_;
  Outcome outcome_;  // written under mutex_ by the first to fail, read after the end
};

}  // namespace jax_mpk::host
