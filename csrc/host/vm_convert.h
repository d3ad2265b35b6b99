// Conversions between element types: included once per instruction set.
//
// Float to integer truncates, saturates and maps NaN to 0; anything to b1 is x != 0. f16 and bf16 come from and go
// to f32, so f64 and wide integers are rounded twice on the way to them, as in XLA.
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "host/vm_loops.h"

namespace jax_mpk::host {
namespace {

// f16 bits of a block as f32 and back, exact for denormals whatever MXCSR says.
#ifdef __F16C__
inline void widen_f16(const uint16_t* in, float* out) {
  for (int h = 0; h < kBlock; h += 8) {
    _mm256_storeu_ps(out + h, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + h))));
  }
}
inline void narrow_f16(const float* in, uint16_t* out) {
  for (int h = 0; h < kBlock; h += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + h),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + h), _MM_FROUND_TO_NEAREST_INT));
  }
}
#else
inline void widen_f16(const uint16_t* in, float* out) {
  for (int j = 0; j < kBlock; ++j) {
    uint32_t sign = uint32_t(in[j] & 0x8000) << 16, exponent = in[j] >> 10 & 31, mantissa = in[j] & 1023;
    // Normal, infinite (exponent 255) and quiet NaN by bits; denormals as an integer times 2**-24.
    uint32_t quiet = mantissa != 0 ? 0x400000u : 0;
    uint32_t special = 0x7f800000u | mantissa << 13 | quiet;
    uint32_t normal = (exponent + 112) << 23 | mantissa << 13;
    uint32_t denormal = bits_as<uint32_t>(static_cast<float>(static_cast<int32_t>(mantissa)) * 5.9604644775390625e-8f);
    uint32_t bits = exponent == 31 ? special : exponent == 0 ? denormal : normal;
    out[j] = bits_as<float>(sign | bits);
  }
}
inline void narrow_f16(const float* in, uint16_t* out) {
  for (int j = 0; j < kBlock; ++j) {
    uint32_t bits = bits_as<uint32_t>(in[j]), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffffu;
    uint32_t nan = 0x7e00u | (size >> 13 & 0x3ff);
    uint32_t normal = (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13;
    normal = normal > 0x7c00u ? 0x7c00u : normal;
    // Below 2**-14: adding 0.5 leaves the multiple of 2**-24 in the low bits, rounded to even.
    uint32_t denormal = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000u;
    uint32_t value = size > 0x7f800000u ? nan : size >= 0x477ff000u ? 0x7c00u : size < 0x38800000u ? denormal : normal;
    out[j] = static_cast<uint16_t>(sign | value);
  }
}
#endif

inline float widen_bf16(uint16_t x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }
inline uint16_t narrow_bf16(float x) {
  uint32_t bits = bits_as<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  uint32_t nan = bits >> 16 | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

template <class To, class From>
inline To value_as(From x) {
  if constexpr (kIsFloat<From> && !kIsFloat<To>) {
    constexpr int width = sizeof(To) * 8;
    constexpr From high = kIsSigned<To> ? From(uint64_t{1} << (width - 1)) : From(2) * From(uint64_t{1} << (width - 1));
    constexpr From low = kIsSigned<To> ? -high : From(0);
    constexpr To most = static_cast<To>(static_cast<UnsignedOf<To>>(-1) >> (kIsSigned<To> ? 1 : 0));
    constexpr To least = kIsSigned<To> ? static_cast<To>(~most) : To(0);
    From inside = x < high ? x : From(0);
    inside = x > low ? inside : From(0);
    To whole;
    if constexpr (width < 32) whole = static_cast<To>(static_cast<int32_t>(inside));
    else whole = static_cast<To>(inside);
    whole = x >= high ? most : whole;
    return x <= low ? least : whole;
  } else {
    return static_cast<To>(x);
  }
}

// How C++ holds a stored type, and the type its values are computed in.
template <Type type> struct Stored;
#define VM_TYPE(name, bytes, storage) \
  template <> struct Stored<Type::k_##name> { using Memory = storage; };
#include "host/scalar_ops.def"
template <Type type> struct Computed { using Value = typename Stored<type>::Memory; };
template <> struct Computed<Type::k_f16> { using Value = float; };
template <> struct Computed<Type::k_bf16> { using Value = float; };

template <Type to, class Value>
inline typename Stored<to>::Memory stored_as(Value x) {
  if constexpr (to == Type::k_bf16) return narrow_bf16(static_cast<float>(x));
  else if constexpr (to == Type::k_b1) return x != 0;
  else return value_as<typename Stored<to>::Memory>(x);
}

template <Type from>
inline typename Computed<from>::Value computed(typename Stored<from>::Memory x) {
  if constexpr (from == Type::k_bf16) return widen_bf16(x);
  else return x;
}

template <Type from, Type to>
void convert_loop(void* out, const void* a, const void*, const void*, int64_t n, int64_t) {
  using Out = typename Stored<to>::Memory;
  const typename Stored<from>::Memory* x = static_cast<const typename Stored<from>::Memory*>(a);
  Out* o = static_cast<Out*>(out);
  n = whole_blocks(n);
  if constexpr (from != Type::k_f16 && to != Type::k_f16) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) o[i] = stored_as<to>(computed<from>(x[i]));
  } else {
    for (int64_t i = 0; i < n; i += kBlock) {
      float wide[kBlock];
      if constexpr (from == Type::k_f16) {
        widen_f16(x + i, wide);
      } else {
        for (int64_t j = 0; j < kBlock; ++j) wide[j] = static_cast<float>(computed<from>(x[i + j]));
      }
      if constexpr (to == Type::k_f16) {
        narrow_f16(wide, o + i);
      } else {
        for (int64_t j = 0; j < kBlock; ++j) o[i + j] = stored_as<to>(wide[j]);
      }
    }
  }
}

template <Type from, Type... to>
void add_from(KernelTable& t) {
  ((t.convert[static_cast<int>(from)][static_cast<int>(to)] = &convert_loop<from, to>), ...);
}

template <Type... types>
void add_all(KernelTable& t) {
  (add_from<types, types...>(t), ...);
}

void add_convert(KernelTable& t) {
  add_all<Type::k_b1, Type::k_s8, Type::k_s16, Type::k_s32, Type::k_s64, Type::k_u8, Type::k_u16, Type::k_u32,
          Type::k_u64, Type::k_f16, Type::k_bf16, Type::k_f32, Type::k_f64>(t);
}

}  // namespace

void JAX_MPK_JOIN(add_convert_, JAX_MPK_VM_ISA)(KernelTable& table) { add_convert(table); }

}  // namespace jax_mpk::host
