"""Contractions whose weight lies contiguous along its free axes: [in, out], as JAX lays weights out by default.

A task reads parts of the weight's rows, and short ones lose bandwidth. So rows are cut between granules only; where
that leaves too few tasks, the reduced axis is cut into equal parts, too, which `split_reduce.py` makes operators of.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Graph, Nest, Op, Value
from jax_mpk.graph.scalar import Builder, Expr, inline
from jax_mpk.plan import costs
from jax_mpk.plan.ir import Target

#: Tensor cores take so many positions of the reduced axis at a time, and registers hold sums for so many rows; the same
#: columns are read by so many tasks at most.
_STEP, _MOST_ROWS, _MOST_READERS = 32, 32, 2
#: Smaller weights are not worth more than other operands are, nor are shorter parts of the reduced axis.
_LEAST_BYTES, _LEAST_DEPTH = 64 << 10, 64
#: How much longer a weight takes of whose rows tasks have a single granule (docs/design.md), and that does not stream.
_NARROW, _GENERIC = 1.06, 8.0


@dataclass(frozen=True)
class ColumnWeight:
    """A contraction as columns of a weight.

    Attributes:
      weight, other: the values of the weight and of the other factor.
      free: parallel axes that the weight alone has, in its order; it is contiguous along them. The first one is cut.
      step: coordinates of that one between which it may be cut.
      shared: parallel axes that both factors have: a task takes one coordinate of each.
      rows: parallel axes that the weight does not have, the longest first.
      readers: parts into which the first of these is cut, where a task cannot have all rows.
    """

    weight: int
    other: int
    free: tuple[int, ...]
    step: int
    shared: tuple[int, ...]
    rows: tuple[int, ...]
    readers: int

    @property
    def axis(self) -> int:
        return self.free[0]


def constants(graph: Graph) -> frozenset[int]:
    """Arguments that nothing overwrites."""
    return frozenset(v for i, v in enumerate(graph.inputs) if i not in graph.donated)


def find(values: Sequence[Value], constant: Collection[int], target: Target, op: Op) -> ColumnWeight | None:
    """How a contraction reads such a weight, or None where it has none, or no body streams it.

    Args:
      values: of the graph.
      constant: :func:`constants` of the graph.
      target: the device.
      op: the operator.
    """
    if not target.granule or not isinstance(op, Nest) or op.kind != "contract" or op.acc != ("f32",):
        return None
    reduced = [len(op.space) + d for d, e in enumerate(op.rspace) if e > 1]
    loads = [_load(op.body, r) for r in op.body.results]
    if len(reduced) != 1 or math.prod(op.rspace) % _STEP or min(loads) < 0:
        return None
    first, second = (
        (op.operands[op.body.nodes[i].attr], _indices(op.body, i))  # type: ignore[index]
        for i in loads
    )
    found = [_columns(values, target, op, reduced[0], w, x) for w, x in ((first, second), (second, first))]
    # Where both factors are arguments, the larger one is the weight.
    fits = [c for c in found if c is not None and c.weight in constant]
    return max(fits, key=lambda c: math.prod(values[c.weight].shape), default=None)


_Index = dict[int, int]


def _columns(
    values: Sequence[Value],
    target: Target,
    op: Nest,
    reduced: int,
    weight: tuple[int, list[_Index]],
    other: tuple[int, list[_Index]],
) -> ColumnWeight | None:
    """One factor as the weight. Both are values and, for each of their axes, its index: factors of the coordinates."""
    (w, mine), (x, theirs) = weight, other
    value = values[w]
    if value.dtype not in ("bf16", "f16") or values[x].dtype != value.dtype or not mine or not theirs:
        return None
    if math.prod(value.shape) * dtypes.itemsize(value.dtype) < _LEAST_BYTES:
        return None
    moving = [d for d, e in enumerate(op.space) if e > 1]
    has_w, has_x = ({c for index in some for c in index} for some in (mine, theirs))
    alone = [d for d in moving if d in has_w and d not in has_x]
    # The weight's last indices are whole axes of the result, one by one.
    behind = [index for index, e in zip(mine, value.shape, strict=True) if e > 1][-len(alone) :] if alone else []
    free = tuple(next(iter(index), -1) for index in behind)
    if sorted(free) != alone or any(index != {d: 1} for index, d in zip(behind, free, strict=True)):
        return None
    extents = [op.space[d] for d in free]
    if extents != [e for e in value.shape if e > 1][-len(free) :]:
        return None
    step = target.granule // math.gcd(target.granule, math.prod(extents[1:]))
    rows = sorted((d for d in moving if d not in has_w), key=lambda d: -op.space[d])
    count = math.prod(op.space[d] for d in rows)
    readers = max(-(-count // _MOST_ROWS), 1)
    if extents[0] % step or count > math.prod(extents) or readers > _MOST_READERS:
        return None
    if readers > 1 and op.space[rows[0]] % readers:
        return None
    along = [index[reduced] for index in mine if reduced in index]
    if along != [1] or theirs[-1].get(reduced) != 1:
        return None
    return ColumnWeight(w, x, free, step, tuple(d for d in moving if d in has_w and d in has_x), tuple(rows), readers)


def _load(body: Expr, root: int) -> int:
    """The load that a factor is, or -1."""
    node = body.nodes[root]
    if node.op == "convert" and node.dtype == "f32":
        root = node.args[0]
    return root if body.nodes[root].op == "load" else -1


def _indices(body: Expr, load: int) -> list[_Index]:
    """Factors of the coordinates in each index of a load; [] where it is not made of coordinates alone."""
    b = Builder(body.extents)
    out = []
    for i in inline(b, Expr(body.nodes, body.nodes[load].args, body.extents), b.coords(), b.load):
        terms, shift = b.linear(i)
        if shift or any(b.nodes[atom].op != "coord" for atom in terms):
            return []
        out.append({int(b.nodes[atom].attr): factor for atom, factor in terms.items()})  # type: ignore[call-overload]
    return out


def slowdown(found: ColumnWeight, op: Nest, target: Target, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """float64 [tasks]: how many times as long the weight takes as its bytes do, given the tasks' boxes."""
    extents = hi - lo
    behind = found.free[1:]
    streams = (lo[:, found.axis] % found.step == 0) & (extents[:, found.axis] % found.step == 0)
    streams &= np.all(extents[:, found.shared] <= 1, axis=1) & (extents[:, found.rows].prod(axis=1) <= _MOST_ROWS)
    streams &= np.all(extents[:, behind] == [op.space[d] for d in behind], axis=1)
    width = np.maximum(extents[:, found.free].prod(axis=1), 1)
    granules = -(-width // target.granule)
    return np.where(streams, 1.0, _GENERIC) * np.where(granules == 1, _NARROW, 1.0) * granules * target.granule / width


def parts(values: Sequence[Value], target: Target, group: Sequence[tuple[Nest, ColumnWeight]]) -> int:
    """Into how many parts the reduced axis of contractions is cut that have the other factor in common."""
    depth = math.prod(group[0][0].rspace)
    readers = max(found.readers for _, found in group)
    most = max(min(target.workers // readers, depth // _LEAST_DEPTH), 1)
    choices = [p for p in range(1, most + 1) if depth % (p * _STEP) == 0]
    return min(choices, key=lambda p: (_seconds(values, target, group, p), p))


def _seconds(values: Sequence[Value], target: Target, group: Sequence[tuple[Nest, ColumnWeight]], count: int) -> float:
    """Predicted time of the busiest worker, and of joining the parts."""
    (any_op, any_found), readers = group[0], max(found.readers for _, found in group)
    pieces = [op.space[found.axis] // found.step for op, found in group]
    tiles = min([*pieces, max(target.workers // (count * readers), 1)])
    item = dtypes.itemsize(values[any_found.weight].dtype)
    depth = math.prod(any_op.rspace) // count
    rows = math.prod(any_op.space[d] for d in any_found.rows) // readers
    read, columns, total = 0.0, 0, 0
    for some, (op, found) in zip(pieces, group, strict=True):
        whole = math.prod(op.space[d] for d in found.free)
        mine = -(-some // tiles) * (whole // some)
        columns, total = columns + mine, total + whole
        read += mine * depth * item * (_NARROW if mine == target.granule else 1.0)
    staged = costs.staged_bytes(target, rows * depth * item, item, True)
    seconds = float(costs.task_seconds(target, read, read / readers, 2.0 * rows * columns * depth, staged))
    if count > 1:
        joined = rows * 8 * (columns + count * readers * total / target.workers)  # words with tags
        seconds += 2 * costs.handoff_seconds(target) + float(costs.task_seconds(target, joined, 0.0, 0.0))
    return seconds
