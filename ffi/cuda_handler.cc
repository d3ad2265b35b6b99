#include "cuda_handler.h"

#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace jax_mpk {

namespace ffi = xla::ffi;

ffi::TypeId CudaState::id = {};

void* CudaStateTypeInfo() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<CudaState>();
  return &info;
}

namespace {

// The error's text names the class of jax_mpk.errors that it would be in Python.
ffi::Error ToError(const std::exception& error) {
  const std::string text = error.what();
  const auto* failure = dynamic_cast<const cuda::Failure*>(&error);
  if (failure == nullptr) return ffi::Error::Internal("jax_mpk_cuda: " + text);
  switch (failure->kind) {
    case cuda::Failure::Kind::kProgram:
      return ffi::Error::InvalidArgument("jax_mpk_cuda: LaunchError: " + text);
    case cuda::Failure::Kind::kTarget:
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "jax_mpk_cuda: TargetError: " + text);
    case cuda::Failure::Kind::kMemory:
      return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                        "jax_mpk_cuda: LaunchError: " + text +
                            ". XLA reserves most of a device's memory when it starts; a smaller "
                            "XLA_PYTHON_CLIENT_MEM_FRACTION leaves more to others");
    case cuda::Failure::Kind::kDeadline:
      return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, "jax_mpk_cuda: DeadlineError: " + text);
    case cuda::Failure::Kind::kLaunch:
      break;
  }
  return ffi::Error::Internal("jax_mpk_cuda: LaunchError: " + text);
}

ffi::ErrorOr<std::unique_ptr<CudaState>> Instantiate(ffi::RemainingArgs, ffi::RemainingRets,
                                                       ffi::Dictionary attrs) {
  auto program = attrs.get<std::string_view>("program");
  if (!program.has_value()) return ffi::Unexpected(program.error());
  try {
    auto state = std::make_unique<CudaState>();
    state->executable = std::make_unique<cuda::Executable>(cuda::Program::parse(*program));
    return state;
  } catch (const std::exception& error) {
    return ffi::Unexpected(ToError(error));
  }
}

ffi::Error Initialize(CudaState* state, int32_t ordinal, cuda::CUstream stream, ffi::RemainingArgs,
                      ffi::RemainingRets, ffi::Dictionary) {
  try {
    state->executable->initialize(ordinal, stream);
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ToError(error);
  }
}

ffi::Error Execute(CudaState* state, int32_t ordinal, cuda::CUstream stream, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary) {
  std::vector<void*> buffers;
  buffers.reserve(args.size() + rets.size());
  for (size_t i = 0; i < args.size(); ++i) {
    auto arg = args.get<ffi::AnyBuffer>(i);
    if (!arg.has_value()) return arg.error();
    buffers.push_back(arg->untyped_data());
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto ret = rets.get<ffi::AnyBuffer>(i);
    if (!ret.has_value()) return ret.error();
    buffers.push_back((*ret)->untyped_data());
  }
  try {
    state->executable->launch(ordinal, stream, buffers);
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ToError(error);
  }
}

}  // namespace

}  // namespace jax_mpk

// Newer runtimes pass the buffers' types to the first stage too.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMpkCudaInstantiate, jax_mpk::Instantiate,
                              xla::ffi::Ffi::BindInstantiate().RemainingArgs().RemainingRets().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMpkCudaInitialize, jax_mpk::Initialize,
                              xla::ffi::Ffi::BindInitialize()
                                  .Ctx<xla::ffi::State<jax_mpk::CudaState>>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Ctx<xla::ffi::PlatformStream<jax_mpk::cuda::CUstream>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMpkCudaExecute, jax_mpk::Execute,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::State<jax_mpk::CudaState>>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Ctx<xla::ffi::PlatformStream<jax_mpk::cuda::CUstream>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
