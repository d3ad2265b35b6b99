// What the algorithms of contract_kernels_impl.h are made of: blocking, packing, and the
// micro-kernel, once for all instruction sets. Everything is in an anonymous namespace and no
// inline library function is used: the linker must not find code for AVX-512 that it could use
// elsewhere.
//
// A family is an accumulator type with its vectors:
//   Scalar, Vec, kLanes
//   Own        the source of its own type, which packed operands are read as
//   kMaxRows   rows of a micro-kernel of two vectors of columns: 2 * kMaxRows + 3 registers or so
//   kDotRows   lhs rows of a dot-product kernel, at most 8: 2 * kDotRows + 3 registers or so
//   zero(), broadcast(const Scalar*), load(p), store(p, v), add(a, b), fma(a, b, c) = a * b + c
//   plus(Scalar, Scalar)
//   interleave(a, b)   a, b = their elements in turn: a0 b0 a1 b1 ...
//   sum4(v, out)       out[i] = sum of the lanes of v[i], in one order for every i
// A source is an element type read as a family:
//   Family, kType, kSize, get(p): one element
//   kDirect            has kernels of its own; others are only ever packed
//   load(p)            kLanes elements
//   kSplit, split(p, even, odd)   2 * kLanes elements, if that is cheaper than in order
// No pointer given to them needs alignment.
#pragma once

#include <cstdint>

#include "host/tasks/contract_kernels.h"

namespace jax_mpk::host {

// What a file offers, by accumulator type. `memory` holds workspace_bytes, aligned to 64.
struct ContractKernels {
  using Run = bool (*)(const ContractArgs& args, void* memory);
  Run f32, f64, s32;
  int64_t workspace_bytes;
};

namespace {

constexpr int64_t kChain = kContractChain;
constexpr int64_t kDotStep = 2048;   // k per pass of the dot-product form
constexpr int64_t kFewRows = 8;      // rows of lhs up to which a transposed rhs is not packed,
constexpr int64_t kDirectRows = 32;  // and one that is contiguous along n

// Sizes of blocks that stay in a cache, for an L1 cache of 32 KB and an L2 cache of 1 MB or more.
constexpr int64_t kPartialBytes = 16 * 1024;  // partial sums of a pass over k, in L1
constexpr int64_t kDotBytes = 20 * 1024;      // lhs in the dot-product form, in L1
constexpr int64_t kPackBytes = 512 * 1024;    // packed rhs, in L2

// How memory is read, measured with matrices that no cache holds (direct_form(), dots_form()).
constexpr int64_t kStreams = 16, kLongStreams = 8;  // rows of rhs read side by side
constexpr int64_t kLongRow = 8 * 1024;              // bytes of a row from which fewer are better,
                                                    // and prefetching by software is worse
constexpr int64_t kDistance = 2;                    // prefetched: so many kStreams rows on
constexpr int64_t kNearBytes = 2048;                // prefetched into L1: so far on
constexpr int64_t kFarBytes = 8192;                 // prefetched into L2: so far on

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// `total` in `count` parts of sizes that differ by at most one, larger ones first.
struct Split {
  int64_t count, size, larger;

  constexpr Split(int64_t total, int64_t limit)
      : count((total + limit - 1) / limit),
        size(count > 0 ? total / count : 0),
        larger(total - size * count) {}
  constexpr int64_t start(int64_t i) const { return i * size + least(i, larger); }
  constexpr int64_t at(int64_t i) const { return size + (i < larger); }
  constexpr int64_t most() const { return size + (larger > 0); }
};

// One operand of one batch element; strides in bytes.
struct Matrix {
  const char* data;
  int64_t row, k;

  Matrix from(int64_t r, int64_t depth) const { return {data + r * row + depth * k, row, k}; }
};

// acc of one batch element; strides in elements.
template <class T>
struct Output {
  char* data;
  int64_t row, column;
  bool add;

  Output from(int64_t i, int64_t j) const {
    return {data + (i * row + j * column) * static_cast<int64_t>(sizeof(T)), row, column, add};
  }
  T* pointer() const { return reinterpret_cast<T*>(data); }
};

template <class T>
T peek(const char* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(T));
  return value;
}

int32_t wrapping_add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

float bf16_to_f32(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// --- Parts of families and sources ---------------------------------------------------------------

template <class F>
void sum4_by_halves(const typename F::Vec* v, typename F::Scalar* out) {
  typename F::Scalar lanes[F::kLanes];
  for (int i = 0; i < 4; ++i) {
    F::store(lanes, v[i]);
    for (int half = F::kLanes / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lanes[j] = F::plus(lanes[j], lanes[j + half]);
    }
    out[i] = lanes[0];
  }
}

// Stored is what one element lies in memory as; the derived class has load() and, unless plain
// conversion does it, get().
template <class F, class Stored, ElementType type>
struct PackedOnly {
  using Family = F;
  static constexpr ElementType kType = type;
  static constexpr int64_t kSize = sizeof(Stored);
  static constexpr bool kDirect = false, kSplit = false;
  static typename F::Scalar get(const char* p) { return peek<Stored>(p); }
};

template <class F, class Stored, ElementType type>
struct Direct : PackedOnly<F, Stored, type> {
  static constexpr bool kDirect = true;
};

// A thread's working memory. Packing stores whole vectors, less than one past the last row.
template <class F>
struct Workspace {
  using T = typename F::Scalar;
  static constexpr int64_t kBlock = 2 * F::kLanes;  // columns of the smallest micro-kernel
  static constexpr int64_t kPackColumns = kPackBytes / (kChain * sizeof(T)) / kBlock * kBlock;
  static constexpr int64_t kMostRows = F::kMaxRows > kDirectRows ? F::kMaxRows : kDirectRows;
  static constexpr int64_t kRowsBytes = (kFewRows * kDotStep + F::kLanes) * sizeof(T);
  static constexpr int64_t kTileBytes = F::kMaxRows * kBlock * sizeof(T);
  static constexpr int64_t kBytes = kPackBytes + kPartialBytes + kTileBytes + kRowsBytes;
  static_assert(kMostRows * kChain <= kFewRows * kDotStep && kPackColumns >= kBlock);
  static_assert(kDirectRows * kBlock * sizeof(T) <= kPartialBytes);

  explicit Workspace(void* memory)
      : pack(static_cast<T*>(memory)),
        partial(pack + kPackBytes / sizeof(T)),
        tile(partial + kPartialBytes / sizeof(T)),
        rows(tile + kTileBytes / sizeof(T)) {}

  T* pack;     // rhs, [column blocks][kChain][kBlock]
  T* partial;  // unfinished chains, [rows][columns of a pass]
  T* tile;     // a block on its way to acc, [rows][kBlock]
  T* rows;     // lhs, panel by panel [k][rows of the panel]; [rows][k] in the dot-product form
};

// --- Packing: dst[k * width + r] = src[r, k], zero for `rows` <= r < width -----------------------

// kLanes x kLanes transposes, each log2(kLanes) rounds of interleaving. What a vector stores past
// `width`, the next k overwrites.
template <class S>
void pack_transposed(typename S::Family::Scalar* dst, int64_t width, const Matrix& src,
                     int64_t rows, int64_t depth) {
  using F = typename S::Family;
  constexpr int L = F::kLanes;
  const int64_t whole = depth / L * L;
  for (int64_t k = 0; k < whole; k += L) {
    for (int64_t r0 = 0; r0 < width; r0 += L) {
      typename F::Vec a[L], b[L];
      const char* p = src.from(r0, k).data;
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) a[i] = r0 + i < rows ? S::load(p + i * src.row) : F::zero();
#pragma GCC unroll 4
      for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; ++i) {
          b[2 * i] = a[i];
          b[2 * i + 1] = a[i + L / 2];
          F::interleave(b[2 * i], b[2 * i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) a[i] = b[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) F::store(dst + (k + i) * width + r0, a[i]);
    }
  }
  for (int64_t k = whole; k < depth; ++k) {
    for (int64_t r = 0; r < width; ++r)
      dst[k * width + r] = r < rows ? S::get(src.from(r, k).data) : 0;
  }
}

template <class S>
void pack_source(typename S::Family::Scalar* dst, int64_t width, const Matrix& src, int64_t rows,
                 int64_t depth) {
  using F = typename S::Family;
  constexpr int64_t L = F::kLanes;
  if (width == 1 && depth > 1) return pack_source<S>(dst, depth, {src.data, src.k, 0}, depth, 1);
  if (src.k == S::kSize && src.row != S::kSize && rows > 1 && (width <= L || width % L == 0)) {
    return pack_transposed<S>(dst, width, src, rows, depth);
  }
  const int64_t whole = src.row == S::kSize ? rows / L * L : 0;
  for (int64_t k = 0; k < depth; ++k, dst += width) {
    const char* p = src.data + k * src.k;
    int64_t r = 0;
    for (; r < whole; r += L) F::store(dst + r, S::load(p + r * S::kSize));
    for (; r < rows; ++r) dst[r] = S::get(p + r * src.row);
    for (; r < width; ++r) dst[r] = 0;
  }
}

template <class F>
using Pack = void (*)(typename F::Scalar*, int64_t, const Matrix&, int64_t, int64_t);

// --- The micro-kernel: M rows by P blocks of two vectors, all sums in registers ------------------

// 2 * kLanes elements in the order that the source likes best.
template <class S, class Vec>
void load2(const char* p, Vec& lo, Vec& hi) {
  if constexpr (S::kSplit) {
    S::split(p, lo, hi);
  } else {
    lo = S::load(p);
    hi = S::load(p + S::Family::kLanes * S::kSize);
  }
}

// Where to prefetch: a tile's next rows in the order of memory, `chunks` steps to a row and then
// `skip` bytes.
struct Ahead {
  const char* next;
  int64_t left, chunks, skip;

  Ahead(const char* first, int64_t bytes, int64_t chunk, int64_t pitch)
      : next(first), left((bytes + chunk - 1) / chunk), chunks(left), skip(pitch - left * chunk) {}

  template <int locality>
  void step(int64_t chunk) {
    for (int64_t i = 0; i < chunk; i += 64) __builtin_prefetch(next + i, 0, locality);
    next += chunk;
    if (--left == 0) {
      next += skip;
      left = chunks;
    }
  }
};

enum class End { kKeep, kSet, kAdd };

// Sums x[k][i] * w[k][j] over k < depth, on top of `from` or, where that is null, of zero. kKeep
// writes the sums to `to` as load2 orders them, kSet in order, kAdd adds them there in order.
template <class S, int M, int P>
void micro(int64_t depth, const typename S::Family::Scalar* x, const char* w, int64_t pitch,
           const typename S::Family::Scalar* from, int64_t from_row, typename S::Family::Scalar* to,
           int64_t to_row, End end, Ahead* ahead) {
  using F = typename S::Family;
  using Vec = typename F::Vec;
  constexpr int L = F::kLanes;
  Vec c[M][2 * P];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < 2 * P; ++j)
      c[i][j] = from ? F::load(from + i * from_row + j * L) : F::zero();
  }
  Ahead local = ahead ? *ahead : Ahead(nullptr, 1, 1, 0);
  for (int64_t k = 0; k < depth; ++k) {
    if (ahead) local.template step<2>(P * 2 * L * S::kSize);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      Vec lo, hi;
      load2<S>(w + p * 2 * L * S::kSize, lo, hi);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const Vec xi = F::broadcast(x + i);
        c[i][2 * p] = F::fma(xi, lo, c[i][2 * p]);
        c[i][2 * p + 1] = F::fma(xi, hi, c[i][2 * p + 1]);
      }
    }
    x += M;
    w += pitch;
  }
  if (ahead) *ahead = local;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      Vec lo = c[i][2 * p], hi = c[i][2 * p + 1];
      typename F::Scalar* out = to + i * to_row + p * 2 * L;
      if (S::kSplit && end != End::kKeep) F::interleave(lo, hi);
      if (end == End::kAdd) {
        lo = F::add(F::load(out), lo);
        hi = F::add(F::load(out + L), hi);
      }
      F::store(out, lo);
      F::store(out + L, hi);
    }
  }
}

template <class S, class T = typename S::Family::Scalar>
using Micro = void (*)(int64_t, const T*, const char*, int64_t, const T*, int64_t, T*, int64_t, End,
                       Ahead*);

// Blocks side by side: independent sums that hide the latency of multiply-adds, within the
// registers. More than a few cache lines of a row at a time make the reading of memory less regular
// (a tenth slower).
template <class F>
constexpr int max_blocks(int64_t rows) {
  return static_cast<int>(least(least(F::kMaxRows / rows, 32 / F::kLanes), 4));
}

template <class S, int M, int P = 1>
Micro<S> pick_blocks(int64_t blocks) {
  if constexpr (P < max_blocks<typename S::Family>(M)) {
    if (blocks != P) return pick_blocks<S, M, P + 1>(blocks);
  }
  return micro<S, M, P>;
}

template <class S, int M = 1>
Micro<S> pick(int64_t rows, int64_t blocks) {
  using F = typename S::Family;
  if constexpr (M < F::kMaxRows) {
    if (rows != M) return pick<S, M + 1>(rows, blocks);
  }
  return pick_blocks<S, M>(blocks);
}

template <class F>
void scatter(const Output<typename F::Scalar>& out, int64_t rows, int64_t columns,
             const typename F::Scalar* tile, int64_t pitch) {
  using T = typename F::Scalar;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      char* p = out.from(i, j).data;
      const T value = out.add ? F::plus(peek<T>(p), tile[i * pitch + j]) : tile[i * pitch + j];
      __builtin_memcpy(p, &value, sizeof(T));
    }
  }
}

// One packed block, `columns` columns of it real, into any acc.
template <class F>
void block(const Output<typename F::Scalar>& out, int64_t rows, int64_t columns, int64_t depth,
           const typename F::Scalar* x, const typename F::Scalar* w, typename F::Scalar* tile) {
  using T = typename F::Scalar;
  constexpr int64_t B = Workspace<F>::kBlock;
  const Micro<typename F::Own> kernel = pick<typename F::Own>(rows, 1);
  const char* bytes = reinterpret_cast<const char*>(w);
  const int64_t pitch = B * sizeof(T);
  if (columns == B && out.column == 1) {
    kernel(depth, x, bytes, pitch, nullptr, 0, out.pointer(), out.row,
           out.add ? End::kAdd : End::kSet, nullptr);
  } else {
    kernel(depth, x, bytes, pitch, nullptr, 0, tile, B, End::kSet, nullptr);
    scatter<F>(out, rows, columns, tile, B);
  }
}

}  // namespace
}  // namespace jax_mpk::host
