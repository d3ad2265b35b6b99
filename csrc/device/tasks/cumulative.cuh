// cumulative: every position of a line combines what the body gives for it and for all positions before it.
//
// A long chain of additions loses accuracy, as terms meet an ever larger sum. So a line is cut into runs, each of which
// starts anew; what precedes a run is combined apart and put in front of every position of it. Order is kept, so
// combinations need not commute.
#pragma once

#include "persistent.cuh"
#include "tasks/reduce.cuh"

namespace mpk {

// Positions [first, last) of a line, behind `before` where there is something before them.
template <class Acc, class Body, class Combine, class Finish>
__device__ __forceinline__ void scan_run(int line, int first, int last, bool later, Acc before, Body& body,
                                         Combine& combine, Finish& finish) {
  constexpr int kRun = 128;
  Acc run;
#pragma unroll 1
  for (int r = first; r < last; ++r) {
    const bool anew = (r - first) % kRun == 0;
    if (anew && r > first) {
      before = later ? combine(before, run) : run;
      later = true;
    }
    run = anew ? body(line, r) : combine(run, body(line, r));
    finish(line, r, later ? combine(before, run) : run);
  }
}

// Each line by one thread.
template <class Acc, class C, class Body, class Combine, class Finish>
__device__ __forceinline__ void scan(const C& c, int lines, int length, Body&& body, Combine&& combine,
                                     Finish&& finish) {
#pragma unroll 1
  for (int n = c.thread(); n < lines; n += C::kThreads) {
    scan_run(n, 0, length, false, body(n, 0), body, combine, finish);
  }
}

// Each line by all threads, one run each: totals of runs first, then every run behind the totals before it. Threads
// without a run come after all others, so that what they compute reaches nobody.
template <class Acc, class C, class Body, class Combine, class Finish>
__device__ __forceinline__ void scan_together(const C& c, int lines, int length, Body&& body, Combine&& combine,
                                              Finish&& finish) {
  const int runs = min(length, C::kThreads), mine = min(c.thread(), runs - 1);
  const int first = static_cast<int>(s64(length) * mine / runs);
  const int last = static_cast<int>(s64(length) * (mine + 1) / runs);
  Acc* partials = c.template partials<Acc>();
#pragma unroll 1
  for (int line = 0; line < lines; ++line) {
    Acc total = body(line, first);
#pragma unroll 1
    for (int r = first + 1; r < last; ++r) total = combine(total, body(line, r));
#pragma unroll 1
    for (int by = 1; by < kWarp; by *= 2) {
      const Acc left = shuffle_up(total, by);
      if (c.lane() >= by) total = combine(left, total);
    }
    if (c.lane() == kWarp - 1) partials[c.warp()] = total;
    c.sync();
    Acc before = shuffle_up(total, 1);
    if (c.warp() > 0) {
      Acc earlier = partials[0];
#pragma unroll 1
      for (int w = 1; w < c.warp(); ++w) earlier = combine(earlier, partials[w]);
      before = c.lane() == 0 ? earlier : combine(earlier, before);
    }
    if (c.thread() < runs) scan_run(line, first, last, c.thread() > 0, before, body, combine, finish);
    c.sync();  // before the partials are used again
  }
}

}  // namespace mpk
