"""Code of updates."""

from __future__ import annotations

import numpy as np

from jax_mpk.codegen import bodies
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Scalars, Term, product
from jax_mpk.codegen.cuda.texts import loader, rounded, title
from jax_mpk.graph.ir import Update
from jax_mpk.graph.regions import update_boxes, update_written
from jax_mpk.graph.windows import is_uniform


def emit_update(frame: Frame, member: int, op: Update) -> None:
    rank = len(frame.values[op.output].shape)
    low, extents, most = frame.box(member, rank)
    operands = [frame.array(v) for v in op.operands]
    base, output = frame.array(op.base), frame.array(op.output, store=True)
    frame.line(title(frame, op))
    if base.storage != output.storage or base.bytes != output.bytes:
        frame.meetings.meet([base], [output])
        coords, decode = frame.coordinates("n", low, extents, [f"i{d}" for d in range(rank)])
        frame.line(f"map(c, {product(extents).text}, [&](int n) {{")
        for text in (*decode, output.store(coords, base.load(coords))):
            frame.line(f"  {text}")
        frame.line("});")
    frame.meetings.meet([*operands, output], [output])
    boxes = frame.boxes[member]
    lo, hi = np.ascontiguousarray(boxes[:, 0, :rank]), np.ascontiguousarray(boxes[:, 1, :rank])
    first, last = update_boxes(op, lo, hi)
    written = update_written(op, lo, hi)
    nothing = np.any(written[1] <= written[0], axis=1) if rank else np.zeros(len(lo), bool)
    last = np.where(nothing[:, None], first, last)
    start = [frame.number(first[:, d]) for d in range(len(op.space))]
    size = [frame.number(np.maximum(last - first, 0)[:, d]) for d in range(len(op.space))]
    count = product(size)
    if nothing.all() or most == 0:
        return
    if not op.space:
        count = frame.number((~nothing).astype(np.int64))
    coords, decode = frame.coordinates("n", start, size, [f"u{d}" for d in range(len(op.space))])
    index = Scalars(op.index, coords, loader(operands), prefix="p")
    *at, inside = index.results()
    tests = [] if inside.text == "true" else [str(inside)]
    for d, term in enumerate(at):
        if not _contains(low[d], extents[d], term):
            tests.append(f"{term} >= {low[d]} && {term} < {low[d]} + {extents[d]}")
    head = "update_each" if _is_injective(op) else "update_in_order"
    value = Scalars(op.value, coords, loader(operands))
    result = value.results()[0]
    dtype = op.value.nodes[op.value.results[0]].dtype
    lines = list(value.lines)
    if op.combine.kind == "set":
        lines.append(output.store(at, rounded(result, dtype, output.dtype)))
    else:
        expr = bodies.combiner(op.combine, (dtype,))
        old = output.load(at) if output.dtype == dtype else f"convert<{dtype}>({output.load(at)})"
        lines.append(f"const {dtype} a = {old}, b = {result.text};")
        joined = Scalars(expr, [], lambda *_: "", lambda node: "a" if node.op == "acc" else "b", prefix="q")
        new = joined.results()[0]
        lines += joined.lines
        lines.append(output.store(at, rounded(new, expr.nodes[expr.results[0]].dtype, output.dtype)))
    frame.line(f"{head}(")
    frame.line(f"    c, {count.text},")
    frame.line("    [&](int n) -> s64 {")
    for text in (*decode, *index.lines):
        frame.line(f"      {text}")
    where = output.at(at)
    condition = " && ".join(tests)
    frame.line(f"      return {condition} ? s64({where}) : -1;" if tests else f"      return {where};")
    frame.line("    },")
    frame.line("    [&](int n) {")
    for text in (*decode, *index.lines, *lines):
        frame.line(f"      {text}")
    frame.line("    });")


def _contains(low: Term, extent: Term, at: Term) -> bool:
    """Whether a coordinate is known to lie in a range."""
    if low.value is None or extent.value is None or at.value is None:
        return False
    return low.value <= at.value < low.value + extent.value


def _is_injective(op: Update) -> bool:
    """Whether no two updates go to the same element: each coordinate is one target index, plus something fixed."""
    expr = op.index
    seen: set[int] = set()
    for root in expr.results[:-1]:
        node = expr.nodes[root]
        if node.op == "coord":
            seen.add(node.attr)
        elif node.op == "add":
            for this, other in (node.args, node.args[::-1]):
                if expr.nodes[this].op == "coord" and is_uniform(expr, other):
                    seen.add(expr.nodes[this].attr)
    return all(d in seen for d, extent in enumerate(op.space) if extent > 1)
