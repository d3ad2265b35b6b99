"""Which axes the lanes of a reduction run along."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax_mpk.codegen.vm import Compiler, Layout
from jax_mpk.graph.ir import Nest

#: Estimated nanoseconds: one instruction whatever its lanes, one lane of it, one lane of a gather, one output of a
#: reduction along lanes.
_INSTRUCTION, _LANE, _GATHER, _OUTPUT = 8.0, 0.08, 1.0, 40.0
#: Lanes of one register, about.
_LANES = 512
#: Shorter rows are crossed by lanes, whose loads then gather.
_SHORT = 16


def parallel_lanes(op: Nest, extents: Sequence[int], operands: Sequence[Layout]) -> int:
    """First parallel axis that lanes run along (through the last one), or -1: lanes run along the reduced axes.

    Args:
      op: the reduction.
      extents: box of a typical task, parallel axes first.
      operands: layouts of what it reads.
    """
    rank = len(op.space)
    parallel, reduced = extents[:rank], extents[rank:]
    outputs, depth = math.prod(parallel), math.prod(reduced)
    if outputs <= 1:
        return -1
    first = rank
    width = 1
    while first > 0 and width < _SHORT * 4:
        first -= 1
        width *= parallel[first]
    inner = _innermost(extents, range(first, rank))
    reduced_inner = _innermost(extents, range(rank, len(extents)))
    lowered = Compiler(range(len(extents)), operands).lower(op.body, ())
    contiguous = [0, 0]
    strided = [0, 0]
    for i in op.body.loads():
        node = op.body.nodes[i]
        _, strides, atoms = lowered.offset(node.attr, node.args[1:] if node.op == "load_if" else node.args)
        for k, axis in enumerate((reduced_inner, inner)):
            plain = not atoms and strides.get(axis, 0) in (0, 1)
            (contiguous if plain else strided)[k] += 1
    count = max(len(op.body.nodes) - sum(len(op.body.nodes[i].args) for i in op.body.loads()), 2)

    def lanes(k: int, row: int) -> float:
        gathers = strided[k] if row >= _SHORT else strided[k] + contiguous[k]
        return count * _LANE + gathers * _GATHER

    along = extents[reduced_inner] if reduced_inner >= 0 else 1
    rows = outputs * (_OUTPUT + depth / min(_LANES, max(along, 1)) * count * _INSTRUCTION + depth * lanes(0, along))
    across = extents[inner] if inner >= 0 else 1
    steps = outputs / min(_LANES, width) * depth
    columns = steps * count * _INSTRUCTION + outputs * depth * lanes(1, across)
    return first if columns < rows else -1


def _innermost(extents: Sequence[int], axes: range) -> int:
    """Last axis of the given ones that has more than one position, or -1."""
    for axis in reversed(axes):
        if extents[axis] > 1:
            return axis
    return -1
