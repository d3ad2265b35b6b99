"""Lets contractions over an updated cache read the old cache and the new rows instead of waiting for the update.

The update itself then runs beside or after them, off the critical path. In place it need not wait for them either: they
read the old rows around the window, and what it overwrites are the others (:mod:`jax_mpk.graph.spans`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from jax_mpk.graph.ir import Block, Graph, Nest, Note, Op, Update, Value
from jax_mpk.graph.rewrite import Slots, map_blocks, noted, rewrite_loads
from jax_mpk.graph.scalar import Builder, inline
from jax_mpk.graph.windows import WindowUpdate, factor, window_update

#: A window must be at most this share of its base: below, waiting for the update costs less than reading twice.
_SHARE = 1 / 16


def fuse_updates(graph: Graph) -> Graph:
    """Forwards window updates to the contractions that read them."""
    values = list(graph.values)
    notes: list[Note] = []

    def visit(block: Block) -> Block:
        known: dict[int, tuple[Update, WindowUpdate, int]] = {}
        refused: dict[int, tuple[Update, str]] = {}
        ops: list[Op] = []
        wanted = {v for op in block.ops if isinstance(op, Nest) and op.kind == "contract" for v in op.operands}
        for op in block.ops:
            if isinstance(op, Update) and op.output in wanted:
                window = window_update(graph, op)
                size = math.prod(graph.values[op.base].shape)
                if window is None:
                    refused[op.output] = op, "it overwrites no window of consecutive rows"
                elif math.prod(op.space) > size * _SHARE:
                    refused[op.output] = op, f"it overwrites more than {_SHARE:.0%} of what is read"
                else:
                    rows, op = _rows(values, op)
                    ops += rows
                    known[op.output] = (op, window, op.operands[op.value.result().attr])
            elif isinstance(op, Nest) and op.kind == "contract":
                for v in op.operands:
                    if v in refused:
                        notes.append(_note(op, *refused[v]))
                if known.keys() & set(op.operands):
                    forwarded = _forward(op, known)
                    if forwarded is op:
                        reason = "the contraction could no longer stream it"
                        notes.extend(_note(op, known[v][0], reason) for v in op.operands if v in known)
                    op = forwarded
            ops.append(op)
        return Block(tuple(ops), block.results)

    fused = map_blocks(graph, visit)
    return noted(replace(fused, values=tuple(values)), "update", notes)


def _note(reader: Nest, update: Update, reason: str) -> Note:
    text = f"not read around: {update.source.short} by {reader.source.short}, which waits for it: {reason}"
    return Note("update", text, (update.output, reader.outputs[0]))


def _rows(values: list[Value], op: Update) -> tuple[list[Op], Update]:
    """Gives the new rows a value of their own, if they have none, for the update and its readers to load."""
    expr = op.value
    node = expr.result()
    coords = [expr.nodes[a] for a in node.args]
    plain = node.op == "load" and [(c.op, c.attr) for c in coords] == [
        ("coord", d) if extent > 1 else ("const", 0) for d, extent in enumerate(op.space)
    ]
    if plain and values[op.operands[node.attr]].shape == op.space:
        return [], op
    rows = Value(len(values), op.space, values[op.base].dtype)
    values.append(rows)
    make = Nest("map", op.space, (), op.operands, (rows.id,), op.value, source=replace(op.source, primitive="rows"))
    builder = Builder(op.space)
    operands = (*op.operands, rows.id)
    value = builder.build(builder.load(len(op.operands), builder.coords(), rows.dtype))
    return [make], replace(op, operands=operands, value=value)


def _forward(op: Nest, known: dict[int, tuple[Update, WindowUpdate, int]]) -> Nest:
    slots = Slots()

    def rule(builder: Builder, value: int, indices: list[int], dtype: str, pred: int | None) -> int | None:
        found = known.get(value)
        if found is None or pred is not None:
            return None
        update, window, rows = found
        start_only = update.index.only(window.start)

        def scalar(slot: int, at: list[int], t: str, p: int | None) -> int:
            return slots.load(builder, update.operands[slot], at, t, p)

        (start,) = inline(builder, start_only, [builder.index(0)] * len(update.space), scalar)
        where = indices[window.axis]
        end = builder.add(start, builder.index(window.length))
        inside = builder.op("and", builder.op("ge", where, start), builder.op("lt", where, end))
        # Update coordinates in the order of the base's axes; those of extent 1 may be missing.
        at = _update_coords(builder, update, window, indices, start)
        new = slots.load(builder, rows, at, dtype, inside)
        return builder.op("select", inside, new, slots.load(builder, update.base, indices, dtype, None))

    fused = rewrite_loads(op, rule, slots)
    assert isinstance(fused, Nest)
    good = all(factor(fused.body, result) is not None for result in fused.body.results)
    return fused if good else op


def _update_coords(builder: Builder, update: Update, window: WindowUpdate, indices: list[int], start: int) -> list[int]:
    """Coordinates of the update that hit an element of the base."""
    at = [builder.index(0)] * len(update.space)
    for axis, result in enumerate(update.index.results[:-1]):
        for node in update.index.only(result).nodes:
            if node.op == "coord" and update.space[node.attr] > 1:
                shifted = builder.sub(indices[axis], start) if axis == window.axis else indices[axis]
                at[node.attr] = shifted
    return at
