"""Merges operators that compute the same values, such as rotary tables rebuilt by every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jax_mpk.graph.ir import Block, Branch, Cumulative, Graph, Loop, Nest, Op, Sort, Source, Update
from jax_mpk.graph.rewrite import prune


def merge_duplicates(graph: Graph) -> Graph:
    """Keeps the first of several equal operators of a block; dead operators disappear."""
    renamed: dict[int, int] = {}

    def rename(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(renamed.get(v, v) for v in values)

    def visit(block: Block, outer: dict[Op, tuple[int, ...]]) -> Block:
        known = dict(outer)
        ops: list[Op] = []
        for op in block.ops:
            op = _renamed(op, rename)
            if isinstance(op, Loop):
                cond = None if op.cond is None else visit(op.cond, known)
                op = replace(op, body=visit(op.body, known), cond=cond)
            elif isinstance(op, Branch):
                op = replace(op, arms=tuple(visit(arm, known) for arm in op.arms))
            else:
                key = _key(op)
                first = known.get(key)
                if first is not None and _same_types(graph, first, op.outputs):
                    renamed.update(zip(op.outputs, first, strict=True))
                    continue
                known[key] = op.outputs
            ops.append(op)
        return Block(tuple(ops), rename(block.results))

    return replace(graph, block=prune(visit(graph.block, {}), set()))


def _renamed(op: Op, rename: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Op:
    if isinstance(op, Loop):
        return replace(op, inits=rename(op.inits))
    if isinstance(op, Branch):
        return replace(op, index=rename((op.index,))[0])
    if isinstance(op, Update):
        return replace(op, base=rename((op.base,))[0], operands=rename(op.operands))
    return replace(op, operands=rename(op.operands))


def _key(op: Nest | Update | Cumulative | Sort) -> Op:
    """The operator without its name and origin."""
    if isinstance(op, Update):
        return replace(op, output=-1, source=Source(""))
    return replace(op, outputs=(), source=Source(""))


def _same_types(graph: Graph, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return [replace(graph.values[v], id=0) for v in a] == [replace(graph.values[v], id=0) for v in b]
