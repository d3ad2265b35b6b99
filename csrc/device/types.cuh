// Element types as generated code holds them, what is known of each, and reinterpretation of bits.
//
// f16 and bf16 are storage only: arithmetic on them happens in f32 (convert.cuh). Nothing here needs CUDA's headers,
// and types, conversions and scalar operations are plain C++ for a host compiler too: so they are tested without a
// GPU.
#pragma once

// MPK_FUNCTION is for functions that are too long to have in every place that calls them.
#ifdef __CUDACC__
#define MPK_DEVICE __device__ __forceinline__
#define MPK_FUNCTION inline __device__ __noinline__
#else
#define MPK_DEVICE inline
#define MPK_FUNCTION inline
#endif

namespace mpk {

using b1 = bool;
using s8 = signed char;
using s16 = short;
using s32 = int;
using s64 = long long;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using f32 = float;
using f64 = double;
struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

// The integers of a width, signed and not.
template <int bytes> struct IntegerOf;
template <> struct IntegerOf<1> { using Signed = s8; using Unsigned = u8; };
template <> struct IntegerOf<2> { using Signed = s16; using Unsigned = u16; };
template <> struct IntegerOf<4> { using Signed = s32; using Unsigned = u32; };
template <> struct IntegerOf<8> { using Signed = s64; using Unsigned = u64; };
template <class T> using SignedOf = typename IntegerOf<sizeof(T)>::Signed;
template <class T> using UnsignedOf = typename IntegerOf<sizeof(T)>::Unsigned;

template <class A, class B> inline constexpr bool kSame = false;
template <class A> inline constexpr bool kSame<A, A> = true;

template <class T> inline constexpr bool kIsFloat = kSame<T, f32> || kSame<T, f64>;  // those that arithmetic is in
template <class T> inline constexpr bool kIsHalf = kSame<T, f16> || kSame<T, bf16>;
template <class T> inline constexpr bool kIsBool = kSame<T, b1>;
template <class T> inline constexpr bool kIsInt = !kIsFloat<T> && !kIsHalf<T> && !kIsBool<T>;
template <class T> inline constexpr bool kIsSigned = static_cast<T>(-1) < static_cast<T>(0);  // of integers
template <class T>
MPK_DEVICE constexpr bool is_negative(T x) {
  if constexpr (kIsSigned<T>) return x < 0;
  else return false;
}
template <class T> inline constexpr int kWidth = static_cast<int>(sizeof(T)) * 8;

// How the floats are laid out.
template <class T> inline constexpr int kMantissa = 0;
template <> inline constexpr int kMantissa<f16> = 10;
template <> inline constexpr int kMantissa<bf16> = 7;
template <> inline constexpr int kMantissa<f32> = 23;
template <> inline constexpr int kMantissa<f64> = 52;
template <class T>
inline constexpr UnsignedOf<T> kSignBit = static_cast<UnsignedOf<T>>(UnsignedOf<T>(1) << (kWidth<T> - 1));
template <class T>
inline constexpr UnsignedOf<T> kInfinityBits =
    static_cast<UnsignedOf<T>>(((u64(1) << (kWidth<T> - 1 - kMantissa<T>)) - 1) << kMantissa<T>);
template <class T>
inline constexpr UnsignedOf<T> kNanBits =
    static_cast<UnsignedOf<T>>(kInfinityBits<T> | (UnsignedOf<T>(1) << (kMantissa<T> - 1)));

// The same bits as another type of that size. Constants of generated code are written so: bitcast<f32>(0x3f800000u).
template <class To, class From>
MPK_DEVICE constexpr To bitcast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, x);
}

}  // namespace mpk
