#include <algorithm>
#include <cstring>
#include <iterator>

#include "host/decode.h"
#include "host/vm.h"

namespace jax_mpk::host {
namespace {

int find_type(std::string_view name) {
  for (int t = 0; t < kTypes; ++t) {
    if (kTypeName[t] == name) return t;
  }
  return -1;
}

// "name.type", or "name.type.type"; types are −1 where missing or unknown.
struct Parts {
  std::string_view name;
  int first = -1, second = -1;
  int dots = 0;
};

Parts split(std::string_view text) {
  Parts parts;
  const size_t a = text.find('.');
  parts.name = text.substr(0, a);
  if (a == text.npos) return parts;
  parts.dots = 1;
  const size_t b = text.find('.', a + 1);
  parts.first = find_type(text.substr(a + 1, b == text.npos ? b : b - a - 1));
  if (b == text.npos) return parts;
  parts.dots = 2;
  parts.second = find_type(text.substr(b + 1));
  return parts;
}

int find_word(std::string_view name) {
  for (size_t w = 0; w < std::size(kWords); ++w) {
    if (kWords[w] == name) return static_cast<int>(w);
  }
  return -1;
}

bool is_half(int type) { return Type(type) == Type::k_f16 || Type(type) == Type::k_bf16; }

// False where the name stands for no instruction.
bool resolve(Symbol& symbol) {
  const Parts parts = split(symbol.name);
  Instruction& in = symbol.instruction;
  in = {};
  if (parts.dots == 0 || parts.first < 0 || (parts.dots == 2 && parts.second < 0)) return false;
  const Type first = Type(parts.first);
  const KernelTable& table = kernels();
  using Kind = Instruction::Kind;
  if (parts.dots == 2) {
    const Type second = Type(parts.second);
    if (parts.name == "convert") {
      in.kind = Kind::kKernel;
      in.kernel = table.convert[parts.first][parts.second];
      in.out_bytes = static_cast<uint8_t>(bytes_of(second));
      symbol.arity = 1;
      symbol.argument_bytes[0] = bytes_of(first);
      return true;
    }
    const bool widened = is_half(parts.first) && second == Type::k_f32;
    if ((parts.name != "load" && parts.name != "store") || (first != second && !widened)) return false;
    in.memory = first, in.reg = second;
    if (parts.name == "load") {
      in.kind = Kind::kLoad;
      in.out_bytes = static_cast<uint8_t>(bytes_of(second));
      if (widened) in.kernel = table.convert[parts.first][parts.second];
    } else {
      in.kind = Kind::kStore;
      symbol.arity = 1;
      symbol.argument_bytes[0] = bytes_of(second);
      if (widened) in.kernel = table.convert[parts.second][parts.first];
    }
    return true;
  }
  in.out_bytes = static_cast<uint8_t>(bytes_of(first));
  if (parts.name == "const") {
    in.kind = Kind::kConst;
    return true;
  }
  if (parts.name == "coord") {
    in.kind = Kind::kCoord;
    return first == Type::k_s64;
  }
  for (int op = 0; op < kOps; ++op) {
    if (kOpInfo[op].name != parts.name) continue;
    in.kind = Kind::kKernel;
    in.kernel = table.op[op][parts.first];
    symbol.op = op;
    symbol.arity = kOpInfo[op].arity;
    std::fill(symbol.argument_bytes, symbol.argument_bytes + 3, bytes_of(first));
    if (Op(op) == Op::k_select) symbol.argument_bytes[0] = 1;
    const bool to_bool = (Op(op) >= Op::k_eq && Op(op) <= Op::k_ge) || Op(op) == Op::k_is_finite;
    if (to_bool) in.out_bytes = 1;
    return in.kernel != nullptr;
  }
  return false;
}

int32_t decode_register(WordReader& reader, const Code& code, int bytes, std::string_view what) {
  return reader.in32(-1, std::max<int64_t>(code.lane_bytes - bytes, -1), what);
}

Access decode_access(WordReader& reader, const Code& code) {
  Access access;
  access.slot = reader.in32(0, 1 << 20, "slot of an access");
  access.constant = reader.any("constant of an access");
  access.offset_register = decode_register(reader, code, 8, "offset register");
  access.offset_level = reader.in32(0, code.rank + 2, "level of an offset register");
  access.predicate_register = decode_register(reader, code, 1, "predicate register");
  access.predicate_level = reader.in32(0, code.rank + 2, "level of a predicate register");
  access.stepped_only = reader.flag("whether an access is only stepped");
  // Tiles are as large as the box that is walked: what steps through one in order needs no bounds.
  reader.require(access.slot < code.first_tile || (access.offset_register < 0 && access.predicate_register < 0),
                 "a tile has an offset or predicate register");
  for (int p = 0; p < code.rank; ++p) access.strides[p] = reader.any("stride of an access");
  return access;
}

Instruction decode_instruction(WordReader& reader, const std::vector<Symbol>& symbols, Code& code) {
  const uint64_t head = static_cast<uint64_t>(reader.any("instruction"));
  const uint64_t registers = static_cast<uint64_t>(reader.any("registers of an instruction"));
  const int64_t immediate = reader.any("immediate of an instruction");
  const uint64_t number = head & 0xffffffff, level = head >> 32;
  reader.require(number < symbols.size() && symbols[number].is_instruction, "no such instruction");
  const Symbol& symbol = symbols[number];
  reader.require(level <= static_cast<uint64_t>(code.rank) + 2, "an instruction's result is used at no level");
  Instruction in = symbol.instruction;
  in.use_level = static_cast<uint8_t>(level);
  in.out = static_cast<uint16_t>(registers);
  in.a = static_cast<uint16_t>(registers >> 16);
  in.b = static_cast<uint16_t>(registers >> 32);
  in.c = static_cast<uint16_t>(registers >> 48);
  in.immediate = immediate;
  auto fits = [&](uint16_t at, int bytes) { return at + bytes <= code.lane_bytes; };
  const uint16_t arguments[] = {in.a, in.b, in.c};
  for (int i = 0; i < 3; ++i) {
    const bool used = i < symbol.arity;
    reader.require(fits(arguments[i], used ? symbol.argument_bytes[i] : 0), "an instruction reads no such register");
  }
  using Kind = Instruction::Kind;
  if (in.kind != Kind::kStore) reader.require(fits(in.out, in.out_bytes), "an instruction writes no such register");
  if (in.kind == Kind::kLoad || in.kind == Kind::kStore) {
    reader.require(immediate >= 0 && immediate < static_cast<int64_t>(code.accesses.size()), "no such access");
    const Access& access = code.accesses[immediate];
    reader.require(!access.stepped_only, "an access that is only stepped is loaded or stored");
    reader.require(in.kind == Kind::kLoad || (access.offset_register < 0 && access.predicate_register < 0),
                   "a store has an offset or predicate register");
  }
  if (in.kind == Kind::kCoord) {
    reader.require(immediate >= 0 && immediate < code.rank, "no such coordinate");
    code.coords_used |= uint64_t{1} << immediate;
  }
  return in;
}

}  // namespace

std::vector<Symbol> decode_symbols(WordReader& reader) {
  const int64_t n = reader.count("number of symbols");
  std::vector<Symbol> symbols(static_cast<size_t>(n));
  for (Symbol& symbol : symbols) {
    symbol.name = reader.text("symbol");
    symbol.type = find_type(symbol.name);
    symbol.is_instruction = resolve(symbol);
    symbol.word = find_word(symbol.name);
    if (symbol.type < 0 && symbol.word < 0 && !symbol.is_instruction) {
      reader.fail("this build knows no instruction " + symbol.name);
    }
  }
  return symbols;
}

Type decode_type(WordReader& reader, const std::vector<Symbol>& symbols) {
  const int64_t number = reader.in(0, static_cast<int64_t>(symbols.size()) - 1, "element type");
  reader.require(symbols[number].type >= 0, "a symbol that is no element type stands for one");
  return Type(symbols[number].type);
}

int decode_word(WordReader& reader, const std::vector<Symbol>& symbols, Word first, Word last, std::string_view what) {
  const int64_t number = reader.in(0, static_cast<int64_t>(symbols.size()) - 1, what);
  const int word = symbols[number].word;
  if (word < static_cast<int>(first) || word > static_cast<int>(last)) {
    reader.fail(symbols[number].name + " stands for " + std::string(what));
  }
  return word - static_cast<int>(first);
}

Code decode_code(WordReader& reader, const std::vector<Symbol>& symbols) {
  Code code;
  code.rank = reader.in32(0, kMaxAxes, "rank of a code");
  uint64_t seen = 0;
  for (int p = 0; p < code.rank; ++p) {
    code.order[p] = reader.in32(0, code.rank - 1, "axis of a loop");
    seen |= uint64_t{1} << code.order[p];
  }
  reader.require(seen + 1 == uint64_t{1} << code.rank, "loops do not cover all axes");
  code.coords_used = 0;
  code.lane_bytes = reader.in(0, 65535, "size of the registers");
  code.max_lanes = kRegisterBytes / std::max<int64_t>(code.lane_bytes, 1) / kMinLanes * kMinLanes;
  code.max_lanes = std::clamp(code.max_lanes, kMinLanes, kMaxLanes);
  code.first_tile = reader.in32(0, 1 << 20, "first tile");
  const int64_t accesses = reader.count("number of accesses", 7);
  for (int64_t i = 0; i < accesses; ++i) code.accesses.push_back(decode_access(reader, code));
  code.begin = reader.packed(0, INT32_MAX, "levels of a code");
  reader.require(code.begin.size() == static_cast<size_t>(code.rank) + 4 && code.begin[0] == 0 &&
                     std::is_sorted(code.begin.begin(), code.begin.end()),
                 "levels of a code are not in order");
  const int64_t instructions = reader.count("number of instructions", 3);
  reader.require(code.begin.back() == instructions, "levels of a code do not cover its instructions");
  for (int64_t i = 0; i < instructions; ++i) {
    code.instructions.push_back(decode_instruction(reader, symbols, code));
  }
  for (std::vector<Register>* list : {&code.results, &code.accumulators}) {
    const int64_t n = reader.count("number of results", 2);
    for (int64_t i = 0; i < n; ++i) {
      Register r;
      const int64_t at = reader.in(0, 65535, "register of a result");
      r.at = static_cast<uint16_t>(at);
      r.type = decode_type(reader, symbols);
      reader.require(at + bytes_of(r.type) <= code.lane_bytes, "a result is in no register");
      list->push_back(r);
    }
  }
  reader.require(code.accumulators.size() <= static_cast<size_t>(kMaxAccumulators), "too many accumulators");
  code.scratch_bytes = walk_scratch_bytes(code);
  return code;
}

}  // namespace jax_mpk::host
