"""Which elements an operator reads and writes for a box of its index space.

A region is a box over a value's axes. Index nodes are evaluated in interval arithmetic for many boxes at once: an
index that is affine in the coordinates gives the exact bounds, a run-time scalar gives what its clamps leave, and
anything unknown the whole axis. Regions are therefore never too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Cumulative, Graph, Nest, Op, Sort, Update
from jax_mpk.graph.scalar import Expr, Node

#: float64 [boxes], or one number for all of them: inclusive low and high; ±inf where unknown.
Bounds = tuple[np.ndarray | np.float64, np.ndarray | np.float64]

_UNKNOWN: Bounds = np.float64(-np.inf), np.float64(np.inf)


@dataclass(frozen=True)
class Touch:
    """One operand's region for every box asked about.

    Attributes:
      value: value id.
      lo, hi: int64 [boxes, rank]: the region; empty (hi <= lo on some axis) where nothing is touched.
      most: float64 [boxes]: no more elements than this are touched, wherever in the region they lie.
    """

    value: int
    lo: np.ndarray
    hi: np.ndarray
    most: np.ndarray


def expr_touches(
    expr: Expr, lo: np.ndarray, hi: np.ndarray, shapes: tuple[tuple[int, ...], ...]
) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Regions of every load of a program.

    Args:
      expr: the program.
      lo, hi: int64 [boxes, coordinates]: corners (high exclusive) of the coordinate boxes.
      shapes: shape of each operand slot.

    Returns:
      (slot, lo, hi, most) per load, in node order; ``most`` as in :class:`Touch`.
    """
    bounds = intervals(expr, lo, hi)
    empty = np.any(hi <= lo, axis=1)
    sizes = np.maximum(hi - lo, 0).astype(np.float64)
    out = []
    for i in expr.loads():
        node = expr.nodes[i]
        slot: int = node.attr  # type: ignore[assignment]
        indices, off = (node.args[1:], bounds[node.args[0]][1] == 0) if node.op == "load_if" else (node.args, False)
        shape = shapes[slot]
        low = np.empty((len(lo), len(shape)))
        high = np.empty_like(low)
        for axis, arg in enumerate(indices):
            low[:, axis], high[:, axis] = bounds[arg]
        nothing = empty | off
        if nothing.any():
            low[nothing], high[nothing] = 0, -1
        low, high = _clipped(low, shape), _clipped(high + 1, shape)
        # Each choice of the coordinates that an index mentions touches one element.
        used = sorted(frozenset().union(*(expr.index_coords[arg] for arg in indices)))
        most = np.minimum(sizes[:, used].prod(axis=1), _volume(low, high))
        out.append((slot, low, high, most))
    return out


def _volume(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """float64 [boxes]: elements of boxes; 0 for empty ones."""
    return np.maximum(hi - lo, 0).astype(np.float64).prod(axis=1)


def _clipped(corner: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.minimum(np.maximum(corner, 0), np.array(shape, np.float64)).astype(np.int64)


def intervals(expr: Expr, lo: np.ndarray, hi: np.ndarray) -> dict[int, Bounds]:
    """Bounds of every integer and b1 node that an index or predicate of a load depends on."""
    return _evaluate(expr, expr.index_nodes, lo, hi)


def result_bounds(expr: Expr, lo: np.ndarray, hi: np.ndarray) -> list[Bounds]:
    """Bounds of the (integer or b1) results of a program over boxes."""
    needed: set[int] = set(expr.results)
    for i in range(len(expr.nodes) - 1, -1, -1):
        if i in needed:
            needed.update(expr.nodes[i].args)
    found = _evaluate(expr, sorted(needed), lo, hi)
    return [found[r] for r in expr.results]


def _evaluate(expr: Expr, needed: Sequence[int], lo: np.ndarray, hi: np.ndarray) -> dict[int, Bounds]:
    out: dict[int, Bounds] = {}
    with np.errstate(all="ignore"):
        for i in needed:
            node = expr.nodes[i]
            if dtypes.is_float(node.dtype):
                out[i] = _UNKNOWN
                continue
            if node.op == "const":
                value = np.float64(int(dtypes.from_bits(node.attr, node.dtype)))  # type: ignore[arg-type]
                out[i] = value, value
                continue
            if node.op == "coord":
                axis: int = node.attr  # type: ignore[assignment]
                out[i] = (lo[:, axis].astype(np.float64), hi[:, axis].astype(np.float64) - 1)
                continue
            low, high = _node_bounds(node, [out[a] for a in node.args if a in out])
            least, most = map(float, dtypes.int_range(node.dtype))
            tame = (low >= least) & (high <= most)  # not wrapped around, unknown or NaN
            out[i] = (low, high) if tame.all() else (np.where(tame, low, least), np.where(tame, high, most))
    return out


def _node_bounds(node: Node, args: list[Bounds]) -> Bounds:
    op = node.op
    if op in ("add", "sub", "mul", "max", "min") and len(args) == 2:
        (a0, a1), (b0, b1) = args
        if op == "add":
            return a0 + b0, a1 + b1
        if op == "sub":
            return a0 - b1, a1 - b0
        if op == "max":
            return np.maximum(a0, b0), np.maximum(a1, b1)
        if op == "min":
            return np.minimum(a0, b0), np.minimum(a1, b1)
        products = a0 * b0, a0 * b1, a1 * b0, a1 * b1
        return reduce(np.minimum, products), reduce(np.maximum, products)
    if op in ("div", "rem"):
        (a0, a1), (b0, b1) = args
        plain = (a0 >= 0) & (b0 > 0)
        if op == "div":
            return np.where(plain, np.floor(a0 / b1), -np.inf), np.where(plain, np.floor(a1 / b0), np.inf)
        # Within one period a remainder is as exact as its argument.
        same = plain & (b0 == b1) & (np.floor(a0 / b1) == np.floor(a1 / b1))
        low = np.where(same, a0 - np.floor(a0 / b1) * b1, np.where(plain, 0, -np.inf))
        high = np.where(same, a1 - np.floor(a1 / b1) * b1, np.where(plain, np.minimum(a1, b1 - 1), np.inf))
        return low, high
    if op == "convert":
        return args[0]
    if op == "select":
        (p0, p1), (a0, a1), (b0, b1) = args
        low = np.where(p0 == 1, a0, np.where(p1 == 0, b0, np.minimum(a0, b0)))
        high = np.where(p0 == 1, a1, np.where(p1 == 0, b1, np.maximum(a1, b1)))
        return low, high
    if op in ("lt", "le", "gt", "ge", "eq", "ne"):
        (a0, a1), (b0, b1) = args
        if op in ("gt", "ge"):
            (a0, a1), (b0, b1) = (b0, b1), (a0, a1)
        if op in ("lt", "gt"):
            return (a1 < b0).astype(np.float64), (a0 < b1).astype(np.float64)
        if op in ("le", "ge"):
            return (a1 <= b0).astype(np.float64), (a0 <= b1).astype(np.float64)
        same, apart = (a0 == a1) & (b0 == b1) & (a0 == b0), (a1 < b0) | (b1 < a0)
        if op == "ne":
            same, apart = apart, same
        return same.astype(np.float64), 1.0 - apart
    if op in ("and", "or", "not") and node.dtype == "b1":
        if op == "not":
            return 1 - args[0][1], 1 - args[0][0]
        pick = np.minimum if op == "and" else np.maximum
        return pick(args[0][0], args[1][0]), pick(args[0][1], args[1][1])
    return _UNKNOWN


def op_touches(graph: Graph, op: Op, lo: np.ndarray, hi: np.ndarray, *, stage_finish: bool = False) -> list[Touch]:
    """Values an operator reads to compute boxes of its output.

    Args:
      graph: holds the shapes.
      op: Nest (boxes over ``space``, or over ``space + rspace``), Update, Cumulative or Sort (boxes over the output).
      lo, hi: int64 [boxes, axes].
      stage_finish: only what the epilogue of a split reduction reads.

    Returns:
      One Touch per load; the base of an Update comes last, with the boxes themselves.
    """
    out: list[Touch] = []
    for expr, operands, low, high in program_boxes(op, lo, hi, stage_finish=stage_finish):
        shapes = tuple(graph.values[v].shape for v in operands)
        out += [Touch(operands[slot], *found) for slot, *found in expr_touches(expr, low, high, shapes)]
    if isinstance(op, Update):
        out.append(Touch(op.base, lo, hi, _volume(lo, hi)))
    if isinstance(op, Sort):
        lo, hi = lo.copy(), hi.copy()
        empty = np.any(hi <= lo, axis=1)
        lo[:, op.axis], hi[:, op.axis] = 0, np.where(empty, 0, op.space[op.axis])
        out += [Touch(v, lo, hi, _volume(lo, hi)) for v in op.operands]
    return out


def program_boxes(
    op: Op, lo: np.ndarray, hi: np.ndarray, *, stage_finish: bool = False
) -> list[tuple[Expr, tuple[int, ...], np.ndarray, np.ndarray]]:
    """The programs that compute boxes of an operator's output, their operands, and the boxes each runs over."""
    if isinstance(op, Nest):
        axes = len(op.space)
        out = []
        if not stage_finish:
            full_lo, full_hi = lo, hi
            if lo.shape[1] == axes and op.rspace:
                full_lo = np.concatenate([lo, np.zeros((len(lo), len(op.rspace)), np.int64)], axis=1)
                full_hi = np.concatenate([hi, np.tile(np.array(op.rspace, np.int64), (len(lo), 1))], axis=1)
            out.append((op.body, op.operands, full_lo, full_hi))
        if op.epilogue is not None and (stage_finish or lo.shape[1] == axes):
            out.append((op.epilogue, op.operands, lo[:, :axes], hi[:, :axes]))
        return out
    if isinstance(op, Update):
        ulo, uhi = update_boxes(op, lo, hi)
        return [(op.index, op.operands, ulo, uhi), (op.value, op.operands, ulo, uhi)]
    if isinstance(op, Cumulative):
        return [(op.body, op.operands, lo, hi), (op.epilogue, op.operands, lo, hi)]
    if isinstance(op, Sort):
        return []
    raise TypeError(f"{type(op).__name__} has no element-wise regions: it holds nested blocks")


def update_boxes(op: Update, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of an Update's update space that can fall into boxes of its output.

    An axis whose index is one coordinate plus a constant restricts that coordinate; every other coordinate runs over
    its whole extent.
    """
    ulo = np.zeros((len(lo), len(op.space)), np.int64)
    uhi = np.tile(np.array(op.space, np.int64), (len(lo), 1)).reshape(len(lo), len(op.space))
    for axis, result in enumerate(op.index.results[:-1]):
        found = shifted_coord(op.index, result)
        if found is not None:
            coord, shift = found
            ulo[:, coord] = np.maximum(ulo[:, coord], lo[:, axis] - shift)
            uhi[:, coord] = np.minimum(uhi[:, coord], hi[:, axis] - shift)
    return ulo, np.maximum(uhi, ulo)


def update_written(op: Update, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of each output box an Update in place may write."""
    ulo, uhi = update_boxes(op, lo, hi)
    nothing = np.any(uhi <= ulo, axis=1) if op.space else np.zeros(len(lo), bool)
    bounds = result_bounds(op.index, ulo, uhi)
    lo, hi = lo.copy(), hi.copy()
    for axis, (a, b) in enumerate(bounds[:-1]):
        lo[:, axis] = np.maximum(lo[:, axis], np.clip(a, 0, 2**62).astype(np.int64))
        hi[:, axis] = np.minimum(hi[:, axis], np.clip(b + 1, 0, 2**62).astype(np.int64))
    hi[nothing] = lo[nothing]
    return lo, np.maximum(hi, lo)


def shifted_coord(expr: Expr, result: int) -> tuple[int, int] | None:
    """(coordinate, constant) where a node is ``coord + constant``; None for anything else."""
    node = expr.nodes[result]
    if node.op == "coord":
        return node.attr, 0  # type: ignore[return-value]
    if node.op == "add":
        a, b = (expr.nodes[i] for i in node.args)
        if a.op == "coord" and b.op == "const":
            return a.attr, int(dtypes.from_bits(b.attr, b.dtype))  # type: ignore[arg-type, return-value]
    return None
