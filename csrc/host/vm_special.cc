// Functions that are too rare to vectorise: one lane at a time, f32 through f64.
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "device/special.cuh"
#include "host/vm_kernels.h"

namespace jax_mpk::host {
namespace {

namespace special = ::mpk::special;

template <double (*F)(double), class T>
void unary(void* out, const void* a, const void*, const void*, int64_t n, int64_t) {
  for (int64_t i = 0; i < n; ++i) {
    static_cast<T*>(out)[i] = static_cast<T>(F(static_cast<const T*>(a)[i]));
  }
}
template <double (*F)(double, double), class T>
void binary(void* out, const void* a, const void* b, const void*, int64_t n, int64_t) {
  for (int64_t i = 0; i < n; ++i) {
    static_cast<T*>(out)[i] = static_cast<T>(F(static_cast<const T*>(a)[i], static_cast<const T*>(b)[i]));
  }
}
template <double (*F)(double, double, double), class T>
void ternary(void* out, const void* a, const void* b, const void* c, int64_t n, int64_t) {
  for (int64_t i = 0; i < n; ++i) {
    static_cast<T*>(out)[i] = static_cast<T>(
        F(static_cast<const T*>(a)[i], static_cast<const T*>(b)[i], static_cast<const T*>(c)[i]));
  }
}

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

// The library's functions look at bits, where a subnormal is no zero.
double log_of(double x) { return std::log(x == 0 ? 0 : x); }
double lgamma_of(double x) { return special::lgamma(x == 0 ? std::copysign(0.0, x) : x); }

// Lifts the rule that subnormals are zeros, for functions to which XLA does not apply it.
class Subnormals {
 public:
#ifdef __SSE2__
  Subnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~Subnormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#else
  Subnormals() {}
#endif
};

template <double (*F)(double, double), class T>
void binary_of_subnormals(void* out, const void* a, const void* b, const void* c, int64_t n, int64_t immediate) {
  const Subnormals subnormals;
  binary<F, T>(out, a, b, c, n, immediate);
}

// The next representable number towards b, by bits. Subnormals equal each other and zero (but f16's, which are normal in
// f32), and are numbers of their own otherwise: so does XLA's comparison have it, and its steps by bits.
template <class Bits, int kMantissa, bool kSubnormals = false>
void nextafter_loop(void* out, const void* a, const void* b, const void*, int64_t n, int64_t) {
  constexpr Bits sign = Bits(1) << (sizeof(Bits) * 8 - 1);
  constexpr Bits infinity = (static_cast<Bits>(sign - 1) >> kMantissa) << kMantissa;
  constexpr Bits least = kSubnormals ? 1 : Bits(1) << kMantissa;  // of those that differ from zero
  // Bits as an integer that orders like the number; both zeros are `sign`.
  auto order = [](Bits x) { return static_cast<Bits>(x & sign ? sign - (x & (sign - 1)) : sign + x); };
  for (int64_t i = 0; i < n; ++i) {
    Bits from = static_cast<const Bits*>(a)[i], to = static_cast<const Bits*>(b)[i];
    Bits& result = static_cast<Bits*>(out)[i];
    Bits from_size = from & (sign - 1), to_size = to & (sign - 1);
    if (from_size > infinity || to_size > infinity) {
      result = static_cast<Bits>(infinity | (Bits(1) << (kMantissa - 1)));
    } else if (order(from) == order(to) || (from_size < least && to_size < least)) {
      result = to;
    } else if (from_size == 0) {
      result = static_cast<Bits>((to & sign) | 1);
    } else {
      bool away = (order(to) > order(from)) == ((from & sign) == 0);
      result = static_cast<Bits>(away ? from + 1 : from - 1);
    }
  }
}

Kernel& slot(KernelTable& table, Op op, Type type) {
  return table.op[static_cast<int>(op)][static_cast<int>(type)];
}
template <double (*F)(double)>
void add_unary(KernelTable& t, Op op) {
  slot(t, op, Type::k_f32) = &unary<F, float>;
  slot(t, op, Type::k_f64) = &unary<F, double>;
}
template <double (*F)(double, double)>
void add_binary(KernelTable& t, Op op) {
  slot(t, op, Type::k_f32) = &binary<F, float>;
  slot(t, op, Type::k_f64) = &binary<F, double>;
}

}  // namespace

void add_special(KernelTable& t) {
  add_unary<std::exp>(t, Op::k_exp);
  add_unary<std::exp2>(t, Op::k_exp2);
  add_unary<std::expm1>(t, Op::k_expm1);
  add_unary<log_of>(t, Op::k_log);
  add_unary<std::log1p>(t, Op::k_log1p);
  add_unary<std::cbrt>(t, Op::k_cbrt);
  add_unary<std::sin>(t, Op::k_sin);
  add_unary<std::cos>(t, Op::k_cos);
  add_unary<std::tan>(t, Op::k_tan);
  add_unary<std::asin>(t, Op::k_asin);
  add_unary<std::acos>(t, Op::k_acos);
  add_unary<std::atan>(t, Op::k_atan);
  add_unary<std::sinh>(t, Op::k_sinh);
  add_unary<std::cosh>(t, Op::k_cosh);
  add_unary<std::tanh>(t, Op::k_tanh);
  add_unary<std::asinh>(t, Op::k_asinh);
  add_unary<std::acosh>(t, Op::k_acosh);
  add_unary<std::atanh>(t, Op::k_atanh);
  add_unary<logistic>(t, Op::k_logistic);
  add_unary<std::erf>(t, Op::k_erf);
  add_unary<std::erfc>(t, Op::k_erfc);
  add_unary<special::erf_inv>(t, Op::k_erf_inv);
  add_unary<lgamma_of>(t, Op::k_lgamma);
  add_unary<special::digamma>(t, Op::k_digamma);
  add_unary<special::bessel_i0e>(t, Op::k_bessel_i0e);
  add_unary<special::bessel_i1e>(t, Op::k_bessel_i1e);
  slot(t, Op::k_pow, Type::k_f32) = &binary_of_subnormals<std::pow, float>;
  slot(t, Op::k_pow, Type::k_f64) = &binary<std::pow, double>;
  slot(t, Op::k_atan2, Type::k_f32) = &binary_of_subnormals<std::atan2, float>;
  slot(t, Op::k_atan2, Type::k_f64) = &binary_of_subnormals<std::atan2, double>;
  add_binary<special::igamma>(t, Op::k_igamma);
  add_binary<special::igammac>(t, Op::k_igammac);
  add_binary<special::igamma_grad_a>(t, Op::k_igamma_grad_a);
  add_binary<special::random_gamma_grad>(t, Op::k_random_gamma_grad);
  add_binary<special::zeta>(t, Op::k_zeta);
  add_binary<special::polygamma>(t, Op::k_polygamma);
  slot(t, Op::k_betainc, Type::k_f32) = &ternary<special::betainc, float>;
  slot(t, Op::k_betainc, Type::k_f64) = &ternary<special::betainc, double>;
  slot(t, Op::k_nextafter, Type::k_f16) = &nextafter_loop<uint16_t, 10, true>;
  slot(t, Op::k_nextafter, Type::k_bf16) = &nextafter_loop<uint16_t, 7>;
  slot(t, Op::k_nextafter, Type::k_f32) = &nextafter_loop<uint32_t, 23>;
  slot(t, Op::k_nextafter, Type::k_f64) = &nextafter_loop<uint64_t, 52>;
}

}  // namespace jax_mpk::host
