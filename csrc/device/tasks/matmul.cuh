// contract with streamed rows and many columns, on tensor cores: y[row, n] = sum over k of w[row, k] * x[n, k].
//
// Rows are the M side of mma.m16n8k16, columns its N side. A task's rows are cut into tiles of up to 16, a tile into
// pieces of its columns, a piece into stages of the ring, each with some of its rows. The warps share out a piece's
// columns, and none waits for another before the end of a tile, or of several: then what they have of it is added in
// shared memory, in their order.
#pragma once

#include "persistent.cuh"

namespace mpk {

constexpr int kTileStep = 32;

__device__ constexpr int quotient(int a, int b) { return (a + b - 1) / b; }

// How a tile of rows is cut, and how x is held; pieces.py computes the same.
//
// Short rows are whole: several of them are one run of memory. Of others, runs that are much shorter than this would be
// too many copies for the rate of memory; of much longer ones, too few pieces would fit into the ring.
//
// A thread holds what x has in its warp's columns for as long as rows stream, if that is not too much for registers and,
// where x is not in scratch and there is room for it, a shelf there. Else it loads the next piece's while it multiplies
// one, which some tiles have before they have the next one, so that x passes less often.
enum Reach : int { kScratch, kHeld, kPassing };  // x is in scratch; in memory, and held if it fits; in memory, and passes
template <class T, int N, int K, Reach reach, int stage_bytes, int warps>
struct Pieces {
  static constexpr int kTiles = quotient(N, 8), kLength = K * static_cast<int>(sizeof(T));
  static constexpr int kRegisters = 18, kShelfBytes = 68 << 10;  // lots of 16 bytes that a thread holds; bytes of a shelf
  static constexpr int kFewest = quotient(K / kTileStep, kRegisters / kTiles * warps);  // pieces, each of which registers can hold
  static constexpr bool kWhole = kLength <= stage_bytes / 2 && kFewest == 1;
  static constexpr int kSlices = quotient(kLength, stage_bytes / static_cast<int>(kPieceRows));
  static constexpr int kCount = kWhole ? 1 : kSlices > kFewest ? kSlices : kFewest;
  static constexpr int kColumns = quotient(K / kTileStep, kCount) * kTileStep;
  static constexpr int kPitch = kColumns * static_cast<int>(sizeof(T));  // from row to row in a stage
  static constexpr int kFit = stage_bytes / kLength, kMost = kFit < 4 ? 2 : kFit < 8 ? 4 : kFit < 16 ? 8 : 16;
  static constexpr int kRows = kWhole ? kMost : static_cast<int>(kPieceRows);  // of a stage

  static constexpr int kSteps = quotient(kColumns / kTileStep, warps), kLots = kSteps * kTiles;  // a warp's of a piece
  static constexpr int kOwn = kRegisters / kLots;
  static constexpr int kMore = reach == kHeld ? kShelfBytes / (kLots * warps * 32 * 16) : 0;
  static constexpr bool kStays = kCount == 1 || (reach != kPassing && kCount <= kOwn + kMore);
  static constexpr int kKept = !kStays ? 1 : kCount < kOwn ? kCount : kOwn;  // pieces in registers
  static constexpr int kBuffers = kTiles <= 2 ? 2 : 1;                       // tiles whose sums are kept
  static constexpr int kGroup = kStays ? 1 : kBuffers;
  // One column of tiles is two chains of products. Where x takes many registers, rows of the next step have none.
  static constexpr int kChains = kTiles == 1 ? 2 : 1;
  static constexpr bool kCrowded = kKept * kLots > kRegisters / 2;
};

// x where a thread reads it: in scratch, or in device memory as another worker left it.
//
// The order of k within an instruction is ours to choose, as long as both factors agree: a thread's 16 bytes of a row
// are k = 8q .. 8q+7 of two instructions, so nothing has to be shuffled. Columns that do not exist repeat others: they
// spoil only sums that nobody reads.
template <class Element, int columns, int depth, Reach reach, class C>
struct Factor {
  using T = Element;
  using P = Pieces<T, columns, depth, reach, C::kStageBytes, C::kWarps>;
  using Piece = Quad[P::kSteps][P::kTiles];
  static constexpr int N = columns, K = depth;

  const T* x;
  int stride, shelf;
  Piece held[P::kKept];

  __device__ static int steps_of(int piece) { return min(P::kColumns, K - piece * P::kColumns) / kTileStep; }

  // Of a piece, of the warp's step u of it, columns 8t .. 8t+7, where all of x is held.
  __device__ __forceinline__ Quad at(int piece, int u, int t) const {
    return piece < P::kKept ? held[piece][u][t] : *on_shelf(piece, u, t);
  }
  __device__ __forceinline__ void load(int piece, Piece& to) const {
    const From from(*this);
#pragma unroll
    for (int n = 0; n < P::kLots; ++n) to[n / P::kTiles][n % P::kTiles] = from(piece, n / P::kTiles, n % P::kTiles);
  }
  // What does not fit into registers lands while the rest is multiplied.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int piece = 0; piece < P::kKept; ++piece) load(piece, held[piece]);
    if constexpr (P::kKept < P::kCount) {
      const From from(*this);
#pragma unroll
      for (int n = P::kKept * P::kLots; n < P::kCount * P::kLots; ++n) {
        const int piece = n / P::kLots, u = n / P::kTiles % P::kSteps, t = n % P::kTiles;
        copy_async<16>(on_shelf(piece, u, t), from.place(piece, u, t));
      }
    }
  }

 private:
  // Where this thread's lots are: addresses computed for some of them at a time, which should not be kept for longer.
  struct From {
    const T* x;
    u32 byte;  // in shared memory
    int stride, g, q, warp;

    __device__ explicit From(const Factor& f) : x(f.x), byte(0), stride(f.stride), warp(C::warp()) {
      const int lane = afresh(C::lane());
      g = lane / 4, q = lane % 4;
      if constexpr (reach == kScratch) byte = shared_address(x);
    }
    __device__ int element(int piece, int u, int t) const {
      const int step = min(warp + u * C::kWarps, steps_of(piece) - 1);
      return min(t * 8 + g, N - 1) * stride + piece * P::kColumns + step * kTileStep + q * 8;
    }
    __device__ const T* place(int piece, int u, int t) const { return x + element(piece, u, t); }
    __device__ Quad operator()(int piece, int u, int t) const {
      if constexpr (reach == kScratch) return *shared_from<Quad>(byte + element(piece, u, t) * static_cast<int>(sizeof(T)));
      return load_quad(place(piece, u, t));
    }
  };

  __device__ __forceinline__ Quad* on_shelf(int piece, int u, int t) const {
    const int lot = ((piece - P::kKept) * P::kSteps + u) * P::kTiles + t;
    return C::template local<Quad>(shelf) + lot * C::kThreads + C::thread();
  }
};

// A factor of contractions that follow; x is complete.
template <class T, int N, int K, Reach reach, class C>
__device__ __forceinline__ Factor<T, N, K, reach, C> factor(const C&, const T* x, int stride, int shelf = 0) {
  Factor<T, N, K, reach, C> out{x, stride, shelf};
  if (Factor<T, N, K, reach, C>::P::kStays) out.hold();
  return out;
}

// Where the sum of a row of a tile and a column lies among a warp's, as mma's accumulators do.
__device__ __forceinline__ int sum_at(int row, int n) {
  return ((n / 8 * 4 + row / 8 * 2 + n % 2) * 8 + row % 8) * 4 + n % 8 / 2;
}

// A warp's products of a piece of a tile with so many rows, which it waits for and gives back; x_at(u, t): what x has in the
// warp's step u, columns 8t .. 8t+7. False: the launch gave up.
template <class X, class C, class At>
__device__ __forceinline__ bool multiply(C& c, bool running, int count, int piece,
                                         f32 (&acc)[X::P::kTiles + X::P::kChains - 1][4], At&& x_at) {
  using P = typename X::P;
  using T = typename X::T;
  const int lane = c.lane(), stages = quotient(count, P::kRows), steps = X::steps_of(piece);
  const int low = min(lane / 4, count - 1), high = min(lane / 4 + 8, count - 1);
  const auto row_byte = [&](int row) {
    return Ring<typename C::Shape>::place(c.ring.next + row / P::kRows) + row % P::kRows * P::kPitch + lane % 4 * 16;
  };
  running = running && c.ring.wait_all(c, stages);
  const int low_byte = row_byte(low), high_byte = row_byte(high);
#pragma unroll
  for (int u = 0; u < P::kSteps; ++u) {
    const int s = c.warp() + u * C::kWarps;
    if (s >= steps) continue;
    if (P::kCrowded) asm volatile("" ::: "memory");
    const Quad l = *shared_at<Quad>(low_byte + s * 64), h = *shared_at<Quad>(high_byte + s * 64);
#pragma unroll
    for (int t = 0; t < P::kTiles; ++t) {
      const Quad v = x_at(u, t);
      matrix_multiply<T>(acc[t], l.w[0], h.w[0], l.w[1], h.w[1], v.w[0], v.w[1]);
      matrix_multiply<T>(acc[t + P::kChains - 1], l.w[2], h.w[2], l.w[3], h.w[3], v.w[2], v.w[3]);
    }
  }
  __syncwarp();
  if (lane < stages) c.ring.release_one(c.ring.next + lane);
  c.ring.next += stages;
  return running;
}

// finish(row, n, sum) once for every row and column. Rows that do not exist repeat others, as columns do.
template <class C, class X, class Finish>
__device__ __forceinline__ void stream_tiles(C& c, X& x, int rows, Finish&& finish) {
  using P = typename X::P;
  static_assert(X::K % kTileStep == 0);
  constexpr int N = X::N, kSums = P::kTiles * 128, kHeight = static_cast<int>(kTileRows);
  const int lane = c.lane();
  constexpr bool kAhead = P::kLots <= P::kRegisters / 2;
  f32* const sums = shared_at<f32>(C::Shape::kPartials);
  typename X::Piece following;
  bool running = true;
  // All warps read every stage: none may be here while chunks of another kind of contraction are still to be waited for,
  // or the parity of a stage would not tell its rounds apart.
  c.sync();
  if constexpr (!P::kStays && kAhead) x.load(0, following);
#pragma unroll 1
  for (int tile = 0; tile * kHeight < rows; tile += P::kGroup) {
    const int tiles = min(P::kGroup, quotient(rows, kHeight) - tile);
    const auto count_of = [&](int member) { return min(kHeight, rows - (tile + member) * kHeight); };
    f32 acc[P::kGroup][P::kTiles + P::kChains - 1][4] = {};
    if constexpr (P::kStays) {
#pragma unroll
      for (int piece = 0; piece < P::kCount; ++piece) {
        if (piece == P::kKept && P::kKept < P::kCount) copies_wait();
        running = multiply<X>(c, running, count_of(0), piece, acc[0], [&](int u, int t) { return x.at(piece, u, t); });
      }
    } else {
#pragma unroll 1
      for (int piece = 0; piece < P::kCount; ++piece) {
        if constexpr (kAhead) {
#pragma unroll
          for (int n = 0; n < P::kLots; ++n) x.held[0][n / P::kTiles][n % P::kTiles] = following[n / P::kTiles][n % P::kTiles];
          x.load(piece + 1 < P::kCount ? piece + 1 : 0, following);
        } else {
          x.load(piece, x.held[0]);
        }
#pragma unroll
        for (int member = 0; member < P::kGroup; ++member) {
          if (member >= tiles) continue;
          running = multiply<X>(c, running, count_of(member), piece, acc[member],
                                [&](int u, int t) { return x.held[0][u][t]; });
        }
      }
    }
#pragma unroll
    for (int n = 0; n < P::kGroup * P::kTiles * 4; ++n) {
      const int member = n / (P::kTiles * 4), i = n % (P::kTiles * 4);
      f32* mine = sums + ((tile + member) % P::kBuffers * C::kWarps + c.warp()) * kSums;
      mine[i * kWarp + lane] = P::kChains == 1 ? acc[member][i / 4][i % 4] : acc[member][0][i] + acc[member][1][i];
    }
    c.sync();
#pragma unroll 1
    for (int n = c.thread(); n < tiles * kHeight * N; n += C::kThreads) {
      const int row = n % kHeight, member = tile + n / (kHeight * N);
      if (member * kHeight + row >= rows) continue;
      const f32* all = sums + member % P::kBuffers * C::kWarps * kSums + sum_at(row, n / kHeight % N);
      f32 sum = 0;
#pragma unroll
      for (int w = 0; w < C::kWarps; ++w) sum += all[w * kSums];
      finish(member * kHeight + row, n / kHeight % N, sum);
    }
    if (P::kBuffers == P::kGroup) c.sync();  // before the sums are used again
  }
}

}  // namespace mpk
