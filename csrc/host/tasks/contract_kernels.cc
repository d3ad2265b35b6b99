// Choice of the instruction set, and contract_kernels_impl.h without any: vectors of 16 bytes in
// the compiler's own notation, which it maps to SSE2 or NEON.
#include "host/tasks/contract_kernels.h"

#include <cstddef>
#include <memory>
#include <new>

#include "host/tasks/contract_kernels_impl.h"

namespace jax_mpk::host {

#if defined(__x86_64__)
extern const ContractKernels contract_kernels_avx2, contract_kernels_avx512;
#endif

namespace {

struct FromF32;
struct FromF64;
struct FromS32;

template <class T, class OwnSource>
struct Family {
  using Scalar = T;
  typedef T Vec __attribute__((vector_size(16)));
  using Own = OwnSource;
  static constexpr int kLanes = 16 / sizeof(T), kMaxRows = 4, kDotRows = 4;

  static Vec zero() { return Vec{}; }
  static Vec broadcast(const T* p) { return *p - Vec{}; }
  static Vec load(const void* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(void* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static void interleave(Vec& a, Vec& b) {
    T lanes[2 * kLanes];
    for (int i = 0; i < kLanes; ++i) {
      lanes[2 * i] = a[i];
      lanes[2 * i + 1] = b[i];
    }
    a = load(lanes);
    b = load(lanes + kLanes);
  }
};

template <class T, class OwnSource>
struct Float : Family<T, OwnSource> {
  using Vec = typename Family<T, OwnSource>::Vec;
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
    for (int i = 0; i < Float::kLanes; ++i) {
      c[i] = sizeof(T) == 4 ? __builtin_fmaf(a[i], b[i], c[i]) : __builtin_fma(a[i], b[i], c[i]);
    }
    return c;
#else
    return a * b + c;
#endif
  }
  static T plus(T a, T b) { return a + b; }
  static void sum4(const Vec* v, T* out) { sum4_by_halves<Float>(v, out); }
};

using F32 = Float<float, FromF32>;
using F64 = Float<double, FromF64>;

struct S32 : Family<int32_t, FromS32> {
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  static Vec add(Vec a, Vec b) { return Vec(Unsigned(a) + Unsigned(b)); }
  static Vec fma(Vec a, Vec b, Vec c) { return Vec(Unsigned(a) * Unsigned(b) + Unsigned(c)); }
  static int32_t plus(int32_t a, int32_t b) { return wrapping_add(a, b); }
  static void sum4(const Vec* v, int32_t* out) { sum4_by_halves<S32>(v, out); }
};

// Elements one by one; the compiler makes vectors of it where it can.
template <class Base, class Derived>
struct Loads : Base {
  using F = typename Base::Family;
  static typename F::Vec load(const char* p) {
    typename F::Vec v = {};
    for (int i = 0; i < F::kLanes; ++i) v[i] = Derived::get(p + i * Base::kSize);
    return v;
  }
};

struct FromF32 : Loads<Direct<F32, float, ElementType::kF32>, FromF32> {};
struct FromF64 : Loads<Direct<F64, double, ElementType::kF64>, FromF64> {};
struct FromS32 : Loads<Direct<S32, int32_t, ElementType::kS32>, FromS32> {};
struct FromS8 : Loads<PackedOnly<S32, int8_t, ElementType::kS8>, FromS8> {};
struct FromU8 : Loads<PackedOnly<S32, uint8_t, ElementType::kU8>, FromU8> {};

struct FromBF16 : Loads<Direct<F32, uint16_t, ElementType::kBF16>, FromBF16> {
  static float get(const char* p) { return bf16_to_f32(peek<uint16_t>(p)); }
};

// With integers only: denormal halves are values like any other, whatever the mode of the
// floating-point unit.
struct FromF16 : Loads<Direct<F32, uint16_t, ElementType::kF16>, FromF16> {
  static float get(const char* p) {
    const uint32_t half = peek<uint16_t>(p), sign = (half & 0x8000) << 16;
    uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) {
      exponent = 255;
      if (fraction != 0) fraction |= 512;  // a signalling NaN becomes quiet, as in hardware
    } else if (exponent != 0) {
      exponent += 127 - 15;
    } else if (fraction != 0) {
      const int shift = __builtin_clz(fraction) - 21;
      fraction = fraction << shift & 1023;
      exponent = 127 - 15 + 1 - shift;
    }
    const uint32_t bits = sign | exponent << 23 | fraction << 13;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

constexpr ContractKernels kPortable = {run<F32, FromF32, FromBF16, FromF16>, run<F64, FromF64>,
                                       run<S32, FromS32, FromS8, FromU8>,
                                       workspace_bytes<F32, F64, S32>()};

const ContractKernels* kernels(ContractIsa isa) {
  switch (isa) {
    case ContractIsa::kPortable:
      return &kPortable;
#if defined(__x86_64__)
    case ContractIsa::kAvx2:
      // Every CPU with AVX2 has F16C, which not every compiler can ask for.
      if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return &contract_kernels_avx2;
      }
      return nullptr;
    case ContractIsa::kAvx512:
      if (kernels(ContractIsa::kAvx2) && __builtin_cpu_supports("avx512f") &&
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl")) {
        return &contract_kernels_avx512;
      }
      return nullptr;
#endif
    default:
      return nullptr;
  }
}

const ContractKernels& best_kernels() {
  for (const ContractIsa isa : {ContractIsa::kAvx512, ContractIsa::kAvx2}) {
    if (const ContractKernels* best = kernels(isa)) return *best;
  }
  return kPortable;
}

struct Free {
  void operator()(void* p) const { ::operator delete (p, std::align_val_t{64}); }
};

// One block a thread, large enough for any instruction set and kept for the thread's life.
void* workspace(int64_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(::operator new (static_cast<size_t>(bytes), std::align_val_t{64}));
    size = bytes;
  }
  return memory.get();
}

bool run_with(const ContractKernels& kernels, const ContractArgs& a) {
  const bool empty = a.b <= 0 || a.m <= 0 || a.n <= 0;
  const bool coincide =
      (a.b > 1 && a.acc_b == 0) || (a.m > 1 && a.acc_m == 0) || (a.n > 1 && a.acc_n == 0);
  if (a.k < 0 || (coincide && !empty)) return false;
  ContractKernels::Run run = nullptr;
  if (a.acc_type == ElementType::kF32) run = kernels.f32;
  if (a.acc_type == ElementType::kF64) run = kernels.f64;
  if (a.acc_type == ElementType::kS32) run = kernels.s32;
  if (run == nullptr) return false;
  ContractArgs args = a;
  if (empty) args.b = 0;  // still refuses types
  return run(args, workspace(kernels.workspace_bytes));
}

}  // namespace

bool contract_tile(const ContractArgs& args) {
  static const ContractKernels& best = best_kernels();
  return run_with(best, args);
}

bool contract_isa_supported(ContractIsa isa) { return kernels(isa) != nullptr; }

bool contract_tile_with(ContractIsa isa, const ContractArgs& args) {
  const ContractKernels* chosen = kernels(isa);
  return chosen != nullptr && run_with(*chosen, args);
}

}  // namespace jax_mpk::host
