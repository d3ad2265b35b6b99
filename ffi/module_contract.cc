// The matrix kernels of the CPU executor, for tests and benchmarks.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "host/tasks/contract_kernels.h"

namespace nb = nanobind;

namespace {

using jax_mpk::host::ContractArgs;
using jax_mpk::host::ContractIsa;
using jax_mpk::host::ElementType;

constexpr std::pair<const char*, ElementType> kTypes[] = {
    {"f32", ElementType::kF32}, {"bf16", ElementType::kBF16}, {"f16", ElementType::kF16},
    {"f64", ElementType::kF64}, {"s32", ElementType::kS32},   {"s8", ElementType::kS8},
    {"u8", ElementType::kU8},
};

constexpr std::pair<const char*, ContractIsa> kIsas[] = {{"portable", ContractIsa::kPortable},
                                                         {"avx2", ContractIsa::kAvx2},
                                                         {"avx512", ContractIsa::kAvx512}};

template <class Table>
auto named(const Table& table, const std::string& name) {
  for (const auto& [known, value] : table) {
    if (name == known) return value;
  }
  throw std::invalid_argument("unknown name '" + name + "'");
}

bool contract_tile(const std::array<std::string, 3>& types,
                   const std::array<uintptr_t, 3>& addresses, const std::array<int64_t, 4>& sizes,
                   const std::array<int64_t, 3>& lhs_strides,
                   const std::array<int64_t, 3>& rhs_strides,
                   const std::array<int64_t, 3>& acc_strides, bool accumulate,
                   const std::string& isa) {
  ContractArgs args;
  args.lhs_type = named(kTypes, types[0]);
  args.rhs_type = named(kTypes, types[1]);
  args.acc_type = named(kTypes, types[2]);
  args.lhs = reinterpret_cast<const void*>(addresses[0]);
  args.rhs = reinterpret_cast<const void*>(addresses[1]);
  args.acc = reinterpret_cast<void*>(addresses[2]);
  args.b = sizes[0], args.m = sizes[1], args.n = sizes[2], args.k = sizes[3];
  args.lhs_b = lhs_strides[0], args.lhs_m = lhs_strides[1], args.lhs_k = lhs_strides[2];
  args.rhs_b = rhs_strides[0], args.rhs_n = rhs_strides[1], args.rhs_k = rhs_strides[2];
  args.acc_b = acc_strides[0], args.acc_m = acc_strides[1], args.acc_n = acc_strides[2];
  args.accumulate = accumulate;
  nb::gil_scoped_release release;
  return isa.empty() ? jax_mpk::host::contract_tile(args)
                     : jax_mpk::host::contract_tile_with(named(kIsas, isa), args);
}

std::vector<std::string> contract_isas() {
  std::vector<std::string> names;
  for (const auto& [name, isa] : kIsas) {
    if (jax_mpk::host::contract_isa_supported(isa)) names.push_back(name);
  }
  return names;
}

}  // namespace

void register_contract(nb::module_& m) {
  m.def("contract_tile", contract_tile, nb::arg("types"), nb::arg("addresses"), nb::arg("sizes"),
        nb::arg("lhs_strides"), nb::arg("rhs_strides"), nb::arg("acc_strides"),
        nb::arg("accumulate") = false, nb::arg("isa") = "",
        "acc[b, m, n] (+)= sum over k of lhs[b, m, k] * rhs[b, n, k]; sizes are b, m, n, k, "
        "strides in "
        "elements. False: refused. An empty isa takes the best one.");
  m.def("contract_isas", contract_isas, "Names of the implementations that this CPU can run.");
}
