"""Windows: contiguous parts of one axis, at a position known at run time.

A *window update* overwrites such a part of its base (one step's rows of a KV cache). A *windowed factor* of a
contraction reads the base everywhere but in the window and the new rows there, so the contraction waits for the rows
and not for the cache:

    select(start <= i and i < start + length, load_if(…, new rows), load(base))

A *bounded* factor is 0 where a predicate does not hold, and is read only where it does:

    load_if(r < bound, base)
"""

from __future__ import annotations

from dataclasses import dataclass

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Graph, Nest, Update
from jax_mpk.graph.scalar import Expr, Node


@dataclass(frozen=True)
class WindowUpdate:
    """What a window update overwrites.

    Attributes:
      axis: the axis of the base the window lies on; all other axes are covered whole.
      start: position in ``Update.index.nodes`` of the window's first index; the same for every update coordinate.
      length: extent of the window.
    """

    axis: int
    start: int
    length: int


@dataclass(frozen=True)
class Factor:
    """One factor of a contraction.

    Attributes:
      load: position of the load (of the base, if windowed) in the body.
      new: position of the load of the new rows, or -1.
      axis: axis of the base the window lies on, or -1.
      start: position of the node that gives the window's first index, or -1; it does not depend on what moves along
        the axis.
      length: extent of the window, or 0.
      bound: position of the predicate outside which the factor is 0, or -1.
    """

    load: int
    new: int = -1
    axis: int = -1
    start: int = -1
    length: int = 0
    bound: int = -1


def window_update(graph: Graph, op: Update) -> WindowUpdate | None:
    """How an Update overwrites one window, or None where it does something else."""
    expr = op.index
    shape = graph.values[op.base].shape
    inside = expr.result(len(shape))
    if op.combine.kind != "set" or inside.op != "const" or not inside.attr:
        return None
    found: WindowUpdate | None = None
    used: set[int] = set()
    for axis, size in enumerate(shape):
        coord, start = _coord_and_rest(expr, expr.results[axis])
        if coord is not None:
            if coord in used:
                return None
            used.add(coord)
        length = 1 if coord is None else expr.extents[coord]
        if length == size and (start is None or size == 1):
            continue
        if found is not None or start is None:
            return None
        found = WindowUpdate(axis, start, length)
    covered = all(extent == 1 or c in used for c, extent in enumerate(expr.extents))
    return found if covered else None


def factor(expr: Expr, result: int) -> Factor | None:
    """One result of a contraction's body as a factor: an affine load, maybe windowed, bounded and converted."""
    node = expr.nodes[result]
    while node.op == "convert":
        result = node.args[0]
        node = expr.nodes[result]
    if node.op in ("load", "load_if"):
        bound, indices = _bounded(node)
        good = is_affine(expr, indices) and (bound < 0 or limit(expr, bound) is not None)
        return Factor(result, bound=bound) if good else None
    if node.op != "select":
        return None
    pred, new, base = node.args
    both, fresh, old = (expr.nodes[i] for i in (pred, new, base))
    if both.op != "and" or fresh.op != "load_if" or old.op not in ("load", "load_if"):
        return None
    bound, indices = _bounded(old)
    if bound >= 0 and limit(expr, bound) is None:
        return None
    inside = expr.nodes[fresh.args[0]]
    if fresh.args[0] != pred if bound < 0 else (inside.op != "and" or set(inside.args) != {bound, pred}):
        return None
    low, high = (expr.nodes[i] for i in both.args)
    if low.op != "ge" or high.op != "lt" or low.args[0] != high.args[0]:
        return None
    where, start = low.args
    if where not in indices or not is_affine(expr, indices):
        return None
    axis = indices.index(where)
    if _coords(expr, where) & _coords(expr, start) or not is_affine(
        expr, tuple(a for k, a in enumerate(fresh.args[1:]) if k != axis)
    ):
        return None
    length = _distance(expr, start, high.args[1])
    return None if length is None else Factor(base, new, axis, start, length, bound)


def limit(expr: Expr, pred: int) -> tuple[int, int] | None:
    """(coordinate, node) of a predicate ``coordinate < node`` where the node does not depend on the coordinate."""
    node = expr.nodes[pred]
    if node.op != "lt" or expr.nodes[node.args[0]].op != "coord":
        return None
    coord = expr.nodes[node.args[0]]
    return None if coord in expr.only(node.args[1]).nodes else (coord.attr, node.args[1])


def _bounded(load: Node) -> tuple[int, tuple[int, ...]]:
    """Predicate, or -1, and indices of a load."""
    return (load.args[0], load.args[1:]) if load.op == "load_if" else (-1, load.args)


def is_affine(expr: Expr, args: tuple[int, ...]) -> bool:
    """Whether index nodes are linear in the coordinates; a coefficient is a constant, or known at run time."""

    def affine(i: int) -> bool:
        node = expr.nodes[i]
        if node.op in ("coord", "const"):
            return True
        if node.op == "add":
            return all(map(affine, node.args))
        if node.op != "mul":
            return False
        this, other = node.args
        return (affine(this) and expr.nodes[other].op == "const") or _is_coord_times_scalar(expr, node)

    return all(map(affine, args))


def _is_coord_times_scalar(expr: Expr, node: Node) -> bool:
    """Whether a product is that of a coordinate and what depends on loads and other coordinates only."""
    for this, other in (node.args, node.args[::-1]):
        coord = expr.nodes[this]
        if coord.op == "coord" and coord not in expr.only(other).nodes:
            return True
    return False


def is_identity(expr: Expr, args: tuple[int, ...], space: tuple[int, ...]) -> bool:
    """Whether an index is just the coordinates in order."""
    return len(args) == len(space) and all(
        extent == 1 or (expr.nodes[arg].op == "coord" and expr.nodes[arg].attr == axis)
        for axis, (arg, extent) in enumerate(zip(args, space, strict=True))
    )


def own_index(op: Nest) -> list[int]:
    """Operands of which a map reads for each element of its result only the one with that element's coordinates."""
    loads = [op.body.nodes[i] for i in op.body.loads()]
    others = {op.operands[n.attr] for n in loads if n.op != "load" or not is_identity(op.body, n.args, op.space)}
    return [v for v in op.operands if v not in others]


def is_uniform(expr: Expr, i: int) -> bool:
    """Whether a node depends on no coordinate."""
    return all(node.op != "coord" for node in expr.only(i).nodes)


def _coords(expr: Expr, i: int) -> set[int]:
    """Coordinates that a node depends on."""
    return {node.attr for node in expr.only(i).nodes if node.op == "coord"}


def _coord_and_rest(expr: Expr, i: int) -> tuple[int | None, int | None]:
    """An index as one coordinate plus a uniform rest; a missing part is None. (None, None): neither form."""
    node = expr.nodes[i]
    if node.op == "coord":
        return node.attr, None
    if is_uniform(expr, i):
        return None, i
    if node.op == "add":
        for this, other in (node.args, node.args[::-1]):
            if expr.nodes[this].op == "coord" and is_uniform(expr, other):
                return expr.nodes[this].attr, other
    return None, None


def _distance(expr: Expr, start: int, end: int) -> int | None:
    """end − start where it is a known constant."""
    node = expr.nodes[end]
    if node.op == "add" and start in node.args:
        rest = expr.nodes[node.args[1] if node.args[0] == start else node.args[0]]
        if rest.op == "const":
            return int(dtypes.from_bits(rest.attr, rest.dtype))
    return None
