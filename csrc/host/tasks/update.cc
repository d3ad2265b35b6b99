// dynamic_update_slice and scatter. A task owns a box of the output: it copies that box of the base (unless both are
// one storage) and applies, in row-major order of the update space, every update that falls into it.
//
// Target axes that are a coordinate plus something fixed for the whole task cut the update space down to what can
// fall into the box. What is left is walked row by row; rows that go to evenly spaced elements are written as lanes,
// anything else element by element.
#include <algorithm>
#include <cstring>

#include "host/vm.h"
#include "host/vm_memory.h"

namespace jax_mpk::host {
namespace {

// Copies a box between two arrays of one type, rows of the last axis at a time.
void copy_box(int rank, const int64_t* low, const int64_t* high, int bytes, const Operand& from,
              const int64_t* from_stride, const Operand& to, const int64_t* to_stride) {
  int64_t source = 0, target = 0, row = 1;
  for (int d = 0; d < rank; ++d) {
    if (high[d] <= low[d]) return;
    source += low[d] * from_stride[d], target += low[d] * to_stride[d];
  }
  // Axes from `outer` on are contiguous in both.
  int outer = rank;
  while (outer > 0 && from_stride[outer - 1] == row && to_stride[outer - 1] == row) {
    --outer;
    row *= high[outer] - low[outer];
  }
  int64_t index[kMaxAxes] = {};
  while (true) {
    std::memcpy(to.base + target * bytes, from.base + source * bytes, static_cast<size_t>(row * bytes));
    int d = outer - 1;
    for (; d >= 0; --d) {
      source += from_stride[d], target += to_stride[d];
      if (++index[d] < high[d] - low[d]) break;
      source -= from_stride[d] * index[d], target -= to_stride[d] * index[d];
      index[d] = 0;
    }
    if (d < 0) return;
  }
}

class Updates {
 public:
  Updates(const Context& context, int index)
      : context_(context),
        member_(context.routine.members[index]),
        code_(context.bodies.codes[member_.body]),
        low_(context.low(index)),
        high_(context.high(index)),
        type_(member_.outputs[0].type) {
    for (const Tensor& tensor : member_.operands) operands_.push_back(context.resolve(tensor));
    operands_.push_back(context.resolve(member_.outputs[0]));
    context.strides(member_.outputs[0], stride_);
  }

  void run() {
    for (size_t d = 0; d < member_.target.size(); ++d) {
      if (high_[d] <= low_[d]) return;
    }
    const Tensor &base = member_.operands.back(), &output = member_.outputs[0];
    if (base.local != output.local || base.id != output.id) {
      int64_t base_stride[kMaxAxes];
      context_.strides(base, base_stride);
      copy_box(output.rank, low_, high_, bytes_of(type_), operands_[member_.operands.size() - 1], base_stride,
               operands_.back(), stride_);
    }
    Walk walk(code_, operands_.data(), context_.walk());
    int64_t from[kMaxAxes], to[kMaxAxes];
    if (!restrict(walk, from, to)) return;
    walk.setup(from, to);
    if (walk.empty()) return;
    do {
      for (int64_t p0 = 0; p0 < walk.lanes();) {
        const int64_t n = walk.chunk(p0);
        walk.run(p0, n);
        apply(walk, p0, n);
        p0 += n;
      }
    } while (walk.advance());
  }

 private:
  const int64_t* lanes64(Walk& walk, int at) const { return reinterpret_cast<const int64_t*>(walk.lanes_of(at)); }

  // The part of the update space whose structured target axes fall into the box; false: none.
  bool restrict(Walk& walk, int64_t* from, int64_t* to) {
    for (int d = 0; d < member_.rank; ++d) {
      from[d] = 0, to[d] = member_.extents[d];
      if (to[d] == 0) return false;
    }
    uniform_ = 0;
    bool needs_uniform = false;
    for (size_t d = 0; d < member_.target.size(); ++d) {
      const TargetIndex& target = member_.target[d];
      needs_uniform |= target.uniform_register >= 0;
      if (target.uniform_register < 0 && !confine(d, target.constant, from, to)) return false;
    }
    // What the plan knows to fall outside the box has no operands to compute the rest from.
    if (!needs_uniform) return true;
    walk.setup_uniform();
    walk.run_uniform();
    for (size_t d = 0; d < member_.target.size(); ++d) {
      const TargetIndex& target = member_.target[d];
      if (target.uniform_register < 0) continue;
      // Far outside is outside: the limits keep differences from overflowing.
      constexpr int64_t limit = int64_t{1} << 60;
      const int64_t shift = std::clamp(lanes64(walk, target.uniform_register)[0], -limit, limit);
      uniform_ += shift * stride_[d];
      if (!confine(d, target.constant + shift, from, to)) return false;
    }
    return true;
  }

  // The part of [from, to) whose target axis d, a coordinate plus `offset`, falls into the box; false: none.
  bool confine(size_t d, int64_t offset, int64_t* from, int64_t* to) const {
    const TargetIndex& target = member_.target[d];
    if (target.general_register >= 0) return true;
    if (target.axis < 0) return offset >= low_[d] && offset < high_[d];
    from[target.axis] = std::max(from[target.axis], low_[d] - offset);
    to[target.axis] = std::min(to[target.axis], high_[d] - offset);
    return from[target.axis] < to[target.axis];
  }

  void apply(Walk& walk, int64_t p0, int64_t n) {
    const uint8_t* bounds = nullptr;
    if (member_.bounds_register >= 0) {
      bounds = reinterpret_cast<const uint8_t*>(walk.lanes_of(member_.bounds_register));
      if (!walk.varies(member_.bounds_level)) {
        if (bounds[0] == 0) return;
        bounds = nullptr;
      }
    }
    int64_t offset, stride;
    int64_t* each = nullptr;
    const bool straight = walk.offsets(member_.target_access, p0, n, offset, stride, each);
    bool same = bounds == nullptr && straight;
    int64_t shift = uniform_;
    for (size_t d = 0; d < member_.target.size(); ++d) {
      const TargetIndex& target = member_.target[d];
      if (target.general_register < 0) continue;
      if (walk.varies(target.general_level)) {
        same = false;
      } else {
        const int64_t at = lanes64(walk, target.general_register)[0];
        if (at < low_[d] || at >= high_[d]) return;
        shift += at * stride_[d];
      }
    }
    if (same && (stride != 0 || n == 1)) return apply_row(walk, offset + shift, stride, n);
    apply_each(walk, straight, offset, stride, each, shift, bounds, n);
  }

  // Lane i goes to offset + i * stride; no two lanes meet.
  void apply_row(Walk& walk, int64_t offset, int64_t stride, int64_t n) {
    const int bytes = bytes_of(type_);
    std::byte* target = operands_.back().base;
    const std::byte* value = walk.lanes_of(code_.results[0].at);
    if (member_.combines) {
      gather_strided(bytes, walk.spare(), target, offset, stride, n);
      read_old(walk, walk.spare(), n);
      walk.run_phase(code_.combine(), n);
      value = new_value(walk, n);
    }
    if (stride == 1) {
      std::memcpy(target + offset * bytes, value, static_cast<size_t>(n * bytes));
    } else {
      scatter_strided(bytes, target, offset, stride, value, n);
    }
  }

  void apply_each(Walk& walk, bool straight, int64_t offset, int64_t stride, const int64_t* each, int64_t shift,
                  const uint8_t* bounds, int64_t n) {
    const int bytes = bytes_of(type_);
    std::byte* target = operands_.back().base;
    const std::byte* value = walk.lanes_of(code_.results[0].at);
    const int value_bytes = bytes_of(code_.results[0].type);
    std::byte* values = walk.spare();  // kept aside: combining uses the register of lane 0
    if (member_.combines) {
      std::memcpy(values, value, static_cast<size_t>(n * value_bytes));
    }
    for (int64_t i = 0; i < n; ++i) {
      if (bounds != nullptr && bounds[i] == 0) continue;
      int64_t at = (straight ? offset + stride * i : each[i]) + shift;
      bool inside = true;
      for (size_t d = 0; d < member_.target.size(); ++d) {
        const TargetIndex& index = member_.target[d];
        if (index.general_register < 0 || !walk.varies(index.general_level)) continue;
        const int64_t position = lanes64(walk, index.general_register)[i];
        inside &= position >= low_[d] && position < high_[d];
        at += position * stride_[d];
      }
      if (!inside) continue;
      std::byte* element = target + at * bytes;
      if (!member_.combines) {
        std::memcpy(element, value + i * bytes, static_cast<size_t>(bytes));
        continue;
      }
      std::byte old[kBlock * 8];
      std::memcpy(old, element, static_cast<size_t>(bytes));
      std::memcpy(walk.lanes_of(code_.results[0].at), values + i * value_bytes, static_cast<size_t>(value_bytes));
      read_old(walk, old, 1);
      walk.run_phase(code_.combine(), 1);
      std::memcpy(element, new_value(walk, 1), static_cast<size_t>(bytes));
    }
  }

  // Stored elements to the accumulator's type and back.
  void read_old(Walk& walk, const std::byte* old, int64_t n) {
    const Register acc = code_.accumulators[0];
    if (acc.type == type_) {
      std::memcpy(walk.lanes_of(acc.at), old, static_cast<size_t>(n * bytes_of(type_)));
    } else {
      kernels().convert[static_cast<int>(type_)][static_cast<int>(acc.type)](walk.lanes_of(acc.at), old, nullptr,
                                                                              nullptr, n, 0);
    }
  }
  const std::byte* new_value(Walk& walk, int64_t n) {
    const Register acc = code_.accumulators[0];
    if (acc.type == type_) return walk.lanes_of(acc.at);
    std::byte* out = walk.spare() + 8 * code_.max_lanes;
    kernels().convert[static_cast<int>(acc.type)][static_cast<int>(type_)](out, walk.lanes_of(acc.at), nullptr, nullptr,
                                                                            n, 0);
    return out;
  }

  const Context& context_;
  const Member& member_;
  const Code& code_;
  const int64_t *low_, *high_;
  const Type type_;
  std::vector<Operand> operands_;
  int64_t stride_[kMaxAxes];
  int64_t uniform_ = 0;  // offset of the task-wide parts of the target
};

}  // namespace

void run_update(const Context& context, int index) { Updates(context, index).run(); }

}  // namespace jax_mpk::host
