// The algorithms of contract_kernels.h, once for all instruction sets: a file that defines the
// vectors of one instruction set includes this and defines a ContractKernels (contract_micro.h says
// what vectors must offer).
#pragma once

#include "host/tasks/contract_micro.h"

namespace jax_mpk::host {
namespace {

// --- Direct form: few rows, rhs contiguous along n and read where it lies ------------------------

// rhs comes from memory once, so the order of reading decides. kStreams rows advance side by side:
// one row at a time, with columns of a wider matrix, reaches a third of the bandwidth, as the
// hardware's prefetcher starts anew in each row, and long rows side by side are what it follows
// best. In short rows it hardly gets going: prefetching rows ahead into L2, in the order of memory,
// raises 576 x 576 of bf16 from half of a plain read's bandwidth to 80 % and more. Prefetching into
// L1 gains less.
template <class S>
void direct_form(int64_t m, int64_t n, int64_t depth, int64_t after,
                 Pack<typename S::Family> pack_lhs, const Matrix& lhs, const Matrix& rhs,
                 const Output<typename S::Family::Scalar>& out,
                 const Workspace<typename S::Family>& ws) {
  using F = typename S::Family;
  using T = typename F::Scalar;
  constexpr int64_t B = Workspace<F>::kBlock;
  const Split panels(m, F::kMaxRows);
  const int64_t limit = max_blocks<F>(panels.most());
  const int64_t blocks = n / B;
  const int64_t fit = kPartialBytes / (m * B * static_cast<int64_t>(sizeof(T)));
  const Split passes(blocks, fit);

  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.start(p), rows = panels.at(p);
    pack_lhs(ws.rows + first * depth, rows, lhs.from(first, 0), rows, depth);
  }
  for (int64_t pass = 0; pass < passes.count; ++pass) {
    const int64_t j0 = passes.start(pass) * B, width = passes.at(pass) * B;
    const Split groups(width / B, limit);
    // A single group of columns keeps its sums in registers for the whole chain, or all but the
    // last rows, for which there is nothing to prefetch.
    const int64_t streams = width * S::kSize > kLongRow ? kLongStreams : kStreams;
    const bool single = groups.count == 1;
    const int64_t step = !single ? streams : depth > 2 * kStreams ? depth - kStreams : depth;
    const Output<T> here = out.from(0, j0);
    for (int64_t k = 0; k < depth; k += step) {
      const bool last = k + step >= depth, store = last && out.column == 1;
      const End end = !last ? End::kKeep : store && out.add ? End::kAdd : End::kSet;
      // Two steps on: in this pass, in the next one or in the next chain.
      int64_t later = k + (single ? kStreams : kDistance * step), next = pass;
      if (later >= depth && next + 1 < passes.count) later -= depth, ++next;
      if (later >= depth) next = 0;
      const int64_t ahead_width = passes.at(next) * S::kSize * B;
      Ahead ahead(rhs.from(passes.start(next) * B, later).data, ahead_width,
                  groups.most() * B * S::kSize, rhs.k);
      const bool fetch = later < depth + after && width * S::kSize <= kLongRow;
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = panels.start(p), rows = panels.at(p);
        const Micro<S> kernels[2] = {pick<S>(rows, groups.size), pick<S>(rows, groups.most())};
        const T* x = ws.rows + first * depth + k * rows;
        for (int64_t g = 0; g < groups.count; ++g) {
          const int64_t j = groups.start(g) * B;
          T* partial = ws.partial + first * width + j;
          kernels[g < groups.larger](
              least(step, depth - k), x, rhs.from(j0 + j, k).data, rhs.k, k > 0 ? partial : nullptr,
              width, store ? here.from(first, j).pointer() : partial, store ? out.row : width, end,
              fetch && p == 0 ? &ahead : nullptr);
        }
      }
    }
    if (out.column != 1) scatter<F>(here, m, width, ws.partial, width);
  }
  if (n % B == 0) return;
  pack_source<S>(ws.pack, B, rhs.from(blocks * B, 0), n % B, depth);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.start(p);
    block<F>(out.from(first, blocks * B), panels.at(p), n % B, depth, ws.rows + first * depth,
             ws.pack, ws.tile);
  }
}

// --- Packed form: any sizes, types and strides ---------------------------------------------------

// A packed panel of rows stays in the L1 cache while the packed rhs streams past it from the L2
// cache.
template <class F>
void packed_form(int64_t m, int64_t n, int64_t depth, Pack<F> pack_lhs, Pack<F> pack_rhs,
                 const Matrix& lhs, const Matrix& rhs, const Output<typename F::Scalar>& out,
                 const Workspace<F>& ws, bool transposed) {
  constexpr int64_t B = Workspace<F>::kBlock;
  const Split panels(m, F::kMaxRows);
  for (int64_t j0 = 0; j0 < n; j0 += Workspace<F>::kPackColumns) {
    const int64_t columns = least(Workspace<F>::kPackColumns, n - j0);
    // kStreams rows side by side as in direct_form(); a transposed rhs has a stream per column by
    // itself.
    const int64_t step = transposed ? depth : kStreams;
    for (int64_t k = 0; k < depth; k += step) {
      for (int64_t j = 0; j < columns; j += B) {
        pack_rhs(ws.pack + j * kChain + k * B, B, rhs.from(j0 + j, k), least(B, columns - j),
                 least(step, depth - k));
      }
    }
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t first = panels.start(p), rows = panels.at(p);
      pack_lhs(ws.rows, rows, lhs.from(first, 0), rows, depth);
      for (int64_t j = 0; j < columns; j += B) {
        block<F>(out.from(first, j0 + j), rows, least(B, columns - j), depth, ws.rows,
                 ws.pack + j * kChain, ws.tile);
      }
    }
  }
}

// --- Dot-product form: few rows, rhs contiguous along k ------------------------------------------

// Rows of w whose sums are reduced together.
constexpr int dot_group(int64_t m) { return m == 1 ? 4 : m == 2 ? 2 : 1; }

// M rows of x times dot_group(M) rows of w, one row of w after the other: memory is read in its
// order, and each row once. x[i * x_row ...] is in the order of load2 and zero past the end;
// `tails` are the last elements of the rows of w, padded likewise, or null. Unless this is the
// first part of k, sums start from `state`; unless it is the last, they end there; `out`, where
// out[r * M + i] is x row i times w row r, is null then. Memory is prefetched `ahead` bytes on from
// what is read, into the L1 cache if that is near.
template <class S, int M>
void dot(int64_t blocks, const typename S::Family::Scalar* x, int64_t x_row, const char* const* w,
         const char* const* tails, typename S::Family::Scalar* state, bool first,
         typename S::Family::Scalar* out, int64_t ahead, bool near) {
  using F = typename S::Family;
  using T = typename F::Scalar;
  using Vec = typename F::Vec;
  constexpr int64_t L = F::kLanes, B = 2 * L;
  constexpr int R = dot_group(M), N = (R * M + 3) / 4 * 4;
  Vec sums[N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    Vec c[M][2];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      c[i][0] = first ? F::zero() : F::load(state + i * B);
      c[i][1] = first ? F::zero() : F::load(state + i * B + L);
    }
    const auto add = [&](const char* p, const T* xs) __attribute__((always_inline)) {
      Vec lo, hi;
      load2<S>(p, lo, hi);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        c[i][0] = F::fma(F::load(xs + i * x_row), lo, c[i][0]);
        c[i][1] = F::fma(F::load(xs + i * x_row + L), hi, c[i][1]);
      }
    };
    const char* p = w[r];
    for (int64_t k = 0; k < blocks; ++k, p += B * S::kSize) {
      for (int64_t line = 0; ahead != 0 && line < B * S::kSize; line += 64) {
        if (near) {
          __builtin_prefetch(p + ahead + line);
        } else {
          __builtin_prefetch(p + ahead + line, 0, 2);
        }
      }
      add(p, x + k * B);
    }
    if (tails) add(tails[r], x + blocks * B);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      if (!out) {
        F::store(state + i * B, c[i][0]);
        F::store(state + i * B + L, c[i][1]);
      }
      sums[r * M + i] = F::add(c[i][0], c[i][1]);
    }
  }
  if (!out) return;
#pragma GCC unroll 8
  for (int i = R * M; i < N; ++i) sums[i] = F::zero();
#pragma GCC unroll 2
  for (int i = 0; i < N; i += 4) F::sum4(sums + i, out + i);
}

template <class S, int M = 1>
auto pick_dot(int64_t rows) -> decltype(&dot<S, M>) {
  if constexpr (M < S::Family::kDotRows) {
    if (rows != M) return pick_dot<S, M + 1>(rows);
  }
  return dot<S, M>;
}

template <class S>
void dots_form(int64_t m, int64_t n, int64_t depth, int64_t, Pack<typename S::Family> pack_lhs,
               const Matrix& lhs, const Matrix& rhs, const Output<typename S::Family::Scalar>& out,
               const Workspace<typename S::Family>& ws) {
  using F = typename S::Family;
  using T = typename F::Scalar;
  constexpr int64_t L = F::kLanes, B = Workspace<F>::kBlock;
  const int64_t blocks = depth / B, rest = depth % B, padded = (blocks + (rest > 0)) * B;
  for (int64_t i = 0; i < m; ++i) {
    T* x = ws.rows + i * padded;
    pack_lhs(x, padded, {lhs.data + i * lhs.row, lhs.k, 0}, depth, 1);  // one "column" as rows
    if (!S::kSplit) continue;
    for (int64_t k = 0; k < padded; k += B) {
      typename F::Vec lo = F::load(x + k), hi = F::load(x + k + L);
      // Interleaving 2 L elements log2(2 L) times is the identity, so once less undoes it.
      for (int64_t round = 1; round < L; round *= 2) F::interleave(lo, hi);
      F::store(x + k, lo);
      F::store(x + k + L, hi);
    }
  }
  const Split panels(m, F::kDotRows);
  // Parts of k for which x fits into the L1 cache, as far as that takes several rows of x.
  const int64_t fit = kDotBytes / (m * B * static_cast<int64_t>(sizeof(T)));
  const Split parts(m > 2 ? blocks : 1, m > 2 ? fit : 1);
  constexpr int64_t kRows = 4;  // of rhs, that take turns part by part
  char tail[kRows][B * S::kSize];
  const char* tails[kRows] = {tail[0], tail[1], tail[2], tail[3]};
  __builtin_memset(tail, 0, sizeof(tail));
  T* state = ws.partial;  // [kRows][m][B]
  // What follows directly, the hardware prefetches best by itself unless arithmetic holds it up:
  // eight rows of lhs run twice as fast with prefetches into L2. Short rows with gaps (heads of a
  // cache) want them in L1, for half as much again.
  const int64_t bytes = depth * S::kSize;
  const bool near = rhs.row != bytes;
  const int64_t distance =
      near || m > 4 ? ((near ? kNearBytes : kFarBytes) / bytes + 1) * rhs.row : 0;
  decltype(pick_dot<S>(1)) kernels[kFewRows];
  for (int64_t p = 0; p < panels.count; ++p) kernels[p] = pick_dot<S>(panels.at(p));
  for (int64_t j = 0; j < n; j += kRows) {
    const int64_t live = least(kRows, n - j);
    const char* w[kRows];
    for (int64_t r = 0; r < kRows; ++r) w[r] = rhs.from(j + least(r, live - 1), 0).data;
    for (int64_t r = 0; rest > 0 && r < live; ++r) {
      const char* from = w[r] + blocks * B * S::kSize;
      for (int64_t byte = 0; byte < rest * S::kSize; ++byte) tail[r][byte] = from[byte];
    }
    for (int64_t part = 0; part < parts.count || part == 0; ++part) {
      const bool last = part + 1 >= parts.count;
      const int64_t start = m > 2 ? parts.start(part) * B : 0,
                    size = m > 2 ? parts.at(part) : blocks;
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = panels.start(p), rows = panels.at(p), group = dot_group(rows);
        T sums[kRows * F::kDotRows + 4];
        for (int64_t r = 0; r < live; r += group) {
          const char* at[kRows];
          for (int64_t i = 0; i < group; ++i) at[i] = w[r + i] + start * S::kSize;
          int64_t ahead = distance;
          if (parts.count > 1) ahead = r + 1 < live ? rhs.row : size * B * S::kSize - r * rhs.row;
          kernels[p](size, ws.rows + first * padded + start, padded, at,
                     last && rest > 0 ? tails + r : nullptr, state + (r * m + first) * B, part == 0,
                     last ? sums + r * rows : nullptr, p == 0 ? ahead : 0,
                     near && parts.count == 1);
        }
        const Output<T> here = out.from(first, j);
        if (last) scatter<F>({here.data, here.column, here.row, here.add}, live, rows, sums, rows);
      }
    }
  }
}

// --- Choice of the form --------------------------------------------------------------------------

template <class F>
struct Source {
  using Form = void (*)(int64_t, int64_t, int64_t, int64_t, Pack<F>, const Matrix&, const Matrix&,
                        const Output<typename F::Scalar>&, const Workspace<F>&);
  int64_t size;
  Pack<F> pack;
  Form direct, dots;  // null where the source is only ever packed

  template <class S>
  static constexpr Source of() {
    if constexpr (S::kDirect) {
      return {S::kSize, pack_source<S>, direct_form<S>, dots_form<S>};
    } else {
      return {S::kSize, pack_source<S>, nullptr, nullptr};
    }
  }
};

template <class F, class... S>
bool find(ElementType type, Source<F>& source) {
  return ((S::kType == type && (source = Source<F>::template of<S>(), true)) || ...);
}

struct Side {
  ElementType type;
  const char* data;
  int64_t batch, row, k;  // strides in elements
};

// lhs is the side of m. The side with few rows, if there is one, becomes lhs, else the one that
// leaves acc contiguous along columns.
template <class F, class... S>
bool run(const ContractArgs& a, void* memory) {
  using T = typename F::Scalar;
  Side lhs = {a.lhs_type, static_cast<const char*>(a.lhs), a.lhs_b, a.lhs_m, a.lhs_k};
  Side rhs = {a.rhs_type, static_cast<const char*>(a.rhs), a.rhs_b, a.rhs_n, a.rhs_k};
  int64_t m = a.m, n = a.n, row = a.acc_m, column = a.acc_n;
  bool swap = row == 1 && column != 1;
  if (m <= kFewRows || n <= kFewRows) {
    swap = n < m && (m > kFewRows || n == 1 || (rhs.row != 1 && rhs.k != 1));
  } else if (n < m && n <= kDirectRows && lhs.row == 1 && rhs.row != 1) {
    swap = true;
  }
  if (swap) {
    const Side side = lhs;
    lhs = rhs;
    rhs = side;
    m = a.n, n = a.m, row = a.acc_n, column = a.acc_m;
  }
  Source<F> left, right;
  if (!find<F, S...>(lhs.type, left) || !find<F, S...>(rhs.type, right)) return false;

  const Workspace<F> ws(memory);
  const bool few = m <= kFewRows && right.direct != nullptr;
  const bool by_columns = right.direct != nullptr && m <= kDirectRows && rhs.row == 1 && n > 1;
  const bool by_dots = few && !by_columns && (rhs.k == 1 || a.k == 1);
  const int64_t step = by_dots ? kDotStep : kChain;
  for (int64_t b = 0; b < a.b; ++b) {
    const Matrix l = {lhs.data + b * lhs.batch * left.size, lhs.row * left.size, lhs.k * left.size};
    const Matrix r = {rhs.data + b * rhs.batch * right.size, rhs.row * right.size,
                      rhs.k * right.size};
    Output<T> out = {static_cast<char*>(a.acc) + b * a.acc_b * static_cast<int64_t>(sizeof(T)), row,
                     column, a.accumulate};
    for (int64_t i = 0; a.k == 0 && !a.accumulate && i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) __builtin_memset(out.from(i, j).data, 0, sizeof(T));
    }
    for (int64_t k = 0; k < a.k; k += step) {
      const int64_t depth = least(step, a.k - k), after = a.k - k - depth;
      if (by_dots) {
        right.dots(m, n, depth, after, left.pack, l.from(0, k), r.from(0, k), out, ws);
      } else if (by_columns) {
        right.direct(m, n, depth, after, left.pack, l.from(0, k), r.from(0, k), out, ws);
      } else {
        packed_form<F>(m, n, depth, left.pack, right.pack, l.from(0, k), r.from(0, k), out, ws,
                       rhs.k == 1);
      }
      out.add = true;
    }
  }
  return true;
}

template <class... F>
constexpr int64_t workspace_bytes() {
  int64_t most = 0;
  ((most = Workspace<F>::kBytes > most ? Workspace<F>::kBytes : most), ...);
  return most;
}

}  // namespace
}  // namespace jax_mpk::host
