// Logic, shifts, moves, select and reduce_precision: included once per instruction set.
#include "host/vm_loops.h"

namespace jax_mpk::host {
namespace {

template <class T> struct And { static T apply(T a, T b) { return static_cast<T>(a & b); } };
template <class T> struct Or { static T apply(T a, T b) { return static_cast<T>(a | b); } };
template <class T> struct Xor { static T apply(T a, T b) { return static_cast<T>(a ^ b); } };
template <class T> struct Not { static T apply(T a) { return static_cast<T>(~a); } };
struct NotBool { static uint8_t apply(uint8_t a) { return a == 0; } };
template <class T> struct Move { static T apply(T a) { return a; } };

// A shift by the width or more, or by a negative amount, moves everything out.
template <class T> struct Shl {
  static T apply(T a, T b) {
    UnsignedOf<T> amount = static_cast<UnsignedOf<T>>(b);
    constexpr UnsignedOf<T> width = sizeof(T) * 8;
    UnsignedOf<T> safe = amount & (width - 1);
    T shifted = static_cast<T>(static_cast<UnsignedOf<T>>(a) << safe);
    return amount < width ? shifted : T(0);
  }
};
template <class T> struct ShrLogical {
  static T apply(T a, T b) {
    UnsignedOf<T> amount = static_cast<UnsignedOf<T>>(b);
    constexpr UnsignedOf<T> width = sizeof(T) * 8;
    UnsignedOf<T> safe = amount & (width - 1);
    T shifted = static_cast<T>(static_cast<UnsignedOf<T>>(a) >> safe);
    return amount < width ? shifted : T(0);
  }
};
template <class T> struct ShrArith {
  static T apply(T a, T b) {
    UnsignedOf<T> amount = static_cast<UnsignedOf<T>>(b);
    constexpr UnsignedOf<T> last = sizeof(T) * 8 - 1;
    return static_cast<T>(static_cast<SignedOf<T>>(a) >> (amount < last ? amount : last));
  }
};

// immediate: how far, 0 < immediate < width.
template <class T>
void rotate_left_loop(void* out, const void* a, const void*, const void*, int64_t n, int64_t immediate) {
  constexpr int64_t width = sizeof(T) * 8;
  T* o = static_cast<T*>(out);
  const T* x = static_cast<const T*>(a);
  const int left = static_cast<int>(immediate & (width - 1)), right = static_cast<int>(-immediate & (width - 1));
  n = whole_blocks(n);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) o[i] = static_cast<T>(x[i] << left | x[i] >> right);
}

template <class T> struct Popcount {
  static T apply(T a) {
    // The classic tree of sums: vectorises everywhere, unlike the popcnt instruction.
    uint64_t x = static_cast<UnsignedOf<T>>(a);
    x = x - ((x >> 1) & 0x5555555555555555u);
    x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return static_cast<T>((x * 0x0101010101010101u) >> 56);
  }
};
template <class T> struct Clz {
  static T apply(T a) {
    uint64_t x = static_cast<UnsignedOf<T>>(a);
    return static_cast<T>(x == 0 ? int(sizeof(T) * 8) : __builtin_clzll(x) - (64 - int(sizeof(T) * 8)));
  }
};

template <class T>
void fill_loop(void* out, const void* a, const void*, const void*, int64_t n, int64_t) {
  T* o = static_cast<T*>(out);
  const T value = *static_cast<const T*>(a);
  n = whole_blocks(n);
  for (int64_t i = 0; i < n; ++i) o[i] = value;
}

// By size: what the bits mean does not matter.
template <class T>
void select_loop(void* out, const void* a, const void* b, const void* c, int64_t n, int64_t) {
  T* o = static_cast<T*>(out);
  const uint8_t* p = static_cast<const uint8_t*>(a);
  const T* x = static_cast<const T*>(b);
  const T* y = static_cast<const T*>(c);
  n = whole_blocks(n);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T mask = static_cast<T>(-static_cast<T>(p[i] != 0));
    o[i] = static_cast<T>((x[i] & mask) | (y[i] & ~mask));
  }
}

// immediate: exponent bits * 256 + mantissa bits.
template <class U, int kMantissa, int kExponent>
void reduce_precision_loop(void* out, const void* a, const void*, const void*, int64_t n, int64_t immediate) {
  U* o = static_cast<U*>(out);
  const U* x = static_cast<const U*>(a);
  const int exponent_bits = static_cast<int>(immediate >> 8 & 255), mantissa_bits = static_cast<int>(immediate & 255);
  constexpr U sign_mask = U(1) << (kMantissa + kExponent);
  constexpr U infinity = ((U(1) << kExponent) - 1) << kMantissa;
  constexpr U bias = (U(1) << (kExponent - 1)) - 1;
  const int drop = mantissa_bits < kMantissa ? kMantissa - mantissa_bits : 0;
  const U half = drop ? (U(1) << (drop - 1)) - 1 : 0, keep = ~((U(1) << drop) - 1), round = drop ? 1 : 0;
  const bool narrow = exponent_bits < kExponent;
  const U reduced_bias = narrow ? (U(1) << (exponent_bits - 1)) - 1 : bias;
  const U highest = (bias + reduced_bias) << kMantissa, lowest = (bias - reduced_bias) << kMantissa;
  n = whole_blocks(n);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    U bits = x[i];
    U last = (bits >> drop) & round;
    U reduced = (bits + half + last) & keep;
    U sign = reduced & sign_mask, exponent = reduced & infinity;
    U fitted = exponent > highest ? sign | infinity : reduced;
    fitted = exponent <= lowest ? sign : fitted;
    reduced = narrow ? fitted : reduced;
    o[i] = (bits & ~sign_mask) > infinity ? bits : reduced;
  }
}

#define JAX_MPK_INTS int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

template <class T>
void add_by_size(KernelTable& t, Type type) {
  slot(t, Op::k_move, type) = &unary_loop<Move<T>, T, T>;
  slot(t, Op::k_select, type) = &select_loop<T>;
  t.fill[static_cast<int>(type)] = &fill_loop<T>;
}

void add_bits(KernelTable& t) {
  add_binary<And, JAX_MPK_INTS>(t, Op::k_and);
  add_binary<Or, JAX_MPK_INTS>(t, Op::k_or);
  add_binary<Xor, JAX_MPK_INTS>(t, Op::k_xor);
  add_unary<Not, JAX_MPK_INTS>(t, Op::k_not);
  slot(t, Op::k_and, Type::k_b1) = slot(t, Op::k_and, Type::k_u8);
  slot(t, Op::k_or, Type::k_b1) = slot(t, Op::k_or, Type::k_u8);
  slot(t, Op::k_xor, Type::k_b1) = slot(t, Op::k_xor, Type::k_u8);
  slot(t, Op::k_not, Type::k_b1) = &unary_loop<NotBool, uint8_t, uint8_t>;
  add_binary<Shl, JAX_MPK_INTS>(t, Op::k_shl);
  add_binary<ShrLogical, JAX_MPK_INTS>(t, Op::k_shr_logical);
  add_binary<ShrArith, JAX_MPK_INTS>(t, Op::k_shr_arith);
  slot(t, Op::k_rotate_left, Type::k_u32) = &rotate_left_loop<uint32_t>;
  slot(t, Op::k_rotate_left, Type::k_u64) = &rotate_left_loop<uint64_t>;
  add_unary<Popcount, JAX_MPK_INTS>(t, Op::k_popcount);
  add_unary_each<Clz, JAX_MPK_INTS>(t, Op::k_clz);
  for (int type = 0; type < kTypes; ++type) {
    switch (bytes_of(Type(type))) {
      case 1: add_by_size<uint8_t>(t, Type(type)); break;
      case 2: add_by_size<uint16_t>(t, Type(type)); break;
      case 4: add_by_size<uint32_t>(t, Type(type)); break;
      default: add_by_size<uint64_t>(t, Type(type));
    }
  }
  slot(t, Op::k_reduce_precision, Type::k_f32) = &reduce_precision_loop<uint32_t, 23, 8>;
  slot(t, Op::k_reduce_precision, Type::k_f64) = &reduce_precision_loop<uint64_t, 52, 11>;

  add_fold<And, JAX_MPK_INTS>(t, Fold::kAnd);
  add_fold<Or, JAX_MPK_INTS>(t, Fold::kOr);
  add_fold<Xor, JAX_MPK_INTS>(t, Fold::kXor);
  fold_bools_as_bytes(t, Fold::kAnd);
  fold_bools_as_bytes(t, Fold::kOr);
  fold_bools_as_bytes(t, Fold::kXor);
}

}  // namespace

void JAX_MPK_JOIN(add_bits_, JAX_MPK_VM_ISA)(KernelTable& table) { add_bits(table); }

}  // namespace jax_mpk::host
