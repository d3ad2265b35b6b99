// Hand-offs between workers: counter events and tagged words, and what happens when one never comes.
#pragma once

#include "launch.cuh"
#include "memory.cuh"
#include "types.cuh"

namespace mpk {

// A task in the tables: the routine, then what its code reads (boxes, operands), then waits and signals.
struct TaskWords {
  enum : int { kRoutine, kTask, kWaits, kSignals, kOrder, kFirst };
};

// Counters lie a sector apart, so that polling one does not slow another.
constexpr int kEventWords = 8;

// Every wait of a thread. One that passes the deadline makes all waits of the launch fall through.
struct Watch {
  const Launch<1>* launch;  // its first members are those of any Launch

  __device__ StateHeader* header() const { return static_cast<StateHeader*>(launch->state); }
  __device__ bool aborted() const { return load_relaxed(&header()->abort) != 0; }

  // How long a wait may last, in quarters of the deadline: what may be late because another wait is outlasts that one,
  // which knows more.
  enum Patience { kForItself = 4, kForAnother, kForAll };

  // What came of a wait; not ok: the launch gave up.
  template <class Wait>
  struct Outcome {
    Wait wait;
    bool ok;
  };

  // Repeats wait.done() until it holds; the first thread of a launch that gives up calls wait.report(watch). Out of line,
  // with nothing by reference: what has come already costs those who wait one look of their own, before they call this.
  template <class Wait>
  __device__ __noinline__ static Outcome<Wait> outlast(Watch watch, Wait wait, Patience patience = kForAnother) {
    u64 start = 0;
#pragma unroll 1
    for (u32 spins = 1; !wait.done(); ++spins) {
      if (spins % 256 != 0) continue;
      if (start == 0) start = nanoseconds();
      const Late late = look(watch, start, patience);
      if (late == kFirst) wait.report(watch);
      if (late != kInTime) return {wait, false};
    }
    return {wait, true};
  }

  // Repeats `done` for a warp; it must be the same in all lanes, and keeps them together. False: the launch gave up.
  template <class Done, class Report>
  __device__ __forceinline__ bool until_together(Done&& done, Report&& report) const {
    u64 start = 0;
#pragma unroll 1
    for (u32 spins = 1; !done(); ++spins) {
      if (spins % 256 != 0) continue;
      if (start == 0) start = nanoseconds();
      u32 late = kInTime;
      if (threadIdx.x % 32 == 0) late = look(*this, start, kForAnother);
      late = __shfl_sync(~0u, late, 0);
      if (late == kFirst) report();
      if (late != kInTime) return false;
    }
    return true;
  }

  __device__ __noinline__ static void note(Watch watch, u32 task, WaitKind kind, u32 what, u32 expected, u32 seen,
                                           u64 element = 0) {
    volatile Record* r = watch.launch->record;
    r->worker = blockIdx.x;
    r->task = task;
    r->kind = static_cast<u32>(kind);
    r->what = what;
    r->expected = expected;
    r->seen = seen;
    r->element = element;
    __threadfence_system();
    r->set = 1;
  }

  // Whether it is time to give up, and whether this thread is the first to find that.
  enum Late { kInTime, kAborted, kFirst };
  __device__ __noinline__ static Late look(Watch watch, u64 start, Patience patience) {
    if (watch.aborted()) return kAborted;
    const u64 deadline = watch.launch->deadline_ns;
    if (deadline == 0 || nanoseconds() - start <= deadline / 4 * patience) return kInTime;
    return atomicCAS(&watch.header()->abort, 0u, 1u) == 0 ? kFirst : kAborted;
  }

  __device__ bool event(const u32* counter, u32 threshold, u32 task, u32 number) const {
    return counted({counter, threshold, task, kWaitEvent, number}, kForAnother);
  }
  __device__ bool barrier(u32 number, u32 threshold) const {
    return counted({&header()->arrivals, threshold, kNoTask, kWaitBarrier, number}, kForAll);
  }

 private:
  // Counters only grow, modulo 2^32.
  struct Counter {
    const u32* at;
    u32 threshold, task;
    WaitKind kind;
    u32 number, seen = 0;

    __device__ bool done() { return static_cast<s32>((seen = load_acquire(at)) - threshold) >= 0; }
    __device__ void report(Watch watch) const { note(watch, task, kind, number, threshold, seen); }
  };
  __device__ bool counted(Counter counter, Patience patience) const {
    return counter.done() || outlast(*this, counter, patience).ok;
  }
};

// The tag of a segment's run: 1 + sequence mod 65,535, which 2^16 mod 65,535 = 1 makes a sum of digits. It is never 0, and
// never that of the run before: 32 bits of the sequence would not do, as 2^32 mod 65,535 is 1.
__device__ __forceinline__ u32 tag_of(u64 sequence) {
  const u32 high = static_cast<u32>(sequence >> 32), low = static_cast<u32>(sequence);
  const u32 sum = (high >> 16) + (high & 65535) + (low >> 16) + (low & 65535);
  return 1 + sum % 65535;
}

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
    const Word w = load_relaxed(words + i);
    return payload(tagged(w) ? w : late(watch, task, i));
  }
  template <class C>
  __device__ T get(const C& c, u64 i) const {
    const Word w = load_relaxed(words + i);
    return payload(tagged(w) ? w : late(c.watch(), c.task(TaskWords::kTask), i));
  }

  // Where the words begin in the state, in units of 16 bytes: what reports call the value.
  __device__ u32 place(const Watch& watch) const {
    const auto* state = static_cast<const char*>(watch.launch->state);
    return static_cast<u32>((reinterpret_cast<const char*>(words) - state) / 16);
  }

  // What this very task has stored.
  __device__ T own(u64 i) const { return payload(load_relaxed(words + i)); }
  __device__ void put(u64 i, T v) const { store_relaxed(words + i, Word(bitcast<UnsignedOf<T>>(v)) << kShift | tag); }

 private:
  struct Arrival;
  __device__ Word late(const Watch& watch, u32 task, u64 i) const {
    return Watch::outlast(watch, Arrival{*this, i, task}).wait.seen;
  }
};

template <class T>
struct Tagged<T>::Arrival {
  Tagged from;
  u64 i;
  u32 task;
  Word seen = 0;

  __device__ bool done() { return from.tagged(seen = load_relaxed(from.words + i)); }
  __device__ void report(Watch watch) const {
    Watch::note(watch, task, kWaitTag, from.place(watch), from.tag, seen & 65535, i);
  }
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

// Brings `count` consecutive elements to shared memory, when they have arrived: thread `thread` of `threads`, with all
// of its warp. Every thread has several loads under way at a time, and asks again for what is missing only. Not inlined:
// tasks have many such places.
template <class T>
__device__ __noinline__ void stage_elements(Watch watch, u32 task, Tagged<T> from, u64 first, int count, int to_byte,
                                            int thread, int threads) {
  using Word = typename Tagged<T>::Word;
  constexpr int kVector = Tagged<T>::kVector, kBatch = 4;
  T* to = shared_at<T>(to_byte);
  const int lane = thread % 32;
  const int head = min(count, static_cast<int>((kVector - first % kVector) % kVector));
  const int vectors = (count - head) / kVector;
  const Word* words = from.words + first + head;
#pragma unroll 1
  for (int base = thread; base - lane < vectors; base += kBatch * threads) {
    u32 missing = 0;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) missing |= (base + k * threads < vectors ? 1u : 0u) << k;
    watch.until_together(
        [&] {
          Word w[kBatch][kVector];
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            if (missing >> k & 1) load_relaxed(words + (base + k * threads) * kVector, w[k]);
          }
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            bool all = missing >> k & 1;
#pragma unroll
            for (int e = 0; e < kVector; ++e) all &= from.tagged(w[k][e]);
            if (!all) continue;
            put_vector<T>(to + head + (base + k * threads) * kVector, w[k]);
            missing &= ~(1u << k);
          }
          return __all_sync(~0u, missing == 0) != 0;
        },
        [&] {
          // One lane reports, with the first word that it lacks.
          if (lane != __ffs(__ballot_sync(~0u, missing != 0)) - 1) return;
          const int at = (base + (__ffs(missing) - 1) * threads) * kVector;
          int e = 0;
          while (e + 1 < kVector && from.tagged(load_relaxed(words + at + e))) ++e;
          const u32 seen = static_cast<u32>(load_relaxed(words + at + e)) & 65535;
          Watch::note(watch, task, kWaitTag, from.place(watch), from.tag, seen, first + head + at + e);
        });
  }
  const int rest = count - vectors * kVector;
#pragma unroll 1
  for (int k = thread; k < rest; k += threads) {
    const int at = k < head ? k : k + vectors * kVector;
    to[at] = from.get(watch, task, first + at);
  }
}

// By some warps of a worker, so that others can wait for other values at the same time.
template <class T, class C>
__device__ __forceinline__ void stage(const C& c, const Tagged<T>& from, u64 first, int count, T* to, int warp, int warps) {
  if (c.warp() < warp || c.warp() >= warp + warps) return;
  const int byte = static_cast<int>(shared_address(to) - shared_base());
  const int thread = c.thread() - warp * 32;
  stage_elements<T>(c.watch(), c.task(TaskWords::kTask), from, first, count, byte, thread, warps * 32);
}

// Brings one element to shared memory.
template <class T, class C>
struct BringOne {
  const C& c;
  const Tagged<T>& from;
  __device__ void operator()(u64 at, T* to) const { *to = from.get(c, at); }
};

// The same for `count` elements that lie anywhere: element(k, bring) calls bring(from, to) once.
template <class T, class C, class Element>
__device__ __forceinline__ void stage_each(const C& c, const Tagged<T>& from, int count, int warp, int warps,
                                           Element&& element) {
  if (c.warp() < warp || c.warp() >= warp + warps) return;
#pragma unroll 1
  for (int k = c.thread() - warp * 32; k < count; k += warps * 32) {
    element(k, BringOne<T, C>{c, from});
  }
}

}  // namespace mpk
