// contract with streamed columns, on tensor cores: y[column, n] = sum over k of w[k, column] * x[n, k].
//
// The weight lies contiguous along its free axis. A task has a range of its columns, cut into blocks; a chunk is some rows
// of a block, read transposed by the warp that has the chunk's stage, with columns as the M side of mma.m16n8k16. What
// the warps have of a block is added in shared memory, in their order.
#pragma once

#include "tasks/matmul.cuh"

namespace mpk {

// Of so many tiles of 16 columns and 8 n the sums of all warps are in shared memory at a time; columns.py knows, too.
constexpr int kSumTiles = 8;

// finish(column, n, sum) once for every column and n; x: in shared memory, or in device memory as another worker left it.
//
// The order of k within an instruction is ours to choose, as long as both factors agree: a thread's 16 bytes of x are
// k = 8q .. 8q+7 of two instructions, and matrix rows 2q and 2q+1 are those k of the weight. Columns of x that do not
// exist repeat others: they spoil only sums that nobody reads.
template <class T, int width, int N, int K, bool shared, class C, class Finish>
__device__ __forceinline__ void stream_columns(C& c, const T* x, int x_stride, int columns, Finish&& finish) {
  static_assert(kIsHalf<T> && width % 64 == 0 && K % kTileStep == 0);
  using R = Ring<typename C::Shape>;
  constexpr int kPitch = width * static_cast<int>(sizeof(T)), kHeight = C::kStageBytes / kPitch;
  constexpr int kChunks = (K + kHeight - 1) / kHeight, kSteps = kHeight / kTileStep;
  constexpr int kTiles = (N + 7) / 8, kRows = width / 16;  // of a block's sums
  constexpr int kAhead = kSteps * kTiles <= 4 ? kSteps : 1;  // steps whose x is loaded before the chunk is there
  constexpr int kMost = kSumTiles / kTiles, kAtOnce = kMost < 1 ? 1 : kMost > kRows ? kRows : kMost;
  constexpr int kSums = kAtOnce * kTiles * 128;
  static_assert(kHeight % kTileStep == 0 && kRows % kAtOnce == 0);
  const int lane = afresh(c.lane()), g = lane / 4, q = lane % 4, i = lane % 8;
  const int x_byte = shared ? static_cast<int>(shared_address(x) - shared_base()) : 0;
  // Of the row that this lane names for load_transposed, in the first 16 of 32, and of its 16 bytes.
  const int row_byte = (i / 2 * 8 + i % 2 + lane / 16 * 2) * kPitch;
  const int unit = (lane / 8 % 2) ^ i;  // i is the row's block_swizzle
  f32* const sums = c.template partials<f32>();
#pragma unroll 1
  for (int block = 0; block < columns; block += width) {
    f32 acc[kRows][kTiles][4] = {};
#pragma unroll 1
    for (int j = c.ring.mine(c.warp()); j < kChunks; j += R::kStep) {
      Quad b[kAhead][kTiles];
      const auto load = [&](int s) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int k = j * kHeight + s * kTileStep;
          const int at = min(t * 8 + g, N - 1) * x_stride + (K % kHeight == 0 || k < K ? k : 0) + q * 8;
          if constexpr (shared) b[s % kAhead][t] = *shared_at<Quad>(x_byte + at * static_cast<int>(sizeof(T)));
          else b[s % kAhead][t] = load_quad(x + at);
        }
      };
#pragma unroll
      for (int s = 0; s < kAhead; ++s) load(s);
      if (!c.ring.wait_together(c, c.ring.next + j)) break;
      const int chunk = R::place(c.ring.next + j);
#pragma unroll kAhead
      for (int s = 0; s < kSteps; ++s) {
        if (K % kHeight != 0 && j * kHeight + s * kTileStep >= K) continue;
        if (s >= kAhead) load(s);
#pragma unroll 1  // unrolled, it takes too many registers
        for (int half = 0; half < 2; ++half) {
          const int row = chunk + row_byte + (s * kTileStep + half * 4) * kPitch;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const Quad a = load_transposed(shared_at<char>(row + (unit ^ r % 4 * 2) * 16 + r / 4 * 128));
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
              const Quad& v = b[s % kAhead][t];
              matrix_multiply<T>(acc[r][t], a.w[0], a.w[1], a.w[2], a.w[3], half ? v.w[2] : v.w[0],
                                 half ? v.w[3] : v.w[1]);
            }
          }
        }
      }
      __syncwarp();
      if (lane == 0) c.ring.release(c.ring.next + j);
    }
    c.ring.next += kChunks;
#pragma unroll
    for (int first = 0; first < kRows; first += kAtOnce) {
      if (block + first > 0) c.sync();  // before the sums are used again
#pragma unroll
      for (int r = 0; r < kAtOnce * kTiles * 4; ++r) {
        const int e = r % 4, t = r / 4 % kTiles;
        if (t * 8 + 2 * q + e % 2 < N && c.warp() < R::kStep) {
          sums[c.warp() * kSums + r * kWarp + lane] = acc[first + r / 4 / kTiles][t][e];
        }
      }
      c.sync();
#pragma unroll 1
      for (int n = c.thread(); n < kAtOnce * 16 * N; n += C::kThreads) {
        const int column = n % (kAtOnce * 16), m = n / (kAtOnce * 16);
        const f32* mine = sums + column / 16 * kTiles * 128 + sum_at(column % 16, m);
        f32 sum = 0;
#pragma unroll
        for (int w = 0; w < R::kStep; ++w) sum += mine[w * kSums];
        finish(block + first * 16 + column, m, sum);
      }
    }
  }
}

}  // namespace mpk
