// reduce: every output of a box combines what the body gives for all positions of the reduced axes.
#pragma once

#include "persistent.cuh"

namespace mpk {

// Several accumulators of one output.
template <class First, class... Rest>
struct Accumulators {
  First first;
  Accumulators<Rest...> rest;
  Accumulators() = default;
  __device__ Accumulators(First f, Rest... r) : first(f), rest(r...) {}
  template <int k>
  __device__ auto get() const {
    if constexpr (k == 0) return first;
    else return rest.template get<k - 1>();
  }
};
template <class First>
struct Accumulators<First> {
  First first;
  Accumulators() = default;
  __device__ Accumulators(First f) : first(f) {}
  template <int k>
  __device__ auto get() const {
    return first;
  }
};

// Another lane's accumulators: `shuffle` brings its words, one at a time.
template <class Acc, class Shuffle>
__device__ __forceinline__ Acc shuffled(const Acc& a, Shuffle&& shuffle) {
  constexpr int kWords = (sizeof(Acc) + 3) / 4;
  union Bits {
    u32 words[kWords];
    Acc acc;
    __device__ Bits() {}
  } in, out;
  in.acc = a;
#pragma unroll
  for (int k = 0; k < kWords; ++k) out.words[k] = shuffle(in.words[k]);
  return out.acc;
}

template <class Acc>
__device__ __forceinline__ Acc shuffle_down(const Acc& a, int by) {
  return shuffled(a, [by](u32 word) { return __shfl_down_sync(~0u, word, by); });
}

template <class Acc>
__device__ __forceinline__ Acc shuffle_up(const Acc& a, int by) {
  return shuffled(a, [by](u32 word) { return __shfl_up_sync(~0u, word, by); });
}

// Combines `group` neighbouring lanes in the order of the lanes; the first has the result.
template <int group, class Acc, class Combine>
__device__ __forceinline__ Acc across_lanes(Acc acc, Combine&& combine) {
#pragma unroll
  for (int by = 1; by < group; by *= 2) acc = combine(acc, shuffle_down(acc, by));
  return acc;
}

__device__ constexpr int power_of_two_below(int count) {
  int n = 1;
  while (2 * n <= count) n *= 2;
  return n;
}

// How the reduced positions are spread over the lanes of a group: every group-th one, or one run each. Only the
// latter keeps their order, for combinations that do not commute.
enum class Spread { kStrided, kRuns };

// Each output by `group` lanes, 1 to 32; depth, the number of reduced positions, is at least that.
template <class Acc, int group, Spread spread, class C, class Body, class Combine, class Finish>
__device__ __forceinline__ void reduce(const C& c, int outputs, int depth, Body&& body, Combine&& combine,
                                       Finish&& finish) {
  const int part = c.thread() % group;
  const int first = spread == Spread::kStrided ? part : static_cast<int>(s64(depth) * part / group);
  const int last = spread == Spread::kStrided ? depth : static_cast<int>(s64(depth) * (part + 1) / group);
  constexpr int kStep = spread == Spread::kStrided ? group : 1;
  // Whole warps stay together: lanes without an output of their own compute one that is dropped.
  const int rounded = (outputs * group + kWarp - 1) / kWarp * kWarp;
#pragma unroll 1
  for (int n = c.thread(); n < rounded; n += C::kThreads) {
    const int output = min(n / group, outputs - 1);
    Acc acc = body(output, first);
#pragma unroll 4
    for (int r = first + kStep; r < last; r += kStep) acc = combine(acc, body(output, r));
    acc = across_lanes<group>(acc, combine);
    if (part == 0 && n / group < outputs) finish(output, acc);
  }
}

// One output, which every thread gets. Few positions are combined by each warp for itself, without a barrier; more by
// all warps, whose parts every thread combines behind one.
template <class Acc, Spread spread, int depth, class C, class Body, class Combine, class Finish>
__device__ __forceinline__ auto reduce_for_all(const C& c, Body&& body, Combine&& combine, Finish&& finish) {
  constexpr bool kAlone = depth <= 2 * kWarp;
  constexpr int kGroup = depth >= kWarp ? kWarp : power_of_two_below(depth);
  constexpr int kParts = kAlone ? kGroup : depth < C::kThreads ? depth / kWarp * kWarp : C::kThreads;
  constexpr bool kRuns = spread == Spread::kRuns;
  Acc acc{};
  if (const int part = kAlone ? c.lane() % kGroup : c.thread(); part < kParts) {
    const int first = kRuns ? static_cast<int>(s64(depth) * part / kParts) : part;
    const int last = kRuns ? static_cast<int>(s64(depth) * (part + 1) / kParts) : depth;
    acc = body(first);
#pragma unroll 4
    for (int r = first + (kRuns ? 1 : kParts); r < last; r += kRuns ? 1 : kParts) acc = combine(acc, body(r));
  }
  if constexpr (kRuns) {
    acc = across_lanes<kGroup>(acc, combine);
    if constexpr (kAlone) acc = shuffled(acc, [](u32 word) { return __shfl_sync(~0u, word, 0); });
  } else {
#pragma unroll
    for (int by = 1; by < kGroup; by *= 2) {
      acc = combine(acc, shuffled(acc, [by](u32 word) { return __shfl_xor_sync(~0u, word, by); }));
    }
  }
  if constexpr (!kAlone) {
    constexpr int kWarps = kParts / kWarp;
    Acc* partials = c.template partials<Acc>();
    if (c.lane() == 0 && c.warp() < kWarps) partials[c.warp()] = acc;
    c.sync();
    acc = partials[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) acc = combine(acc, partials[w]);
  }
  return finish(acc);
}

// Like `reduce`, over `depth` positions that are known to be live when the task starts, maybe none; `nothing` changes no
// sum.
template <class Acc, int group, class C, class Body, class Combine, class Finish>
__device__ __forceinline__ void reduce_live(const C& c, int outputs, int depth, Acc nothing, Body&& body,
                                            Combine&& combine, Finish&& finish) {
  const int part = c.thread() % group;
  const int rounded = (outputs * group + kWarp - 1) / kWarp * kWarp;
#pragma unroll 1
  for (int n = c.thread(); n < rounded; n += C::kThreads) {
    const int output = min(n / group, outputs - 1);
    Acc acc = nothing;
#pragma unroll 4
    for (int r = part; r < depth; r += group) acc = combine(acc, body(output, r));
    acc = across_lanes<group>(acc, combine);
    if (part == 0 && n / group < outputs) finish(output, acc);
  }
}

// body(n) for every row n, by a warp each, not the first ones: others may have something else to do meanwhile.
template <class C, class Body>
__device__ __forceinline__ void for_rows(const C& c, int rows, Body&& body) {
#pragma unroll 1
  for (int n = (c.warp() + C::kWarps - C::kWarps / 2) % C::kWarps; n < rows; n += C::kWarps) body(n);
}

// body(r, k) for every element r of a warp's row, which are at most 32 * each; it is the lane's element k.
template <int each, class C, class Body>
__device__ __forceinline__ void over_row(const C& c, int depth, Body&& body) {
#pragma unroll
  for (int k = 0; k < each; ++k) {
    if (const int r = c.lane() + k * kWarp; r < depth) body(r, k);
  }
}

// What finish makes of all that body(r, k) gives, in all lanes; `nothing` changes no sum.
template <int each, class C, class Body, class Combine, class Finish>
__device__ __forceinline__ auto across_row(const C& c, int depth, f32 nothing, Body&& body, Combine&& combine,
                                           Finish&& finish) {
  f32 acc = nothing;
  over_row<each>(c, depth, [&](int r, int k) { acc = combine(acc, body(r, k)); });
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) acc = combine(acc, __shfl_xor_sync(~0u, acc, by));
  return finish(acc);
}

// Each output by all threads; depth is at least their number. A barrier is behind.
template <class Acc, Spread spread, class C, class Body, class Combine, class Finish>
__device__ __forceinline__ void reduce_together(const C& c, int outputs, int depth, Body&& body, Combine&& combine,
                                                Finish&& finish) {
  const int first = spread == Spread::kStrided ? c.thread() : static_cast<int>(s64(depth) * c.thread() / C::kThreads);
  const int last = spread == Spread::kStrided ? depth : static_cast<int>(s64(depth) * (c.thread() + 1) / C::kThreads);
  constexpr int kStep = spread == Spread::kStrided ? C::kThreads : 1;
  constexpr int kUnroll = sizeof(Acc) <= 4 ? C::kWarps : 1;
  Acc* partials = c.template partials<Acc>();
#pragma unroll 1
  for (int output = 0; output < outputs; ++output) {
    Acc acc = body(output, first);
#pragma unroll 4
    for (int r = first + kStep; r < last; r += kStep) acc = combine(acc, body(output, r));
    acc = across_lanes<kWarp>(acc, combine);
    if (c.lane() == 0) partials[c.warp()] = acc;
    c.sync();
    if (c.thread() == 0) {
      Acc all = partials[0];
#pragma unroll kUnroll
      for (int w = 1; w < C::kWarps; ++w) all = combine(all, partials[w]);
      finish(output, all);
    }
    c.sync();
  }
}

}  // namespace mpk
