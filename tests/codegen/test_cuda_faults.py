"""What kernels do about a hand-off that never comes, and where the tag sequence wraps: on a CPU, threads as fibers."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
import pytest

from jax_mpk.codegen.cuda.arrays import UNIT
from jax_mpk.codegen.cuda.tables import EVENT_BYTES, HEADER_BYTES, segments, state_layout
from tests.codegen import cuda_emulation
from tests.codegen.cuda.support import library
from tests.codegen.cuda_cases import Case
from tests.codegen.cuda_emulation import Kernel, Record
from tests.codegen.cuda_faults import (
    BARRIER,
    BULK_LOAD,
    CHUNK,
    ELEMENT,
    EVENT,
    FAULTY,
    FIRST_SEQUENCE,
    PREDICATE,
    TAG,
    WORKER,
    Faulty,
    branches_and_loops,
    exact_arguments,
    faulty,
    late,
)
from tests.codegen.test_cuda_compiles import plan_of
from tests.codegen.test_cuda_emulation import check_case
from tests.references import quick_jit

pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.skipif(cuda_emulation.COMPILER is None, reason="needs a C++ compiler"),
]
#: Of one wait, in the machine's seconds; a wait that is answered takes less than a tenth of it here.
DEADLINE = 1.0
#: A device whose plans rather wait for others than compute twice.
SLOW = {"handoff": 1e-9, "bandwidth": 1e10, "cache_bandwidth": 1e10}
ON, OFF = np.int32(1), np.int32(0)
NO_TASK = 2**32 - 1


def is_poisoned(result: np.ndarray[Any, Any]) -> bool:
    if result.dtype.kind in "iu":
        return bool((result == np.iinfo(result.dtype).min).all())
    return bool(np.isnan(result.astype(np.float64)).all())


@pytest.mark.parametrize("case", FAULTY, ids=lambda case: case.name)
def test_lost(case: Faulty) -> None:
    args = Case(case.name, case.fn, case.shapes).arguments()
    plan, inputs = plan_of(case.fn, [*args, OFF], workers=3, **SLOW)
    kernel = Kernel(plan, faulty(plan, case.text, case.instead, cuda_emulation.device_folder()))
    expected = Case(case.name, case.fn, [], rough=True)

    def right(seed: int) -> None:
        results, record = kernel.launch(inputs, seed=seed)
        assert record is None
        check_case(expected, results, [*args, OFF])

    right(0)
    results, record = kernel.launch([*inputs[:-1], ON], seed=1, deadline=DEADLINE)
    assert record is not None and all(map(is_poisoned, results))
    check_record(case, kernel, record)
    # What was launched before anybody looked gives up at once, and reports nothing.
    results, again = kernel.launch(inputs, seed=2)
    assert again is None and all(map(is_poisoned, results))
    kernel.reset()
    right(3)


def check_record(case: Faulty, kernel: Kernel, record: Record) -> None:
    assert record.kind == case.kind
    tasks = len(kernel.plan.tasks.table)
    if case.kind == BARRIER or case.name == "last predicate":
        assert record.task == NO_TASK
    else:
        assert record.task < tasks
    if case.kind == EVENT:
        waits = kernel.plan.tasks.wait_event[slice(*kernel.plan.tasks.wait_start[record.task : record.task + 2])]
        assert record.what in waits
        assert record.expected // 2 <= record.seen < record.expected  # of two launches, in one of which one is lost
    elif case.kind == TAG:
        assert record.what in dict(kernel.program.values)
        assert (record.expected, record.seen, record.element) == (2, 1, ELEMENT)
    elif case.kind == BULK_LOAD:
        # Or one that is not asked for before the lost one has landed.
        assert record.worker == WORKER and record.what >= CHUNK
        assert record.seen == record.expected - 1
    elif case.kind == PREDICATE:
        assert record.worker == WORKER and record.what in (1, 4)
        assert (record.expected, record.seen) == (record.what + 1, record.what)
    else:
        assert case.kind == BARRIER and record.what == 2
        assert record.seen == record.expected - 1


def _wrapping(size: int = 64) -> tuple[Any, list[Any]]:
    x, w = exact_arguments(size)
    plan, inputs = plan_of(branches_and_loops, [x, w, OFF, OFF, OFF], workers=3, **SLOW)
    assert sum(storage.tagged for storage in plan.storages) >= 4
    return plan, inputs


def runs() -> list[tuple[int, int]]:
    """Arms and trips of launches: every arm, loops without a trip among others."""
    return [(k % 3, (0, 3, 0, 1)[k % 4]) for k in range(10)]


def _check(kernel: Kernel, inputs: list[Any], seed: int, arm: int, trips: int) -> None:
    args = [*inputs[:2], np.int32(arm), np.int32(trips), OFF]
    results, record = kernel.launch(args, seed=seed)
    assert record is None
    for have, want in zip(results, quick_jit(branches_and_loops)(*args), strict=True):
        np.testing.assert_array_equal(have, np.asarray(want))


def test_tags_wrap() -> None:
    """Through the wrap, an abort before it, and through it again from zeroed memory."""
    plan, inputs = _wrapping()
    lost = next(case for case in FAULTY if case.kind == TAG)
    kernel = Kernel(plan, late(faulty(plan, lost.text, lost.instead, cuda_emulation.device_folder())))
    for seed, (arm, trips) in enumerate(runs()):
        _check(kernel, inputs, seed, arm, trips)
    results, record = kernel.launch([*inputs[:2], OFF, OFF, ON], deadline=DEADLINE)
    assert record is not None and record.kind == TAG and record.element == ELEMENT
    # Ten runs of the first segment began at 65,530: the tags were 65531 … 65535, 1 … 5.
    assert (record.expected, record.seen) == (6, 5)
    assert all(map(is_poisoned, results))
    kernel.reset()
    for seed, (arm, trips) in enumerate(runs()):
        _check(kernel, inputs, seed, arm, trips)


def test_sequences_beyond_32_bits() -> None:
    """As after 2³² runs of each segment: counters start anew, and no two tags in a row are the same."""
    plan, inputs = _wrapping()
    kernel = Kernel(plan)
    count = len(segments(plan.schedule))
    layout = state_layout(plan, count)
    before = 2**32 - 3
    kernel.state[HEADER_BYTES:][: 8 * count].view(np.uint64)[:] = before
    signalled = np.bincount(plan.tasks.signal_event, minlength=plan.events).astype(np.uint64)
    counters = kernel.state[layout.events :][: EVENT_BYTES * plan.events].view(np.uint32)
    counters.reshape(-1, EVENT_BYTES // 4)[:, 0] = (signalled * np.uint64(before)) & np.uint64(2**32 - 1)
    stale = 1 + (before - 1) % 65535
    for place, _ in kernel.program.values:
        (storage,) = (s for s, at in enumerate(layout.tagged) if at == place * UNIT)
        words = kernel.state[place * UNIT :][: 2 * plan.storages[storage].nbytes].view(np.uint64)
        words[:] = stale  # f32 0.0, and the tag of the run before
    for seed, (arm, trips) in enumerate(runs()):
        _check(kernel, inputs, seed, arm, trips)
    assert kernel.state[HEADER_BYTES:][:8].view(np.uint64)[0] == before + len(runs())


@pytest.mark.parametrize("first", [0, FIRST_SEQUENCE, 2**32 - 2, 2**48 - 3, 2**64 - 65540])
def test_tag_of_a_sequence(first: int, tmp_path: Any) -> None:
    """What the device computes without a division of 64 bits."""
    text = (
        "#include <cstdint>\n#define __device__\n#define __forceinline__ inline\nusing u64 = unsigned long long;\n"
        + _function("tag_of")
        + 'extern "C" uint32_t tag(uint64_t n) { return tag_of(n); }\n'
    )
    made = library(text, tmp_path)
    made.tag.argtypes = [ctypes.c_uint64]
    tags = [made.tag(first + k) for k in range(20)]
    assert tags == [1 + (first + k) % 65535 for k in range(20)]


def _function(name: str) -> str:
    text = (cuda_emulation.device_folder() / "handoff.cuh").read_text()
    found = re.search(rf"^__device__ .* {name}\(.*?^}}\n", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[0]
