// What the host hands to a kernel: see jax_mpk/codegen/cuda/ir.py.
#pragma once

#include "types.cuh"

namespace mpk {

// Begins the state of a call site on one device and stream. Zero at first; kept from launch to launch.
struct Header {
  u32 abort;           // a wait passed its deadline: every wait falls through
  u32 ticket;          // workers that have left the launch
  u64 launches;        // completed
  u32 arrivals;        // at barriers of all workers, ever
  u32 barrier_base;    // `arrivals` when the launch began
  u32 reserved[58];
};
static_assert(sizeof(Header) == 256);

// Why a launch gave up; in memory the host sees. `set` is written last.
struct Record {
  u32 set, worker, task, kind, what, expected, seen, reserved;
  u64 element;
};

enum class Wait : u32 { kEvent, kTag, kBulk, kBarrier, kPredicate };

template <int buffers>
struct Launch {
  const u32* tables;
  void* state;
  Record* record;
  u64 deadline_ns;  // of one wait; 0: none
  void* buffer[buffers];
};

}  // namespace mpk
