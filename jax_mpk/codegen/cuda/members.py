"""Code of the members of a routine: maps, reductions and contractions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from jax_mpk.codegen import bodies
from jax_mpk.codegen.cuda.arrays import Array
from jax_mpk.codegen.cuda.routine import Frame, product
from jax_mpk.codegen.cuda.scalars import Scalars, Term
from jax_mpk.codegen.cuda.stream import stream_rows
from jax_mpk.graph.ir import Combine, Nest
from jax_mpk.graph.scalar import Expr, Node

#: Accumulators of one output by all threads rather than by one warp, from this depth on and up to so many outputs.
_TOGETHER_DEPTH, _TOGETHER_OUTPUTS = 512, 8


def title(op: Nest, frame: Frame) -> str:
    """The comment above a member."""
    out = ", ".join(f"{frame.values[v].dtype}[{','.join(map(str, frame.values[v].shape))}]" for v in op.outputs)
    over = f" over {'×'.join(map(str, op.rspace))}" if op.rspace else ""
    return f"// {op.kind} {out}{over}  {op.source.line}"


def loader(operands: Sequence[Array]) -> Callable[[int, list[Term], str, str | None], str]:
    return lambda slot, indices, dtype, pred: operands[slot].load(indices)


def stores(
    frame: Frame, expr: Expr, coords: list[Term], load: object, outputs: Sequence[Array], leaf: object = None
) -> list[str]:
    """Statements that compute the results of a program and store them."""
    s = Scalars(expr, coords, load, leaf)  # type: ignore[arg-type]
    results = s.results()
    lines = list(s.lines)
    for root, term, output in zip(expr.results, results, outputs, strict=True):
        source = expr.nodes[root].dtype
        at = coords if len(coords) == len(output.strides) else coords
        lines.append(output.store(at, rounded(term, source, output.dtype)))
    return lines


def rounded(term: Term, source: str, dtype: str) -> str:
    return term.text if source == dtype else f"convert<{dtype}>({term.text})"


def emit_map(frame: Frame, member: int, op: Nest) -> None:
    low, extents, most = frame.box(member, len(op.space))
    operands = [frame.array(v) for v in op.operands]
    outputs = [frame.array(v, store=True) for v in op.outputs]
    frame.meet(operands, outputs)
    frame.line(title(op, frame))
    if most == 0:
        return
    names = [f"i{d}" for d in range(len(low))]
    coords, lines = frame.coordinates("n", low, extents, names)
    frame.line(f"map(c, {product(extents).text}, [&](int n) {{")
    for text in (*lines, *stores(frame, op.body, coords, loader(operands), outputs)):
        frame.line(f"  {text}")
    frame.line("});")


def emit_contract(frame: Frame, member: int, op: Nest) -> None:
    if stream_rows(frame, member, op):
        return
    kind = "or" if op.acc[0] == "b1" else "sum"
    emit_reduce(frame, member, replace(op, body=bodies.product(op), combine=Combine(kind)))


def emit_reduce(frame: Frame, member: int, op: Nest) -> None:
    assert op.combine is not None and op.epilogue is not None
    rank = len(op.space)
    low, extents, most = frame.box(member, rank)
    operands = [frame.array(v) for v in op.operands]
    outputs = [frame.array(v, store=True) for v in op.outputs]
    frame.meet(operands, outputs)
    frame.line(title(op, frame))
    if most == 0:
        return
    depth = math.prod(op.rspace)
    names = [f"i{d}" for d in range(rank)]
    coords, decode = frame.coordinates("n", low, extents, names)
    zero, full = Term("0", value=0), [Term(str(e), value=e) for e in op.rspace]
    inner, decode_inner = frame.coordinates("r", [zero] * len(full), full, [f"r{d}" for d in range(len(full))])
    acc = accumulator(frame, op.acc)
    body = body_lines(op, [*coords, *inner], loader(operands))
    combine = combine_lines(op)
    finish = stores(frame, op.epilogue, coords, loader(operands), outputs, lambda node: field(op.acc, "a", node))
    commutes = op.combine.kind != "generic"
    spread = "Spread::kStrided" if commutes else "Spread::kRuns"
    if depth >= _TOGETHER_DEPTH and most <= _TOGETHER_OUTPUTS:
        head = f"reduce_together<{acc}, {spread}>"
    else:
        head = f"reduce<{acc}, {_group(most, depth)}, {spread}>"
    frame.line(f"{head}(")
    frame.line(f"    c, {product(extents).text}, {depth},")
    _lambda(frame, f"[&](int n, int r) -> {acc} {{", [*decode, *decode_inner, *body], "},")
    _lambda(frame, f"[&]({acc} a, {acc} b) -> {acc} {{", combine, "},")
    _lambda(frame, f"[&](int n, {acc} a) {{", [*decode, *finish], "});")
    frame.code.partials = max(frame.code.partials, 64 * 16)


def _lambda(frame: Frame, head: str, lines: Sequence[str], end: str) -> None:
    frame.line(f"    {head}")
    for text in lines:
        frame.line(f"      {text}")
    frame.line(f"    {end}")


def _group(outputs: int, depth: int) -> int:
    """Lanes that share an output."""
    group = 1
    while group < 32 and group * 2 <= depth and outputs * group < 256:
        group *= 2
    return group


def accumulator(frame: Frame, types: Sequence[str]) -> str:
    """The C++ type of a set of accumulators."""
    return types[0] if len(types) == 1 else f"Accumulators<{', '.join(types)}>"


def field(types: Sequence[str], name: str, node: Node) -> str:
    return name if len(types) == 1 else f"{name}.template get<{node.attr}>()"


def made(types: Sequence[str], values: Sequence[str]) -> str:
    return values[0] if len(types) == 1 else f"Accumulators<{', '.join(types)}>({', '.join(values)})"


def body_lines(op: Nest, coords: list[Term], load: object) -> list[str]:
    """Statements of a reduction's body, ending in a return."""
    s = Scalars(op.body, coords, load)  # type: ignore[arg-type]
    values = [
        rounded(term, op.body.nodes[root].dtype, dtype)
        for term, root, dtype in zip(s.results(), op.body.results, op.acc)
    ]
    assert op.combine is not None
    if op.combine.kind in ("argmax", "argmin"):
        values.append(coords[len(op.space)].text)
    return [*s.lines, f"return {made(op.acc, values)};"]


def combine_lines(op: Nest) -> list[str]:
    """Statements that join accumulators a and b, ending in a return."""
    assert op.combine is not None
    expr = bodies.combiner(op.combine, tuple(op.acc))
    s = Scalars(expr, [], lambda *_: "", lambda node: field(op.acc, "a" if node.op == "acc" else "b", node))
    values = [
        rounded(term, expr.nodes[root].dtype, dtype) for term, root, dtype in zip(s.results(), expr.results, op.acc)
    ]
    return [*s.lines, f"return {made(op.acc, values)};"]
