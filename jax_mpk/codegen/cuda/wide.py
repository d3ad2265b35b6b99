"""Maps and reductions of many elements that lie beside each other: eight of them at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jax_mpk.codegen.cuda.arrays import Array
from jax_mpk.codegen.cuda.code import WARPS
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Load, Scalars, Term, fixed, product
from jax_mpk.codegen.cuda.texts import group, loader, rounded, stores, title
from jax_mpk.graph.fuse_maps import work
from jax_mpk.graph.ir import Nest
from jax_mpk.graph.scalar import Builder, Expr, inline

#: Elements at a time.
WIDTH = 8
#: Fewer elements are better spread over all threads; of those that are little work, fewer than one for each thread.
_LEAST, _LEAST_LIGHT = WIDTH * WARPS * 32, WARPS * 32 + 1
#: Most additions an element that are little work: as many as normalizing it takes.
_LIGHT = 8.0
#: Combinations of one accumulator that commute.
_KINDS = ("sum", "prod", "max", "min")


@dataclass(frozen=True)
class _Step:
    """How an index depends on the element within a group: ``multiple * something + slope * element``."""

    slope: int
    multiple: int


def wide_map(frame: Frame, member: int, op: Nest) -> bool:
    """Writes a map eight elements at a time; False where its elements do not lie so."""
    rank = len(op.space)
    if frame.live.limits[member]:
        return False
    low, extents, most = frame.box(member, rank)
    along = [d for d in range(rank) if extents[d].value != 1]
    least = _LEAST_LIGHT if work(op.body) <= _LIGHT else _LEAST
    if most < least or not along or extents[along[-1]].value is None:
        return False
    axis = along[-1]
    boxes = frame.boxes[member]
    if extents[axis].known % WIDTH or np.any(boxes[:, 0, axis] % WIDTH):
        return False
    arrays = [frame.array(v) for v in op.operands]
    outputs = [frame.array(v, store=True) for v in op.outputs]
    vectors = _vectors(frame, op, op.body, arrays, axis)
    written = [_storable(frame, v, out, axis) for v, out in zip(op.outputs, outputs, strict=True)]
    if not any(written):
        return False
    frame.meetings.meet(arrays, outputs)
    frame.line(f"{title(frame, op)}, {WIDTH} at a time")
    groups = [fixed(e.known // WIDTH) if d == axis else e for d, e in enumerate(extents)]
    zero = [fixed(0) if d == axis else t for d, t in enumerate(low)]
    coords, decode = frame.coordinates("n", zero, groups, [f"i{d}" for d in range(rank)])
    first, at_e = _group(coords, axis, low[axis])
    frame.line(f"map(c, {product(groups).text}, [&](int n) {{")
    lines = [*decode, *_packs(op.body, first, arrays, vectors)]
    lines += [f"Packed<{out.dtype}, {WIDTH}> y{k};" for k, out in enumerate(outputs) if written[k]]
    s = Scalars(op.body, at_e, _lane(loader(arrays), vectors))
    results = s.results()
    inner = list(s.lines)
    for k, (root, term, out) in enumerate(zip(op.body.results, results, outputs, strict=True)):
        value = rounded(term, op.body.nodes[root].dtype, out.dtype)
        inner.append(f"y{k}.e[e] = {value};" if written[k] else out.store(at_e, value))
    lines += _unrolled(inner)
    lines += [
        f"*reinterpret_cast<Packed<{out.dtype}, {WIDTH}>*>({out.name} + {out.at(first)}) = y{k};"
        for k, out in enumerate(outputs)
        if written[k]
    ]
    for text in lines:
        frame.line(f"  {text}")
    frame.line("});")
    return True


def wide_reduce(
    frame: Frame, member: int, op: Nest, combined: Callable[..., list[str]], *, least: int = _LEAST
) -> bool:
    """Writes a reduction along consecutive elements eight at a time; False where they do not lie so.

    Args:
      frame: the routine's frame.
      member: position of the reduction.
      op: the reduction.
      combined: statements that join accumulators a and b.
      least: fewest elements of a task.
    """
    assert op.combine is not None and op.epilogue is not None
    rank, depth = len(op.space), math.prod(op.rspace)
    if (
        frame.live.limits[member]
        or op.combine.kind not in _KINDS
        or op.acc != ("f32",)
        or not op.rspace
        or op.rspace[-1] % WIDTH
    ):
        return False
    low, extents, most = frame.box(member, rank)
    if most * depth < least or most < 2:
        return False
    axis = rank + len(op.rspace) - 1
    arrays = [frame.array(v) for v in op.operands]
    outputs = [frame.array(v, store=True) for v in op.outputs]
    vectors = _vectors(frame, op, op.body, arrays, axis)
    if not vectors:
        return False
    frame.meetings.meet(arrays, outputs)
    frame.line(f"{title(frame, op)}, {WIDTH} at a time")
    coords, decode = frame.coordinates("n", low, extents, [f"i{d}" for d in range(rank)])
    steps = [*op.rspace[:-1], op.rspace[-1] // WIDTH]
    inner, decode_inner = frame.whole("r", steps)
    first, at_e = _group([*coords, *inner], axis, fixed(0))
    s = Scalars(op.body, at_e, _lane(loader(arrays), vectors))
    (term,) = s.results()
    value = rounded(term, op.body.nodes[op.body.results[0]].dtype, "f32")
    body = [*decode, *decode_inner, *_packs(op.body, first, arrays, vectors), "f32 a;"]
    join = combined(op.combine, op.acc)
    joined = [*join[:-1], join[-1].replace("return ", "a = ")]
    body += _unrolled([*s.lines, f"const f32 b = {value};", "if (e == 0) {", "  a = b;", "} else {"] + [
        *(f"  {text}" for text in joined), "}"
    ])  # fmt: skip
    frame.line(f"reduce<f32, {group(most, depth // WIDTH)}, Spread::kStrided>(")
    frame.line(f"    c, {product(extents).text}, {depth // WIDTH},")
    frame.lines_of("[&](int n, int r) -> f32 {", [*body, "return a;"], "},")
    frame.lines_of("[&](f32 a, f32 b) -> f32 {", join, "},")
    finish = stores(op.epilogue, coords, loader(arrays), outputs, lambda node: "a")
    frame.lines_of("[&](int n, f32 a) {", [*decode, *finish], "});")
    return True


def _group(coords: Sequence[Term], axis: int, low: Term) -> tuple[list[Term], list[Term]]:
    """Coordinates of a group's first element, and of its element ``e``; coordinate ``axis`` counts groups."""
    text = f"{coords[axis]} * {WIDTH}" if coords[axis].value is None else "0"
    if low.value != 0:
        text = f"{low} + {text}"
    first, each = list(coords), list(coords)
    first[axis], each[axis] = Term(text, False), Term(f"{text} + e", False)
    return first, each


def _unrolled(lines: Sequence[str]) -> list[str]:
    head = ["#pragma unroll", f"for (int e = 0; e < {WIDTH}; ++e) {{"]
    return [*head, *(f"  {text}" for text in lines), "}"]


def _lane(load: Load, vectors: dict[int, int]) -> Load:
    """Loads of element ``e`` of a group."""

    def of(slot: int, indices: list[Term], dtype: str, pred: str | None) -> str:
        return f"x{slot}.e[e]" if slot in vectors else load(slot, indices, dtype, pred)

    return of


def _packs(body: Expr, first: Sequence[Term], arrays: Sequence[Array], vectors: dict[int, int]) -> list[str]:
    """Statements that load the groups."""
    lines: list[str] = []
    for slot, load in vectors.items():
        s = Scalars(Expr(body.nodes, body.nodes[load].args, body.extents), first, loader(arrays), prefix=f"p{slot}_")
        at = arrays[slot].at(s.results())
        lines += [*s.lines, f"const auto x{slot} = packed<{WIDTH}>({arrays[slot].name} + {at});"]
    return lines


def _vectors(frame: Frame, op: Nest, body: Expr, arrays: Sequence[Array], axis: int) -> dict[int, int]:
    """Slot → load, of operands loaded once whose elements lie as those of coordinate ``axis`` do."""
    loads: dict[int, list[int]] = {}
    for i in body.loads():
        loads.setdefault(body.nodes[i].attr, []).append(i)
    found = {}
    for slot, nodes in loads.items():
        array, node = arrays[slot], body.nodes[nodes[0]]
        if len(nodes) > 1 or node.op != "load" or array.kind not in ("local", "global") or array.wide:
            continue
        if consecutive(body, node.args, array.strides, axis) and corner(frame, op.operands[slot], array):
            found[slot] = nodes[0]
    return found


def consecutive(body: Expr, indices: Sequence[int], strides: Sequence[int], axis: int) -> bool:
    """Whether elements at some indices lie beside each other along a coordinate, whose groups are aligned."""
    b = Builder(body.extents)
    at = inline(b, Expr(body.nodes, tuple(indices), body.extents), b.coords(), b.load)
    steps = [_step(b, i, axis) for i in at]
    known = [(step.slope * s, step.multiple * s) for step, s in zip(steps, strides, strict=True) if step]
    return (
        len(known) == len(steps)
        and sum(slope for slope, _ in known) == 1
        and math.gcd(*(multiple for _, multiple in known)) % WIDTH == 0
    )


def corner(frame: Frame, v: int, array: Array) -> bool:
    """Whether what lies first in scratch keeps groups aligned."""
    if v in frame.views or v in frame.live.shifts:
        return False
    if array.kind != "local":
        return True
    return bool(np.all(frame.low_corner(v) @ np.array(array.strides, np.int64) % WIDTH == 0))


def _storable(frame: Frame, v: int, out: Array, axis: int) -> bool:
    """Whether a group of an output's elements is stored at once."""
    if (
        out.kind not in ("local", "global")
        or out.wide
        or out.copy is not None
        or out.strides[axis] != 1
        or not corner(frame, v, out)
    ):
        return False
    shape = out.shape
    return all(s % WIDTH == 0 for d, s in enumerate(out.strides) if d != axis and shape[d] > 1)


def _step(b: Builder, i: int, axis: int) -> _Step | None:
    """How index node ``i`` depends on coordinate ``axis``, whose groups begin at multiples of the width."""
    node = b.nodes[i]
    if node.op == "const":
        return _Step(0, int(b.const_value(i) or 0))
    if node.op == "coord":
        return _Step(1, WIDTH) if node.attr == axis else _Step(0, 1)
    steps = [step for a in node.args if (step := _step(b, a, axis)) is not None]
    if len(steps) < len(node.args):
        return None
    if all(step.slope == 0 for step in steps) and node.op not in ("add", "sub", "mul"):
        return _Step(0, 1)
    if len(steps) != 2:
        return None
    x, y = steps
    constant = b.const_value(node.args[1])
    if node.op in ("add", "sub"):
        return _Step(x.slope + (y.slope if node.op == "add" else -y.slope), math.gcd(x.multiple, y.multiple))
    if node.op == "mul":
        factor = constant if constant is not None else b.const_value(node.args[0])
        other = x if constant is not None else y
        if factor is None:
            return _Step(0, 1) if x.slope == y.slope == 0 else None
        return _Step(other.slope * factor, other.multiple * factor)
    if node.op in ("div", "rem") and constant and constant > 0 and constant % WIDTH == 0 and b.ranges[node.args[0]]:
        # A group lies between two multiples of the divisor; negative indices are none of ours.
        low = b.ranges[node.args[0]]
        if x.slope == 1 and x.multiple % WIDTH == 0 and low is not None and low[0] >= 0:
            return _Step(0, 1) if node.op == "div" else _Step(1, math.gcd(x.multiple, constant))
    return None
