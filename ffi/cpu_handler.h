// The CPU custom call, jax_mpk_cpu: one state per call site, shared by all devices.
#pragma once

#include <string>

#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace jax_mpk {

struct CpuState {
  static xla::ffi::TypeId id;
  std::string program;
};

void* CpuStateTypeInfo();

}  // namespace jax_mpk

XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxMpkCpuInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxMpkCpuExecute);
