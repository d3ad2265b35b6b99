// The CUDA backend for Python: handlers, settings, devices, and programs run without XLA for tests.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/executable.h"
#include "cuda_handler.h"

namespace nb = nanobind;

namespace {

using namespace jax_mpk::cuda;

// An Executable on a driver library of the caller's choice.
struct Direct {
  std::shared_ptr<Runtime> runtime;
  std::unique_ptr<Executable> executable;
};

CUstream to_stream(uintptr_t stream) { return reinterpret_cast<CUstream>(stream); }

void launch(Direct& direct, int32_t ordinal, uintptr_t stream, const std::vector<uintptr_t>& addresses) {
  std::vector<void*> buffers;
  for (const uintptr_t address : addresses) buffers.push_back(reinterpret_cast<void*>(address));
  nb::gil_scoped_release released;
  direct.executable->launch(ordinal, to_stream(stream), buffers);
}

std::vector<std::string> check(std::shared_ptr<Runtime> runtime) {
  nb::gil_scoped_release released;
  return runtime != nullptr ? runtime->check() : std::vector<std::string>();
}

std::optional<nb::dict> device(int ordinal) {
  DeviceInfo info;
  try {
    info = device_info(Runtime::instance()->driver, ordinal);
  } catch (const Failure&) {
    return std::nullopt;
  }
  nb::dict out;
  out["name"] = info.name;
  out["capability"] = nb::make_tuple(info.major, info.minor);
  out["multiprocessors"] = info.multiprocessors;
  out["shared_bytes"] = info.shared_bytes;
  out["l2_bytes"] = info.l2_bytes;
  out["peak_bandwidth"] = info.peak_bandwidth;
  return out;
}

nb::capsule handler(XLA_FFI_Error* (*function)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(function));
}

}  // namespace

void register_cuda(nb::module_& m) {
  m.attr("cuda_program_version") = kProgramVersion;
  m.def("cuda_handlers", [] {
    nb::dict handlers;
    handlers["instantiate"] = handler(JaxMpkCudaInstantiate);
    handlers["initialize"] = handler(JaxMpkCudaInitialize);
    handlers["execute"] = handler(JaxMpkCudaExecute);
    return handlers;
  }, "Stages of the target jax_mpk_cuda, for jax.ffi.register_ffi_target.");
  m.def("cuda_state_type", [] {
    nb::dict type;
    type["type_id"] = nb::capsule(static_cast<void*>(&jax_mpk::CudaState::id));
    type["type_info"] = nb::capsule(jax_mpk::CudaStateTypeInfo());
    return type;
  }, "The state type of jax_mpk_cuda, for jax.ffi.register_ffi_type.");
  m.def("cuda_configure", [](bool sync, uint64_t deadline_ns) {
    settings().sync = sync;
    settings().deadline_ns = deadline_ns;
  }, nb::arg("sync"), nb::arg("deadline_ns"), "Settings of all later launches.");
  m.def("cuda_check", [] { return check(Runtime::opened()); },
        "Waits for all launches; texts of the failures that nobody has seen yet.");
  m.def("cuda_load_seconds", [] { return 1e-9 * static_cast<double>(load_nanoseconds()); },
        "Time that kernels and tables took to load so far.");
  m.def("cuda_device", device, nb::arg("ordinal"), "What the driver says about a device; None: there is no such device.");
  nb::class_<Direct>(m, "CudaExecutable", "A program run on streams and addresses, without XLA.")
      .def("__init__", [](Direct* self, const nb::bytes& program, const std::string& library,
                          const Direct* beside) {
        auto parsed = Program::parse(std::string_view(program.c_str(), program.size()));
        auto runtime = beside != nullptr ? beside->runtime : std::make_shared<Runtime>(library);
        auto executable = std::make_unique<Executable>(std::move(parsed), runtime);
        new (self) Direct{std::move(runtime), std::move(executable)};
      }, nb::arg("program"), nb::arg("library") = "libcuda.so.1", nb::arg("beside").none() = nb::none(),
           "library: the driver; beside: another executable, whose driver and failures are shared.")
      .def("initialize", [](Direct& self, int32_t ordinal, uintptr_t stream) {
        self.executable->initialize(ordinal, to_stream(stream));
      }, nb::arg("ordinal"), nb::arg("stream"), nb::call_guard<nb::gil_scoped_release>())
      .def("launch", launch, nb::arg("ordinal"), nb::arg("stream"), nb::arg("buffers"))
      .def("check", [](const Direct& self) { return check(self.runtime); })
      .def("label", [](const Direct& self, uint32_t task) { return self.executable->program().label(task); });
}
