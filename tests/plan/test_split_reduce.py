"""Reductions with few results are split over the workers: the same results, in any order of execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mpk
from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Nest
from jax_mpk.graph.verify import verify_graph
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan, Target
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.report import plan_stats
from jax_mpk.plan.simulate import Simulator
from jax_mpk.plan.verify import verify_plan
from tests.references import quick_jit

N = 1 << 17
RNG = np.random.default_rng(7)
FLOATS = RNG.standard_normal(N).astype(np.float32)
LEVELS = RNG.integers(0, 50, N).astype(np.float32)  # many equal maxima
HOLES = np.where(RNG.random(N) < 1e-4, np.nan, FLOATS).astype(np.float32)
INTS = RNG.integers(-9, 9, N).astype(np.int32)


def affine_maps(x: jax.Array) -> jax.Array:
    """Composition of x → a·x + b: associative, not commutative."""
    a = jnp.where(x > 0, 1.0, -1.0)
    return lax.reduce(
        (a, x),
        (np.float32(1), np.float32(0)),
        lambda f, g: (f[0] * g[0], f[1] * g[0] + g[1]),
        (0,),
    )[1]


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "argmax": (lambda x: jnp.argmax(x), (FLOATS,)),
    "argmax_of_ties": (lambda x: jnp.argmax(x), (LEVELS,)),
    "argmax_of_nans": (lambda x: jnp.argmax(x), (HOLES,)),
    "argmin_of_rows": (lambda x: jnp.argmin(x.reshape(2, -1), axis=-1).astype(jnp.float32) * 2, (LEVELS,)),
    "argmax_of_columns": (lambda x: jnp.argmax(x.reshape(-1, 2), axis=0), (LEVELS,)),
    "sum": (lambda x: jnp.sum(x) + 1, (INTS,)),
    "mean_of_squares": (lambda x: jnp.sqrt(jnp.mean(x * x)), (FLOATS,)),
    "sum_over_two_axes": (lambda x: x.reshape(16, 2, -1).sum((0, 2)), (INTS,)),
    "max_and_min": (lambda x: (jnp.max(x), jnp.min(x)), (FLOATS,)),
    "any_all": (lambda x: (jnp.any(x > 3), jnp.all(x > -5)), (FLOATS,)),
    "dot": (lambda x, y: x @ y, (FLOATS, FLOATS[::-1])),
    "few_columns": (lambda x, y: x.reshape(1, -1) @ y.reshape(-1, 2) + 1, (FLOATS[: N // 2], FLOATS)),
    "affine_maps": (affine_maps, (FLOATS,)),
    "log_sum_exp": (lambda x: jax.nn.logsumexp(x), (FLOATS,)),
}


def plan_of(name: str, target: Target) -> Plan:
    f, args = CASES[name]
    captured = capture(jax.make_jaxpr(f)(*args))
    assert not captured.consts
    return make_plan(fuse(build_graph(captured.jaxpr)), target)


def widest(plan: Plan) -> int:
    """Most tasks of any routine that reduces."""
    counts = np.bincount(plan.tasks.table["routine"])
    reducing = (
        r for r, routine in enumerate(plan.routines)
        if any(isinstance(op := plan.ops[m.op], Nest) and op.kind != "map" for m in routine.members)
    )  # fmt: skip
    return max(int(counts[r]) for r in reducing)


@pytest.mark.parametrize("name", CASES)
def test_results(name: str) -> None:
    f, args = CASES[name]
    plan = plan_of(name, targets.cpu(8))
    verify_graph(plan.graph)
    verify_plan(plan)
    assert widest(plan) == 8
    want = jax.tree.leaves(quick_jit(f)(*args))
    runs = [Simulator(plan, list(args), seed=seed, poison=seed).run() for seed in range(2)]
    for first, second, expected in zip(*runs, want, strict=True):
        np.testing.assert_array_equal(first, second)
        if np.issubdtype(expected.dtype, np.floating):
            np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-2)
        else:
            np.testing.assert_array_equal(first, expected)


@pytest.mark.parametrize("name", CASES)
def test_results_of_the_executor(name: str) -> None:
    f, args = CASES[name]
    got = jax.tree.leaves(jax.jit(jax_mpk.megakernelize(f))(*args))
    for have, expected in zip(got, jax.tree.leaves(quick_jit(f)(*args)), strict=True):
        np.testing.assert_allclose(have, expected, rtol=1e-4, atol=1e-2)


def test_a_vocabulary_is_searched_by_every_sm() -> None:
    def greedy(x: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.argmax(jnp.dot(x, table, preferred_element_type=jnp.float32), axis=-1)

    avals = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 151_936), jnp.bfloat16)
    graph = fuse(build_graph(capture(jax.make_jaxpr(greedy)(*avals)).jaxpr))
    stats = plan_stats(make_plan(graph, targets.H100))
    assert stats.phases <= 3
    assert sum(r.seconds for r in stats.routines if "argmax" in r.text and not r.contraction) < 1e-6


def test_small_reductions_stay_whole() -> None:
    def norm(x: jax.Array, w: jax.Array) -> jax.Array:
        return (x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))) @ w.T

    avals = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    graph = fuse(build_graph(capture(jax.make_jaxpr(norm)(*avals)).jaxpr))
    assert plan_stats(make_plan(graph, targets.H100)).phases == 1
