// Running combinations along one axis: lanes across the axes behind it, or along the axis itself by doubling. Sums start
// from +0, which shows where all terms are -0; anything else starts with its first element.
#include <cstring>

#include "host/vm.h"

namespace jax_mpk::host {
namespace {

class Scan {
 public:
  Scan(Walk& walk, const Code& code, bool from_zero) : walk_(walk), code_(code), from_zero_(from_zero) {}

  // One step along the axis for n lanes.
  void step(bool first, int64_t n) {
    if (first && !from_zero_) {
      for (size_t k = 0; k < count(); ++k) std::memcpy(accumulator(k), result(k), bytes(k, n));
    } else {
      if (first) std::memset(accumulator(0), 0, bytes(0, n));
      walk_.run_phase(code_.combine(), n);
    }
    walk_.run_phase(code_.epilogue(), n);
  }

  // n consecutive positions of the axis: afterwards lane i holds the combination of lanes 0 … i, with what came
  // before this chunk in front.
  void chunk(bool first, int64_t n) {
    if (first && from_zero_) {
      std::memset(carry(0), 0, bytes(0, 1));
      first = false;
    }
    for (size_t k = 0; k < count(); ++k) std::memcpy(running(k), result(k), bytes(k, n));
    for (int64_t distance = 1; distance < n; distance *= 2) {
      const int64_t rest = n - distance;
      for (size_t k = 0; k < count(); ++k) {
        std::memcpy(accumulator(k), running(k), bytes(k, rest));
        std::memcpy(result(k), running(k) + bytes(k, distance), bytes(k, rest));
      }
      walk_.run_phase(code_.combine(), rest);
      for (size_t k = 0; k < count(); ++k) std::memcpy(running(k) + bytes(k, distance), accumulator(k), bytes(k, rest));
    }
    for (size_t k = 0; k < count(); ++k) {
      std::memcpy(first ? accumulator(k) : result(k), running(k), bytes(k, n));
      if (first) continue;
      for (int64_t i = 0; i < n; ++i) std::memcpy(accumulator(k) + bytes(k, i), carry(k), bytes(k, 1));
    }
    if (!first) walk_.run_phase(code_.combine(), n);
    for (size_t k = 0; k < count(); ++k) std::memcpy(carry(k), accumulator(k) + bytes(k, n - 1), bytes(k, 1));
    walk_.run_phase(code_.epilogue(), n);
  }

 private:
  size_t count() const { return code_.accumulators.size(); }
  size_t bytes(size_t k, int64_t n) const { return static_cast<size_t>(n * bytes_of(code_.accumulators[k].type)); }
  std::byte* accumulator(size_t k) { return walk_.lanes_of(code_.accumulators[k].at); }
  std::byte* result(size_t k) { return walk_.lanes_of(code_.results[k].at); }
  std::byte* running(size_t k) { return walk_.spare() + 16 * code_.max_lanes * static_cast<int64_t>(k); }
  std::byte* carry(size_t k) { return running(k) + 8 * code_.max_lanes; }

  Walk& walk_;
  const Code& code_;
  const bool from_zero_;
};

}  // namespace

void run_cumulative(const Context& context, int index) {
  const Member& member = context.routine.members[index];
  const Code& code = context.bodies.codes[member.body];
  std::vector<Operand> operands;
  for (const Tensor& tensor : member.operands) operands.push_back(context.resolve(tensor));
  for (const Tensor& tensor : member.outputs) operands.push_back(context.resolve(tensor));
  Walk walk(code, operands.data(), context.walk());
  Scan scan(walk, code, member.sums);
  if (member.lane_axis >= 0) {
    // Loops: axes before the scanned one, that one, lanes across those behind it.
    walk.setup(context.low(index), context.high(index), member.axis, member.axis + 1, true,
               member.reverse ? member.axis : -1);
    if (walk.empty()) return;
    const int from = walk.groups_before(member.axis);
    do {
      for (int64_t p0 = 0; p0 < walk.lanes();) {
        const int64_t n = walk.chunk(p0);
        bool first = true;
        do {
          walk.run(p0, n);
          scan.step(first, n);
          first = false;
        } while (walk.advance(from, walk.groups()));
        p0 += n;
      }
    } while (walk.advance(0, from));
    return;
  }
  // Loops: all other axes, lanes along the scanned one.
  const int last = member.rank - 1;
  walk.setup(context.low(index), context.high(index), last, last, true, member.reverse ? last : -1);
  if (walk.empty()) return;
  do {
    for (int64_t p0 = 0; p0 < walk.lanes();) {
      const int64_t n = walk.chunk(p0);
      walk.run(p0, n);
      scan.chunk(p0 == 0, n);
      p0 += n;
    }
  } while (walk.advance());
}

}  // namespace jax_mpk::host
