"""Attention reads the keys that its mask leaves, and no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Graph
from jax_mpk.graph.rewrite import use_counts
from jax_mpk.plan import targets
from jax_mpk.plan.attention import Attention, find_attention
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.simulate import Simulator
from jax_mpk.plan.verify import verify_plan
from tests.plan.attention_forms import FORMS, Sizes
from tests.references import quick_jit

#: They add -1e9, next to which a score may count.
NOT_EXACT = {"library_with_bias", "mask_added"}
TARGET = replace(targets.cpu(32), live_keys=True)
SIZES = Sizes(batch=2)


def graph_of(function: Callable[..., Any], avals: Any, donated: frozenset[int] = frozenset()) -> Graph:
    captured = capture(jax.make_jaxpr(function)(*avals))
    assert not captured.consts
    return fuse(build_graph(captured.jaxpr, donated=donated))


def attention_of(graph: Graph) -> Attention:
    makers = {v: op for op in graph.block.ops for v in op.outputs}
    uses = use_counts(graph.block)
    (found,) = (found for op in graph.block.ops if not isinstance(found := find_attention(op, makers, uses), str))
    return found


def plan_of(function: Callable[..., Any], avals: Any, donated: frozenset[int] = frozenset()) -> Plan:
    plan = make_plan(graph_of(function, avals, donated), TARGET)
    verify_plan(plan)
    return plan


def split_at_run_time(plan: Plan) -> bool:
    """Whether any operator multiplies the number of its chunk with something that is no constant."""
    exprs = [op.body for op in plan.ops if hasattr(op, "body") and hasattr(op.body, "nodes")]
    return any(
        node.op == "mul" and node.dtype == "s64" and all(e.nodes[a].op != "const" for a in node.args)
        for e in exprs
        for node in e.nodes
    )


@pytest.mark.parametrize("form", FORMS)
def test_masks(form: str) -> None:
    found = attention_of(graph_of(SIZES.block(FORMS[form]), SIZES.avals(), frozenset({5, 6})))
    assert (found.live is None) == (form in NOT_EXACT)


@pytest.mark.parametrize("form", [f for f in FORMS if f not in NOT_EXACT])
def test_dead_keys_are_not_read(form: str) -> None:
    """Behind the position lie NaNs: a weight of 0 would not hide one."""
    block = SIZES.block(FORMS[form])
    plan = plan_of(block, SIZES.avals(), frozenset({5, 6}))
    assert split_at_run_time(plan)
    rng = np.random.default_rng(0)
    *arrays, keys, values, _ = (rng.standard_normal(a.shape).astype(a.dtype) for a in SIZES.avals())
    for position in (0, 1, 77, SIZES.cache - 1):
        dead = [a.copy() for a in (keys, values)]
        for a in dead:
            a[:, position:] = np.nan
        (got, *_) = Simulator(plan, [*arrays, *dead, np.int32(position)], seed=position).run()
        (want, *_) = quick_jit(block)(*arrays, keys, values, np.int32(position))
        np.testing.assert_allclose(got, want, rtol=3e-5, atol=3e-5)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, mask: float = float(jnp.finfo(jnp.float32).min)
) -> jax.Array:
    """Queries [batch, t, heads, d]; visible: bool, broadcast against [batch, heads, t, keys]."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    weights = jax.nn.softmax(jnp.where(visible, scores, mask), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def lengths(q: jax.Array, k: jax.Array, v: jax.Array, n: jax.Array) -> jax.Array:
    return attend(q, k, v, (jnp.arange(k.shape[1]) < n[:, None])[:, None, None])


def causal(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> jax.Array:
    positions = first + jnp.arange(q.shape[1])
    return attend(q, k, v, jnp.arange(k.shape[1]) <= positions[:, None])


def in_a_window(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> jax.Array:
    at, positions = jnp.arange(k.shape[1]), (first + jnp.arange(q.shape[1]))[:, None]
    return attend(q, k, v, (at > positions - 40) & ~(at > positions), -jnp.inf)


def arrays(queries: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = (2, queries, 2, 16), (2, 192, 2, 16), (2, 192, 2, 16)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("counts", [(1, 192), (100, 3), (64, 65), (500, 191)])
def test_every_sequence_has_its_length(counts: tuple[int, int]) -> None:
    q, k, v = arrays(1)
    n = np.array(counts, np.int32)
    plan = plan_of(lengths, (q, k, v, n))
    assert split_at_run_time(plan)
    want = np.asarray(quick_jit(lengths)(q.copy(), k.copy(), v.copy(), n))
    for row, count in enumerate(counts):
        k[row, count:] = v[row, count:] = np.nan
    np.testing.assert_allclose(Simulator(plan, [q, k, v, n], seed=0).run()[0], want, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("count", [0, -7])
def test_without_a_live_key_all_count(count: int) -> None:
    args = [*arrays(1), np.array([count, 5], np.int32)]
    got = Simulator(plan_of(lengths, args), args, seed=0).run()[0]
    np.testing.assert_allclose(got, quick_jit(lengths)(*args), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("form", [causal, in_a_window])
@pytest.mark.parametrize("first", [0, 50, 189, 190])
def test_several_queries(form: Callable[..., Any], first: int) -> None:
    """The last one sees most."""
    q, k, v = arrays(3)
    at = np.int32(first)
    plan = plan_of(form, (q, k, v, at))
    assert split_at_run_time(plan)
    want = np.asarray(quick_jit(form)(q.copy(), k.copy(), v.copy(), at))
    k[:, first + 3 :] = v[:, first + 3 :] = np.nan
    np.testing.assert_allclose(Simulator(plan, [q, k, v, at], seed=0).run()[0], want, rtol=3e-5, atol=3e-5)


def padded(q: jax.Array, k: jax.Array, v: jax.Array, n: jax.Array) -> jax.Array:
    """Besides its end, a sequence has a beginning: where they leave nothing, a finite mask makes all keys equal."""
    at = jnp.arange(k.shape[1])
    return attend(q, k, v, ((at < n[0]) & (at >= n[1]))[None, None])


def test_finite_masks_of_two_conditions_are_left_alone() -> None:
    args = [*arrays(1), np.array([9, 9], np.int32)]
    plan = plan_of(padded, args)
    assert not split_at_run_time(plan)
    np.testing.assert_allclose(Simulator(plan, args, seed=0).run()[0], quick_jit(padded)(*args), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("first", [-2, 2**31 - 2])
def test_positions_before_the_first_key_and_around_the_end_of_integers(first: int) -> None:
    args = [*arrays(3), np.int32(first)]
    got = Simulator(plan_of(causal, args), args, seed=0).run()[0]
    np.testing.assert_allclose(got, quick_jit(causal)(*args), rtol=3e-5, atol=3e-5)


def test_a_target_may_prefer_fixed_chunks() -> None:
    plan = make_plan(graph_of(causal, (*arrays(1), np.int32(0))), targets.cpu(32))
    assert not split_at_run_time(plan)
