"""Short routines that nobody waits for come last, and nothing else moves."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mpk.codegen.cuda.tables import segments
from jax_mpk.graph.ir import Nest, Update
from jax_mpk.graph.scalar import Expr
from jax_mpk.plan.cluster import Routine
from jax_mpk.plan.defer import deferred
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.tile import Cut
from jax_mpk.plan.verify import verify_plan
from tests.plan.large_step import Shape
from tests.plan.test_large_plan import decoder_plan, plan

#: Values 0 to 5 live in three storages.
SHARE = (0, 1, 2, 0, 1, 2)
LONGEST = 1.0


def routine(loads: tuple[int, ...], stores: tuple[int, ...], seconds: float, local: tuple[int, ...] = ()) -> Routine:
    op = Nest("map", (), (), loads, stores, Expr((), (), ()))
    return Routine((op,), local, Cut((), (), (), seconds, 0))


def ordered(routines: list[Routine]) -> list[Routine]:
    stay, move = deferred(routines, SHARE, lambda r: r.cut.seconds <= LONGEST)
    return stay + move


def conflict(a: Routine, b: Routine) -> bool:
    (x,), (y,) = a.ops, b.ops
    loads = [{SHARE[v] for v in op.operands} for op in (x, y)]
    stores = [{SHARE[v] for v in op.outputs} for op in (x, y)]
    return bool(stores[0] & stores[1] or stores[0] & loads[1] or loads[0] & stores[1])


values = st.lists(st.integers(0, 5), max_size=2).map(tuple)
programs = st.lists(st.builds(routine, values, values, st.sampled_from([0.5, 1.0, 1.5])), max_size=8)


@given(programs)
@settings(deadline=None)
def test_order(routines: list[Routine]) -> None:
    got = ordered(routines)
    position = {id(r): n for n, r in enumerate(got)}
    assert len(got) == len(routines) == len(position)
    assert {id(r) for r in routines} == set(position)
    for a, b in itertools.combinations(routines, 2):
        before = position[id(a)] < position[id(b)]
        if conflict(a, b) or a.cut.seconds > LONGEST:
            # What does not move stays before all that came behind it.
            assert before
        if not before:
            assert a.cut.seconds <= LONGEST
    # All that could move has: behind a short routine without conflicts stands nothing long.
    for n, r in enumerate(got):
        behind = [other for other in got[n + 1 :] if other.cut.seconds > LONGEST]
        if r.cut.seconds <= LONGEST and behind:
            assert any(conflict(r, other) for other in got[n + 1 :])
    assert ordered(got) == got


def test_a_write_to_a_cache() -> None:
    make, write = routine((0,), (1,), 2.0), routine((1,), (2,), 0.5)
    attend, project = routine((1,), (0,), 2.0), routine((0,), (4,), 2.0)
    assert ordered([make, write, attend]) == [make, attend, write]
    # The last one overwrites what is written to the cache.
    assert ordered([make, write, attend, project]) == [make, write, attend, project]


def test_local_values_are_nobody_elses() -> None:
    first, second = routine((0,), (1,), 0.5, local=(1,)), routine((4,), (2,), 2.0)
    assert ordered([first, second]) == [second, first]


SMALL = dataclasses.replace(Shape(), layers=2)


@pytest.mark.parametrize("step", [plan, decoder_plan, functools.partial(decoder_plan, steps=3)])
def test_writes_to_the_cache_stand_behind_all_contractions(step: Callable[[Shape], Plan]) -> None:
    made = step(SMALL)
    verify_plan(made)
    last = [made.ops[r.members[-1].op] for r in made.routines]
    write = np.array([isinstance(op, Update) for op in last])
    contract = np.array([isinstance(op, Nest) and op.kind == "contract" for op in last])
    assert write.sum() == 2 * SMALL.layers
    routine_of = made.tasks.table["routine"]
    (segment,) = (s for s in segments(made.schedule) if any(write[routine_of[queue]].any() for queue in s.queues))
    found = 0
    for queue in segment.queues:
        routines = routine_of[queue]
        writes = np.flatnonzero(write[routines])
        found += len(writes)
        assert not len(writes) or not contract[routines[writes[0] :]].any()
    assert found >= 2 * SMALL.layers
