// map: every element of a box by itself.
#pragma once

#include "persistent.cuh"

namespace mpk {

// `count` consecutive elements; what lies so is aligned as a whole, or to 16 bytes.
template <class T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Packed {
  T e[count];
};
template <int count, class T>
__device__ __forceinline__ Packed<T, count> packed(const T* from) {
  return *reinterpret_cast<const Packed<T, count>*>(from);
}

// element(n) for the elements of a box, numbered in row-major order.
template <class C, class Element>
__device__ __forceinline__ void map(const C& c, int count, Element&& element) {
#pragma unroll 1
  for (int n = c.thread(); n < count; n += C::kThreads) element(n);
}

}  // namespace mpk
