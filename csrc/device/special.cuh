// Special functions in f64, following the definitions (domains, poles, limits) of XLA's chlo decompositions: one source
// for the GPU and for the CPU executor. f32 goes through f64.
//
// The parts of a logarithm of a gamma function that cancel are never formed: powers over gamma functions are written
// with Stirling's series' error and with deviances, both small (C. Loader, "Fast and accurate computation of binomial
// probabilities", 2000). So f64 is enough.
#pragma once

#ifndef __CUDACC__
#include <math.h>
#endif

#include "types.cuh"

namespace mpk {
namespace special {

inline constexpr f64 kInf = __builtin_bit_cast(f64, kInfinityBits<f64>);
inline constexpr f64 kNan = __builtin_bit_cast(f64, kNanBits<f64>);
inline constexpr f64 kEps = 2.220446049250313e-16;
inline constexpr f64 kPi = 3.14159265358979323846;
inline constexpr f64 kRootTwoPi = 2.50662827463100050242;
inline constexpr f64 kHalfLogTwoPi = 0.91893853320467274178;

MPK_DEVICE bool is_nan(f64 x) { return x != x; }
MPK_DEVICE bool is_infinite(f64 x) { return x == kInf || x == -kInf; }

MPK_FUNCTION f64 lgamma(f64 x) {
#ifdef __CUDACC__
  return ::lgamma(x);
#else
  int sign;  // the C library's lgamma writes a global instead
  return ::lgamma_r(x, &sign);
#endif
}

MPK_FUNCTION f64 digamma(f64 x) {
  if (is_nan(x) || x == -kInf) return kNan;
  if (x == kInf) return kInf;
  if (x <= 0 && ::floor(x) == x) return kNan;
  f64 extra = 0;
  if (x < 0.5) {  // reflection, with the fraction taken first so that tan is accurate
    const f64 fraction = x - ::rint(x);
    extra = fraction == 0.5 || fraction == -0.5 ? 0 : kPi / ::tan(kPi * fraction);
    x = 1 - x;
  }
  f64 shift = 0;
  for (; x < 10; x += 1) shift += 1 / x;
  const f64 z = 1 / (x * x);
  const f64 series =
      z * (1.0 / 12 -
           z * (1.0 / 120 -
                z * (1.0 / 252 - z * (1.0 / 240 - z * (1.0 / 132 - z * (691.0 / 32760 - z * (1.0 / 12)))))));
  return ::log(x) - 0.5 / x - series - shift - extra;
}

// log(gamma(z)) less what Stirling's formula gives for it, (z - 1/2) log(z) - z + log(2 pi) / 2; z > 0.
MPK_FUNCTION f64 stirling_error(f64 z) {
  if (z < 10) return lgamma(z + 1) - (z + 0.5) * ::log(z) + z - kHalfLogTwoPi;
  const f64 y = 1 / (z * z);
  const f64 series =
      1.0 / 12 -
      y * (1.0 / 360 -
           y * (1.0 / 1260 - y * (1.0 / 1680 - y * (1.0 / 1188 - y * (691.0 / 360360 - y * (1.0 / 156))))));
  return series / z;
}

// n log(n / x) + x - n without cancellation where x is near n; n, x > 0.
MPK_FUNCTION f64 deviance(f64 n, f64 x) {
  const f64 v = (0.5 * n - 0.5 * x) / (0.5 * n + 0.5 * x);
  if (::fabs(v) < 0.5) {
    f64 sum = (n - x) * v, power = 2 * n * v;
    for (int odd = 3; odd < 100; odd += 2) {
      power *= v * v;
      const f64 next = sum + power / odd;
      if (next == sum) break;
      sum = next;
    }
    return sum;
  }
  const f64 ratio = n / x;
  const f64 log_ratio = ratio > 0 && ratio < kInf ? ::log(ratio) : ::log(n) - ::log(x);
  return n * log_ratio + x - n;
}

// x**a * e**-x / gamma(a + 1).
MPK_FUNCTION f64 gamma_prefix(f64 a, f64 x) {
  return ::exp(-stirling_error(a) - deviance(a, x)) / (kRootTwoPi * ::sqrt(a));
}

// x**a * (1 - x)**b * gamma(a + b) / (gamma(a) * gamma(b)).
MPK_FUNCTION f64 beta_prefix(f64 a, f64 b, f64 x) {
  const f64 n = a + b;
  const f64 errors = stirling_error(n) - stirling_error(a) - stirling_error(b);
  const f64 deviances = deviance(a, n * x) + deviance(b, n * (1 - x));
  return ::exp(errors - deviances) * ::sqrt(a / n) * ::sqrt(b) / kRootTwoPi;
}

enum class Mode { kValue, kDerivative, kSampleDerivative };

// P(a, x) and its derivatives by the power series, for x up to about a.
MPK_FUNCTION f64 igamma_series(f64 a, f64 x, Mode mode) {
  f64 r = a, c = 1, sum = 1, dc = 0, dsum = 0;
  for (int i = 0; i < 100000; ++i) {
    r += 1;
    dc = dc * (x / r) - c * x / (r * r);
    dsum += dc;
    c *= x / r;
    sum += c;
    const bool done = mode == Mode::kValue ? c <= kEps * sum : ::fabs(dc) <= kEps * ::fabs(dsum);
    if (done || is_nan(sum)) break;
  }
  if (mode == Mode::kValue) return sum * gamma_prefix(a, x);
  const f64 dlog = ::log(x) - digamma(a + 1);
  if (mode == Mode::kDerivative) return gamma_prefix(a, x) * (sum * dlog + dsum);
  return -(dsum + sum * dlog) * x / a;
}

// Q(a, x) and its derivatives by Legendre's continued fraction, for x > a.
MPK_FUNCTION f64 igammac_fraction(f64 a, f64 x, Mode mode) {
  f64 y = 1 - a, z = x + y + 1, c = 0;
  f64 pkm2 = 1, qkm2 = x, pkm1 = x + 1, qkm1 = z * x;
  f64 ans = pkm1 / qkm1;
  f64 dpkm2 = 0, dqkm2 = 0, dpkm1 = 0, dqkm1 = -x;
  f64 dans = (dpkm1 - ans * dqkm1) / qkm1;
  for (int i = 0; i < 2000; ++i) {
    c += 1, y += 1, z += 2;
    const f64 yc = y * c;
    const f64 pk = pkm1 * z - pkm2 * yc, qk = qkm1 * z - qkm2 * yc;
    f64 change = 1, dchange = 1;
    const f64 dpk = dpkm1 * z - pkm1 - dpkm2 * yc + pkm2 * c;
    const f64 dqk = dqkm1 * z - qkm1 - dqkm2 * yc + qkm2 * c;
    if (qk != 0) {
      const f64 r = pk / qk;
      change = ::fabs((ans - r) / r);
      ans = r;
      const f64 dnext = (dpk - ans * dqk) / qk;
      dchange = ::fabs(dnext - dans);
      dans = dnext;
    }
    pkm2 = pkm1, pkm1 = pk, qkm2 = qkm1, qkm1 = qk;
    dpkm2 = dpkm1, dpkm1 = dpk, dqkm2 = dqkm1, dqkm1 = dqk;
    if (::fabs(pk) > 1 / kEps) {
      pkm2 *= kEps, pkm1 *= kEps, qkm2 *= kEps, qkm1 *= kEps;
      dpkm2 *= kEps, dpkm1 *= kEps, dqkm2 *= kEps, dqkm1 *= kEps;
    }
    if (mode == Mode::kValue ? change <= kEps : dchange <= kEps) break;
  }
  if (mode == Mode::kValue) return ans * a * gamma_prefix(a, x);
  const f64 dlog = ::log(x) - digamma(a);
  if (mode == Mode::kDerivative) return a * gamma_prefix(a, x) * (dans + ans * dlog);
  return -(dans + ans * dlog) * x;
}

// The continued fraction of the incomplete beta function, modified Lentz; converges fast for x < (a+1)/(a+b+2).
MPK_FUNCTION f64 betainc_fraction(f64 a, f64 b, f64 x) {
  constexpr f64 tiny = 1e-300;
  f64 c = 1, d = 1 - (a + b) * x / (a + 1);
  if (::fabs(d) < tiny) d = tiny;
  d = 1 / d;
  f64 out = d;
  for (int m = 1; m <= 20000; ++m) {
    const f64 m2 = 2.0 * m;
    const f64 even = m * (b - m) * x / ((a + m2 - 1) * (a + m2));
    const f64 odd = -(a + m) * (a + b + m) * x / ((a + m2) * (a + m2 + 1));
    for (int half = 0; half < 2; ++half) {
      const f64 term = half == 0 ? even : odd;
      d = 1 + term * d;
      if (::fabs(d) < tiny) d = tiny;
      c = 1 + term / c;
      if (::fabs(c) < tiny) c = tiny;
      d = 1 / d;
      out *= d * c;
    }
    if (::fabs(d * c - 1) < kEps) break;
  }
  return out;
}

// e**-x * I_order(x) for x > 0: power series, whose terms are all positive, then the asymptotic one.
MPK_FUNCTION f64 bessel_scaled(int order, f64 x) {
  if (x < 30) {
    f64 quarter = x * x / 4, term = order == 0 ? 1 : x / 2, sum = term;
    for (int k = 1; k < 500; ++k) {
      term *= quarter / (static_cast<f64>(k) * (k + order));
      sum += term;
      if (term < sum * (kEps / 4)) break;
    }
    return sum * ::exp(-x);
  }
  f64 mu = 4.0 * order * order, term = 1, sum = 1;
  for (int k = 1; k < 40; ++k) {
    const f64 odd = 2.0 * k - 1;
    const f64 next = -term * (mu - odd * odd) / (8.0 * k * x);
    if (::fabs(next) >= ::fabs(term)) break;
    term = next;
    sum += term;
    if (::fabs(term) < ::fabs(sum) * (kEps / 4)) break;
  }
  return sum / (kRootTwoPi * ::sqrt(x));
}

MPK_FUNCTION f64 bessel_i0e(f64 x) {
  if (is_nan(x)) return x;
  return is_infinite(x) ? 0 : bessel_scaled(0, ::fabs(x));
}

MPK_FUNCTION f64 bessel_i1e(f64 x) {
  if (is_nan(x) || x == 0) return x;
  return is_infinite(x) ? ::copysign(0.0, x) : ::copysign(bessel_scaled(1, ::fabs(x)), x);
}

MPK_FUNCTION f64 erf_inv(f64 x) {
  const f64 size = ::fabs(x);
  if (is_nan(x) || size > 1) return kNan;
  if (size == 1) return ::copysign(kInf, x);
  if (x == 0) return x;
  // Winitzki's estimate, then Halley's method on erf or, in the tail, on erfc.
  const f64 log_term = ::log1p(-x * x), a = 0.147;
  const f64 first = 2 / (kPi * a) + log_term / 2;
  f64 y = ::sqrt(::sqrt(first * first - log_term / a) - first);
  for (int i = 0; i < 4; ++i) {
    const f64 error = size < 0.5 ? ::erf(y) - size : (1 - size) - ::erfc(y);
    const f64 step = error / (1.1283791670955126 * ::exp(-y * y));
    y -= step / (1 + y * step);
    if (::fabs(step) < kEps * y) break;
  }
  return ::copysign(y, x);
}

MPK_FUNCTION f64 igamma(f64 a, f64 x) {
  if (is_nan(a) || is_nan(x) || x < 0 || a < 0) return kNan;
  if (a == 0) return x < 1 ? kNan : 1;
  if (x == 0) return 0;
  if (is_infinite(a)) return is_infinite(x) ? kNan : 0;
  if (is_infinite(x)) return 1;
  return x > 1 && x > a ? 1 - igammac_fraction(a, x, Mode::kValue) : igamma_series(a, x, Mode::kValue);
}

MPK_FUNCTION f64 igammac(f64 a, f64 x) {
  if (is_nan(a) || is_nan(x) || x < 0 || a < 0) return kNan;
  if (a == 0) return x == 0 ? kNan : 0;
  if (x == 0) return 1;
  if (is_infinite(a)) return is_infinite(x) ? kNan : 1;
  if (is_infinite(x)) return 0;
  return x < 1 || x < a ? 1 - igamma_series(a, x, Mode::kValue) : igammac_fraction(a, x, Mode::kValue);
}

MPK_FUNCTION f64 igamma_grad_a(f64 a, f64 x) {
  if (is_nan(a) || is_nan(x) || x < 0 || a <= 0) return kNan;
  if (x == 0) return 0;
  return x > 1 && x > a ? -igammac_fraction(a, x, Mode::kDerivative) : igamma_series(a, x, Mode::kDerivative);
}

MPK_FUNCTION f64 random_gamma_grad(f64 a, f64 x) {
  if (is_nan(a) || is_nan(x) || x < 0 || a <= 0) return kNan;
  if (x == 0) return 0;
  return x > 1 && x > a ? -igammac_fraction(a, x, Mode::kSampleDerivative)
                        : igamma_series(a, x, Mode::kSampleDerivative);
}

MPK_FUNCTION f64 zeta(f64 x, f64 q) {
  if (x == 1) return kInf;
  if (is_nan(x) || is_nan(q)) return kNan;
  // At a pole, only even x give it a sign.
  if (q <= 0 && q == ::floor(q)) return x == ::floor(x) && ::fmod(x, 2.0) == 0 ? kInf : kNan;
  if (x < 1 || is_infinite(x) || (q <= 0 && x != ::floor(x))) return kNan;
  // Euler–Maclaurin after nine terms.
  constexpr f64 coefficient[] = {12.0, -720.0, 30240.0, -1209600.0, 47900160.0, -1.8924375803183791606e9,
                                 7.47242496e10, -2.950130727918164224e12, 1.1646782814350067249e14,
                                 -4.5979787224074726105e15, 1.8152105401943546773e17,
                                 -7.1661652561756670113e18};
  f64 power = ::pow(q, -x), sum = power, at = q;
  for (int i = 0; i < 9 || at <= 9; ++i) {
    at += 1;
    power = ::pow(at, -x);
    sum += power;
    if (::fabs(power / sum) < kEps / 2) return sum;
  }
  sum += power * at / (x - 1) - 0.5 * power;
  f64 factor = 1, k = 0;
  for (const f64 c : coefficient) {
    factor *= x + k;
    power /= at;
    const f64 term = factor * power / c;
    sum += term;
    if (::fabs(term / sum) < kEps / 2) break;
    k += 1;
    factor *= x + k;
    power /= at;
    k += 1;
  }
  return sum;
}

MPK_FUNCTION f64 polygamma(f64 n, f64 x) {
  if (n == 0) return digamma(x);
  if (n < 0 || n != ::floor(n)) return kNan;
  const f64 sign = ::fmod(n, 2.0) == 0 ? -1 : 1;
  return sign * ::exp(lgamma(n + 1)) * zeta(n + 1, x);
}

MPK_FUNCTION f64 betainc(f64 a, f64 b, f64 x) {
  if (is_nan(a) || is_nan(b) || is_nan(x) || a < 0 || b < 0 || x < 0 || x > 1) return kNan;
  // Limits in which all of the distribution is at 0 or at 1.
  const bool at_zero = a == 0 || b == kInf, at_one = b == 0 || a == kInf;
  if (at_zero && at_one) return kNan;
  if (x == 0 || x == 1) return x;
  if (at_zero || at_one) return at_zero ? 1 : 0;
  const f64 prefix = beta_prefix(a, b, x);
  if (x < (a + 1) / (a + b + 2)) return prefix * betainc_fraction(a, b, x) / a;
  return 1 - prefix * betainc_fraction(b, a, 1 - x) / b;
}

}  // namespace special

// The operations of generated code.
#define MPK_UNARY(name)                                                                           \
  MPK_DEVICE f32 op_##name(f32 x) { return static_cast<f32>(special::name(x)); }                  \
  MPK_DEVICE f64 op_##name(f64 x) { return special::name(x); }
#define MPK_BINARY(name)                                                                          \
  MPK_DEVICE f32 op_##name(f32 a, f32 b) { return static_cast<f32>(special::name(a, b)); }        \
  MPK_DEVICE f64 op_##name(f64 a, f64 b) { return special::name(a, b); }
MPK_UNARY(lgamma)
MPK_UNARY(digamma)
MPK_UNARY(bessel_i0e)
MPK_UNARY(bessel_i1e)
MPK_UNARY(erf_inv)
MPK_BINARY(igamma)
MPK_BINARY(igammac)
MPK_BINARY(igamma_grad_a)
MPK_BINARY(random_gamma_grad)
MPK_BINARY(zeta)
MPK_BINARY(polygamma)
#undef MPK_UNARY
#undef MPK_BINARY
MPK_DEVICE f32 op_betainc(f32 a, f32 b, f32 x) { return static_cast<f32>(special::betainc(a, b, x)); }
MPK_DEVICE f64 op_betainc(f64 a, f64 b, f64 x) { return special::betainc(a, b, x); }

}  // namespace mpk
