// The vector VM, for tests: what it knows, and which of its instruction sets runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "host/vm_kernels.h"

namespace nb = nanobind;

namespace {

using namespace jax_mpk::host;

constexpr const char* kIsaNames[] = {"base", "avx2", "avx512"};

// Every operation and type with a kernel, numbered as in scalar_ops.def.
nb::dict opcodes() {
  nb::dict out;
  const KernelTable& table = kernels();
  for (int op = 0; op < kOps; ++op) {
    for (int type = 0; type < kTypes; ++type) {
      if (table.op[op][type] == nullptr) continue;
      const std::string name = std::string(kOpInfo[op].name) + "." + std::string(kTypeName[type]);
      out[name.c_str()] = op * kTypes + type;
    }
  }
  return out;
}

// Operations that scalar_ops.def promises and no kernel keeps, or the other way round.
std::vector<std::string> missing_kernels() {
  std::vector<std::string> out;
  for (int isa = 0; isa < 3; ++isa) {
    const KernelTable* table = kernels_for(Isa(isa));
    if (table == nullptr) continue;
    for (int op = 0; op < kOps; ++op) {
      for (int type = 0; type < kTypes; ++type) {
        if ((table->op[op][type] != nullptr) == ((kOpInfo[op].types >> type & 1) != 0)) continue;
        out.push_back(std::string(kIsaNames[isa]) + " " + std::string(kOpInfo[op].name) + "." +
                      std::string(kTypeName[type]));
      }
    }
    for (int from = 0; from < kTypes; ++from) {
      for (int to = 0; to < kTypes; ++to) {
        if (table->convert[from][to] != nullptr) continue;
        out.push_back(std::string(kIsaNames[isa]) + " convert." + std::string(kTypeName[from]) + "." +
                      std::string(kTypeName[to]));
      }
    }
  }
  return out;
}

std::vector<std::string> vm_isas() {
  std::vector<std::string> out;
  for (int isa = 0; isa < 3; ++isa) {
    if (kernels_for(Isa(isa)) != nullptr) out.push_back(kIsaNames[isa]);
  }
  return out;
}

void set_vm_isa(const std::string& name) {
  for (int isa = 0; isa < 3; ++isa) {
    if (name == kIsaNames[isa] && use_kernels(Isa(isa))) return;
  }
  throw nb::value_error(("this machine has no instruction set " + name).c_str());
}

}  // namespace

void register_vm(nb::module_& m) {
  m.def("opcodes", opcodes, "Operations of the vector VM, by name and type.");
  m.def("missing_kernels", missing_kernels, "Operations whose kernels do not fit csrc/host/scalar_ops.def.");
  m.def("vm_isas", vm_isas, "Instruction sets of this machine that the vector VM has kernels for, best one last.");
  m.def("set_vm_isa", set_vm_isa, nb::arg("name"), "Instruction set of programs parsed from now on.");
}
