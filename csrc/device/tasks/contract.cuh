// contract with streamed rows: y[row, m] = sum over k of w[row, k] * x[m, k], for few m.
//
// The rows of a task are consecutive bytes, which the producer brings through the ring in chunks of whole rows, or of
// equal parts of long rows. Each stage of the
// ring has its warp; x lies in shared memory.
#pragma once

#include "persistent.cuh"

namespace mpk {

// Lane l of a warp gets the sum over the lanes of its group of their v[l % n]; n is a power of two, at most group.
template <int group, int n>
__device__ __forceinline__ f32 sums_by_lane(f32 (&v)[n]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int by = 1; by < n; by *= 2) {
#pragma unroll
    for (int i = 0; i < n / (2 * by); ++i) {
      const bool odd = (lane & by) != 0;
      v[i] = (odd ? v[2 * i + 1] : v[2 * i]) + __shfl_xor_sync(~0u, odd ? v[2 * i] : v[2 * i + 1], by);
    }
  }
#pragma unroll
  for (int by = n; by < group; by *= 2) v[0] += __shfl_xor_sync(~0u, v[0], by);
  return v[0];
}

// Several neighbouring outputs of one thread.
template <int count>
struct Pack {
  f32 e[count];
  __device__ Pack operator+(const Pack& other) const {
    Pack sum;
#pragma unroll
    for (int i = 0; i < count; ++i) sum.e[i] = e[i] + other.e[i];
    return sum;
  }
};

// `count` consecutive elements, aligned as a whole, as f32.
template <int count, class T>
__device__ __forceinline__ void widen(const T* from, f32 (&to)[count]) {
  constexpr int kVectors = count * sizeof(T) > 16 ? count * sizeof(T) / 16 : 1, kEach = count / kVectors;
  if constexpr (kSame<T, bf16> && kEach == 8) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Quad p = reinterpret_cast<const Quad*>(from)[v];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[v * 8 + 2 * i] = bitcast<f32>(p.w[i] << 16);
        to[v * 8 + 2 * i + 1] = bitcast<f32>(p.w[i] & 0xffff0000u);
      }
    }
  } else {
    struct alignas(sizeof(T) * kEach) Packed {
      T e[kEach];
    };
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Packed p = reinterpret_cast<const Packed*>(from)[v];
#pragma unroll
      for (int i = 0; i < kEach; ++i) to[v * kEach + i] = convert<f32>(p.e[i]);
    }
  }
}

// `packs` times `count` neighbouring outputs, each pack by `group` lanes: the sum of body(pack, r) over depth positions.
// finish(pack, element, sum) once for every output. There may be no positions at all.
template <int count, int group, class C, class Body, class Finish>
__device__ __forceinline__ void reduce_packs(const C& c, int packs, int depth, Body&& body, Finish&& finish) {
  const int part = c.thread() % group;
  const int rounded = (packs * group + kWarp - 1) / kWarp * kWarp;
#pragma unroll 1
  for (int n = c.thread(); n < rounded; n += C::kThreads) {
    const int pack = min(n / group, packs - 1);
    Pack<count> acc = {};
    if (part < depth) acc = body(pack, part);
#pragma unroll 2
    for (int r = part + group; r < depth; r += group) acc = acc + body(pack, r);
    if constexpr (group >= count) {
      const f32 sum = sums_by_lane<group>(acc.e);
      if (part < count && n / group < packs) finish(pack, part, sum);
    } else {
#pragma unroll
      for (int by = 1; by < group; by *= 2) {
#pragma unroll
        for (int e = 0; e < count; ++e) acc.e[e] += __shfl_xor_sync(~0u, acc.e[e], by);
      }
#pragma unroll
      for (int e = 0; e < count; ++e) {
        if (part == 0 && n / group < packs) finish(pack, e, acc.e[e]);
      }
    }
  }
}

template <int count, class A, class B>
__device__ __forceinline__ f32 dot(const A* a, const B* b) {
  f32 x[count], y[count], sum = 0;
  widen<count>(a, x);
  widen<count>(b, y);
#pragma unroll
  for (int i = 0; i < count; ++i) sum = fmaf(x[i], y[i], sum);
  return sum;
}

template <int count, class A, class B>
__device__ __forceinline__ Pack<count> scaled(const A* a, B b) {
  f32 x[count];
  widen<count>(a, x);
  Pack<count> out;
#pragma unroll
  for (int i = 0; i < count; ++i) out.e[i] = x[i] * convert<f32>(b);
  return out;
}

// How rows are cut into chunks; tables.py computes the same.
template <class W, int K, int stage_bytes>
struct Chunks {
  static constexpr int kRowBytes = K * sizeof(W);
  __device__ static constexpr bool fits(int parts) {
    return K % parts == 0 && K / parts * sizeof(W) % 16 == 0 && kRowBytes / parts <= stage_bytes;
  }
  __device__ static constexpr int find() {
    int parts = 1;
    while (!fits(parts)) ++parts;
    return parts;
  }
  static constexpr int kParts = find();
  static constexpr int kDepth = K / kParts;
  static constexpr int kRows = kParts > 1 ? 1 : stage_bytes / kRowBytes < 16 ? stage_bytes / kRowBytes : 16;
};

__device__ constexpr int power_of_two(int count) {
  int n = 1;
  while (n < count) n *= 2;
  return n;
}

// One chunk: lane r * M + m gets the sum of row r with column m. Not inlined: a program streams in many places.
template <class W, class X, int M, int rows, int depth>
__device__ __noinline__ f32 chunk_sums(int w_byte, int x_byte, int x_stride) {
  constexpr int kSums = power_of_two(rows * M);
  const W* w = shared_at<W>(w_byte);
  const X* x = shared_at<X>(x_byte);
  const int lane = threadIdx.x % kWarp;
  f32 sums[kSums] = {};
  if constexpr (kIsHalf<W> && kSame<W, X>) {
    // On tensor cores: four lanes' elements of two rows are one row each of the first factor, and their elements of x a
    // column of the second one. What belongs together is the diagonal of each half of the result.
    constexpr int kPairs = (rows + 1) / 2, kChains = kPairs * M;
    constexpr int kSets = kChains == 1 ? 4 : kChains <= 8 ? 2 : 1;  // of accumulators, for shorter chains
    f32 acc[kPairs][M][kSets][4] = {};
#pragma unroll 4
    for (int i = 0; i < (depth + kWarp * 8 - 1) / (kWarp * 8); ++i) {
      const int k = (i * kWarp + lane) * 8;
      const bool in = depth % (kWarp * 8) == 0 || k < depth;
      Quad xs[M];
#pragma unroll
      for (int m = 0; m < M; ++m) xs[m] = in ? *reinterpret_cast<const Quad*>(x + m * x_stride + k) : Quad{};
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const W* row = w + 2 * p * depth + k;
        const Quad a = in ? *reinterpret_cast<const Quad*>(row) : Quad{};
        const Quad b = in && 2 * p + 1 < rows ? *reinterpret_cast<const Quad*>(row + depth) : Quad{};
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            matrix_multiply<W>(acc[p][m][(2 * i + h) % kSets], a.w[2 * h], b.w[2 * h], a.w[2 * h + 1],
                               b.w[2 * h + 1], xs[m].w[2 * h], xs[m].w[2 * h + 1]);
          }
        }
      }
    }
    const bool diagonal = lane % 4 == lane / 8, odd = lane / 4 % 2 != 0;
#pragma unroll
    for (int n = 0; n < rows * M; ++n) {
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        const f32(&d)[4] = acc[n / M / 2][n % M][s];
        const int half = n / M % 2 * 2;
        sums[n] += odd ? d[half + 1] : d[half];
      }
      if (!diagonal) sums[n] = 0;
    }
  } else {
    constexpr int kLoad = 16 / (sizeof(W) > sizeof(X) ? sizeof(W) : sizeof(X));
#pragma unroll 2
    for (int k = lane * kLoad; k < depth; k += kWarp * kLoad) {
      f32 xs[M][kLoad];
#pragma unroll
      for (int m = 0; m < M; ++m) widen<kLoad>(x + m * x_stride + k, xs[m]);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        f32 ws[kLoad];
        widen<kLoad>(w + r * depth + k, ws);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int e = 0; e < kLoad; ++e) sums[r * M + m] = fmaf(ws[e], xs[m][e], sums[r * M + m]);
        }
      }
    }
  }
  return sums_by_lane<kWarp>(sums);
}

// finish(row, m, sum) once for every row and m.
template <class W, class X, int M, int K, class C, class Finish>
__device__ __forceinline__ void stream_rows(C& c, const X* x, int x_stride, int rows, Finish&& finish) {
  using G = Chunks<W, K, C::kStageBytes>;
  constexpr int R = G::kRows;
  const int chunks = G::kParts == 1 ? (rows + R - 1) / R : rows * G::kParts;
  f32* partials = c.template partials<f32>();
  const int x_byte = static_cast<int>(shared_address(x) - shared_address(shared_at<char>(0)));
#pragma unroll 1
  for (int j = c.ring.mine(c.warp()); j < chunks; j += Ring<typename C::Shape>::kStep) {
    const int chunk = c.ring.wait(c, c.ring.next + j);
    if (chunk < 0) break;
    const int part = G::kParts == 1 ? 0 : j % G::kParts * G::kDepth * static_cast<int>(sizeof(X));
    const f32 sum = chunk_sums<W, X, M, R, G::kDepth>(chunk, x_byte + part, x_stride);
    __syncwarp();
    if (c.lane() == 0) c.ring.release(c.ring.next + j);
    if (G::kParts == 1) {
      const int row = j * R + c.lane() / M;
      if (c.lane() < R * M && row < rows) finish(row, c.lane() % M, sum);
    } else if (c.lane() < M) {
      partials[j * M + c.lane()] = sum;
    }
  }
  c.ring.next += chunks;
  if (G::kParts > 1) {
    c.sync();
#pragma unroll 1
    for (int n = c.thread(); n < rows * M; n += C::kThreads) {
      f32 sum = 0;
      for (int p = 0; p < G::kParts; ++p) sum += partials[(n / M * G::kParts + p) * M + n % M];
      finish(n / M, n % M, sum);
    }
    c.sync();  // before the partials are used again
  }
}

}  // namespace mpk
