#include "cpu_handler.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace jax_mpk {

namespace ffi = xla::ffi;

ffi::TypeId CpuState::id = {};

void* CpuStateTypeInfo() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<CpuState>();
  return &info;
}

namespace {

std::atomic<bool> chaos_enabled{false};
std::atomic<uint64_t> chaos_seed{0};

ffi::ErrorOr<std::unique_ptr<CpuState>> Instantiate(ffi::Dictionary attrs) {
  auto program = attrs.get<std::string_view>("program");
  if (!program.has_value()) return ffi::Unexpected(program.error());
  if (program->size() % sizeof(int64_t) != 0) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("jax_mpk_cpu: the program is not made of 64-bit words"));
  }
  // The attribute's bytes need not be aligned, nor live on.
  std::vector<int64_t> words(program->size() / sizeof(int64_t));
  std::memcpy(words.data(), program->data(), program->size());
  try {
    auto state = std::make_unique<CpuState>();
    state->executable = std::make_shared<host::Executable>(host::Program::parse(words));
    return state;
  } catch (const std::exception& error) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(std::string("jax_mpk_cpu: ") + error.what()));
  }
}

ffi::Error Execute(CpuState* state, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary) {
  std::vector<host::Buffer> arguments, results;
  arguments.reserve(args.size());
  results.reserve(rets.size());
  for (size_t i = 0; i < args.size(); ++i) {
    auto arg = args.get<ffi::AnyBuffer>(i);
    if (!arg.has_value()) return arg.error();
    arguments.push_back({static_cast<std::byte*>(arg->untyped_data()), static_cast<int64_t>(arg->size_bytes())});
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto ret = rets.get<ffi::AnyBuffer>(i);
    if (!ret.has_value()) return ret.error();
    results.push_back({static_cast<std::byte*>((*ret)->untyped_data()), static_cast<int64_t>((*ret)->size_bytes())});
  }
  host::LaunchOptions options;
  if (chaos_enabled.load(std::memory_order_relaxed)) options.chaos_seed = chaos_seed.load(std::memory_order_relaxed);
  const host::Outcome outcome = state->executable->launch(arguments, results, options);
  switch (outcome.kind) {
    case host::Outcome::Kind::kOk:
      return ffi::Error::Success();
    case host::Outcome::Kind::kDeadlock:
      return ffi::Error(ffi::ErrorCode::kAborted, "jax_mpk_cpu: DeadlockError: " + outcome.message);
    case host::Outcome::Kind::kFailed:
      break;
  }
  return ffi::Error::Internal("jax_mpk_cpu: LaunchError: " + outcome.message);
}

}  // namespace

void SetCpuChaosSeed(bool enabled, uint64_t seed) {
  chaos_seed.store(seed, std::memory_order_relaxed);
  chaos_enabled.store(enabled, std::memory_order_relaxed);
}

}  // namespace jax_mpk

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMpkCpuInstantiate, jax_mpk::Instantiate,
                              xla::ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMpkCpuExecute, jax_mpk::Execute,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::State<jax_mpk::CpuState>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());
