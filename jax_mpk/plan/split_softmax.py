"""Splits the keys of an attention over workers when there are more workers than heads.

With keys s = p·C + c, in chunks p, the attention of :mod:`jax_mpk.plan.attention` becomes

    m_p = max_c x    e_p = exp(x − m_p)  l_p = Σ_c e_p  o_p = Σ_c e_p·v          (one phase, one task per chunk)
    M = max_p m_p    w_p = exp(m_p − M)  o = Σ_p w_p·o_p / Σ_p w_p·l_p           (the consumer's prologue)

the split-KV form of FlashAttention (Dao et al., 2022). A chunk whose keys are all masked has m_p = −inf; m_p is
clamped to the smallest finite number, so e_p is 0 there and not NaN.

Where the target asks for it and the mask says how many keys are live (:mod:`jax_mpk.plan.live`), C is no constant but
⌈live / chunks⌉: every chunk has its share of the live keys, whatever their number, and no other key is read. Scores
are then computed chunk by chunk as well. That holds for a single chunk, too, which needs no merge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Block, Combine, Graph, Nest, Note, Op, Value
from jax_mpk.graph.moves import made_in_place, moved
from jax_mpk.graph.rewrite import Slots, map_blocks, noted, prune, use_counts
from jax_mpk.graph.scalar import Builder, Expr, inline
from jax_mpk.plan import costs
from jax_mpk.plan.attention import Attention, find_attention
from jax_mpk.plan.ir import Target

#: Fewest keys in a chunk.
_MIN_CHUNK = 64


def split_softmax(graph: Graph, target: Target) -> Graph:
    """Rewrites every attention for which that is predicted to save time."""
    values = list(graph.values)
    notes: list[Note] = []

    def visit(block: Block) -> Block:
        makers = {v: op for op in block.ops for v in op.outputs}
        uses = use_counts(block)
        ops: list[Op] = []
        merged: dict[int, int] = {}  # what an attention's parts are merged to, and where in `ops`
        for op in block.ops:
            if isinstance(op, Nest) and (merge := _moved_merge(op, values, merged, uses)) is not None:
                # Tasks that merge some elements for all store them where their only reader would move them.
                final = ops[merge]
                assert isinstance(final, Nest)
                ops[merge] = made_in_place(final, op)
                continue
            found = find_attention(op, makers, uses)
            if isinstance(found, str):
                if found:
                    notes.append(Note("attention", f"not recognised as attention: {op.source.short}: {found}"))
                ops.append(op)
                continue
            chunks = _chunks(values, found, target)
            scored = _scored(found, makers) if target.live_keys else {}
            if target.live_keys and not scored:
                what = "positions up to a scalar" if found.live is None else "all that its scores read"
                notes.append(Note("attention", f"attention reads all keys: {op.source.short}: no mask of {what}"))
            ops += _Split(values, found, chunks, scored).ops() if chunks > 1 or scored else [op]
            if chunks > 1:
                merged[ops[-1].outputs[0]] = len(ops) - 1
        return prune(Block(tuple(ops), block.results), set())

    out = map_blocks(graph, visit)
    return noted(replace(out, values=tuple(values)), "attention", notes)


def _moved_merge(op: Nest, values: list[Value], merged: dict[int, int], uses: Counter[int]) -> int | None:
    """Where the merge is whose results an operator only moves, if nobody else reads them."""
    if len(op.operands) != 1:
        return None
    (v,) = op.operands
    return merged[v] if v in merged and uses[v] == 1 and moved(op, values[v].shape) is not None else None


def _chunks(values: list[Value], found: Attention, target: Target) -> int:
    """The number of chunks, a divisor of the keys, for which attention and merge together are predicted fastest.

    Rows that multiply the same values (the query heads of a group, new positions) may share a task, which then reads
    keys and values once. More chunks keep as many workers busy with fewer readers each, but every reader of the result
    has to merge them before anything else.
    """
    out, keys = found.out, found.keys
    load = out.body.nodes[found.values]
    indexed = {node.attr for node in out.body.only(*load.args).nodes if node.op == "coord"}
    own, group = math.prod(found.row_extents[: found.own]), math.prod(found.row_extents[found.own :])
    # As many bytes of keys as of values.
    once = 2 * math.prod((out.space + out.rspace)[d] for d in indexed) * dtypes.itemsize(load.dtype)
    size = once // 2
    flops = 4 * math.prod(out.space) * keys
    itemsize = dtypes.itemsize(_part_dtype(values, found))
    best = math.inf, 1
    for chunks in _divisors(keys):
        if chunks > 1 and (chunks * own > target.workers or keys // chunks < _MIN_CHUNK):
            continue
        parts = max(g for g in _divisors(group) if g == 1 or chunks * own * g <= target.workers)
        tasks = chunks * own * parts
        read = once * parts
        memory = costs.memory_bytes(target, read, costs.fresh_share(read, once), True, size)
        rounds = -(-tasks // target.workers)
        seconds = rounds * costs.task_seconds(target, read / tasks, memory / tasks, flops / tasks)
        if chunks > 1:
            # Every reader merges them, or each worker some for all readers.
            merged = chunks * math.prod(out.space)
            every, some = (
                _part_seconds(target, share, itemsize, merged) for share in (merged, merged / target.workers)
            )
            seconds += min(every, costs.handoff_seconds(target) + some)
        best = min(best, (float(seconds), chunks))
    return best[1]


def _part_seconds(target: Target, elements: float, itemsize: int, whole: int) -> float:
    """Seconds until a task has some elements of the chunks' parts, of which there are ``whole``."""
    nbytes = elements * itemsize
    tagged = target.may_tag(whole * itemsize, itemsize, nbytes)
    staged = costs.staged_bytes(target, nbytes, itemsize, tagged)
    return float(costs.task_seconds(target, 0.0 if staged else nbytes, 0.0, 0.0, staged))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _part_dtype(values: list[Value], found: Attention) -> str:
    """What the chunks' parts of the result are stored in: no wider than the factors they are sums of."""
    dtype = values[found.weights].dtype
    return dtype if dtype in ("f16", "bf16") else "f32"


@dataclass(frozen=True)
class _Scored:
    """A contraction of queries and keys, as the scores read it.

    Attributes:
      op: the contraction.
      axis: its axis of the keys.
      rows: its axis per coordinate of the scores that it is indexed with as it is.
    """

    op: Nest
    axis: int
    rows: dict[int, int]


def _scored(found: Attention, makers: dict[int, Op]) -> dict[int, _Scored]:
    """The contractions that scores read, by value; {} where these cannot be computed chunk by chunk."""
    if found.live is None:
        return {}
    expr, key = found.scores, len(found.out.space)
    needed = {node.attr for node in found.live.nodes if node.op == "coord"}
    out: dict[int, _Scored] = {}
    for i in expr.loads():
        node = expr.nodes[i]
        op = makers.get(found.operands[node.attr])  # type: ignore[index]
        if node.op != "load" or not isinstance(op, Nest) or op.kind != "contract":
            continue
        coords = {expr.nodes[a].attr: axis for axis, a in enumerate(node.args) if expr.nodes[a].op == "coord"}
        keyed = [a for a in node.args if key in {n.attr for n in expr.only(a).nodes if n.op == "coord"}]
        if len(op.outputs) == 1 and key in coords and len(keyed) == 1 and needed <= coords.keys():
            out[op.outputs[0]] = _Scored(op, coords.pop(key), coords)
    return out


@dataclass(frozen=True)
class _Place:
    """Where a key of a chunk lies, in one program.

    Attributes:
      b, slots: the program being built and its operands.
      key: node of its position among all keys.
      inner: node of its position in the chunk.
      live: predicate: the chunk has such a key; None: it always has.
    """

    b: Builder
    slots: Slots
    key: int
    inner: int
    live: int | None

    def loader(self, operands: tuple[int, ...]) -> Callable[[int, list[int], str, int | None], int]:
        """Loads of ``operands``: what lies at a key is loaded only if there is one."""

        def load(slot: int, at: list[int], dtype: str, pred: int | None) -> int:
            nodes = at if pred is None else [*at, pred]
            if self.live is not None and any(_depends(self.b, i, self.inner) for i in nodes):
                pred = self.live if pred is None else self.b.op("and", self.live, pred)
            return self.slots.load(self.b, operands[slot], at, dtype, pred)

        return load


def _depends(b: Builder, i: int, on: int) -> bool:
    return i == on or any(_depends(b, a, on) for a in b.nodes[i].args)


class _Split:
    """Rewrites one attention.

    Args:
      values: the graph's values; new ones are appended.
      found: the attention.
      chunks: number of chunks.
      scored: contractions to compute chunk by chunk, so that chunks are cut at run time; {}: all keys are read.
    """

    def __init__(self, values: list[Value], found: Attention, chunks: int, scored: dict[int, _Scored]):
        self.values = values
        self.found = found
        self.chunks = chunks
        self.size = found.keys // chunks
        self.rows = found.row_extents
        # Chunks first, then rows, then all else: a task is a box of the leading axes of everything it computes.
        self.lead = (chunks, *self.rows)
        self.rest = [d for d in range(len(found.out.space)) if d not in found.rows]
        self.source = found.softmax.source
        self.cut = bool(scored)
        self.scored = {v: (contraction, self._chunked(contraction)) for v, contraction in scored.items()}

    def ops(self) -> list[Op]:
        found, lead, size = self.found, self.lead, self.size
        keyed = (*lead, size)

        b, slots = Builder(keyed), Slots()
        scores = self._where_live(b, slots, self._scores(b, slots), -math.inf)
        after = Builder(lead)
        low = after.const(np.finfo(np.float32).min, "f32")
        epilogue = after.build(after.op("max", after.acc(0, "f32"), low))
        top = self._reduce("max", lead, (size,), tuple(slots.values), b.build(scores), epilogue)

        b, slots = Builder(keyed), Slots()
        highest = slots.load(b, top.outputs[0], b.coords()[:-1], "f32", None)
        body = b.op("exp", b.sub(self._scores(b, slots), highest))
        body = self._where_live(b, slots, body, 0)
        powers = self._map(keyed, tuple(slots.values), b.build(body), "f32")

        b, slots = Builder(keyed), Slots()
        power = slots.load(b, powers.outputs[0], b.coords(), "f32", None)
        power = self._where_live(b, slots, power, 0)
        total = self._reduce("sum", lead, (size,), tuple(slots.values), b.build(power))
        ops: list[Op] = [*(op for _, op in self.scored.values()), top, powers, total]

        # In the type the weights were rounded to.
        rounded = self.values[found.weights].dtype
        weights = powers
        if rounded != "f32":
            b = Builder(keyed)
            body = b.convert(b.load(0, b.coords(), "f32"), rounded)
            weights = self._map(keyed, powers.outputs, b.build(body), rounded)
            ops.append(weights)
        if self.chunks == 1:
            return [*ops, self._only(weights.outputs[0], total.outputs[0])]
        part = self._part(weights.outputs[0])
        return [*ops, part, *self._merge(top.outputs[0], total.outputs[0], part.outputs[0])]

    def _rows(self, b: Builder) -> dict[int, int]:
        """Nodes of the rows, by coordinate of ``out``."""
        return {d: b.coord(1 + k) for k, d in enumerate(self.found.rows)}

    def _place(self, b: Builder, slots: Slots, rows: dict[int, int], inner: int) -> _Place:
        """Where key ``inner`` of the chunk that coordinate 0 numbers lies."""
        chunk, live = b.index(0) if self.chunks == 1 else b.coord(0), self.found.live
        if not self.cut or live is None:
            return _Place(b, slots, b.add(b.mul(chunk, b.index(self.size)), inner), inner, None)
        at = [rows.get(d, b.index(0)) for d in range(len(self.found.out.space))]
        operands = self.found.operands
        (count,) = inline(b, live, at, lambda s, i, t, p: slots.load(b, operands[s], i, t, p))
        size = b.floordiv(b.add(count, b.index(self.chunks - 1)), self.chunks)
        first = b.mul(chunk, size)
        own = b.clamp(b.index(0), b.sub(count, first), size)
        return _Place(b, slots, b.add(first, inner), inner, b.op("lt", inner, own))

    def _where_live(self, b: Builder, slots: Slots, x: int, otherwise: float) -> int:
        """Node ``x`` at (chunk, rows, key) if the chunk has such a key; what does not count otherwise."""
        live = self._place(b, slots, self._rows(b), b.coord(len(self.lead))).live
        return x if live is None else b.op("select", live, x, b.const(otherwise, "f32"))

    def _chunked(self, scored: _Scored) -> Nest:
        """A contraction of queries and keys with the chunks as its first axis and their keys as its last."""
        op, axis = scored.op, scored.axis
        rest = [extent for d, extent in enumerate(op.space) if d != axis]
        space = (self.chunks, *rest, self.size)

        def place(b: Builder, slots: Slots) -> tuple[_Place, list[int]]:
            others = [b.coord(1 + d) for d in range(len(rest))]
            at = [*others[:axis], 0, *others[axis:]]
            rows = {d: at[own] for d, own in scored.rows.items()}
            found = self._place(b, slots, rows, b.coord(len(space) - 1))
            at[axis] = found.key
            return found, at

        slots = Slots()
        b = Builder(space + op.rspace)
        keys, at = place(b, slots)
        reduced = [b.coord(len(space) + d) for d in range(len(op.rspace))]
        body = b.build(*inline(b, op.body, [*at, *reduced], keys.loader(op.operands)))
        assert op.epilogue is not None
        after = Builder(space)
        keys, at = place(after, slots)
        epilogue = after.build(*inline(after, op.epilogue, at, keys.loader(op.operands)))
        output = self._value(space, self.values[op.outputs[0]].dtype)
        return replace(op, space=space, operands=tuple(slots.values), outputs=(output,), body=body, epilogue=epilogue)

    def _scores(self, b: Builder, slots: Slots) -> int:
        """The scores at (chunk, rows, key in the chunk)."""
        found = self.found
        keys = self._place(b, slots, self._rows(b), b.coord(len(self.lead)))
        at = [self._rows(b).get(d, b.index(0)) for d in range(len(found.out.space))]
        plain = keys.loader(found.operands)

        def load(s: int, i: list[int], t: str, p: int | None) -> int:
            if found.operands[s] not in self.scored:
                return plain(s, i, t, p)
            scored, op = self.scored[found.operands[s]]
            others = [node for axis, node in enumerate(i) if axis != scored.axis]
            return slots.load(b, op.outputs[0], [b.coord(0), *others, keys.inner], t, p)

        (scores,) = inline(b, found.scores, [*at, keys.key], load)
        return b.compute(scores)

    def _part(self, weights: int) -> Nest:
        """o_p: the contraction per chunk."""
        found, out = self.found, self.found.out
        space = (*self.lead, *(out.space[d] for d in self.rest))
        b, slots = Builder((*space, self.size)), Slots()
        at = [b.index(0)] * len(out.space)
        for k, d in enumerate([*found.rows, *self.rest]):
            at[d] = b.coord(1 + k)
        results = self._weighted(b, slots, weights, b.coord(0), at)
        dtype = _part_dtype(self.values, found)
        after = Builder(space)
        return replace(
            out,
            space=space,
            rspace=(self.size,),
            operands=tuple(slots.values),
            outputs=(self._value(space, dtype),),
            body=b.build(*results),
            epilogue=after.build(after.convert(after.acc(0, "f32"), dtype, implicit=True)),
        )

    def _weighted(self, b: Builder, slots: Slots, weights: int, chunk: int, at: list[int]) -> list[int]:
        """The factors of the contraction of a chunk's weights and values; ``at``: nodes of all but the key."""
        found, out = self.found, self.found.out
        inner = b.coord(len(b.extents) - 1)
        keys = self._place(b, slots, {d: at[d] for d in found.rows}, inner)
        plain = keys.loader(out.operands)

        def load(s: int, i: list[int], t: str, p: int | None) -> int:
            if out.operands[s] == found.weights:
                return slots.load(b, weights, [chunk, *(at[d] for d in found.rows), inner], t, p)
            return plain(s, i, t, p)

        return inline(b, out.body, [*at, keys.key], load)

    def _only(self, weights: int, total: int) -> Nest:
        """The contraction of the only chunk, divided by the sum of the weights."""
        out = self.found.out
        b, slots = Builder((*out.space, self.size)), Slots()
        results = self._weighted(b, slots, weights, b.index(0), b.coords()[:-1])
        after = Builder(out.space)
        row = [after.index(0), *(after.coord(d) for d in self.found.rows)]
        epilogue = self._epilogue(after, slots, lambda: slots.load(after, total, row, "f32", None))
        return replace(
            out, rspace=(self.size,), operands=tuple(slots.values), body=b.build(*results), epilogue=epilogue
        )

    def _merge(self, top: int, total: int, part: int) -> list[Op]:
        found, out, chunks, rows = self.found, self.found.out, self.chunks, self.rows

        b = Builder((*rows, chunks))
        chunk_first = [b.coord(len(rows)), *b.coords()[:-1]]
        whole = self._reduce("max", rows, (chunks,), (top,), b.build(b.load(0, chunk_first, "f32")))

        b = Builder(self.lead)
        body = b.op("exp", b.sub(b.load(0, b.coords(), "f32"), b.load(1, b.coords()[1:], "f32")))
        weight = self._map(self.lead, (top, whole.outputs[0]), b.build(body), "f32")

        b = Builder((*rows, chunks))
        chunk_first = [b.coord(len(rows)), *b.coords()[:-1]]
        body = b.mul(b.load(0, chunk_first, "f32"), b.load(1, chunk_first, "f32"))
        norm = self._reduce("sum", rows, (chunks,), (total, weight.outputs[0]), b.build(body))

        b = Builder((*out.space, chunks))
        split = b.coord(len(out.space))
        row = [split, *(b.coord(d) for d in found.rows)]
        piece = b.compute(b.load(0, [*row, *(b.coord(d) for d in self.rest)], self.values[part].dtype))
        weighted = b.build(b.mul(piece, b.load(1, row, "f32")))

        slots, after = Slots(), Builder(out.space)
        for v in (part, weight.outputs[0]):
            slots.slot(v)
        row = [after.coord(d) for d in found.rows]

        epilogue = self._epilogue(after, slots, lambda: slots.load(after, norm.outputs[0], row, "f32", None))
        final = Nest(
            "reduce", out.space, (chunks,), tuple(slots.values), out.outputs, weighted, Combine("sum"), ("f32",),
            epilogue, out.source,
        )  # fmt: skip
        return [whole, weight, norm, final]

    def _epilogue(self, after: Builder, slots: Slots, divisor: Callable[[], int]) -> Expr:
        """What becomes of the sum of all weighted values; ``divisor``: loads the sum of all weights."""
        found, out = self.found, self.found.out

        def load(s: int, i: list[int], t: str, p: int | None) -> int:
            total = found.totals.get(out.operands[s])
            if total is None:
                return slots.load(after, out.operands[s], i, t, p)
            assert total.epilogue is not None
            operands = total.operands
            (of_total,) = inline(
                after,
                total.epilogue,
                i,
                lambda s, i, t, p: slots.load(after, operands[s], i, t, p),
                lambda _: divisor(),
            )
            return of_total

        merged = after.acc(0, "f32")
        if found.divided:
            total_at = divisor()
            if found.rounded is not None:
                total_at = after.compute(after.convert(total_at, found.rounded))
            merged = after.op("div", merged, total_at)
        assert out.epilogue is not None
        return after.build(*inline(after, out.epilogue, after.coords(), load, lambda _: merged))

    # -- new operators -----------------------------------------------------------------------------------------

    def _value(self, shape: tuple[int, ...], dtype: str) -> int:
        self.values.append(Value(len(self.values), shape, dtype))
        return len(self.values) - 1

    def _map(self, space: tuple[int, ...], operands: tuple[int, ...], body: Expr, dtype: str) -> Nest:
        return Nest("map", space, (), operands, (self._value(space, dtype),), body, source=self.source)

    def _reduce(
        self,
        kind: str,
        space: tuple[int, ...],
        rspace: tuple[int, ...],
        operands: tuple[int, ...],
        body: Expr,
        epilogue: Expr | None = None,
    ) -> Nest:
        if epilogue is None:
            after = Builder(space)
            epilogue = after.build(after.acc(0, "f32"))
        outputs = (self._value(space, "f32"),)
        return Nest(
            "reduce", space, rspace, operands, outputs, body, Combine(kind), ("f32",), epilogue, self.source
        )  # fmt: skip
