// Contractions: axes are sorted into batch, m, n and k by which factor steps along them, neighbours that step jointly
// are merged, and what is left is a loop around calls of the matrix kernels (or of a generic one for rare types).
//
// A long chain of additions loses accuracy, as terms meet an ever larger sum. The kernels add short chains to the
// accumulators one after the other; where there are many of those, they go to a tile of their own, which is added to
// the accumulators and starts anew every kLongSum terms.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "host/tasks/contract_kernels.h"
#include "host/vm.h"
#include "host/vm_memory.h"

namespace jax_mpk::host {
namespace {

// An axis, or several that all three operands step through jointly.
struct Axis {
  int64_t extent = 1, lhs = 0, rhs = 0, acc = 0;
};

struct Axes {
  Axis axis[kMaxAxes];
  int count = 0;

  void add(const Axis& inner) {
    if (inner.extent == 1) return;
    if (count > 0) {
      Axis& outer = axis[count - 1];
      if (outer.lhs == inner.lhs * inner.extent && outer.rhs == inner.rhs * inner.extent &&
          outer.acc == inner.acc * inner.extent) {
        outer = {outer.extent * inner.extent, inner.lhs, inner.rhs, inner.acc};
        return;
      }
    }
    axis[count++] = inner;
  }

  // Takes out the longest axis.
  Axis take_longest() {
    if (count == 0) return {};
    int best = 0;
    for (int i = 1; i < count; ++i) best = axis[i].extent > axis[best].extent ? i : best;
    const Axis taken = axis[best];
    for (int i = best; i + 1 < count; ++i) axis[i] = axis[i + 1];
    --count;
    return taken;
  }
};

// Types and pointers of one contraction.
struct Operands {
  Type lhs_type, rhs_type, acc_type;
  const std::byte *lhs, *rhs;
  std::byte* acc;
};

bool fast_type(Type type, ElementType& out) {
  switch (type) {
    case Type::k_f32: out = ElementType::kF32; return true;
    case Type::k_bf16: out = ElementType::kBF16; return true;
    case Type::k_f16: out = ElementType::kF16; return true;
    case Type::k_f64: out = ElementType::kF64; return true;
    case Type::k_s32: out = ElementType::kS32; return true;
    case Type::k_s8: out = ElementType::kS8; return true;
    case Type::k_u8: out = ElementType::kU8; return true;
    default: return false;
  }
}

// Terms of one sum up to which all of them go to the accumulators directly.
constexpr int64_t kLongSum = 16 * 1024;

// Whether a reduced space of that many positions needs a tile of its own; sums of integers are exact.
bool long_sum(Type type, int64_t terms) {
  return terms > kLongSum && (type == Type::k_f32 || type == Type::k_f64);
}

// The generic kernel: rows of both factors, converted to the accumulator's type.
constexpr int64_t kPanelRows = 8, kPanelDepth = 512, kPanelBytes = kPanelDepth * 8 * (kPanelRows + 2) + 64;

void read_row(const std::byte* from, Type type, int64_t offset, int64_t stride, int64_t n, Type as, std::byte* staging,
              std::byte* out) {
  const int bytes = bytes_of(type);
  std::byte* raw = type == as ? out : staging;
  gather_strided(bytes, raw, from, offset, stride, n);
  if (type != as) kernels().convert[static_cast<int>(type)][static_cast<int>(as)](out, raw, nullptr, nullptr, n, 0);
}

template <class T>
T dot(const T* a, const T* b, int64_t n, bool logical) {
  if (logical) {
    bool any = false;
    for (int64_t i = 0; i < n; ++i) any |= a[i] != 0 && b[i] != 0;
    return any;
  }
  // Fixed partial sums; products of narrow integers wrap, so they are taken as 64-bit unsigned ones.
  constexpr int64_t kParts = 16;
  T parts[kParts] = {};
  for (int64_t i = 0; i < n; i += kParts) {
    const int64_t count = std::min(kParts, n - i);
    for (int64_t j = 0; j < count; ++j) {
      if constexpr (std::is_floating_point_v<T>) {
        parts[j] += a[i + j] * b[i + j];
      } else {
        parts[j] = static_cast<T>(static_cast<uint64_t>(parts[j]) +
                                  static_cast<uint64_t>(a[i + j]) * static_cast<uint64_t>(b[i + j]));
      }
    }
  }
  for (int64_t half = kParts / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) parts[j] = static_cast<T>(parts[j] + parts[half + j]);
  }
  return parts[0];
}

template <class T>
void generic_tile(const Operands& o, const Axis& b, const Axis& m, const Axis& n, const Axis& k, bool accumulate,
                  std::byte* work) {
  std::byte* staging = work;
  T* rows = reinterpret_cast<T*>(work + kPanelDepth * 8);
  T* column = rows + kPanelRows * kPanelDepth;
  const bool logical = o.acc_type == Type::k_b1;
  for (int64_t ib = 0; ib < b.extent; ++ib) {
    for (int64_t m0 = 0; m0 < m.extent; m0 += kPanelRows) {
      const int64_t m1 = std::min(m.extent, m0 + kPanelRows);
      for (int64_t k0 = 0; k0 < k.extent; k0 += kPanelDepth) {
        const int64_t depth = std::min(kPanelDepth, k.extent - k0);
        for (int64_t im = m0; im < m1; ++im) {
          read_row(o.lhs, o.lhs_type, ib * b.lhs + im * m.lhs + k0 * k.lhs, k.lhs, depth, o.acc_type, staging,
                   reinterpret_cast<std::byte*>(rows + (im - m0) * kPanelDepth));
        }
        for (int64_t in = 0; in < n.extent; ++in) {
          read_row(o.rhs, o.rhs_type, ib * b.rhs + in * n.rhs + k0 * k.rhs, k.rhs, depth, o.acc_type, staging,
                   reinterpret_cast<std::byte*>(column));
          for (int64_t im = m0; im < m1; ++im) {
            T& acc = reinterpret_cast<T*>(o.acc)[ib * b.acc + im * m.acc + in * n.acc];
            const T sum = dot(rows + (im - m0) * kPanelDepth, column, depth, logical);
            if (!accumulate && k0 == 0) {
              acc = sum;
            } else if (logical) {
              acc = acc != 0 || sum != 0;
            } else if constexpr (std::is_floating_point_v<T>) {
              acc += sum;
            } else {
              acc = static_cast<T>(static_cast<uint64_t>(acc) + static_cast<uint64_t>(sum));
            }
          }
        }
      }
    }
  }
}

void tile(const Operands& o, const Axis& b, const Axis& m, const Axis& n, const Axis& k, bool accumulate,
          std::byte* work) {
  ContractArgs args;
  if (fast_type(o.lhs_type, args.lhs_type) && fast_type(o.rhs_type, args.rhs_type) &&
      fast_type(o.acc_type, args.acc_type)) {
    args.lhs = o.lhs, args.rhs = o.rhs, args.acc = o.acc;
    args.b = b.extent, args.m = m.extent, args.n = n.extent, args.k = k.extent;
    args.lhs_b = b.lhs, args.lhs_m = m.lhs, args.lhs_k = k.lhs;
    args.rhs_b = b.rhs, args.rhs_n = n.rhs, args.rhs_k = k.rhs;
    args.acc_b = b.acc, args.acc_m = m.acc, args.acc_n = n.acc;
    args.accumulate = accumulate;
    if (contract_tile(args)) return;
  }
  auto run = [&]<class T>(T) { generic_tile<T>(o, b, m, n, k, accumulate, work); };
  switch (o.acc_type) {
    case Type::k_b1:
    case Type::k_u8: return run(uint8_t());
    case Type::k_s8: return run(int8_t());
    case Type::k_u16: return run(uint16_t());
    case Type::k_s16: return run(int16_t());
    case Type::k_u32: return run(uint32_t());
    case Type::k_s32: return run(int32_t());
    case Type::k_u64: return run(uint64_t());
    case Type::k_s64: return run(int64_t());
    case Type::k_f64: return run(double());
    default: return run(float());
  }
}

// Adds a tile whose elements lie one after the other to the accumulators, or stores it there.
void flush(const Operands& o, const Axis& b, const Axis& m, const Axis& n, bool accumulate, const std::byte* sums) {
  auto run = [&]<class T>(T) {
    const T* from = reinterpret_cast<const T*>(sums);
    for (int64_t ib = 0; ib < b.extent; ++ib) {
      for (int64_t im = 0; im < m.extent; ++im) {
        T* to = reinterpret_cast<T*>(o.acc) + ib * b.acc + im * m.acc;
        for (int64_t in = 0; in < n.extent; ++in, ++from) to[in * n.acc] = accumulate ? to[in * n.acc] + *from : *from;
      }
    }
  };
  if (o.acc_type == Type::k_f64) return run(double());
  run(float());
}

// Steps through the given axes, last one fastest.
template <class F>
void for_each(const Axes& axes, int at, Operands o, const F& f) {
  if (at == axes.count) return f(o);
  const Axis& axis = axes.axis[at];
  for (int64_t i = 0; i < axis.extent; ++i) {
    for_each(axes, at + 1, o, f);
    o.lhs += axis.lhs * bytes_of(o.lhs_type);
    o.rhs += axis.rhs * bytes_of(o.rhs_type);
    o.acc += axis.acc * bytes_of(o.acc_type);
  }
}

// One factor as elements of one operand.
struct Source {
  Type type;
  Operand where;
  int64_t constant;
  const int64_t* strides;

  const std::byte* start(int rank, const int64_t* low, const int64_t* high) const {
    int64_t offset = constant, first = constant, last = constant;
    for (int d = 0; d < rank; ++d) {
      const int64_t a = strides[d] * low[d], b = strides[d] * (high[d] - 1);
      offset += a;
      first += std::min(a, b);
      last += std::max(a, b);
    }
    if (first < where.low || last >= where.high) {
      throw std::runtime_error("a contraction reads elements " + std::to_string(first) + " to " + std::to_string(last) +
                               " of an operand that holds " + std::to_string(where.low) + " to " +
                               std::to_string(where.high - 1));
    }
    return where.base + offset * bytes_of(type);
  }
};

// A factor and what lies over it: for coordinates [from, to) of its axis, `fresh` replaces `base`.
struct Windowed {
  Source base, fresh;
  int axis;
  int64_t from, to;
};

class Contraction {
 public:
  Contraction(const Context& context, const Member& member) : context_(context), member_(member) {
    int64_t results[4] = {};
    if (member.body >= 0) {
      // Where the windows start: a code without loops.
      const Code& code = context.bodies.codes[member.body];
      std::vector<Operand> operands;
      for (const Tensor& tensor : member.operands) operands.push_back(context.resolve(tensor));
      Walk walk(code, operands.data(), context.walk());
      walk.setup(nullptr, nullptr);
      walk.run(0, 1);
      for (size_t i = 0; i < code.results.size() && i < 4; ++i) {
        std::memcpy(&results[i], walk.lanes_of(code.results[i].at), sizeof(int64_t));
      }
    }
    lhs_ = windowed(member.lhs, results);
    rhs_ = windowed(member.rhs, results);
  }

  void run(const int64_t* low, const int64_t* high) {
    piece_low_ = low;
    int64_t stride = 1;
    for (int d = member_.space_rank - 1; d >= 0; --d) acc_stride_[d] = stride, stride *= high[d] - low[d];
    cut(lhs_, low, high, [&](const Source& lhs, const int64_t* lhs_low, const int64_t* lhs_high) {
      cut(rhs_, lhs_low, lhs_high, [&](const Source& rhs, const int64_t* from, const int64_t* to) {
        contract(lhs, rhs, from, to);
      });
    });
  }

 private:
  Windowed windowed(const Factor& factor, const int64_t* results) const {
    auto source = [&](int32_t slot, int64_t constant, const int64_t* strides) {
      const Tensor& tensor = member_.operands[slot];
      return Source{tensor.type, context_.resolve(tensor), constant, strides};
    };
    Windowed out{source(factor.slot, factor.constant, factor.strides), {}, factor.axis, 0, 0};
    if (factor.axis < 0) return out;
    // Limits keep sums from overflowing; a start that far out overlaps nothing.
    constexpr int64_t limit = int64_t{1} << 60;
    out.from = std::clamp(results[factor.start_result], -limit, limit) - factor.shift;
    out.to = out.from + factor.length;
    const int64_t extra = factor.fresh_result < 0 ? 0 : std::clamp(results[factor.fresh_result], -limit, limit);
    out.fresh = source(factor.fresh_slot, factor.fresh_constant + extra, factor.fresh_strides);
    return out;
  }

  // Calls f for the parts of a box before, in and after a factor's window.
  template <class F>
  void cut(const Windowed& factor, const int64_t* low, const int64_t* high, const F& f) const {
    if (factor.axis < 0) return f(factor.base, low, high);
    int64_t from[kMaxAxes], to[kMaxAxes];
    std::copy(low, low + member_.rank, from);
    std::copy(high, high + member_.rank, to);
    const int axis = factor.axis;
    const int64_t start = std::clamp(factor.from, low[axis], high[axis]), end = std::clamp(factor.to, start, high[axis]);
    auto part = [&](const Source& source, int64_t a, int64_t b) {
      from[axis] = a, to[axis] = b;
      if (a < b) f(source, from, to);
    };
    part(factor.base, low[axis], start);
    part(factor.fresh, start, end);
    part(factor.base, end, high[axis]);
  }

  void contract(const Source& lhs, const Source& rhs, const int64_t* low, const int64_t* high) {
    Operands o{lhs.type, rhs.type, member_.accumulators[0], nullptr, nullptr, context_.tile()};
    o.lhs = lhs.start(member_.rank, low, high);
    o.rhs = rhs.start(member_.rank, low, high);
    Axes batch, ms, ns, ks, outer;
    int64_t offset = 0;
    // Parts of the reduced space come one after the other and accumulate; parts along parallel axes do not.
    bool first = true;
    for (int d = 0; d < member_.rank; ++d) {
      const bool reduced = d >= member_.space_rank;
      if (!reduced) offset += (low[d] - piece_low_[d]) * acc_stride_[d];
      else first &= low[d] == piece_low_[d];
      const Axis axis{high[d] - low[d], lhs.strides[d], rhs.strides[d], reduced ? 0 : acc_stride_[d]};
      (reduced ? ks : axis.lhs != 0 && axis.rhs != 0 ? batch : axis.lhs != 0 ? ms : axis.rhs != 0 ? ns : outer).add(axis);
    }
    o.acc += offset * bytes_of(o.acc_type);
    const Axis b = batch.take_longest(), m = ms.take_longest(), n = ns.take_longest(), k = ks.take_longest();
    for (const Axes* rest : {&batch, &ms, &ns}) {
      for (int i = 0; i < rest->count; ++i) outer.axis[outer.count++] = rest->axis[i];
    }
    int64_t terms = k.extent;
    for (int i = 0; i < ks.count; ++i) terms *= ks.axis[i].extent;
    if (long_sum(o.acc_type, terms)) {
      return for_each(outer, 0, o, [&](const Operands& at) { contract_long(at, b, m, n, ks, k, !first); });
    }
    for_each(outer, 0, o, [&](const Operands& at) {
      bool accumulate = !first;
      for_each(ks, 0, at, [&](const Operands& part) {
        tile(part, b, m, n, k, accumulate, context_.walk());
        accumulate = true;
      });
    });
  }

  // Sums of many terms, by way of a tile of kLongSum of them at a time.
  void contract_long(const Operands& o, Axis b, Axis m, Axis n, const Axes& ks, const Axis& k, bool accumulate) {
    std::byte* sums = context_.walk() + kPanelBytes;
    const Axis acc_b = b, acc_m = m, acc_n = n;
    n.acc = 1, m.acc = n.extent, b.acc = m.extent * n.extent;
    int64_t terms = 0;
    const auto close = [&] {
      if (terms > 0) flush(o, acc_b, acc_m, acc_n, accumulate, sums);
      accumulate |= terms > 0;
      terms = 0;
    };
    for_each(ks, 0, o, [&](Operands part) {
      part.acc = sums;
      for (int64_t done = 0; done < k.extent;) {
        Axis some = k;
        some.extent = std::min(k.extent - done, kLongSum);
        if (terms + some.extent > kLongSum) close();
        tile(part, b, m, n, some, terms > 0, context_.walk());
        terms += some.extent;
        done += some.extent;
        part.lhs += some.extent * k.lhs * bytes_of(part.lhs_type);
        part.rhs += some.extent * k.rhs * bytes_of(part.rhs_type);
      }
    });
    close();
  }

  const Context& context_;
  const Member& member_;
  Windowed lhs_, rhs_;
  const int64_t* piece_low_ = nullptr;
  int64_t acc_stride_[kMaxAxes];
};

}  // namespace

int64_t contract_scratch_bytes(const Member& member, int64_t tile_bytes) {
  int64_t terms = 1;
  for (int d = member.space_rank; d < member.rank; ++d) terms *= member.extents[d];
  return kPanelBytes + (long_sum(member.accumulators[0], terms) ? tile_bytes : 0);
}

void run_contract(const Context& context, int index) {
  const Member& member = context.routine.members[index];
  if (empty(member.space_rank, context.low(index), context.high(index))) return;
  Contraction contraction(context, member);
  run_in_pieces(context, index, [&](const int64_t* from, const int64_t* to) { contraction.run(from, to); });
}

}  // namespace jax_mpk::host
