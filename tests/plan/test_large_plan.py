"""The plan of a large decode step for a GPU that is not there: proved correct, few phases, every SM busy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import pytest

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.report import PlanStats, plan_stats
from jax_mpk.plan.verify import verify_plan
from tests.plan.large_step import Shape

pytestmark = pytest.mark.slow

SHAPE = Shape()


@functools.cache
def plan(shape: Shape = SHAPE) -> Plan:
    avals = shape.avals()
    captured = capture(jax.make_jaxpr(shape.step())(*avals))
    assert not captured.consts
    params, cache = (len(jax.tree.leaves(a)) for a in avals[:2])
    graph = build_graph(captured.jaxpr, donated=frozenset(range(params, params + cache)))
    return make_plan(fuse(graph), targets.H100)


@functools.cache
def stats(shape: Shape = SHAPE) -> PlanStats:
    return plan_stats(plan(shape))


def test_verified() -> None:
    verify_plan(plan())


def test_cache_is_updated_in_place() -> None:
    assert stats().aliased == 2 * SHAPE.layers
    # Neither a copy of the cache nor anything else of its size passes through memory.
    assert stats().written_bytes < 1 << 20
    assert stats().workspace_bytes < 4 << 20


def test_every_weight_is_read_once() -> None:
    params, cache, *_ = SHAPE.avals()
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    # Of the embedding only one row.
    expected -= (SHAPE.vocab - 1) * SHAPE.width * 2
    assert stats().weight_bytes == pytest.approx(expected, rel=1e-4)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert stats().cache_bytes == pytest.approx(held, rel=1e-3)


def test_dependent_phases() -> None:
    assert stats().phases <= 5 * SHAPE.layers + 3


def test_dependent_phases_with_a_time_axis() -> None:
    shape = dataclasses.replace(SHAPE, layers=3, time_axis=True)
    assert stats(shape).phases <= 5 * shape.layers + 3


def test_every_sm_is_busy_in_every_large_contraction() -> None:
    # Per layer: Q, K and V; attention; output; gate and up; down. Then the head.
    assert len(stats().large_contractions) >= 5 * SHAPE.layers + 1
    for routine in stats().large_contractions:
        assert routine.busy >= 0.95, routine
        assert routine.imbalance <= 0.05, routine


def test_predicted_time_is_near_the_bandwidth() -> None:
    assert stats().predicted_s <= 1.1 * stats().roofline_s
