// Conversions between all element types.
//
// Float to integer truncates, saturates and takes NaN to 0; anything to b1 is x != 0; integers wrap. f16 and bf16 are
// rounded to nearest even and keep NaN. From f64 and wide integers they are rounded once, as XLA's GPU code does (its
// CPU code goes through f32 and rounds twice).
#pragma once

#include "types.cuh"

namespace mpk {

// --- f16 and bf16 beside f32 ---------------------------------------------------------------------------------

MPK_DEVICE f32 widen(bf16 x) { return bitcast<f32>(static_cast<u32>(x.bits) << 16); }
MPK_DEVICE f32 widen(f16 x) {
#ifdef __CUDA_ARCH__
  f32 wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const u32 sign = static_cast<u32>(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const u32 special = 0x7f800000u | mantissa << 13 | (mantissa != 0 ? 0x400000u : 0);
  const u32 normal = (exponent + 112) << 23 | mantissa << 13;
  const u32 subnormal = bitcast<u32>(static_cast<f32>(mantissa) * 5.9604644775390625e-8f);  // 2**-24
  return bitcast<f32>(sign | (exponent == 31 ? special : exponent == 0 ? subnormal : normal));
#endif
}

template <class To> MPK_DEVICE To narrow(f32 x);
template <>
MPK_DEVICE bf16 narrow<bf16>(f32 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u32 bits;  // of two: the conversion of one is made by a slower unit
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(0.0f), "f"(x));
  return bf16{static_cast<u16>(bits)};
#else
  const u32 bits = bitcast<u32>(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bf16{static_cast<u16>(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}
template <>
MPK_DEVICE f16 narrow<f16>(f32 x) {
#ifdef __CUDA_ARCH__
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return f16{bits};
#else
  const u32 bits = bitcast<u32>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffffu;
  const u32 nan = 0x7e00u | (size >> 13 & 0x3ff);
  const u32 normal = (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13;
  // Below 2**-14: adding 0.5 leaves the multiple of 2**-24 in the low bits, rounded to even.
  const u32 subnormal = bitcast<u32>(bitcast<f32>(size) + 0.5f) - 0x3f000000u;
  const u32 value = size > 0x7f800000u    ? nan
                    : size >= 0x477ff000u ? 0x7c00u
                    : size < 0x38800000u  ? subnormal
                                          : normal;
  return f16{static_cast<u16>(sign | value)};
#endif
}

// Two values rounded into one word, the first in the low half: what a vector store of bf16 wants.
MPK_DEVICE u32 narrow_pair(f32 low, f32 high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return narrow<bf16>(low).bits | static_cast<u32>(narrow<bf16>(high).bits) << 16;
#endif
}

// x as an f32 that rounds on to a narrower type as x itself would: bits beyond its mantissa leave a trace in the last
// one ("round to odd").
MPK_DEVICE f32 for_rounding(f32 x) { return x; }
MPK_DEVICE f32 for_rounding(f64 x) {
#ifdef __CUDA_ARCH__
  const f32 near = __double2float_rz(x);
#else
  f32 near = static_cast<f32>(x);
  const f64 size = static_cast<f64>(near) < 0 ? -static_cast<f64>(near) : static_cast<f64>(near);
  if (size > (x < 0 ? -x : x)) near = bitcast<f32>(bitcast<u32>(near) - 1);  // towards zero
#endif
  const bool inexact = x == x && static_cast<f64>(near) != x;
  return bitcast<f32>(bitcast<u32>(near) | (inexact ? 1u : 0u));
}
template <class T>
MPK_DEVICE f32 for_rounding(T x) {
  static_assert(kIsInt<T>);
  if constexpr (sizeof(T) < 4) {
    return static_cast<f32>(x);
  } else {
    const bool negative = is_negative(x);
    u64 size = static_cast<u64>(x);
    size = negative ? 0 - size : size;
    // f64 holds 52 bits of it; what lies below them leaves its trace in the lowest.
    const bool trace = (size & 0xfffu) != 0;
    const u64 high = size >> 52 != 0 ? (size & ~u64(0xfff)) | (trace ? 0x1000u : 0u) : size;
    const f32 wide = for_rounding(static_cast<f64>(high));
    return negative ? -wide : wide;
  }
}

// --- float to integer ----------------------------------------------------------------------------------------

// The machine's conversion saturates; NaN gives 0 only from f32 to 32 bits.
template <class To, class From>
MPK_DEVICE To truncate(From x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(To) < 4) {
    constexpr s32 most = static_cast<s32>(static_cast<UnsignedOf<To>>(-1) >> (kIsSigned<To> ? 1 : 0));
    constexpr s32 least = kIsSigned<To> ? -most - 1 : 0;
    const s32 wide = truncate<s32>(x);
    return static_cast<To>(wide < least ? least : wide > most ? most : wide);
  } else {
    To whole;
    if constexpr (sizeof(To) == 4 && kIsSigned<To>) {
      if constexpr (kSame<From, f32>) whole = __float2int_rz(x);
      else whole = __double2int_rz(x);
    } else if constexpr (sizeof(To) == 4) {
      if constexpr (kSame<From, f32>) whole = __float2uint_rz(x);
      else whole = __double2uint_rz(x);
    } else if constexpr (kIsSigned<To>) {
      if constexpr (kSame<From, f32>) whole = __float2ll_rz(x);
      else whole = __double2ll_rz(x);
    } else {
      if constexpr (kSame<From, f32>) whole = __float2ull_rz(x);
      else whole = __double2ull_rz(x);
    }
    return x != x ? To(0) : whole;
  }
#else
  constexpr int width = kWidth<To>;
  constexpr From high = kIsSigned<To> ? From(u64(1) << (width - 1)) : From(2) * From(u64(1) << (width - 1));
  constexpr From low = kIsSigned<To> ? -high : From(0);
  constexpr To most = static_cast<To>(static_cast<UnsignedOf<To>>(-1) >> (kIsSigned<To> ? 1 : 0));
  constexpr To least = kIsSigned<To> ? static_cast<To>(~most) : To(0);
  if (x != x) return 0;
  return x >= high ? most : x <= low ? least : static_cast<To>(x);
#endif
}

// --- all pairs -----------------------------------------------------------------------------------------------

template <class To, class From>
MPK_DEVICE To convert(From x) {
  if constexpr (kSame<To, From>) {
    return x;
  } else if constexpr (kIsHalf<From>) {
    return convert<To>(widen(x));
  } else if constexpr (kIsBool<To>) {
    return x != 0;
  } else if constexpr (kIsBool<From>) {
    return convert<To>(static_cast<s32>(x));
  } else if constexpr (kIsHalf<To>) {
    return narrow<To>(for_rounding(x));
  } else if constexpr (kIsFloat<From> && kIsInt<To>) {
    return truncate<To>(x);
  } else {
    return static_cast<To>(x);
  }
}

}  // namespace mpk
