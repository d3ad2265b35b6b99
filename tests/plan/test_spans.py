"""What run-time scalars leave of regions: what plans declare, which waits fall away, and what the verifier asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.capture import capture
from jax_mpk.errors import PlanVerificationError
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Update
from jax_mpk.graph.reference import evaluate
from jax_mpk.plan.ir import MAY, READ, Plan
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.printer import format_accesses, format_plan
from jax_mpk.plan.simulate import Simulator
from jax_mpk.plan.verify import verify_plan
from tests.plan.draft import Draft, take_apart
from tests.plan.handmade import target
from tests.plan.naive import Order

ROWS = 16
CACHE, ROW, AT = np.zeros((ROWS, 64), np.float32), np.zeros(64, np.float32), np.int32(0)


def planned(fn: Callable[..., Any], *args: Any, workers: int = 4) -> Plan:
    """A verified plan; the first argument is donated."""
    captured = capture(jax.make_jaxpr(fn)(*args))
    plan = make_plan(fuse(build_graph(captured.jaxpr, donated=frozenset([0]))), target(workers))
    verify_plan(plan)
    return plan


def touching(plan: Plan) -> tuple[set[int], set[int], str, str]:
    """Tasks that read the cache and that update it, and what the last of each declares."""
    (update,) = (op for op in plan.ops if isinstance(op, Update))
    assert plan.value_storage[update.base] == plan.value_storage[update.output]
    rows, lines = plan.accesses, {}
    found: list[set[int]] = []
    for name, kind, value in (("read", READ, update.base), ("write", MAY, update.output)):
        tasks = rows.task[(rows.value == value) & (rows.kind == kind)].tolist()
        found.append(set(tasks))
        text = format_accesses(plan, tasks[-1]).splitlines()
        lines[name] = next(t for t in text if f"%{value}[" in t and t.startswith(("reads", "may write")))
    return found[0] - found[1], found[1], lines["read"], lines["write"]


def is_ordered(plan: Plan) -> bool:
    """Whether some update waits for some task that reads the cache."""
    readers, writers, *_ = touching(plan)
    order = Order(plan)
    assert readers and writers
    return any(order.before(a, b) for a in readers for b in writers if worker(plan, a) != worker(plan, b))


def worker(plan: Plan, task: int) -> int:
    return int(plan.tasks.table["worker"][task])


def step(mask: Callable[[jax.Array, jax.Array], jax.Array], *, clip: bool = True) -> Callable[..., Any]:
    """Sums the rows of a cache that a mask leaves, and overwrites the row at a position."""

    def fn(cache: jax.Array, row: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = jnp.clip(at, 0, ROWS - 1) if clip else at
        total = jnp.where(mask(jnp.arange(ROWS)[:, None], at), cache, 0).sum(0)
        return lax.dynamic_update_slice(cache, row[None], (at, 0)), total

    return fn


@pytest.mark.parametrize(
    ("mask", "clip", "ordered"),
    [
        (lambda i, at: i < at, True, False),
        (lambda i, at: i > at, True, False),
        (lambda i, at: i != at, True, False),
        (lambda i, at: (i < at) | (i > at + 1), True, False),
        (lambda i, at: ~(i >= at), True, False),
        (lambda i, at: i <= at, True, True),
        (lambda i, at: i >= at, True, True),
        (lambda i, at: i != at + 1, True, True),
        (lambda i, at: i < at + 1, True, True),
        (lambda i, at: (i < at) | (i == at), True, True),
        # The update clamps its position, the mask does not.
        (lambda i, at: i < at, False, True),
        (lambda i, at: i < jnp.clip(at, 0, ROWS - 1), False, True),
    ],
    ids="before after around wider negated with from beside next either unclamped negative".split(),
)
def test_readers_of_other_rows_need_not_be_done(mask: Any, clip: bool, ordered: bool) -> None:
    plan = planned(step(mask, clip=clip), CACHE, ROW, AT)
    assert is_ordered(plan) == ordered
    for at in (0, 1, ROWS - 1, ROWS + 3, -1):
        args = np.arange(CACHE.size, dtype=np.float32).reshape(CACHE.shape), ROW - 1, np.array(at, np.int32)
        for seed in range(3):
            results = Simulator(plan, args, seed=seed).run()
            for got, want in zip(results, evaluate(plan.graph, args), strict=True):
                np.testing.assert_array_equal(got, want)


def test_plans_show_them() -> None:
    plan = planned(step(lambda i, at: i < at), CACHE, ROW, AT)
    _, _, read, write = touching(plan)
    at = "min(15, max(%2, 0))"
    assert read.startswith("reads %0[0:16, ") and read.endswith(f" where i0 < {at}")
    assert write.startswith("may write %") and write.endswith(f" where {at} <= i0 < {at} + 1")
    text = format_plan(plan)
    assert f"reads %0 where i0 < {at}" in text and f"may write %15 where {at} <= i0 < {at} + 1" in text


def test_new_rows_and_the_rows_around_them_never_meet() -> None:
    """A product with an updated cache reads the old one around the window: the update waits for nothing."""

    def fn(cache: jax.Array, row: jax.Array, at: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = lax.dynamic_update_slice(cache, row[None], (at, 0))
        return new, new @ w

    w = np.zeros((64, 256), np.float32)
    plan = planned(fn, CACHE, ROW, AT, w)
    assert not is_ordered(plan)
    _, _, read, write = touching(plan)
    assert f"not {write.partition(' where ')[2]}" == read.partition(" where ")[2]


def test_a_loop_overwrites_behind_what_it_reads() -> None:
    def fn(cache: jax.Array, row: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            cache, total = carry
            below = jnp.where(jnp.arange(ROWS)[:, None] < i, cache, 0).sum(0)
            new = cache.at[i].set(row, mode="promise_in_bounds", wrap_negative_indices=False)
            return new, total + below

        return lax.fori_loop(0, at, body, (cache, row))

    plan = planned(fn, CACHE, ROW, np.int32(4))
    _, _, read, write = touching(plan)
    counter = read.partition("i0 < ")[2]
    assert write.endswith(f" where {counter} <= i0 < {counter} + 1")
    assert not is_ordered(plan)


def test_a_position_computed_twice_from_floats_is_no_symbol() -> None:
    """It is a number of its own wherever it is computed."""

    def fn(cache: jax.Array, row: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = jnp.clip(x, 0, ROWS - 1).astype(jnp.int32)
        return step(lambda i, at: i < at)(cache, row, at)

    plan = planned(fn, CACHE, ROW, np.float32(0))
    _, _, read, write = touching(plan)
    assert " where " not in read + write
    assert is_ordered(plan)


def test_where_to_load_from_is_used_before_it_is_dropped() -> None:
    """Rows named by the cache are looked up for all of it, so that all of it must be what it was."""

    def fn(cache: jax.Array, table: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = jnp.clip(at, 0, ROWS - 1)
        i = jnp.arange(ROWS)
        found = jnp.where((i < at)[:, None], table.at[cache].get(mode="promise_in_bounds"), 0).sum(0)
        return cache.at[at].set(at, mode="promise_in_bounds", wrap_negative_indices=False), found

    plan = planned(fn, np.zeros(ROWS, np.int32), CACHE, AT)
    _, _, read, write = touching(plan)
    assert " where " in write and " where " not in read
    assert is_ordered(plan)


def without(plan: Plan, change: Callable[[Draft], object]) -> Plan:
    draft = take_apart(plan)
    change(draft)
    return draft.build()


def test_nobody_may_rely_on_what_is_not_proved() -> None:
    """The wait that `i <= at` needs goes, whatever the plan says about its regions."""
    plan = planned(step(lambda i, at: i <= at), CACHE, ROW, AT)
    other = planned(step(lambda i, at: i < at), CACHE, ROW, AT)
    readers, writers, *_ = touching(plan)

    def forget(d: Draft) -> None:
        for t in writers:
            d.tasks[t].waits.clear()

    with pytest.raises(PlanVerificationError, match=r"race in segment 0[^$]* where i0 < min\(15, max\(%2, 0\)\) \+ 1 "):
        verify_plan(without(plan, forget))

    def claim(d: Draft) -> None:
        forget(d)
        known = [a[3] for t in take_apart(other).tasks for a in t.accesses if a[1] == READ and a[3]]
        for t in readers:
            for access in d.tasks[t].accesses:
                if access[3]:
                    access[3] = known[0]

    with pytest.raises(PlanVerificationError, match="not what its operators touch"):
        verify_plan(without(plan, claim))


def test_the_whole_box_is_not_what_is_touched() -> None:
    plan = planned(step(lambda i, at: i < at), CACHE, ROW, AT)
    rows = replace(plan.accesses, within=np.full_like(plan.accesses.within, -1))
    with pytest.raises(PlanVerificationError, match=r"not declared: read .* where i0 < min\(15, max\(%2, 0\)\) of"):
        verify_plan(replace(plan, accesses=rows))
    with pytest.raises(PlanVerificationError, match="spans of an access"):
        verify_plan(replace(plan, accesses=replace(rows, within=rows.within + 99)))
