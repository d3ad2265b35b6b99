// contract with streamed rows and many columns, on tensor cores: y[row, n] = sum over k of w[row, k] * x[n, k].
//
// Rows are the M side of mma.m16n8k16, columns its N side. A task's rows are cut into tiles of up to 16, a tile into
// pieces of its columns that fit a stage of the ring. Each piece is one warp's; what the warps have of a tile is added
// in shared memory, in the order of the pieces.
#pragma once

#include "persistent.cuh"

namespace mpk {

// How a tile of rows is cut into pieces; stream.py computes the same.
template <class T, int K, int height, int stage_bytes>
struct Pieces {
  static constexpr int kMost = stage_bytes / height / static_cast<int>(sizeof(T)) / 32 * 32;
  static constexpr int kColumns = kMost < K ? kMost : K;
  static constexpr int kCount = (K + kColumns - 1) / kColumns;
  static constexpr int kPitch = (kColumns * sizeof(T) + 127) / 128 * 128;  // bytes from row to row in a stage
};

// Adds a piece of `steps` * 32 columns to a warp's sums, or begins them. Not inlined: a program streams in many places.
//
// The order of k within an instruction is ours to choose, as long as both factors agree: a thread's 16 bytes of a row
// are k = 8q .. 8q+7 of two instructions, so nothing has to be shuffled. Rows and columns that do not exist repeat
// others: they spoil only sums that nobody reads.
template <class T, int N, int height, bool shared>
__device__ __noinline__ void add_piece(int w_byte, int w_pitch, const T* x, int x_byte, int x_stride, int steps,
                                       int sums_byte, bool begin) {
  constexpr int kTiles = (N + 7) / 8, kAhead = shared ? 2 : kTiles > 2 ? 16 / kTiles : 8;
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int low = w_byte + g % height * w_pitch + q * 16, high = w_byte + (g + 8) % height * w_pitch + q * 16;
  const int swapped = g % height % 2;  // bytes of odd rows have changed places
  f32* sums = shared_at<f32>(sums_byte) + lane;
  f32 acc[kTiles][4] = {};
  if (!begin) {
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) acc[i / 4][i % 4] = sums[i * kWarp];
  }
#pragma unroll 1
  for (int s = 0; s < steps; s += kAhead) {
    Quad b[kAhead][kTiles];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (s + u >= steps) continue;
        const int at = min(t * 8 + g, N - 1) * x_stride + (s + u) * 32 + q * 8;
        if constexpr (shared) b[u][t] = *shared_at<Quad>(x_byte + at * static_cast<int>(sizeof(T)));
        else b[u][t] = load_quad(x + at);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (s + u >= steps) continue;
      const int at = ((s + u) ^ swapped) * 64;
      const Quad l = *shared_at<Quad>(low + at), h = height > 8 ? *shared_at<Quad>(high + at) : l;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        matrix_multiply<T>(acc[t], l.w[0], h.w[0], l.w[1], h.w[1], b[u][t].w[0], b[u][t].w[1]);
        matrix_multiply<T>(acc[t], l.w[2], h.w[2], l.w[3], h.w[3], b[u][t].w[2], b[u][t].w[3]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) sums[i * kWarp] = acc[i / 4][i % 4];
}

// Where the sum of a row of a tile and a column lies among a warp's, as mma's accumulators do.
__device__ __forceinline__ int sum_at(int row, int n) {
  return ((n / 8 * 4 + row / 8 * 2 + n % 2) * 8 + row % 8) * 4 + n % 8 / 2;
}

// finish(row, n, sum) once for every row and column; x: in shared memory, or in device memory as another worker left it.
template <class T, int N, int K, int height, bool shared, class C, class Finish>
__device__ __forceinline__ void stream_tiles(C& c, const T* x, int x_stride, int rows, Finish&& finish) {
  using P = Pieces<T, K, height, C::kStageBytes>;
  constexpr int kReaders = Ring<typename C::Shape>::kStep, kSums = (N + 7) / 8 * 128;
  constexpr int kParts = P::kCount < kReaders ? P::kCount : kReaders;
  constexpr int kBuffers = N <= 16 ? 2 : 1;  // so that the next tile need not wait for the sums of this one
  const int sums_byte = C::Shape::kPartials;
  const int x_byte = shared ? static_cast<int>(shared_address(x) - shared_address(shared_at<char>(0))) : 0;
#pragma unroll 1
  for (int tile = 0; tile * height < rows; ++tile) {
    const int buffer = tile % kBuffers * C::kWarps;
    const u32 first = c.ring.next;
    bool begin = true;
#pragma unroll 1
    for (int p = c.ring.mine(c.warp()); p < P::kCount; p += kReaders) {
      const int chunk = c.ring.wait(c, first + p);
      if (chunk < 0) break;
      const int at = p * P::kColumns, columns = min(P::kColumns, K - at);
      add_piece<T, N, height, shared>(chunk, P::kPitch, x + at, x_byte + at * static_cast<int>(sizeof(T)), x_stride,
                                      columns / 32, sums_byte + (buffer + c.warp()) * kSums * 4, begin);
      begin = false;
      __syncwarp();
      if (c.lane() == 0) c.ring.release(first + p);
    }
    c.ring.next += P::kCount;
    c.sync();
    const f32* sums = shared_at<f32>(sums_byte) + buffer * kSums;
#pragma unroll 1
    for (int n = c.thread(); n < height * N; n += C::kThreads) {
      const int row = tile * height + n % height;
      if (row >= rows) continue;
      const f32* mine = sums + sum_at(n % height, n / height);
      f32 sum = 0;
#pragma unroll
      for (int p = 0; p < kParts; ++p) sum += mine[(first + p) % kReaders * kSums];
      finish(row, n / height, sum);
    }
    if (kBuffers == 1) c.sync();
  }
  if (kBuffers > 1) c.sync();  // before the sums are used again
}

}  // namespace mpk
