// The vector VM's kernels: one function per operation and type, in versions for several instruction sets.
#pragma once

#include <cstdint>
#include <string_view>

#include "host/types.h"

namespace jax_mpk::host {

// Applies an operation to n lanes. Registers are 64-byte aligned and hold a multiple of kBlock lanes: a kernel
// may read and write whole blocks of them, so lanes from n to the end of the last block are undefined afterwards.
// The result may be the same register as an argument of the same size; registers never overlap otherwise.
using Kernel = void (*)(void* out, const void* a, const void* b, const void* c, int64_t n, int64_t immediate);

inline constexpr int64_t kBlock = 16;

// How neighbouring lanes join in a fold: reduces n lanes of `a` to one, out[0], in a fixed tree (the upper half
// onto the lower one, again and again); `a` is overwritten.
enum class Fold : uint8_t { kSum, kProd, kMax, kMin, kAnd, kOr, kXor };
inline constexpr int kFolds = 7;

struct KernelTable {
  Kernel op[kOps][kTypes];
  Kernel convert[kTypes][kTypes];  // [from][to]
  Kernel fold[kFolds][kTypes];
  Kernel fill[kTypes];  // all lanes = the value at `a`
};

enum class Isa : uint8_t { kBase, kAvx2, kAvx512 };

// Null where this machine cannot run the instruction set.
const KernelTable* kernels_for(Isa isa);
// The best one that the machine can run, or the one chosen by use_kernels().
const KernelTable& kernels();
// For tests: programs parsed from now on use this instruction set. False where the machine has it not.
bool use_kernels(Isa isa);

// What the files per instruction set provide; each adds its part of the table.
#define JAX_MPK_VM_PARTS(suffix)            \
  void add_arithmetic_##suffix(KernelTable&); \
  void add_bits_##suffix(KernelTable&);       \
  void add_convert_##suffix(KernelTable&);    \
  void add_math_##suffix(KernelTable&);
JAX_MPK_VM_PARTS(base)
JAX_MPK_VM_PARTS(avx2)
JAX_MPK_VM_PARTS(avx512)
// Functions that are too rare to vectorise, the same code for every machine.
void add_special(KernelTable&);

}  // namespace jax_mpk::host
