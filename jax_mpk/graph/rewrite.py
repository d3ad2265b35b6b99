"""What the fusion passes share: rebuilding operators with other operands, and removing dead ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from jax_mpk.graph.ir import Block, Branch, Cumulative, Graph, Loop, Nest, Note, Op, Update, reads
from jax_mpk.graph.scalar import Builder, Expr, inline

#: Called as (builder, value, index nodes, dtype, predicate) for a load; returns the node that replaces it, or None
#: to keep the load.
LoadRule = Callable[[Builder, int, list[int], str, int | None], int | None]


class Slots:
    """Collects the operand values of an operator being rebuilt."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def slot(self, value: int) -> int:
        if value not in self.values:
            self.values.append(value)
        return self.values.index(value)

    def load(self, builder: Builder, value: int, indices: list[int], dtype: str, pred: int | None) -> int:
        return builder.load(self.slot(value), indices, dtype, pred)


def rebuild_expr(
    expr: Expr,
    operands: tuple[int, ...],
    slots: Slots,
    rule: LoadRule,
    *,
    extents: tuple[int, ...] | None = None,
    coords: Callable[[Builder], list[int]] | None = None,
) -> Expr:
    """``expr`` with some loads replaced and, if asked, over other coordinates.

    Args:
      expr: the program; its slots name ``operands``.
      operands: value ids.
      slots: operand table of the new operator.
      rule: replaces loads.
      extents: extents of the new coordinates (default: unchanged).
      coords: makes the nodes that replace the old coordinates (default: the same coordinates).
    """
    builder = Builder(expr.extents if extents is None else extents)

    def load(slot: int, indices: list[int], dtype: str, pred: int | None) -> int:
        value = operands[slot]
        found = rule(builder, value, indices, dtype, pred)
        return slots.load(builder, value, indices, dtype, pred) if found is None else found

    at = builder.coords() if coords is None else coords(builder)
    return builder.build(*inline(builder, expr, at, load))


def rewrite_loads(op: Op, rule: LoadRule, slots: Slots | None = None) -> Op:
    """``op`` with ``rule`` applied to every load of its scalar programs; ``slots`` if the rule adds operands."""
    slots = slots or Slots()
    if isinstance(op, Nest):
        body = rebuild_expr(op.body, op.operands, slots, rule)
        epilogue = None if op.epilogue is None else rebuild_expr(op.epilogue, op.operands, slots, rule)
        return replace(op, body=body, epilogue=epilogue, operands=tuple(slots.values))
    if isinstance(op, Update):
        index = rebuild_expr(op.index, op.operands, slots, rule)
        value = rebuild_expr(op.value, op.operands, slots, rule)
        return replace(op, index=index, value=value, operands=tuple(slots.values))
    if isinstance(op, Cumulative):
        body = rebuild_expr(op.body, op.operands, slots, rule)
        epilogue = rebuild_expr(op.epilogue, op.operands, slots, rule)
        return replace(op, body=body, epilogue=epilogue, operands=tuple(slots.values))
    return op


def inline_map(
    builder: Builder, producer: Nest, value: int, indices: list[int], pred: int | None, slots: Slots, rule: LoadRule
) -> int:
    """The element of a map's output at ``indices``, computed in place instead of loaded."""

    def load(slot: int, inner: list[int], dtype: str, inner_pred: int | None) -> int:
        both = pred if inner_pred is None else inner_pred if pred is None else builder.op("and", pred, inner_pred)
        source = producer.operands[slot]
        found = rule(builder, source, inner, dtype, both)
        return slots.load(builder, source, inner, dtype, both) if found is None else found

    results = inline(builder, producer.body, indices, load)
    out = results[producer.outputs.index(value)]
    if pred is None:
        return out
    node = builder.nodes[out]
    if node.op == "load_if" and node.args[0] == pred:
        return out
    return builder.op("select", pred, out, builder.const(0, node.dtype))


def use_counts(block: Block) -> Counter[int]:
    """How many operators (nested ones included) and results read each value."""
    counts: Counter[int] = Counter(block.results)
    for op in block.ops:
        counts.update(set(reads(op)))
    return counts


def noted(graph: Graph, about: str, notes: Iterable[Note]) -> Graph:
    """``graph`` with a pass's notes in place of those that it left when it ran before."""
    others = (note for note in graph.notes if note.about != about)
    return replace(graph, notes=tuple(dict.fromkeys((*others, *notes))))


def prune(block: Block, live: set[int]) -> Block:
    """``block`` without operators whose outputs nobody needs. ``live``: values needed besides the results."""
    needed = set(block.results) | live
    ops: list[Op] = []
    for op in reversed(block.ops):
        if not needed.intersection(op.outputs):
            continue
        if isinstance(op, Loop):
            op = replace(
                op,
                body=prune(op.body, set()),
                cond=None if op.cond is None else prune(op.cond, set()),
            )
        elif isinstance(op, Branch):
            op = replace(op, arms=tuple(prune(arm, set()) for arm in op.arms))
        needed.update(reads(op))
        ops.append(op)
    return Block(tuple(reversed(ops)), block.results)


def map_blocks(graph: Graph, rewrite: Callable[[Block], Block]) -> Graph:
    """``graph`` with ``rewrite`` applied to every block, inner ones first."""

    def visit(block: Block) -> Block:
        ops: list[Op] = []
        for op in block.ops:
            if isinstance(op, Loop):
                cond = None if op.cond is None else visit(op.cond)
                op = replace(op, body=visit(op.body), cond=cond)
            elif isinstance(op, Branch):
                op = replace(op, arms=tuple(visit(arm) for arm in op.arms))
            ops.append(op)
        return rewrite(Block(tuple(ops), block.results))

    return replace(graph, block=visit(graph.block))
