// Moving lanes between memory and registers, by element size. Plain loops: they wait for memory, not for arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace jax_mpk::host {

// out[i] = from[offset + i * stride]
void gather_strided(int bytes, std::byte* out, const std::byte* from, int64_t offset, int64_t stride, int64_t n);
// to[offset + i * stride] = from[i]
void scatter_strided(int bytes, std::byte* to, int64_t offset, int64_t stride, const std::byte* from, int64_t n);
// out[i] = from[offsets[i]], or 0 where predicate (if any) is false or the offset lies outside [low, high)
void gather_checked(int bytes, std::byte* out, const std::byte* from, const int64_t* offsets, const uint8_t* predicate,
                    int64_t low, int64_t high, int64_t n);
// to[offsets[i]] = from[i]
void scatter(int bytes, std::byte* to, const int64_t* offsets, const std::byte* from, int64_t n);

}  // namespace jax_mpk::host
