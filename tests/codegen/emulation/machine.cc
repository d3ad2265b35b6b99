// Runs a generated kernel's threads as fibers. `entry` is the kernel, with its parameter given by address.
#include <sys/mman.h>
#include <ucontext.h>

#include "machine.h"  // last: its macros are not for other headers

namespace machine {

Fiber* self;
std::vector<Landing> landings;

namespace {

constexpr size_t kStack = 128 << 10;
std::vector<Fiber*> ready;
jmp_buf scheduler;
uint64_t random_state, turns;
void (*kernel)(const void*);
const void* parameter;
int finished;

uint64_t draw() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return random_state >> 33;
}

void block() {
  if (_setjmp(self->at) == 0) _longjmp(scheduler, 1);
}

void wake(std::vector<Fiber*>& waiting) {
  ready.insert(ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

void body() {
  kernel(parameter);
  ++finished;
  _longjmp(scheduler, 1);
}

void join(int& arrived, int total, std::vector<Fiber*>& waiting) {
  if (++arrived == total) {
    arrived = 0;
    wake(waiting);
    return;
  }
  waiting.push_back(self);
  block();
}

void resume(Fiber* f) {
  self = f;
  ++turns;
  if (_setjmp(scheduler) != 0) return;
  if (f->started) _longjmp(f->at, 1);
  f->started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = f->stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, body, 0);
  setcontext(&context);
}

}  // namespace

__attribute__((noinline)) void yield() {
  ready.push_back(self);
  block();
}

__attribute__((noinline)) void sync(int count) { join(self->cta->arrived, count, self->cta->waiting); }
__attribute__((noinline)) void sync_all() { join(self->cta->all_arrived, self->cta->total, self->cta->all_waiting); }

uint64_t now() { return 100 * turns; }

__attribute__((noinline)) Meeting& meet(unsigned mask, uint64_t given) {
  if ((mask >> lane() & 1) == 0) std::fprintf(stderr, "a lane is not in its own mask\n"), std::abort();
  auto& meetings = self->cta->warps[self->thread.x / 32];
  size_t k = 0;
  while (k < meetings.size() && meetings[k].mask != mask) ++k;
  if (k == meetings.size()) meetings.push_back({mask, 0, {}, {}, {}});
  meetings[k].given[lane()] = given;
  meetings[k].arrived |= 1u << lane();
  // Nobody can be a meeting ahead of a lane that has not looked yet: `seen` lasts until all have arrived again.
  if (meetings[k].arrived == mask) {
    std::memcpy(meetings[k].seen, meetings[k].given, sizeof(meetings[k].seen));
    meetings[k].arrived = 0;
    wake(meetings[k].waiting);
  } else {
    meetings[k].waiting.push_back(self);
    block();
  }
  return meetings[k];
}

}  // namespace machine

// 0: done; 1: threads wait for each other for ever, or something may land in shared memory that is not theirs any more.
extern "C" int emulate(void (*kernel)(const void*), const void* parameter, int workers, int threads, int shared_bytes,
                       uint64_t seed) {
  using namespace machine;
  machine::kernel = kernel;
  machine::parameter = parameter;
  finished = 0;
  landings.clear();
  random_state = seed * 2 + 1;
  std::vector<Cta> ctas(static_cast<size_t>(workers));
  std::vector<Fiber> fibers(static_cast<size_t>(workers * threads));
  const size_t stacks = fibers.size() * kStack;
  char* memory = static_cast<char*>(
      mmap(nullptr, stacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (int w = 0; w < workers; ++w) {
    Cta& cta = ctas[static_cast<size_t>(w)];
    const size_t size = (static_cast<size_t>(shared_bytes) + 2047) / 1024 * 1024;
    cta.shared = static_cast<char*>(std::aligned_alloc(1024, size));
    std::memset(cta.shared, seed % 2 ? 0 : 0xFF, size);  // zero and false; NaN, true and no index
    cta.total = threads;
    cta.warps.resize(static_cast<size_t>((threads + 31) / 32));
    for (int t = 0; t < threads; ++t) {
      Fiber& f = fibers[static_cast<size_t>(w * threads + t)];
      f.thread.x = static_cast<unsigned>(t), f.block.x = static_cast<unsigned>(w);
      f.cta = &cta;
      f.stack = memory + kStack * static_cast<size_t>(w * threads + t);
      ready.push_back(&f);
    }
  }
  while (!ready.empty()) {
    const size_t k = draw() % ready.size();
    Fiber* f = ready[k];
    ready[k] = ready.back();
    ready.pop_back();
    resume(f);
  }
  munmap(memory, stacks);
  for (Cta& cta : ctas) std::free(cta.shared);
  return finished == workers * threads && landings.empty() ? 0 : 1;
}
