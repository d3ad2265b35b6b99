// What the host passes to a kernel, and what a kernel tells the host. Both sides include this file: plain C++17
// without any include, since NVRTC has no standard headers.
#pragma once

namespace mpk {

using u32 = unsigned int;
using u64 = unsigned long long;

// What a wait that passed its deadline was for.
enum WaitKind : u32 {
  kWaitEvent = 0,      // what: event; expected: threshold
  kWaitTag = 1,        // what: where the value's words begin in the state, in 16 bytes; element: which; expected: tag
  kWaitBulkLoad = 2,   // what: chunk of the worker's ring; expected: chunks that have landed in its stage
  kWaitBarrier = 3,    // what: barrier of all workers in this launch; expected: arrivals ever
  kWaitPredicate = 4,  // what: decision of this launch; expected: decisions that the producer has taken
};

// Who waits between tasks.
constexpr u32 kNoTask = ~0u;

// In host memory that the device sees. The first worker that gives up fills it in; `set` is written last, with
// release at system scope.
struct Record {
  u32 set;
  u32 worker;
  u32 task;
  u32 kind;
  u32 what;
  u32 expected;
  u32 seen;
  u32 reserved;
  u64 element;
};

// The first bytes of a state. All of a state is zero before its first launch, and before the first one after an
// abort. A launch that finds `abort` set poisons its results and leaves the record alone.
struct StateHeader {
  u32 abort;
  u32 ticket;    // the last worker out advances what counts launches
  u64 launches;  // that have ended
  u32 arrivals;  // at barriers of all workers, ever
  u32 barrier_base;  // `arrivals` when the launch began
  u32 reserved[58];
};

// The one parameter of a kernel, by value. N buffers: arguments, results, then the workspace if there is one.
template <int N>
struct Launch {
  const u32* tables;  // 256-byte aligned, constant
  void* state;        // 256-byte aligned, begins with a StateHeader
  Record* record;
  u64 deadline_ns;    // of one wait; 0: none
  void* buffers[N];
};

static_assert(sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(void*) == 8, "sizes of the host and the device differ");
static_assert(sizeof(Record) == 40 && sizeof(StateHeader) == 256, "layout is shared by host and device");
static_assert(sizeof(Launch<3>) == 32 + 3 * 8, "layout is shared by host and device");

}  // namespace mpk
