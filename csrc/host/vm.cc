#include "host/vm.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "host/vm_memory.h"

namespace jax_mpk::host {
namespace {

// Lanes are made to cross rows until there are this many.
constexpr int64_t kEnoughLanes = 256;
// Measured, in tenths of a nanosecond: starting a row, an instruction, a lane of a gather.
constexpr int64_t kRowCost = 200, kInstructionCost = 60, kGatherCost = 9;

int64_t aligned(int64_t bytes) { return round_up(bytes, 64); }

}  // namespace

int64_t walk_scratch_bytes(const Code& code) {
  const int64_t accesses = static_cast<int64_t>(code.accesses.size()), lanes = code.max_lanes;
  return aligned(code.lane_bytes * lanes) + aligned(8 * lanes) * (2 + code.rank) +
         aligned(8 * accesses * (code.rank + 1)) +
         aligned(Walk::kSpare * 8 * lanes * static_cast<int64_t>(code.accumulators.size()));
}

Walk::Walk(const Code& code, const Operand* operands, std::byte* scratch)
    : code_(code), operands_(operands), kernels_(kernels()) {
  auto take = [&](int64_t bytes) {
    std::byte* at = scratch;
    scratch += aligned(bytes);
    return at;
  };
  const int64_t accesses = static_cast<int64_t>(code.accesses.size()), lanes = code.max_lanes;
  registers_ = take(code.lane_bytes * lanes);
  staging_ = take(8 * lanes);
  lane_offset_ = reinterpret_cast<int64_t*>(take(8 * lanes));
  lane_index_ = reinterpret_cast<int64_t*>(take(aligned(8 * lanes) * code.rank));
  group_stride_ = reinterpret_cast<int64_t*>(take(8 * accesses * (code.rank + 1)));
  offset_ = group_stride_ + accesses * code.rank;
  spare_ = take(kSpare * 8 * lanes * static_cast<int64_t>(code.accumulators.size()));
}

Operand Walk::operand(const Access& access) const {
  if (access.slot < code_.first_tile) return operands_[access.slot];
  return {tiles_[access.slot - code_.first_tile], INT64_MIN, INT64_MAX};
}

void Walk::setup(const int64_t* low, const int64_t* high, int cut0, int cut1, bool all_lanes, int reversed) {
  int64_t extent[kMaxAxes];
  place(low, high, reversed, extent);
  if (empty_) return;
  for (size_t a = 0; a < code_.accesses.size(); ++a) check_bounds(a, extent);
  merge_axes(cut0, cut1, extent);
  choose_lanes(cut1, all_lanes);
  dirty_ = 0;
  flat_p0_ = -1;
}

void Walk::setup_uniform() {
  int64_t none[kMaxAxes] = {}, one[kMaxAxes], extent[kMaxAxes];
  std::fill(one, one + kMaxAxes, 1);
  place(none, one, -1, extent);
  for (size_t a = 0; a < code_.accesses.size(); ++a) {
    // Others are not read, and element 0 of their space may lie outside what the task holds.
    const int64_t* strides = code_.accesses[a].strides;
    if (std::all_of(strides, strides + code_.rank, [](int64_t s) { return s == 0; })) check_bounds(a, extent);
  }
  merge_axes(0, 0, extent);
  choose_lanes(0, false);
  dirty_ = 0;
  flat_p0_ = -1;
}

// Offsets at the box's first element and, in group_stride_, one group per loop position.
void Walk::place(const int64_t* low, const int64_t* high, int reversed, int64_t* extent) {
  const size_t accesses = code_.accesses.size();
  empty_ = false;
  for (int p = 0; p < code_.rank; ++p) {
    const int axis = code_.order[p];
    extent[p] = high[axis] - low[axis];
    empty_ |= extent[p] <= 0;
    coordinate_[p] = p == reversed ? high[axis] - 1 : low[axis];
    step_[p] = p == reversed ? -1 : 1;
  }
  if (empty_) return;
  for (size_t a = 0; a < accesses; ++a) {
    const Access& access = code_.accesses[a];
    if (access.slot >= code_.first_tile) {
      offset_[a] = 0;
      int64_t stride = 1;
      for (int p = code_.rank - 1; p >= 0; --p) stride_of(p)[a] = stride, stride *= extent[p];
    } else {
      int64_t at = access.constant;
      for (int p = 0; p < code_.rank; ++p) {
        at += access.strides[p] * coordinate_[p];
        stride_of(p)[a] = access.strides[p] * step_[p];
      }
      offset_[a] = at;
    }
  }
}

void Walk::check_bounds(size_t a, const int64_t* extent) const {
  const Access& access = code_.accesses[a];
  if (access.offset_register >= 0 || access.predicate_register >= 0 || access.stepped_only) return;
  if (access.slot >= code_.first_tile) return;
  int64_t first = offset_[a], last = offset_[a];
  for (int p = 0; p < code_.rank; ++p) {
    int64_t reach = group_stride_[p * static_cast<int64_t>(code_.accesses.size()) + static_cast<int64_t>(a)] *
                    (extent[p] - 1);
    (reach < 0 ? first : last) += reach;
  }
  const Operand& operand = operands_[access.slot];
  if (first < operand.low || last >= operand.high) {
    throw std::runtime_error("a task reads or writes elements " + std::to_string(first) + " to " +
                             std::to_string(last) + " of an operand that holds " + std::to_string(operand.low) +
                             " to " + std::to_string(operand.high - 1));
  }
}

void Walk::merge_axes(int cut0, int cut1, const int64_t* extent) {
  const size_t accesses = code_.accesses.size();
  auto section = [&](int p) { return p < cut0 ? 0 : p < cut1 ? 1 : 2; };
  int count = 0, last = -1;  // last: loop position whose strides group count - 1 has
  for (int p = 0; p < code_.rank; ++p) {
    if (extent[p] == 1) continue;
    const int64_t* inner = stride_of(p);
    bool merge = count > 0 && section(last) == section(p) && !(code_.coords_used >> last & 1) &&
                 !(code_.coords_used >> p & 1);
    for (size_t a = 0; merge && a < accesses; ++a) merge = stride_of(count - 1)[a] == inner[a] * extent[p];
    if (merge) {
      --count;
      group_[count].extent *= extent[p];
    } else {
      group_[count].first = p;
      group_[count].extent = extent[p];
    }
    group_[count].index = 0;
    if (count != p) std::memmove(stride_of(count), inner, accesses * sizeof(int64_t));
    ++count;
    last = p;
  }
  all_groups_ = count;
}

void Walk::choose_lanes(int cut1, bool all_lanes) {
  groups_ = all_groups_;
  lanes_ = 1;
  auto in_lanes = [&] { return groups_ > 0 && group_[groups_ - 1].first >= cut1; };
  if (in_lanes()) {
    lanes_ = group_[--groups_].extent;
    if (all_lanes) {
      while (in_lanes()) lanes_ *= group_[--groups_].extent;
    } else {
      while (in_lanes() && lanes_ < kEnoughLanes && worth_crossing()) lanes_ *= group_[--groups_].extent;
    }
  }
  lane_level_ = groups_ == all_groups_ ? code_.rank : group_[groups_].first;
  width_ = std::min(lanes_, code_.max_lanes);
  lane_stride_ = round_up(width_, kMinLanes);
  fill_ = width_;
}

// Whether lanes should cross the rows they are now confined to. That saves the dispatch of every instruction for every
// row, and turns accesses that do not continue from one row to the next into gathers.
bool Walk::worth_crossing() {
  const size_t accesses = code_.accesses.size();
  const int64_t *outer = stride_of(groups_ - 1), *inner = stride_of(groups_);
  int64_t gathers = 0;
  for (size_t a = 0; a < accesses; ++a) gathers += outer[a] != inner[a] * group_[groups_].extent;
  const int64_t instructions = static_cast<int64_t>(code_.instructions.size());
  return kRowCost + kInstructionCost * instructions > kGatherCost * gathers * lanes_;
}

int Walk::groups_before(int position) const {
  int g = 0;
  while (g < groups_ && group_[g].first < position) ++g;
  return g;
}

bool Walk::advance(int from, int to) {
  const size_t accesses = code_.accesses.size();
  for (int g = to - 1; g >= from; --g) {
    Group& group = group_[g];
    const int64_t* stride = stride_of(g);
    dirty_ = std::min(dirty_, group.first + 1);
    if (++group.index < group.extent) {
      for (size_t a = 0; a < accesses; ++a) offset_[a] += stride[a];
      coordinate_[group.first] += step_[group.first];
      return true;
    }
    group.index = 0;
    for (size_t a = 0; a < accesses; ++a) offset_[a] -= stride[a] * (group.extent - 1);
    coordinate_[group.first] -= step_[group.first] * (group.extent - 1);
  }
  return false;
}

void Walk::run(int64_t p0, int64_t n) {
  p0_ = p0;
  const auto& begin = code_.begin;
  if (dirty_ <= lane_level_) {
    execute(begin[dirty_], begin[lane_level_ + 1], false, 0, 1);
    dirty_ = lane_level_ + 1;
  }
  execute(begin[lane_level_ + 1], begin[code_.rank + 1], true, p0, n);
}

void Walk::run_uniform() {
  const int64_t fill = std::exchange(fill_, 1);
  execute(code_.begin[0], code_.begin[1], false, 0, 1);
  fill_ = fill;
  dirty_ = 0;
}

void Walk::run_phase(int phase, int64_t n) { execute(code_.begin[phase], code_.begin[phase + 1], true, p0_, n); }

void Walk::fill(std::byte* lanes, int bytes, int64_t n) {
  constexpr Type by_size[] = {Type::k_u8, Type::k_u8, Type::k_u16, Type::k_u16, Type::k_u32,
                              Type::k_u32, Type::k_u32, Type::k_u32, Type::k_u64};
  kernels_.fill[static_cast<int>(by_size[bytes])](lanes, lanes, nullptr, nullptr, n, 0);
}

void Walk::execute(int begin, int end, bool vector, int64_t p0, int64_t n) {
  using Kind = Instruction::Kind;
  for (int i = begin; i < end; ++i) {
    const Instruction& in = code_.instructions[i];
    switch (in.kind) {
      case Kind::kKernel:
        in.kernel(lanes_of(in.out), lanes_of(in.a), lanes_of(in.b), lanes_of(in.c), n, in.immediate);
        break;
      case Kind::kConst:
        std::memcpy(lanes_of(in.out), &in.immediate, in.out_bytes);
        if (vector) fill(lanes_of(in.out), in.out_bytes, n);
        break;
      case Kind::kCoord:
        coordinate(in, vector, p0, n);
        break;
      case Kind::kLoad:
        load(in, vector, p0, n);
        break;
      case Kind::kStore:
        store(in, p0, n);
        continue;
    }
    if (!vector && fill_ > 1 && in.use_level > lane_level_) fill(lanes_of(in.out), in.out_bytes, fill_);
  }
}

void Walk::coordinate(const Instruction& in, bool vector, int64_t p0, int64_t n) {
  int64_t* out = reinterpret_cast<int64_t*>(lanes_of(in.out));
  const int p = static_cast<int>(in.immediate);
  const int64_t start = coordinate_[p], step = step_[p];
  *out = start;
  if (!vector) return;
  for (int g = groups_; g < all_groups_; ++g) {
    if (group_[g].first != p) continue;
    if (groups_ + 1 == all_groups_) {
      for (int64_t i = 0; i < n; ++i) out[i] = start + step * (p0 + i);
    } else {
      flat_indices(p0, n);
      const int64_t* index = lane_index_ + (g - groups_) * code_.max_lanes;
      for (int64_t i = 0; i < n; ++i) out[i] = start + step * index[i];
    }
    return;
  }
  fill(lanes_of(in.out), 8, n);
}

// Indices of every lane group for lanes [p0, p0 + n).
void Walk::flat_indices(int64_t p0, int64_t n) {
  if (flat_p0_ == p0 && flat_n_ == n) return;
  flat_p0_ = p0, flat_n_ = n;
  int64_t index[kMaxAxes], rest = p0;
  for (int g = all_groups_ - 1; g >= groups_; --g) {
    index[g] = rest % group_[g].extent;
    rest /= group_[g].extent;
  }
  // Run by run of the innermost group.
  const int inner = all_groups_ - 1;
  for (int64_t i = 0; i < n;) {
    const int64_t run = std::min(n - i, group_[inner].extent - index[inner]);
    int64_t* lane = lane_index_ + i;
    for (int g = groups_; g < inner; ++g, lane += code_.max_lanes) std::fill(lane, lane + run, index[g]);
    for (int64_t j = 0; j < run; ++j) lane[j] = index[inner] + j;
    i += run;
    index[inner] += run;
    for (int g = inner; g > groups_ && index[g] == group_[g].extent; --g) index[g] = 0, ++index[g - 1];
  }
}

bool Walk::offsets(int access, int64_t p0, int64_t n, int64_t& offset, int64_t& stride, int64_t*& each) {
  offset = offset_[access];
  if (groups_ == all_groups_) {
    stride = 0;
    return true;
  }
  stride = stride_of(all_groups_ - 1)[access];
  bool joint = true;
  for (int g = groups_; joint && g + 1 < all_groups_; ++g) {
    joint = stride_of(g)[access] == stride_of(g + 1)[access] * group_[g + 1].extent;
  }
  if (joint) {
    offset += stride * p0;
    return true;
  }
  flat_indices(p0, n);
  each = lane_offset_;
  bool first = true;
  for (int g = groups_; g < all_groups_; ++g) {
    const int64_t step = stride_of(g)[access];
    const int64_t* index = lane_index_ + (g - groups_) * code_.max_lanes;
    if (step == 0) continue;
    if (first) {
      for (int64_t i = 0; i < n; ++i) each[i] = offset + step * index[i];
    } else {
      for (int64_t i = 0; i < n; ++i) each[i] += step * index[i];
    }
    first = false;
  }
  return false;
}

void Walk::load(const Instruction& in, bool vector, int64_t p0, int64_t n) {
  const Access& access = code_.accesses[in.immediate];
  const Operand from = operand(access);
  const int bytes = bytes_of(in.memory);
  std::byte* const out = lanes_of(in.out);
  if (vector && in.kernel == nullptr && groups_ + 1 == all_groups_ && access.offset_register < 0 &&
      access.predicate_register < 0 && stride_of(groups_)[in.immediate] == 1) {
    std::memcpy(out, from.base + (offset_[in.immediate] + p0) * bytes, static_cast<size_t>(n * bytes));
    return;
  }
  // Without a conversion, memory goes straight to the register.
  std::byte* const raw = in.kernel != nullptr ? staging_ : out;
  const uint8_t* predicate = nullptr;
  if (access.predicate_register >= 0) predicate = reinterpret_cast<const uint8_t*>(lanes_of(access.predicate_register));
  const int64_t* shift = nullptr;
  if (access.offset_register >= 0) shift = reinterpret_cast<const int64_t*>(lanes_of(access.offset_register));

  int64_t offset = offset_[in.immediate], stride = 0;
  int64_t* each = nullptr;
  bool straight = !vector || offsets(static_cast<int>(in.immediate), p0, n, offset, stride, each);
  if (shift != nullptr && vector && varies(access.offset_level)) {
    if (straight) {
      each = lane_offset_;
      for (int64_t i = 0; i < n; ++i) each[i] = offset + stride * i + shift[i];
    } else {
      for (int64_t i = 0; i < n; ++i) each[i] += shift[i];
    }
    straight = false;
  } else if (shift != nullptr) {
    offset += shift[0];
    if (!straight) {
      for (int64_t i = 0; i < n; ++i) each[i] += shift[0];
    }
  }

  int64_t first = 0, count = n;  // lanes to read; the others are 0
  if (predicate != nullptr && !(vector && varies(access.predicate_level))) {
    if (predicate[0] == 0) count = 0;
  } else if (predicate != nullptr && straight) {
    while (first < n && predicate[first] == 0) ++first;
    int64_t last = n;
    while (last > first && predicate[last - 1] == 0) --last;
    count = last - first;
    // Holes in between are read lane by lane.
    straight = count == 0 || std::memchr(predicate + first, 0, static_cast<size_t>(count)) == nullptr;
  }
  if (straight && count > 0 && (shift != nullptr || predicate != nullptr)) {
    const int64_t a = offset + stride * first, b = offset + stride * (first + count - 1);
    straight = std::min(a, b) >= from.low && std::max(a, b) < from.high;
  }

  if (count == 0) {
    std::memset(raw, 0, static_cast<size_t>(n * bytes));
  } else if (straight) {
    if (count < n) std::memset(raw, 0, static_cast<size_t>(n * bytes));
    std::byte* to = raw + first * bytes;
    const int64_t at = offset + stride * first;
    if (stride == 1 && in.kernel != nullptr && count == n) {
      // Whole blocks are converted where they lie.
      const int64_t blocks = n / kBlock * kBlock, rest = n - blocks;
      const std::byte* source = from.base + at * bytes;
      in.kernel(out, source, nullptr, nullptr, blocks, 0);
      if (rest > 0) {
        std::memcpy(staging_, source + blocks * bytes, static_cast<size_t>(rest * bytes));
        in.kernel(out + blocks * in.out_bytes, staging_, nullptr, nullptr, rest, 0);
      }
      return;
    }
    if (stride == 1) {
      std::memcpy(to, from.base + at * bytes, static_cast<size_t>(count * bytes));
    } else if (stride == 0) {
      std::memcpy(to, from.base + at * bytes, static_cast<size_t>(bytes));
      // Fills whole blocks, which only the end of a register has room for.
      if (count == n) fill(to, bytes, count);
      else gather_strided(bytes, to, from.base, at, 0, count);
    } else {
      gather_strided(bytes, to, from.base, at, stride, count);
    }
  } else {
    if (each == nullptr) {
      each = lane_offset_;
      for (int64_t i = 0; i < n; ++i) each[i] = offset + stride * i;
    }
    const bool by_lane = predicate != nullptr && vector && varies(access.predicate_level);
    const bool unsure = shift != nullptr || predicate != nullptr;
    gather_checked(bytes, raw, from.base, each, by_lane ? predicate : nullptr, unsure ? from.low : INT64_MIN,
                   unsure ? from.high : INT64_MAX, n);
  }
  if (in.kernel != nullptr) in.kernel(out, raw, nullptr, nullptr, n, 0);
}

void Walk::store(const Instruction& in, int64_t p0, int64_t n) {
  const Operand to = operand(code_.accesses[in.immediate]);
  const int bytes = bytes_of(in.memory);
  const std::byte* lanes = lanes_of(in.a);
  int64_t offset, stride;
  int64_t* each;
  const bool straight = offsets(static_cast<int>(in.immediate), p0, n, offset, stride, each);
  if (in.kernel != nullptr) {
    std::byte* target = to.base + offset * bytes;
    if (straight && stride == 1) {
      const int64_t blocks = n / kBlock * kBlock;
      in.kernel(target, lanes, nullptr, nullptr, blocks, 0);
      if (blocks == n) return;
      in.kernel(staging_, lanes + blocks * bytes_of(in.reg), nullptr, nullptr, n - blocks, 0);
      std::memcpy(target + blocks * bytes, staging_, static_cast<size_t>((n - blocks) * bytes));
      return;
    }
    in.kernel(staging_, lanes, nullptr, nullptr, n, 0);
    lanes = staging_;
  }
  if (!straight) {
    scatter(bytes, to.base, each, lanes, n);
  } else if (stride == 1) {
    std::memcpy(to.base + offset * bytes, lanes, static_cast<size_t>(n * bytes));
  } else {
    scatter_strided(bytes, to.base, offset, stride, lanes, n);
  }
}

}  // namespace jax_mpk::host
