#include "host/executor.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "host/launch.h"
#include "host/thread_pool.h"

namespace jax_mpk::host {
namespace {

void count_busy(const ScheduleNode::List& list, std::vector<bool>& busy) {
  for (const ScheduleNode& node : list) {
    for (size_t i = 0; i < node.queues.size(); ++i) {
      if (!node.queues[i].empty()) busy[i] = true;
    }
    count_busy(node.cond, busy);
    count_busy(node.body, busy);
    for (const auto& arm : node.arms) count_busy(arm, busy);
  }
}

// All ones reads as NaN, −1 and an invalid bool; random bytes find what happens to cope with that.
void poison(std::byte* data, int64_t nbytes, Random& random) {
  if (nbytes <= 0) return;
  std::byte pattern[64];
  if (random.below(2) == 0) {
    std::memset(pattern, 0xff, sizeof pattern);
  } else {
    for (size_t i = 0; i < sizeof pattern; i += 8) {
      const uint64_t bits = random.next();
      std::memcpy(pattern + i, &bits, 8);
    }
  }
  for (int64_t i = 0; i < nbytes; i += static_cast<int64_t>(sizeof pattern)) {
    std::memcpy(data + i, pattern, static_cast<size_t>(std::min<int64_t>(nbytes - i, sizeof pattern)));
  }
}

Outcome refuse(std::string message) { return {Outcome::Kind::kFailed, std::move(message)}; }

}  // namespace

Executable::Executable(std::unique_ptr<const Program> program) : program_(std::move(program)) {
  for (const Storage& storage : program_->storages) {
    if (storage.kind == Storage::Kind::kInput) arguments_ = std::max(arguments_, storage.index + 1);
    if (storage.kind == Storage::Kind::kOutput) {
      results_ = std::max(results_, storage.index + 1);
      arguments_ = std::max(arguments_, storage.argument + 1);
    }
  }
  if (program_->workspace_bytes > 0) ++results_;
  std::vector<bool> busy(static_cast<size_t>(program_->workers));
  count_busy(program_->schedule, busy);
  busy_workers_ = static_cast<int32_t>(std::count(busy.begin(), busy.end(), true));
}

Outcome Executable::launch(std::span<const Buffer> arguments, std::span<const Buffer> results,
                           const LaunchOptions& options) {
  const auto expected_results = static_cast<size_t>(results_);
  if (results.size() < expected_results || arguments.size() < static_cast<size_t>(arguments_)) {
    return refuse("the program has " + std::to_string(arguments_) + " arguments and " + std::to_string(results_) +
                  " results, the call has " + std::to_string(arguments.size()) + " and " +
                  std::to_string(results.size()));
  }
  std::byte* workspace = nullptr;
  if (program_->workspace_bytes > 0) {
    const Buffer& buffer = results.back();
    if (buffer.nbytes < program_->workspace_bytes) {
      return refuse("the workspace has " + std::to_string(buffer.nbytes) + " bytes, the program needs " +
                    std::to_string(program_->workspace_bytes));
    }
    workspace = buffer.data;
  }

  std::optional<Random> chaos;
  if (options.chaos_seed.has_value()) {
    chaos.emplace(*options.chaos_seed);
    poison(workspace, program_->workspace_bytes, *chaos);
  }
  std::vector<std::byte*> base;
  base.reserve(program_->storages.size());
  for (const Storage& storage : program_->storages) {
    if (storage.kind == Storage::Kind::kWorkspace) {
      base.push_back(workspace + storage.offset);
      continue;
    }
    const bool input = storage.kind == Storage::Kind::kInput;
    const Buffer& buffer = (input ? arguments : results)[static_cast<size_t>(storage.index)];
    if (buffer.nbytes < storage.nbytes) {
      return refuse((input ? "argument " : "result ") + std::to_string(storage.index) + " has " +
                    std::to_string(buffer.nbytes) + " bytes, the program needs " + std::to_string(storage.nbytes));
    }
    base.push_back(buffer.data);
    if (!input && storage.argument >= 0) {
      // Normally one buffer. Where the caller gave two, the result starts as a copy of the argument.
      const Buffer& argument = arguments[static_cast<size_t>(storage.argument)];
      if (argument.nbytes < storage.nbytes) return refuse("an aliased argument is too small");
      if (argument.data != buffer.data && storage.nbytes > 0) {
        std::memcpy(buffer.data, argument.data, static_cast<size_t>(storage.nbytes));
      }
    } else if (!input && chaos.has_value()) {
      poison(buffer.data, storage.nbytes, *chaos);
    }
  }

  ThreadPool& pool = ThreadPool::instance();
  const int helpers = std::max(0, std::min({pool.limit(), busy_workers_, options.max_threads}) - 1);
  const auto launch = std::make_shared<Launch>(shared_from_this(), std::move(base), options, helpers);
  pool.run(launch);
  return launch->outcome();
}

std::unique_ptr<Scratch> Executable::take_scratch() {
  {
    std::lock_guard lock(mutex_);
    if (!scratch_.empty()) {
      auto scratch = std::move(scratch_.back());
      scratch_.pop_back();
      return scratch;
    }
  }
  return std::make_unique<Scratch>(*program_);
}

void Executable::give_scratch(std::unique_ptr<Scratch> scratch) {
  std::lock_guard lock(mutex_);
  scratch_.push_back(std::move(scratch));
}

}  // namespace jax_mpk::host
