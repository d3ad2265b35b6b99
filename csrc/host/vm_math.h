// Transcendental functions that models live on, vectorised: included once per instruction set. The others, and
// those of f64, are in vm_special.cc.
//
// exp, log, tanh, logistic and erf of f32 are computed in f32, to about 2 ulp; sin, cos, expm1, log1p and exp2 go
// through f64 polynomials, which leaves little more than the final rounding. Denormal results and arguments are
// zero, as everywhere (program.h).
#include "host/vm_loops.h"

namespace jax_mpk::host {
namespace {

constexpr float kInf = __builtin_huge_valf();
constexpr float kNan = __builtin_nanf("");
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T> inline T poly(T, T c) { return c; }
template <class T, class... C>
inline T poly(T x, T c, C... rest) {  // c + x * (rest[0] + x * (...))
  return fma_or_not(x, poly(x, static_cast<T>(rest)...), c);
}

template <class T> struct Exp;
template <> struct Exp<float> {
  static float apply(float x) {
    constexpr float high = 88.72284f, low = -87.33655f, magic = 12582912.0f;
    float inside = x > high ? high : x;
    inside = inside < low ? low : inside;
    float shifted = fma_or_not(inside, 1.44269504f, magic);
    int32_t k = bits_as<int32_t>(shifted) - 0x4b400000;
    float whole = shifted - magic;
    float r = fma_or_not(whole, -0.693359375f, inside);
    r = fma_or_not(whole, 2.12194440e-4f, r);
    float p = poly(r, 5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f, 8.3334519073e-3f, 1.3981999507e-3f,
                   1.9875691500e-4f);
    float y = fma_or_not(r * r, p, r) + 1.0f;
    // 2**k in two steps: k may be 128.
    int32_t first = k >> 1, second = k - first;
    y = y * bits_as<float>((first + 127) << 23) * bits_as<float>((second + 127) << 23);
    y = x > high ? kInf : y;
    return x < low ? 0.0f : y;
  }
};

// e**x in f64 for |x| < 700, to about 1e-10; elsewhere anything. Callers choose the result there by a selection at
// the end: limiting the argument first would tempt the compiler into branches.
inline double exp_wide(double x) {
  constexpr double magic = 6755399441055744.0;
  double shifted = x * kLog2E + magic;
  int64_t k = bits_as<int64_t>(shifted) - bits_as<int64_t>(magic);
  double r = fma_or_not(shifted - magic, -kLn2, x);
  double p = poly(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320);
  return p * bits_as<double>((k + 1023) << 52);
}
template <class T> struct Exp2 {
  static float apply(float a) {
    float y = static_cast<float>(exp_wide(a * kLn2));
    y = a >= 128.0f ? kInf : y;
    return a < -150.0f ? 0.0f : y;
  }
};
template <class T> struct Expm1 {
  static float apply(float a) {
    double x = a;
    double series = poly(x, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880);
    float far = static_cast<float>(exp_wide(x) - 1.0), near = static_cast<float>(x * series);
    float out = bits_as<float>(bits_as<uint32_t>(a) & 0x7fffffffu) < 0.5f ? near : far;
    out = a > 89.0f ? kInf : out;
    out = a < -40.0f ? -1.0f : out;
    return a == 0.0f ? a : out;
  }
};

template <class T> struct Log;
template <> struct Log<float> {
  static float apply(float x) {
    // x = 2**e * m with sqrt(1/2) <= m < sqrt(2).
    int32_t bits = bits_as<int32_t>(x) - 0x3f3504f3;
    float e = static_cast<float>(bits >> 23);
    float f = bits_as<float>((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    float p = poly(f, 3.3333331174e-1f, -2.4999993993e-1f, 2.0000714765e-1f, -1.6668057665e-1f, 1.4249322787e-1f,
                   -1.2420140846e-1f, 1.1676998740e-1f, -1.1514610310e-1f, 7.0376836292e-2f);
    float square = f * f;
    float y = f * square * p;
    y = fma_or_not(e, -2.12194440e-4f, y);
    y = fma_or_not(square, -0.5f, y);
    y = fma_or_not(e, 0.693359375f, f + y);
    y = x == kInf ? kInf : y;
    y = x == 0.0f ? -kInf : y;
    y = x < 0.0f ? kNan : y;
    return x != x ? x : y;
  }
};

// log in f64 for 0 < x < inf, to about 1e-11.
inline double log_wide(double x) {
  int64_t bits = bits_as<int64_t>(x) - 0x3fe6a09e667f3bcd;
  double e = static_cast<double>(static_cast<int32_t>(bits >> 52));
  double m = bits_as<double>((bits & 0xfffffffffffff) + 0x3fe6a09e667f3bcd);
  double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = poly(z, 2.0, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13);
  return fma_or_not(e, kLn2, s * p);
}
template <class T> struct Log1p {
  static float apply(float a) {
    // 1 + x rounds; x / ((1 + x) - 1) makes up for it.
    double x = a, u = 1.0 + x;
    double y = log_wide(u) * (x / (u - 1.0));
    y = x > 1e10 ? log_wide(u) : y;
    float out = static_cast<float>(y);
    out = u == 1.0 ? a : out;
    out = a == kInf ? kInf : out;
    out = a == -1.0f ? -kInf : out;
    return a < -1.0f ? kNan : out;
  }
};

template <class T> struct Sqrt { static T apply(T x) { return sizeof(T) == 4 ? __builtin_sqrtf(x) : __builtin_sqrt(x); } };
template <class T> struct Rsqrt { static T apply(T x) { return T(1) / Sqrt<T>::apply(x); } };

template <class T> struct Logistic {
  static float apply(float x) { return 1.0f / (1.0f + Exp<float>::apply(-x)); }
};

template <class T> struct Tanh {
  static float apply(float x) {
    constexpr float limit = 7.90531110763549805f;
    float y = x > limit ? limit : x;
    y = y < -limit ? -limit : y;
    float z = y * y;
    float p = poly(z, 4.89352455891786e-03f, 6.37261928875436e-04f, 1.48572235717979e-05f, 5.12229709037114e-08f,
                   -8.60467152213735e-11f, 2.00018790482477e-13f, -2.76076847742355e-16f);
    float q = poly(z, 4.89352518554385e-03f, 2.26843463243900e-03f, 1.18534705686654e-04f, 1.19825839466702e-06f);
    float out = y * p / q;
    float size = x < 0.0f ? -x : x;
    out = size < 0.0004f ? x : out;
    return size > 9.0f ? (x > 0.0f ? 1.0f : -1.0f) : out;
  }
};

template <class T> struct Erf {
  static float apply(float a) {
    // Odd Taylor-like series near 0 and Abramowitz-Stegun style tail, both in f64.
    const float magnitude = bits_as<float>(bits_as<uint32_t>(a) & 0x7fffffffu);
    double size = magnitude, z = size * size;
    double near = size * poly(z, 1.1283791670955126, -0.37612638903183754, 0.11283791670955126, -0.026866170645131252,
                              0.005223977625442187, -0.0008548327023450852, 0.00012055332981789664,
                              -1.4925650358406251e-05, 1.6462114365889246e-06, -1.6365844691234924e-07,
                              1.4807192815879218e-08, -1.2290555301717927e-09);
    double t = 1.0 / fma_or_not(size, 0.5, 1.0);
    double inner = poly(t, -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398,
                        1.48851587, -0.82215223, 0.17087277);
    double far = 1.0 - t * exp_wide(inner - z);
    float out = magnitude < 1.0f ? static_cast<float>(near) : static_cast<float>(far);
    out = magnitude > 4.0f ? 1.0f : out;
    out = bits_as<float>((bits_as<uint32_t>(out) & 0x7fffffffu) | (bits_as<uint32_t>(a) & 0x80000000u));
    return a != a ? a : out;
  }
};

// sin and cos by quarter turns, exact enough in f64 up to 2**20 of them; beyond that one by one.
template <bool kCosine>
inline float turn(float a) {
  constexpr double magic = 6755399441055744.0;
  double x = a;
  double shifted = x * 0.6366197723675814 + magic;
  int64_t k = bits_as<int64_t>(shifted);
  double whole = shifted - magic;
  double r = fma_or_not(whole, -1.57079632673412561417e+00, x);
  r = fma_or_not(whole, -6.07710050650619224932e-11, r);
  double z = r * r;
  double sine = fma_or_not(r * z, poly(z, -0x15555554cbac77.0p-55, 0x111110896efbb2.0p-59, -0x1a00f9e2cae774.0p-65,
                                       0x16cd878c3b46a7.0p-71), r);
  double cosine = poly(z, 1.0, -0x1ffffffd0c5e81.0p-54, 0x155553e1053a42.0p-57, -0x16c087e80f1e27.0p-62,
                       0x199342e0ee5069.0p-68);
  int64_t quarter = kCosine ? k + 1 : k;
  double y = quarter & 1 ? cosine : sine;
  return static_cast<float>(quarter & 2 ? -y : y);
}
template <bool kCosine>
void turn_loop(void* out, const void* a, const void*, const void*, int64_t n, int64_t) {
  float* o = static_cast<float*>(out);
  const float* x = static_cast<const float*>(a);
  for (int64_t i = 0; i < n; i += kBlock) {
    int odd = 0;
    for (int64_t j = 0; j < kBlock; ++j) odd |= !(x[i + j] < 1.0e6f && x[i + j] > -1.0e6f);
    if (odd) {
      for (int64_t j = i; j < n && j < i + kBlock; ++j) {
        double wide = x[j];
        o[j] = static_cast<float>(kCosine ? __builtin_cos(wide) : __builtin_sin(wide));
      }
    } else {
#pragma GCC ivdep
      for (int64_t j = 0; j < kBlock; ++j) {
        float y = turn<kCosine>(x[i + j]);
        o[i + j] = !kCosine && x[i + j] == 0.0f ? x[i + j] : y;  // keeps −0
      }
    }
  }
}

void add_math(KernelTable& t) {
  add_unary<Exp, float>(t, Op::k_exp);
  add_unary<Exp2, float>(t, Op::k_exp2);
  add_unary<Expm1, float>(t, Op::k_expm1);
  add_unary<Log, float>(t, Op::k_log);
  add_unary<Log1p, float>(t, Op::k_log1p);
  add_unary<Sqrt, float, double>(t, Op::k_sqrt);
  add_unary<Rsqrt, float, double>(t, Op::k_rsqrt);
  add_unary<Logistic, float>(t, Op::k_logistic);
  add_unary<Tanh, float>(t, Op::k_tanh);
  add_unary<Erf, float>(t, Op::k_erf);
  slot(t, Op::k_sin, Type::k_f32) = &turn_loop<false>;
  slot(t, Op::k_cos, Type::k_f32) = &turn_loop<true>;
}

}  // namespace

void JAX_MPK_JOIN(add_math_, JAX_MPK_VM_ISA)(KernelTable& table) { add_math(table); }

}  // namespace jax_mpk::host
