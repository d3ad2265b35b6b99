#include <algorithm>

#include "host/decode.h"

namespace jax_mpk::host {
namespace {

struct Decoder {
  WordReader& reader;
  const std::vector<Symbol>& symbols;
  const std::vector<Storage>& storages;
  Bodies& bodies;
  Routine& routine;
  int number;  // of the member

  int64_t product(const int64_t* sizes, int rank) const {
    int64_t out = 1;
    for (int d = 0; d < rank; ++d) {
      reader.require(sizes[d] == 0 || out <= (int64_t{1} << 48) / std::max<int64_t>(sizes[d], 1), "an array is too large");
      out *= sizes[d];
    }
    return out;
  }

  Local local() {
    Local out;
    out.offset = reader.size("offset of a local value");
    out.bytes = reader.size("size of a local value");
    reader.require(out.offset % 16 == 0 && out.offset <= bodies.local_bytes &&
                       out.bytes <= bodies.local_bytes - out.offset,
                   "a local value lies outside of scratch memory");
    out.rank = reader.in32(0, kMaxAxes, "rank of a local value");
    for (int d = 0; d < out.rank; ++d) out.extents[d] = reader.size("extent of a local value");
    out.elements = 1;
    product(out.extents, out.rank);
    for (int d = out.rank - 1; d >= 0; --d) out.strides[d] = out.elements, out.elements *= out.extents[d];
    out.producer = -1;
    return out;
  }

  Tensor tensor(bool output) {
    Tensor out;
    out.local = reader.flag("whether an array is local");
    const int64_t limit = static_cast<int64_t>(out.local ? routine.locals.size() : storages.size());
    out.id = reader.in32(0, limit - 1, "number of an array");
    out.type = decode_type(reader, symbols);
    out.rank = reader.in32(0, kMaxAxes, "rank of an array");
    for (int d = 0; d < out.rank; ++d) out.dims[d] = reader.size("extent of an array");
    out.elements = product(out.dims, out.rank);
    if (!out.local) {
      const Storage& storage = storages[out.id];
      reader.require(out.elements * bytes_of(out.type) <= storage.nbytes, "an array is larger than its storage");
      reader.require(!output || storage.kind != Storage::Kind::kInput, "a member writes an argument");
      return out;
    }
    Local& local = routine.locals[out.id];
    reader.require(local.rank == out.rank, "a local value has another rank than its scratch array");
    reader.require(local.elements * bytes_of(out.type) <= local.bytes, "a local value is larger than its scratch array");
    if (output) {
      reader.require(local.producer < 0, "a local value is written by two members");
      local.producer = number;
    } else {
      reader.require(local.producer >= 0 && local.producer < number, "a local value is read before it is written");
    }
    return out;
  }

  void factor(const Member& member, Factor& out) {
    const int64_t operands = static_cast<int64_t>(member.operands.size());
    out.slot = reader.in32(0, operands - 1, "slot of a factor");
    out.constant = reader.any("constant of a factor");
    for (int d = 0; d < member.rank; ++d) out.strides[d] = reader.any("stride of a factor");
    out.axis = reader.in32(-1, member.rank - 1, "axis of a window");
    if (out.axis < 0) return;
    reader.require(member.body >= 0, "a window's start is not computed");
    const Code& code = bodies.codes[member.body];
    const int64_t results = static_cast<int64_t>(code.results.size());
    out.shift = reader.any("shift of a window");
    out.length = reader.size("length of a window");
    out.start_result = reader.in32(0, results - 1, "start of a window");
    out.fresh_slot = reader.in32(0, operands - 1, "slot of a window");
    out.fresh_constant = reader.any("constant of a window");
    out.fresh_result = reader.in32(-1, results - 1, "offset of a window");
    for (int d = 0; d < member.rank; ++d) out.fresh_strides[d] = reader.any("stride of a window");
    reader.require(code.results[out.start_result].type == Type::k_s64, "a window's start is no index");
    reader.require(out.fresh_result < 0 || code.results[out.fresh_result].type == Type::k_s64,
                   "a window's offset is no index");
    reader.require(member.operands[out.slot].type == member.operands[out.fresh_slot].type,
                   "a window's elements have another type");
  }

  const Code& code(int32_t which, const Member& member, int rank, size_t tiles) {
    reader.require(which >= 0 && which < static_cast<int64_t>(bodies.codes.size()), "no such code");
    const Code& out = bodies.codes[which];
    reader.require(out.rank == rank, "a code has another rank than its member");
    const size_t operands = member.operands.size(), arrays = operands + member.outputs.size();
    reader.require(out.first_tile == static_cast<int>(arrays), "a code counts arrays differently than its member");
    for (const Access& access : out.accesses) {
      reader.require(static_cast<size_t>(access.slot) < arrays + tiles, "a code accesses no such array");
    }
    for (const Instruction& in : out.instructions) {
      if (in.kind != Instruction::Kind::kLoad && in.kind != Instruction::Kind::kStore) continue;
      const size_t slot = static_cast<size_t>(out.accesses[in.immediate].slot);
      const bool is_output = slot >= operands && slot < arrays;
      reader.require(is_output == (in.kind == Instruction::Kind::kStore), "a code loads an output or stores an operand");
      const Type type = slot < operands ? member.operands[slot].type
                        : slot < arrays ? member.outputs[slot - operands].type
                                        : member.accumulators[slot - arrays];
      reader.require(type == in.memory, "a code takes an array for one of another type");
    }
    bodies.walk_bytes = std::max(bodies.walk_bytes, out.scratch_bytes);
    return out;
  }

  void require_order(const Code& code, int cut0, int cut1, int cut2) {
    // Loops: axes [0, cut0), then [cut1, cut2), then [cut0, cut1).
    int p = 0;
    auto expect = [&](int from, int to) {
      for (int axis = from; axis < to; ++axis, ++p) {
        reader.require(p < code.rank && code.order[p] == axis, "loops are not in the order their member needs");
      }
    };
    expect(0, cut0);
    expect(cut1, cut2);
    expect(cut0, cut1);
  }

  void require_accumulators(const Member& member, const Code& code) {
    reader.require(code.accumulators.size() == member.accumulators.size() &&
                       code.results.size() == member.accumulators.size() && !code.results.empty(),
                   "a member and its code disagree on accumulators");
    for (size_t k = 0; k < code.accumulators.size(); ++k) {
      reader.require(code.accumulators[k].type == member.accumulators[k] && code.results[k].type == member.accumulators[k],
                     "a member and its code disagree on an accumulator's type");
    }
  }

  // Tiles, epilogue and split of a reduction or contraction; the bytes of its tiles.
  int64_t reducing(Member& member) {
    const size_t tiles = member.accumulators.size();
    const Code& epilogue = code(member.epilogue, member, member.space_rank, tiles);
    require_order(epilogue, 0, 0, member.space_rank);
    int64_t elements = std::min(kTileElements, std::max<int64_t>(product(member.extents, member.space_rank), 1));
    int64_t bytes = 0;
    for (Type type : member.accumulators) bytes += round_up(elements * bytes_of(type), 64);
    bodies.tile_bytes = std::max(bodies.tile_bytes, bytes);
    for (int d = member.space_rank; d < member.rank; ++d) {
      reader.require(member.extents[d] > 0, "a reduction over nothing");
    }
    if (member.bounds.empty()) return bytes;
    reader.require(member.rank > member.space_rank && member.bounds.size() >= 2 && member.bounds.front() == 0 &&
                       member.bounds.back() == member.extents[member.space_rank],
                   "a split does not cover the reduced axis");
    for (size_t i = 1; i < member.bounds.size(); ++i) {
      reader.require(member.bounds[i - 1] < member.bounds[i], "a split has an empty part");
    }
    reader.require(member.outputs.size() == tiles, "a split has not one array per accumulator");
    for (size_t k = 0; k < tiles; ++k) {
      const int64_t splits = static_cast<int64_t>(member.bounds.size()) - 1;
      reader.require(!member.outputs[k].local && member.outputs[k].type == member.accumulators[k] &&
                         member.outputs[k].elements == splits * product(member.extents, member.space_rank),
                     "an array of partial accumulators does not fit its split");
    }
    return bytes;
  }

  void reduce(Member& member) {
    member.lane_axis = reader.in32(-1, member.space_rank, "first lane axis");
    member.commutative = reader.flag("whether a combination commutes");
    const int64_t fold = reader.in(-1, static_cast<int64_t>(symbols.size()) - 1, "fold");
    const Code& body = code(member.body, member, member.rank, 0);
    require_accumulators(member, body);
    if (member.lane_axis >= 0) {
      require_order(body, member.lane_axis, member.space_rank, member.rank);
    } else {
      require_order(body, 0, 0, member.rank);
    }
    if (fold >= 0) {
      constexpr Op ops[] = {Op::k_add, Op::k_mul, Op::k_max, Op::k_min, Op::k_and, Op::k_or, Op::k_xor};
      for (int f = 0; f < kFolds; ++f) {
        if (symbols[fold].op == static_cast<int>(ops[f])) member.fold = f;
      }
      reader.require(member.fold >= 0 && member.accumulators.size() == 1 && member.commutative &&
                         kernels().fold[member.fold][static_cast<int>(member.accumulators[0])] != nullptr,
                     "a fold does not fit its reduction");
    }
    reducing(member);
  }

  void contract(Member& member) {
    if (member.body >= 0) reader.require(code(member.body, member, 0, 0).results.size() <= 4, "too many window results");
    factor(member, member.lhs);
    factor(member, member.rhs);
    reader.require(member.accumulators.size() == 1, "a contraction has one accumulator");
    bodies.walk_bytes = std::max(bodies.walk_bytes, contract_scratch_bytes(member, reducing(member)));
  }

  void cumulative(Member& member) {
    member.lane_axis = reader.in32(-1, member.rank, "first lane axis");
    member.axis = reader.in32(0, member.rank - 1, "scanned axis");
    member.reverse = reader.flag("direction of a scan");
    member.sums = reader.flag("start of a scan");
    const Code& body = code(member.body, member, member.rank, 0);
    require_accumulators(member, body);
    reader.require(member.lane_axis < 0 || member.lane_axis == member.axis + 1, "lanes do not follow the scanned axis");
    if (member.lane_axis >= 0) {
      require_order(body, 0, 0, member.rank);
    } else {
      require_order(body, member.axis, member.axis + 1, member.rank);
    }
  }

  void update(Member& member) {
    const Code& body = code(member.body, member, member.rank, 0);
    require_order(body, 0, 0, member.rank);
    reader.require(member.outputs.size() == 1 && !member.operands.empty(), "an update has no base or no output");
    const Tensor &output = member.outputs[0], &base = member.operands.back();
    reader.require(base.type == output.type && base.rank == output.rank &&
                       std::equal(base.dims, base.dims + base.rank, output.dims),
                   "an update's base and output differ");
    const int64_t axes = reader.count("axes of an update", 5);
    reader.require(axes == output.rank, "an update has not one index per axis");
    const int64_t lane_bytes = body.lane_bytes;
    auto at = [&](int bytes, std::string_view what) {
      return reader.in32(-1, std::max<int64_t>(lane_bytes - bytes, -1), what);
    };
    int64_t constant = 0, strides[kMaxAxes] = {}, stride[kMaxAxes];
    int64_t size = 1;
    for (int d = output.rank - 1; d >= 0; --d) {
      stride[d] = output.local ? routine.locals[output.id].strides[d] : size;
      size *= output.dims[d];
    }
    for (int64_t d = 0; d < axes; ++d) {
      TargetIndex target;
      target.axis = reader.in32(-1, member.rank - 1, "axis of an index");
      target.constant = reader.in(-(int64_t{1} << 48), int64_t{1} << 48, "constant of an index");
      target.uniform_register = at(8, "register of an index");
      target.general_register = at(8, "register of an index");
      target.general_level = reader.in32(0, member.rank + 2, "level of an index");
      reader.require(target.general_register < 0 ||
                         (target.axis < 0 && target.constant == 0 && target.uniform_register < 0),
                     "an index is both structured and general");
      constant += target.constant * stride[d];
      if (target.axis >= 0) strides[target.axis] += stride[d];
      member.target.push_back(target);
    }
    member.combines = reader.flag("whether an update combines");
    member.bounds_register = at(1, "register of a bounds check");
    member.bounds_level = reader.in32(0, member.rank + 2, "level of a bounds check");
    member.target_access = reader.in32(0, static_cast<int64_t>(body.accesses.size()) - 1, "target of an update");
    const Access& access = body.accesses[member.target_access];
    // The bodies trust these offsets: they must be those of the indices that are checked.
    reader.require(access.stepped_only && access.constant == constant &&
                       static_cast<size_t>(access.slot) == member.operands.size() &&
                       std::equal(strides, strides + member.rank, access.strides),
                   "an update's target is not where its indices say");
    reader.require(body.results.size() == 1, "an update has one value");
    reader.require(member.combines ? body.accumulators.size() == 1 && body.accumulators[0].type == body.results[0].type
                                   : body.results[0].type == output.type,
                   "an update's value has the wrong type");
  }

  void sort(Member& member) {
    member.axis = reader.in32(0, member.rank - 1, "sorted axis");
    member.num_keys = reader.in32(1, static_cast<int64_t>(member.operands.size()), "number of keys");
    const int64_t n = member.extents[member.axis];
    reader.require(n < int64_t{1} << 31, "a sorted axis is too long");
    member.top_k = reader.in(-1, n, "k of a top-k");
    const size_t outputs = member.top_k >= 0 ? 2 : member.operands.size();
    reader.require(member.outputs.size() == outputs && (member.top_k < 0 || member.operands.size() == 1),
                   "a sort has the wrong number of arrays");
    for (size_t j = 0; j < member.operands.size() + outputs; ++j) {
      const bool output = j >= member.operands.size();
      const Tensor& tensor = output ? member.outputs[j - member.operands.size()] : member.operands[j];
      reader.require(tensor.rank == member.rank, "a sorted array has another rank");
      const bool positions = member.top_k >= 0 && j == 2;
      const Type type = positions ? Type::k_s32 : member.operands[output ? j - member.operands.size() : j].type;
      reader.require(tensor.type == type, "a sorted array has another type");
    }
    bodies.sort_bytes = std::max(bodies.sort_bytes, n * 8 * (member.num_keys + 2));
  }

  Member member() {
    Member out;
    out.kind = Member::Kind(decode_word(reader, symbols, Word::kMap, Word::kSort, "kind of a member"));
    out.rank = reader.in32(0, kMaxAxes, "rank of a member");
    out.space_rank = reader.in32(0, out.rank, "parallel axes of a member");
    for (int d = 0; d < out.rank; ++d) out.extents[d] = reader.size("extent of a member");
    const int64_t operands = reader.count("number of operands", 4);
    for (int64_t i = 0; i < operands; ++i) out.operands.push_back(tensor(false));
    const int64_t outputs = reader.count("number of outputs", 4);
    reader.require(outputs > 0, "a member writes nothing");
    for (int64_t i = 0; i < outputs; ++i) out.outputs.push_back(tensor(true));
    const int64_t codes = static_cast<int64_t>(bodies.codes.size());
    out.body = reader.in32(-1, codes - 1, "body");
    out.epilogue = reader.in32(-1, codes - 1, "epilogue");
    const int64_t bounds = reader.count("number of cut points");
    for (int64_t i = 0; i < bounds; ++i) out.bounds.push_back(reader.any("cut point"));
    const int64_t accumulators = reader.count("number of accumulators");
    reader.require(accumulators <= kMaxAccumulators, "too many accumulators");
    for (int64_t i = 0; i < accumulators; ++i) out.accumulators.push_back(decode_type(reader, symbols));
    switch (out.kind) {
      case Member::Kind::kMap:
        require_order(code(out.body, out, out.space_rank, 0), 0, 0, out.space_rank);
        reader.require(out.rank == out.space_rank, "a map reduces");
        break;
      case Member::Kind::kReduce: reduce(out); break;
      case Member::Kind::kContract: contract(out); break;
      case Member::Kind::kUpdate: update(out); break;
      case Member::Kind::kCumulative: cumulative(out); break;
      case Member::Kind::kSort: sort(out); break;
    }
    return out;
  }
};

}  // namespace

Routine decode_routine(WordReader& reader, const std::vector<Symbol>& symbols, const std::vector<Storage>& storages,
                       Bodies& bodies) {
  Routine routine;
  Decoder decoder{reader, symbols, storages, bodies, routine, 0};
  const int64_t locals = reader.count("number of local values", 3);
  for (int64_t i = 0; i < locals; ++i) routine.locals.push_back(decoder.local());
  const int64_t members = reader.count("number of members", 8);
  reader.require(members > 0, "a routine without members");
  for (; decoder.number < members; ++decoder.number) routine.members.push_back(decoder.member());
  return routine;
}

void check_boxes(const WordReader& reader, const Bodies& bodies, const Routine& routine, int32_t task) {
  const int32_t* rows = &bodies.task_box[bodies.task_box_start[task]];
  for (size_t m = 0; m < routine.members.size(); ++m) {
    const Member& member = routine.members[m];
    const int64_t* low = &bodies.boxes[static_cast<size_t>(rows[m]) * 2 * bodies.box_rank];
    const int64_t* high = low + bodies.box_rank;
    // Updates and sorts are cut by their output, whose extents are not those of the member's space.
    const bool by_output = member.kind == Member::Kind::kUpdate || member.kind == Member::Kind::kSort;
    const int rank = by_output ? member.outputs[0].rank : member.bounds.empty() ? member.space_rank : member.rank;
    const int64_t* extents = by_output ? member.outputs[0].dims : member.extents;
    auto fail = [&](int d) {
      reader.fail("task " + std::to_string(task) + " covers [" + std::to_string(low[d]) + ", " + std::to_string(high[d]) +
                  ") of axis " + std::to_string(d) + " of member " + std::to_string(m) + ", which has " +
                  std::to_string(extents[d]));
    };
    reader.require(rank <= bodies.box_rank, "boxes have fewer axes than a member");
    for (int d = 0; d < rank; ++d) {
      if (low[d] < 0 || high[d] < low[d] || high[d] > extents[d]) fail(d);
      if (!member.bounds.empty() && d >= member.space_rank && high[d] == low[d]) fail(d);
    }
    if (!member.bounds.empty() &&
        !std::binary_search(member.bounds.begin(), member.bounds.end() - 1, low[member.space_rank])) {
      fail(member.space_rank);
    }
    for (const Tensor& output : member.outputs) {
      if (!output.local) continue;
      const Local& local = routine.locals[output.id];
      reader.require(local.rank == rank, "a local value has another rank than the boxes of its member");
      for (int d = 0; d < rank; ++d) {
        if (high[d] - low[d] > local.extents[d]) fail(d);
      }
    }
  }
}

}  // namespace jax_mpk::host
