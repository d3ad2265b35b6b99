// Loops over lanes that the kernel files instantiate, once per instruction set.
//
// Everything is in an anonymous namespace, and no inline library function is used: the linker keeps one copy of
// those for all files, and that copy might be the one for the wrong instruction set.
#pragma once

#include <cstdint>

#include "host/vm_kernels.h"

// Joins names after expanding them, as in add_bits_ and the instruction set.
#define JAX_MPK_JOIN2(a, b) a##b
#define JAX_MPK_JOIN(a, b) JAX_MPK_JOIN2(a, b)

namespace jax_mpk::host {
namespace {

template <class T>
struct TypeOf;
template <> struct TypeOf<int8_t> { static constexpr Type value = Type::k_s8; };
template <> struct TypeOf<int16_t> { static constexpr Type value = Type::k_s16; };
template <> struct TypeOf<int32_t> { static constexpr Type value = Type::k_s32; };
template <> struct TypeOf<int64_t> { static constexpr Type value = Type::k_s64; };
template <> struct TypeOf<uint8_t> { static constexpr Type value = Type::k_u8; };
template <> struct TypeOf<uint16_t> { static constexpr Type value = Type::k_u16; };
template <> struct TypeOf<uint32_t> { static constexpr Type value = Type::k_u32; };
template <> struct TypeOf<uint64_t> { static constexpr Type value = Type::k_u64; };
template <> struct TypeOf<float> { static constexpr Type value = Type::k_f32; };
template <> struct TypeOf<double> { static constexpr Type value = Type::k_f64; };

template <class T> inline constexpr bool kIsFloat = false;
template <> inline constexpr bool kIsFloat<float> = true;
template <> inline constexpr bool kIsFloat<double> = true;
template <class T> inline constexpr bool kIsSigned = static_cast<T>(-1) < static_cast<T>(0);

// The unsigned and signed integers as wide as T.
template <int bytes> struct IntOf;
template <> struct IntOf<1> { using Unsigned = uint8_t; using Signed = int8_t; };
template <> struct IntOf<2> { using Unsigned = uint16_t; using Signed = int16_t; };
template <> struct IntOf<4> { using Unsigned = uint32_t; using Signed = int32_t; };
template <> struct IntOf<8> { using Unsigned = uint64_t; using Signed = int64_t; };
template <class T> using UnsignedOf = typename IntOf<sizeof(T)>::Unsigned;
template <class T> using SignedOf = typename IntOf<sizeof(T)>::Signed;

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

inline float fma_or_not(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline double fma_or_not(double a, double b, double c) {
#ifdef __FMA__
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// A subnormal as a zero, as arithmetic takes it (program.h); comparisons and selections alone would let it through.
template <class T>
inline T flushed(T x) {
  using U = UnsignedOf<T>;
  constexpr U exponent = sizeof(T) == 4 ? U(0x7f800000u) : static_cast<U>(0x7ff0000000000000u);
  constexpr U sign = U(1) << (sizeof(T) * 8 - 1);
  const U bits = bits_as<U>(x);
  return bits_as<T>((bits & exponent) == 0 ? bits & sign : bits);
}

// n as whole blocks. Loops over them need no remainder, and with ivdep (registers are equal or disjoint) no overlap
// checks, which results that replace an argument would fail.
inline int64_t whole_blocks(int64_t n) {
  n = (n + kBlock - 1) & -kBlock;
  if (n % kBlock != 0) __builtin_unreachable();
  return n;
}

template <class F, class Out, class A>
void unary_loop(void* out, const void* a, const void*, const void*, int64_t n, int64_t) {
  Out* o = static_cast<Out*>(out);
  const A* x = static_cast<const A*>(a);
  n = whole_blocks(n);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) o[i] = F::apply(x[i]);
}

template <class F, class Out, class A>
void binary_loop(void* out, const void* a, const void* b, const void*, int64_t n, int64_t) {
  Out* o = static_cast<Out*>(out);
  const A* x = static_cast<const A*>(a);
  const A* y = static_cast<const A*>(b);
  n = whole_blocks(n);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) o[i] = F::apply(x[i], y[i]);
}

// Exactly n lanes, for functions that are expensive or that the compiler cannot vectorise.
template <class F, class Out, class A>
void unary_each(void* out, const void* a, const void*, const void*, int64_t n, int64_t) {
  Out* o = static_cast<Out*>(out);
  const A* x = static_cast<const A*>(a);
  for (int64_t i = 0; i < n; ++i) o[i] = F::apply(x[i]);
}

template <class F, class Out, class A>
void binary_each(void* out, const void* a, const void* b, const void*, int64_t n, int64_t) {
  Out* o = static_cast<Out*>(out);
  const A* x = static_cast<const A*>(a);
  const A* y = static_cast<const A*>(b);
  for (int64_t i = 0; i < n; ++i) o[i] = F::apply(x[i], y[i]);
}

inline Kernel& slot(KernelTable& table, Op op, Type type) {
  return table.op[static_cast<int>(op)][static_cast<int>(type)];
}

// Registers F<T> for each T, as op or as a comparison (whose result is b1).
template <template <class> class F, class... T>
void add_unary(KernelTable& table, Op op) {
  ((slot(table, op, TypeOf<T>::value) = &unary_loop<F<T>, T, T>), ...);
}
template <template <class> class F, class... T>
void add_unary_each(KernelTable& table, Op op) {
  ((slot(table, op, TypeOf<T>::value) = &unary_each<F<T>, T, T>), ...);
}
template <template <class> class F, class... T>
void add_binary(KernelTable& table, Op op) {
  ((slot(table, op, TypeOf<T>::value) = &binary_loop<F<T>, T, T>), ...);
}
template <template <class> class F, class... T>
void add_binary_each(KernelTable& table, Op op) {
  ((slot(table, op, TypeOf<T>::value) = &binary_each<F<T>, T, T>), ...);
}
template <template <class> class F, class... T>
void add_compare(KernelTable& table, Op op) {
  ((slot(table, op, TypeOf<T>::value) = &binary_loop<F<T>, uint8_t, T>), ...);
}

// n lanes onto one: the upper half of a power of two onto the lower half, until one lane is left. The order
// depends on n alone. Lanes of `a` are overwritten.
template <class F, class T>
void fold_loop(void* out, const void* a, const void*, const void*, int64_t n, int64_t) {
  T* x = static_cast<T*>(const_cast<void*>(a));
  int64_t half = 1;
  while (half * 2 < n) half *= 2;
  for (; half >= 1 && n > 1; n = half, half /= 2) {
    int64_t upper = n - half, i = 0;
    for (; i + kBlock <= upper; i += kBlock) {
#pragma GCC ivdep
      for (int64_t j = 0; j < kBlock; ++j) x[i + j] = F::apply(x[i + j], x[half + i + j]);
    }
    for (; i < upper; ++i) x[i] = F::apply(x[i], x[half + i]);
  }
  *static_cast<T*>(out) = x[0];
}

template <template <class> class F, class... T>
void add_fold(KernelTable& table, Fold fold) {
  ((table.fold[static_cast<int>(fold)][static_cast<int>(TypeOf<T>::value)] = &fold_loop<F<T>, T>), ...);
}

inline void fold_bools_as_bytes(KernelTable& table, Fold fold) {
  Kernel* row = table.fold[static_cast<int>(fold)];
  row[static_cast<int>(Type::k_b1)] = row[static_cast<int>(Type::k_u8)];
}

}  // namespace
}  // namespace jax_mpk::host
