"""What is brought to scratch: never more than tasks read, nothing that anyone could be writing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mpk.codegen.cuda.arrays import row_major
from jax_mpk.codegen.cuda.columns import streamed
from jax_mpk.codegen.cuda.copies import copies
from jax_mpk.codegen.cuda.inline import inline_members
from jax_mpk.codegen.cuda.live import live_members
from jax_mpk.codegen.cuda.staging import Copied, Staging, merged_boxes
from jax_mpk.graph import dtypes
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Nest
from jax_mpk.graph.regions import op_touches
from jax_mpk.plan import targets
from jax_mpk.plan.ir import READ, Plan
from jax_mpk.plan.planner import make_plan
from tests.codegen.cuda.support import boxes_of
from tests.codegen.golden.functions import SAMPLES
from tests.codegen.golden.text import plan
from tests.plan import graphs

Box = tuple[tuple[int, ...], tuple[int, ...]]


def points(boxes: list[Box]) -> set[tuple[int, ...]]:
    return {p for lo, hi in boxes for p in itertools.product(*(range(a, b) for a, b in zip(lo, hi, strict=True)))}


def around(boxes: list[Box]) -> list[Box]:
    """The box around some, which are not empty."""
    lows, highs = zip(*boxes, strict=True)
    return [(tuple(map(min, zip(*lows, strict=True))), tuple(map(max, zip(*highs, strict=True))))]


@st.composite
def tasks_with_boxes(draw: st.DrawFn, most: int) -> tuple[int, list[list[Box]]]:
    """A rank, and for each task the boxes it reads, none of them empty."""
    rank = draw(st.integers(1, 3))
    axis = st.tuples(st.integers(0, 3), st.integers(1, 3)).map(lambda t: (t[0], t[0] + t[1]))
    box = st.lists(axis, min_size=rank, max_size=rank).map(lambda axes: tuple(zip(*axes, strict=True)))
    return rank, draw(st.lists(st.lists(box, max_size=most), min_size=1, max_size=4))


def merge(rank: int, tasks: list[list[Box]]) -> tuple[np.ndarray, np.ndarray] | None:
    task = np.array([3 * t for t, boxes in enumerate(tasks) for _ in boxes], np.int64)
    box = np.array([b for boxes in tasks for b in boxes], np.int64).reshape(-1, 2, rank)
    return merged_boxes(task, box, 3 * np.arange(len(tasks)))


@given(tasks_with_boxes(most=4))
@settings(deadline=None)
def test_merged_boxes_hold_what_is_read_and_no_more(drawn) -> None:
    rank, tasks = drawn
    found = merge(rank, tasks)
    if found is None:
        return
    for boxes, lo, hi in zip(tasks, *found, strict=True):
        assert points(boxes) == points([(tuple(lo.tolist()), tuple(hi.tolist()))])


@given(tasks_with_boxes(most=2))
@settings(deadline=None)
def test_two_boxes_are_merged_whenever_they_make_one(drawn) -> None:
    rank, tasks = drawn
    make_one = all(not boxes or points(boxes) == points(around(boxes)) for boxes in tasks)
    assert (merge(rank, tasks) is not None) == make_one


def test_tasks_that_read_nothing_have_empty_boxes() -> None:
    lo, hi = merge(2, [[], [((1, 2), (3, 4))], []])
    assert (lo == hi).all(axis=1).tolist() == [True, False, True]


PLANS = [*SAMPLES, *graphs.names()]


def sample(name: str) -> Plan:
    return plan(name) if name in SAMPLES else make_plan(fuse(graphs.case(name).graph), targets.H100)


def routines(made: Plan) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for number in range(len(made.routines)):
        yield number, *boxes_of(made, number)


@pytest.mark.parametrize("name", PLANS)
def test_staged_values_are_tagged_and_whole(name: str) -> None:
    made = sample(name)
    staging, rows = Staging(made), made.accesses
    for number, tasks, _ in routines(made):
        for staged in staging.of(number, tasks):
            assert made.storages[made.value_storage[staged.value]].tagged
            rank = len(made.graph.values[staged.value].shape)
            for task, lo, hi in zip(tasks, staged.lo, staged.hi, strict=True):
                mine = (rows.task == task) & (rows.value == staged.value) & (rows.kind == READ)
                read = rows.box[mine][:, :, :rank]
                assert math.prod(hi - lo) <= sum(math.prod(b[1] - b[0]) for b in read)
                assert all((lo <= b[0]).all() and (b[1] <= hi).all() for b in read if (b[1] > b[0]).all())


@pytest.mark.parametrize("name", PLANS)
def test_copied_values_are_constant_while_a_task_runs(name: str) -> None:
    made = sample(name)
    for number, _, boxes in routines(made):
        routine = made.routines[number]
        ops = inline_members(made, routine, boxes)
        live = live_members(made, routine, ops, boxes, frozenset())
        ops = live.ops
        found = copies(made, routine, live, boxes)
        stored = {int(made.value_storage[v]) for op in ops if op is not None for v in op.outputs}
        streams = {
            streamed(made, op, boxes[m]) for m, op in enumerate(ops) if isinstance(op, Nest) and not live.limits[m]
        }
        sizes = 0
        for copied in found:
            storage = int(made.value_storage[copied.value])
            assert storage >= 0 and storage not in stored - {-1}
            assert not made.storages[storage].tagged and copied.value not in streams
            sizes += check_copy(made, copied)
            for m, op in enumerate(ops):
                if op is not None:
                    check_holds(made, op, boxes[m], copied)
        assert sizes <= 72 << 10


def check_copy(made: Plan, copied: Copied) -> int:
    """Every row begins and ends at a multiple of the unit, in memory and in scratch; the bytes that all rows take."""
    value = made.graph.values[copied.value]
    item = dtypes.itemsize(value.dtype)
    assert copied.unit in (4, 8, 16) and copied.unit >= item
    if not value.shape:
        assert copied.unit == item
        return item
    strides = np.array(row_major(value.shape)) * item
    assert np.all(copied.lo >= 0) and np.all(copied.hi <= value.shape)
    for lo, hi in zip(copied.lo, copied.hi, strict=True):
        corners = itertools.product(*(sorted({a, max(a, b - 1)}) for a, b in zip(lo[:-1], hi[:-1], strict=True)))
        for corner in corners:
            assert (np.array([*corner, lo[-1]]) @ strides) % copied.unit == 0
        assert (hi[-1] - lo[-1]) * item % copied.unit == 0
    assert copied.pad * item % copied.unit == 0
    return int((copied.hi - copied.lo).max(axis=0).prod()) * item


def check_holds(made: Plan, op, boxes: np.ndarray, copied: Copied) -> None:
    if not isinstance(op, Nest):
        assert copied.value not in op.operands
        return
    rank = len(op.space)
    for touch in op_touches(made.graph, op, boxes[:, 0, :rank], boxes[:, 1, :rank]):
        if touch.value == copied.value:
            some = np.all(touch.hi > touch.lo, axis=1)
            assert np.all((copied.lo <= touch.lo)[some]) and np.all((touch.hi <= copied.hi)[some])
