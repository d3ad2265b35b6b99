// The persistent kernel: one CTA per SM walks its static queue of tasks.
//
// A CTA has consumer warps, which run tasks, and one producer warp, which brings constant bytes (weights) to the ring
// in shared memory ahead of all dependencies. Both walk the same schedule of segments, loops and branches.
//
// A generated program supplies `Shape`, the sizes of everything, and in it:
//   advance(progress, role)   goes on in the schedule, calls role.barrier and role.decide, up to the next segment
//   run(context, routine)     runs the current task
#pragma once

#include "handoff.cuh"
#include "launch.cuh"
#include "memory.cuh"
#include "ring.cuh"
#include "types.cuh"

namespace mpk {

constexpr int kWarp = 32;

// A branch index, as lax.switch takes it.
__device__ __forceinline__ int clamped(s32 index, int arms) { return min(max(index, 0), arms - 1); }

// How far a worker is in the schedule, which is a function that returns at every segment and goes on behind it: all
// segments are walked by the same code, where the compiler knows the launch's parameters for what they are.
template <class Shape>
struct Progress {
  int segment = -1;           // whose turn it is
  s64 rounds[Shape::kDepth];  // behind the loops around it, as far as their trips are counted
};

// What code of tasks sees: the consumer side of a worker.
template <class Sizes>
struct Context {
  using Shape = Sizes;
  static constexpr int kWarps = Shape::kWarps, kThreads = kWarps * kWarp, kStageBytes = Shape::kStageBytes;
  static constexpr int kStages = Shape::kStages;

  const typename Shape::Launch& launch;
  int slot = 0;       // which of the two places in shared memory has the words of the current task
  u32 tag = 0;        // of this run of the segment
  u32 barriers = 0;   // of all workers, passed in this launch
  u32 decisions = 0;  // read from memory and handed to the producer
  Ring<Shape> ring;

  __device__ explicit Context(const typename Shape::Launch& l) : launch(l) {}

  // -- who I am --
  __device__ static int worker() { return blockIdx.x; }
  __device__ static int thread() { return threadIdx.x; }
  __device__ static int warp() { return threadIdx.x / kWarp; }
  __device__ static int lane() { return threadIdx.x % kWarp; }
  __device__ Watch watch() const { return {reinterpret_cast<const Launch<1>*>(&launch)}; }

  // -- the current task --
  __device__ u32 task(int word) const { return shared_at<u32>(Shape::kSlots)[slot * Shape::kTaskWords + word]; }
  __device__ int box(int word) const { return static_cast<int>(task(word)); }
  template <class T>
  __device__ T* global(int word) const {
    return reinterpret_cast<T*>(static_cast<char*>(launch.buffers[task(word)]) + u64(task(word + 1)) * 16);
  }
  template <class T>
  __device__ Tagged<T> tagged(int word) const {
    auto* words = static_cast<char*>(launch.state) + u64(task(word)) * 16;
    return {reinterpret_cast<typename Tagged<T>::Word*>(words), tag};
  }
  template <class T>
  __device__ static T* local(int byte) {
    return shared_at<T>(Shape::kScratch + byte);
  }
  // Device memory for what is too large for scratch; each worker that needs some has its own.
  template <class T>
  __device__ T* memory(int slot, int byte) const {
    return reinterpret_cast<T*>(static_cast<char*>(launch.state) + Shape::kMemory + s64(Shape::kMemoryBytes) * slot +
                                byte);
  }
  template <class T>
  __device__ static T* partials() {
    return shared_at<T>(Shape::kPartials);
  }

  // When the current task began (0), had all its operands (1) and was done (2); only in programs with a trace.
  __device__ void stamp(int what) const {
    if constexpr (Shape::kTrace != 0) {
      // The clock is not read before the task's number, and that not before the barrier in front of it.
      const u32 number = task(TaskWords::kTask);
      if (thread() == 0 && number != kNoTask) {
        reinterpret_cast<u64*>(static_cast<char*>(launch.state) + Shape::kTrace)[4 * number + what] = nanoseconds();
      }
    }
  }

  // All consumer threads of this worker.
  __device__ void sync() const { sync_threads<kThreads>(); }

  // -- schedule --
  __device__ __forceinline__ void segment(int s) {
    const u64 sequence = sequences()[s];
    tag = tag_of(sequence);
    const u32* queue = launch.tables + Shape::kQueues + (s * Shape::kWorkers + worker()) * 2;
    const u32 count = queue[1];
    const u32* words = launch.tables + Shape::kTasks + u64(queue[0]) * Shape::kTaskWords;
    if (count > 0) fetch(words, 0);
#pragma unroll 1
    for (u32 i = 0; i < count; ++i) {
      copies_wait();
      sync();  // the words have landed, and nobody reads scratch of the task before
      slot = i % 2;
      if (i + 1 < count) fetch(words + u64(i + 1) * Shape::kTaskWords, (i + 1) % 2);
      if (task(TaskWords::kWaits) > 0) {
        wait_for_events(static_cast<u32>(sequence) + 1);
        sync();
      }
      stamp(0);
      Shape::run(*this, task(TaskWords::kRoutine));
      stamp(2);
      if (task(TaskWords::kSignals) > 0) {
        sync();
        signal_events();
      }
    }
    sync();
    if (thread() == 0) sequences()[s] = sequence + 1;
    sync();
  }

  // All workers: what any of them did before is visible to all of them behind it.
  __device__ void barrier() {
    ++barriers;
    sync();
    if (thread() == 0) {
      add_release(&watch().header()->arrivals, 1);
      watch().barrier(barriers - 1, base() + barriers * Shape::kWorkers);
      control()[kStopped] = watch().aborted();
    }
    sync();
  }

  // Whether loops go on; as of the last barrier, so that all threads agree.
  __device__ bool running() const { return control()[kStopped] == 0; }

  // A predicate or branch index that every worker follows; behind a barrier.
  template <class T>
  __device__ T decide(int buffer, u32 offset) {
    const auto* at = static_cast<const char*>(launch.buffers[buffer]) + u64(offset) * 16;
    if (thread() == 0) control()[kDecision] = static_cast<u32>(*reinterpret_cast<const volatile T*>(at));
    sync();
    const u32 value = control()[kDecision];
    sync();  // the next decision may follow at once
    if constexpr (Shape::kStages > 0) ring.decide(*this, value, decisions++);
    return static_cast<T>(value);
  }

  // -- begin and end of a launch --
  __device__ void enter() {
    const u64* kept = reinterpret_cast<const u64*>(watch().header() + 1);
#pragma unroll 1
    for (int s = thread(); s < Shape::kSegments; s += kThreads) sequences()[s] = kept[s];
    if (thread() == 0) {
      control()[kBase] = watch().header()->barrier_base;
      control()[kStopped] = 0;
    }
    sync();
  }

  __device__ void leave() {
    if constexpr (Shape::kStages > 0) ring.settle(*this, decisions);
    sync();
    if (thread() == 0) control()[kDecision] = add_acq_rel(&watch().header()->ticket, 1) == Shape::kWorkers - 1;
    sync();
    if (!control()[kDecision]) return;  // only the last one out goes on
    if (thread() == 0) watch().header()->ticket = 0;
    if (watch().aborted()) return poison();
    u64* kept = reinterpret_cast<u64*>(watch().header() + 1);
#pragma unroll 1
    for (int s = thread(); s < Shape::kSegments; s += kThreads) kept[s] = sequences()[s];
    if (thread() == 0) {
      watch().header()->barrier_base = base() + barriers * Shape::kWorkers;
      watch().header()->launches += 1;
    }
  }

 private:
  __device__ __forceinline__ void wait_for_events(u32 round) const {
    const int order = task(TaskWords::kOrder);
#pragma unroll 1
    for (u32 k = thread(); k < task(TaskWords::kWaits); k += kThreads) {
      const u32 event = task(order + 2 * k);
      watch().event(events() + event * kEventWords, task(order + 2 * k + 1) * round, task(TaskWords::kTask), event);
    }
  }

  __device__ __forceinline__ void signal_events() const {
    const int order = task(TaskWords::kOrder) + 2 * task(TaskWords::kWaits);
#pragma unroll 1
    for (u32 k = thread(); k < task(TaskWords::kSignals); k += kThreads) {
      add_release(events() + task(order + k) * kEventWords, 1);
    }
  }

  // Words behind the sequences of the segments: how often each has run since the state was zero.
  enum : int { kBase = 2 * Shape::kSegments, kStopped, kDecision };

  __device__ u32* control() const { return shared_at<u32>(Shape::kControl); }
  __device__ u64* sequences() const { return shared_at<u64>(Shape::kControl); }
  __device__ u32 base() const { return control()[kBase]; }
  __device__ u32* events() const { return reinterpret_cast<u32*>(static_cast<char*>(launch.state) + Shape::kEvents); }

  __device__ void fetch(const u32* words, int i) const {
#pragma unroll 1
    for (int k = thread() * 4; k < Shape::kTaskWords; k += kThreads * 4) {
      copy_async<16>(shared_at<u32>(Shape::kSlots) + i * Shape::kTaskWords + k, words + k);
    }
  }

  // Nobody takes the results of a launch that gave up for real ones.
  __device__ void poison() const {
    const u32* row = launch.tables + Shape::kResults;
#pragma unroll 1
    for (int r = 0; r < Shape::kResultCount; ++r, row += 4) {
      const u32 pattern = row[1];
      auto* bytes = static_cast<unsigned char*>(launch.buffers[row[0]]);
      const u64 size = row[2] | u64(row[3]) << 32;
      const u32 width = pattern >> 8 & 255;
      // The last byte of an element has the sign (and a float's exponent); the others are all alike.
#pragma unroll 1
      for (u64 k = thread(); k < size; k += kThreads) {
        bytes[k] = k % width == width - 1 ? pattern & 255 : (pattern >> 16 & 255);
      }
    }
  }
};

// copy(row, k) for every unit k of every row of a box.
template <class C, class Copy>
__device__ __forceinline__ void copy_rows(const C& c, int rows, int units, Copy&& copy) {
#pragma unroll 1
  for (int n = c.thread(); n < rows * units; n += C::kThreads) copy(n / units, n % units);
}

// `rows` rows of `units` times 16 bytes, so many bytes apart, by the last `warps` warps. Nothing is computed for a row but
// whether it is there: other warps wait for tagged words meanwhile, and these should not be the last to be done.
template <int warps, int units, int to_stride, s64 from_stride, class C>
__device__ __forceinline__ void copy_aside(const C& c, int rows, void* to, const void* from) {
  constexpr int kTogether = warps * kWarp / units, kBatch = 4;
  static_assert(warps * kWarp % units == 0);
  const u32 t = afresh(c.thread()) - (C::kThreads - warps * kWarp);
  const int first = t / units;
  char* target = static_cast<char*>(to) + first * to_stride + t % units * 16;
  const char* source = static_cast<const char*>(from) + first * from_stride + t % units * 16;
#pragma unroll 1
  for (int n = first; n < rows; n += kBatch * kTogether) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (n + k * kTogether < rows) {
        copy_async<16>(target + k * kTogether * to_stride, source + k * kTogether * from_stride);
      }
    }
    target += kBatch * kTogether * to_stride;
    source += kBatch * kTogether * from_stride;
  }
}

template <class Shape, class Role>
__device__ __forceinline__ void follow_schedule(Role& role) {
  Progress<Shape> progress;
#pragma unroll 1
  while (Shape::advance(progress, role)) role.segment(progress.segment);
}

template <class Shape>
__device__ __forceinline__ void run_worker(const typename Shape::Launch& launch) {
  if constexpr (Shape::kStages > 0) {
    Ring<Shape>::init();
    __syncthreads();
    if (threadIdx.x >= Context<Shape>::kThreads) {
      Producer<Shape> producer(launch);
      follow_schedule<Shape>(producer);
      producer.drain();
      return;
    }
  }
  Context<Shape> context(launch);
  context.enter();
  follow_schedule<Shape>(context);
  context.leave();
}

}  // namespace mpk
