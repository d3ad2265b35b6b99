// update: elements of a box overwritten, or combined with what is there, at computed positions.
#pragma once

#include "persistent.cuh"

namespace mpk {

// place(n): the element update n goes to, or -1: none of this box. apply(n) does it. No two go to the same element.
template <class C, class Place, class Apply>
__device__ __forceinline__ void update_each(const C& c, int count, Place&& place, Apply&& apply) {
#pragma unroll 1
  for (int n = c.thread(); n < count; n += C::kThreads) {
    if (place(n) >= 0) apply(n);
  }
}

// Several may go to the same element: each element has one thread, which applies its updates in order.
template <class C, class Place, class Apply>
__device__ __forceinline__ void update_in_order(const C& c, int count, Place&& place, Apply&& apply) {
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    const s64 at = place(n);
    if (at >= 0 && at % C::kThreads == c.thread()) apply(n);
  }
}

}  // namespace mpk
