// The vector VM: runs a Code over a box, many lanes at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host/bodies.h"

namespace jax_mpk::host {

// A walk over the loops of a box. setup() drops axes of extent 1, merges neighbours that all accesses step through
// jointly, and picks the axes that lanes run along; the others become an odometer of outer groups:
//
//   do { for (p0 = 0; p0 < walk.lanes(); p0 += n) walk.run(p0, n = walk.chunk(p0)); } while (walk.advance());
//
// Lanes run along the innermost group ("row mode"), or across several groups where that one is tiny or the caller
// asks for all ("flat mode"; strided accesses then use an offset per lane).
class Walk {
 public:
  // `operands`: by slot, tiles excepted. `scratch`: code.scratch_bytes, 64-byte aligned.
  Walk(const Code& code, const Operand* operands, std::byte* scratch);

  // Accumulator tile k; before setup().
  void set_tile(int k, std::byte* data) { tiles_[k] = data; }

  // Loop positions are cut into up to three sections, at `cut0` <= `cut1`; groups never span sections, and lanes
  // lie in the last one. `low` and `high`: the box by axis. `all_lanes`: lanes run along the whole last section.
  // `reversed`: a loop position that runs downwards, or −1. Throws where an access would leave its operand.
  void setup(const int64_t* low, const int64_t* high, int cut0 = 0, int cut1 = 0, bool all_lanes = false,
             int reversed = -1);
  // For run_uniform() alone.
  void setup_uniform();

  bool empty() const { return empty_; }
  int64_t lanes() const { return lanes_; }  // elements along the lane groups
  int64_t chunk(int64_t p0) const { return lanes_ - p0 < width_ ? lanes_ - p0 : width_; }
  int64_t width() const { return width_; }  // most lanes of one chunk

  int groups() const { return groups_; }
  int groups_before(int position) const;  // outer groups that start before a loop position
  // Steps the outer groups [from, to), last one fastest; false (and back to the start) after the last step.
  bool advance(int from, int to);
  bool advance() { return advance(0, groups_); }

  // All levels for lanes [p0, p0 + n).
  void run(int64_t p0, int64_t n);
  // Level 0 only, one lane.
  void run_uniform();
  // code.combine() or code.epilogue().
  void run_phase(int phase, int64_t n);

  // A register's lanes; where a result depends on no lane coordinate, all hold the same value only if an
  // instruction of a deeper level or phase reads it (Instruction::use_level).
  std::byte* lanes_of(int register_offset) const { return registers_ + register_offset * lane_stride_; }
  bool varies(int level) const { return level > lane_level_; }
  // Room for the caller: per accumulator of the code, kSpare registers of 8 bytes a lane.
  static constexpr int64_t kSpare = 4;
  std::byte* spare() const { return spare_; }

  // Element offsets of an access without a register for lanes [p0, p0 + n): offset + stride * i, or false and
  // one offset per lane in `each`.
  bool offsets(int access, int64_t p0, int64_t n, int64_t& offset, int64_t& stride, int64_t*& each);

 private:
  void merge_axes(int cut0, int cut1, const int64_t* extent);
  void choose_lanes(int cut1, bool all_lanes);
  bool worth_crossing();
  void execute(int begin, int end, bool vector, int64_t p0, int64_t n);
  void load(const Instruction& instruction, bool vector, int64_t p0, int64_t n);
  void store(const Instruction& instruction, int64_t p0, int64_t n);
  void coordinate(const Instruction& instruction, bool vector, int64_t p0, int64_t n);
  void flat_indices(int64_t p0, int64_t n);
  void place(const int64_t* low, const int64_t* high, int reversed, int64_t* extent);
  void check_bounds(size_t access, const int64_t* extent) const;
  Operand operand(const Access& access) const;
  void fill(std::byte* lanes, int bytes, int64_t n);
  int64_t* stride_of(int group) { return group_stride_ + group * static_cast<int64_t>(code_.accesses.size()); }

  const Code& code_;
  const Operand* operands_;
  const KernelTable& kernels_;
  std::byte* tiles_[kMaxAccumulators] = {};
  std::byte* registers_;
  std::byte* staging_;       // a register's worth of bytes before conversion
  int64_t* lane_offset_;     // one offset per lane
  int64_t* lane_index_;      // flat mode: [lane group][lane]
  int64_t* group_stride_;    // [group][access]
  int64_t* offset_;          // [access] at the current outer position, lane 0
  std::byte* spare_;

  int64_t lane_stride_ = 64, lanes_ = 1, width_ = 64, fill_ = 1;
  int lane_level_ = 0, dirty_ = 0;
  int groups_ = 0, all_groups_ = 0;  // outer groups come first, then the lane groups
  bool empty_ = false;
  int64_t p0_ = 0;  // of the last run, for phases
  int64_t flat_p0_ = -1, flat_n_ = 0;
  struct Group {
    int first;      // loop position
    int64_t extent, index;
  } group_[kMaxAxes];
  int64_t coordinate_[kMaxAxes], step_[kMaxAxes];  // by loop position
};

// Bytes a Walk over `code` needs (Code::scratch_bytes).
int64_t walk_scratch_bytes(const Code& code);

}  // namespace jax_mpk::host
