// Reductions: the body's results are combined into accumulator tiles, from which the epilogue computes the outputs.
//
// Two strategies, chosen by the encoder. Lanes along parallel axes: each lane is one output element and steps
// through the reduced space in order. Lanes along the reduced axes: accumulators are lanes too, joined in a fixed
// tree at the end; a combination that may not commute is joined pair by pair instead, which keeps the order.
//
// A long chain of additions loses accuracy, as terms meet an ever larger sum. So accumulators take kRun steps only and
// are joined to a total then, which takes kRun of them and is joined to the next one (Levels). Up to kRun steps nothing
// of this shows.
#include <cstring>

#include "host/vm.h"

namespace jax_mpk::host {
namespace {

constexpr int64_t kRun = 128;  // a power of two

class Reduction {
 public:
  Reduction(const Context& context, int index)
      : context_(context), member_(context.routine.members[index]), code_(context.bodies.codes[member_.body]) {
    for (const Tensor& tensor : member_.operands) operands_.push_back(context.resolve(tensor));
  }

  void run(const int64_t* low, const int64_t* high) {
    std::byte* tile = context_.tile();
    int64_t elements = 1;
    for (int d = 0; d < member_.space_rank; ++d) elements *= high[d] - low[d];
    for (size_t k = 0; k < code_.accumulators.size(); ++k) {
      tiles_[k] = tile;
      tile += round_up(elements * bytes_of(code_.accumulators[k].type), 64);
    }
    Walk walk(code_, operands_.data(), context_.walk());
    if (member_.lane_axis >= 0) {
      parallel_lanes(walk, low, high);
    } else {
      reduced_lanes(walk, low, high);
    }
  }

 private:
  void parallel_lanes(Walk& walk, const int64_t* low, const int64_t* high) {
    const int outer = member_.lane_axis, reduced = member_.rank - member_.space_rank;
    walk.setup(low, high, outer, outer + reduced, true);
    const int from = walk.groups_before(outer);
    int64_t at = 0;
    do {
      for (int64_t p0 = 0; p0 < walk.lanes();) {
        const int64_t n = walk.chunk(p0);
        Levels levels;
        bool first = true;
        do {
          walk.run(p0, n);
          combine(walk, first, n);
          first = false;
          if (levels.step()) {
            int64_t used = n;
            close(walk, levels, used);
            first = true;
          }
        } while (walk.advance(from, walk.groups()));
        int64_t used = first ? 0 : n;
        finish(walk, levels, used);
        emit(walk, at + p0, n);
        p0 += n;
      }
      at += walk.lanes();
    } while (walk.advance(0, from));
  }

  void reduced_lanes(Walk& walk, const int64_t* low, const int64_t* high) {
    walk.setup(low, high, member_.space_rank, member_.space_rank);
    const int from = walk.groups_before(member_.space_rank);
    int64_t at = 0;
    do {
      Levels levels;
      int64_t used = 0;  // accumulator lanes that hold something
      do {
        for (int64_t p0 = 0; p0 < walk.lanes();) {
          const int64_t n = walk.chunk(p0);
          walk.run(p0, n);
          if (member_.commutative) {
            join_lanes(walk, used, n);
          } else {
            join_ordered(walk, used == 0, n);
            used = 1;
          }
          if (levels.step()) close(walk, levels, used);
          p0 += n;
        }
      } while (walk.advance(from, walk.groups()));
      finish(walk, levels, used);
      if (member_.commutative) fold(walk, used);
      emit(walk, at++, 1);
    } while (walk.advance(0, from));
  }

  // Totals of closed runs: level 0 of up to kRun runs, level 1 of all earlier ones.
  struct Levels {
    static constexpr size_t kCount = 2;
    int64_t used[kCount] = {};  // lanes that hold something
    int64_t steps = 0;          // of all runs

    bool step() { return ++steps % kRun == 0; }
  };

  // Joins the accumulators to the total of level 0, and that to level 1 when it is full.
  void close(Walk& walk, Levels& levels, int64_t& used) {
    raise(walk, levels, 0, used);
    if (levels.steps % (kRun * kRun) != 0) return;
    lower(walk, levels, 0, used);
    raise(walk, levels, 1, used);
  }

  // All that was closed in front of the accumulators.
  void finish(Walk& walk, Levels& levels, int64_t& used) {
    for (size_t level = 0; level < Levels::kCount; ++level) lower(walk, levels, level, used);
  }

  // A level takes what the accumulators hold; they are empty then.
  void raise(Walk& walk, Levels& levels, size_t level, int64_t& used) {
    lower(walk, levels, level, used);
    for (size_t k = 0; k < code_.accumulators.size(); ++k) {
      copy(walk, k, total(walk, level, k), accumulator(walk, k), used);
    }
    levels.used[level] = used;
    used = 0;
  }

  // The accumulators become what a level holds, combined with themselves; the level is empty then.
  void lower(Walk& walk, Levels& levels, size_t level, int64_t& used) {
    int64_t& held = levels.used[level];
    if (held == 0) return;
    for (size_t k = 0; k < code_.accumulators.size(); ++k) {
      copy(walk, k, result(walk, k), accumulator(walk, k), used);
      copy(walk, k, accumulator(walk, k), total(walk, level, k), held);
    }
    join_lanes(walk, held, used);
    used = held;
    held = 0;
  }

  // accumulators = results, or accumulators combined with results.
  void combine(Walk& walk, bool first, int64_t n) {
    if (!first) return walk.run_phase(code_.combine(), n);
    for (size_t k = 0; k < code_.accumulators.size(); ++k) copy(walk, k, accumulator(walk, k), result(walk, k), n);
  }

  // The first min(n, used) lanes are combined, further ones become accumulators. Kernels write whole blocks, so
  // accumulators behind the last combined lane are kept aside.
  void join_lanes(Walk& walk, int64_t& used, int64_t n) {
    const int64_t both = n < used ? n : used;
    if (both > 0) {
      keep_and_combine(walk, both, used);
    }
    for (size_t k = 0; n > both && k < code_.accumulators.size(); ++k) {
      const int bytes = bytes_of(code_.accumulators[k].type);
      std::memcpy(accumulator(walk, k) + both * bytes, result(walk, k) + both * bytes,
                  static_cast<size_t>((n - both) * bytes));
    }
    if (n > used) used = n;
  }

  void keep_and_combine(Walk& walk, int64_t n, int64_t used) {
    const int64_t block_end = round_up(n, kBlock) < used ? round_up(n, kBlock) : used;
    std::byte kept[kMaxKept][kBlock * 8];
    for (size_t k = 0; n < block_end && k < code_.accumulators.size(); ++k) {
      const int bytes = bytes_of(code_.accumulators[k].type);
      std::memcpy(kept[k], accumulator(walk, k) + n * bytes, static_cast<size_t>((block_end - n) * bytes));
    }
    walk.run_phase(code_.combine(), n);
    for (size_t k = 0; n < block_end && k < code_.accumulators.size(); ++k) {
      const int bytes = bytes_of(code_.accumulators[k].type);
      std::memcpy(accumulator(walk, k) + n * bytes, kept[k], static_cast<size_t>((block_end - n) * bytes));
    }
  }

  void fold(Walk& walk, int64_t used) {
    if (member_.fold >= 0) {
      const int type = static_cast<int>(code_.accumulators[0].type);
      std::byte* lanes = accumulator(walk, 0);
      kernels().fold[member_.fold][type](lanes, lanes, nullptr, nullptr, used, 0);
      return;
    }
    while (used > 1) {
      const int64_t half = used / 2;
      for (size_t k = 0; k < code_.accumulators.size(); ++k) {
        const int bytes = bytes_of(code_.accumulators[k].type);
        std::memcpy(result(walk, k), accumulator(walk, k) + (used - half) * bytes, static_cast<size_t>(half * bytes));
      }
      keep_and_combine(walk, half, used - half);
      used -= half;
    }
  }

  // Joins neighbours (0 with 1, 2 with 3, …) until one lane is left, then that onto the total of earlier chunks.
  void join_ordered(Walk& walk, bool first, int64_t n) {
    const size_t count = code_.accumulators.size();
    std::byte* chunks = total(walk, Levels::kCount, 0);  // 8 bytes per accumulator
    for (; n > 1; n = (n + 1) / 2) {
      for (size_t k = 0; k < count; ++k) {
        by_size(bytes_of(code_.accumulators[k].type), [&]<class T>(T*) {
          T* left = reinterpret_cast<T*>(accumulator(walk, k));
          T* right = reinterpret_cast<T*>(result(walk, k));
          for (int64_t i = 0; i < n / 2; ++i) left[i] = right[2 * i], right[i] = right[2 * i + 1];
          if (n % 2) right[n / 2] = right[n - 1];
        });
      }
      walk.run_phase(code_.combine(), n / 2);
      for (size_t k = 0; k < count; ++k) {
        const size_t bytes = static_cast<size_t>(bytes_of(code_.accumulators[k].type));
        std::memcpy(result(walk, k), accumulator(walk, k), static_cast<size_t>(n / 2) * bytes);
      }
    }
    for (size_t k = 0; k < count; ++k) {
      const size_t bytes = static_cast<size_t>(bytes_of(code_.accumulators[k].type));
      std::memcpy(accumulator(walk, k), first ? result(walk, k) : chunks + 8 * k, bytes);
    }
    if (!first) walk.run_phase(code_.combine(), 1);
    for (size_t k = 0; k < count; ++k) std::memcpy(chunks + 8 * k, accumulator(walk, k), 8);
  }

  void emit(Walk& walk, int64_t at, int64_t n) {
    if (member_.fold == static_cast<int>(Fold::kSum)) add_to_zero(walk, n);
    for (size_t k = 0; k < code_.accumulators.size(); ++k) {
      const int bytes = bytes_of(code_.accumulators[k].type);
      std::memcpy(tiles_[k] + at * bytes, accumulator(walk, k), static_cast<size_t>(n * bytes));
    }
  }

  // Sums start from +0, which shows where all terms are -0.
  void add_to_zero(Walk& walk, int64_t n) {
    const size_t bytes = static_cast<size_t>(n * bytes_of(code_.accumulators[0].type));
    std::memcpy(result(walk, 0), accumulator(walk, 0), bytes);
    std::memset(accumulator(walk, 0), 0, bytes);
    walk.run_phase(code_.combine(), n);
  }

  void copy(Walk&, size_t k, std::byte* to, const std::byte* from, int64_t n) {
    std::memcpy(to, from, static_cast<size_t>(n * bytes_of(code_.accumulators[k].type)));
  }
  std::byte* total(Walk& walk, size_t level, size_t k) const {
    return walk.spare() + 8 * code_.max_lanes * static_cast<int64_t>(level * code_.accumulators.size() + k);
  }
  std::byte* accumulator(Walk& walk, size_t k) const { return walk.lanes_of(code_.accumulators[k].at); }
  std::byte* result(Walk& walk, size_t k) const { return walk.lanes_of(code_.results[k].at); }

  template <class F>
  static void by_size(int bytes, const F& f) {
    switch (bytes) {
      case 1: return f(static_cast<uint8_t*>(nullptr));
      case 2: return f(static_cast<uint16_t*>(nullptr));
      case 4: return f(static_cast<uint32_t*>(nullptr));
      default: return f(static_cast<uint64_t*>(nullptr));
    }
  }

  static constexpr int kMaxKept = kMaxAccumulators;

  const Context& context_;
  const Member& member_;
  const Code& code_;
  std::vector<Operand> operands_;
  std::byte* tiles_[kMaxAccumulators];
};

}  // namespace

void run_reduce(const Context& context, int index) {
  Reduction reduction(context, index);
  run_in_pieces(context, index, [&](const int64_t* from, const int64_t* to) { reduction.run(from, to); });
}

}  // namespace jax_mpk::host
