"""Events and memory of the planner's plans: no more waits, signals, events and bytes than what they are for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.simulate import phase_count
from jax_mpk.plan.verify import verify_plan
from tests.plan.campaign import refusal
from tests.plan.draft import take_apart
from tests.plan.test_planner import CASES, plan_of


def chain(steps: int, workers: int, size: int = 256) -> Plan:
    """Products, each of which needs all of the one before."""

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(steps):
            x = jnp.tanh(x.T @ w)
        return x

    square = jax.ShapeDtypeStruct((size, size), jnp.float32)
    return make_plan(fuse(build_graph(capture(jax.make_jaxpr(f)(square, square)).jaxpr)), targets.cpu(workers))


@pytest.mark.parametrize("workers", [2, 8])
def test_tasks_that_need_the_same_share_an_event(workers: int) -> None:
    plan = chain(9, workers)
    phases = phase_count(plan).total
    assert phases > 2 and len(plan.tasks.table) > phases * (workers - 1)
    # One event a hand-off, signalled once by every worker and waited for once by every worker.
    assert plan.events == phases - 1
    for events in (plan.tasks.signal_event, plan.tasks.wait_event):
        assert np.bincount(events, minlength=plan.events).tolist() == [workers] * plan.events


@pytest.mark.parametrize(("workers", "tagged"), [(3, False), (8, False), (3, True)])
@pytest.mark.parametrize("name", CASES)
def test_every_wait_and_signal_is_needed(name: str, workers: int, tagged: bool) -> None:
    draft = take_apart(plan_of(name, workers, tagged)[0])
    signallers: dict[int, list[int]] = {}
    for task in draft.tasks:
        for event in task.signals:
            signallers.setdefault(event, []).append(task.worker)
    assert signallers.keys() == {event for task in draft.tasks for event in task.waits}
    # The last of several tasks of one worker speaks for the others.
    assert all(len(set(workers)) == len(workers) for workers in signallers.values())
    for task in draft.tasks:
        for event in list(task.waits):
            task.waits.remove(event)
            assert refusal(draft.build()) is not None, f"task {draft.tasks.index(task)} need not wait for {event}"
            task.waits.append(event)


@pytest.mark.parametrize("workers", [2, 64])
def test_memory_does_not_grow_with_depth(workers: int) -> None:
    """What is dead gives its bytes to what comes after it."""
    short, long = chain(8, workers), chain(24, workers)
    assert phase_count(long).total > 2 * phase_count(short).total
    assert 0 < short.workspace_bytes == long.workspace_bytes <= 2 * 4 * 256**2
    verify_plan(long)
