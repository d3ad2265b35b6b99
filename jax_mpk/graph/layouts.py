"""The order in which the axes of an argument lie in memory.

Values are row-major. A *layout* of an argument lists its axes as they lie in memory, outermost first (JAX's
``major_to_minor``). The graph's value then has its axes in that order, and every load indexes it so: to all that comes
after, such an argument is an array of another shape.

A contraction streams its weight best along the contracted axes; the weights of most JAX models have them first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jax_mpk.graph import dtypes
from jax_mpk.graph.fuse_maps import programs
from jax_mpk.graph.ir import Block, Graph, Loop, Nest, Op, Sort, Update, blocks, walk
from jax_mpk.graph.rewrite import Slots, map_blocks, rewrite_loads
from jax_mpk.graph.scalar import Builder, Expr
from jax_mpk.graph.windows import factor

Layout = tuple[int, ...]

#: Arguments below this size, in bytes, are not worth an order of their own.
SMALL = 4096


def movable(graph: Graph) -> frozenset[int]:
    """Positions of the arguments that may have any layout: not donated, not empty, and read by loads only."""
    whole = set(graph.block.results)
    for op in walk(graph.block):
        whole.update(v for block in blocks(op) for v in block.results)
        if isinstance(op, Loop | Sort):
            whole.update(op.operands)
        elif isinstance(op, Update):
            whole.add(op.base)
    # XLA replaces empty arrays by constants; where a declared order makes it copy one into another order, its compiler
    # for CPUs divides by zero (jaxlib 0.10.2 to 0.12.0.1).
    whole.update(v for v in graph.inputs if 0 in graph.values[v].shape)
    return frozenset(i for i, v in enumerate(graph.inputs) if i not in graph.donated and v not in whole)


def permute_inputs(graph: Graph, layouts: Sequence[Layout | None]) -> Graph:
    """The graph for arguments in other layouts.

    Args:
      graph: with all arguments row-major.
      layouts: one per argument; None: row-major. Only :func:`movable` arguments have one.
    """
    chosen = {v: layout for v, layout in zip(graph.inputs, layouts, strict=True) if layout is not None}
    if not chosen:
        return graph
    if not movable(graph).issuperset(i for i, layout in enumerate(layouts) if layout is not None):
        raise ValueError(f"layouts {layouts}: only arguments {sorted(movable(graph))} can be moved")

    def visit(block: Block) -> Block:
        return Block(tuple(_permuted(op, chosen) for op in block.ops), block.results)

    values = tuple(
        replace(v, shape=tuple(v.shape[axis] for axis in chosen[v.id])) if v.id in chosen else v for v in graph.values
    )
    return replace(map_blocks(graph, visit), values=values, layouts=tuple(layouts))


def _permuted(op: Op, chosen: dict[int, Layout]) -> Op:
    if chosen.keys().isdisjoint(op.operands):
        return op
    slots = Slots()

    def rule(builder: Builder, value: int, indices: list[int], dtype: str, pred: int | None) -> int | None:
        layout = chosen.get(value)
        return None if layout is None else slots.load(builder, value, [indices[a] for a in layout], dtype, pred)

    return rewrite_loads(op, rule, slots)


def preferred(graph: Graph) -> tuple[Layout | None, ...]:
    """The layout in which each argument is read best; None where that does not matter or cannot be chosen.

    Every read of an argument votes with the number of elements it touches: a contraction for the contracted axes
    innermost, behind batch axes and then the others, and everything else for row-major order.

    Args:
      graph: fused, with all arguments row-major.
    """
    can = movable(graph)
    votes: dict[int, Counter[Layout]] = {}
    for position, v in enumerate(graph.inputs):
        value = graph.values[v]
        if position in can and math.prod(value.shape) * dtypes.itemsize(value.dtype) >= SMALL:
            votes[v] = Counter()
    for op in walk(graph.block):
        for v, layout, count in _reads(graph, op, votes):
            votes[v][layout] += count
    # Row-major order is the smallest of all, and the first of equals wins.
    return tuple(max(sorted(found), key=found.__getitem__) if (found := votes.get(v)) else None for v in graph.inputs)


def _reads(graph: Graph, op: Op, wanted: dict[int, Counter[Layout]]) -> Iterator[tuple[int, Layout, int]]:
    """(argument, the layout a load would like, elements it touches) for the loads of an operator."""
    factors = _factors(graph, op) if isinstance(op, Nest) and op.kind == "contract" else {}
    for expr in programs(op):
        for i in expr.loads():
            v = op.operands[expr.nodes[i].attr]  # type: ignore[index]
            if v not in wanted:
                continue
            shape = graph.values[v].shape
            layout = tuple(range(len(shape)))
            if i in factors and isinstance(op, Nest) and expr is op.body:
                layout = _streamed(shape, expr, i, factors[i], len(op.space))
            touched = math.prod(expr.extents[c] for c in _coords(expr, expr.nodes[i].args))
            yield v, layout, min(math.prod(shape), touched)


def _factors(graph: Graph, op: Nest) -> dict[int, int]:
    """The loads of a contraction's factors, each with the other one. Of two arguments only the larger one streams."""
    found = [factor(op.body, result) for result in op.body.results]
    loads = [f.load for f in found if f is not None]
    if len(loads) != 2:
        return {}

    def size(load: int) -> int:
        v = op.operands[op.body.nodes[load].attr]  # type: ignore[index]
        return math.prod(graph.values[v].shape) if v in graph.inputs else 0

    return {a: b for a, b in (loads, loads[::-1]) if size(a) >= size(b)}


def _streamed(shape: tuple[int, ...], expr: Expr, load: int, other: int, parallel: int) -> Layout:
    """Batch axes and fixed ones, then the free ones, then the contracted ones; row-major where that will do."""
    shared = _coords(expr, expr.nodes[other].args)
    ranks = []
    for size, arg in zip(shape, expr.nodes[load].args, strict=True):
        coords = _coords(expr, (arg,))
        contracted = {c for c in coords if c >= parallel}
        if contracted and contracted != coords:
            return tuple(range(len(shape)))  # an axis of both kinds has no place
        ranks.append(0 if size == 1 else 2 if contracted else 1 if coords - shared else 0)
    contracted_axes = [axis for axis, rank in enumerate(ranks) if rank == 2]
    behind = [axis for axis, size in enumerate(shape) if size > 1][-len(contracted_axes) :]
    if contracted_axes == behind:
        return tuple(range(len(shape)))
    return tuple(sorted(range(len(shape)), key=ranks.__getitem__))


def _coords(expr: Expr, nodes: tuple[int, ...]) -> set[int]:
    """Coordinates that nodes depend on."""
    return {node.attr for node in expr.only(*nodes).nodes if node.op == "coord"}  # type: ignore[misc]
