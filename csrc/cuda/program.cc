#include "cuda/program.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "cuda/driver.h"
#include "device/launch.cuh"

namespace jax_mpk::cuda {

namespace {

constexpr std::string_view kMagic = "JMPKCUDA";
// A kernel's parameters are at most this many bytes (sm_70 and newer).
constexpr size_t kMaxParameters = 32764;

[[noreturn]] void refuse(const std::string& why) { throw Failure(Failure::Kind::kProgram, why); }

class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}

  std::string_view take(uint64_t size) {
    if (size > rest_.size()) refuse("the program ends early");
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }
  template <class T>
  T number() {
    static_assert(std::is_integral_v<T>);
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string section() { return std::string(take(number<uint64_t>())); }
  bool done() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

}  // namespace

Program Program::parse(std::string_view blob) {
  Reader reader(blob);
  if (reader.take(kMagic.size()) != kMagic) refuse("these bytes are no program");
  if (const auto version = reader.number<uint32_t>(); version != kProgramVersion) {
    refuse("the program has version " + std::to_string(version) + ", and this jax_mpk runs version " +
           std::to_string(kProgramVersion) + ": compile the function again");
  }
  Program p;
  for (uint32_t* field : {&p.workers, &p.threads, &p.shared_bytes, &p.arguments, &p.results}) {
    *field = reader.number<uint32_t>();
  }
  for (uint64_t* field : {&p.state_bytes, &p.workspace_bytes}) *field = reader.number<uint64_t>();
  for (std::string* field : {&p.entry, &p.arch, &p.cubin, &p.tables}) *field = reader.section();
  for (auto* names : {&p.labels, &p.values}) {
    names->resize(reader.number<uint32_t>());
    for (auto& [key, text] : *names) {
      key = reader.number<uint32_t>();
      text = reader.section();
    }
  }
  if (!reader.done()) refuse("the program has bytes left over");
  if (p.workers == 0 || p.threads == 0) refuse("the program has no workers");
  if (p.state_bytes < sizeof(mpk::StateHeader)) refuse("the program's state has no room for its header");
  if (sizeof(mpk::Launch<1>) + 8 * p.buffers() > kMaxParameters) {
    refuse("a kernel cannot have " + std::to_string(p.buffers()) + " buffers; at most " +
           std::to_string((kMaxParameters - sizeof(mpk::Launch<1>)) / 8) + " fit: pack some arrays into one");
  }
  return p;
}

std::string Program::label(uint32_t task) const {
  const auto next = std::upper_bound(labels.begin(), labels.end(), task,
                                     [](uint32_t t, const auto& label) { return t < label.first; });
  if (next == labels.begin() || std::prev(next)->second.empty()) return "";
  return " (" + std::prev(next)->second + ")";
}

std::string Program::value(uint32_t place) const {
  const auto at = std::lower_bound(values.begin(), values.end(), place,
                                   [](const auto& value, uint32_t p) { return value.first < p; });
  return at != values.end() && at->first == place ? at->second : "at byte " + std::to_string(uint64_t{place} * 16);
}

}  // namespace jax_mpk::cuda
