// contract_kernels_impl.h with AVX-512 (F, BW, DQ, VL).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // GCC 12 warns about its own intrinsics (PR 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "host/tasks/contract_kernels_impl.h"

namespace jax_mpk::host {
namespace {

struct FromF32;
struct FromF64;
struct FromS32;

__m256i load_256(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
__m128i load_128(const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

struct F32 {
  using Scalar = float;
  using Vec = __m512;
  using Own = FromF32;
  static constexpr int kLanes = 16, kMaxRows = 14, kDotRows = 8;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec load(const void* p) { return _mm512_loadu_ps(p); }
  static void store(void* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static float plus(float a, float b) { return a + b; }
  static void interleave(Vec& a, Vec& b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const Vec first = _mm512_permutex2var_ps(a, low, b);
    b = _mm512_permutex2var_ps(a, high, b);
    a = first;
  }
  static void sum4(const Vec* v, float* out) {
    const Vec a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const Vec b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    const Vec quads = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    const __m256 halves =
        _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
    _mm_storeu_ps(out,
                  _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }
};

struct F64 {
  using Scalar = double;
  using Vec = __m512d;
  using Own = FromF64;
  static constexpr int kLanes = 8, kMaxRows = 14, kDotRows = 8;

  static Vec zero() { return _mm512_setzero_pd(); }
  static Vec broadcast(const double* p) { return _mm512_set1_pd(*p); }
  static Vec load(const void* p) { return _mm512_loadu_pd(p); }
  static void store(void* p, Vec v) { _mm512_storeu_pd(p, v); }
  static Vec add(Vec a, Vec b) { return _mm512_add_pd(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_pd(a, b, c); }
  static double plus(double a, double b) { return a + b; }
  static void interleave(Vec& a, Vec& b) {
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
    const Vec first = _mm512_permutex2var_pd(a, low, b);
    b = _mm512_permutex2var_pd(a, high, b);
    a = first;
  }
  static void sum4(const Vec* v, double* out) { sum4_by_halves<F64>(v, out); }
};

struct S32 {
  using Scalar = int32_t;
  using Vec = __m512i;
  using Own = FromS32;
  static constexpr int kLanes = 16, kMaxRows = 14, kDotRows = 8;

  static Vec zero() { return _mm512_setzero_si512(); }
  static Vec broadcast(const int32_t* p) { return _mm512_set1_epi32(*p); }
  static Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Vec v) { _mm512_storeu_si512(p, v); }
  static Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_add_epi32(c, _mm512_mullo_epi32(a, b)); }
  static int32_t plus(int32_t a, int32_t b) { return wrapping_add(a, b); }
  static void interleave(Vec& a, Vec& b) {
    __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    F32::interleave(x, y);
    a = _mm512_castps_si512(x);
    b = _mm512_castps_si512(y);
  }
  static void sum4(const Vec* v, int32_t* out) { sum4_by_halves<S32>(v, out); }
};

struct FromF32 : Direct<F32, float, ElementType::kF32> {
  static __m512 load(const char* p) { return _mm512_loadu_ps(p); }
};

struct FromF64 : Direct<F64, double, ElementType::kF64> {
  static __m512d load(const char* p) { return _mm512_loadu_pd(p); }
};

struct FromS32 : Direct<S32, int32_t, ElementType::kS32> {
  static __m512i load(const char* p) { return _mm512_loadu_si512(p); }
};

struct FromS8 : PackedOnly<S32, int8_t, ElementType::kS8> {
  static __m512i load(const char* p) { return _mm512_cvtepi8_epi32(load_128(p)); }
};

struct FromU8 : PackedOnly<S32, uint8_t, ElementType::kU8> {
  static __m512i load(const char* p) { return _mm512_cvtepu8_epi32(load_128(p)); }
};

struct FromF16 : Direct<F32, uint16_t, ElementType::kF16> {
  static float get(const char* p) { return _cvtsh_ss(peek<uint16_t>(p)); }
  static __m512 load(const char* p) { return _mm512_cvtph_ps(load_256(p)); }
};

// Even and odd elements: a shift and a mask, where widening in order would take two shuffles more.
struct FromBF16 : Direct<F32, uint16_t, ElementType::kBF16> {
  static constexpr bool kSplit = true;
  static float get(const char* p) { return bf16_to_f32(peek<uint16_t>(p)); }
  static __m512 load(const char* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16));
  }
  static void split(const char* p, __m512& even, __m512& odd) {
    const __m512i v = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536)));
  }
};

}  // namespace

extern const ContractKernels contract_kernels_avx512 = {
    run<F32, FromF32, FromBF16, FromF16>, run<F64, FromF64>, run<S32, FromS32, FromS8, FromU8>,
    workspace_bytes<F32, F64, S32>()};

}  // namespace jax_mpk::host
