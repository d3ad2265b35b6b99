#include "host/vm_kernels.h"

#include <atomic>
#include <cstring>

namespace jax_mpk::host {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::kBase:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBase;
}

// Filling a table runs code of its instruction set, so only supported ones are made.
KernelTable make_table(Isa isa) {
  KernelTable table;
  std::memset(&table, 0, sizeof table);
  if (!supported(isa)) return table;
  add_special(table);
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      add_arithmetic_avx512(table), add_bits_avx512(table), add_convert_avx512(table), add_math_avx512(table);
      break;
    case Isa::kAvx2:
      add_arithmetic_avx2(table), add_bits_avx2(table), add_convert_avx2(table), add_math_avx2(table);
      break;
#endif
    default:
      add_arithmetic_base(table), add_bits_base(table), add_convert_base(table), add_math_base(table);
  }
  return table;
}

}  // namespace

const KernelTable* kernels_for(Isa isa) {
  static const KernelTable tables[] = {make_table(Isa::kBase), make_table(Isa::kAvx2), make_table(Isa::kAvx512)};
  return supported(isa) ? &tables[static_cast<int>(isa)] : nullptr;
}

namespace {

const KernelTable* best() {
  if (const KernelTable* table = kernels_for(Isa::kAvx512)) return table;
  if (const KernelTable* table = kernels_for(Isa::kAvx2)) return table;
  return kernels_for(Isa::kBase);
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{best()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool use_kernels(Isa isa) {
  const KernelTable* table = kernels_for(isa);
  if (table != nullptr) chosen().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace jax_mpk::host
