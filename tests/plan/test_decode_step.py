"""A decode step planned for a GPU with all its workers, replayed task by task, against jax.jit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.report import plan_stats
from jax_mpk.plan.simulate import Simulator
from jax_mpk.plan.verify import verify_plan
from models.decoder import Decoder, DecoderConfig, init_cache, step_functions
from tests.references import quick_jit

#: Small, but wide enough for more tasks than a CPU has workers and for keys split over workers.
CONFIG = DecoderConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    tie_embeddings=False,
)
CACHE = 256


@functools.cache
def step() -> tuple[Callable[..., Any], Any, tuple[Any, ...], Plan]:
    """(params, cache, token, pos) to (token, logits, cache); its parameters, at random; constants; plan for an H100."""
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    decode_step = step_functions(graphdef).decode_step

    def run(params: Any, cache: Any, token: jax.Array, pos: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        logits, cache = decode_step(params, cache, token, pos)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits, cache

    cache = jax.eval_shape(lambda: init_cache(CONFIG, 1, CACHE))
    captured = capture(jax.make_jaxpr(run)(params, cache, np.zeros(1, np.int32), np.int32(0)))
    first = len(captured.consts) + len(jax.tree.leaves(params))
    count = len(jax.tree.leaves(cache))
    graph = build_graph(captured.jaxpr, donated=frozenset(range(first, first + count)))
    rng = np.random.default_rng(0)
    # Fresh norms are all ones, which would hide mistakes.
    params = jax.tree.map(lambda a: np.asarray(a + 0.1 * rng.standard_normal(a.shape), a.dtype), params)
    return run, params, captured.consts, make_plan(fuse(graph), targets.H100)


def test_plan_uses_what_a_gpu_has() -> None:
    *_, plan = step()
    verify_plan(plan)
    stats = plan_stats(plan)
    assert stats.workers == 132 and stats.tasks > 132
    assert stats.phases <= 5 * CONFIG.num_layers + 3
    assert stats.aliased == 2 * CONFIG.num_layers
    assert any(storage.tagged for storage in plan.storages)


@pytest.mark.parametrize("position", [0, 100, CACHE - 1])
def test_replay_gives_what_jit_gives(position: int) -> None:
    run, params, consts, plan = step()
    rng = np.random.default_rng(position)
    cache = jax.tree.map(
        lambda a: rng.standard_normal(a.shape).astype(a.dtype), jax.eval_shape(lambda: init_cache(CONFIG, 1, CACHE))
    )
    args = params, cache, np.array([position % CONFIG.vocab_size], np.int32), np.int32(position)
    want = jax.tree.leaves(quick_jit(run)(*args))
    simulator = Simulator(plan, [*consts, *jax.tree.leaves(args)], seed=position, poison=position, late=True)
    token, logits, *written = simulator.run()
    np.testing.assert_array_equal(token, want[0])
    np.testing.assert_allclose(logits, want[1], rtol=3e-5, atol=3e-5)
    for got, expected, old in zip(written, want[2:], jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(got, expected, rtol=3e-5, atol=3e-5)
        # Old rows are the same bits.
        kept = np.arange(CACHE) != position
        np.testing.assert_array_equal(got[:, kept], old[:, kept])
    assert simulator.inputs_intact()
