// Reads a word stream, refusing whatever does not make sense.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace jax_mpk::host {

class WordReader {
 public:
  explicit WordReader(std::span<const int64_t> words) : words_(words) {}

  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error("malformed program at word " + std::to_string(at_) + ": " + why);
  }
  void require(bool ok, std::string_view why) const {
    if (!ok) fail(std::string(why));
  }

  int64_t any(std::string_view what) {
    if (at_ >= words_.size()) fail("it ends where " + std::string(what) + " should be");
    return words_[at_++];
  }
  // A number in [low, high].
  int64_t in(int64_t low, int64_t high, std::string_view what) {
    const int64_t value = any(what);
    if (value < low || value > high) {
      --at_;
      fail(std::string(what) + " is " + std::to_string(value) + ", not in [" + std::to_string(low) + ", " +
           std::to_string(high) + "]");
    }
    return value;
  }
  int32_t in32(int64_t low, int64_t high, std::string_view what) { return static_cast<int32_t>(in(low, high, what)); }
  int64_t size(std::string_view what) { return in(0, int64_t{1} << 60, what); }
  bool flag(std::string_view what) { return in(0, 1, what) != 0; }
  // A number of things that take at least `words_each` words each: bounds what the caller allocates.
  int64_t count(std::string_view what, int64_t words_each = 1) {
    const int64_t left = static_cast<int64_t>(words_.size() - at_);
    return in(0, words_each > 0 ? left / words_each : int64_t{1} << 31, what);
  }

  // A count of 32-bit integers and the integers, two per word.
  std::vector<int32_t> packed(int64_t low, int64_t high, std::string_view what) {
    const int64_t left = static_cast<int64_t>(words_.size() - at_);
    const int64_t n = in(0, 2 * left, what);
    std::vector<int32_t> out(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; i += 2) {
      const uint64_t pair = static_cast<uint64_t>(any(what));
      out[i] = static_cast<int32_t>(pair);
      if (i + 1 < n) out[i + 1] = static_cast<int32_t>(pair >> 32);
      for (int64_t j = i; j < n && j < i + 2; ++j) {
        if (out[j] < low || out[j] > high) {
          fail(std::string(what) + " " + std::to_string(j) + " is " + std::to_string(out[j]) + ", not in [" +
               std::to_string(low) + ", " + std::to_string(high) + "]");
        }
      }
    }
    return out;
  }

  // A length in bytes and the bytes, eight per word.
  std::string text(std::string_view what) {
    const int64_t bytes = in(0, 1 << 20, what);
    std::string out;
    for (int64_t i = 0; i < bytes; i += 8) {
      const uint64_t word = static_cast<uint64_t>(any(what));
      for (int64_t j = i; j < bytes && j < i + 8; ++j) out += static_cast<char>(word >> (8 * (j - i)) & 255);
    }
    return out;
  }

  size_t position() const { return at_; }
  size_t total() const { return words_.size(); }

 private:
  std::span<const int64_t> words_;
  size_t at_ = 0;
};

}  // namespace jax_mpk::host
