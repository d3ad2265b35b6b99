#include "host/thread_pool.h"

#include <algorithm>
#include <system_error>
#include <thread>

#include "host/program.h"

namespace jax_mpk::host {
namespace {

// How long a thread without work looks for some before it yields its core, and before it sleeps. Hand-offs
// within a decode step take from under one to some hundred microseconds; waking a thread takes about fifty.
constexpr auto kSpinBeforeYield = std::chrono::microseconds(50);
constexpr auto kSpinBeforeSleep = std::chrono::microseconds(300);
// Between launches: long enough for a loop around the custom call, far too short to show up in a load meter.
constexpr auto kSpinBetweenJobs = std::chrono::microseconds(100);
// The clock and other jobs are looked at once in this many idle rounds.
constexpr uint32_t kIdleRounds = 64;

inline void relax_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

std::atomic<uint32_t> ThreadPool::sleepers_{0};
std::atomic<uint32_t> ThreadPool::wake_word_{0};

ThreadPool& ThreadPool::instance() {
  static ThreadPool* pool = new ThreadPool();
  return *pool;
}

void ThreadPool::set_limit(int limit) {
  std::lock_guard lock(mutex_);
  limit_.store(std::max(1, limit), std::memory_order_relaxed);
}

void ThreadPool::wake_sleepers() {
  wake_word_.fetch_add(1, std::memory_order_seq_cst);
  wake_word_.notify_all();
}

void ThreadPool::run(const std::shared_ptr<Job>& job) {
  std::unique_lock lock(mutex_);
  active_.push_back(job);
  active_count_.store(static_cast<int>(active_.size()), std::memory_order_relaxed);
  arrivals_.fetch_add(1, std::memory_order_seq_cst);
  if (working_ < limit()) {
    ++working_;
    job->has_token_ = true;
    call_helpers(job->wanted_helpers_);
  } else {
    // Those who hold tokens work on this job too. Whoever finishes it, or has a token to spare, wakes us.
    waiting_.push_back(job.get());
    callers_wake_.wait(lock, [&] { return job->has_token_ || job->finished(); });
    std::erase(waiting_, job.get());
  }
  if (job->has_token_ && !job->finished()) {
    ++job->seated_;
    lock.unlock();
    {
      const FpEnvironment fp;
      Idle idle;
      serve(job, true, 0, idle);
    }
    lock.lock();
    --job->seated_;
  }
  std::erase(active_, job);
  active_count_.store(static_cast<int>(active_.size()), std::memory_order_relaxed);
  if (job->has_token_) give_token_back();
}

// A thread stops working: its token goes to a caller that waits, or else to a helper if a job has use for one.
void ThreadPool::give_token_back() {
  for (Job* job : waiting_) {
    if (job->has_token_ || job->finished()) continue;
    job->has_token_ = true;
    callers_wake_.notify_all();
    return;
  }
  --working_;
  int wanted = 0;
  for (const auto& job : active_) {
    if (!job->finished()) wanted += std::max(0, 1 + job->wanted_helpers_ - job->seated_);
  }
  call_helpers(wanted);
}

void ThreadPool::call_helpers(int count) {
  count = std::min(count, limit() - working_);
  for (int i = std::min(count, sleeping_helpers_ - called_helpers_); i > 0; --i) {
    ++called_helpers_;
    helpers_wake_.notify_one();
  }
  while (threads_ < std::min(count, limit() - 1)) {
    try {
      std::thread([this] { helper_main(); }).detach();
    } catch (const std::system_error&) {
      return;  // the system has no more threads to give: those there are will do
    }
    ++threads_;
  }
}

void ThreadPool::wake_callers() {
  std::lock_guard lock(mutex_);
  callers_wake_.notify_all();
}

// A job that has use for one more thread, with a seat at it and a token. Mutex held.
std::shared_ptr<Job> ThreadPool::next_job() {
  if (working_ >= limit()) return nullptr;
  for (size_t i = 0; i < active_.size(); ++i) {
    const auto& job = active_[(rotation_ + i) % active_.size()];
    if (job->finished() || job->seated_ > job->wanted_helpers_) continue;
    rotation_ += i + 1;
    ++working_;
    ++job->seated_;
    return job;
  }
  return nullptr;
}

// Any other unfinished job.
std::shared_ptr<Job> ThreadPool::other_job(const Job* own) {
  std::lock_guard lock(mutex_);
  for (size_t i = 0; i < active_.size(); ++i) {
    const auto& job = active_[(rotation_ + i) % active_.size()];
    if (job.get() == own || job->finished()) continue;
    rotation_ += i + 1;
    return job;
  }
  return nullptr;
}

void ThreadPool::helper_main() {
  const FpEnvironment fp;
  Idle idle;
  auto last_served = Clock::now();
  std::unique_lock lock(mutex_);
  for (;;) {
    const uint32_t seen = arrivals_.load(std::memory_order_relaxed);  // changes under the mutex only
    if (std::shared_ptr<Job> job = next_job()) {
      // The first seat is the caller's, whether or not it has come yet.
      const int index = std::max(1, job->seated_ - 1);
      lock.unlock();
      serve(job, false, index, idle);
      last_served = Clock::now();
      lock.lock();
      --job->seated_;
      give_token_back();
      continue;
    }
    idle = Idle();
    if (Clock::now() - last_served < kSpinBetweenJobs) {
      lock.unlock();
      for (uint32_t i = 0; i < kIdleRounds; ++i) {
        if (arrivals_.load(std::memory_order_relaxed) != seen) break;
        relax_cpu();
      }
      lock.lock();
      continue;
    }
    ++sleeping_helpers_;
    helpers_wake_.wait(lock, [&] { return called_helpers_ > 0; });
    --called_helpers_;
    --sleeping_helpers_;
    last_served = Clock::now();  // it was called for a job; should another thread have been faster, wait a little
  }
}

// Works on `job` until it has finished or, for a helper, until it may be of more use elsewhere.
void ThreadPool::serve(const std::shared_ptr<Job>& job, bool own, int index, Idle& idle) {
  const std::unique_ptr<Job::Seat> seat = job->sit(index);
  for (;;) {
    const Job::Step step = job->step(*seat);
    if (step == Job::Step::kFinished) break;
    if (step == Job::Step::kProgress) {
      idle.rounds = 0;
      continue;
    }
    relax_cpu();
    if (++idle.rounds % kIdleRounds != 0) continue;
    const auto now = Clock::now();
    if (idle.rounds == kIdleRounds) idle.since = now;
    if (now - idle.since > kSpinBeforeSleep) {
      sleep_until_moved(*job, *seat);
      idle.rounds = 0;
    } else if (now - idle.since > kSpinBeforeYield) {
      std::this_thread::yield();
    }
    if (active_count_.load(std::memory_order_relaxed) > 1) {
      if (!own) return;
      lend_a_hand(job.get());
    }
  }
  wake_callers();  // the job's own caller may sleep for want of a token
}

void ThreadPool::lend_a_hand(const Job* own) {
  const std::shared_ptr<Job> job = other_job(own);
  if (job == nullptr) return;
  const std::unique_ptr<Job::Seat> seat = job->sit(0);
  if (job->step(*seat) == Job::Step::kFinished) wake_callers();
}

// The token is free meanwhile. On waking the thread works at once, so for a moment there may be one thread more
// than tokens.
void ThreadPool::sleep_until_moved(Job& job, Job::Seat& seat) {
  const uint32_t word = wake_word_.load(std::memory_order_seq_cst);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  // What was published before this thread counted as a sleeper woke nobody: look once more. The fence keeps the
  // look, made of relaxed loads, behind the count.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (job.step(seat) == Job::Step::kIdle) {
    {
      std::lock_guard lock(mutex_);
      give_token_back();
    }
    wake_word_.wait(word, std::memory_order_seq_cst);
    std::lock_guard lock(mutex_);
    ++working_;
  }
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace jax_mpk::host
