// contract of a large factor in device memory and a small one in scratch, on tensor cores. The large one is loaded
// straight into the registers of the warp that multiplies it; what it is made of may lie in several places, row by row.
#pragma once

#include "convert.cuh"
#include "tasks/map.cuh"
#include "tasks/matmul.cuh"

namespace mpk {

// Consecutive elements in scratch as T: those of two words, or of 16 bytes.
template <class T, class X>
__device__ __forceinline__ u64 four_as(int byte) {
  if constexpr (kSame<T, X>) {
    return *shared_at<u64>(byte);
  } else {
    const Packed<X, 4> x = packed<4>(shared_at<X>(byte));
    u64 words = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) words |= u64(convert<T>(x.e[e]).bits) << 16 * e;
    return words;
  }
}
template <class T, class X>
__device__ __forceinline__ Quad eight_as(int byte) {
  if constexpr (kSame<T, X>) {
    return *shared_at<Quad>(byte);
  } else {
    const u64 low = four_as<T, X>(byte), high = four_as<T, X>(byte + 4 * static_cast<int>(sizeof(X)));
    return {{u32(low), u32(low >> 32), u32(high), u32(high >> 32)}};
  }
}

// y[row, n] = sum over k of at(row)[k] * x[n, k]: at(row) is where the K elements of a row begin. Each warp has tiles
// of 16 rows of its own, some at a time, so that enough loads are under way.
template <class T, int N, int K, class X, class C, class At, class Finish>
__device__ __forceinline__ void multiply_rows(const C& c, int rows, const X* x, int x_stride, At&& at,
                                              Finish&& finish) {
  static_assert(K % 32 == 0);
  constexpr int kTiles = (N + 7) / 8, kSteps = K / 32;
  constexpr int kMany = kSteps * kTiles > 2 ? 1 : 2, kLoads = kSteps < 8 ? kSteps : 8;
  const int g = c.lane() / 4, q = c.lane() % 4;
  const int x_byte = static_cast<int>(shared_address(x) - shared_base());
#pragma unroll 1
  for (int first = c.warp() * kMany * 16; first < rows; first += C::kWarps * kMany * 16) {
    const T* from[kMany][2];
    f32 acc[kMany][kTiles][4] = {};
#pragma unroll
    for (int m = 0; m < kMany; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) from[m][h] = at(min(first + m * 16 + h * 8 + g, rows - 1)) + q * 8;
    }
#pragma unroll 1
    for (int begin = 0; begin < kSteps; begin += kLoads) {
      Quad a[kMany][kLoads][2];
#pragma unroll
      for (int m = 0; m < kMany; ++m) {
#pragma unroll
        for (int s = 0; s < kLoads; ++s) {
          if (kSteps % kLoads != 0 && begin + s >= kSteps) continue;
          a[m][s][0] = *reinterpret_cast<const Quad*>(from[m][0] + (begin + s) * 32);
          a[m][s][1] = *reinterpret_cast<const Quad*>(from[m][1] + (begin + s) * 32);
        }
      }
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        if (kSteps % kLoads != 0 && begin + s >= kSteps) continue;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int column = min(t * 8 + g, N - 1) * x_stride + (begin + s) * 32 + q * 8;
          const Quad b = eight_as<T, X>(x_byte + column * static_cast<int>(sizeof(X)));
#pragma unroll
          for (int m = 0; m < kMany; ++m) {
            const Quad &l = a[m][s][0], &h = a[m][s][1];
            matrix_multiply<T>(acc[m][t], l.w[0], h.w[0], l.w[1], h.w[1], b.w[0], b.w[1]);
            matrix_multiply<T>(acc[m][t], l.w[2], h.w[2], l.w[3], h.w[3], b.w[2], b.w[3]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kMany * kTiles * 4; ++i) {
      const int row = first + i / (kTiles * 4) * 16 + i % 4 / 2 * 8 + g, n = i / 4 % kTiles * 8 + 2 * q + i % 2;
      if (row < rows && n < N) finish(row, n, acc[i / (kTiles * 4)][i / 4 % kTiles][i % 4]);
    }
  }
}

// y[d, n] = sum over k < depth of at(k)[d] * x[n, k]: at(k) is where D consecutive elements begin. The warps share out
// the depth, and add what they have in their order. A thread loads eight elements of four positions, which are rows of eight
// instructions once pairs of positions are put together.
template <class T, int N, int D, class X, class C, class At, class Finish>
__device__ __forceinline__ void multiply_columns(const C& c, int depth, const X* x, int x_stride, At&& at,
                                                 Finish&& finish) {
  static_assert(D % 8 == 0);
  constexpr int kTiles = (N + 7) / 8, kBlocks = (D + 63) / 64, kMany = kBlocks > 1 ? 1 : 2;
  const int g = c.lane() / 4, q = c.lane() % 4;
  const int x_byte = static_cast<int>(shared_address(x) - shared_base());
  f32 acc[kBlocks][4][kTiles][4] = {};
#pragma unroll 1
  for (int first = c.warp() * kMany * 16; first < depth; first += C::kWarps * kMany * 16) {
    Quad v[kMany][kBlocks][4];
#pragma unroll
    for (int m = 0; m < kMany; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const T* from = at(min(first + m * 16 + 4 * q + j, depth - 1));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) v[m][b][j] = *reinterpret_cast<const Quad*>(from + min(b * 64 + 8 * g, D - 8));
      }
    }
#pragma unroll
    for (int m = 0; m < kMany; ++m) {
      const int k = first + m * 16;
      if (k >= depth) continue;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int column = min(t * 8 + g, N - 1) * x_stride + k + 4 * q, left = depth - k - 4 * q;
        u64 p = left > 0 ? four_as<T, X>(x_byte + column * static_cast<int>(sizeof(X))) : 0;
        if (left > 0 && left < 4) p &= (u64(1) << 16 * left) - 1;
#pragma unroll
        for (int i = 0; i < kBlocks * 4; ++i) {
          const Quad(&u)[4] = v[m][i / 4];
          const int w = i % 4;
          matrix_multiply<T>(acc[i / 4][w][t], __byte_perm(u[0].w[w], u[1].w[w], 0x5410),
                             __byte_perm(u[0].w[w], u[1].w[w], 0x7632), __byte_perm(u[2].w[w], u[3].w[w], 0x5410),
                             __byte_perm(u[2].w[w], u[3].w[w], 0x7632), static_cast<u32>(p), static_cast<u32>(p >> 32));
        }
      }
    }
  }
  // Of element 8g + i of a block and column n: position ((block * 8 + i) * N + n) * 8 + g.
  constexpr int kSums = kBlocks * 64 * N;
  f32* sums = c.template partials<f32>();
#pragma unroll
  for (int i = 0; i < kBlocks * 16 * kTiles; ++i) {
    const int e = i % 4, t = i / 4 % kTiles, w = i / 4 / kTiles % 4, block = i / 16 / kTiles, n = t * 8 + 2 * q + e % 2;
    if (n < N) sums[c.warp() * kSums + ((block * 8 + 2 * w + e / 2) * N + n) * 8 + g] = acc[block][w][t][e];
  }
  c.sync();
#pragma unroll 1
  for (int out = c.thread(); out < D * N; out += C::kThreads) {
    const int d = out % D, n = out / D;
    const f32* mine = sums + ((d / 64 * 8 + d % 8) * N + n) * 8 + d % 64 / 8;
    f32 sum = 0;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) sum += mine[w * kSums];
    finish(d, n, sum);
  }
  c.sync();  // before the sums are used again
}

}  // namespace mpk
