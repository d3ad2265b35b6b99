// Temporary: weak stand-ins until program.cc defines these.
#include <cstdlib>
#include <stdexcept>

#include "host/program.h"

#define WEAK __attribute__((weak))
namespace jax_mpk::host {
struct Bodies {};
WEAK Program::Program() = default;
WEAK Program::~Program() {}
WEAK std::unique_ptr<Program> Program::parse(std::span<const int64_t>) { throw std::runtime_error("no program.cc"); }
WEAK Scratch::Scratch(const Program&) : data_(nullptr), size_(0) {}
WEAK Scratch::~Scratch() {}
WEAK void Scratch::poison() {}
WEAK void run_task(const Program&, int32_t, const Memory&, Scratch&) {}
WEAK FpEnvironment::FpEnvironment() : saved_(0) {}
WEAK FpEnvironment::~FpEnvironment() { (void)saved_; }
}  // namespace jax_mpk::host
