#include "host/special_functions.h"

#include <cmath>
#include <limits>

namespace jax_mpk::host::special {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kPi = 3.14159265358979323846;

// std::lgamma writes a global; this one does not.
long double lgamma_long(long double x) {
  int sign;
  return ::lgammal_r(x, &sign);
}

// x**a * e**-x / gamma(a + shift), in long double: the terms of the exponent cancel for large a.
double gamma_prefix(double a, double x, double shift) {
  long double wide_a = a, wide_x = x;
  return static_cast<double>(std::exp(wide_a * std::log(wide_x) - wide_x - lgamma_long(wide_a + shift)));
}

enum class Mode { kValue, kDerivative, kSampleDerivative };

// P(a, x) and its derivatives by the power series, for x up to about a.
double igamma_series(double a, double x, Mode mode) {
  double r = a, c = 1, sum = 1, dc = 0, dsum = 0;
  for (int i = 0; i < 100000; ++i) {
    r += 1;
    dc = dc * (x / r) - c * x / (r * r);
    dsum += dc;
    c *= x / r;
    sum += c;
    bool done = mode == Mode::kValue ? c <= kEps * sum : std::fabs(dc) <= kEps * std::fabs(dsum);
    if (done || std::isnan(sum)) break;
  }
  if (mode == Mode::kValue) return sum * gamma_prefix(a, x, 1);
  double dlog = std::log(x) - digamma(a + 1);
  if (mode == Mode::kDerivative) return gamma_prefix(a, x, 1) * (sum * dlog + dsum);
  return -(dsum + sum * dlog) * x / a;
}

// Q(a, x) and its derivatives by Legendre's continued fraction, for x > a.
double igammac_fraction(double a, double x, Mode mode) {
  double y = 1 - a, z = x + y + 1, c = 0;
  double pkm2 = 1, qkm2 = x, pkm1 = x + 1, qkm1 = z * x;
  double ans = pkm1 / qkm1;
  double dpkm2 = 0, dqkm2 = 0, dpkm1 = 0, dqkm1 = -x;
  double dans = (dpkm1 - ans * dqkm1) / qkm1;
  for (int i = 0; i < 2000; ++i) {
    c += 1, y += 1, z += 2;
    double yc = y * c;
    double pk = pkm1 * z - pkm2 * yc, qk = qkm1 * z - qkm2 * yc;
    double change = 1, dchange = 1;
    double dpk = dpkm1 * z - pkm1 - dpkm2 * yc + pkm2 * c;
    double dqk = dqkm1 * z - qkm1 - dqkm2 * yc + qkm2 * c;
    if (qk != 0) {
      double r = pk / qk;
      change = std::fabs((ans - r) / r);
      ans = r;
      double dnext = (dpk - ans * dqk) / qk;
      dchange = std::fabs(dnext - dans);
      dans = dnext;
    }
    pkm2 = pkm1, pkm1 = pk, qkm2 = qkm1, qkm1 = qk;
    dpkm2 = dpkm1, dpkm1 = dpk, dqkm2 = dqkm1, dqkm1 = dqk;
    if (std::fabs(pk) > 1 / kEps) {
      pkm2 *= kEps, pkm1 *= kEps, qkm2 *= kEps, qkm1 *= kEps;
      dpkm2 *= kEps, dpkm1 *= kEps, dqkm2 *= kEps, dqkm1 *= kEps;
    }
    if (mode == Mode::kValue ? change <= kEps : dchange <= kEps) break;
  }
  if (mode == Mode::kValue) return ans * gamma_prefix(a, x, 0);
  double dlog = std::log(x) - digamma(a);
  if (mode == Mode::kDerivative) return gamma_prefix(a, x, 0) * (dans + ans * dlog);
  return -(dans + ans * dlog) * x;
}

// The continued fraction of the incomplete beta function, modified Lentz; converges fast for x < (a+1)/(a+b+2).
double betainc_fraction(double a, double b, double x) {
  constexpr double tiny = 1e-300;
  double c = 1, d = 1 - (a + b) * x / (a + 1);
  if (std::fabs(d) < tiny) d = tiny;
  d = 1 / d;
  double out = d;
  for (int m = 1; m <= 20000; ++m) {
    double m2 = 2.0 * m;
    double even = m * (b - m) * x / ((a + m2 - 1) * (a + m2));
    double odd = -(a + m) * (a + b + m) * x / ((a + m2) * (a + m2 + 1));
    for (int half = 0; half < 2; ++half) {
      double term = half == 0 ? even : odd;
      d = 1 + term * d;
      if (std::fabs(d) < tiny) d = tiny;
      c = 1 + term / c;
      if (std::fabs(c) < tiny) c = tiny;
      d = 1 / d;
      out *= d * c;
    }
    if (std::fabs(d * c - 1) < kEps) break;
  }
  return out;
}

// e**-x * I_order(x) for x > 0: power series, whose terms are all positive, then the asymptotic one.
double bessel_scaled(int order, double x) {
  if (x < 30) {
    double quarter = x * x / 4, term = order == 0 ? 1 : x / 2, sum = term;
    for (int k = 1; k < 500; ++k) {
      term *= quarter / (static_cast<double>(k) * (k + order));
      sum += term;
      if (term < sum * (kEps / 4)) break;
    }
    return sum * std::exp(-x);
  }
  double mu = 4.0 * order * order, term = 1, sum = 1;
  for (int k = 1; k < 40; ++k) {
    double odd = 2.0 * k - 1;
    double next = -term * (mu - odd * odd) / (8.0 * k * x);
    if (std::fabs(next) >= std::fabs(term)) break;
    term = next;
    sum += term;
    if (std::fabs(term) < std::fabs(sum) * (kEps / 4)) break;
  }
  return sum / (std::sqrt(2 * kPi) * std::sqrt(x));
}

}  // namespace

double lgamma(double x) {
  int sign;
  return ::lgamma_r(x, &sign);
}

double digamma(double x) {
  if (std::isnan(x) || x == -kInf) return kNan;
  if (x == kInf) return kInf;
  if (x <= 0 && std::floor(x) == x) return kNan;
  double extra = 0;
  if (x < 0.5) {  // reflection, with the fraction taken first so that tan is accurate
    double fraction = x - std::nearbyint(x);
    extra = fraction == 0.5 || fraction == -0.5 ? 0 : kPi / std::tan(kPi * fraction);
    x = 1 - x;
  }
  double shift = 0;
  for (; x < 10; x += 1) shift += 1 / x;
  double z = 1 / (x * x);
  double series = z * (1.0 / 12 - z * (1.0 / 120 - z * (1.0 / 252 - z * (1.0 / 240 - z * (1.0 / 132 -
                  z * (691.0 / 32760 - z * (1.0 / 12)))))));
  return std::log(x) - 0.5 / x - series - shift - extra;
}

double bessel_i0e(double x) {
  if (std::isnan(x)) return x;
  return std::isinf(x) ? 0 : bessel_scaled(0, std::fabs(x));
}

double bessel_i1e(double x) {
  if (std::isnan(x) || x == 0) return x;
  return std::isinf(x) ? std::copysign(0.0, x) : std::copysign(bessel_scaled(1, std::fabs(x)), x);
}

double erf_inv(double x) {
  double size = std::fabs(x);
  if (std::isnan(x) || size > 1) return kNan;
  if (size == 1) return std::copysign(kInf, x);
  if (x == 0) return x;
  // Winitzki's estimate, then Halley's method on erf or, in the tail, on erfc.
  double log_term = std::log1p(-x * x), a = 0.147;
  double first = 2 / (kPi * a) + log_term / 2;
  double y = std::sqrt(std::sqrt(first * first - log_term / a) - first);
  for (int i = 0; i < 4; ++i) {
    double error = size < 0.5 ? std::erf(y) - size : (1 - size) - std::erfc(y);
    double step = error / (1.1283791670955126 * std::exp(-y * y));
    y -= step / (1 + y * step);
    if (std::fabs(step) < kEps * y) break;
  }
  return std::copysign(y, x);
}

double igamma(double a, double x) {
  if (std::isnan(a) || std::isnan(x) || x < 0 || a < 0) return kNan;
  if (a == 0) return x == 0 ? kNan : 1;
  if (x == 0) return 0;
  if (std::isinf(a)) return std::isinf(x) ? kNan : 0;
  if (std::isinf(x)) return 1;
  return x > 1 && x > a ? 1 - igammac_fraction(a, x, Mode::kValue) : igamma_series(a, x, Mode::kValue);
}

double igammac(double a, double x) {
  if (std::isnan(a) || std::isnan(x) || x < 0 || a < 0) return kNan;
  if (a == 0) return x == 0 ? kNan : 0;
  if (x == 0) return 1;
  if (std::isinf(a)) return std::isinf(x) ? kNan : 1;
  if (std::isinf(x)) return 0;
  return x < 1 || x < a ? 1 - igamma_series(a, x, Mode::kValue) : igammac_fraction(a, x, Mode::kValue);
}

double igamma_grad_a(double a, double x) {
  if (std::isnan(a) || std::isnan(x) || x < 0 || a <= 0) return kNan;
  if (x == 0) return 0;
  return x > 1 && x > a ? -igammac_fraction(a, x, Mode::kDerivative) : igamma_series(a, x, Mode::kDerivative);
}

double random_gamma_grad(double a, double x) {
  if (std::isnan(a) || std::isnan(x) || x < 0 || a <= 0) return kNan;
  if (x == 0) return 0;
  return x > 1 && x > a ? -igammac_fraction(a, x, Mode::kSampleDerivative)
                        : igamma_series(a, x, Mode::kSampleDerivative);
}

double zeta(double x, double q) {
  if (std::isnan(x) || std::isnan(q)) return kNan;
  if (x == 1) return kInf;
  if (x < 1) return kNan;
  if (q <= 0) {
    if (q == std::floor(q)) {
      // A pole; only even x give it a sign.
      return x == std::floor(x) && std::fmod(x, 2.0) == 0 ? kInf : kNan;
    }
    if (x != std::floor(x)) return kNan;
  }
  if (std::isinf(x)) return q == 1 ? 1 : q > 1 ? 0 : kInf;
  // Euler–Maclaurin after nine terms.
  static constexpr double coefficient[] = {12.0, -720.0, 30240.0, -1209600.0, 47900160.0, -1.8924375803183791606e9,
                                           7.47242496e10, -2.950130727918164224e12, 1.1646782814350067249e14,
                                           -4.5979787224074726105e15, 1.8152105401943546773e17,
                                           -7.1661652561756670113e18};
  double power = std::pow(q, -x), sum = power, at = q;
  for (int i = 0; i < 9 || at <= 9; ++i) {
    at += 1;
    power = std::pow(at, -x);
    sum += power;
    if (std::fabs(power / sum) < kEps / 2) return sum;
  }
  sum += power * at / (x - 1) - 0.5 * power;
  double factor = 1, k = 0;
  for (double c : coefficient) {
    factor *= x + k;
    power /= at;
    double term = factor * power / c;
    sum += term;
    if (std::fabs(term / sum) < kEps / 2) break;
    k += 1;
    factor *= x + k;
    power /= at;
    k += 1;
  }
  return sum;
}

double polygamma(double n, double x) {
  if (n == 0) return digamma(x);
  if (n < 0 || n != std::floor(n)) return kNan;
  double sign = std::fmod(n, 2.0) == 0 ? -1 : 1;
  return sign * std::exp(lgamma(n + 1)) * zeta(n + 1, x);
}

double betainc(double a, double b, double x) {
  if (std::isnan(a) || std::isnan(b) || std::isnan(x) || a < 0 || b < 0 || x < 0 || x > 1) return kNan;
  if (a == 0 || b == 0) return a == b ? kNan : b == 0 ? 0 : 1;
  if (x == 0) return 0;
  if (x == 1) return 1;
  long double wa = a, wb = b, wx = x;
  long double log_prefix = wa * std::log(wx) + wb * std::log1p(-wx) + lgamma_long(wa + wb) - lgamma_long(wa) -
                           lgamma_long(wb);
  double prefix = static_cast<double>(std::exp(log_prefix));
  if (x < (a + 1) / (a + b + 2)) return prefix * betainc_fraction(a, b, x) / a;
  return 1 - prefix * betainc_fraction(b, a, 1 - x) / b;
}

}  // namespace jax_mpk::host::special
