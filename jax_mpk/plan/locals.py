"""Where the local values of a routine's tasks lie in scratch memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Graph, Nest, Op, reads
from jax_mpk.graph.windows import own_index

_ALIGN = 64
#: Values smaller than this are not worth sharing bytes: whoever writes over bytes waits for all that read them.
_SMALL = 16 << 10

#: Lowest and highest coordinates of what each task computes of an operator, int64 [tasks, rank] each.
Boxes = tuple[np.ndarray, np.ndarray]


def lay_out(
    graph: Graph, ops: Sequence[Op], boxes: Sequence[Boxes], local: AbstractSet[int]
) -> tuple[dict[int, tuple[int, tuple[int, ...]]], int]:
    """Lays local values out in a row, but what a map makes of a large one that nobody reads later in its place.

    Args:
      graph: the prepared graph.
      ops: the members of a routine.
      boxes: by member.
      local: values that are local.

    Returns:
      Offset and largest extents by local value, and the number of bytes.
    """
    homes: dict[int, tuple[int, tuple[int, ...]]] = {}
    made: dict[int, Boxes] = {}
    end = 0
    for at, (op, box) in enumerate(zip(ops, boxes, strict=True)):
        extents = tuple(map(int, (box[1] - box[0]).max(axis=0, initial=0)))
        for v in op.outputs:
            if v not in local:
                continue
            nbytes = math.prod(extents) * dtypes.itemsize(graph.values[v].dtype)
            source = _rewritten(graph, ops[at:], box, made) if nbytes >= _SMALL else None
            if source is not None:
                homes[v] = homes[source][0], extents
            else:
                homes[v] = end, extents
                end += -(-nbytes // _ALIGN) * _ALIGN
            made[v] = box
    return homes, end


def _rewritten(graph: Graph, ops: Sequence[Op], box: Boxes, made: Mapping[int, Boxes]) -> int | None:
    """A local value in whose place the first of the operators can put its only result, element by element."""
    op = ops[0]
    if not isinstance(op, Nest) or op.kind != "map" or len(op.outputs) != 1:
        return None
    item = dtypes.itemsize(graph.values[op.outputs[0]].dtype)
    for v in own_index(op):
        if (
            v in made
            and graph.values[v].shape == op.space
            and dtypes.itemsize(graph.values[v].dtype) == item
            and all(np.array_equal(a, b) for a, b in zip(made[v], box, strict=True))
            and all(v not in reads(later) for later in ops[1:])
        ):
            return v
    return None
