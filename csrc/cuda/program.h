// A CUDA program as the custom call carries it: one blob, written by jax_mpk/runtime/cuda.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace jax_mpk::cuda {

// Raise it whenever the blob's layout or csrc/device/launch.cuh changes.
inline constexpr uint32_t kProgramVersion = 2;

struct Program {
  std::string entry;  // name of the kernel
  std::string arch;   // such as "sm_90a"
  uint32_t workers = 0, threads = 0, shared_bytes = 0;
  uint32_t arguments = 0, results = 0;  // buffers; the workspace is no result here
  uint64_t state_bytes = 0, workspace_bytes = 0;
  std::string cubin, tables;
  // Sorted: (first task, text). A text holds up to the next one's task.
  std::vector<std::pair<uint32_t, std::string>> labels;
  // Sorted: (where a tagged value's words begin in the state, in 16 bytes; its name).
  std::vector<std::pair<uint32_t, std::string>> values;

  // Throws Failure where the bytes are no program of this version.
  static Program parse(std::string_view blob);

  size_t buffers() const { return size_t{arguments} + results + (workspace_bytes > 0 ? 1 : 0); }
  // " (label)" of a task, or "".
  std::string label(uint32_t task) const;
  // The name of a tagged value.
  std::string value(uint32_t place) const;
};

}  // namespace jax_mpk::cuda
