"""Moves a map that reads a reduction's result element by element into the reduction's epilogue.

Residual adds, biases, activations, scales and layout changes then cost no phase: the map's index space becomes the
reduction's, provided its index into the result is a bijection (a permutation of axes, an axis split or merged).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from jax_mpk.graph import dtypes
from jax_mpk.graph.fuse_maps import MAX_NODES, VIEW, has_factors, work
from jax_mpk.graph.ir import Block, Graph, Nest, Note, Op
from jax_mpk.graph.rewrite import Slots, map_blocks, noted, prune, use_counts
from jax_mpk.graph.scalar import Builder, Expr, inline


def fuse_epilogues(graph: Graph) -> Graph:
    """Fuses every map that is the only reader of a reduction or contraction into it."""
    notes: list[Note] = []
    return noted(map_blocks(graph, lambda block: _fuse_block(block, notes)), "epilogue", notes)


def _fuse_block(block: Block, notes: list[Note]) -> Block:
    uses = use_counts(block)
    nests: dict[int, Nest] = {}
    ops: list[Op] = []
    for op in block.ops:
        if isinstance(op, Nest) and op.kind == "map":
            op = _fuse_op(op, nests, uses, notes)
        if isinstance(op, Nest) and op.kind != "map":
            nests.update(dict.fromkeys(op.outputs, op))
        ops.append(op)
    return prune(Block(tuple(ops), block.results), set())


def _fuse_op(op: Nest, nests: dict[int, Nest], uses: Counter[int], notes: list[Note]) -> Nest:
    if work(op.body) < VIEW and op.space != _space(op, nests):
        return op  # a view belongs to its readers; the reduction keeps its compact index space
    refused: list[Note] = []
    for value in sorted((v for v in op.operands if v in nests), key=lambda v: -_size(nests[v])):
        fused = _fused(op, nests[value], value, uses[value])
        if isinstance(fused, Nest):
            return fused
        # A result that is repeated or read in part was never to be an epilogue.
        if math.prod(op.space) == math.prod(nests[value].space):
            text = f"not fused: {op.source.short} into the end of {nests[value].source.short}: {fused}"
            refused.append(Note("epilogue", text, (value, op.outputs[0])))
    notes += refused
    return op


def _space(op: Nest, nests: dict[int, Nest]) -> tuple[int, ...]:
    """Index space of the only reduction a map reads, or its own."""
    found = {nests[v].space for v in op.operands if v in nests}
    return found.pop() if len(found) == 1 else op.space


def _size(nest: Nest) -> float:
    return math.prod(nest.space + nest.rspace) * (1 + work(nest.body))


def _fused(consumer: Nest, producer: Nest, value: int, uses: int) -> Nest | str:
    """Both in one, or why not."""
    if len(producer.outputs) != 1:
        return "it has several results"
    if uses != 1:
        return "its result has other readers"
    body = consumer.body
    loads = [body.nodes[i] for i in body.loads() if consumer.operands[body.nodes[i].attr] == value]  # type: ignore[index]
    if not loads or any(node.op != "load" or node.args != loads[0].args for node in loads):
        return "more than one element of its result is read for one"
    if not is_bijection(body, loads[0].args, consumer.space, producer.space):
        return "its result is not read element by element"
    assert producer.epilogue is not None
    slots = Slots()

    # The reduction over the consumer's coordinates: parallel coordinates become the index nodes.
    reduced = Builder(consumer.space + producer.rspace)
    axes = len(consumer.space)
    at = _index_nodes(reduced, body, loads[0].args) + [reduced.coord(axes + r) for r in range(len(producer.rspace))]
    results = inline(
        reduced,
        producer.body,
        at,
        lambda slot, indices, dtype, pred: slots.load(reduced, producer.operands[slot], indices, dtype, pred),
    )

    after = Builder(consumer.space)

    def load(slot: int, indices: list[int], dtype: str, pred: int | None) -> int:
        if consumer.operands[slot] != value:
            return slots.load(after, consumer.operands[slot], indices, dtype, pred)
        assert producer.epilogue is not None
        (out,) = inline(
            after,
            producer.epilogue,
            indices,
            lambda s, inner, t, p: slots.load(after, producer.operands[s], inner, t, p),
        )
        return out

    epilogue = after.build(*inline(after, body, after.coords(), load))
    fused = replace(
        producer,
        space=consumer.space,
        body=reduced.build(*results),
        epilogue=epilogue,
        operands=tuple(slots.values),
        outputs=consumer.outputs,
        source=consumer.source if producer.kind == "reduce" else producer.source,
    )
    if len(epilogue.nodes) > MAX_NODES:
        return f"the program would have more than {MAX_NODES} nodes"
    if producer.kind == "contract" and not has_factors(fused):
        return "its factors could no longer be streamed"
    return fused


def _index_nodes(builder: Builder, expr: Expr, args: tuple[int, ...]) -> list[int]:
    """Copies pure index nodes (no loads) of ``expr`` into ``builder`` at its leading coordinates."""

    def load(*_: object) -> int:
        raise AssertionError("a bijective index holds no load")

    return inline(builder, expr.only(*args), [builder.coord(d) for d in range(len(expr.extents))], load)


def is_bijection(expr: Expr, args: tuple[int, ...], space: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether index nodes map ``space`` one to one onto ``shape``.

    Every index must be a mixed-radix number whose digits are whole coordinates (an axis merged from several, or just
    permuted) or digits ``coord // c % e`` of one coordinate (an axis split), each digit used exactly once.
    """
    if math.prod(space) != math.prod(shape):
        return False
    used: dict[int, list[tuple[int, int]]] = {}  # coordinate → (divisor, extent) of the digits taken from it
    for arg, size in zip(args, shape, strict=True):
        terms = _digits(expr, arg, space)
        if terms is None:
            return False
        radix = 1
        for scale, coord, divisor, extent in sorted(terms):
            if scale != radix:
                return False
            radix *= extent
            used.setdefault(coord, []).append((divisor, extent))
        if radix != size:
            return False
    for coord, extent in enumerate(space):
        radix = 1
        for divisor, digit in sorted(used.get(coord, [])):
            if divisor != radix:
                return False
            radix *= digit
        if radix != extent:
            return False
    return True


def _digits(expr: Expr, i: int, space: tuple[int, ...]) -> list[tuple[int, int, int, int]] | None:
    """An index as (scale, coordinate, divisor, extent) digits, or None where it is nothing of that form."""
    node = expr.nodes[i]
    if node.op == "const":
        return [] if _constant(expr, i) == 0 else None
    if node.op == "coord":
        return [(1, node.attr, 1, space[node.attr])]  # type: ignore[index, list-item]
    if node.op == "add":
        a, b = (_digits(expr, arg, space) for arg in node.args)
        return None if a is None or b is None else a + b
    scale = _constant(expr, node.args[1]) if len(node.args) == 2 else None
    if scale is None or scale <= 0:
        return None
    inner = _digits(expr, node.args[0], space)
    if inner is None:
        return None
    if node.op == "mul":
        return [(s * scale, coord, divisor, extent) for s, coord, divisor, extent in inner]
    if len(inner) != 1 or inner[0][0] != 1:
        return None
    _, coord, divisor, extent = inner[0]
    if node.op == "rem":
        return [(1, coord, divisor, scale)] if extent % scale == 0 else None
    if node.op == "div":
        return [(1, coord, divisor * scale, extent // scale)] if extent % scale == 0 else None
    return None


def _constant(expr: Expr, i: int) -> int | None:
    node = expr.nodes[i]
    if node.op != "const" or dtypes.is_float(node.dtype):
        return None
    return int(dtypes.from_bits(node.attr, node.dtype))  # type: ignore[arg-type]
