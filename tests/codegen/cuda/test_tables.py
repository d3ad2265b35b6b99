"""The tables of a program say what the plan says."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from jax_mpk.codegen.cuda.arrays import UNIT, buffer_of
from jax_mpk.codegen.cuda.code import FIRST_WORD, LIVE, Code, live_rows
from jax_mpk.codegen.cuda.generate import routine_codes
from jax_mpk.codegen.cuda.ring import wanted
from jax_mpk.codegen.cuda.tables import (
    EVENT_BYTES,
    HEADER_BYTES,
    SEQUENCE_BYTES,
    State,
    Tables,
    build_tables,
    poison_pattern,
    segments,
    state_layout,
)
from jax_mpk.graph import dtypes
from jax_mpk.graph.fuse import fuse
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.planner import make_plan
from tests.codegen.golden.functions import SAMPLES
from tests.codegen.golden.text import plan
from tests.plan import graphs
from tests.plan.large_step import Shape
from tests.plan.test_large_plan import decoder_plan

NAMES = [*SAMPLES, "carries", "contraction", "in_place", "nested", "while"]
JOB_WORDS = 8
#: What workers get for what does not fit in scratch, in these tests.
MEMORY_BYTES, MEMORIES = 1000, 3


@functools.cache
def made(name: str) -> tuple[Plan, list[Code], State, Tables]:
    planned = plan(name) if name in SAMPLES else make_plan(fuse(graphs.case(name).graph), targets.H100)
    codes = routine_codes(planned, wanted(planned))
    state = state_layout(planned, len(segments(planned.schedule)), MEMORY_BYTES, MEMORIES)
    return planned, codes, state, build_tables(planned, state, case_of(codes), codes)


def case_of(codes: list[Code]) -> list[int]:
    """Some numbers of functions that are not those of the routines."""
    return [(7 * k + 3) % 1000 for k in range(len(codes))]


def rows(name: str) -> np.ndarray:
    """The words of the tasks in the order of the table."""
    planned, _, _, tables = made(name)
    count = len(planned.tasks.table)
    return tables.words[tables.tasks :][: count * tables.task_words].reshape(count, tables.task_words)


@pytest.mark.parametrize("name", NAMES)
def test_parts_follow_each_other(name: str) -> None:
    planned, _, _, tables = made(name)
    starts = [tables.queues, tables.streams, tables.results, tables.tasks, tables.jobs, len(tables.words)]
    assert starts == sorted(starts) and all(s * 4 % 256 == 0 for s in starts)
    assert tables.task_words % 4 == 0  # 16 bytes are copied at a time
    pairs = 2 * planned.target.workers * len(segments(planned.schedule))
    assert tables.streams - tables.queues >= pairs and tables.results - tables.streams >= pairs
    assert tables.words.dtype == np.uint32


@pytest.mark.parametrize("name", NAMES)
def test_queues_are_those_of_the_plan(name: str) -> None:
    planned, codes, _, tables = made(name)
    table = rows(name)
    workers = planned.target.workers
    seen = []
    for s, segment in enumerate(segments(planned.schedule)):
        for w, queue in enumerate(segment.queues):
            first, count = tables.words[tables.queues + 2 * (s * workers + w) :][:2]
            mine = table[first : first + count]
            assert mine[:, 1].tolist() == queue.tolist()
            assert mine[:, 0].tolist() == [case_of(codes)[r] for r in planned.tasks.table["routine"][queue]]
            seen += queue.tolist()
    assert sorted(seen) == list(range(len(table)))


@pytest.mark.parametrize("name", NAMES)
def test_waits_and_signals(name: str) -> None:
    planned, codes, _, _ = made(name)
    tasks = planned.tasks
    signalled = np.bincount(tasks.signal_event, minlength=planned.events)
    for row in rows(name):
        task = int(row[1])
        waits, signals, order = (int(n) for n in row[2:FIRST_WORD])
        assert order == codes[tasks.table["routine"][task]].words
        pairs = row[order : order + 2 * waits].reshape(-1, 2)
        assert pairs[:, 0].tolist() == tasks.wait_event[slice(*tasks.wait_start[task : task + 2])].tolist()
        assert pairs[:, 1].tolist() == signalled[pairs[:, 0]].tolist()
        behind = row[order + 2 * waits :][:signals]
        assert behind.tolist() == tasks.signal_event[slice(*tasks.signal_start[task : task + 2])].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_operands_and_numbers(name: str) -> None:
    planned, codes, state, _ = made(name)
    table = rows(name)
    routine = planned.tasks.table["routine"]
    for number, code in enumerate(codes):
        mine = table[np.argsort(table[:, 1])][routine == number]
        words = {w for operand in code.operands for w in (operand.word,)} | {w for w, _ in code.columns}
        assert all(FIRST_WORD <= w < code.words for w in words)
        for operand in code.operands:
            storage = planned.storages[operand.storage]
            if storage.tagged:
                assert (mine[:, operand.word] * UNIT == state.tagged[operand.storage]).all()
            else:
                assert (mine[:, operand.word : operand.word + 2] == buffer_of(planned, storage)).all()
        for word, column in code.columns:
            assert mine[:, word].view(np.int32).tolist() == column.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_streams_follow_the_queue(name: str) -> None:
    planned, codes, _, tables = made(name)
    workers = planned.target.workers
    jobs = tables.words[tables.jobs :]
    routine = planned.tasks.table["routine"]
    position = np.zeros(len(routine), int)
    for number in range(len(codes)):
        mine = np.flatnonzero(routine == number)
        position[mine] = np.arange(len(mine))
    end = 0
    for s, segment in enumerate(segments(planned.schedule)):
        for w, queue in enumerate(segment.queues):
            first, count = tables.words[tables.streams + 2 * (s * workers + w) :][:2]
            want = [(stream, position[t]) for t in queue for stream in codes[routine[t]].streams]
            assert first == end and count == len(want)
            end += len(want)
            for k, (stream, task) in enumerate(want):
                job = jobs[(first + k) * JOB_WORDS :][:JOB_WORDS]
                buffer, unit = buffer_of(planned, planned.storages[stream.storage])
                offset, size = job[2:6].view(np.uint64)
                kind = stream.chunk_bytes + (LIVE * (1 + live_rows(codes)[stream.live]) if stream.live else 0)
                assert (job[0], job[1]) == (buffer, kind)
                assert (offset, size) == (unit * UNIT + stream.first[task], stream.size[task] | stream.block << 32)
                assert (job[6], job[7]) == (stream.rows[task], stream.stride)
                assert offset % 16 == 0 and stream.size[task] % 16 == 0 and stream.block % 16 == 0
    assert end or name != "streamed"


@pytest.mark.parametrize("name", NAMES)
def test_state(name: str) -> None:
    """Header, sequences, counters, tagged words, memories of workers: aligned, one behind the other."""
    planned, _, state, _ = made(name)
    taken = [(0, HEADER_BYTES + SEQUENCE_BYTES * len(segments(planned.schedule)))]
    taken.append((state.events, state.events + EVENT_BYTES * planned.events))
    for storage, at in enumerate(state.tagged):
        assert (at >= 0) == planned.storages[storage].tagged
        if at >= 0:
            (v,) = np.flatnonzero(planned.value_storage == storage)
            item = dtypes.itemsize(planned.graph.values[v].dtype)
            word = 4 if item <= 2 else 8
            taken.append((at, at + planned.storages[storage].nbytes // item * word))
    assert all(a % 256 == 0 for a, _ in taken)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    assert taken[-1][1] <= state.memory and state.memory % 256 == state.memory_bytes % 256 == 0
    assert MEMORY_BYTES <= state.memory_bytes
    assert state.size == state.memory + MEMORIES * state.memory_bytes


@pytest.mark.parametrize("dtype", dtypes.ALL)
def test_poison(dtype: str) -> None:
    """Floats become NaN, integers the least there is, booleans false; element by element as the kernel writes it."""
    top, width, rest = poison_pattern(dtype)
    kind = dtypes.to_numpy(dtype)
    assert width == kind.itemsize
    element = np.array([rest] * (width - 1) + [top], np.uint8).view(kind)[0]
    if dtypes.is_float(dtype):
        assert np.isnan(element.astype(np.float32))
    elif dtype == "b1":
        assert not element
    else:
        assert element == np.iinfo(kind).min


@pytest.mark.parametrize("name", NAMES)
def test_results_to_poison(name: str) -> None:
    planned, _, _, tables = made(name)
    for r, v in enumerate(planned.graph.results):
        value = planned.graph.values[v]
        buffer, pattern, low, high = (int(n) for n in tables.words[tables.results + 4 * r :][:4])
        assert buffer == len(planned.graph.inputs) + r
        top, width, rest = poison_pattern(value.dtype)
        assert pattern == top | width << 8 | rest << 16
        assert low | high << 32 == np.prod(value.shape, dtype=int) * dtypes.itemsize(value.dtype)


@pytest.mark.parametrize("steps", [1, 3])
def test_live_rows_of_the_cache_are_asked_for_ahead(steps: int) -> None:
    """Also in a loop, where the position is a value that its tasks write."""
    planned = decoder_plan(dataclasses.replace(Shape(), layers=1), steps)
    reads = [code for code in routine_codes(planned, wanted(planned)) if any(stream.live for stream in code.streams)]
    assert reads
    for code in reads:
        assert sum(bool(stream.live) for stream in code.streams) == 2  # keys and values
