// The XLA FFI target jax_mpk_cpu: a stateful handler that parses a Program when it is instantiated and runs it.
#pragma once

#include <memory>

#include "host/executor.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace jax_mpk {

// One instance per call site and executable, shared by all devices that run it.
struct CpuState {
  static xla::ffi::TypeId id;
  std::shared_ptr<host::Executable> executable;
};

void* CpuStateTypeInfo();

// Settings of the process that launches by XLA obey; see jax_mpk/config.py.
void SetCpuChaosSeed(bool enabled, uint64_t seed);

}  // namespace jax_mpk

XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxMpkCpuInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxMpkCpuExecute);
