// The CPU executor without XLA: runs a Program on NumPy buffers, for tests and for the verifier's oracle.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "cpu_handler.h"
#include "host/executor.h"
#include "host/thread_pool.h"

namespace nb = nanobind;

namespace {

using jax_mpk::host::Buffer;
using jax_mpk::host::Executable;
using jax_mpk::host::LaunchOptions;
using jax_mpk::host::Outcome;
using jax_mpk::host::Program;
using jax_mpk::host::ThreadPool;

using Input = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::shared_ptr<Executable> parse(const nb::bytes& program) {
  if (program.size() % sizeof(int64_t) != 0) throw nb::value_error("the program is not made of 64-bit words");
  std::vector<int64_t> words(program.size() / sizeof(int64_t));
  std::memcpy(words.data(), program.c_str(), program.size());
  return std::make_shared<Executable>(Program::parse(words));
}

Outcome run(Executable& executable, const std::vector<Input>& arguments, const std::vector<Output>& results,
            std::optional<int32_t> threads, std::optional<uint64_t> chaos_seed, int32_t held_task,
            int32_t held_stores) {
  std::vector<Buffer> in, out;
  for (const Input& a : arguments) {
    // Tasks write arguments only through results that alias them.
    in.push_back({reinterpret_cast<std::byte*>(const_cast<uint8_t*>(a.data())), static_cast<int64_t>(a.size())});
  }
  for (const Output& r : results) {
    out.push_back({reinterpret_cast<std::byte*>(r.data()), static_cast<int64_t>(r.size())});
  }
  LaunchOptions options;
  options.chaos_seed = chaos_seed;
  options.held_task = held_task;
  options.held_stores = held_stores;
  if (threads.has_value()) options.max_threads = *threads;
  nb::gil_scoped_release released;
  return executable.launch(in, out, options);
}

const char* kind_name(const Outcome& outcome) {
  switch (outcome.kind) {
    case Outcome::Kind::kOk: return "ok";
    case Outcome::Kind::kDeadlock: return "deadlock";
    case Outcome::Kind::kFailed: return "failed";
  }
  return "";
}

}  // namespace

void register_executor(nb::module_& m) {
  nb::class_<Outcome>(m, "Outcome", "How a launch ended.")
      .def_prop_ro("kind", kind_name, "'ok', 'deadlock' or 'failed'.")
      .def_ro("message", &Outcome::message)
      .def_ro("worker", &Outcome::worker)
      .def_ro("task", &Outcome::task)
      .def_ro("event", &Outcome::event)
      .def_ro("value", &Outcome::value)
      .def_ro("element", &Outcome::element)
      .def_ro("expected", &Outcome::expected)
      .def_ro("seen", &Outcome::seen);
  nb::class_<Executable>(m, "CpuExecutable", "A parsed Program.")
      .def_prop_ro("workers", [](const Executable& e) { return e.program().workers; })
      .def_prop_ro("tasks", [](const Executable& e) { return e.program().tasks(); })
      .def_prop_ro("events", [](const Executable& e) { return e.program().events(); })
      .def_prop_ro("segments", [](const Executable& e) { return e.program().segments; })
      .def_prop_ro("workspace_bytes", [](const Executable& e) { return e.program().workspace_bytes; })
      .def_prop_ro("scratch_bytes", [](const Executable& e) { return e.program().scratch_bytes; })
      .def("run", run, nb::arg("arguments"), nb::arg("results"), nb::arg("threads") = nb::none(),
           nb::arg("chaos_seed") = nb::none(), nb::arg("held_task") = -1, nb::arg("held_stores") = -1,
           "Runs the program once on byte arrays: the function's arguments; its results, then the workspace.");
  m.def("parse_program", parse, nb::arg("program"), "Parses the words of a Program, given as bytes.");
  m.def("set_threads", [](int threads) { ThreadPool::instance().set_limit(threads); }, nb::arg("threads"),
        "Most OS threads that run megakernels at the same time.");
  m.def("set_chaos_seed", [](std::optional<uint64_t> seed) {
    jax_mpk::SetCpuChaosSeed(seed.has_value(), seed.value_or(0));
  }, nb::arg("seed").none(), "Chaos mode of launches by XLA, or None: off.");
}
