#include <algorithm>
#include <set>

#include "cuda/executable.h"

namespace jax_mpk::cuda {

namespace {

std::mutex instance_mutex;
std::shared_ptr<Runtime> the_instance;

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

std::atomic<uint64_t>& load_nanoseconds() {
  static std::atomic<uint64_t> total{0};
  return total;
}

std::shared_ptr<Runtime> Runtime::instance() {
  const std::lock_guard lock(instance_mutex);
  if (the_instance == nullptr) the_instance = std::make_shared<Runtime>();
  return the_instance;
}

std::shared_ptr<Runtime> Runtime::opened() {
  const std::lock_guard lock(instance_mutex);
  return the_instance;
}

// Whether a state holds a failure that nobody has seen; its text is the caller's from then on.
bool Runtime::take(State& state, std::string* text) {
  std::atomic_ref<mpk::u32> set(state.record->set);
  if (set.load(std::memory_order_acquire) == 0) return false;
  *text = state.owner->describe(*state.record);
  // Until the state has been zeroed its launches give up at once, and leave the record alone.
  state.aborted = true;
  set.store(0, std::memory_order_relaxed);
  return true;
}

void Runtime::raise(int32_t ordinal) {
  const std::lock_guard lock(mutex_);
  for (auto left = left_behind_.begin(); left != left_behind_.end(); ++left) {
    if (left->first != ordinal) continue;
    const std::string text = left->second;
    left_behind_.erase(left);
    throw Failure(Failure::Kind::kDeadline, text);
  }
  std::string text;
  for (State* state : states_) {
    if (state->ordinal == ordinal && take(*state, &text)) throw Failure(Failure::Kind::kDeadline, text);
  }
}

void Runtime::raise(State& state) {
  const std::lock_guard lock(mutex_);
  std::string text;
  if (take(state, &text)) throw Failure(Failure::Kind::kDeadline, text);
}

std::vector<std::string> Runtime::check() {
  std::set<std::pair<CUcontext, CUstream>> streams;
  {
    const std::lock_guard lock(mutex_);
    for (const State* state : states_) streams.emplace(state->module->context, state->stream);
  }
  // Not under the lock: others go on launching meanwhile.
  for (const auto& [context, stream] : streams) {
    const ContextScope scope(driver, context);
    driver.check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize");
  }
  const std::lock_guard lock(mutex_);
  std::vector<std::string> texts;
  for (auto& [ordinal, text] : left_behind_) texts.push_back(std::move(text));
  left_behind_.clear();
  for (State* state : states_) {
    if (std::string text; take(*state, &text)) texts.push_back(std::move(text));
  }
  return texts;
}

void Runtime::add(State& state) {
  const std::lock_guard lock(mutex_);
  states_.push_back(&state);
}

void Runtime::remove(State& state, bool readable) {
  const std::lock_guard lock(mutex_);
  if (std::string text; readable && take(state, &text)) left_behind_.emplace_back(state.ordinal, std::move(text));
  std::erase(states_, &state);
}

bool Runtime::take_aborted(State& state) {
  const std::lock_guard lock(mutex_);
  return std::exchange(state.aborted, false);
}

}  // namespace jax_mpk::cuda
