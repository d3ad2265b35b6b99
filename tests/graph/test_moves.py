"""Maps that only move elements, and reductions that put their results where such a map would."""

from dataclasses import replace
from math import prod

import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk.graph.fuse_maps import fuse_views
from jax_mpk.graph.ir import Block, Nest
from jax_mpk.graph.moves import made_in_place, moved
from jax_mpk.graph.reference import evaluate
from jax_mpk.graph.verify import verify_graph
from tests.graph.harness import graph_of

SHAPE = (2, 3, 4)
MOVES = {
    "transpose": lambda y: y.transpose(2, 0, 1),
    "merge": lambda y: y.reshape(6, 4),
    "transpose and merge": lambda y: y.transpose(0, 2, 1).reshape(1, 24),
    "split": lambda y: y.reshape(2, 3, 2, 2),
    "reverse": lambda y: y[:, ::-1],
}
OTHERS = {
    "slice": lambda y: y[:, 1:],
    "broadcast": lambda y: jnp.broadcast_to(y[:1], (5, 3, 4)),
    "repeat": lambda y: jnp.concatenate([y[:1], y[:1]]),
    "negative": lambda y: -y,
    "type": lambda y: y.astype(jnp.bfloat16),
}


def _reduced_and(move) -> tuple:
    """The graph of a sum over the last axis, divided elementwise, and a move behind; the sum and the move."""
    graph, _ = graph_of(lambda x, d: move(jnp.sum(x, -1) / d), np.ones((*SHAPE, 5), np.float32), np.ones(SHAPE, "f"))
    graph = fuse_views(graph)
    *_, division, view = graph.block.ops
    return graph, division, view


@pytest.mark.parametrize("name", MOVES)
def test_made_in_place(name: str) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((*SHAPE, 5)).astype("f"), rng.standard_normal(SHAPE).astype("f")]
    graph, division, view = _reduced_and(MOVES[name])
    want = evaluate(graph, inputs)[0]
    place = moved(view, SHAPE)
    assert place is not None and sorted(place) == list(range(prod(SHAPE)))

    once = made_in_place(division, view)
    assert once.space == want.shape and once.outputs == view.outputs
    (total,) = (op for op in graph.block.ops if isinstance(op, Nest) and op.kind == "reduce")
    placed = replace(graph, block=Block((total, once), graph.block.results))
    verify_graph(placed)
    np.testing.assert_array_equal(evaluate(placed, inputs)[0], want)

    # A reduction moves its own results, its epilogue's operands included.
    alone = fuse_views(graph_of(lambda x: MOVES[name](jnp.sum(x, -1)), inputs[0])[0])
    total, view = alone.block.ops
    assert isinstance(total, Nest) and isinstance(view, Nest)
    placed = replace(alone, block=Block((made_in_place(total, view),), alone.block.results))
    verify_graph(placed)
    np.testing.assert_array_equal(evaluate(placed, inputs[:1])[0], evaluate(alone, inputs[:1])[0])


@pytest.mark.parametrize("name", OTHERS)
def test_other_maps_do_more(name: str) -> None:
    _, _, last = _reduced_and(OTHERS[name])
    assert moved(last, SHAPE) is None
