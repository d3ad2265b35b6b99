// Arithmetic, comparisons and rounding: included once per instruction set, after JAX_MPK_VM_ISA is defined.
#include "host/vm_loops.h"

namespace jax_mpk::host {
namespace {

// Signed overflow wraps: arithmetic happens on the unsigned type. Types narrower than int are promoted to it,
// where u16 * u16 could overflow, so everything is at least 32 bits wide.
template <class T> struct Wrap { using type = UnsignedOf<T>; };
template <> struct Wrap<int8_t> { using type = uint32_t; };
template <> struct Wrap<uint8_t> { using type = uint32_t; };
template <> struct Wrap<int16_t> { using type = uint32_t; };
template <> struct Wrap<uint16_t> { using type = uint32_t; };
template <> struct Wrap<float> { using type = float; };
template <> struct Wrap<double> { using type = double; };
template <class T> using W = typename Wrap<T>::type;

template <class T> struct Add { static T apply(T a, T b) { return static_cast<T>(static_cast<W<T>>(a) + static_cast<W<T>>(b)); } };
template <class T> struct Sub { static T apply(T a, T b) { return static_cast<T>(static_cast<W<T>>(a) - static_cast<W<T>>(b)); } };
template <class T> struct Mul { static T apply(T a, T b) { return static_cast<T>(static_cast<W<T>>(a) * static_cast<W<T>>(b)); } };
template <class T> struct Neg {
  static T apply(T a) {
    if constexpr (kIsFloat<T>) return -a;
    return static_cast<T>(static_cast<W<T>>(0) - static_cast<W<T>>(a));
  }
};

template <class T> struct Abs {
  static T apply(T a) {
    if constexpr (kIsFloat<T>) {
      return bits_as<T>(static_cast<UnsignedOf<T>>(bits_as<UnsignedOf<T>>(a) & (static_cast<UnsignedOf<T>>(-1) >> 1)));
    } else {
      return a < 0 ? Neg<T>::apply(a) : a;
    }
  }
};
template <class T> struct Sign {
  static T apply(T a) {
    if constexpr (kIsFloat<T>) return a > 0 ? T(1) : a < 0 ? T(-1) : flushed(a);  // keeps zeros and NaN
    else return static_cast<T>((a > 0) - (a < 0));
  }
};

// NaN if either side is one; −0 below +0, as XLA's CPU code has it.
template <class T> struct Max {
  static T apply(T a, T b) {
    if constexpr (kIsFloat<T>) {
      using U = UnsignedOf<T>;
      T equal = bits_as<T>(static_cast<U>(bits_as<U>(a) & bits_as<U>(b)));
      T larger = a > b ? a : b;
      larger = a == b ? equal : larger;
      return a != a ? a : flushed(larger);
    } else {
      return a > b ? a : b;
    }
  }
};
template <class T> struct Min {
  static T apply(T a, T b) {
    if constexpr (kIsFloat<T>) {
      using U = UnsignedOf<T>;
      T equal = bits_as<T>(static_cast<U>(bits_as<U>(a) | bits_as<U>(b)));
      T smaller = a < b ? a : b;
      smaller = a == b ? equal : smaller;
      return a != a ? a : flushed(smaller);
    } else {
      return a < b ? a : b;
    }
  }
};

template <class T> struct Eq { static uint8_t apply(T a, T b) { return a == b; } };
template <class T> struct Ne { static uint8_t apply(T a, T b) { return a != b; } };
template <class T> struct Lt { static uint8_t apply(T a, T b) { return a < b; } };
template <class T> struct Le { static uint8_t apply(T a, T b) { return a <= b; } };
template <class T> struct Gt { static uint8_t apply(T a, T b) { return a > b; } };
template <class T> struct Ge { static uint8_t apply(T a, T b) { return a >= b; } };
template <class T> struct IsFinite {
  static uint8_t apply(T a) { return Abs<T>::apply(a) < static_cast<T>(__builtin_huge_val()); }
};

// Rounding by adding 2**23 (2**52) and taking it away again; larger numbers are whole already.
template <class T> inline constexpr T kWhole = 0;
template <> inline constexpr float kWhole<float> = 8388608.0f;
template <> inline constexpr double kWhole<double> = 4503599627370496.0;
template <class T> inline T with_sign(T magnitude, T sign) {
  using U = UnsignedOf<T>;
  constexpr U mask = static_cast<U>(-1) >> 1;
  return bits_as<T>(static_cast<U>((bits_as<U>(magnitude) & mask) | (bits_as<U>(sign) & ~mask)));
}
template <class T> struct RoundEven {
  static T apply(T a) {
    T size = Abs<T>::apply(a);
    T rounded = (size + kWhole<T>) - kWhole<T>;
    return with_sign(size < kWhole<T> ? rounded : a, a);
  }
};
template <class T> struct Floor {
  static T apply(T a) {
    T near = RoundEven<T>::apply(a);
    return with_sign(near > a ? near - T(1) : near, a);
  }
};
template <class T> struct Ceil {
  static T apply(T a) {
    T near = RoundEven<T>::apply(a);
    return with_sign(near < a ? near + T(1) : near, a);
  }
};
template <class T> struct RoundAway {
  static T apply(T a) {
    T size = Abs<T>::apply(a);
    T near = (size + kWhole<T>) - kWhole<T>;
    T below = near > size ? near - T(1) : near;
    T rounded = size - below >= T(0.5) ? below + T(1) : below;
    return with_sign(size < kWhole<T> ? rounded : a, a);
  }
};

// Integer division: x / 0 is all ones, INT_MIN / -1 is INT_MIN; x % 0 is x, x % -1 is 0. Up to 32 bits it goes
// through f64, which is exact there and has vector instructions.
template <class T> struct DivSmall {
  static T apply(T a, T b) {
    const bool negate = kIsSigned<T> && b == static_cast<T>(-1);
    double q = static_cast<double>(a) / static_cast<double>(b == 0 || negate ? T(1) : b);
    T quotient;
    if constexpr (sizeof(T) == 4 && !kIsSigned<T>) quotient = static_cast<T>(static_cast<int64_t>(q));
    else quotient = static_cast<T>(static_cast<int32_t>(q));
    quotient = negate ? Neg<T>::apply(a) : quotient;
    return b == 0 ? static_cast<T>(-1) : quotient;
  }
};
template <class T> struct RemSmall {
  static T apply(T a, T b) {
    T q = DivSmall<T>::apply(a, b);
    T r = Sub<T>::apply(a, Mul<T>::apply(q, b));
    return b == 0 ? a : r;
  }
};
template <class T> struct DivLarge {
  static T apply(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if (kIsSigned<T> && b == static_cast<T>(-1)) return Neg<T>::apply(a);
    return a / b;
  }
};
template <class T> struct RemLarge {
  static T apply(T a, T b) {
    if (b == 0) return a;
    if (kIsSigned<T> && b == static_cast<T>(-1)) return 0;
    return a % b;
  }
};

// Below 2**51 in size, 64-bit integers convert to f64 and back with an addition, and quotients are exact. Indices
// always are; anything else takes the machine's slow division.
template <class T>
bool all_small(const T* x, int64_t n) {
  uint64_t seen = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint64_t bits = static_cast<uint64_t>(x[i]);
    seen |= kIsSigned<T> ? bits ^ static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) : bits;
  }
  return seen < (uint64_t{1} << 50);
}
constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2**52
inline double small_to_double(int64_t x) {
  return bits_as<double>(x + bits_as<int64_t>(kMagic)) - kMagic;
}
inline int64_t small_quotient(int64_t a, int64_t b) {
  double q = small_to_double(a) / small_to_double(b == 0 ? 1 : b);
  double size = bits_as<double>(bits_as<int64_t>(q) & INT64_MAX);
  double near = (size + kWhole<double>) - kWhole<double>;
  double whole = near - (near > size ? 1.0 : 0.0);
  int64_t quotient = bits_as<int64_t>(whole + kMagic) - bits_as<int64_t>(kMagic);
  int64_t sign = bits_as<int64_t>(q) >> 63;
  return (quotient ^ sign) - sign;
}
template <class T, bool kRemainder>
void divide_wide(void* out, const void* a, const void* b, const void*, int64_t n, int64_t) {
  T* o = static_cast<T*>(out);
  const T* x = static_cast<const T*>(a);
  const T* y = static_cast<const T*>(b);
  if (n > 2 && all_small(x, n) && all_small(y, n)) {
    n = whole_blocks(n);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      int64_t p = static_cast<int64_t>(x[i]), q = static_cast<int64_t>(y[i]);
      int64_t quotient = small_quotient(p, q);
      int64_t remainder = p - quotient * q;  // p itself where q is 0
      o[i] = static_cast<T>(kRemainder ? remainder : q == 0 ? -1 : quotient);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      o[i] = kRemainder ? RemLarge<T>::apply(x[i], y[i]) : DivLarge<T>::apply(x[i], y[i]);
    }
  }
}

template <class T> struct Div { static T apply(T a, T b) { return a / b; } };
template <class T> struct Rem;
template <> struct Rem<float> { static float apply(float a, float b) { return __builtin_fmodf(a, b); } };
template <> struct Rem<double> { static double apply(double a, double b) { return __builtin_fmod(a, b); } };

#define JAX_MPK_INTS int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
#define JAX_MPK_FLOATS float, double
#define JAX_MPK_NUMBERS JAX_MPK_INTS, JAX_MPK_FLOATS

template <template <class> class F>
void add_ordered(KernelTable& table, Op op) {
  add_compare<F, JAX_MPK_NUMBERS>(table, op);
  slot(table, op, Type::k_b1) = slot(table, op, Type::k_u8);
}

void add_arithmetic(KernelTable& t) {
  add_binary<Add, JAX_MPK_NUMBERS>(t, Op::k_add);
  add_binary<Sub, JAX_MPK_NUMBERS>(t, Op::k_sub);
  add_binary<Mul, JAX_MPK_NUMBERS>(t, Op::k_mul);
  add_unary<Neg, JAX_MPK_NUMBERS>(t, Op::k_neg);
  add_unary<Abs, JAX_MPK_NUMBERS>(t, Op::k_abs);
  add_unary<Sign, JAX_MPK_NUMBERS>(t, Op::k_sign);
  add_binary<Max, JAX_MPK_NUMBERS>(t, Op::k_max);
  add_binary<Min, JAX_MPK_NUMBERS>(t, Op::k_min);
  slot(t, Op::k_max, Type::k_b1) = slot(t, Op::k_max, Type::k_u8);
  slot(t, Op::k_min, Type::k_b1) = slot(t, Op::k_min, Type::k_u8);
  add_ordered<Eq>(t, Op::k_eq);
  add_ordered<Ne>(t, Op::k_ne);
  add_ordered<Lt>(t, Op::k_lt);
  add_ordered<Le>(t, Op::k_le);
  add_ordered<Gt>(t, Op::k_gt);
  add_ordered<Ge>(t, Op::k_ge);
  slot(t, Op::k_is_finite, Type::k_f32) = &unary_loop<IsFinite<float>, uint8_t, float>;
  slot(t, Op::k_is_finite, Type::k_f64) = &unary_loop<IsFinite<double>, uint8_t, double>;
  add_unary<RoundEven, JAX_MPK_FLOATS>(t, Op::k_round_even);
  add_unary<RoundAway, JAX_MPK_FLOATS>(t, Op::k_round_away);
  add_unary<Floor, JAX_MPK_FLOATS>(t, Op::k_floor);
  add_unary<Ceil, JAX_MPK_FLOATS>(t, Op::k_ceil);
  add_binary<DivSmall, int8_t, int16_t, int32_t, uint8_t, uint16_t, uint32_t>(t, Op::k_div);
  add_binary<RemSmall, int8_t, int16_t, int32_t, uint8_t, uint16_t, uint32_t>(t, Op::k_rem);
  slot(t, Op::k_div, Type::k_s64) = &divide_wide<int64_t, false>;
  slot(t, Op::k_rem, Type::k_s64) = &divide_wide<int64_t, true>;
  slot(t, Op::k_div, Type::k_u64) = &divide_wide<uint64_t, false>;
  slot(t, Op::k_rem, Type::k_u64) = &divide_wide<uint64_t, true>;
  add_binary<Div, JAX_MPK_FLOATS>(t, Op::k_div);
  add_binary_each<Rem, JAX_MPK_FLOATS>(t, Op::k_rem);

  add_fold<Add, JAX_MPK_NUMBERS>(t, Fold::kSum);
  add_fold<Mul, JAX_MPK_NUMBERS>(t, Fold::kProd);
  add_fold<Max, JAX_MPK_NUMBERS>(t, Fold::kMax);
  add_fold<Min, JAX_MPK_NUMBERS>(t, Fold::kMin);
  fold_bools_as_bytes(t, Fold::kMax);
  fold_bools_as_bytes(t, Fold::kMin);
}

}  // namespace

void JAX_MPK_JOIN(add_arithmetic_, JAX_MPK_VM_ISA)(KernelTable& table) { add_arithmetic(table); }

}  // namespace jax_mpk::host
