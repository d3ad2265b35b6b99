"""Splits the keys of an attention over workers when there are more workers than heads.

    m = max_s x      e = exp(x − m)      l = Σ_s e      o = Σ_s (e / l)·v

becomes, with s = p·C + c for chunks p,

    m_p = max_c x    e_p = exp(x − m_p)  l_p = Σ_c e_p  o_p = Σ_c e_p·v          (one phase, one task per chunk)
    M = max_p m_p    w_p = exp(m_p − M)  o = Σ_p w_p·o_p / Σ_p w_p·l_p           (the consumer's prologue)

the split-KV form of FlashAttention (Dao et al., 2022). A chunk whose keys are all masked has m_p = −inf; m_p is
clamped to the smallest finite number, so e_p is 0 there and not NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from jax_mpk.graph.ir import Block, Combine, Graph, Nest, Op, Value
from jax_mpk.graph.rewrite import Slots, map_blocks, prune
from jax_mpk.graph.scalar import Builder, Expr, inline
from jax_mpk.graph.windows import is_identity
from jax_mpk.plan.ir import Target

#: Fewest keys in a chunk.
_MIN_CHUNK = 64


@dataclass(frozen=True)
class _Attention:
    """The five operators of one attention, and where its key axis is.

    Attributes:
      top, powers, total, shares: m, e, l and e / l above.
      out: the contraction with the values.
      axis: the key axis of ``powers``.
    """

    top: Nest
    powers: Nest
    total: Nest
    shares: Nest
    out: Nest
    axis: int


def split_softmax(graph: Graph, target: Target) -> Graph:
    """Rewrites every attention that leaves most workers idle."""
    values = list(graph.values)

    def visit(block: Block) -> Block:
        makers = {v: op for op in block.ops for v in op.outputs}
        uses: dict[int, int] = {}
        for op in block.ops:
            for v in set(op.operands):
                uses[v] = uses.get(v, 0) + 1
        ops: list[Op] = []
        for op in block.ops:
            found = _match(op, makers, uses) if isinstance(op, Nest) and op.kind == "contract" else None
            chunks = 0 if found is None else _chunks(found, target.workers)
            if found is not None and chunks > 1:
                ops += _split(values, found, chunks)
            else:
                ops.append(op)
        return prune(Block(tuple(ops), block.results), set())

    out = map_blocks(graph, visit)
    return replace(out, values=tuple(values))


def _chunks(found: _Attention, workers: int) -> int:
    """Number of chunks: as many as keep every worker at one task, a divisor of the keys."""
    keys = found.powers.space[found.axis]
    rows = math.prod(found.powers.space) // keys
    most = min(workers // max(rows, 1), keys // _MIN_CHUNK)
    return max((c for c in range(1, most + 1) if keys % c == 0), default=1)


# -- recognition -----------------------------------------------------------------------------------------------


def _match(out: Op, makers: dict[int, Op], uses: dict[int, int]) -> _Attention | None:
    assert isinstance(out, Nest)
    if len(out.rspace) != 1 or len(out.outputs) != 1:
        return None
    for load in out.body.loads():
        node = out.body.nodes[load]
        shares = makers.get(out.operands[node.attr])
        if node.op != "load" or not isinstance(shares, Nest) or uses[shares.outputs[0]] != 1:
            continue
        keys = [a for a, arg in enumerate(node.args) if _is_coord(out.body, arg, len(out.space))]
        if len(keys) == 1:
            return _match_shares(out, shares, keys[0], makers, uses)
    return None


def _match_shares(out: Nest, shares: Nest, axis: int, makers: dict[int, Op], uses: dict[int, int]) -> _Attention | None:
    body = shares.body
    node = body.nodes[_unconverted(body, body.results[0])]
    if shares.kind != "map" or len(shares.outputs) != 1 or node.op != "div":
        return None
    above, below = (body.nodes[a] for a in node.args)
    if above.op != "load" or below.op != "load" or not is_identity(body, above.args, shares.space):
        return None
    powers, total = (makers.get(shares.operands[n.attr]) for n in (above, below))
    if not isinstance(powers, Nest) or not isinstance(total, Nest) or powers.kind != "map":
        return None
    if uses[powers.outputs[0]] != 2 or uses[total.outputs[0]] != 1 or not _reduces(total, "sum", powers.space, axis):
        return None
    summed = total.body.result()
    if summed.op != "load" or total.operands[summed.attr] != powers.outputs[0]:
        return None
    power = powers.body.nodes[powers.body.results[0]]
    minus = powers.body.nodes[power.args[0]] if power.op == "exp" else power
    top_load = powers.body.nodes[minus.args[1]] if minus.op == "sub" else minus
    if top_load.op != "load":
        return None
    top = makers.get(powers.operands[top_load.attr])
    if not isinstance(top, Nest) or not _reduces(top, "max", powers.space, axis) or uses[top.outputs[0]] != 1:
        return None
    same = _at(top.body, top.operands, _moved(powers.space, axis)) == _at(
        powers.body.only(minus.args[0]), powers.operands, list(range(len(powers.space)))
    )
    return _Attention(top, powers, total, shares, out, axis) if same else None


def _reduces(op: Nest, kind: str, space: tuple[int, ...], axis: int) -> bool:
    """Whether ``op`` reduces one axis of ``space`` and its epilogue adds nothing but max(−inf, ·)."""
    if op.kind != "reduce" or op.combine is None or op.combine.kind != kind or op.epilogue is None:
        return False
    if op.rspace != (space[axis],) or op.space != space[:axis] + space[axis + 1 :] or len(op.outputs) != 1:
        return False
    node = op.epilogue.result()
    if node.op == "max" and kind == "max":
        others = [op.epilogue.nodes[a] for a in node.args]
        node = next((n for n in others if n.op == "acc"), node)
        others.remove(node)
        return others[0].op == "const" and others[0].attr == 0xFF800000
    return node.op == "acc"


def _moved(space: tuple[int, ...], axis: int) -> list[int]:
    """Coordinates of ``space`` in the order of a reduction over ``axis``: parallel ones, then the reduced one."""
    return [d for d in range(len(space)) if d != axis] + [axis]


def _at(expr: Expr, operands: tuple[int, ...], order: list[int]) -> tuple[Expr, list[int]]:
    """A program over renamed coordinates and its operands in a canonical order, for comparison."""
    extents = [0] * len(order)
    for position, coord in enumerate(order):
        extents[coord] = expr.extents[position]
    builder, slots = Builder(extents), Slots()
    coords = [builder.coord(coord) for coord in order]
    results = inline(builder, expr, coords, lambda s, i, t, p: slots.load(builder, operands[s], i, t, p))
    return builder.build(*results), slots.values


def _is_coord(expr: Expr, i: int, coord: int) -> bool:
    return expr.nodes[i].op == "coord" and expr.nodes[i].attr == coord


def _unconverted(expr: Expr, i: int) -> int:
    while expr.nodes[i].op == "convert":
        i = expr.nodes[i].args[0]
    return i


# -- rewriting -------------------------------------------------------------------------------------------------


class _Maker:
    """Makes operators with fresh outputs."""

    def __init__(self, values: list[Value]):
        self.values = values

    def value(self, shape: tuple[int, ...], dtype: str) -> int:
        self.values.append(Value(len(self.values), shape, dtype))
        return len(self.values) - 1

    def dtype(self, v: int) -> str:
        return self.values[v].dtype


def _split(values: list[Value], found: _Attention, chunks: int) -> list[Op]:
    make = _Maker(values)
    axis, space = found.axis, found.powers.space
    size = space[axis] // chunks
    rows = space[:axis] + space[axis + 1 :]
    lead = (chunks, *rows)  # m_p and l_p; e_p has (*lead, size). Chunks first: a task is one leading coordinate.

    def at_keys(b: Builder) -> list[int]:
        """Coordinates of the original scores from (chunk, *rows, key in chunk)."""
        coords = [b.coord(1 + d) for d in range(len(rows))]
        key = b.add(b.mul(b.coord(0), b.index(size)), b.coord(len(lead)))
        return [*coords[:axis], key, *coords[axis:]]

    # m_p
    slots, b = Slots(), Builder((*lead, size))
    keys = at_keys(b)
    moved = [keys[d] for d in _moved(space, axis)]
    results = inline(b, found.top.body, moved, lambda s, i, t, p: slots.load(b, found.top.operands[s], i, t, p))
    after = Builder(lead)
    low = after.const(np.finfo(np.float32).min, "f32")
    top = make.value(lead, "f32")
    top_op = replace(
        found.top, space=lead, rspace=(size,), operands=tuple(slots.values), outputs=(top,), body=b.build(*results),
        epilogue=after.build(after.op("max", after.acc(0, "f32"), low)),
    )  # fmt: skip

    # e_p, in the type the shares were rounded to
    slots, b = Slots(), Builder((*lead, size))
    old_top = found.top.outputs[0]
    powers = make.value((*lead, size), "f32")

    def load_power(s: int, i: list[int], t: str, p: int | None) -> int:
        if found.powers.operands[s] == old_top:
            return slots.load(b, top, [b.coord(d) for d in range(len(lead))], "f32", None)
        return slots.load(b, found.powers.operands[s], i, t, p)

    results = inline(b, found.powers.body, at_keys(b), load_power)
    powers_op = replace(
        found.powers, space=(*lead, size), operands=tuple(slots.values), outputs=(powers,), body=b.build(*results)
    )
    ops: list[Op] = [top_op, powers_op]

    # l_p
    b = Builder((*lead, size))
    total = make.value(lead, "f32")
    ops.append(_reduce(found.total, lead, (size,), (powers,), (total,), b.build(b.load(0, b.coords(), "f32"))))

    # o_p: the contraction per chunk
    rounded = make.dtype(found.shares.outputs[0])
    factor = powers
    if rounded != "f32":
        factor = make.value((*lead, size), rounded)
        b = Builder((*lead, size))
        body = b.build(b.convert(b.load(0, b.coords(), "f32"), rounded))
        ops.append(replace(found.shares, space=(*lead, size), operands=(powers,), outputs=(factor,), body=body))
    out = found.out
    part_space = (chunks, *out.space)
    slots, b = Slots(), Builder((*part_space, size))
    key = b.add(b.mul(b.coord(0), b.index(size)), b.coord(len(part_space)))
    coords = [b.coord(1 + d) for d in range(len(out.space))]

    def load_factor(s: int, i: list[int], t: str, p: int | None) -> int:
        if out.operands[s] == found.shares.outputs[0]:
            row = [*i[:axis], *i[axis + 1 :]]
            return slots.load(b, factor, [b.coord(0), *row, b.coord(len(part_space))], t, p)
        return slots.load(b, out.operands[s], i, t, p)

    results = inline(b, out.body, [*coords, key], load_factor)
    part_dtype = make.dtype(out.outputs[0])
    part = make.value(part_space, part_dtype)
    after = Builder(part_space)
    ops.append(
        replace(
            out, space=part_space, rspace=(size,), operands=tuple(slots.values), outputs=(part,),
            body=b.build(*results), epilogue=after.build(after.convert(after.acc(0, "f32"), part_dtype, implicit=True)),
        )
    )  # fmt: skip
    return ops + _merge(make, found, top, total, part, rows, chunks)


def _merge(
    make: _Maker, found: _Attention, top: int, total: int, part: int, rows: tuple[int, ...], chunks: int
) -> list[Op]:
    out, count = found.out, len(rows)
    whole = make.value(rows, "f32")
    b = Builder((*rows, chunks))
    at = [b.coord(count), *b.coords()[:count]]
    ops: list[Op] = [_reduce(found.top, rows, (chunks,), (top,), (whole,), b.build(b.load(0, at, "f32")))]

    weight = make.value((chunks, *rows), "f32")
    b = Builder((chunks, *rows))
    body = b.op("exp", b.sub(b.load(0, b.coords(), "f32"), b.load(1, b.coords()[1:], "f32")))
    ops.append(
        replace(found.powers, space=(chunks, *rows), operands=(top, whole), outputs=(weight,), body=b.build(body))
    )

    norm = make.value(rows, "f32")
    b = Builder((*rows, chunks))
    at = [b.coord(count), *b.coords()[:count]]
    body = b.mul(b.load(0, at, "f32"), b.load(1, at, "f32"))
    ops.append(_reduce(found.total, rows, (chunks,), (total, weight), (norm,), b.build(body)))

    # The rows of the scores an element of the output belongs to: its index into the shares, without the key.
    load = next(
        node
        for node in (out.body.nodes[i] for i in out.body.loads())
        if out.operands[node.attr] == found.shares.outputs[0]
    )
    row_args = [arg for a, arg in enumerate(load.args) if a != found.axis]
    b = Builder((*out.space, chunks))
    at = [b.coord(d) for d in range(len(out.space))]
    row = inline(b, out.body.only(*row_args), [*at, b.index(0)], _no_load)
    split = b.coord(len(out.space))
    piece = b.compute(b.load(0, [split, *at], make.dtype(part)))
    weighted = b.build(b.mul(piece, b.load(1, [split, *row], "f32")))

    slots, after = Slots(), Builder(out.space)
    for v in (part, weight):
        slots.slot(v)
    row = inline(after, out.body.only(*row_args), [*after.coords(), after.index(0)], _no_load)
    merged = after.op("div", after.acc(0, "f32"), slots.load(after, norm, row, "f32", None))
    assert out.epilogue is not None
    results = inline(
        after,
        out.epilogue,
        after.coords(),
        lambda s, i, t, p: slots.load(after, out.operands[s], i, t, p),
        lambda node: merged,
    )
    ops.append(
        Nest(
            "reduce", out.space, (chunks,), tuple(slots.values), out.outputs, weighted, Combine("sum"), ("f32",),
            after.build(*results), out.source,
        )
    )  # fmt: skip
    return ops


def _reduce(
    like: Nest,
    space: tuple[int, ...],
    rspace: tuple[int, ...],
    operands: tuple[int, ...],
    outputs: tuple[int, ...],
    body: Expr,
) -> Nest:
    after = Builder(space)
    epilogue = after.build(after.acc(0, "f32"))
    return replace(like, space=space, rspace=rspace, operands=operands, outputs=outputs, body=body, epilogue=epilogue)


def _no_load(*_: object) -> int:
    raise AssertionError("a factor's index holds no load")
