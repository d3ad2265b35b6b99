// csrc/device/memory.cuh on a CPU. Whatever may be a wait lets other threads run.
#pragma once

#include "convert.cuh"
#include "types.cuh"

namespace mpk {

template <class T>
T load_relaxed(const T* p) {
  machine::yield();
  return *p;
}
inline u32 load_acquire(const u32* p) { return load_relaxed(p); }
template <class T, int count>
void load_relaxed(const T* p, T (&v)[count]) {
  machine::yield();
  for (int k = 0; k < count; ++k) v[k] = p[k];
}
template <class T>
void store_relaxed(T* p, T v) {
  *p = v;
}
inline void add_release(u32* p, u32 v) { *p += v; }
inline u32 add_acq_rel(u32* p, u32 v) { return atomicAdd(p, v); }
inline u64 nanoseconds() { return machine::now(); }
template <int count>
void sync_threads() {
  machine::sync(count);
}

template <class T>
T* shared_at(int byte) {
  return reinterpret_cast<T*>(machine::self->cta->shared + byte);
}
inline u32 shared_address(const void* p) {
  return static_cast<u32>(static_cast<const char*>(p) - machine::self->cta->shared);
}
inline u32 shared_base() { return 0; }
template <class T>
const T* shared_from(u32 address) {
  return shared_at<T>(static_cast<int>(address));
}

// An mbarrier: its phase ends when all have arrived and all bytes have landed.
struct Barrier {
  u8 phase, arrivals, pending;
  s32 bytes;

  void check() {
    if (pending == 0 && bytes == 0) phase ^= 1, pending = arrivals;
  }
  static Barrier* at(u32 address) { return shared_at<Barrier>(static_cast<int>(address)); }
};
static_assert(sizeof(Barrier) == 8);
inline void barrier_init(u32 b, int arrivals) {
  *Barrier::at(b) = {0, static_cast<u8>(arrivals), static_cast<u8>(arrivals), 0};
}
inline void barriers_ready() {}
inline void barrier_arrive(u32 b, int arrivals = 1) {
  auto* barrier = Barrier::at(b);
  if (barrier->pending < arrivals) std::fprintf(stderr, "more arrivals than a barrier expects\n"), std::abort();
  barrier->pending = static_cast<u8>(barrier->pending - arrivals);
  barrier->check();
}
inline void barrier_expect(u32 b, int bytes) {
  Barrier::at(b)->bytes += bytes;
  barrier_arrive(b);
}
// What a barrier waits for arrives late: one lot each time that a thread looks at some barrier.
inline void land() {
  if (machine::landings.empty()) return;
  const machine::Landing first = machine::landings.front();
  machine::landings.erase(machine::landings.begin());
  for (const machine::Copy& c : first.copies) std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
  auto* barrier = static_cast<Barrier*>(first.barrier);
  if (first.bytes > 0) barrier->bytes -= first.bytes;
  else --barrier->pending;
  barrier->check();
}
inline bool barrier_done(u32 b, u32 parity) {
  land();
  machine::yield();
  return Barrier::at(b)->phase != parity;
}
inline bool barrier_done_now(u32 b, u32 parity) { return barrier_done(b, parity); }
constexpr u32 kLine = 128;
inline void prefetch(const void* from) { static_cast<void>(*static_cast<const volatile char*>(from)); }
constexpr u64 kEvictFirst = 0;
inline void bulk_load(u32 to, const void* from, int bytes, u32 b, u64) {
  if ((to | reinterpret_cast<u64>(from) | static_cast<u64>(bytes)) % 16 != 0) {
    std::fprintf(stderr, "a bulk load is not aligned\n"), std::abort();
  }
  machine::landings.push_back({{{shared_at<char>(static_cast<int>(to)), from, bytes}}, Barrier::at(b), bytes});
}

struct alignas(16) Quad {
  u32 w[4];
};
inline Quad load_quad(const void* p) {
  if (reinterpret_cast<u64>(p) % 16 != 0) std::fprintf(stderr, "a load is not aligned\n"), std::abort();
  return *static_cast<const Quad*>(p);
}

inline Quad load_transposed(const void* row) {
  if (reinterpret_cast<u64>(row) % 16 != 0) std::fprintf(stderr, "a row of a matrix is not aligned\n"), std::abort();
  const machine::Meeting& m = machine::meet(~0u, reinterpret_cast<u64>(row));
  const int g = machine::lane() / 4, q = machine::lane() % 4;
  Quad v;
  for (int k = 0; k < 4; ++k) {
    const auto* low = reinterpret_cast<const u16*>(m.seen[8 * k + 2 * q]);
    const auto* high = reinterpret_cast<const u16*>(m.seen[8 * k + 2 * q + 1]);
    v.w[k] = low[g] | u32(high[g]) << 16;
  }
  return v;
}

inline Quad load_matrices(u32 row) {
  if (row % 16 != 0) std::fprintf(stderr, "a row of a matrix is not aligned\n"), std::abort();
  const machine::Meeting& m = machine::meet(~0u, reinterpret_cast<u64>(shared_from<char>(row)));
  const int g = machine::lane() / 4, q = machine::lane() % 4;
  Quad v;
  for (int k = 0; k < 4; ++k) v.w[k] = reinterpret_cast<const u32*>(m.seen[8 * k + g])[q];
  return v;
}

// A row (or column) of a matrix, of which four lanes hold four elements each.
template <class T>
inline void held_by(const machine::Meeting& m, int row, f32 (&out)[16]) {
  for (int lane = 0; lane < 4; ++lane) {
    for (int e = 0; e < 4; ++e) {
      out[lane * 2 + e % 2 + e / 2 * 8] = convert<f32>(bitcast<T>(static_cast<u16>(m.seen[4 * row + lane] >> 16 * e)));
    }
  }
}

template <class T>
inline void matrix_multiply(f32 (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int g = machine::lane() / 4, q = machine::lane() % 4;
  f32 rows[2][16], columns[2][16];
  held_by<T>(machine::meet(~0u, a0 | u64(a2) << 32), g, rows[0]);
  held_by<T>(machine::meet(~0u, a1 | u64(a3) << 32), g, rows[1]);
  const machine::Meeting& m = machine::meet(~0u, b0 | u64(b1) << 32);
  for (int i = 0; i < 2; ++i) held_by<T>(m, 2 * q + i, columns[i]);
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) d[i] += rows[i / 2][k] * columns[i % 2][k];
  }
}

// Nothing has arrived before the wait.
template <int bytes>
void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from)) % bytes != 0) {
    std::fprintf(stderr, "a copy is not aligned\n"), std::abort();
  }
  machine::self->copies.push_back({to, from, bytes});
}
inline void copy_async(u32 to, const void* from, u64) { copy_async<16>(shared_at<char>(static_cast<int>(to)), from); }
template <class T>
T afresh(T v) {
  return v;
}
// The lanes meet, as they do where one of them is elected.
inline bool elected() {
  machine::meet(~0u, 0);
  return machine::lane() == 0;
}
inline void pause(u32) {}
inline void copies_mark() { machine::self->marked = machine::self->copies.size(); }
inline void copies_wait_marked() {
  auto& copies = machine::self->copies;
  const auto end = copies.begin() + static_cast<std::ptrdiff_t>(machine::self->marked);
  for (auto c = copies.begin(); c != end; ++c) std::memcpy(c->to, c->from, static_cast<size_t>(c->bytes));
  copies.erase(copies.begin(), end);
  machine::self->marked = 0;
}
inline void copies_wait() {
  copies_mark();
  copies_wait_marked();
}
inline void copies_arrive(u32 b) {
  Barrier* barrier = Barrier::at(b);
  ++barrier->pending;
  machine::landings.push_back({std::move(machine::self->copies), barrier, 0});
  machine::self->copies.clear();
  machine::self->marked = 0;
}
inline void bulk_loads_follow() {}

}  // namespace mpk
