// Tags of a launch, and plain stores that reach other workers later than tags.
#include <cstring>

#include "host/launch.h"

namespace jax_mpk::host {

// Like wait(), for the next element that a task reads and that has not got its tag.
bool Launch::wait_for_tags(Worker& worker, int32_t task) {
  const Regions& reads = program_.tag_reads;
  const uint16_t expected = tag_of(worker.sequence);
  if (worker.region < 0) worker.region = reads.start[task], worker.element = 0;
  for (; worker.region < reads.start[task + 1]; ++worker.region, worker.element = 0) {
    const Array& array = program_.arrays[reads.array[worker.region]];
    const Tag* tags = &tags_[static_cast<size_t>(array.first_tag)];
    const auto all_there = [&](int64_t at, int64_t offset, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        if (tags[offset + i].load(std::memory_order_acquire) == expected) continue;
        worker.element = at + i;
        worker.wait_until.store(expected, std::memory_order_relaxed);
        worker.wait_tag.store(&tags[offset + i], std::memory_order_relaxed);
        return false;
      }
      return true;
    };
    if (!for_each_run(program_, array, reads.row[worker.region], worker.element, all_there)) return true;
  }
  return false;
}

void Launch::publish_tags(const Worker& worker, int32_t task) {
  const Regions& writes = program_.writes;
  const uint16_t tag = tag_of(worker.sequence);
  bool any = false;
  for (int32_t r = writes.start[task]; r < writes.start[task + 1]; ++r) {
    const Array& array = program_.arrays[writes.array[r]];
    if (array.first_tag < 0) continue;
    any = true;
    Tag* tags = &tags_[static_cast<size_t>(array.first_tag)];
    for_each_run(program_, array, writes.row[r], 0, [&](int64_t, int64_t offset, int64_t count) {
      for (int64_t i = 0; i < count; ++i) tags[offset + i].store(tag, std::memory_order_release);
      return true;
    });
  }
  if (!any) return;
  published_.fetch_add(1, std::memory_order_seq_cst);
  ThreadPool::wake();
}

// Makes late stores visible. Returns false if they are held: then the worker has to wait.
bool Launch::show_late(Worker& worker) {
  if (worker.late_held && wait(worker, held_, 1)) return false;
  worker.late_held = false;
  scatter(worker.late_regions, worker.late_bytes);
  worker.late_regions.clear();
  return true;
}

std::vector<std::byte> Launch::gather(const std::vector<int32_t>& regions) const {
  std::vector<std::byte> bytes;
  for (int32_t r : regions) {
    const Array& array = program_.arrays[program_.writes.array[r]];
    const std::byte* base = base_[static_cast<size_t>(array.storage)];
    for_each_run(program_, array, program_.writes.row[r], 0, [&](int64_t, int64_t offset, int64_t count) {
      bytes.insert(bytes.end(), base + offset * array.item_bytes, base + (offset + count) * array.item_bytes);
      return true;
    });
  }
  return bytes;
}

void Launch::scatter(const std::vector<int32_t>& regions, const std::vector<std::byte>& bytes) const {
  const std::byte* from = bytes.data();
  for (int32_t r : regions) {
    const Array& array = program_.arrays[program_.writes.array[r]];
    std::byte* base = base_[static_cast<size_t>(array.storage)];
    for_each_run(program_, array, program_.writes.row[r], 0, [&](int64_t, int64_t offset, int64_t count) {
      const int64_t nbytes = count * array.item_bytes;
      std::memcpy(base + offset * array.item_bytes, from, static_cast<size_t>(nbytes));
      from += nbytes;
      return true;
    });
  }
}

}  // namespace jax_mpk::host
