"""Splits axes of contractions whose factors read a group of coordinates alike.

Where every query head of a group reads the same keys, repeated by a view, the factor's index is ``head // group``: no
factor a contraction can stream. Over (group, head in group) in place of the heads it is just a coordinate, and nothing
is repeated in memory. The result is viewed in its old shape by its readers.
"""

from __future__ import annotations

from dataclasses import replace

from jax_mpk.graph import dtypes
from jax_mpk.graph.fuse_maps import fuse_views, has_factors, is_view_of_factor
from jax_mpk.graph.ir import Block, Graph, Nest, Op, Value
from jax_mpk.graph.rewrite import Slots, inline_map, map_blocks, rebuild_expr
from jax_mpk.graph.scalar import Builder, Expr
from jax_mpk.graph.windows import is_affine


def split_axes(graph: Graph) -> Graph:
    """Lets contractions read through views that divide one of their coordinates."""
    values = list(graph.values)

    def visit(block: Block) -> Block:
        maps: dict[int, Nest] = {}
        ops: list[Op] = []
        for op in block.ops:
            split = _split(values, op, maps) if isinstance(op, Nest) and op.kind == "contract" else None
            ops += [op] if split is None else split
            if isinstance(op, Nest) and op.kind == "map":
                maps.update(dict.fromkeys(op.outputs, op))
        return Block(tuple(ops), block.results)

    out = map_blocks(graph, visit)
    return graph if len(values) == len(graph.values) else fuse_views(replace(out, values=tuple(values)))


def _split(values: list[Value], op: Nest, maps: dict[int, Nest]) -> list[Op] | None:
    """The contraction over split axes and the view of its result, or None where splitting does not help."""
    views = {v: maps[v] for v in op.operands if v in maps and is_view_of_factor(maps[v])}
    if not views or len(op.outputs) != 1:
        return None
    body, _ = _through(op.body, op, views, op.space, {})
    parts: dict[int, int] = {}  # axis → extent of its inner part
    for i in body.loads():
        node = body.nodes[i]
        if node.op == "load" and not is_affine(body, node.args):
            parts.update(_divided(body, node.args, op.space))
    if not parts:
        return None
    space = tuple(e for axis, extent in enumerate(op.space) for e in _extents(extent, parts.get(axis)))
    body, slots = _through(op.body, op, views, space, parts)
    assert op.epilogue is not None
    after = rebuild_expr(
        op.epilogue, op.operands, slots, lambda *_: None, extents=space, coords=lambda b: _merged(b, op.space, parts)
    )
    (old,) = op.outputs
    new = Value(len(values), space, values[old].dtype)
    split = replace(op, space=space, operands=tuple(slots.values), outputs=(new.id,), body=body, epilogue=after)
    if not has_factors(split):
        return None
    values.append(new)
    b = Builder(op.space)
    at = [i for axis in range(len(op.space)) for i in _digits(b, axis, parts.get(axis))]
    view = b.build(b.load(0, at, new.dtype))
    return [split, Nest("map", op.space, (), (new.id,), (old,), view, source=op.source)]


def _through(
    expr: Expr, op: Nest, views: dict[int, Nest], space: tuple[int, ...], parts: dict[int, int]
) -> tuple[Expr, Slots]:
    """A contraction's body with views computed in place, over its split axes."""
    slots = Slots()

    def rule(b: Builder, value: int, at: list[int], dtype: str, pred: int | None) -> int | None:
        view = views.get(value)
        return None if view is None else inline_map(b, view, value, at, pred, slots, lambda *_: None)

    found = rebuild_expr(
        expr, op.operands, slots, rule,
        extents=space + op.rspace, coords=lambda b: _merged(b, op.space + op.rspace, parts),
    )  # fmt: skip
    return found, slots


def _divided(expr: Expr, args: tuple[int, ...], space: tuple[int, ...]) -> dict[int, int]:
    """Parallel axes that an index divides, and by what."""
    found: dict[int, int] = {}
    nodes = expr.only(*args).nodes
    for node in nodes:
        if node.op not in ("div", "rem"):
            continue
        whole, by = (nodes[a] for a in node.args)
        if whole.op == "coord" and by.op == "const" and whole.attr < len(space):
            inner = int(dtypes.from_bits(by.attr, by.dtype))
            if 1 < inner < space[whole.attr] and space[whole.attr] % inner == 0:
                found[whole.attr] = inner
    return found


def _extents(extent: int, inner: int | None) -> tuple[int, ...]:
    return (extent,) if inner is None else (extent // inner, inner)


def _merged(b: Builder, space: tuple[int, ...], parts: dict[int, int]) -> list[int]:
    """The old coordinates from those of the split space."""
    out, position = [], 0
    for axis in range(len(space)):
        inner = parts.get(axis)
        node = b.coord(position)
        position += 1
        if inner is not None:
            node = b.add(b.mul(node, b.index(inner)), b.coord(position))
            position += 1
        out.append(node)
    return out


def _digits(b: Builder, axis: int, inner: int | None) -> list[int]:
    coord = b.coord(axis)
    return [coord] if inner is None else [b.floordiv(coord, inner), b.mod(coord, inner)]
