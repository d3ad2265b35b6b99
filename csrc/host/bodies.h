// What tasks compute: decoded routines. Internal to the bodies (csrc/host/tasks) and the decoder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/program.h"
#include "host/vm_kernels.h"

namespace jax_mpk::host {

// Most axes of an index space (parallel and reduced ones together) and of a tensor.
inline constexpr int kMaxAxes = 32;
// Most accumulators of one operator.
inline constexpr int kMaxAccumulators = 8;
// Most elements of an accumulator tile; larger boxes are computed in pieces.
inline constexpr int64_t kTileElements = 32768;
// Lanes per register: a multiple of 64, as many as keep the registers within the L1 cache.
inline constexpr int64_t kMinLanes = 64, kMaxLanes = 1024, kRegisterBytes = 24 * 1024;

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// An array as a member sees it: a storage, row-major over `dims`, or a local value of the routine.
struct Tensor {
  bool local;
  int32_t id;  // storage or local number
  Type type;
  int rank;
  int64_t dims[kMaxAxes];
  int64_t elements;
};

// Where a tensor lies during one task. `base` is where element offset 0 would be; only offsets in [low, high) may
// be touched. Offsets are row-major over the tensor's dims (storage) or over the local value's extents, with
// indices counted from the tensor's own origin in both cases.
struct Operand {
  std::byte* base;
  int64_t low, high;
};

// Elements of one operand: offset = constant + sum of stride * coordinate (+ lane of a register).
struct Access {
  int32_t slot;  // operands first, outputs next, then accumulator tiles
  int64_t constant;
  int32_t offset_register, offset_level;  // s64; −1: none
  int32_t predicate_register, predicate_level;  // b1; −1: none. False: reads 0, touches nothing
  bool stepped_only;  // no instruction uses it: the body asks for its offsets, and checks them
  int64_t strides[kMaxAxes];  // by loop position, in elements; tiles get theirs when the box is known
};

struct Instruction {
  enum class Kind : uint8_t { kKernel, kConst, kCoord, kLoad, kStore };
  Kind kind;
  uint8_t out_bytes;  // size of a lane of the result
  uint8_t use_level;  // deepest level that reads the result as lanes
  Type memory, reg;   // kLoad, kStore
  uint16_t out, a, b, c;  // registers: byte offset of the register for one lane
  Kernel kernel;      // kLoad, kStore: conversion between memory and register, or null
  int64_t immediate;  // constant's bits, coordinate's loop position, access, or the kernel's
};

struct Register {
  uint16_t at;
  Type type;
};

// Straight-line code over the loops of a box. Instructions are sorted by level: level l depends on the coordinates
// of the first l loop positions only and runs again when one of them changes. After the levels come the two
// phases that combine results with accumulators and compute outputs from those.
struct Code {
  int rank;
  int order[kMaxAxes];       // loop position → axis of the box
  uint64_t coords_used;      // bit p: a kCoord instruction reads position p
  int64_t lane_bytes;        // of all registers together
  int64_t max_lanes;
  int first_tile;            // slots from here on are tiles
  std::vector<Access> accesses;
  std::vector<Instruction> instructions;
  std::vector<int32_t> begin;  // [rank + 4]: levels 0 … rank, combine, epilogue, end
  std::vector<Register> results, accumulators;
  int64_t scratch_bytes;     // what a Walk over this code needs

  int combine() const { return rank + 1; }
  int epilogue() const { return rank + 2; }
};

// One axis of an Update's target: coordinate `axis` (−1: none) + constant + registers. A register of level 0 is the
// same for the whole task, so the walk can be restricted to what falls into the box.
struct TargetIndex {
  int axis;
  int64_t constant;
  int32_t uniform_register;  // level 0, or −1
  int32_t general_register;  // any level, or −1; then axis is −1 and constant 0
  int32_t general_level;
};

// One factor of a contraction: elements of an operand, except where the window lies over them. The window covers
// `length` positions of coordinate `axis` from start - shift on; there the factor comes from another operand.
struct Factor {
  int32_t slot;
  int64_t constant;
  int64_t strides[kMaxAxes];  // space, then reduced space

  int axis;  // −1: no window
  int64_t shift, length;
  int32_t start_result;  // result of the member's body (a code without loops): s64
  int32_t fresh_slot;
  int64_t fresh_constant;
  int32_t fresh_result;  // added to fresh_constant: s64, or −1
  int64_t fresh_strides[kMaxAxes];
};

struct Member {
  enum class Kind : uint8_t { kMap, kReduce, kContract, kUpdate, kCumulative, kSort };
  Kind kind;
  int space_rank, rank;  // rank: with the reduced axes
  int64_t extents[kMaxAxes];  // space, then reduced space
  std::vector<Tensor> operands, outputs;
  int32_t body = -1, epilogue = -1;  // codes

  // Reductions and contractions over part of the reduced space: cut points of its first axis; empty: WHOLE.
  std::vector<int64_t> bounds;
  std::vector<Type> accumulators;

  // kReduce: lanes along parallel axes from this one on, or (−1) along the reduced ones. kCumulative: likewise.
  int lane_axis = -1;
  bool commutative = false;
  int fold = -1;  // Fold of a single accumulator, or −1

  Factor lhs, rhs;  // kContract

  int axis = -1;  // kCumulative, kSort
  bool reverse = false;
  bool sums = false;  // kCumulative: starts from zero
  int num_keys = 0;
  int64_t top_k = -1;

  std::vector<TargetIndex> target;  // kUpdate; operands.back() is the base
  bool combines = false;
  int32_t bounds_register = -1, bounds_level = 0;
  int32_t target_access = -1;
};

struct Local {
  int64_t offset, bytes;
  int rank;
  int64_t extents[kMaxAxes], strides[kMaxAxes];
  int64_t elements;
  int producer;  // member that writes it
};

struct Routine {
  std::vector<Member> members;
  std::vector<Local> locals;
};

struct Bodies {
  std::vector<Code> codes;
  std::vector<Routine> routines;
  int box_rank = 0;
  std::vector<int64_t> boxes;  // [rows][2][box_rank]
  std::vector<int32_t> task_box_start, task_box;  // row of each member of each task
  int64_t local_bytes = 0, tile_bytes = 0, walk_bytes = 0, sort_bytes = 0;
};

// One task on its way: what member bodies get.
struct Context {
  const Program& program;
  const Bodies& bodies;
  const Routine& routine;
  const Memory& memory;
  Scratch& scratch;
  const int32_t* rows;  // box row of each member

  const int64_t* low(int member) const { return &bodies.boxes[static_cast<size_t>(rows[member]) * 2 * bodies.box_rank]; }
  const int64_t* high(int member) const { return low(member) + bodies.box_rank; }
  std::byte* locals() const { return scratch.data(); }
  std::byte* tile() const { return scratch.data() + bodies.local_bytes; }
  std::byte* walk() const { return tile() + bodies.tile_bytes; }
  std::byte* sorting() const { return walk() + bodies.walk_bytes; }

  // Where a tensor lies, and (for bodies that address it themselves) its strides.
  Operand resolve(const Tensor& tensor) const;
  void strides(const Tensor& tensor, int64_t* out) const;
};

// Bodies, in csrc/host/tasks: one per kind. `index` is the member's number within the routine.
void run_map(const Context& context, int index);
void run_reduce(const Context& context, int index);
void run_contract(const Context& context, int index);
int64_t contract_scratch_bytes(const Member& member, int64_t tile_bytes);  // of Context::walk()
void run_update(const Context& context, int index);
void run_cumulative(const Context& context, int index);
void run_sort(const Context& context, int index);

// The epilogue of a reduction or contraction: a map over the box from accumulator tiles (one after the other at
// `tile`, row-major over the box) to the outputs, or to the partial accumulators of split `split`.
void run_epilogue(const Context& context, int index, const int64_t* low, const int64_t* high, std::byte* tile);

inline bool empty(int rank, const int64_t* low, const int64_t* high) {
  for (int d = 0; d < rank; ++d) {
    if (high[d] <= low[d]) return true;
  }
  return false;
}

// Calls f(low, high) for pieces of a box of at most kTileElements elements, halving the longest axis.
template <class F>
void for_each_piece(int rank, const int64_t* low, const int64_t* high, const F& f) {
  int64_t elements = 1;
  int longest = 0;
  for (int d = 0; d < rank; ++d) {
    elements *= high[d] - low[d];
    if (high[d] - low[d] > high[longest] - low[longest]) longest = d;
  }
  if (elements <= 0) return;
  if (elements <= kTileElements) return f(low, high);
  int64_t cut[kMaxAxes], size = high[longest] - low[longest];
  int64_t half = size >= 128 ? round_up(size / 2, 64) : (size + 1) / 2;
  for (int d = 0; d < rank; ++d) cut[d] = high[d];
  cut[longest] = low[longest] + half;
  for_each_piece(rank, low, cut, f);
  for (int d = 0; d < rank; ++d) cut[d] = low[d];
  cut[longest] = low[longest] + half;
  for_each_piece(rank, cut, high, f);
}

// Runs a reduction or contraction over a task's box in such pieces, each followed by the epilogue. A piece has all
// reduced elements, or those of the task's split.
template <class F>
void run_in_pieces(const Context& context, int index, const F& run) {
  const Member& member = context.routine.members[index];
  const bool partial = !member.bounds.empty();
  int64_t from[kMaxAxes], to[kMaxAxes];
  for (int d = member.space_rank; d < member.rank; ++d) {
    from[d] = partial ? context.low(index)[d] : 0;
    to[d] = partial ? context.high(index)[d] : member.extents[d];
  }
  const auto piece = [&](const int64_t* low, const int64_t* high) {
    for (int d = 0; d < member.space_rank; ++d) {
      from[d] = low[d];
      to[d] = high[d];
    }
    run(from, to);
    run_epilogue(context, index, low, high, context.tile());
  };
  for_each_piece(member.space_rank, context.low(index), context.high(index), piece);
}

}  // namespace jax_mpk::host
