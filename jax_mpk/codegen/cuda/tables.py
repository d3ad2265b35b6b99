"""The constant tables of a program: queues, tasks, streams. `run_worker` in csrc/device/persistent.cuh reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_mpk.codegen.cuda.arrays import UNIT, buffer_of
from jax_mpk.codegen.cuda.code import FIRST_WORD, LIVE, Code, live_rows
from jax_mpk.graph import dtypes
from jax_mpk.plan.ir import BranchNode, LoopNode, Plan, Schedule, Segment

#: Bytes of `StateHeader` in csrc/device/launch.cuh, of a segment's sequence behind it, and of a counter in handoff.cuh.
HEADER_BYTES = 256
SEQUENCE_BYTES = 8
EVENT_BYTES = 32
_STATE_ALIGN = 256


@dataclass(frozen=True)
class State:
    """Where things lie in a call site's state on the device.

    Attributes:
      events: byte of the first counter.
      tagged: per storage the byte of its tagged words, or -1.
      memory: byte of the first memory that a worker has for what does not fit in its scratch.
      memory_bytes: of each of them.
      size: bytes in all.
    """

    events: int
    tagged: tuple[int, ...]
    memory: int
    memory_bytes: int
    size: int


@dataclass(frozen=True)
class Tables:
    """All tables as one block of words, and where each begins (in words).

    Attributes:
      words: uint32.
      queues: per segment and worker: first task, number of tasks.
      streams: per segment and worker: first stream, number of streams.
      results: per result: buffer, poison pattern, bytes (low, high).
      tasks: the first task; they lie in the order of the queues.
      task_words: words of a task.
      jobs: the first stream.
    """

    words: np.ndarray
    queues: int
    streams: int
    results: int
    tasks: int
    task_words: int
    jobs: int


def segments(schedule: Schedule) -> list[Segment]:
    """All segments, in the order their numbers are given."""
    out: list[Segment] = []
    for item in schedule:
        if isinstance(item, Segment):
            out.append(item)
        elif isinstance(item, LoopNode):
            out += segments(item.cond) + segments(item.body)
        else:
            assert isinstance(item, BranchNode)
            for arm in item.arms:
                out += segments(arm)
    return out


def state_layout(plan: Plan, segment_count: int, memory_bytes: int = 0, memories: int = 0) -> State:
    """A call site's state: header, sequences of the segments, counters, tagged words, memories of workers."""
    events = _aligned(HEADER_BYTES + SEQUENCE_BYTES * segment_count)
    at = _aligned(events + EVENT_BYTES * plan.events)
    itemsize = {}
    for v, s in enumerate(plan.value_storage.tolist()):
        if s >= 0:
            itemsize[s] = dtypes.itemsize(plan.graph.values[v].dtype)
    tagged = []
    for s, storage in enumerate(plan.storages):
        if not storage.tagged:
            tagged.append(-1)
            continue
        tagged.append(at)
        # Payload and tag: twice the bytes, and four at least.
        at = _aligned(at + storage.nbytes // itemsize[s] * max(4, 2 * itemsize[s]))
    memory_bytes = _aligned(memory_bytes)
    return State(events, tuple(tagged), at, memory_bytes, at + memory_bytes * memories)


def _aligned(n: int) -> int:
    return -(-n // _STATE_ALIGN) * _STATE_ALIGN


def build_tables(plan: Plan, state: State, case: Sequence[int], codes: Sequence[Code]) -> Tables:
    """All tables of a plan.

    Args:
      plan: the plan.
      state: where tagged words lie.
      case: per routine the number of the function that runs it.
      codes: per routine what its code reads.
    """
    tasks = plan.tasks
    count = len(tasks.table)
    waits, signals = np.diff(tasks.wait_start), np.diff(tasks.signal_start)
    own = np.array([code.words for code in codes], np.int64)[tasks.table["routine"]] if count else np.zeros(0, int)
    width = int((own + 2 * waits + signals).max(initial=FIRST_WORD))
    width = -(-width // 4) * 4
    table = np.zeros((count, width), np.uint32)
    table[:, 0] = np.array(case, np.uint32)[tasks.table["routine"]] if count else 0
    table[:, 1] = np.arange(count)
    table[:, 2], table[:, 3], table[:, 4] = waits, signals, own
    for number, code in enumerate(codes):
        mine = np.flatnonzero(tasks.table["routine"] == number)
        for operand in code.operands:
            storage = plan.storages[operand.storage]
            if storage.tagged:
                table[mine, operand.word] = state.tagged[operand.storage] // UNIT
            else:
                table[mine, operand.word], table[mine, operand.word + 1] = buffer_of(plan, storage)
        for word, column in code.columns:
            table[mine, word] = column.astype(np.int32).view(np.uint32)
    thresholds = np.bincount(tasks.signal_event, minlength=plan.events)
    for start, events, base, pair in (
        (tasks.wait_start, tasks.wait_event, own, True),
        (tasks.signal_start, tasks.signal_event, own + 2 * waits, False),
    ):
        task = np.repeat(np.arange(count), np.diff(start))
        at = base[task] + (np.arange(len(events)) - start[task]) * (2 if pair else 1)
        table[task, at] = events
        if pair:
            table[task, at + 1] = thresholds[events]
    return _assembled(plan, table, codes)


def _assembled(plan: Plan, table: np.ndarray, codes: Sequence[Code]) -> Tables:
    jobs: list[np.ndarray] = []
    ways = live_rows(codes)
    job_of: dict[int, tuple[int, int]] = {}  # task → first job, number
    for number, code in enumerate(codes):
        if not code.streams:
            continue
        for k, task in enumerate(np.flatnonzero(plan.tasks.table["routine"] == number).tolist()):
            job_of[task] = len(jobs), len(code.streams)
            for s in code.streams:
                buffer, unit = buffer_of(plan, plan.storages[s.storage])
                job = np.zeros(4, np.uint64)
                job.view(np.uint32)[:2] = buffer, s.chunk_bytes + (LIVE * (1 + ways[s.live]) if s.live else 0)
                job[1], job[2] = unit * UNIT + int(s.first[k]), int(s.size[k]) | s.block << 32
                job.view(np.uint32)[6:] = s.rows[k], s.stride
                jobs.append(job)
    order: list[int] = []
    queues: list[tuple[int, int]] = []
    streams: list[tuple[int, int]] = []
    ordered_jobs: list[np.ndarray] = []
    for segment in segments(plan.schedule):
        for queue in segment.queues:
            queues.append((len(order), len(queue)))
            first = len(ordered_jobs)
            for task in queue.tolist():
                order.append(task)
                at, n = job_of.get(task, (0, 0))
                ordered_jobs += jobs[at : at + n]
            streams.append((first, len(ordered_jobs) - first))
    results = np.array([_poison(plan, r) for r in range(len(plan.graph.results))], np.uint32).reshape(-1)
    parts = [np.array(queues, np.uint32).reshape(-1), np.array(streams, np.uint32).reshape(-1), results]
    parts.append(table[np.array(order, np.int64)].reshape(-1))
    parts.append(np.array(ordered_jobs, np.uint64).reshape(-1).view(np.uint32))
    starts = []
    words: list[np.ndarray] = []
    at = 0
    for part in parts:
        starts.append(at)
        padded = np.zeros(-(-len(part) // 64) * 64, np.uint32)
        padded[: len(part)] = part
        words.append(padded)
        at += len(padded)
    return Tables(np.concatenate(words), starts[0], starts[1], starts[2], starts[3], table.shape[1], starts[4])


def _poison(plan: Plan, result: int) -> tuple[int, int, int, int]:
    """A result's buffer, poison pattern and size."""
    value = plan.graph.values[plan.graph.results[result]]
    top, width, rest = poison_pattern(value.dtype)
    size = width * int(np.prod(value.shape, dtype=np.int64))
    return len(plan.graph.inputs) + result, top | width << 8 | rest << 16, size & 0xFFFFFFFF, size >> 32


def poison_pattern(dtype: str) -> tuple[int, int, int]:
    """What a result that was not computed holds: last byte of an element, number of bytes, the other bytes.

    Floats are NaN, integers the least there is, b1 false.
    """
    width = dtypes.itemsize(dtype)
    if dtypes.is_float(dtype):
        return 0x7F, width, 0xFF
    return (0x80 if dtypes.is_signed(dtype) else 0), width, 0
