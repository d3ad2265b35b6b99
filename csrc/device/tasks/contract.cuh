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

// How many sets of accumulators so many chains of sums have, for shorter ones.
__device__ constexpr int sets_of(int chains) { return chains == 1 ? 4 : chains <= 8 ? 2 : 1; }

// Sets of accumulators, added up in the first one.
template <int sets>
__device__ __forceinline__ void add_sets(f32 (&acc)[sets][4]) {
#pragma unroll
  for (int by = 1; by < sets; by *= 2) {
#pragma unroll
    for (int i = 0; i < sets / (2 * by) * 4; ++i) acc[i / 4 * 2 * by][i % 4] += acc[i / 4 * 2 * by + by][i % 4];
  }
}

// How a warp multiplies a chunk of rows with M columns.
template <class W, class X, int M, int rows, int depth>
struct ChunkShape {
  static constexpr int kPairs = (rows + 1) / 2;
  static constexpr bool kCores = kIsHalf<W> && kSame<W, X> && kPairs * M <= 16;
  // A step is sixteen elements of each of eight lots; two of them are a block.
  static constexpr int kStep = 128, kSteps = depth / kStep;
  static constexpr bool kMatrices = kCores && depth % kStep == 0;
  static constexpr int kRowBytes = depth * static_cast<int>(sizeof(W)), kStepBytes = kStep * static_cast<int>(sizeof(W));

  // Where the lane reads first in a chunk and in a column. Matrices 0 and 2 are a step of a row, 1 and 3 that of the next
  // row, or the next step of an only row.
  __device__ static u32 weights(int lane) {
    return kMatrices ? lane % 8 * 16 + lane / 16 * 128 + lane / 8 % 2 * (rows > 1 ? kRowBytes : after(0)) : 0;
  }
  __device__ static u32 columns(int lane) { return kMatrices ? lane * 16 : 0; }
  // From a step of an only row to the next, which the last one may not have.
  __device__ static constexpr int after(int step) { return step + 1 < kSteps ? kStepBytes : 0; }

  // Blocks at a time, of so many loads each, all of whose results are in registers.
  __device__ static constexpr int unrolled(int loads) {
    int blocks = kSteps < 2 ? 1 : kSteps / 2;
    while (blocks > 1 && (blocks * loads > 24 || kSteps / 2 % blocks != 0)) --blocks;
    return blocks;
  }

  // Which row's sum a lane gets, and with which column; `rows` or more: none.
  __device__ static int number(int lane) { return lane % 4 | ((lane / 8 ^ lane) % 4) << 2; }
  __device__ static int row(int lane) {
    if constexpr (kCores) return number(lane) / M * 2 + lane / 4 % 2;
    else return lane / M;
  }
  __device__ static int column(int lane) { return kCores ? number(lane) % M : lane % M; }
};

// The sums of the diagonals of both halves of each result of matrix_multiply, by the lanes that ChunkShape::row says. The
// diagonal is in the lanes whose bits 3 and 4 are as their bits 0 and 1: exchanges keep these among themselves.
template <int results>
__device__ __forceinline__ f32 sums_of_diagonals(const f32 (&d)[results][4]) {
  constexpr int n = power_of_two(results), kLeft = n > 4 ? n / 4 : 1;
  const int lane = threadIdx.x % kWarp;
  const bool odd = (lane & 4) != 0;
  f32 v[n] = {};
#pragma unroll
  for (int i = 0; i < results; ++i) {
    v[i] = (odd ? d[i][3] : d[i][0]) + __shfl_xor_sync(~0u, odd ? d[i][1] : d[i][2], 4);
  }
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const int by = 9 << b;
    if (n > 1 << b) {
      const bool second = (lane >> b & 1) != 0;
#pragma unroll
      for (int i = 0; i < n >> (b + 1); ++i) {
        v[i] = (second ? v[2 * i + 1] : v[2 * i]) + __shfl_xor_sync(~0u, second ? v[2 * i] : v[2 * i + 1], by);
      }
    } else {
      v[0] += __shfl_xor_sync(~0u, v[0], by);
    }
  }
  // Where there are more than eight sums, lanes off the diagonal take the others.
#pragma unroll
  for (int i = 1; i < kLeft; ++i) {
    const f32 other = __shfl_xor_sync(~0u, v[i], i * 8);
    if ((lane / 8 ^ lane) % 4 == i) v[0] = other;
  }
  return v[0];
}

// One chunk, from where this lane reads of it: each lane gets the sum that ChunkShape says. Not inlined: a program streams
// in many places.
template <class W, class X, int M, int rows, int depth>
__device__ __noinline__ f32 chunk_sums(u32 w_at, u32 x_at, int x_stride) {
  using S = ChunkShape<W, X, M, rows, depth>;
  const int lane = threadIdx.x % kWarp;
  if constexpr (S::kMatrices) {
    // On tensor cores: a row of the first factor's upper half are two lots of eight elements of a row of weights, of its
    // lower half those of the next one; the same lots of x are a column of the second factor. What belongs together is the
    // diagonal of each half of the result. Of an only row the lower half are other lots, with a result of their own.
    constexpr int kWhole = rows / 2, kOnly = rows % 2, kResults = kWhole + 2 * kOnly;
    constexpr int kSets = sets_of(kResults * M);
    f32 acc[kResults][M][kSets][4] = {};
    const u32 last = rows == 1 ? w_at : w_at + (rows - 1) * S::kRowBytes - lane / 8 % 2 * (S::kRowBytes - S::after(0));
    // Block i, of those unrolled number j, which chooses the set of accumulators.
    const auto block = [&](int i, int j, int steps) {
      Quad xs[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const u32 at = x_at + (m * x_stride + i * 2 * S::kStep) * static_cast<int>(sizeof(X));
        xs[m] = load_matrices(steps == 2 ? at : at - lane / 16 * S::kStepBytes);
      }
#pragma unroll
      for (int p = 0; p < kWhole; ++p) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          if (s == steps) break;
          const Quad a = load_matrices(w_at + 2 * p * S::kRowBytes + (2 * i + s) * S::kStepBytes);
#pragma unroll
          for (int m = 0; m < M; ++m) {
            matrix_multiply<W>(acc[p][m][(2 * j + s) % kSets], a.w[0], a.w[1], a.w[2], a.w[3], xs[m].w[2 * s],
                               xs[m].w[2 * s + 1]);
          }
        }
      }
      if constexpr (kOnly) {
        const u32 at = last + 2 * i * S::kStepBytes;
        const Quad a = load_matrices(steps == 2 ? at : at - lane / 8 % 2 * S::after(0));
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          if (s == steps) break;
#pragma unroll
          for (int m = 0; m < M; ++m) {
            matrix_multiply<W>(acc[kWhole + s][m][j % kSets], a.w[0], a.w[1], a.w[2], a.w[3], xs[m].w[2 * s],
                               xs[m].w[2 * s + 1]);
          }
        }
      }
    };
    constexpr int kBlocks = S::unrolled(M + 2 * kWhole + kOnly);
#pragma unroll 1
    for (int i = 0; i < S::kSteps / 2; i += kBlocks) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) block(i + j, j, 2);
    }
    if constexpr (S::kSteps % 2 != 0) block(S::kSteps / 2, S::kSteps / 2, 1);
    f32 sums[S::kPairs * M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < kResults; ++r) add_sets(acc[r][m]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int p = 0; p < kWhole; ++p) sums[p * M + m][e] = acc[p][m][0][e];
        if constexpr (kOnly) {
          sums[kWhole * M + m][e] = e < 2 ? acc[kWhole][m][0][e] + acc[kWhole + 1][m][0][e + 2] : 0;
        }
      }
    }
    return sums_of_diagonals(sums);
  } else if constexpr (S::kCores) {
    // The same with what is loaded by lane: four lanes' elements of two rows are one row each of the first factor.
    const W* w = shared_from<W>(w_at);
    const X* x = shared_from<X>(x_at);
    constexpr int kSets = sets_of(S::kPairs * M);
    f32 acc[S::kPairs * M][kSets][4] = {};
#pragma unroll 4
    for (int i = 0; i < (depth + kWarp * 8 - 1) / (kWarp * 8); ++i) {
      const int k = (i * kWarp + lane) * 8;
      const bool in = depth % (kWarp * 8) == 0 || k < depth;
      Quad xs[M];
#pragma unroll
      for (int m = 0; m < M; ++m) xs[m] = in ? *reinterpret_cast<const Quad*>(x + m * x_stride + k) : Quad{};
#pragma unroll
      for (int p = 0; p < S::kPairs; ++p) {
        const W* row = w + 2 * p * depth + k;
        const Quad a = in ? *reinterpret_cast<const Quad*>(row) : Quad{};
        const Quad b = in && 2 * p + 1 < rows ? *reinterpret_cast<const Quad*>(row + depth) : Quad{};
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            matrix_multiply<W>(acc[p * M + m][(2 * i + h) % kSets], a.w[2 * h], b.w[2 * h], a.w[2 * h + 1],
                               b.w[2 * h + 1], xs[m].w[2 * h], xs[m].w[2 * h + 1]);
          }
        }
      }
    }
    f32 sums[S::kPairs * M][4];
#pragma unroll
    for (int n = 0; n < S::kPairs * M; ++n) {
      add_sets(acc[n]);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[n][e] = acc[n][0][e];
    }
    return sums_of_diagonals(sums);
  } else {
    const W* w = shared_from<W>(w_at);
    const X* x = shared_from<X>(x_at);
    constexpr int kSums = power_of_two(rows * M);
    constexpr int kLoad = 16 / (sizeof(W) > sizeof(X) ? sizeof(W) : sizeof(X));
    f32 sums[kSums] = {};
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
    return sums_by_lane<kWarp>(sums);
  }
}

// finish(row, m, sum) once for every row and m.
template <class W, class X, int M, int K, class C, class Finish>
__device__ __forceinline__ void stream_rows(C& c, const X* x, int x_stride, int rows, Finish&& finish) {
  using G = Chunks<W, K, C::kStageBytes>;
  constexpr int R = G::kRows;
  using S = ChunkShape<W, X, M, R, G::kDepth>;
  const int chunks = G::kParts == 1 ? (rows + R - 1) / R : rows * G::kParts;
  f32* partials = c.template partials<f32>();
  const u32 w_at = shared_base() + S::weights(c.lane());
  const u32 x_at = shared_address(x) + S::columns(c.lane());
  // Of the sum that this lane gets; beyond any task's rows where it gets none.
  const int own = S::row(c.lane()) < R ? S::row(c.lane()) : 1 << 30, m = S::column(c.lane());
#pragma unroll 1
  for (int j = c.ring.mine(c.warp()); j < chunks; j += Ring<typename C::Shape>::kStep) {
    const u32 number = c.ring.next + j;
    const u32 part = G::kParts == 1 ? 0 : j % G::kParts * G::kDepth * static_cast<int>(sizeof(X));
    // Whatever can be is done before the chunk has landed.
    const u32 from = afresh(w_at + c.ring.place(number)), with = afresh(x_at + part);
    if (!c.ring.wait_together(c, number)) break;
    const f32 sum = chunk_sums<W, X, M, R, G::kDepth>(from, with, x_stride);
    __syncwarp();
    if (c.lane() == 0) c.ring.release(number);
    if (G::kParts == 1) {
      const int row = j * R + own;
      if (row < rows) finish(row, m, sum);
    } else if (own == 0) {
      partials[j * M + m] = sum;
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
