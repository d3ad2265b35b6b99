// Running combinations along one axis: lanes across the axes behind it, or along the axis itself by doubling. Sums start
// from +0, which shows where all terms are -0; anything else starts with its first element.
//
// A long chain of additions loses accuracy, as terms meet an ever larger sum. So the axis is cut into runs, each of
// which starts anew, and what precedes a run is made of the totals of earlier ones: in a tree where lanes run along the
// axis, over two levels of kRun where they run across. The first run shows nothing of this.
#include <bit>
#include <cstring>

#include "host/vm.h"

namespace jax_mpk::host {
namespace {

constexpr int64_t kRun = 128;  // a power of two

class Scan {
 public:
  Scan(Walk& walk, const Code& code, bool from_zero) : walk_(walk), code_(code), from_zero_(from_zero) {}

  // One step along the axis for n lanes; `position`: steps before this one.
  void step(int64_t position, int64_t n) {
    const bool later = position >= kRun;
    if (position % kRun == 0 && (later || !from_zero_)) {
      for (size_t k = 0; k < count(); ++k) std::memcpy(accumulator(k), result(k), bytes(k, n));
    } else {
      if (position == 0) std::memset(accumulator(0), 0, bytes(0, n));
      walk_.run_phase(code_.combine(), n);
    }
    if (later) {  // the outputs need all that came before; the next step, this run alone
      keep(kRunSoFar, n);
      join_behind(kBefore, n);
    }
    walk_.run_phase(code_.epilogue(), n);
    if (later) {
      for (size_t k = 0; k < count(); ++k) std::memcpy(accumulator(k), spare(k, kRunSoFar), bytes(k, n));
    }
    if ((position + 1) % kRun == 0) close_run((position + 1) / kRun, n);
  }

  // n consecutive positions of the axis, the chunk of that number: afterwards lane i holds the combination of lanes
  // 0 … i, with what came before this chunk in front.
  void chunk(int64_t number, int64_t n) {
    const bool first = number == 0;
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
    if (first && from_zero_) {
      std::memcpy(result(0), running(0), bytes(0, n));
      std::memset(accumulator(0), 0, bytes(0, n));
      walk_.run_phase(code_.combine(), n);
      std::memcpy(running(0), accumulator(0), bytes(0, n));
    }
    for (size_t k = 0; k < count(); ++k) {
      std::memcpy(first ? accumulator(k) : result(k), running(k), bytes(k, n));
      if (first) continue;
      const std::byte* before = entry(k, kPrefixes, std::popcount(static_cast<uint64_t>(number)) - 1);
      for (int64_t i = 0; i < n; ++i) std::memcpy(accumulator(k) + bytes(k, i), before, bytes(k, 1));
    }
    if (!first) walk_.run_phase(code_.combine(), n);
    for (size_t k = 0; k < count(); ++k) std::memcpy(spare(k, kTotal), running(k) + bytes(k, n - 1), bytes(k, 1));
    walk_.run_phase(code_.epilogue(), n);
    push(number);
  }

 private:
  // Registers of the walk's spare room. Lanes across: the current run, combinations of up to kRun runs and of all
  // before those, and the two together. Lanes along: the chunk, its total, and stacks of kMinLanes entries.
  enum { kRunSoFar = 0, kRuns = 1, kEarlier = 2, kBefore = 3 };
  enum { kRunning = 0, kTotal = 1, kTotals = 2, kPrefixes = 3 };

  // The accumulators hold the last of `closed` complete runs.
  void close_run(int64_t closed, int64_t n) {
    if ((closed - 1) % kRun != 0) join_behind(kRuns, n);
    const bool full = closed % kRun == 0;
    if (!full) keep(kRuns, n);
    if (closed > kRun) join_behind(kEarlier, n);
    if (full) keep(kEarlier, n);
    keep(kBefore, n);
  }

  void keep(int which, int64_t n) {
    for (size_t k = 0; k < count(); ++k) std::memcpy(spare(k, which), accumulator(k), bytes(k, n));
  }

  // accumulators = what was kept, combined with the accumulators.
  void join_behind(int which, int64_t n) {
    for (size_t k = 0; k < count(); ++k) {
      std::memcpy(result(k), accumulator(k), bytes(k, n));
      std::memcpy(accumulator(k), spare(k, which), bytes(k, n));
    }
    walk_.run_phase(code_.combine(), n);
  }

  // Joins the total of chunk `number` to the stack, which holds one total for each bit of the number of chunks: of
  // as many chunks as the bit says, larger ones first. Prefixes combine all entries up to their own.
  void push(int64_t number) {
    int top = std::popcount(static_cast<uint64_t>(number));
    const auto join = [&](int stack, int at) {  // the total becomes an entry combined with itself
      for (size_t k = 0; k < count(); ++k) {
        std::memcpy(accumulator(k), entry(k, stack, at), bytes(k, 1));
        std::memcpy(result(k), spare(k, kTotal), bytes(k, 1));
      }
      walk_.run_phase(code_.combine(), 1);
      for (size_t k = 0; k < count(); ++k) std::memcpy(spare(k, kTotal), accumulator(k), bytes(k, 1));
    };
    for (; number % 2 != 0; number /= 2) join(kTotals, --top);
    for (size_t k = 0; k < count(); ++k) std::memcpy(entry(k, kTotals, top), spare(k, kTotal), bytes(k, 1));
    if (top > 0) join(kPrefixes, top - 1);
    for (size_t k = 0; k < count(); ++k) std::memcpy(entry(k, kPrefixes, top), spare(k, kTotal), bytes(k, 1));
  }

  size_t count() const { return code_.accumulators.size(); }
  size_t bytes(size_t k, int64_t n) const { return static_cast<size_t>(n * bytes_of(code_.accumulators[k].type)); }
  std::byte* accumulator(size_t k) { return walk_.lanes_of(code_.accumulators[k].at); }
  std::byte* result(size_t k) { return walk_.lanes_of(code_.results[k].at); }
  std::byte* spare(size_t k, int which) {
    return walk_.spare() + 8 * code_.max_lanes * (Walk::kSpare * static_cast<int64_t>(k) + which);
  }
  std::byte* running(size_t k) { return spare(k, kRunning); }
  std::byte* entry(size_t k, int stack, int at) { return spare(k, stack) + 8 * at; }

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
        int64_t position = 0;
        do {
          walk.run(p0, n);
          scan.step(position++, n);
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
    int64_t number = 0;
    for (int64_t p0 = 0; p0 < walk.lanes();) {
      const int64_t n = walk.chunk(p0);
      walk.run(p0, n);
      scan.chunk(number++, n);
      p0 += n;
    }
  } while (walk.advance());
}

}  // namespace jax_mpk::host
