"""Contractions on tensor cores whose large factor lies in device memory and whose small one lies in scratch.

The large one may be windowed: some of its rows lie elsewhere. Its consecutive axis is the reduced one (keys), or a
parallel one (values).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jax_mpk.codegen.cuda.arrays import Array
from jax_mpk.codegen.cuda.code import PACED, WARPS, Stream
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Scalars, Term, fixed, product
from jax_mpk.codegen.cuda.texts import loader, stores, title
from jax_mpk.codegen.cuda.wide import WIDTH, consecutive, corner
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Nest
from jax_mpk.graph.scalar import Builder, Expr, inline
from jax_mpk.graph.windows import Factor
from jax_mpk.graph.windows import factor as find_factor

_TYPES = ("bf16", "f16")
#: Fewer rows, or positions of the reduced axis, are not worth it. Accumulators and loads must fit into registers.
_LEAST, _MOST_COLUMNS, _MOST_SUMS = 64, 32, 4


@dataclass(frozen=True)
class _Split:
    """The parallel axes of a contraction: those of the large factor, those of the small one."""

    large: list[int]
    small: list[int]


@dataclass(frozen=True)
class _Side:
    """First element and strides of the small factor."""

    constant: int
    strides: tuple[int, ...]


def direct(frame: Frame, member: int, op: Nest) -> bool:
    """Writes a contraction as ``multiply_rows`` or ``multiply_columns``; False where it is neither."""
    if op.acc != ("f32",) or op.epilogue is None or len(op.rspace) != 1 or len(op.body.results) != 2:
        return False
    if not frame.live.shifts.keys().isdisjoint(op.operands):
        return False
    found = [find_factor(op.body, r) for r in op.body.results]
    if any(f is not None and f.bound >= 0 for f in found):
        return False
    types = [_types(op.body, r) for r in op.body.results]
    for k in range(2):
        large, small = found[k], found[1 - k]
        # Elements of the large factor are multiplied as they are, those of the small one as they are or rounded alike.
        fits = len(types[k]) == 1 and types[1 - k] in (types[k], ["f32", *types[k]])
        if fits and large is not None and small is not None and small.new < 0:
            if _emit(frame, member, op, large, small):
                return True
    return False


def _emit(frame: Frame, member: int, op: Nest, large: Factor, small: Factor) -> bool:
    assert op.epilogue is not None
    rank, body, depth = len(op.space), op.body, op.rspace[0]
    arrays = [frame.array(v) for v in op.operands]
    x = arrays[body.nodes[small.load].attr]
    sources = [arrays[body.nodes[i].attr] for i in (large.load, large.new) if i >= 0]
    dtype = sources[0].dtype
    if x.kind != "local" or dtype not in _TYPES or sources[0].kind != "global":
        return False
    if any(a.wide or a.kind not in ("local", "global") for a in sources):
        return False
    low, extents, _ = frame.box(member, rank)
    split = _split(frame, op, large, small, extents)
    side = _side(frame, op, small, x)
    if split is None or side is None:
        return False
    columns = math.prod(extents[d].known for d in split.small)
    moving = [d for d in split.small if extents[d].value != 1]
    step = side.strides[moving[0]] if moving else 0
    if columns > _MOST_COLUMNS or len(moving) > 1 or any(side.strides[d] for d in split.large):
        return False
    along = [d for d in split.large if extents[d].value != 1]
    start = _start(x, side, split.small, low)
    if all(_lies(frame, op, i, arrays, rank) for i in (large.load, large.new) if i >= 0):
        rows = frame.boxes[member][:, 1, split.large] - frame.boxes[member][:, 0, split.large]
        if depth % 32 or step % WIDTH or rows.prod(axis=1).max(initial=0) < _LEAST:
            return False
        head = f"multiply_rows<{dtype}, {columns}, {depth}>("
        count = product([extents[d] for d in split.large]).text
        position, axes, at = "row", split.large, [fixed(0)]
    else:
        if not along or extents[along[-1]].value is None or depth % 4 or depth < _LEAST or step % 4:
            return False
        axis, length = along[-1], extents[along[-1]].known
        live = frame.live_count(member, rank)
        if len(along) > 1 or length % WIDTH or -(-length // 64) * -(-columns // 8) > _MOST_SUMS:
            return False
        if np.any(frame.boxes[member][:, 0, axis] % WIDTH):
            return False
        if not all(_lies(frame, op, i, arrays, axis) for i in (large.load, large.new) if i >= 0):
            return False
        head = f"multiply_columns<{dtype}, {columns}, {length}>("
        count = str(depth) if live is None else live.text
        position, axes, at = "k", [], [Term("k")]
        frame.code.partials = max(frame.code.partials, WARPS * -(-length // 64) * 64 * columns * 4)
    _prefetch(frame, member, op, large, sources[0], rank if position == "k" else -1)
    outputs = [frame.array(v, store=True) for v in op.outputs]
    frame.meetings.meet(arrays, outputs, joins=position == "k")
    coords = [fixed(0) if extents[d].value != 1 else low[d] for d in range(rank)]
    pointed = list(coords)
    for d in along:
        pointed[d] = low[d]
    lines: list[str] = []
    if axes:
        terms, lines = frame.coordinates(position, [low[d] for d in axes], [extents[d] for d in axes], _names(axes))
        for d, term in zip(axes, terms, strict=True):
            pointed[d] = term
    frame.line(f"{title(frame, op)}: {dtype} from device memory")
    frame.line(head)
    frame.line(f"    c, {count}, {start}, {step},")
    pointer = _pointer(op, large, [*pointed, *at], arrays)
    frame.lines_of(f"[&](int {position}) -> const {dtype}* {{", [*lines, *pointer], "},")
    decode: list[str] = []
    first = "row" if axes else "d"
    for name, group in ((first, split.large), ("m", split.small)):
        terms, more = frame.coordinates(name, [low[d] for d in group], [extents[d] for d in group], _names(group))
        decode += more
        for d, term in zip(group, terms, strict=True):
            coords[d] = term
    finish = stores(op.epilogue, coords, loader(arrays), outputs, lambda node: "sum")
    frame.lines_of(f"[&](int {first}, int m, f32 sum) {{", [*decode, *finish], "});")
    return True


def _names(axes: list[int]) -> list[str]:
    return [f"i{d}" for d in axes]


def _pointer(op: Nest, large: Factor, coords: list[Term], arrays: list[Array]) -> list[str]:
    """Statements that return where a row of the large factor begins."""
    body = op.body
    nodes = [(body.nodes[large.load].attr, body.nodes[large.load].args)]
    roots = list(nodes[0][1])
    if large.new >= 0:
        fresh = body.nodes[large.new]
        nodes.append((fresh.attr, fresh.args[1:]))
        roots += [fresh.args[0], *fresh.args[1:]]
    s = Scalars(Expr(body.nodes, tuple(roots), body.extents), coords, loader(arrays))
    terms = s.results()
    rank = len(nodes[0][1])
    lines = list(s.lines)
    if large.new >= 0:
        array = arrays[nodes[1][0]]
        lines.append(f"if ({terms[rank].text}) return {array.name} + ({array.at(terms[rank + 1 :])});")
    array = arrays[nodes[0][0]]
    return [*lines, f"return {array.name} + ({array.at(terms[:rank])});"]


def _lies(frame: Frame, op: Nest, load: int, arrays: list[Array], axis: int) -> bool:
    """Whether elements of a load lie beside each other along a coordinate, in aligned groups."""
    node = op.body.nodes[load]
    args = node.args[1:] if node.op == "load_if" else node.args
    array = arrays[node.attr]
    return consecutive(op.body, args, array.strides, axis) and corner(frame, op.operands[node.attr], array)


def _types(body: Expr, root: int) -> list[str]:
    """Types a factor's elements go through, from the load on; without conversions to f32, which change no value."""
    node = body.nodes[root]
    types: list[str] = []
    while node.op == "convert":
        types.insert(0, node.dtype)
        node = body.nodes[node.args[0]]
    return [node.dtype, *(t for t in types if t != "f32")]


def _side(frame: Frame, op: Nest, small: Factor, x: Array) -> _Side | None:
    """How the small factor lies, if that is contiguous along the reduced axis, and aligned."""
    rank = len(op.space)
    node = op.body.nodes[small.load]
    if op.operands[node.attr] in frame.views:
        return None
    affine = _affine(op.body, small.load, x)
    if affine is None:
        return None
    constant, strides = affine
    low = frame.low_corner(op.operands[node.attr]) @ np.array(x.strides, np.int64)
    steps = [s for d, s in enumerate(strides[:rank]) if op.space[d] > 1]
    if strides[rank] != 1 or constant % WIDTH or np.any(low % WIDTH) or any(s % WIDTH for s in steps):
        return None
    return _Side(constant, tuple(strides[:rank]))


def _affine(body: Expr, load: int, array: Array) -> tuple[int, list[int]] | None:
    """First element and strides of a load, if its index is affine in the coordinates."""
    b = Builder(body.extents)
    at = inline(b, Expr(body.nodes, body.nodes[load].args, body.extents), b.coords(), b.load)
    constant, strides = 0, [0] * len(body.extents)
    for i, stride in zip(at, array.strides, strict=True):
        terms, shift = b.linear(i)
        constant += shift * stride
        for atom, k in terms.items():
            if b.nodes[atom].op != "coord":
                return None
            strides[b.nodes[atom].attr] += k * stride
    return constant, strides


def _prefetch(frame: Frame, member: int, op: Nest, large: Factor, source: Array, axis: int) -> None:
    """Has the producer bring the large factor to the L2 cache, where its rows differ in one coordinate.

    Args:
      frame, member, op, large: the contraction.
      source: where the factor lies.
      axis: the coordinate that tells its rows apart; -1: the only parallel one along which it is read.
    """
    rank, boxes, item = len(op.space), frame.boxes[member], dtypes.itemsize(source.dtype)
    affine = _affine(op.body, large.load, source)
    if affine is None:
        return
    constant, strides = affine
    sizes = np.maximum(boxes[:, 1, :rank] - boxes[:, 0, :rank], 0)
    moving = [d for d in range(rank) if strides[d] and np.any(sizes[:, d] != 1)]
    if len(moving) != 1:
        return
    elements = sizes[:, moving[0]]
    reduced = np.full_like(elements, op.rspace[0])
    rows, run = (reduced, elements) if axis == rank else (elements, reduced)
    axis = axis if axis >= 0 else moving[0]
    stride = strides[axis] * item
    if stride % 32 or stride <= 0 or np.any(rows == 0):
        return
    live: tuple[str, ...] = ()
    if (count := frame.live.limits[member].get(axis)) is not None:
        found = frame.first_and_count(None, count)
        if found is None:
            return
        live, rows = found
    first = (constant + boxes[:, 0, :rank] @ np.array(strides[:rank], np.int64)) * item
    frame.code.streams.append(Stream(source.storage, PACED, first, run * item, rows, stride, live))


def _split(frame: Frame, op: Nest, large: Factor, small: Factor, extents: list[Term]) -> _Split | None:
    """Which factor each parallel axis belongs to; None where one belongs to both, or to a part of unknown size."""
    body = op.body
    used = []
    for f in (large, small):
        needed = set(body.nodes[f.load].args) | (set(body.nodes[f.new].args) if f.new >= 0 else set())
        for i in range(len(body.nodes) - 1, -1, -1):
            if i in needed:
                needed.update(body.nodes[i].args)
        used.append({body.nodes[i].attr for i in needed if body.nodes[i].op == "coord"})
    moving = {d for d, e in enumerate(extents) if e.value != 1}
    if moving & used[0] & used[1] or any(extents[d].value is None for d in moving - used[0]):
        return None
    rest = [d for d in range(len(extents)) if d in used[0] and d in moving]
    return _Split(rest, [d for d in range(len(extents)) if d not in rest])


def _start(x: Array, side: _Side, axes: list[int], low: list[Term]) -> str:
    """Where the small factor's first column begins."""
    at = [f"{t} * {side.strides[d]}" for d, t in enumerate(low) if side.strides[d] and t.value != 0]
    start = " + ".join([x.name, *([str(side.constant)] if side.constant else []), *at])
    return f"{start} - {x.origin}" if x.origin else start
