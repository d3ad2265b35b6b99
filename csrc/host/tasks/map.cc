// Maps, and the epilogues of reductions and contractions, which are maps that also read accumulator tiles.
#include "host/vm.h"

namespace jax_mpk::host {
namespace {

// Operands and outputs of a member in the order of slots.
struct Slots {
  std::vector<Operand> operands;

  Slots(const Context& context, const Member& member) {
    operands.reserve(member.operands.size() + member.outputs.size());
    for (const Tensor& tensor : member.operands) operands.push_back(context.resolve(tensor));
    for (const Tensor& tensor : member.outputs) operands.push_back(context.resolve(tensor));
  }
};

void walk_all(Walk& walk) {
  if (walk.empty()) return;
  do {
    for (int64_t p0 = 0; p0 < walk.lanes();) {
      const int64_t n = walk.chunk(p0);
      walk.run(p0, n);
      p0 += n;
    }
  } while (walk.advance());
}

}  // namespace

void run_map(const Context& context, int index) {
  const Member& member = context.routine.members[index];
  const Slots slots(context, member);
  Walk walk(context.bodies.codes[member.body], slots.operands.data(), context.walk());
  walk.setup(context.low(index), context.high(index));
  walk_all(walk);
}

void run_epilogue(const Context& context, int index, const int64_t* low, const int64_t* high, std::byte* tile) {
  const Member& member = context.routine.members[index];
  Slots slots(context, member);
  int64_t elements = 1;
  for (int d = 0; d < member.space_rank; ++d) elements *= high[d] - low[d];
  if (!member.bounds.empty()) {
    // Output k is accumulator k of all splits; this task writes one of them.
    const int64_t start = context.low(index)[member.space_rank];
    int64_t split = 0;
    while (member.bounds[split] < start) ++split;
    for (size_t k = 0; k < member.outputs.size(); ++k) {
      Operand& output = slots.operands[member.operands.size() + k];
      const int64_t size = output.high / static_cast<int64_t>(member.bounds.size() - 1);
      output.base += split * size * bytes_of(member.outputs[k].type);
      output.high = size;
    }
  }
  Walk walk(context.bodies.codes[member.epilogue], slots.operands.data(), context.walk());
  for (size_t k = 0; k < member.accumulators.size(); ++k) {
    walk.set_tile(static_cast<int>(k), tile);
    tile += round_up(elements * bytes_of(member.accumulators[k]), 64);
  }
  walk.setup(low, high);
  walk_all(walk);
}

}  // namespace jax_mpk::host
