#include "host/vm_memory.h"

namespace jax_mpk::host {
namespace {

template <class T>
void gather_strided_as(T* out, const T* from, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from[i * stride];
}

template <class T>
void scatter_strided_as(T* to, int64_t stride, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i * stride] = from[i];
}

template <class T>
void gather_checked_as(T* out, const T* from, const int64_t* offsets, const uint8_t* predicate, int64_t low,
                       int64_t high, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    bool inside = offsets[i] >= low && offsets[i] < high && (predicate == nullptr || predicate[i] != 0);
    out[i] = inside ? from[offsets[i]] : T(0);
  }
}

template <class T>
void scatter_as(T* to, const int64_t* offsets, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[offsets[i]] = from[i];
}

// Calls f with a null pointer to the unsigned integer of that size.
template <class F>
void by_size(int bytes, const F& f) {
  switch (bytes) {
    case 1: return f(static_cast<uint8_t*>(nullptr));
    case 2: return f(static_cast<uint16_t*>(nullptr));
    case 4: return f(static_cast<uint32_t*>(nullptr));
    default: return f(static_cast<uint64_t*>(nullptr));
  }
}

}  // namespace

void gather_strided(int bytes, std::byte* out, const std::byte* from, int64_t offset, int64_t stride, int64_t n) {
  by_size(bytes, [&]<class T>(T*) {
    gather_strided_as(reinterpret_cast<T*>(out), reinterpret_cast<const T*>(from) + offset, stride, n);
  });
}

void scatter_strided(int bytes, std::byte* to, int64_t offset, int64_t stride, const std::byte* from, int64_t n) {
  by_size(bytes, [&]<class T>(T*) {
    scatter_strided_as(reinterpret_cast<T*>(to) + offset, stride, reinterpret_cast<const T*>(from), n);
  });
}

void gather_checked(int bytes, std::byte* out, const std::byte* from, const int64_t* offsets, const uint8_t* predicate,
                    int64_t low, int64_t high, int64_t n) {
  by_size(bytes, [&]<class T>(T*) {
    gather_checked_as(reinterpret_cast<T*>(out), reinterpret_cast<const T*>(from), offsets, predicate, low, high, n);
  });
}

void scatter(int bytes, std::byte* to, const int64_t* offsets, const std::byte* from, int64_t n) {
  by_size(bytes, [&]<class T>(T*) {
    scatter_as(reinterpret_cast<T*>(to), offsets, reinterpret_cast<const T*>(from), n);
  });
}

}  // namespace jax_mpk::host
