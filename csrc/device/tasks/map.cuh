// map: every element of a box by itself.
#pragma once

#include "persistent.cuh"

namespace mpk {

// element(n) for the elements of a box, numbered in row-major order.
template <class C, class Element>
__device__ __forceinline__ void map(const C& c, int count, Element&& element) {
#pragma unroll 1
  for (int n = c.thread(); n < count; n += C::kThreads) element(n);
}

}  // namespace mpk
