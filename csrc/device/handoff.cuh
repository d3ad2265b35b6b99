// Hand-offs between workers: counter events and tagged words, and what happens when one never comes.
#pragma once

#include "launch.cuh"
#include "memory.cuh"
#include "types.cuh"

namespace mpk {

// Counters lie a sector apart, so that polling one does not slow another.
constexpr int kEventWords = 8;

// Every wait of a thread. One that passes the deadline makes all waits of the launch fall through.
struct Watch {
  StateHeader* header;
  Record* record;
  u64 deadline_ns;
  u32 worker;

  __device__ bool aborted() const { return load_relaxed(&header->abort) != 0; }

  // Repeats `done` until it holds; false: the launch gave up.
  template <class Done, class Report>
  __device__ __forceinline__ bool until(Done&& done, Report&& report) const {
    u64 start = 0;
    for (u32 spins = 1; !done(); ++spins) {
      if (spins % 256 != 0) continue;
      if (aborted()) return false;
      const u64 now = nanoseconds();
      if (start == 0) start = now;
      if (deadline_ns != 0 && now - start > deadline_ns) {
        if (atomicCAS(&header->abort, 0u, 1u) == 0) report();
        return false;
      }
    }
    return true;
  }

  __device__ void note(u32 task, WaitKind kind, u32 what, u32 expected, u32 seen, u64 element = 0) const {
    volatile Record* r = record;
    r->worker = worker;
    r->task = task;
    r->kind = static_cast<u32>(kind);
    r->what = what;
    r->expected = expected;
    r->seen = seen;
    r->element = element;
    __threadfence_system();
    r->set = 1;
  }

  // Counters only grow, modulo 2^32.
  __device__ bool event(const u32* counter, u32 threshold, u32 task, u32 number) const {
    u32 seen;
    return until([&] { return static_cast<s32>((seen = load_acquire(counter)) - threshold) >= 0; },
                 [&] { note(task, kWaitEvent, number, threshold, seen); });
  }

  __device__ bool barrier(u32 threshold) const {
    u32 seen;
    return until([&] { return static_cast<s32>((seen = load_acquire(&header->arrivals)) - threshold) >= 0; },
                 [&] { note(~0u, kWaitBarrier, 0, threshold, seen); });
  }
};

// A value handed over by tagged words: payload and tag in one machine word, each its own event.
template <class T>
struct Tagged {
  static_assert(sizeof(T) <= 4);
  static constexpr bool kNarrow = sizeof(T) <= 2;
  using Word = typename IntegerOf<kNarrow ? 4 : 8>::Unsigned;
  static constexpr int kShift = kNarrow ? 16 : 32;
  static constexpr int kVector = 16 / sizeof(Word);

  Word* words;
  u32 tag;

  __device__ bool tagged(Word w) const { return (w & ((Word(1) << kShift) - 1)) == tag; }
  __device__ static T payload(Word w) { return bitcast<T>(static_cast<UnsignedOf<T>>(w >> kShift)); }

  __device__ T get(const Watch& watch, u32 task, u64 i) const {
    Word w;
    watch.until([&] { return tagged(w = load_relaxed(words + i)); },
                [&] { watch.note(task, kWaitTag, tag, tag, w & 65535, i); });
    return payload(w);
  }
  template <class C>
  __device__ T get(const C& c, u64 i) const {
    return get(c.watch, c.task[1], i);
  }

  // What this very task has stored.
  __device__ T own(u64 i) const { return payload(load_relaxed(words + i)); }
  __device__ void put(u64 i, T v) const { store_relaxed(words + i, Word(bitcast<UnsignedOf<T>>(v)) << kShift | tag); }
};

// The payloads of 16 bytes of words, to consecutive elements.
template <class T, class Word, int count>
__device__ __forceinline__ void put_vector(T* to, const Word (&w)[count]) {
  if (sizeof(T) == 2 && (shared_address(to) & 7) == 0) {
    u32 pairs[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) pairs[e] = __byte_perm(u32(w[2 * e % count]), u32(w[(2 * e + 1) % count]), 0x7632);
    *reinterpret_cast<u64*>(to) = pairs[0] | u64(pairs[1]) << 32;
    return;
  }
#pragma unroll
  for (int e = 0; e < count; ++e) to[e] = Tagged<T>::payload(w[e]);
}

// Brings `count` consecutive elements to shared memory, when they have arrived. Many loads are under way at a time:
// one alone takes as long as all of them. Not inlined: code of tasks has many such places.
template <class T, int threads>
__device__ __noinline__ void stage_elements(Watch watch, u32 task, Tagged<T> from, u64 first, int count, T* to,
                                            int thread) {
  using Word = typename Tagged<T>::Word;
  constexpr int kVector = Tagged<T>::kVector, kBatch = 8;
  const int head = min(count, static_cast<int>((kVector - first % kVector) % kVector));
  const int vectors = (count - head) / kVector;
  const Word* words = from.words + first + head;
  for (int base = thread; base < vectors; base += kBatch * threads) {
    Word w[kBatch][kVector];
    u32 missing = 0;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) missing |= base + k * threads < vectors ? 1u << k : 0u;
    watch.until(
        [&] {
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            if (missing >> k & 1) load_relaxed(words + (base + k * threads) * kVector, w[k]);
          }
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            bool all = true;
#pragma unroll
            for (int e = 0; e < kVector; ++e) all &= from.tagged(w[k][e]);
            if (all) missing &= ~(1u << k);
          }
          return missing == 0;
        },
        [&] {
          const int at = head + (base + (__ffs(missing) - 1) * threads) * kVector;
          watch.note(task, kWaitTag, from.tag, from.tag, 0, first + at);
        });
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (base + k * threads < vectors) put_vector<T>(to + head + (base + k * threads) * kVector, w[k]);
    }
  }
  const int rest = count - vectors * kVector;
  for (int k = thread; k < rest; k += threads) {
    const int at = k < head ? k : k + vectors * kVector;
    to[at] = from.get(watch, task, first + at);
  }
}

template <class T, class C>
__device__ __forceinline__ void stage(const C& c, const Tagged<T>& from, u64 first, int count, T* to) {
  stage_elements<T, C::kThreads>(c.watch, c.task[1], from, first, count, to, c.thread);
}

}  // namespace mpk
