// The ring in shared memory through which constant bytes stream, ahead of all dependencies.
//
// A stage holds one chunk. Chunks are numbered in the order of the worker's queue; both sides derive stage and parity
// from the number. The ring is deep, but few chunks are in flight: a filled memory system would delay every small,
// latency-critical access behind it.
#pragma once

#include "handoff.cuh"
#include "launch.cuh"
#include "memory.cuh"
#include "types.cuh"

namespace mpk {

// What the producer does for a task, see tables.py: consecutive bytes of a buffer that the task streams; or, where
// `group` is not 0, `rows` rows of `length` bytes in tiles, chunk_bytes of kPieceRows rows each per chunk, `block` bytes
// of `group` tiles before what follows of these; or, where chunk_bytes is kColumns and more, `rows` rows of `bytes` bytes
// each, `stride` apart, in blocks of columns of as many bytes as there are more, a chunk being what fits of a block's
// rows; or, where chunk_bytes is 0, `rows` rows of `bytes` bytes each, `stride` apart, which it will copy and wants in the
// L2 cache; or the same with kPaced there, of more bytes than may be asked for at once. A multiple of kLiveRows added to
// one of these last two says that Shape::live_rows knows which rows these are, given the number in `rows`.
struct StreamJob {
  u32 buffer, chunk_bytes;
  u64 offset;
  union {
    u64 bytes;
    struct {
      u32 length, block;
    };
  };
  u32 rows;
  union {
    u32 stride, group;
  };
};
static_assert(sizeof(StreamJob) == 32);
constexpr u32 kPaced = 1, kColumns = 1u << 16, kLiveRows = 1u << 20;
constexpr u32 kTileRows = 16, kPieceRows = 4;  // of a tile, and of it in a chunk that holds a piece of each: matmul.cuh
constexpr int kNarrowBlock = 128, kWideBlock = 256;  // bytes of a block's row, see columns.cuh

// What kinds of pieces the chunks of a program are, other than whole rows: bits of Shape::kTiles.
enum : int { kHasTiles = 1, kHasColumns = 2 };

// Where 16 bytes of a row of a block lie in its chunk: their number in the row is exclusive-ored with this. The eight rows
// that ldmatrix reads at a time, two of each of four groups of eight, then lie in different banks.
__device__ constexpr u32 block_swizzle(u32 row) { return row / 8 % 4 * 2 + row % 2; }

// The consumer's side.
template <class Shape>
struct Ring {
  u32 next = 0;  // number of the next chunk of this worker

  // Where barriers and bytes are, from shared_base() on.
  __device__ static constexpr u32 full(u32 stage) { return Shape::kBarriers + stage * 8; }
  __device__ static constexpr u32 empty(u32 stage) { return full(Shape::kStages + stage); }
  __device__ static constexpr u32 held(u32 stage) { return Shape::kRing + stage * Shape::kStageBytes; }
  // Decisions (loop predicates, branch indices) on their way to the producer: filled and taken.
  __device__ static constexpr u32 decided() { return full(2 * Shape::kStages); }
  __device__ static constexpr u32 taken() { return full(2 * Shape::kStages + 1); }
  __device__ static volatile u32* decision() { return shared_at<volatile u32>(full(2 * Shape::kStages + 2)); }

  __device__ static void init() {
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < 2 * Shape::kStages + 2; ++i) {
        const bool middle = i / Shape::kStages == 1;  // these are `empty`
        barrier_init(shared_base() + full(i), middle ? kReleases : 1);
      }
      barriers_ready();
    }
  }

  // Who reads a stage is never a round ahead of its barrier, so that parity is enough: a piece of a tile is read, and
  // released, by all warps; all other chunks of a stage by the same one, every kStep-th.
  static constexpr int kReleases = (Shape::kTiles & kHasTiles) != 0 ? Shape::kWarps : 1;
  static constexpr int kStep = Shape::kReaders;
  static_assert(kStep <= Shape::kWarps && Shape::kStages % kStep == 0);

  // How many chunks from the next one on it is to a warp's first; beyond any task's for warps that read none.
  __device__ int mine(int warp) const {
    const int at = next % kStep;
    return warp >= kStep ? 1 << 30 : warp >= at ? warp - at : warp + kStep - at;
  }

  // Waits until the bytes of chunk `number` have landed; false: the launch gave up.
  template <class C>
  __device__ bool wait(const C& c, u32 number) const {
    return landed(number) || outlast(c, number);
  }
  // The same for a warp, all of whose lanes go on or none.
  template <class C>
  __device__ bool wait_together(const C& c, u32 number) const {
#pragma unroll 1
    while (!__all_sync(~0u, landed(number))) {
      if (!__all_sync(~0u, outlast(c, number))) return false;
    }
    return true;
  }
  // The same for the next `count` chunks, which land one after the other more often than not.
  template <class C>
  __device__ bool wait_all(const C& c, int count) const {
    const u32 mine = next + min(c.lane(), count - 1);
    int n = count - 1;
    bool running;
#pragma unroll 1
    do {
      running = wait_together(c, next + n);
      n = n + 1 < count ? n + 1 : 0;
    } while (running && !__all_sync(~0u, landed(mine)));
    return running;
  }
  // Where they are.
  __device__ static int place(u32 number) { return static_cast<int>(held(number % Shape::kStages)); }

  // One thread, after all its warp has read: the chunk's only reader, or one of many.
  __device__ void release(u32 number) const { release_one(number, kReleases); }
  __device__ void release_one(u32 number, int readers = 1) const {
    barrier_arrive(shared_base() + empty(number % Shape::kStages), readers);
  }

  // The producer follows decision n too. It must have taken the one before: with two under way, parity would not
  // tell whether both or none had been.
  template <class C>
  __device__ void decide(const C& c, u32 value, u32 n) const {
    settle(c, n);
    if (c.thread() != 0) return;
    *decision() = value;
    barrier_arrive(shared_base() + decided());
  }

  // Waits until the producer has taken so many decisions. At the end of a launch, that is all of them: it would wait for
  // one that it has missed for ever, as deadlines are the consumers' business.
  template <class C>
  __device__ void settle(const C& c, u32 decisions) const {
    if (c.thread() != 0) return;
    if (!took(decisions)) Watch::outlast(c.watch(), Decision{decisions}, Watch::kForItself);
  }

 private:
  __device__ static bool landed(u32 number) {
    return barrier_done(shared_base() + full(number % Shape::kStages), number / Shape::kStages & 1);
  }
  __device__ static bool took(u32 decisions) {
    return decisions == 0 || barrier_done(shared_base() + taken(), (decisions - 1) & 1);
  }

  struct Decision {
    u32 decisions, task = kNoTask;

    __device__ bool done() const { return took(decisions); }
    __device__ void report(Watch watch) const {
      Watch::note(watch, task, kWaitPredicate, decisions - 1, decisions, decisions - 1);
    }
  };
  struct Landing {
    u32 number, task, decisions;

    __device__ bool done() const { return landed(number); }
    __device__ void report(Watch watch) const {
      const u32 before = number / Shape::kStages;
      if (!took(decisions)) return Decision{decisions, task}.report(watch);
      Watch::note(watch, task, kWaitBulkLoad, number, before + 1, before);
    }
  };
  template <class C>
  __device__ static bool outlast(const C& c, u32 number) {
    return Watch::outlast(c.watch(), Landing{number, c.task(TaskWords::kTask), c.decisions}, Watch::kForItself).ok;
  }
};

// The producer warp. It needs no barrier of its own: it touches only bytes that nothing in the launch writes.
//
// It must send a chunk as often as memory delivers one, and at once when another has landed: it computes little for
// each, and before that.
template <class Shape>
struct Producer {
  using R = Ring<Shape>;
  // The first of two chunks is not sent before there is room for the second: nobody may need it to give back that stage.
  static_assert(Shape::kFlight > 1, "two chunks are sent at a time");
  static_assert((Shape::kTiles & kHasTiles) == 0 || Shape::kStages > kTileRows / kPieceRows, "a piece is read at once");

  // A stage whose turn it is, and the parity of its round before.
  struct Turn {
    u32 stage, before;

    __device__ __forceinline__ Turn after() const {
      const bool last = stage + 1 == Shape::kStages;
      return {last ? 0 : stage + 1, before ^ last};
    }
  };

  const typename Shape::Launch& launch;
  const u32 base = afresh(shared_base());
  int lane = threadIdx.x % 32;
  Turn next = {0, 1};  // of the next chunk; only the elected lane knows
  u32 decisions = 0;

  __device__ explicit Producer(const typename Shape::Launch& l) : launch(l) {}

  __device__ void segment(int s) {
    const u32* queue = launch.tables + Shape::kStreams + (s * Shape::kWorkers + blockIdx.x) * 2;
    const u32 first = queue[0], count = queue[1];
    const auto* jobs = reinterpret_cast<const StreamJob*>(launch.tables + Shape::kJobs) + first;
    Live live;
    StreamJob ahead = {};
    if (lane < count) ahead = jobs[lane];
#pragma unroll 1
    for (u32 base = 0; base < count; base += 32) {
      StreamJob mine = ahead;
      // From here on an offset is an address. All lanes' at once: each is a parameter that has not been loaded before.
      if (base + lane < count) mine.offset += reinterpret_cast<u64>(launch.buffers[mine.buffer]);
      if (base + 32 + lane < count) ahead = jobs[base + 32 + lane];
#pragma unroll 1
      for (u32 j = 0; j < min(32u, count - base); ++j) {
        StreamJob job;
        job.chunk_bytes = __shfl_sync(~0u, mine.chunk_bytes, j), job.offset = __shfl_sync(~0u, mine.offset, j);
        job.bytes = __shfl_sync(~0u, mine.bytes, j);
        job.rows = __shfl_sync(~0u, mine.rows, j), job.stride = __shfl_sync(~0u, mine.stride, j);
        if (job.chunk_bytes <= kPaced || job.chunk_bytes >= kLiveRows) {
          const bool paced = Shape::kPace != 0 && job.chunk_bytes % kLiveRows == kPaced;
          if constexpr (Shape::kLiveRows > 0) {
            if (job.chunk_bytes >= kLiveRows) find(live, job);
          }
          if (paced) ask_slowly(job);
          else ask(job);
        } else if ((Shape::kTiles & kHasColumns) != 0 && job.chunk_bytes >= kColumns) {
          if constexpr ((Shape::kTiles & kHasColumns) != 0) {
            if (job.chunk_bytes == kColumns + kNarrowBlock) stream_columns<kNarrowBlock>(job);
            else stream_columns<kWideBlock>(job);
          }
        } else if ((Shape::kTiles & kHasTiles) != 0 && job.group != 0) {
          if (elected()) stream_tiles(job);
        } else {
          if (elected()) stream(job);
        }
      }
    }
  }

  __device__ void barrier() {}
  // All lanes go the same way, whenever each of them learns of an abort.
  __device__ bool running() const { return !__any_sync(~0u, aborted()); }

  template <class T>
  __device__ T decide(int, u32) {
    const u32 n = decisions++;
    if (!__all_sync(~0u, until([&] { return barrier_done(base + R::decided(), n & 1); }))) return T(0);
    const u32 value = *R::decision();
    __syncwarp();
    if (lane == 0) barrier_arrive(base + R::taken());
    return static_cast<T>(value);
  }

  // Nothing may land in shared memory that belongs to the next launch. What has been asked for lands within
  // microseconds; what does not must not keep a launch from ending that gave up because of it.
  __device__ void drain() {
    if (!elected()) return;
    const u64 start = nanoseconds();
#pragma unroll 1
    for (int n = 0; n < Shape::kStages; ++n, next = next.after()) {
      while (!barrier_done(full(next), next.before)) {
        if (aborted() && nanoseconds() - start > 1000000) break;
      }
    }
  }

 private:
  __device__ bool aborted() const { return load_relaxed(&static_cast<StateHeader*>(launch.state)->abort) != 0; }

  // Repeats `done` until it holds; false: the launch gave up. Consumers see to deadlines.
  template <class Done>
  __device__ __forceinline__ bool until(Done&& done) const {
#pragma unroll 1
    for (u32 spins = 1; !done(); ++spins) {
      if (spins % 256 == 0 && aborted()) return false;
    }
    return true;
  }

  // Keys and values, and those of other layers, begin at the same position: it is computed once in a segment.
  struct Live {
    u32 way = ~0u;
    int at = 0, first = 0, count = 0;
  };
  __device__ void find(Live& live, StreamJob& job) const {
    const u32 way = job.chunk_bytes / kLiveRows - 1;
    const int at = job.rows;
    if (live.way != way || live.at != at) {
      live.way = way, live.at = at;
      Shape::live_rows(launch, way, at, live.first, live.count);
    }
    job.offset += u64(live.first) * job.stride, job.rows = live.count;
  }

  __device__ void ask(const StreamJob& job) const {
    const u32 lines = (static_cast<u32>(job.bytes) + kLine - 1) / kLine;
#pragma unroll 1
    for (u32 n = lane; n < job.rows * lines; n += 32) prefetch(at(job) + u64(n / lines) * job.stride + n % lines * kLine);
  }

  // The same, no faster than memory is: other accesses should not wait behind these. A lane asks for a row, sector by
  // sector.
  __device__ void ask_slowly(const StreamJob& job) const {
    constexpr u32 kSector = 32;
#pragma unroll 1
    for (u32 first = 0; first < job.rows; first += 32) {
      const char* from = at(job) + u64(first + lane) * job.stride;
#pragma unroll 1
      for (u32 k = 0; k < job.bytes; k += kSector) {
        if (first + lane < job.rows) prefetch(from + k);
      }
      if constexpr (Shape::kPace != 0) pause(static_cast<u32>(job.bytes) * 32 / Shape::kPace);
    }
  }

  __device__ static const char* at(const StreamJob& job) {
    return reinterpret_cast<const char*>(job.offset);
  }

  // What is computed before a wait, `afresh`, does not keep a load waiting.
  __device__ __forceinline__ u32 full(const Turn& turn) const { return afresh(base + R::full(turn.stage)); }
  __device__ __forceinline__ u32 held(const Turn& turn) const { return afresh(base + R::held(turn.stage)); }

  // Waits until a chunk's stage is free, and the chunk has landed that is kFlight before it, so that few are in flight; false:
  // the launch gave up. One that was never sent has landed: a new barrier has a phase of parity 1 behind it.
  __device__ __forceinline__ bool room(const Turn& turn) const {
    const u32 wraps = turn.stage < Shape::kFlight;
    const u32 earlier = base + R::full(turn.stage + wraps * Shape::kStages - Shape::kFlight);
    return until([&] { return barrier_done_now(base + R::empty(turn.stage), turn.before); }) &&
           until([&] { return barrier_done_now(earlier, turn.before ^ wraps ^ 1); });
  }

  // Bulk loads of so many bytes follow.
  __device__ __forceinline__ void expect(u32 filled, u32 bytes) const {
    if constexpr ((Shape::kTiles & kHasColumns) != 0) bulk_loads_follow();
    barrier_expect(filled, bytes);
  }

  // Two chunks at a time: the producer is ready for the next ones sooner.
  __device__ void stream(const StreamJob& job) {
    constexpr u32 kUnit = 16;  // of all that bulk loads move: 32 bits are enough to count them
    const u32 whole = job.chunk_bytes / kUnit;
    const char* from = at(job);
#pragma unroll 1
    for (u32 left = static_cast<u32>(job.bytes / kUnit), units; left != 0; left -= units) {
      units = min(2 * whole, left);
      const u32 size = afresh(min(whole, units) * kUnit), more = afresh(units * kUnit - size);
      const Turn second = next.after();
      const u32 at_first = full(next), to_first = held(next), at_second = full(second), to_second = held(second);
      if (!room(next) || (more != 0 && !room(second))) return;
      const auto send = [&](u32 to, const char* start, u32 nbytes, u32 filled) {
        expect(filled, nbytes);
        bulk_load(to, start, nbytes, filled, kEvictFirst);
        next = next.after();
      };
      send(to_first, from, size, at_first);
      if (more != 0) send(to_second, from + size, more, at_second);
      from += size + more;
    }
  }

  // Of each tile one piece of columns after the other, a block's before the next tile's.
  __device__ void stream_tiles(const StreamJob& job) {
    const u32 length = job.length, group = job.group * kTileRows, pitch = job.chunk_bytes;
#pragma unroll 1
    for (u32 first = 0; first < job.rows; first += group) {
      const u32 last = min(first + group, job.rows);
#pragma unroll 1
      for (u32 block = 0; block < length; block += job.block) {
        const u32 right = min(block + job.block, length);
#pragma unroll 1
        for (u32 tile = first; tile < last; tile += kTileRows) {
          const u32 count = min(last - tile, kTileRows);
          const char* left = at(job) + u64(tile) * length;
#pragma unroll 1
          for (u32 done = block; done < right; done += pitch) {
            const u32 size = min(pitch, right - done);
            const char* from = left + done;
#pragma unroll 1
            for (u32 row = 0; row < count; row += kPieceRows, from += u64(kPieceRows) * length, next = next.after()) {
              const u32 rows = min(count - row, kPieceRows);
              const u32 nbytes = afresh(size * rows), filled = full(next), to = held(next);
              if (!room(next)) return;
              expect(filled, nbytes);
              const auto send = [&](u32 k) {
                bulk_load(to + k * pitch, from + u64(k) * length, size, filled, kEvictFirst);
              };
              if (rows == kPieceRows) {  // addresses of all of them at once, not one after the other
#pragma unroll
                for (u32 k = 0; k < kPieceRows; ++k) send(k);
              } else {
#pragma unroll 1
                for (u32 k = 0; k < rows; ++k) send(k);
              }
            }
          }
        }
      }
    }
  }

  // Of each block of columns one chunk of its rows after the other. Parts of rows are too short for bulk copies: all lanes
  // copy 16 bytes at a time.
  template <int width>
  __device__ void stream_columns(const StreamJob& job) {
    static_assert(Shape::kStageBytes < kColumns && Shape::kStageBytes / width % 32 == 0);
    constexpr u32 kUnits = width / 16, kRows = 32 / kUnits, kHeight = Shape::kStageBytes / width;
    const u32 unit = lane % kUnits, first = lane / kUnits;  // of the rows that are copied at a time
    const int leader = __ffs(__ballot_sync(~0u, elected())) - 1;
    next = {__shfl_sync(~0u, next.stage, leader), __shfl_sync(~0u, next.before, leader)};
#pragma unroll 1
    for (u32 done = 0; done < static_cast<u32>(job.bytes); done += width) {
      const char* from = at(job) + done + u64(first) * job.stride + unit * 16;
#pragma unroll 1
      for (u32 row = 0; row < job.rows; row += kHeight, next = next.after()) {
        const bool go = !elected() || room(next);
        if (!__all_sync(~0u, go)) return;
        __syncwarp();  // a vote orders no memory: the stage's readers are done for all lanes
        const u32 end = min(kHeight, job.rows - row);
#pragma unroll 4
        for (u32 k = 0; k < end; k += 8) {
          // In eight rows from k on the swizzle differs in row % 2 only, which all rows of a lane have in common.
          const u32 to = base + R::held(next.stage) + k * width + first * width + (unit ^ first % 2 ^ block_swizzle(k)) * 16;
#pragma unroll
          for (u32 r = 0; r < 8; r += kRows, from += u64(kRows) * job.stride) {
            copy_async(to + r * width, from, kEvictFirst);
          }
        }
        const u32 filled = full(next);
        copies_arrive(filled);
        __syncwarp();
        if (lane == 0) barrier_arrive(filled);
      }
    }
  }
};

}  // namespace mpk
