// Matrix kernels of the CPU executor: one tile of a batched contraction with f32, f64 or s32
// accumulation.
#pragma once

#include <cstdint>

namespace jax_mpk::host {

enum class ElementType : uint8_t { kF32, kBF16, kF16, kF64, kS32, kS8, kU8 };

// acc[b, m, n] (+)= sum over k of lhs[b, m, k] * rhs[b, n, k]. Strides are in elements and may be
// zero or negative for lhs and rhs; pointers need no alignment, not even to their element.
struct ContractArgs {
  ElementType lhs_type, rhs_type, acc_type;
  const void* lhs;
  const void* rhs;
  void* acc;
  int64_t b, m, n, k;
  int64_t lhs_b, lhs_m, lhs_k;
  int64_t rhs_b, rhs_n, rhs_k;
  int64_t acc_b, acc_m, acc_n;
  bool accumulate;  // add to acc instead of overwriting it
};

// Computes the tile and returns true, or returns false and touches nothing. Accumulators and
// operands:
//
//   f32   f32, bf16, f16, each on either side; products of 16-bit operands are exact
//   f64   f64
//   s32   s32, s8, u8, each on either side, wrapping around
//
// Refused are other types and an acc whose elements coincide (a stride of zero). acc must not
// overlap the operands. Strides that step through memory without any unit stride are correct but
// slow.
//
// Order of the sum. Where rhs is contiguous along k and m is small (or lhs and n, roles swapped),
// each element is a dot product with a fixed set of partial sums per 2048 of k. Everywhere else k
// is cut into chains of kContractChain; each starts from zero and is added to acc when complete.
// Neither depends on where the element lies in the tile, so tiles along m and n may be cut anywhere
// within one of the two forms, and calls that cut k at multiples of the step and accumulate give
// the bits of a single call. The bits depend on the instruction set: the portable kernel has no
// fused multiply-add on x86-64.
bool contract_tile(const ContractArgs& args);

inline constexpr int64_t kContractChain = 256;

// The implementations behind contract_tile, which takes the best one that the CPU has. For tests.
enum class ContractIsa { kPortable, kAvx2, kAvx512 };
bool contract_isa_supported(ContractIsa isa);
bool contract_tile_with(ContractIsa isa, const ContractArgs& args);

}  // namespace jax_mpk::host
