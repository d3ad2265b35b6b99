// contract_kernels_impl.h with AVX2, FMA and F16C.
#include <immintrin.h>

#include "host/tasks/contract_kernels_impl.h"

namespace jax_mpk::host {
namespace {

struct FromF32;
struct FromF64;
struct FromS32;

__m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
__m128i load_128(const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
__m128i load_64(const char* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

struct F32 {
  using Scalar = float;
  using Vec = __m256;
  using Own = FromF32;
  static constexpr int kLanes = 8, kMaxRows = 6, kDotRows = 4;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static float plus(float a, float b) { return a + b; }
  static void interleave(Vec& a, Vec& b) {
    const Vec low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static void sum4(const Vec* v, float* out) {
    const Vec a = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    const Vec b = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
    const Vec pairs = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(c, d)),
                                    _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }
};

struct F64 {
  using Scalar = double;
  using Vec = __m256d;
  using Own = FromF64;
  static constexpr int kLanes = 4, kMaxRows = 6, kDotRows = 4;

  static Vec zero() { return _mm256_setzero_pd(); }
  static Vec broadcast(const double* p) { return _mm256_broadcast_sd(p); }
  static Vec load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Vec v) { _mm256_storeu_pd(p, v); }
  static Vec add(Vec a, Vec b) { return _mm256_add_pd(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_pd(a, b, c); }
  static double plus(double a, double b) { return a + b; }
  static void interleave(Vec& a, Vec& b) {
    const Vec low = _mm256_unpacklo_pd(a, b), high = _mm256_unpackhi_pd(a, b);
    a = _mm256_permute2f128_pd(low, high, 0x20);
    b = _mm256_permute2f128_pd(low, high, 0x31);
  }
  static void sum4(const Vec* v, double* out) { sum4_by_halves<F64>(v, out); }
};

struct S32 {
  using Scalar = int32_t;
  using Vec = __m256i;
  using Own = FromS32;
  static constexpr int kLanes = 8, kMaxRows = 6, kDotRows = 4;

  static Vec zero() { return _mm256_setzero_si256(); }
  static Vec broadcast(const int32_t* p) { return _mm256_set1_epi32(*p); }
  static Vec load(const int32_t* p) { return load_256(p); }
  static void store(int32_t* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_add_epi32(c, _mm256_mullo_epi32(a, b)); }
  static int32_t plus(int32_t a, int32_t b) { return wrapping_add(a, b); }
  static void interleave(Vec& a, Vec& b) {
    const Vec low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);
    a = _mm256_permute2x128_si256(low, high, 0x20);
    b = _mm256_permute2x128_si256(low, high, 0x31);
  }
  static void sum4(const Vec* v, int32_t* out) { sum4_by_halves<S32>(v, out); }
};

struct FromF32 : Direct<F32, float, ElementType::kF32> {
  static __m256 load(const char* p) { return _mm256_castsi256_ps(load_256(p)); }
};

struct FromF64 : Direct<F64, double, ElementType::kF64> {
  static __m256d load(const char* p) { return _mm256_castsi256_pd(load_256(p)); }
};

struct FromS32 : Direct<S32, int32_t, ElementType::kS32> {
  static __m256i load(const char* p) { return load_256(p); }
};

struct FromS8 : PackedOnly<S32, int8_t, ElementType::kS8> {
  static __m256i load(const char* p) { return _mm256_cvtepi8_epi32(load_64(p)); }
};

struct FromU8 : PackedOnly<S32, uint8_t, ElementType::kU8> {
  static __m256i load(const char* p) { return _mm256_cvtepu8_epi32(load_64(p)); }
};

struct FromF16 : Direct<F32, uint16_t, ElementType::kF16> {
  static float get(const char* p) { return _cvtsh_ss(peek<uint16_t>(p)); }
  static __m256 load(const char* p) { return _mm256_cvtph_ps(load_128(p)); }
};

// Even and odd elements: a shift and a mask, where widening in order would take two shuffles more.
struct FromBF16 : Direct<F32, uint16_t, ElementType::kBF16> {
  static constexpr bool kSplit = true;
  static float get(const char* p) { return bf16_to_f32(peek<uint16_t>(p)); }
  static __m256 load(const char* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
  }
  static void split(const char* p, __m256& even, __m256& odd) {
    const __m256i v = load_256(p);
    even = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(-65536)));
  }
};

}  // namespace

extern const ContractKernels contract_kernels_avx2 = {
    run<F32, FromF32, FromBF16, FromF16>, run<F64, FromF64>, run<S32, FromS32, FromS8, FromU8>,
    workspace_bytes<F32, F64, S32>()};

}  // namespace jax_mpk::host
