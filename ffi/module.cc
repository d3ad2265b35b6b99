// The nanobind module: hands the FFI handlers to Python as capsules. No policy lives here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <utility>

#include "cpu_handler.h"
#include "host/program.h"

namespace nb = nanobind;

// One file each, ffi/module_*.cc.
void register_contract(nb::module_& m);
void register_cuda(nb::module_& m);
void register_executor(nb::module_& m);
void register_vm(nb::module_& m);

NB_MODULE(_native, m) {
  m.doc() = "XLA FFI handlers of jax_mpk.";
  m.attr("ffi_api_version") = std::make_pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("program_version") = jax_mpk::host::kProgramVersion;
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
  register_contract(m);
  register_cuda(m);
  register_executor(m);
  register_vm(m);
}
