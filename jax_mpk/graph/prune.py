"""Dead code: removes operators whose outputs nobody reads, and numbers the remaining values in order."""

from __future__ import annotations

from dataclasses import replace

from jax_mpk.graph.ir import (
    Block,
    Branch,
    Cumulative,
    Graph,
    Loop,
    Nest,
    Op,
    Sort,
    Update,
    Value,
    reads,
)


def prune(graph: Graph) -> Graph:
    """The graph without dead operators; values are renumbered in the order in which they are defined."""
    block = _live(graph.block)
    order: dict[int, int] = {}
    for v in graph.inputs:
        order.setdefault(v, len(order))
    _number(block, order)
    values = [Value(new, graph.values[old].shape, graph.values[old].dtype) for old, new in order.items()]
    return replace(
        graph,
        values=tuple(values),
        inputs=tuple(order[v] for v in graph.inputs),
        block=_renumber(block, order),
    )


def _live(block: Block) -> Block:
    """``block`` without the operators that neither its results nor its other operators need."""
    wanted = set(block.results)
    kept: list[Op] = []
    for op in reversed(block.ops):
        if wanted.isdisjoint(op.outputs):
            continue
        if isinstance(op, Loop):
            op = replace(op, body=_live(op.body), cond=_live(op.cond) if op.cond is not None else None)
        elif isinstance(op, Branch):
            op = replace(op, arms=tuple(_live(arm) for arm in op.arms))
        wanted.update(reads(op))
        kept.append(op)
    return Block(tuple(reversed(kept)), block.results)


def _number(block: Block, order: dict[int, int]) -> None:
    for op in block.ops:
        if isinstance(op, Loop):
            for v in op.params:
                order.setdefault(v, len(order))
            if op.cond is not None:
                _number(op.cond, order)
            _number(op.body, order)
        elif isinstance(op, Branch):
            for arm in op.arms:
                _number(arm, order)
        for v in op.outputs:
            order.setdefault(v, len(order))


def _renumber(block: Block, order: dict[int, int]) -> Block:
    return Block(tuple(_renumber_op(op, order) for op in block.ops), tuple(order[v] for v in block.results))


def _renumber_op(op: Op, order: dict[int, int]) -> Op:
    def new(ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(order[v] for v in ids)

    if isinstance(op, Update):
        return replace(op, base=order[op.base], operands=new(op.operands), output=order[op.output])
    if isinstance(op, Loop):
        return replace(
            op,
            params=new(op.params),
            inits=new(op.inits),
            body=_renumber(op.body, order),
            cond=_renumber(op.cond, order) if op.cond is not None else None,
            outputs=new(op.outputs),
        )
    if isinstance(op, Branch):
        arms = tuple(_renumber(arm, order) for arm in op.arms)
        return replace(op, index=order[op.index], arms=arms, outputs=new(op.outputs))
    assert isinstance(op, Nest | Cumulative | Sort)
    return replace(op, operands=new(op.operands), outputs=new(op.outputs))
