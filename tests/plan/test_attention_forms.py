"""Attention is recognised however it is written: as few phases for every spelling, and the results of jax.jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.rewrite import use_counts
from jax_mpk.plan import targets
from jax_mpk.plan.attention import find_attention
from jax_mpk.plan.ir import Plan, Target
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.report import plan_stats
from jax_mpk.plan.simulate import Simulator
from jax_mpk.plan.verify import verify_plan
from tests.plan.attention_forms import FORMS, Attend, Sizes
from tests.plan.graphs import placed
from tests.references import quick_jit

#: Queries, keys and values; attention of chunks of keys; its merge, which is too much for every task of the next one;
#: output projection.
PHASES = 4


def plan_of(sizes: Sizes, form: str, target: Target) -> Plan:
    captured = capture(jax.make_jaxpr(sizes.block(FORMS[form]))(*sizes.avals()))
    assert not captured.consts
    return make_plan(fuse(build_graph(captured.jaxpr, donated=frozenset({5, 6}))), target)


@pytest.mark.parametrize(("form", "batch"), [(form, (1, 4)[i % 2]) for i, form in enumerate(FORMS)])
def test_phases(form: str, batch: int) -> None:
    sizes = Sizes(batch=batch, width=2048, kv_heads=8, group=4, head_dim=64, cache=1024, dtype=jnp.bfloat16)
    captured = capture(jax.make_jaxpr(sizes.block(FORMS[form]))(*sizes.avals()))
    graph = placed(build_graph(captured.jaxpr, donated=frozenset({5, 6})))
    stats = plan_stats(make_plan(fuse(graph), targets.H100))
    assert stats.phases == PHASES
    # Scores stay where they are computed, keys and values are never copied.
    assert stats.workspace_bytes < 2 << 20
    attention = [r for r in stats.routines if r.streamed_bytes >= 2 * batch * 1024 * 8 * 64 * 2 and "max" in r.text]
    assert attention, [r.text for r in stats.routines]
    assert all(r.busy >= 0.95 and r.imbalance <= 0.05 for r in attention)


@pytest.mark.parametrize(("form", "batch"), [(form, (4, 1)[i % 2]) for i, form in enumerate(FORMS)])
def test_results(form: str, batch: int) -> None:
    sizes = Sizes(batch=batch)
    check(plan_of(sizes, form, targets.cpu(32)), sizes.block(FORMS[form]), sizes)


def check(plan: Plan, block: Callable[..., Any], sizes: Sizes) -> None:
    """Proves a plan and compares what it computes with jax.jit."""
    verify_plan(plan)
    rng = np.random.default_rng(0)
    *arrays, _ = (rng.standard_normal(a.shape).astype(a.dtype) for a in sizes.avals())
    args = [*arrays, np.int32(77)]
    expected = quick_jit(block)(*args)
    for want, got in zip(expected, Simulator(plan, args, seed=sizes.batch).run(), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def _scores(q: jax.Array, k: jax.Array, visible: jax.Array) -> jax.Array:
    return jnp.where(visible, jnp.einsum("bkgd,bskd->bkgs", q, k), -1e9)


def one_more(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """A softmax with one more key, of score 0 and value 0."""
    scores = _scores(q, k, visible)
    top = jnp.maximum(scores.max(-1, keepdims=True), 0.0)
    powers = jnp.exp(scores - top)
    return jnp.einsum("bkgs,bskd->bkgd", powers / (powers.sum(-1, keepdims=True) + jnp.exp(-top)), v)


def top_of_others(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    scores = _scores(q, k, visible)
    powers = jnp.exp(scores - (2 * scores).max(-1, keepdims=True) / 2 - 1)
    return jnp.einsum("bkgs,bskd->bkgd", powers / (powers**2).sum(-1, keepdims=True), v)


def over_heads(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(_scores(q, k, visible), axis=2), v)


def not_divided(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    scores = _scores(q, k, visible)
    return jnp.einsum("bkgs,bskd->bkgd", jnp.exp(scores - scores.max(-1, keepdims=True)), v)


@pytest.mark.parametrize("attend", [one_more, top_of_others, over_heads, not_divided])
def test_what_only_looks_like_attention(attend: Attend) -> None:
    sizes = Sizes()
    captured = capture(jax.make_jaxpr(sizes.block(attend))(*sizes.avals()))
    fused = fuse(build_graph(captured.jaxpr, donated=frozenset({5, 6})))
    makers = {v: op for op in fused.block.ops for v in op.outputs}
    found = [find_attention(op, makers, use_counts(fused.block)) for op in fused.block.ops]
    assert all(isinstance(reason, str) for reason in found)
    assert len([reason for reason in found if reason]) == 1
    plan = make_plan(fused, targets.cpu(32))
    check(plan, sizes.block(attend), sizes)
