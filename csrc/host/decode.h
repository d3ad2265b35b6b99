// Decoding of the parts of a word stream that bodies are made of. The order of the words is that of
// jax_mpk/codegen/encode.py, which documents it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "host/bodies.h"
#include "host/word_reader.h"

namespace jax_mpk::host {

// Names that are neither instructions nor element types: kinds of members, of storages and of schedule items, in
// the order of the enumerations they stand for.
enum class Word { kMap, kReduce, kContract, kUpdate, kCumulative, kSort, kInput, kOutput, kWorkspace, kSegment, kLoop,
                  kBranch };
inline constexpr std::string_view kWords[] = {"map",   "reduce", "contract",  "update",  "cumulative", "sort",
                                              "input", "output", "workspace", "segment", "loop",       "branch"};

// What a name of the symbol table stands for.
struct Symbol {
  std::string name;
  Instruction instruction;   // registers and immediate not yet set
  bool is_instruction = false;
  int arity = 0;
  int argument_bytes[3] = {};  // lane sizes of the arguments
  int op = -1;                 // Op, if the instruction is one
  int type = -1;               // Type, if the name is one
  int word = -1;               // Word, if the name is one
};

std::vector<Symbol> decode_symbols(WordReader& reader);
Type decode_type(WordReader& reader, const std::vector<Symbol>& symbols);
// A word between two others, counted from the first.
int decode_word(WordReader& reader, const std::vector<Symbol>& symbols, Word first, Word last, std::string_view what);
Code decode_code(WordReader& reader, const std::vector<Symbol>& symbols);
// Also makes room in `bodies` for what its members need as scratch.
Routine decode_routine(WordReader& reader, const std::vector<Symbol>& symbols, const std::vector<Storage>& storages,
                       Bodies& bodies);
// Checks the boxes of one task.
void check_boxes(const WordReader& reader, const Bodies& bodies, const Routine& routine, int32_t task);

}  // namespace jax_mpk::host
