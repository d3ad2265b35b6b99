"""Contractions of factors in scratch: eight elements at a time, along the reduced axis or along a parallel one.

Where few positions are reduced, a factor may lie in device memory: nothing of it is read twice.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from jax_mpk.codegen import bodies
from jax_mpk.codegen.cuda.arrays import Array
from jax_mpk.codegen.cuda.registers import reduce_for_all
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Scalars, Term, fixed, offset, product
from jax_mpk.codegen.cuda.stream import factors
from jax_mpk.codegen.cuda.texts import group, loader, stores, title
from jax_mpk.graph.fuse_maps import programs
from jax_mpk.graph.ir import Nest, reads
from jax_mpk.graph.scalar import Builder, Expr, inline
from jax_mpk.graph.windows import Factor
from jax_mpk.graph.windows import factor as find_factor

#: Elements a thread loads at a time.
WIDTH = 8
#: Of what a task has room for, one in so many are expected to be live.
_LIVE = 2
#: Most positions of the reduced axis where factors lie in device memory.
_FEW = 16
_TYPES = ("bf16", "f16", "f32")


def tile(frame: Frame, member: int, op: Nest) -> bool:
    """Writes a contraction whose factors lie so; False where they do not."""
    if op.acc != ("f32",) or op.epilogue is None or (op.rspace[-1] % WIDTH and len(op.rspace) > 1):
        return False
    rank = len(op.space)
    found = [find_factor(op.body, r) for r in op.body.results]
    if any(f is None for f in found):
        return False
    slots = [op.body.nodes[f.load].attr for f in found if f is not None]
    arrays = [frame.array(v) for v in op.operands]
    kinds = ("local", "global") if math.prod(op.rspace) <= _FEW else ("local",)
    if any(arrays[s].kind not in kinds or arrays[s].wide or arrays[s].dtype not in _TYPES for s in slots):
        return False
    low, extents, most = frame.box(member, rank)
    live = frame.live.limits[member]
    if most == 0 or any(e.value is None and d not in live for d, e in enumerate(extents)):
        return False
    count = frame.live_count(member, rank)
    windowed = [f for f in found if f is not None and f.new >= 0]
    if windowed and any(arrays[s].kind != "local" for s in slots):
        return False
    if not all(_alone(frame, op, f) and _patch(frame, op, f, arrays, low, extents, dry=True) for f in windowed):
        return False
    # Conversions are written out where they do not keep every value, and new rows will lie in the old ones' place.
    loads = tuple(f.load for f in found if f is not None)
    bare = replace(op, body=Expr(op.body.nodes, loads, op.body.extents))
    code = factors(frame.plan.graph, bare, {s: arrays[s].strides for s in slots})
    if code is None:
        return False
    sides = (code.lhs, code.rhs)
    chains = [_conversions(op, root) for root in op.body.results]
    last = rank + len(op.rspace) - 1
    along = [d for d in range(rank) if extents[d].value != 1]
    depth = math.prod(op.rspace)
    starts = [_aligned(frame, member, op, s, arrays[s.slot]) for s in sides]
    dot = op.rspace[-1] % WIDTH == 0 and all(s.strides[last] == 1 for s in sides) and all(starts)
    dot &= all(_multiples(s.strides, {last}) for s in sides) and not any(chains) and count is None
    outer, d = -1, -1
    for axis in (a for a in along if extents[a].value is not None) if not dot else ():
        for k, s in enumerate(sides):
            fits = extents[axis].known % WIDTH == 0 and starts[k] and _multiples(s.strides, {axis}) and not chains[k]
            if s.strides[axis] == 1 and sides[1 - k].strides[axis] == 0 and fits:
                outer, d = k, axis
    if not dot and outer < 0:
        return False
    if windowed:
        nodes = op.body.nodes
        patched = [arrays[nodes[f.load].attr] for f in windowed]
        # What the other factor is made of may still be on its way.
        news = op.body.only(*(root for f in windowed for root in (f.start, f.new, *nodes[f.load].args)))
        needed = {news.nodes[i].attr for i in news.loads()}
        frame.meetings.meet([a for slot, a in enumerate(arrays) if slot in needed], patched)
        for f in windowed:
            _patch(frame, op, f, arrays, low, extents, dry=False)
    names = [f"i{d}" for d in range(rank)]
    if dot:
        steps = [*op.rspace[:-1], op.rspace[-1] // WIDTH]
        coords, decode = frame.coordinates("n", low, extents, names)
        inner, decode_inner = frame.whole("r", steps)
        inner[-1] = Term(f"{inner[-1]} * {WIDTH}", False) if inner[-1].value is None else inner[-1]
        texts = [_at(s, arrays[s.slot], [*coords, *inner]) for s in sides]
        body, join = f"return dot<{WIDTH}>({texts[0]}, {texts[1]});", ["return a + b;"]
        if reduce_for_all(frame, member, op, arrays, coords, depth // WIDTH, [*decode_inner, body], join):
            return True
        outputs = [frame.array(v, store=True) for v in op.outputs]
        frame.meetings.meet(arrays, outputs)
        frame.line(title(frame, op))
        lanes = group(most // _LIVE if any(e.value is None for e in extents) else most, depth // WIDTH)
        frame.line(f"reduce<f32, {lanes}, Spread::kStrided>(")
        frame.line(f"    c, {product(extents).text}, {depth // WIDTH},")
        frame.lines_of("[&](int n, int r) -> f32 {", [*decode, *decode_inner, body], "},")
        frame.lines_of("[&](f32 a, f32 b) -> f32 {", join, "},")
        finish = stores(op.epilogue, coords, loader(arrays), outputs, lambda node: "a")
        frame.lines_of("[&](int n, f32 a) {", [*decode, *finish], "});")
        return True
    outputs = [frame.array(v, store=True) for v in op.outputs]
    frame.meetings.meet(arrays, outputs)
    frame.line(title(frame, op))
    wide = [fixed(e.known // WIDTH) if k == d else e for k, e in enumerate(extents)]
    zero = [fixed(0) if k == d else t for k, t in enumerate(low)]
    coords, decode = frame.coordinates("n", zero, wide, names)
    first = Term(f"{coords[d]} * {WIDTH}" if coords[d].value is None else "0", False)
    if low[d].value != 0:
        first = Term(f"{low[d]} + {first}", False)
    group_coords = list(coords)
    group_coords[d] = first
    inner, decode_inner = frame.whole("r", op.rspace)
    texts = [_at(s, arrays[s.slot], [*group_coords, *inner]) for s in sides]
    frame.line(f"reduce_packs<{WIDTH}, {group(most // WIDTH, depth)}>(")
    frame.line(f"    c, {product(wide).text}, {depth if count is None else count.text},")
    factor = f"*({texts[1 - outer]})"
    for dtype in chains[1 - outer]:
        factor = f"convert<{dtype}>({factor})"
    body = f"return scaled<{WIDTH}>({texts[outer]}, {factor});"
    frame.lines_of(f"[&](int n, int r) -> Pack<{WIDTH}> {{", [*decode, *decode_inner, body], "},")
    element = list(coords)
    element[d] = Term("i")
    finish = stores(op.epilogue, element, loader(arrays), outputs, lambda node: "sum")
    frame.lines_of("[&](int n, int e, f32 sum) {", [*decode, f"const int i = {first.text} + e;", *finish], "});")
    return True


def _conversions(op: Nest, root: int) -> list[str]:
    """Types that a factor passes through on its way to the accumulator's, where that changes values."""
    if bodies.exact_conversions(op.body, root, op.acc[0]):
        return []
    chain = []
    node = op.body.nodes[root]
    while node.op == "convert":
        chain.append(node.dtype)
        node = op.body.nodes[node.args[0]]
    return chain[::-1]


def _alone(frame: Frame, op: Nest, factor: Factor) -> bool:
    """Whether a factor's old rows are read by it only: others would find the new rows in their place."""
    slot = op.body.nodes[factor.load].attr
    loads = [expr.nodes[i].attr for expr in programs(op) for i in expr.loads()]
    readers = [other for other in frame.ops if op.operands[slot] in reads(other)]
    return loads.count(slot) == 1 and len(readers) == 1


def _multiples(strides: tuple[int, ...], but: set[int]) -> bool:
    return all(s % WIDTH == 0 for d, s in enumerate(strides) if d not in but)


def _aligned(frame: Frame, member: int, op: Nest, side: bodies.Factor, array: Array) -> bool:
    """Whether every task's first element of a factor lies at a multiple of the width."""
    low = frame.boxes[member][:, 0, : len(op.space)]
    first = side.constant + low @ np.array(side.strides[: len(op.space)], np.int64)
    if array.kind == "local":
        first = first - frame.low_corner(op.operands[side.slot]) @ np.array(array.strides, np.int64)
    return bool(np.all(first % WIDTH == 0))


def _at(side: bodies.Factor, array: Array, coords: list[Term]) -> str:
    terms = offset(coords, side.strides)
    text = f"{array.name} + {terms}" if terms != "0" else array.name
    if side.constant:
        text += f" + {side.constant}"
    return f"{text} - {array.origin}" if array.origin else text


def _patch(
    frame: Frame, op: Nest, f: Factor, arrays: list[Array], low: list[Term], extents: list[Term], *, dry: bool
) -> bool:
    """Overwrites the window of a factor in scratch with the new rows. ``dry``: only says whether that is possible."""
    body, rank = op.body, len(op.space)
    base, new = body.nodes[f.load], body.nodes[f.new]
    b = Builder(body.extents)
    where = base.args[f.axis]
    roots = inline(b, Expr(body.nodes, (where, f.start), body.extents), b.coords(), b.load)
    terms, _ = b.linear(roots[0])
    moving = [
        (b.nodes[a].attr, k)
        for a, k in terms.items()
        if b.nodes[a].op == "coord" and (b.nodes[a].attr >= rank or extents[b.nodes[a].attr].value != 1)
    ]
    if len(moving) != 1 or moving[0][1] != 1:
        return False
    coord = int(moving[0][0])
    used = sorted({body.nodes[i].attr for i in _coords(body, base.args)} | {coord})
    fresh = {body.nodes[i].attr for i in _coords(body, new.args[1:])}
    if not fresh <= set(used):
        return False
    if dry:
        return True
    lows = [*low, *[fixed(0)] * len(op.rspace)]
    sizes = [*extents, *[fixed(e) for e in op.rspace]]
    others = [c for c in used if c != coord]
    length = f.length
    coords: list[Term] = [fixed(0)] * len(lows)
    terms_of, decode = frame.coordinates(
        "n",
        [fixed(0), *[lows[c] for c in others]],
        [fixed(length), *[sizes[c] for c in others]],
        ["j", *[f"i{c}" for c in others]],
    )
    for c, term in zip(others, terms_of[1:], strict=True):
        coords[c] = term
    for c in range(len(lows)):
        if c not in used:
            coords[c] = lows[c]
    s = Scalars(Expr(body.nodes, (where, f.start), body.extents), coords, loader(arrays), prefix="w")
    offset_term, start_term = s.results()
    name = f"i{coord}"
    lines = [*decode, *s.lines]
    lines.append(f"const int {name} = {start_term} + {terms_of[0]} - ({offset_term.text});")
    lines.append(f"if ({name} < {lows[coord]} || {name} >= {lows[coord]} + {sizes[coord]}) return;")
    coords[coord] = Term(name)
    pair = Scalars(Expr(body.nodes, (*base.args, *new.args[1:]), body.extents), coords, loader(arrays), prefix="x")
    places = pair.results()
    lines += pair.lines
    into, source = arrays[base.attr], arrays[new.attr]
    lines.append(into.store(places[: len(base.args)], source.load(places[len(base.args) :])))
    frame.line(f"// new rows, in the place of those the update will overwrite  {op.source.line.rpartition('/')[2]}")
    count = product([fixed(length), *[sizes[c] for c in others]])
    frame.line(f"map(c, {count.text}, [&](int n) {{")
    for text in lines:
        frame.line(f"  {text}")
    frame.line("});")
    return True


def _coords(expr: Expr, args: tuple[int, ...]) -> list[int]:
    """Coordinate nodes that index nodes depend on."""
    needed = set(args)
    for i in range(len(expr.nodes) - 1, -1, -1):
        if i in needed:
            needed.update(expr.nodes[i].args)
    return [i for i in needed if expr.nodes[i].op == "coord"]
