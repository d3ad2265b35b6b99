// contract with streamed rows and many columns, on tensor cores: y[row, n] = sum over k of w[row, k] * x[n, k].
//
// Rows are the M side of mma.m16n8k16, columns its N side. A task's rows are cut into tiles of up to 16, a tile into
// pieces of its columns, a piece into stages of the ring, each with some of its rows. The warps share out a piece's
// columns, and none waits for another before a tile's end: then what they have of it is added in shared memory, in their
// order.
#pragma once

#include "persistent.cuh"

namespace mpk {

constexpr int kTileStep = 32;

// How a tile of rows is cut; stream.py computes the same. Short rows are whole, so that several are one copy. Of others,
// runs that are much shorter than this would be too many copies for the rate of memory; of much longer ones, too few
// pieces would fit into the ring.
template <class T, int K, int stage_bytes>
struct Pieces {
  static constexpr int kLength = K * static_cast<int>(sizeof(T)), kMost = stage_bytes / (kLength <= stage_bytes / 2 ? 2 : 4);
  static constexpr int kCount = (kLength + kMost - 1) / kMost;
  static constexpr int kColumns = (K / kTileStep + kCount - 1) / kCount * kTileStep;
  static constexpr int kPitch = kColumns * static_cast<int>(sizeof(T));  // from row to row in a stage
  static constexpr int kRows = kPitch * kTileRows < stage_bytes ? kTileRows : stage_bytes / kPitch;  // of a stage
};

// Where the sum of a row of a tile and a column lies among a warp's, as mma's accumulators do.
__device__ __forceinline__ int sum_at(int row, int n) {
  return ((n / 8 * 4 + row / 8 * 2 + n % 2) * 8 + row % 8) * 4 + n % 8 / 2;
}

// finish(row, n, sum) once for every row and column; x: in shared memory, or in device memory as another worker left it.
//
// The order of k within an instruction is ours to choose, as long as both factors agree: a thread's 16 bytes of a row
// are k = 8q .. 8q+7 of two instructions, so nothing has to be shuffled. Rows and columns that do not exist repeat
// others: they spoil only sums that nobody reads.
template <class T, int N, int K, bool shared, class C, class Finish>
__device__ __forceinline__ void stream_tiles(C& c, const T* x, int x_stride, int rows, Finish&& finish) {
  static_assert(K % kTileStep == 0);
  using P = Pieces<T, K, C::kStageBytes>;
  using R = Ring<typename C::Shape>;
  constexpr int kTiles = (N + 7) / 8, kSums = kTiles * 128;
  constexpr int kBuffers = N <= 16 ? 2 : 1;  // so that the next tile need not wait for the sums of this one
  constexpr int kSteps = (P::kColumns / kTileStep + C::kWarps - 1) / C::kWarps;  // a warp's, of a piece
  // Of so many of them parts of x are loaded at a time: of the first ones before the piece is there, of all of them, where
  // x comes from afar, while the piece before is multiplied.
  constexpr int kMost = 6 / kTiles, kAhead = kMost > kSteps ? kSteps : kMost > 1 ? kMost : 1;
  constexpr bool kFar = !shared && kAhead == kSteps;
  const int lane = c.lane(), g = lane / 4, q = lane % 4;
  const int x_byte = shared ? static_cast<int>(shared_address(x) - shared_base()) : 0;
  using Part = Quad[kAhead][kTiles];
  // Of piece p, from step `first` on.
  const auto load = [&](int p, int first, Part& to) {
    const int steps = min(P::kColumns, K - p * P::kColumns) / kTileStep;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int column = p * P::kColumns + min(first + u * C::kWarps, steps - 1) * kTileStep + q * 8;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int at = min(t * 8 + g, N - 1) * x_stride + column;
        if constexpr (shared) to[u][t] = *shared_at<Quad>(x_byte + at * static_cast<int>(sizeof(T)));
        else to[u][t] = load_quad(x + at);
      }
    }
  };
  Part b, following;
  bool running = true;
  // All warps read every stage: none may be here while chunks of another kind of contraction are still to be waited for,
  // or the parity of a stage would not tell its rounds apart.
  c.sync();
  if (kFar) load(0, c.warp(), following);
#pragma unroll 1
  for (int tile = 0; tile * kTileRows < rows; ++tile) {
    const int count = min(kTileRows, rows - tile * kTileRows), stages = (count + P::kRows - 1) / P::kRows;
    const int low = min(g, count - 1), high = min(g + 8, count - 1);
    const auto row_byte = [&](int row) {
      return R::place(c.ring.next + row / P::kRows) + row % P::kRows * P::kPitch + q * 16;
    };
    f32 acc[kTiles][4] = {};
    f32* const sums = shared_at<f32>(C::Shape::kPartials) + tile % kBuffers * C::kWarps * kSums;
#pragma unroll 1
    for (int p = 0; p < P::kCount; ++p) {
      const int steps = min(P::kColumns, K - p * P::kColumns) / kTileStep;
      if constexpr (kFar) {
#pragma unroll
        for (int u = 0; u < kAhead * kTiles; ++u) b[u / kTiles][u % kTiles] = following[u / kTiles][u % kTiles];
        load(p + 1 < P::kCount ? p + 1 : 0, c.warp(), following);
      } else {
        load(p, c.warp(), b);
      }
      if (running) running = __all_sync(~0u, lane >= stages || c.ring.wait(c, c.ring.next + lane));
      const int low_byte = row_byte(low), high_byte = row_byte(high);
#pragma unroll 1
      for (int first = c.warp(); first < steps; first += kAhead * C::kWarps) {
        if (kAhead < kSteps && first != c.warp()) load(p, first, b);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const int s = first + u * C::kWarps;
          if (s >= steps) continue;
          const Quad l = *shared_at<Quad>(low_byte + s * 64), h = *shared_at<Quad>(high_byte + s * 64);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            const Quad& v = b[u][t];
            matrix_multiply<T>(acc[t], l.w[0], h.w[0], l.w[1], h.w[1], v.w[0], v.w[1]);
            matrix_multiply<T>(acc[t], l.w[2], h.w[2], l.w[3], h.w[3], v.w[2], v.w[3]);
          }
        }
      }
      __syncwarp();
      if (lane < stages) c.ring.release_one(c.ring.next + lane);
      c.ring.next += stages;
    }
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) sums[c.warp() * kSums + i * kWarp + lane] = acc[i / 4][i % 4];
    c.sync();
#pragma unroll 1
    for (int n = c.thread(); n < kTileRows * N; n += C::kThreads) {
      const int row = n % kTileRows, column = n / kTileRows;
      if (row >= count) continue;
      const f32* mine = sums + sum_at(row, column);
      f32 sum = 0;
#pragma unroll
      for (int w = 0; w < C::kWarps; ++w) sum += mine[w * kSums];
      finish(tile * kTileRows + row, column, sum);
    }
    if (kBuffers == 1) c.sync();  // before the sums are used again
  }
}

}  // namespace mpk
