// The process-wide pool of OS threads that run megakernels on the CPU.
//
// At most `limit` threads work at the same time, whatever the number of executables, launches and forced host
// devices: limit − 1 helpers that the pool owns, and threads that call run(). A thread that works holds a
// *token*. A caller that finds no token left sleeps; its job is then worked on by those that hold one, who look
// at every active job whenever their own has nothing ready, so one token is enough for any number of jobs, even
// of jobs that wait for each other.
//
// Nobody sleeps while work is ready, and nobody burns a core for long: a thread without work spins for a moment
// (a hand-off within a launch costs far less than a system call), then sleeps until a job moves.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace jax_mpk::host {

// Something that any number of threads can work on, a step at a time.
class Job {
 public:
  enum class Step {
    kProgress,  // something was done
    kIdle,      // nothing is ready for this thread now
    kFinished,  // nothing is left to do, and no thread is doing anything
  };

  // What one thread needs while it works on the job, such as scratch memory.
  class Seat {
   public:
    virtual ~Seat() = default;
  };

  // `helpers`: how many threads beside the caller can be of use.
  explicit Job(int helpers) : wanted_helpers_(helpers) {}
  virtual ~Job() = default;

  virtual std::unique_ptr<Seat> sit(int index) = 0;
  virtual Step step(Seat& seat) = 0;
  // True once step() has returned kFinished to anybody.
  virtual bool finished() const = 0;

 private:
  friend class ThreadPool;
  const int wanted_helpers_;
  int seated_ = 0;          // threads working on it; guarded by the pool's mutex
  bool has_token_ = false;  // its caller may work; guarded by the pool's mutex
};

class ThreadPool {
 public:
  // The pool of this process. Never destroyed: its threads may outlive static objects.
  static ThreadPool& instance();

  // Number of threads that may work at the same time, at least 1.
  void set_limit(int limit);
  int limit() const { return limit_.load(std::memory_order_relaxed); }

  // Works on the job until it has finished; other threads may do parts of it, or all.
  void run(const std::shared_ptr<Job>& job);

  // For jobs: to be called after something was published, with a sequentially consistent read-modify-write,
  // that may make another thread's step succeed. Costs one load when nobody sleeps.
  static void wake() {
    if (sleepers_.load(std::memory_order_seq_cst) != 0) wake_sleepers();
  }

 private:
  using Clock = std::chrono::steady_clock;

  // How long a thread has been looking for work.
  struct Idle {
    uint32_t rounds = 0;
    Clock::time_point since;
  };

  ThreadPool() = default;

  void helper_main();
  std::shared_ptr<Job> next_job();
  std::shared_ptr<Job> other_job(const Job* own);
  void serve(const std::shared_ptr<Job>& job, bool own, int index, Idle& idle);
  void lend_a_hand(const Job* own);
  void sleep_until_moved(Job& job, Job::Seat& seat);
  void give_token_back();        // mutex held
  void call_helpers(int count);  // mutex held
  void wake_callers();
  static void wake_sleepers();

  std::mutex mutex_;
  std::condition_variable helpers_wake_;
  std::condition_variable callers_wake_;
  std::vector<std::shared_ptr<Job>> active_;
  std::vector<Job*> waiting_;  // jobs whose callers have no token, first come first served
  int working_ = 0;            // tokens given out
  int threads_ = 0;            // helper threads that exist
  int sleeping_helpers_ = 0;   // of those, asleep for want of a job
  int called_helpers_ = 0;     // of those asleep, how many have been called
  size_t rotation_ = 0;

  std::atomic<int> limit_{1};
  std::atomic<uint32_t> arrivals_{0};  // jobs ever started; helpers without a job watch it
  std::atomic<int> active_count_{0};

  static std::atomic<uint32_t> sleepers_;   // threads asleep beside a job that is not finished
  static std::atomic<uint32_t> wake_word_;  // what they sleep on
};

}  // namespace jax_mpk::host
