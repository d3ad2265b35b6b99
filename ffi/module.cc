// The nanobind module: hands the FFI handlers to Python as capsules. No policy lives here.
#include <nanobind/nanobind.h>

#include "cpu_handler.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.doc() = "XLA FFI handlers of jax_mpk.";
  m.def("cpu_handlers", [] {
    nb::dict handlers;
    handlers["instantiate"] = nb::capsule(reinterpret_cast<void*>(JaxMpkCpuInstantiate));
    handlers["execute"] = nb::capsule(reinterpret_cast<void*>(JaxMpkCpuExecute));
    return handlers;
  }, "Stages of the target jax_mpk_cpu, for jax.ffi.register_ffi_target.");
  m.def("cpu_state_type", [] {
    nb::dict type;
    type["type_id"] = nb::capsule(static_cast<void*>(&jax_mpk::CpuState::id));
    type["type_info"] = nb::capsule(jax_mpk::CpuStateTypeInfo());
    return type;
  }, "The state type of jax_mpk_cpu, for jax.ffi.register_ffi_type.");
}
