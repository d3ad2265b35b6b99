// sort: rows ordered by one or more keys, stably; top-k is a sort of which the first k are kept.
//
// Keys become unsigned integers that order like them. Short rows: the place of an element is the number of those before
// it. Others are sorted one byte of a key after the other, the last one first; what moves are positions.
#pragma once

#include "persistent.cuh"

namespace mpk {

// JAX's order (-0 equals +0, NaNs equal and last); or the total order of IEEE 754, descending.
template <bool top, class T>
__device__ __forceinline__ UnsignedOf<T> ordered(T x) {
  using U = UnsignedOf<T>;
  U bits = bitcast<U>(x);
  if constexpr (kIsFloat<T> || kIsHalf<T>) {
    const U size = static_cast<U>(bits & static_cast<U>(~kSignBit<T>));
    if (!top && size == 0) bits = 0;
    bits = static_cast<U>(bits & kSignBit<T> ? ~bits : bits | kSignBit<T>);
    if (!top && size > kInfinityBits<T>) bits = static_cast<U>(~U(0));
  } else if constexpr (kIsInt<T>) {
    if constexpr (kIsSigned<T>) bits = static_cast<U>(bits ^ kSignBit<T>);
  }
  return top ? static_cast<U>(~bits) : bits;
}

// less(row, i, j): whether the keys of i come before those of j; write(row, place, i).
template <class C, class Less, class Write>
__device__ __forceinline__ void sort_by_counting(const C& c, int rows, int length, int kept, Less&& less,
                                                 Write&& write) {
#pragma unroll 1
  for (int n = c.thread(); n < rows * length; n += C::kThreads) {
    const int row = n / length, i = n % length;
    int place = 0;
#pragma unroll 1
    for (int j = 0; j < length; ++j) place += j < i ? !less(row, i, j) : less(row, j, i);
    if (place < kept) write(row, place, i);
  }
}

// What sort_by_digits needs beside two lists of positions: how often each warp sees each digit, and a few sums.
constexpr int kDigits = 256;
template <class C>
struct DigitCounts {
  u32 of[C::kWarps][kDigits];
  u32 sums[kDigits / kWarp];
  u32 alike;  // all digits are the same
};

// digit(row, i, pass): of element i in that pass. Each warp has a stretch of the list; elements go behind all those of
// smaller digits, and behind those of the same digit that come before them.
template <class C, class Digit, class Write>
__device__ __forceinline__ void sort_by_digits(const C& c, int rows, int length, int kept, int passes, u32* list,
                                               u32* other, DigitCounts<C>& counts, Digit&& digit, Write&& write) {
  static_assert(C::kThreads >= kDigits && sizeof(counts.of[0]) % 16 == 0);
  const int t = c.thread();
  const int first = static_cast<int>(s64(length) * c.warp() / C::kWarps);
  const int last = static_cast<int>(s64(length) * (c.warp() + 1) / C::kWarps);
  u32* mine = counts.of[c.warp()];
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
#pragma unroll 1
    for (int i = t; i < length; i += C::kThreads) list[i] = i;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 1
      for (int d = c.lane(); d < kDigits; d += kWarp) mine[d] = 0;
      if (t == 0) counts.alike = 0;
      c.sync();
#pragma unroll 4
      for (int n = first + c.lane(); n < last; n += kWarp) atomicAdd(&mine[digit(row, list[n], pass)], 1u);
      c.sync();
      u32 all = 0;
      if (t < kDigits) {
#pragma unroll 1
        for (int w = 0; w < C::kWarps; ++w) {
          const u32 count = counts.of[w][t];
          counts.of[w][t] = all;
          all += count;
        }
      }
      u32 upto = all;
#pragma unroll
      for (int by = 1; by < kWarp; by *= 2) {
        const u32 left = __shfl_up_sync(~0u, upto, by);
        if (c.lane() >= by) upto += left;
      }
      if (t < kDigits && c.lane() == kWarp - 1) counts.sums[c.warp()] = upto;
      c.sync();
      if (t < kDigits) {
        u32 before = upto - all;
#pragma unroll 1
        for (int w = 0; w < c.warp(); ++w) before += counts.sums[w];
#pragma unroll 1
        for (int w = 0; w < C::kWarps; ++w) counts.of[w][t] += before;
        if (all == static_cast<u32>(length)) counts.alike = 1;
      }
      c.sync();
      if (counts.alike != 0) {
        c.sync();  // before the counts are used again
        continue;
      }
#pragma unroll 1
      for (int n = first; n < last; n += kWarp) {
        const bool in = n + c.lane() < last;
        const u32 lanes = __ballot_sync(~0u, in);
        if (in) {
          const u32 i = list[n + c.lane()], d = digit(row, i, pass);
          const u32 same = __match_any_sync(lanes, d), before = __popc(same & ((1u << c.lane()) - 1));
          const u32 start = mine[d];
          __syncwarp(lanes);
          if (before == 0) mine[d] = start + __popc(same);
          other[start + before] = i;
        }
        __syncwarp();
      }
      u32* const sorted = other;
      other = list;
      list = sorted;
      c.sync();
    }
#pragma unroll 1
    for (int i = t; i < kept; i += C::kThreads) write(row, i, static_cast<int>(list[i]));
    c.sync();
  }
}

}  // namespace mpk
