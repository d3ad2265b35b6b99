// Loads, stores and waits that the hand-off protocol is made of, each one PTX instruction.
#pragma once

#include "types.cuh"

namespace mpk {

__device__ __forceinline__ u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ u32 load_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ u64 load_relaxed(const u64* p) {
  u64 v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

// 16 bytes: atomic per element, not as a whole.
__device__ __forceinline__ void load_relaxed(const u32* p, u32 (&v)[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p) : "memory");
}

__device__ __forceinline__ void load_relaxed(const u64* p, u64 (&v)[2]) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v[0]), "=l"(v[1]) : "l"(p) : "memory");
}

__device__ __forceinline__ void store_relaxed(u32* p, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void store_relaxed(u64* p, u64 v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ void add_release(u32* p, u32 v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ u32 add_acq_rel(u32* p, u32 v) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}

__device__ __forceinline__ u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// 16 bytes.
struct alignas(16) Quad {
  u32 w[4];
};

// From device memory, as other workers left it before an event that was waited for.
__device__ __forceinline__ Quad load_quad(const void* p) {
  Quad v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p) : "memory");
  return v;
}

// d += a * b by a warp: 16 rows, 8 columns, 16 products each. Of lane 4g + q, word 0 of a is row g, k = 2q and 2q+1;
// words 1 and 3 are row g+8, words 2 and 3 k+8; b has the same k of column g; d: rows g and g+8, columns 2q and 2q+1.
template <class T>
__device__ __forceinline__ void matrix_multiply(f32 (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  static_assert(kIsHalf<T>);
  if constexpr (kSame<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// The first `count` threads of a CTA.
template <int count>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(count) : "memory");
}

// -- shared memory --

// All of a CTA's. Pointers made from it here, and not handed through calls, are known to be shared.
template <class T>
__device__ __forceinline__ T* shared_at(int byte) {
  extern __shared__ __align__(1024) char shared[];
  return reinterpret_cast<T*>(shared + byte);
}

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
// The address of byte 0: the compiler asks a special register for it, each time.
__device__ __forceinline__ u32 shared_base() { return shared_address(shared_at<char>(0)); }
template <class T>
__device__ __forceinline__ const T* shared_from(u32 address) {
  return shared_at<T>(static_cast<int>(address - shared_base()));
}

// Four 8×8 matrices of 16-bit elements in shared memory, transposed: lane l says where row l % 8 of matrix l / 8 begins;
// word m of lane 4g + q has column g of matrix m, in rows 2q and 2q+1.
__device__ __forceinline__ Quad load_transposed(const void* row) {
  Quad v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(shared_address(row))
               : "memory");
  return v;
}

// The same as they are, by addresses: word m of lane 4g + q has row g of matrix m, in columns 2q and 2q+1.
__device__ __forceinline__ Quad load_matrices(u32 row) {
  Quad v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(row)
               : "memory");
  return v;
}

// Barriers are given by their addresses.
__device__ __forceinline__ void barrier_init(u32 b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
}

// Bulk loads may name the barriers that were made so far.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(u32 b, int arrivals = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
}

// Whether the phase of that parity is complete; suspends the thread for a while before it says no.
__device__ __forceinline__ bool barrier_done(u32 b, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done) : "r"(b), "r"(parity) : "memory");
  return done != 0;
}

// The same without suspending the thread.
__device__ __forceinline__ bool barrier_done_now(u32 b, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done) : "r"(b), "r"(parity) : "memory");
  return done != 0;
}

// Streamed bytes are read once: they should not push activations out of the L2 cache. This is what
// createpolicy.fractional.L2::evict_first makes for all of them; a constant need not be kept, nor moved for each load.
constexpr u64 kEvictFirst = 0x12f0000000000000;

__device__ __forceinline__ void bulk_load(u32 to, const void* from, int bytes, u32 b, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      ::"r"(to), "l"(from), "r"(bytes), "r"(b), "l"(policy) : "memory");
}

// Brings a line to the L2 cache. Bulk prefetches keep the thread for longer.
constexpr u32 kLine = 128;
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

// 4, 8 or 16 bytes from global to shared memory, in the background.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(bytes)
                 : "memory");
  }
}

// The same, of 16 bytes to an address under a policy of the L2 cache.
__device__ __forceinline__ void copy_async(u32 to, const void* from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
               : "memory");
}

// The barrier's phase does not end before this thread's copies have landed.
__device__ __forceinline__ void copies_arrive(u32 b) {
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(b) : "memory");
}

// Bulk loads that follow come behind what this thread has seen landing in shared memory otherwise.
__device__ __forceinline__ void bulk_loads_follow() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same number, though the compiler does not know: what follows from it is not computed, and kept, long before.
template <class T>
__device__ __forceinline__ T afresh(T v) {
  static_assert(sizeof(T) == 4);
  asm volatile("" : "+r"(v));
  return v;
}

// True for one lane of a whole warp, always the same. Where only that lane goes on, the compiler knows that it does: a
// bulk load is one instruction, where it otherwise is a loop over all lanes that may have come there.
__device__ __forceinline__ bool elected() {
  u32 me;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(me)::"memory");
  return me != 0;
}

// Lets so many cycles pass.
__device__ __forceinline__ void pause(u32 cycles) {
  u32 start, now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(start)::"memory");
#pragma unroll 1
  do {
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  } while (now - start < cycles);
}

__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The same for those before a mark, whatever this thread copies behind it.
__device__ __forceinline__ void copies_mark() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_wait_marked() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

}  // namespace mpk
