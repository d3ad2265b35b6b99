"""Maps that only move all elements of a value to other places."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from jax_mpk.graph.ir import Nest
from jax_mpk.graph.reference import eval_expr
from jax_mpk.graph.rewrite import Slots, rebuild_expr
from jax_mpk.graph.scalar import Builder, inline


def moved(op: Nest, shape: tuple[int, ...]) -> np.ndarray | None:
    """Where a map puts the elements of the only value it reads.

    Args:
      op: the map.
      shape: of the value.

    Returns:
      int64 [elements], by position in row-major order; None where it is no such map.
    """
    node = op.body.result()
    if op.kind != "map" or len(op.outputs) != 1 or node.op != "load" or math.prod(shape) != math.prod(op.space):
        return None
    body = op.body.only(*node.args)
    if body.loads():
        return None
    box = ((0,) * len(op.space), op.space)
    index = [np.broadcast_to(a, op.space).ravel() for a in eval_expr(body, box, lambda slot: np.empty(0))]
    place = np.full(math.prod(shape), -1)
    place[np.ravel_multi_index(index, shape) if shape else [0]] = np.arange(len(place))
    return None if (place < 0).any() else place


def made_in_place(op: Nest, view: Nest) -> Nest:
    """A map or reduction that puts its results where a map that only moves them would.

    Args:
      op: it has one output.
      view: the map, see :func:`moved`; nobody else reads the output.
    """

    def coords(b: Builder) -> list[int]:
        at: list[int] = []

        def load(slot: int, indices: list[int], dtype: str, pred: int | None) -> int:
            at.extend(indices)
            return b.const(0, dtype)

        inline(b, view.body, b.coords()[: len(view.space)], load)
        return [*at, *b.coords()[len(view.space) :]]

    slots = Slots()
    body = rebuild_expr(
        op.body, op.operands, slots, lambda *_: None, extents=view.space + op.rspace, coords=coords
    )  # fmt: skip
    after = op.epilogue
    if after is not None:
        after = rebuild_expr(after, op.operands, slots, lambda *_: None, extents=view.space, coords=coords)
    return replace(op, space=view.space, operands=tuple(slots.values), outputs=view.outputs, body=body, epilogue=after)
