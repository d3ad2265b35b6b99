// The scalar operations of generated code: op_<name> for each operation of host/scalar_ops.def and each type it exists
// for. graph/semantics.py says what they mean; where XLA's GPU code differs from its CPU code, this follows the former:
//
// * Subnormal numbers are numbers: neither arguments nor results are flushed to zero.
// * f32 division is div.full (2 ulp), as XLA asks of its backend; f64 division and square roots are rounded once.
// * rsqrt is the machine's approximation (2 ulp), transcendental functions are those of CUDA's library (special
//   functions: special.cuh).
// * nextafter steps through subnormals.
//
// Sums, differences and products are never contracted into fused multiply-adds, whatever the compiler's flags: each is
// rounded once, and results do not depend on what happens to be fused. Loops that want an FMA say so (mpk::fma). XLA
// does contract inside its fusions; no rule predicts where. Flags that flush or replace functions of the library
// (--use_fast_math, --ftz) are never given.
#pragma once

#ifndef __CUDACC__
#include <math.h>
#endif

#include "convert.cuh"
#include "special.cuh"
#include "types.cuh"

namespace mpk {

// --- arithmetic ----------------------------------------------------------------------------------------------

// Signed overflow wraps: arithmetic happens on the unsigned type, at least 32 bits wide (as int, u16 * u16 could
// overflow).
template <class T>
MPK_DEVICE auto wrapping(T x) {
  if constexpr (sizeof(T) < 4) return static_cast<u32>(x);
  else return static_cast<UnsignedOf<T>>(x);
}

#ifdef __CUDA_ARCH__
#define MPK_ROUNDED(name, sign, intrinsic)                                               \
  MPK_DEVICE f32 name(f32 a, f32 b) { return __f##intrinsic##_rn(a, b); }                \
  MPK_DEVICE f64 name(f64 a, f64 b) { return __d##intrinsic##_rn(a, b); }
#else
#define MPK_ROUNDED(name, sign, intrinsic)                     \
  MPK_DEVICE f32 name(f32 a, f32 b) { return a sign b; }       \
  MPK_DEVICE f64 name(f64 a, f64 b) { return a sign b; }
#endif
#define MPK_ARITHMETIC(name, sign, intrinsic)                  \
  MPK_ROUNDED(name, sign, intrinsic)                           \
  template <class T>                                           \
  MPK_DEVICE T name(T a, T b) {                                \
    static_assert(kIsInt<T>);                                  \
    return static_cast<T>(wrapping(a) sign wrapping(b));       \
  }
MPK_ARITHMETIC(op_add, +, add)
MPK_ARITHMETIC(op_sub, -, sub)
MPK_ARITHMETIC(op_mul, *, mul)
#undef MPK_ARITHMETIC
#undef MPK_ROUNDED

// a * b + c, rounded once.
MPK_DEVICE f32 fma(f32 a, f32 b, f32 c) { return ::fmaf(a, b, c); }
MPK_DEVICE f64 fma(f64 a, f64 b, f64 c) { return ::fma(a, b, c); }

template <class T>
MPK_DEVICE T op_neg(T a) {
  if constexpr (kIsFloat<T>) return -a;
  else return static_cast<T>(0u - wrapping(a));
}

template <class T>
MPK_DEVICE T op_abs(T a) {
  if constexpr (kIsFloat<T>) return bitcast<T>(static_cast<UnsignedOf<T>>(bitcast<UnsignedOf<T>>(a) & ~kSignBit<T>));
  else return is_negative(a) ? op_neg(a) : a;
}

// Zeros and NaN stay themselves.
template <class T>
MPK_DEVICE T op_sign(T a) {
  if constexpr (kIsFloat<T>) return a > 0 ? T(1) : a < 0 ? T(-1) : a;
  else return is_negative(a) ? static_cast<T>(-1) : static_cast<T>(a != 0);
}

// x / 0 is all ones, INT_MIN / -1 is INT_MIN; x % 0 is x, x % -1 is 0.
template <class T>
MPK_DEVICE T op_div(T a, T b) {
  if constexpr (kSame<T, f32>) {
#ifdef __CUDA_ARCH__
    f32 quotient;
    asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
    return quotient;
#else
    return a / b;
#endif
  } else if constexpr (kSame<T, f64>) {
    return a / b;
  } else {
    if (b == 0) return static_cast<T>(-1);
    if (kIsSigned<T> && b == static_cast<T>(-1)) return op_neg(a);
    return static_cast<T>(a / b);
  }
}

template <class T>
MPK_DEVICE T op_rem(T a, T b) {
  if constexpr (kSame<T, f32>) {
    return ::fmodf(a, b);
  } else if constexpr (kSame<T, f64>) {
    return ::fmod(a, b);
  } else {
    if (b == 0) return a;
    if (kIsSigned<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
}

// NaN if either side is one; -0 lies below +0.
template <class T>
MPK_DEVICE T op_max(T a, T b) {
  if constexpr (kIsFloat<T>) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (kSame<T, f32>) {
      f32 larger;
      asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
      return larger;
    }
#endif
    using U = UnsignedOf<T>;
    const T both = bitcast<T>(static_cast<U>(bitcast<U>(a) & bitcast<U>(b)));
    const T larger = a == b ? both : a > b ? a : b;
    return a != a ? a : larger;
  } else {
    return a > b ? a : b;
  }
}

template <class T>
MPK_DEVICE T op_min(T a, T b) {
  if constexpr (kIsFloat<T>) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (kSame<T, f32>) {
      f32 smaller;
      asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(a), "f"(b));
      return smaller;
    }
#endif
    using U = UnsignedOf<T>;
    const T either = bitcast<T>(static_cast<U>(bitcast<U>(a) | bitcast<U>(b)));
    const T smaller = a == b ? either : a < b ? a : b;
    return a != a ? a : smaller;
  } else {
    return a < b ? a : b;
  }
}

// --- comparisons and selection -------------------------------------------------------------------------------

template <class T> MPK_DEVICE b1 op_eq(T a, T b) { return a == b; }
template <class T> MPK_DEVICE b1 op_ne(T a, T b) { return a != b; }
template <class T> MPK_DEVICE b1 op_lt(T a, T b) { return a < b; }
template <class T> MPK_DEVICE b1 op_le(T a, T b) { return a <= b; }
template <class T> MPK_DEVICE b1 op_gt(T a, T b) { return a > b; }
template <class T> MPK_DEVICE b1 op_ge(T a, T b) { return a >= b; }
template <class T> MPK_DEVICE T op_select(b1 which, T if_true, T if_false) { return which ? if_true : if_false; }
template <class T> MPK_DEVICE T op_move(T a) { return a; }

template <class T>
MPK_DEVICE b1 op_is_finite(T a) {
  return op_abs(a) < bitcast<T>(kInfinityBits<T>);
}

// --- bits ----------------------------------------------------------------------------------------------------

template <class T> MPK_DEVICE T op_and(T a, T b) { return static_cast<T>(a & b); }
template <class T> MPK_DEVICE T op_or(T a, T b) { return static_cast<T>(a | b); }
template <class T> MPK_DEVICE T op_xor(T a, T b) { return static_cast<T>(a ^ b); }
template <class T>
MPK_DEVICE T op_not(T a) {
  if constexpr (kIsBool<T>) return !a;
  else return static_cast<T>(~a);
}

// A shift by the width or more, or by a negative amount, moves everything out.
template <class T>
MPK_DEVICE T op_shl(T a, T b) {
  const UnsignedOf<T> amount = static_cast<UnsignedOf<T>>(b);
  return amount < kWidth<T> ? static_cast<T>(wrapping(a) << amount) : T(0);
}
template <class T>
MPK_DEVICE T op_shr_logical(T a, T b) {
  const UnsignedOf<T> amount = static_cast<UnsignedOf<T>>(b);
  return amount < kWidth<T> ? static_cast<T>(static_cast<UnsignedOf<T>>(a) >> amount) : T(0);
}
template <class T>
MPK_DEVICE T op_shr_arith(T a, T b) {
  const UnsignedOf<T> amount = static_cast<UnsignedOf<T>>(b);
  constexpr UnsignedOf<T> last = kWidth<T> - 1;
  return static_cast<T>(static_cast<SignedOf<T>>(a) >> (amount < last ? amount : last));
}

template <int left, class T>
MPK_DEVICE T op_rotate_left(T a) {
  static_assert(0 < left && left < kWidth<T>);
  return static_cast<T>(a << left | a >> (kWidth<T> - left));
}

template <class T>
MPK_DEVICE T op_popcount(T a) {
  const UnsignedOf<T> bits = static_cast<UnsignedOf<T>>(a);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 8) return static_cast<T>(__popcll(bits));
  else return static_cast<T>(__popc(bits));
#else
  return static_cast<T>(__builtin_popcountll(bits));
#endif
}

template <class T>
MPK_DEVICE T op_clz(T a) {
  const UnsignedOf<T> bits = static_cast<UnsignedOf<T>>(a);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 8) return static_cast<T>(__clzll(bits));
  else return static_cast<T>(__clz(bits) - (32 - kWidth<T>));
#else
  return static_cast<T>(bits == 0 ? kWidth<T> : __builtin_clzll(bits) - (64 - kWidth<T>));
#endif
}

// --- roundings -----------------------------------------------------------------------------------------------

MPK_DEVICE f32 op_floor(f32 a) { return ::floorf(a); }
MPK_DEVICE f64 op_floor(f64 a) { return ::floor(a); }
MPK_DEVICE f32 op_ceil(f32 a) { return ::ceilf(a); }
MPK_DEVICE f64 op_ceil(f64 a) { return ::ceil(a); }
MPK_DEVICE f32 op_round_even(f32 a) { return ::rintf(a); }
MPK_DEVICE f64 op_round_even(f64 a) { return ::rint(a); }
MPK_DEVICE f32 op_round_away(f32 a) { return ::roundf(a); }
MPK_DEVICE f64 op_round_away(f64 a) { return ::round(a); }

// Rounds the mantissa to nearest even; what the smaller exponent cannot hold becomes infinity or (signed) zero.
template <int exponent_bits, int mantissa_bits, class T>
MPK_DEVICE T op_reduce_precision(T a) {
  using U = UnsignedOf<T>;
  constexpr int exponent_width = kWidth<T> - 1 - kMantissa<T>;
  const U bits = bitcast<U>(a);
  U reduced = bits;
  if constexpr (mantissa_bits < kMantissa<T>) {
    constexpr int drop = kMantissa<T> - mantissa_bits;
    constexpr U half = (U(1) << (drop - 1)) - 1, keep = ~((U(1) << drop) - 1);
    reduced = (bits + half + (bits >> drop & 1)) & keep;
  }
  if constexpr (exponent_bits < exponent_width) {
    constexpr U bias = (U(1) << (exponent_width - 1)) - 1, reduced_bias = (U(1) << (exponent_bits - 1)) - 1;
    constexpr U highest = (bias + reduced_bias) << kMantissa<T>, lowest = (bias - reduced_bias) << kMantissa<T>;
    const U exponent = reduced & kInfinityBits<T>, sign = reduced & kSignBit<T>;
    reduced = exponent > highest ? sign | kInfinityBits<T> : exponent <= lowest ? sign : reduced;
  }
  return (bits & ~kSignBit<T>) > kInfinityBits<T> ? a : bitcast<T>(reduced);
}

// The next number towards b, by bits. Equal numbers give b.
template <class T>
MPK_DEVICE T op_nextafter(T a, T b) {
  using U = UnsignedOf<T>;
  constexpr U sign = kSignBit<T>;
  const U from = bitcast<U>(a), to = bitcast<U>(b);
  const U from_size = from & static_cast<U>(~sign), to_size = to & static_cast<U>(~sign);
  if (from_size > kInfinityBits<T> || to_size > kInfinityBits<T>) return bitcast<T>(kNanBits<T>);
  if (from == to || (from_size | to_size) == 0) return b;
  if (from_size == 0) return bitcast<T>(static_cast<U>((to & sign) | 1));
  const bool away = from_size < to_size && (from & sign) == (to & sign);
  return bitcast<T>(static_cast<U>(away ? from + 1 : from - 1));
}

// --- functions of the mathematics library --------------------------------------------------------------------

// Short ones are inlined; the others, written out at each of their uses, would take registers from all the kernel.
#define MPK_LIBRARY(how, name)                             \
  how f32 op_##name(f32 a) { return ::name##f(a); }        \
  MPK_FUNCTION f64 op_##name(f64 a) { return ::name(a); }
MPK_LIBRARY(MPK_DEVICE, exp)
MPK_LIBRARY(MPK_DEVICE, exp2)
MPK_LIBRARY(MPK_DEVICE, log)
MPK_LIBRARY(MPK_FUNCTION, expm1)
MPK_LIBRARY(MPK_FUNCTION, log1p)
MPK_LIBRARY(MPK_FUNCTION, cbrt)
MPK_LIBRARY(MPK_FUNCTION, sin)
MPK_LIBRARY(MPK_FUNCTION, cos)
MPK_LIBRARY(MPK_FUNCTION, tan)
MPK_LIBRARY(MPK_FUNCTION, asin)
MPK_LIBRARY(MPK_FUNCTION, acos)
MPK_LIBRARY(MPK_FUNCTION, atan)
MPK_LIBRARY(MPK_FUNCTION, sinh)
MPK_LIBRARY(MPK_FUNCTION, cosh)
MPK_LIBRARY(MPK_FUNCTION, tanh)
MPK_LIBRARY(MPK_FUNCTION, asinh)
MPK_LIBRARY(MPK_FUNCTION, acosh)
MPK_LIBRARY(MPK_FUNCTION, atanh)
MPK_LIBRARY(MPK_FUNCTION, erf)
MPK_LIBRARY(MPK_FUNCTION, erfc)
#undef MPK_LIBRARY

MPK_FUNCTION f32 op_pow(f32 a, f32 b) { return ::powf(a, b); }
MPK_FUNCTION f64 op_pow(f64 a, f64 b) { return ::pow(a, b); }
MPK_DEVICE f32 op_atan2(f32 a, f32 b) { return ::atan2f(a, b); }
MPK_DEVICE f64 op_atan2(f64 a, f64 b) { return ::atan2(a, b); }

#ifdef __CUDA_ARCH__
MPK_DEVICE f32 op_sqrt(f32 a) { return __fsqrt_rn(a); }
MPK_DEVICE f32 op_rsqrt(f32 a) { return ::rsqrtf(a); }
MPK_DEVICE f64 op_rsqrt(f64 a) { return ::rsqrt(a); }
#else
MPK_DEVICE f32 op_sqrt(f32 a) { return ::sqrtf(a); }
MPK_DEVICE f32 op_rsqrt(f32 a) { return 1 / ::sqrtf(a); }
MPK_DEVICE f64 op_rsqrt(f64 a) { return 1 / ::sqrt(a); }
#endif
MPK_DEVICE f64 op_sqrt(f64 a) { return ::sqrt(a); }

template <class T>
MPK_DEVICE T op_logistic(T a) {
  return op_div(T(1), op_add(T(1), op_exp(-a)));
}

}  // namespace mpk
