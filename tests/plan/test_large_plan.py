"""The plan of a large decode step for a GPU that is not there: proved correct, few phases, every SM busy.

Two spellings of the same step: plain einsums, and the project's own decoder. Of the latter also the plan with the
fewest phases, five a layer, which the planner makes where hand-offs are dear.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import pytest
from flax import nnx

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Combine, Nest
from jax_mpk.graph.moves import moved
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan, Target
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.report import PlanStats, plan_stats
from jax_mpk.plan.verify import verify_plan
from models.decoder import Decoder, DecoderConfig, init_cache
from models.generate import sampling_steps
from models.sampling import Sampling
from tests.plan.graphs import placed
from tests.plan.large_step import Shape

SHAPE = Shape()
#: Parts of attention are merged by their readers at this price, not in a phase of their own.
DEAR = dataclasses.replace(targets.H100, handoff=2e-6)


@functools.cache
def plan(shape: Shape = SHAPE, *, by_default: bool = False) -> Plan:
    """The plan of the einsums, with placed weights or with weights in the default layout."""
    avals = shape.avals()
    captured = capture(jax.make_jaxpr(shape.step())(*avals))
    assert not captured.consts
    params, cache = (len(jax.tree.leaves(a)) for a in avals[:2])
    graph = build_graph(captured.jaxpr, donated=frozenset(range(params, params + cache)))
    return make_plan(fuse(graph if by_default else placed(graph)), targets.H100)


@functools.cache
def decoder_plan(shape: Shape = SHAPE, steps: int = 1, target: Target = targets.H100) -> Plan:
    """The plan of a decode step, or of a loop of several."""
    config = DecoderConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        qk_norm=True,
        tie_embeddings=False,
        dtype=jax.numpy.bfloat16,
        param_dtype=jax.numpy.bfloat16,
    )
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    cache = jax.eval_shape(lambda: init_cache(config, 1, shape.cache))
    _, following = sampling_steps(graphdef, Sampling())

    def loop(params, cache, token, pos, seed):
        return jax.lax.fori_loop(0, steps, lambda _, s: following(params, s[1], s[0], s[2], seed), (token, cache, pos))

    step = following if steps == 1 else loop
    scalars = (jax.ShapeDtypeStruct(s, d) for s, d in (((1,), "int32"), ((), "int32"), ((), "uint32")))
    captured = capture(jax.make_jaxpr(step)(params, cache, *scalars))
    first = len(captured.consts) + len(jax.tree.leaves(params))
    donated = frozenset(range(first, first + len(jax.tree.leaves(cache))))
    return make_plan(fuse(placed(build_graph(captured.jaxpr, donated=donated))), target)


def test_merged_attention_is_moved_by_nobody() -> None:
    """The query heads of a group lie together there, and beside the elements of a head where they are read."""
    made = decoder_plan(dataclasses.replace(SHAPE, layers=1))
    shapes = [value.shape for value in made.graph.values]
    assert any(isinstance(op, Nest) and op.combine == Combine("sum") and op.space == (1, 1, 4096) for op in made.ops)
    for op in made.ops:
        if isinstance(op, Nest) and op.kind == "map" and len(op.operands) == 1:
            assert moved(op, shapes[op.operands[0]]) is None


@functools.cache
def stats(shape: Shape = SHAPE) -> PlanStats:
    return plan_stats(plan(shape))


@functools.cache
def decoder_stats() -> PlanStats:
    return plan_stats(decoder_plan())


def fewest_phases() -> Plan:
    return decoder_plan(target=DEAR)


@functools.cache
def fewest_phases_stats() -> PlanStats:
    """At the H100's prices."""
    return plan_stats(dataclasses.replace(fewest_phases(), target=targets.H100))


STEPS = pytest.mark.parametrize("step", [stats, decoder_stats, fewest_phases_stats])


@pytest.mark.parametrize("step", [plan, decoder_plan, fewest_phases])
def test_verified(step: Callable[[], Plan]) -> None:
    verify_plan(step())


def test_cache_is_updated_in_place() -> None:
    assert stats().aliased == 2 * SHAPE.layers
    # Neither a copy of the cache nor anything else of its size passes through memory.
    assert stats().written_bytes < 1 << 20
    assert stats().workspace_bytes < 8 << 20


def test_every_weight_is_read_once() -> None:
    params, cache, *_ = SHAPE.avals()
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    # Of the embedding only one row.
    expected -= (SHAPE.vocab - 1) * SHAPE.width * 2
    assert stats().weight_bytes == pytest.approx(expected, rel=1e-4)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert stats().cache_bytes == pytest.approx(held, rel=1e-3)


def test_dependent_phases() -> None:
    # Q, K and V; attention; output; gate and up; down.
    assert fewest_phases_stats().phases <= 5 * SHAPE.layers + 3


@pytest.mark.parametrize("step", [stats, decoder_stats])
def test_another_phase_pays(step: Callable[[], PlanStats]) -> None:
    """Attention's merge is a phase of its own, since the step takes less time for it."""
    assert step().phases <= 6 * SHAPE.layers + 3
    assert step().predicted_s <= fewest_phases_stats().predicted_s


def test_dependent_phases_with_a_time_axis() -> None:
    shape = dataclasses.replace(SHAPE, layers=3, time_axis=True)
    assert stats(shape).phases <= 6 * shape.layers + 3


def test_dependent_phases_in_the_default_layout() -> None:
    """Sums in parts are joined in phases of their own behind the output projection and behind down."""
    shape = dataclasses.replace(SHAPE, layers=3)
    made = plan(shape, by_default=True)
    verify_plan(made)
    found = plan_stats(made)
    assert found.phases <= 8 * shape.layers + 4
    assert len(found.large_contractions) >= 5 * shape.layers + 1
    assert all(r.busy >= 0.95 and r.imbalance <= 0.15 for r in found.large_contractions)


def test_query_heads_that_share_keys_share_tasks() -> None:
    held = 2 * 2 * SHAPE.cache * SHAPE.kv_heads * SHAPE.head_dim
    attention = [r for r in stats().routines if "max over" in r.text and "contract 8 " in r.text]
    assert len(attention) == SHAPE.layers
    assert all(r.streamed_bytes <= 2.1 * held for r in attention)


@STEPS
def test_every_sm_is_busy_in_every_large_contraction(step: Callable[[], PlanStats]) -> None:
    # Per layer: Q, K and V; attention; output; gate and up; down. Then the head.
    assert len(step().large_contractions) >= 5 * SHAPE.layers + 1
    for routine in step().large_contractions:
        assert routine.busy >= 0.95, routine
        assert routine.imbalance <= 0.05, routine


@STEPS
def test_predicted_time_is_near_the_bandwidth(step: Callable[[], PlanStats]) -> None:
    assert step().predicted_s <= 1.1 * step().roofline_s
