"""Splits reductions with fewer results than workers, and contractions that give too few tasks otherwise: parts of the
reduced axis first, then the parts.

    acc[p] = ⊕_c body(p·C + c)        one task per part
    acc    = ⊕_p acc[p]               in order of p, in the prologue of whoever reads it if that pays

Both halves are operators like any other, so the planner cuts, joins and places them as it does all of them. The parts
and the order they are joined in are fixed: results do not depend on which worker is faster.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.ir import Block, Combine, Graph, Nest, Op, Value
from jax_mpk.graph.rewrite import Slots, map_blocks, rebuild_expr
from jax_mpk.graph.scalar import Builder, Node, inline
from jax_mpk.plan import columns, costs
from jax_mpk.plan.ir import WHOLE, Target

#: Fewest elements in a part.
_MIN_PART = 64


def split_reductions(graph: Graph, target: Target) -> Graph:
    """Splits every reduction and contraction for which that is predicted to save more than the phases it may add."""
    values = list(graph.values)

    def visit(block: Block) -> Block:
        by_columns = _column_parts(graph, target, block)
        ops: list[Op] = []
        for op in block.ops:
            count = 1
            if isinstance(op, Nest) and op.kind != "map":
                count = by_columns.get(id(op)) or _parts(values, op, target)
            ops += [op] if count == 1 else _split(values, op, count)  # type: ignore[arg-type]
        return Block(tuple(ops), block.results)

    out = map_blocks(graph, visit)
    return replace(out, values=tuple(values))


def _column_parts(graph: Graph, target: Target, block: Block) -> dict[int, int]:
    """Parts of the contractions whose weight lies contiguous along its free axis, by identity.

    Those of one value get equal parts: they are siblings, whose tasks share what comes before.
    """
    constant = columns.constants(graph)
    groups: dict[object, list[tuple[Nest, columns.ColumnWeight]]] = {}
    for op in block.ops:
        found = columns.find(graph.values, constant, target, op)
        if found is not None and not found.shared:
            assert isinstance(op, Nest)
            groups.setdefault((found.other, op.rspace), []).append((op, found))
    count = {key: columns.parts(graph.values, target, group) for key, group in groups.items()}
    return {id(op): count[key] for key, group in groups.items() for op, _ in group}


def _axis(op: Nest) -> int:
    """The reduced axis to split: the outermost, so that parts join in the order of elements."""
    return next((axis for axis, extent in enumerate(op.rspace) if extent > 1), 0)


def _parts(values: list[Value], op: Nest, target: Target) -> int:
    """How many parts to reduce; 1: leave it whole."""
    results = math.prod(op.space)
    if not results or 2 * results > target.workers:
        return 1
    extent = op.rspace[_axis(op)]
    whole = _seconds(values, op, target, results)
    best = whole - 2 * costs.handoff_seconds(target), 1
    for parts in range(2, min(extent, math.prod(op.rspace) // _MIN_PART, target.workers // results) + 1):
        if extent % parts == 0:
            joined = parts * results * sum(map(dtypes.itemsize, op.acc))
            last = costs.task_seconds(target, joined, 0.0, 0.0)
            best = min(best, (_seconds(values, op, target, results * parts) + float(last), parts))
    return best[1]


def _seconds(values: list[Value], op: Nest, target: Target, tasks: int) -> float:
    """Predicted time of an operator as so many equal tasks."""
    lo = np.zeros((1, len(op.space)), np.int64)
    hi = np.array([op.space], np.int64)
    most = float(costs.evaluations(op, WHOLE, lo, hi)[0])
    nbytes = sum(min(math.prod(values[v].shape), most) * dtypes.itemsize(values[v].dtype) for v in op.operands)
    flops = float(costs.flops(op, lo, hi)[0])
    return float(costs.task_seconds(target, nbytes / tasks, 0.0, flops / tasks))


def _split(values: list[Value], op: Nest, parts: int) -> list[Op]:
    axis, count = _axis(op), len(op.space)
    size = op.rspace[axis] // parts
    space = (parts, *op.space)
    rspace = (*op.rspace[:axis], size, *op.rspace[axis + 1 :])
    position = op.combine is not None and op.combine.kind in ("argmax", "argmin")

    def coords(b: Builder) -> list[int]:
        at = b.coords()[1:]
        at[count + axis] = b.add(b.mul(b.coord(0), b.index(size)), at[count + axis])
        return at

    slots = Slots()
    body = rebuild_expr(op.body, op.operands, slots, lambda *_: None, extents=space + rspace, coords=coords)
    after = Builder(space)
    accs = [after.acc(k, dtype) for k, dtype in enumerate(op.acc)]
    if position:
        # Positions are counted from the beginning of the axis.
        accs[1] = after.add(accs[1], after.mul(after.coord(0), after.index(size)))
    outputs = []
    for dtype in op.acc:
        outputs.append(len(values))
        values.append(Value(len(values), space, dtype))
    first = replace(
        op, space=space, rspace=rspace, operands=tuple(slots.values), outputs=tuple(outputs), body=body,
        epilogue=after.build(*accs),
    )  # fmt: skip

    b = Builder((*op.space, parts))
    at = [b.coord(count), *b.coords()[:count]]
    slots = Slots()
    loaded = [slots.load(b, v, at, dtype, None) for v, dtype in zip(outputs[: 1 if position else None], op.acc)]
    after = Builder(op.space)

    def leaf(node: Node) -> int:
        acc = after.acc(node.attr, node.dtype)  # type: ignore[arg-type]
        if not position or node.attr != 1:
            return acc
        # The second accumulator says which part won; the position is what that part found.
        part = after.clamp(after.index(0), acc, after.index(parts - 1))
        return slots.load(after, outputs[1], [part, *after.coords()], INDEX, None)

    assert op.epilogue is not None and op.combine is not None
    results = inline(
        after, op.epilogue, after.coords(), lambda s, i, t, p: slots.load(after, op.operands[s], i, t, p), leaf
    )
    combine = Combine("sum") if op.combine.kind == "dot" else op.combine
    second = replace(
        op, kind="reduce", rspace=(parts,), operands=tuple(slots.values), body=b.build(*loaded), combine=combine,
        epilogue=after.build(*results), space=op.space,
    )  # fmt: skip
    return [first, second]
