// A placeholder that proves the build: the program attribute is kept, and execution copies each argument to
// the result of the same index.
#include "cpu_handler.h"

#include <cstring>
#include <memory>
#include <string_view>

namespace jax_mpk {

namespace ffi = xla::ffi;

ffi::TypeId CpuState::id = {};

void* CpuStateTypeInfo() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<CpuState>();
  return &info;
}

namespace {

ffi::ErrorOr<std::unique_ptr<CpuState>> Instantiate(ffi::Dictionary attrs) {
  auto program = attrs.get<std::string_view>("program");
  if (!program.has_value()) return ffi::Unexpected(program.error());
  auto state = std::make_unique<CpuState>();
  state->program = std::string(*program);
  return state;
}

ffi::Error Execute(CpuState*, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary) {
  if (args.size() != rets.size()) {
    return ffi::Error::InvalidArgument("jax_mpk_cpu: as many results as arguments are expected");
  }
  for (size_t i = 0; i < args.size(); ++i) {
    auto arg = args.get<ffi::AnyBuffer>(i);
    auto ret = rets.get<ffi::AnyBuffer>(i);
    if (!arg.has_value()) return arg.error();
    if (!ret.has_value()) return ret.error();
    if (arg->size_bytes() != (*ret)->size_bytes()) {
      return ffi::Error::InvalidArgument("jax_mpk_cpu: argument and result differ in size");
    }
    std::memcpy((*ret)->untyped_data(), arg->untyped_data(), arg->size_bytes());
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_mpk

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMpkCpuInstantiate, jax_mpk::Instantiate,
                              xla::ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMpkCpuExecute, jax_mpk::Execute,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::State<jax_mpk::CpuState>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());
