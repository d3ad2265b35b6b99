// Stable sorts by one or more keys, and top-k. Keys become unsigned integers that order like them; the position is
// the last key, which makes every order unique and any algorithm stable.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "host/vm.h"
#include "host/vm_memory.h"

namespace jax_mpk::host {
namespace {

// How a key's bits become an unsigned integer in JAX's order (−0 equals +0, NaNs equal and last) or in the total
// order of IEEE 754.
template <class U>
U ordered(U bits, int mantissa, bool is_float, bool is_signed, bool total, bool flush) {
  const U sign = static_cast<U>(U(1) << (sizeof(U) * 8 - 1));
  if (!is_float) return is_signed ? bits ^ sign : bits;
  if (!total) {
    const U size = bits & static_cast<U>(sign - 1);
    const U infinity = static_cast<U>(static_cast<U>((sign - 1) >> mantissa) << mantissa);
    // Comparisons see denormals as zeros (program.h), those of f16 excepted, which happen in f32.
    if (size == 0 || (flush && size >> mantissa == 0)) bits = 0;
    if (size > infinity) return static_cast<U>(-1);
  }
  return static_cast<U>(bits & sign ? ~bits : bits | sign);
}

template <class U>
void ordered_keys(const std::byte* base, int64_t offset, int64_t stride, int64_t n, Type type, bool total,
                  uint64_t* out) {
  const U* from = reinterpret_cast<const U*>(base) + offset;
  const bool is_float = type == Type::k_f16 || type == Type::k_bf16 || type == Type::k_f32 || type == Type::k_f64;
  const bool is_signed = type >= Type::k_s8 && type <= Type::k_s64;
  const int mantissa = type == Type::k_f16 ? 10 : type == Type::k_bf16 ? 7 : type == Type::k_f32 ? 23 : 52;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = ordered<U>(from[i * stride], mantissa, is_float, is_signed, total, type != Type::k_f16);
  }
}

void keys_of(const std::byte* base, int64_t offset, int64_t stride, int64_t n, Type type, bool total, uint64_t* out) {
  switch (bytes_of(type)) {
    case 1: return ordered_keys<uint8_t>(base, offset, stride, n, type, total, out);
    case 2: return ordered_keys<uint16_t>(base, offset, stride, n, type, total, out);
    case 4: return ordered_keys<uint32_t>(base, offset, stride, n, type, total, out);
    default: return ordered_keys<uint64_t>(base, offset, stride, n, type, total, out);
  }
}

// Sorts words by their upper half, keeping the order of equals; `other` is as long as `words`.
void radix_sort(uint64_t* words, uint64_t* other, int64_t n) {
  constexpr int kBits = 11, kPasses = 3;
  uint32_t counts[kPasses][1 << kBits] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass][words[i] >> (32 + kBits * pass) & ((1 << kBits) - 1)];
  }
  uint64_t *from = words, *to = other;
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* count = counts[pass];
    const int shift = 32 + kBits * pass;
    if (count[from[0] >> shift & ((1 << kBits) - 1)] == n) continue;  // one digit for all
    uint32_t start = 0;
    for (int d = 0; d < 1 << kBits; ++d) start += std::exchange(count[d], start);
    for (int64_t i = 0; i < n; ++i) to[count[from[i] >> shift & ((1 << kBits) - 1)]++] = from[i];
    std::swap(from, to);
  }
  if (from != words) std::memcpy(words, from, static_cast<size_t>(n) * sizeof(uint64_t));
}

class Sorting {
 public:
  Sorting(const Context& context, int index)
      : context_(context), member_(context.routine.members[index]), n_(member_.extents[member_.axis]) {
    for (const Tensor& tensor : member_.operands) add(tensor);
    for (const Tensor& tensor : member_.outputs) add(tensor);
    keys_ = reinterpret_cast<uint64_t*>(context.sorting());
    words_ = keys_ + n_ * member_.num_keys;
    other_ = words_ + n_;
  }

  void run(const int64_t* low, const int64_t* high) {
    int64_t at[kMaxAxes];
    for (int d = 0; d < member_.rank; ++d) {
      if (d != member_.axis && high[d] <= low[d]) return;
      at[d] = d == member_.axis ? 0 : low[d];
    }
    for (size_t j = 0; j < arrays_.size(); ++j) check(arrays_[j], low, high, j < member_.operands.size());
    while (true) {
      row(at);
      int d = member_.rank - 1;
      for (; d >= 0; --d) {
        if (d == member_.axis) continue;
        if (++at[d] < high[d]) break;
        at[d] = low[d];
      }
      if (d < 0) return;
    }
  }

 private:
  struct Array {
    Operand where;
    int64_t strides[kMaxAxes];
    Type type;

    int64_t offset(const int64_t* at, int rank) const {
      int64_t sum = 0;
      for (int d = 0; d < rank; ++d) sum += at[d] * strides[d];
      return sum;
    }
  };

  void add(const Tensor& tensor) {
    arrays_.emplace_back();
    arrays_.back().where = context_.resolve(tensor);
    arrays_.back().type = tensor.type;
    context_.strides(tensor, arrays_.back().strides);
  }

  // All strides are positive: the corners of the box say which elements are touched.
  void check(const Array& array, const int64_t* low, const int64_t* high, bool operand) const {
    const int64_t along = operand || member_.top_k < 0 ? n_ : member_.top_k;
    int64_t first = 0, last = 0;
    for (int d = 0; d < member_.rank; ++d) {
      first += (d == member_.axis ? 0 : low[d]) * array.strides[d];
      last += (d == member_.axis ? along - 1 : high[d] - 1) * array.strides[d];
    }
    if (first < array.where.low || last >= array.where.high) {
      throw std::runtime_error("a sort touches elements outside of its operands");
    }
  }

  const Array& output(size_t j) const { return arrays_[member_.operands.size() + j]; }

  void row(const int64_t* at) {
    const bool top = member_.top_k >= 0;
    for (int k = 0; k < member_.num_keys; ++k) {
      const Array& array = arrays_[k];
      keys_of(array.where.base, array.offset(at, member_.rank), array.strides[member_.axis], n_, array.type, top,
              keys_ + k * n_);
    }
    // words_[i]: afterwards, position of the i-th element in the lower half.
    const int64_t count = top ? member_.top_k : n_;
    if (member_.num_keys == 1 && bytes_of(arrays_[0].type) <= 4) {
      const uint64_t flip = top ? 0xffffffffu : 0;
      for (int64_t i = 0; i < n_; ++i) words_[i] = ((keys_[i] ^ flip) & 0xffffffffu) << 32 | static_cast<uint64_t>(i);
      if (count < n_ / 4) {
        std::nth_element(words_, words_ + count, words_ + n_);
        std::sort(words_, words_ + count);
      } else if (n_ >= 256) {
        radix_sort(words_, other_, n_);
      } else {
        std::sort(words_, words_ + n_);
      }
    } else {
      for (int64_t i = 0; i < n_; ++i) words_[i] = static_cast<uint64_t>(i);
      auto before = [&](uint64_t a, uint64_t b) {
        for (int k = 0; k < member_.num_keys; ++k) {
          const uint64_t x = keys_[k * n_ + static_cast<int64_t>(a)], y = keys_[k * n_ + static_cast<int64_t>(b)];
          if (x != y) return top ? x > y : x < y;
        }
        return a < b;
      };
      if (count < n_) std::partial_sort(words_, words_ + count, words_ + n_, before);
      else std::sort(words_, words_ + n_, before);
    }
    for (int64_t i = 0; i < count; ++i) words_[i] &= 0xffffffffu;
    if (top) {
      permute(arrays_[0], output(0), at, count);
      const Array& positions = output(1);
      const int64_t start = positions.offset(at, member_.rank), stride = positions.strides[member_.axis];
      int32_t* to = reinterpret_cast<int32_t*>(positions.where.base);
      for (int64_t i = 0; i < count; ++i) to[start + i * stride] = static_cast<int32_t>(words_[i]);
    } else {
      for (size_t j = 0; j < member_.outputs.size(); ++j) permute(arrays_[j], output(j), at, count);
    }
  }

  void permute(const Array& from, const Array& to, const int64_t* at, int64_t count) const {
    const int bytes = bytes_of(from.type);
    const std::byte* source = from.where.base + from.offset(at, member_.rank) * bytes;
    std::byte* target = to.where.base + to.offset(at, member_.rank) * bytes;
    const int64_t in = from.strides[member_.axis] * bytes, out = to.strides[member_.axis] * bytes;
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(target + i * out, source + static_cast<int64_t>(words_[i]) * in, static_cast<size_t>(bytes));
    }
  }

  const Context& context_;
  const Member& member_;
  const int64_t n_;
  std::vector<Array> arrays_;
  uint64_t *keys_, *words_, *other_;
};

}  // namespace

void run_sort(const Context& context, int index) {
  // A routine's task may have nothing to sort: another one does it.
  const int64_t *low = context.low(index), *high = context.high(index);
  if (empty(context.routine.members[index].space_rank, low, high)) return;
  Sorting(context, index).run(low, high);
}

}  // namespace jax_mpk::host
