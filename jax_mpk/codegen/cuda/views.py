"""Local values that are only reordered: they are stored in the order their reader wants, and nothing is moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_mpk.codegen.cuda.arrays import local_bytes, row_major
from jax_mpk.graph.ir import Nest, Op
from jax_mpk.graph.moves import moved
from jax_mpk.plan.ir import Plan, Routine


@dataclass(frozen=True)
class View:
    """A local value that lies where a map would have put its elements.

    Attributes:
      target: the map's output.
      strides: of the value, in the target's elements.
    """

    target: int
    strides: tuple[int, ...]


def take_views(plan: Plan, routine: Routine, ops: list[Op | None], boxes: np.ndarray) -> dict[int, View]:
    """Takes maps that only reorder a whole local value out of ``ops``; how these values lie instead, by value.

    Args:
      plan: the plan.
      routine: one of its routines.
      ops: its operators.
      boxes: int64 [members, tasks, 2, rank].
    """
    views: dict[int, View] = {}
    for m, op in enumerate(ops):
        if not isinstance(op, Nest) or op.kind != "map" or len(op.outputs) != 1 or op.outputs[0] in views:
            continue
        node = op.body.result()
        if node.op != "load":
            continue
        source, target = op.operands[node.attr], op.outputs[0]
        if not _whole(plan, routine, source) or not _whole(plan, routine, target) or source in views:
            continue
        maker = next((k for k in range(m) if (made := ops[k]) is not None and source in made.outputs), None)
        readers = [k for k, other in enumerate(ops) if other is not None and source in other.operands]
        if maker is None or readers != [m] or not isinstance(ops[maker], Nest) or not _full(plan, boxes[m], target):
            continue
        strides = _strides(op, plan.graph.values[source].shape)
        if strides is not None and _free(plan, routine, ops[maker : m + 1], source, target):
            views[source] = View(target, strides)
            ops[m] = None
    return views


def _whole(plan: Plan, routine: Routine, v: int) -> bool:
    """Whether all of a value is in scratch."""
    if v not in routine.local_values:
        return False
    return routine.local_extents[routine.local_values.index(v)] == plan.graph.values[v].shape


def _full(plan: Plan, box: np.ndarray, v: int) -> bool:
    shape = plan.graph.values[v].shape
    return bool((box[:, 0, : len(shape)] == 0).all() and (box[:, 1, : len(shape)] == shape).all())


def _strides(op: Nest, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides with which the source's elements lie in the order of the map's; None if there are none."""
    place = moved(op, shape)
    if place is None:
        return None
    strides = tuple(int(place[step]) if extent > 1 else 0 for step, extent in zip(row_major(shape), shape, strict=True))
    found = sum(np.indices(shape)[d].ravel() * s for d, s in enumerate(strides))
    return strides if np.array_equal(found, place) else None


def _free(plan: Plan, routine: Routine, ops: Sequence[Op | None], source: int, target: int) -> bool:
    """Whether nobody else uses the target's bytes; ``ops``: from the source's maker to the map."""
    spans = local_bytes(plan, routine)
    low, high = spans[target]
    used = {v for op in ops if op is not None for v in (*op.operands, *op.outputs)}
    return all(spans[v][1] <= low or spans[v][0] >= high for v in used & spans.keys() - {source, target})
