// What generated kernels need of CUDA, on a CPU: every thread of every CTA is a fiber, and one OS thread runs them all,
// a while each, in an order that depends on a seed. Barriers, shuffles and waits are where fibers take turns.
#pragma once

#include <math.h>
#include <setjmp.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (machine::self->thread)
#define blockIdx (machine::self->block)

namespace machine {

struct Index {
  unsigned x;
};

// What the lanes of a warp named in one mask do together.
struct Meeting {
  unsigned mask, arrived;
  uint64_t given[32], seen[32];
  std::vector<struct Fiber*> waiting;
};

struct Cta {
  char* shared;
  int arrived = 0, total = 0, all_arrived = 0;
  std::vector<struct Fiber*> waiting, all_waiting;
  std::vector<std::vector<Meeting>> warps;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  Index thread, block;
  Cta* cta;
  jmp_buf at;
  bool started = false;
  char* stack;
  std::vector<Copy> copies;
  size_t marked = 0;  // of these, the first ones
};

// Copies that an mbarrier waits for.
struct Landing {
  std::vector<Copy> copies;
  void* barrier;
  int bytes;  // that the barrier counts; 0: it counts an arrival
};

extern Fiber* self;
extern std::vector<Landing> landings;  // oldest first

void yield();                         // lets others run
void sync(int count);                 // of the CTA's first `count` threads
void sync_all();
uint64_t now();                       // nanoseconds, of which a thread's turn takes a hundred
Meeting& meet(unsigned mask, uint64_t given);  // all lanes of the mask; `seen` is what they gave

inline int lane() { return static_cast<int>(self->thread.x % 32); }

template <class T>
T shuffle(unsigned mask, T value, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Meeting& m = meet(mask, bits);
  T out;
  std::memcpy(&out, &m.seen[from >= 0 && from < 32 ? from : lane()], sizeof(T));
  return out;
}

}  // namespace machine

template <class T> T __shfl_sync(unsigned mask, T v, int from) { return machine::shuffle(mask, v, from); }
template <class T> T __shfl_up_sync(unsigned mask, T v, int by) { return machine::shuffle(mask, v, machine::lane() - by); }
template <class T> T __shfl_down_sync(unsigned mask, T v, int by) { return machine::shuffle(mask, v, machine::lane() + by); }
template <class T> T __shfl_xor_sync(unsigned mask, T v, int by) { return machine::shuffle(mask, v, machine::lane() ^ by); }
inline void __syncwarp(unsigned mask = ~0u) { machine::meet(mask, 0); }
inline void __syncthreads() { machine::sync_all(); }
inline unsigned __ballot_sync(unsigned mask, bool p) {
  const machine::Meeting& m = machine::meet(mask, p);
  unsigned out = 0;
  for (int k = 0; k < 32; ++k) out |= (mask >> k & 1 && m.seen[k] != 0 ? 1u : 0u) << k;
  return out;
}
inline bool __any_sync(unsigned mask, bool p) { return __ballot_sync(mask, p) != 0; }
inline bool __all_sync(unsigned mask, bool p) { return __ballot_sync(mask, p) == mask; }
inline unsigned __match_any_sync(unsigned mask, unsigned v) {
  const machine::Meeting& m = machine::meet(mask, v);
  unsigned out = 0;
  for (int k = 0; k < 32; ++k) out |= (mask >> k & 1 && m.seen[k] == v ? 1u : 0u) << k;
  return out;
}
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned how) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  unsigned out = 0;
  for (int k = 0; k < 4; ++k) out |= static_cast<unsigned>(both >> 8 * (how >> 4 * k & 7) & 255) << 8 * k;
  return out;
}
inline void __threadfence_system() {}
template <class T> T atomicAdd(T* p, T v) { const T old = *p; *p += v; return old; }
template <class T> T atomicCAS(T* p, T expected, T v) { const T old = *p; if (old == expected) *p = v; return old; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
