"""Code of maps and reductions, and of contractions that have no better one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from jax_mpk.codegen import bodies
from jax_mpk.codegen.cuda.columns import stream_columns
from jax_mpk.codegen.cuda.direct import direct
from jax_mpk.codegen.cuda.registers import reduce_for_all
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Load, Scalars, Term, constant, product
from jax_mpk.codegen.cuda.stream import stream_rows
from jax_mpk.codegen.cuda.texts import accumulator, accumulators, group, loader, made, partials, rounded, stores, title
from jax_mpk.codegen.cuda.tile import tile
from jax_mpk.codegen.cuda.wide import wide_map, wide_reduce
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Combine, Nest
from jax_mpk.graph.scalar import Expr

#: All threads share an output of at least this depth, if there are at most so many.
_TOGETHER_DEPTH, _TOGETHER_OUTPUTS = 512, 8


def emit_map(frame: Frame, member: int, op: Nest) -> None:
    if wide_map(frame, member, op):
        return
    low, extents, most = frame.box(member, len(op.space))
    operands = [frame.array(v) for v in op.operands]
    outputs = [frame.array(v, store=True) for v in op.outputs]
    frame.meetings.meet(operands, outputs)
    frame.line(title(frame, op))
    if most == 0:
        return
    coords, lines = frame.coordinates("n", low, extents, [f"i{d}" for d in range(len(low))])
    frame.line(f"map(c, {product(extents).text}, [&](int n) {{")
    for text in (*lines, *stores(op.body, coords, loader(operands), outputs)):
        frame.line(f"  {text}")
    frame.line("});")


def emit_contract(frame: Frame, member: int, op: Nest) -> None:
    if not frame.live.limits[member] and (stream_rows(frame, member, op) or stream_columns(frame, member, op)):
        return
    if tile(frame, member, op) or direct(frame, member, op):
        return
    kind = "or" if op.acc[0] == "b1" else "sum"
    emit_reduce(frame, member, replace(op, body=bodies.product(op), combine=Combine(kind)))


def emit_reduce(frame: Frame, member: int, op: Nest) -> None:
    assert op.combine is not None and op.epilogue is not None
    if wide_reduce(frame, member, op, combined):
        return
    rank, depth = len(op.space), math.prod(op.rspace)
    low, extents, most = frame.box(member, rank)
    count = frame.live_count(member, rank)
    together = count is None and depth >= _TOGETHER_DEPTH and most <= _TOGETHER_OUTPUTS
    if (factors := _factors(op)) is not None and tile(frame, member, factors):
        return
    operands = [frame.array(v) for v in op.operands]
    coords, decode = frame.coordinates("n", low, extents, [f"i{d}" for d in range(rank)])
    inner, decode_inner = frame.whole("r", op.rspace)
    acc = accumulators(op.acc)
    spread = "Spread::kRuns" if op.combine.kind == "generic" else "Spread::kStrided"
    at = [*coords, *inner]
    body = accumulated(op.body, op.combine, op.acc, at, loader(operands), at[rank].text)
    join = combined(op.combine, op.acc)
    if count is None and reduce_for_all(
        frame, member, op, operands, coords, depth, [*decode_inner, *body], join, spread
    ):
        return
    outputs = [frame.array(v, store=True) for v in op.outputs]
    frame.meetings.meet(operands, outputs, joins=together)
    frame.line(title(frame, op))
    if most == 0:
        return
    if count is not None:
        frame.line(f"reduce_live<{acc}, {group(most, depth)}>(")
        frame.line(f"    c, {product(extents).text}, {count.text}, {nothing(op.combine, acc)},")
    elif together:
        frame.line(f"reduce_together<{acc}, {spread}>(")
        frame.code.partials = max(frame.code.partials, partials(op.acc))
    else:
        frame.line(f"reduce<{acc}, {group(most, depth)}, {spread}>(")
    if count is None:
        frame.line(f"    c, {product(extents).text}, {depth},")
    frame.lines_of(f"[&](int n, int r) -> {acc} {{", [*decode, *decode_inner, *body], "},")
    frame.lines_of(f"[&]({acc} a, {acc} b) -> {acc} {{", join, "},")
    finish = stores(op.epilogue, coords, loader(operands), outputs, lambda node: accumulator(op.acc, "a", node))
    frame.lines_of(f"[&](int n, {acc} a) {{", [*decode, *finish], "});")
    if together:
        frame.meetings.met()


def _factors(op: Nest) -> Nest | None:
    """A sum of products in f32 as a contraction."""
    product = op.body.result()
    if op.combine != Combine("sum") or op.acc != ("f32",) or product.op != "mul" or product.dtype != "f32":
        return None
    return replace(op, kind="contract", combine=None, body=Expr(op.body.nodes, product.args, op.body.extents))


def nothing(combine: Combine, acc: str) -> str:
    """The accumulator that changes no other: of a sum or a maximum."""
    return constant(dtypes.to_bits(0.0 if combine.kind == "sum" else -math.inf, acc), acc).text


def accumulated(
    expr: Expr,
    combine: Combine,
    acc: Sequence[str],
    coords: Sequence[Term],
    load: Load,
    position: str,
    *,
    from_zero: bool = False,
) -> list[str]:
    """Statements that compute what a body contributes to the accumulators, ending in a return.

    Args:
      expr: the body.
      combine: how contributions join.
      acc: types of the accumulators.
      coords: the body's coordinates.
      load: text of a load.
      position: along the reduced axis.
      from_zero: sums start from +0, which shows where all terms are -0.
    """
    s = Scalars(expr, coords, load)
    values = [rounded(term, expr.nodes[root].dtype, dtype) for term, root, dtype in zip(s.results(), expr.results, acc)]
    if from_zero and combine.kind == "sum" and dtypes.is_float(acc[0]):
        values = [f"0 + {values[0]}"]
    if combine.kind in ("argmax", "argmin"):
        values.append(position)
    return [*s.lines, f"return {made(acc, values)};"]


def combined(combine: Combine, acc: Sequence[str]) -> list[str]:
    """Statements that join accumulators a and b, ending in a return."""
    expr = bodies.combiner(combine, tuple(acc))
    s = Scalars(expr, [], lambda *_: "", lambda node: accumulator(acc, "a" if node.op == "acc" else "b", node))
    values = [rounded(term, expr.nodes[root].dtype, dtype) for term, root, dtype in zip(s.results(), expr.results, acc)]
    return [*s.lines, f"return {made(acc, values)};"]
