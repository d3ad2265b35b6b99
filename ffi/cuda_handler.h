// The XLA FFI target jax_mpk_cuda: a stateful handler that reads a program when it is instantiated, makes it ready
// for a device and a stream when a run is initialized, and launches it.
#pragma once

#include <memory>

#include "cuda/executable.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace jax_mpk {

// One instance per call site and executable, shared by all devices that run it.
struct CudaState {
  static xla::ffi::TypeId id;
  std::unique_ptr<cuda::Executable> executable;
};

void* CudaStateTypeInfo();

}  // namespace jax_mpk

XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxMpkCudaInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxMpkCudaInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxMpkCudaExecute);
