"""Splits the keys of an attention over workers when there are more workers than heads.

With keys s = p·C + c, in chunks p, the attention of :mod:`jax_mpk.plan.attention` becomes

    m_p = max_c x    e_p = exp(x − m_p)  l_p = Σ_c e_p  o_p = Σ_c e_p·v          (one phase, one task per chunk)
    M = max_p m_p    w_p = exp(m_p − M)  o = Σ_p w_p·o_p / Σ_p w_p·l_p           (the consumer's prologue)

the split-KV form of FlashAttention (Dao et al., 2022). A chunk whose keys are all masked has m_p = −inf; m_p is
clamped to the smallest finite number, so e_p is 0 there and not NaN.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Block, Combine, Graph, Nest, Op, Value
from jax_mpk.graph.rewrite import Slots, map_blocks, prune, use_counts
from jax_mpk.graph.scalar import Builder, Expr, inline
from jax_mpk.plan import costs
from jax_mpk.plan.attention import Attention, find_attention
from jax_mpk.plan.ir import Target

#: Fewest keys in a chunk.
_MIN_CHUNK = 64


def split_softmax(graph: Graph, target: Target) -> Graph:
    """Rewrites every attention for which that is predicted to save time."""
    values = list(graph.values)

    def visit(block: Block) -> Block:
        makers = {v: op for op in block.ops for v in op.outputs}
        uses = use_counts(block)
        ops: list[Op] = []
        for op in block.ops:
            found = find_attention(op, makers, uses)
            chunks = 1 if found is None else _chunks(values, found, target)
            ops += [op] if found is None or chunks == 1 else _Split(values, found, chunks).ops()
        return prune(Block(tuple(ops), block.results), set())

    out = map_blocks(graph, visit)
    return replace(out, values=tuple(values))


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
    written = math.prod(out.space) * dtypes.itemsize(_part_dtype(values, found))
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
            seconds += costs.task_seconds(target, chunks * written, 0.0, 0.0)
        best = min(best, (float(seconds), chunks))
    return best[1]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _part_dtype(values: list[Value], found: Attention) -> str:
    """What the chunks' parts of the result are stored in: no wider than the factors they are sums of."""
    dtype = values[found.weights].dtype
    return dtype if dtype in ("f16", "bf16") else "f32"


class _Split:
    """Rewrites one attention.

    Args:
      values: the graph's values; new ones are appended.
      found: the attention.
      chunks: number of chunks.
    """

    def __init__(self, values: list[Value], found: Attention, chunks: int):
        self.values = values
        self.found = found
        self.chunks = chunks
        self.size = found.keys // chunks
        self.rows = found.row_extents
        # Chunks first, then rows, then all else: a task is a box of the leading axes of everything it computes.
        self.lead = (chunks, *self.rows)
        self.rest = [d for d in range(len(found.out.space)) if d not in found.rows]
        self.source = found.softmax.source

    def ops(self) -> list[Op]:
        found, lead, size = self.found, self.lead, self.size
        keyed = (*lead, size)

        b, slots = Builder(keyed), Slots()
        scores = self._scores(b, slots)
        after = Builder(lead)
        low = after.const(np.finfo(np.float32).min, "f32")
        epilogue = after.build(after.op("max", after.acc(0, "f32"), low))
        top = self._reduce("max", lead, (size,), tuple(slots.values), b.build(scores), epilogue)

        b, slots = Builder(keyed), Slots()
        highest = slots.load(b, top.outputs[0], b.coords()[:-1], "f32", None)
        body = b.op("exp", b.sub(self._scores(b, slots), highest))
        powers = self._map(keyed, tuple(slots.values), b.build(body), "f32")

        b = Builder(keyed)
        total = self._reduce("sum", lead, (size,), powers.outputs, b.build(b.load(0, b.coords(), "f32")))
        ops: list[Op] = [top, powers, total]

        # In the type the weights were rounded to.
        rounded = self.values[found.weights].dtype
        weights = powers
        if rounded != "f32":
            b = Builder(keyed)
            body = b.convert(b.load(0, b.coords(), "f32"), rounded)
            weights = self._map(keyed, powers.outputs, b.build(body), rounded)
            ops.append(weights)
        part = self._part(weights.outputs[0])
        return [*ops, part, *self._merge(top.outputs[0], total.outputs[0], part.outputs[0])]

    def _scores(self, b: Builder, slots: Slots) -> int:
        """The scores at (chunk, rows, key in the chunk)."""
        key = b.add(b.mul(b.coord(0), b.index(self.size)), b.coord(len(self.lead)))
        at = [b.index(0)] * len(self.found.out.space)
        for k, d in enumerate(self.found.rows):
            at[d] = b.coord(1 + k)
        (scores,) = inline(
            b, self.found.scores, [*at, key], lambda s, i, t, p: slots.load(b, self.found.operands[s], i, t, p)
        )
        return b.compute(scores)

    def _part(self, weights: int) -> Nest:
        """o_p: the contraction per chunk."""
        found, out = self.found, self.found.out
        space = (*self.lead, *(out.space[d] for d in self.rest))
        b, slots = Builder((*space, self.size)), Slots()
        inner = b.coord(len(space))
        at = [b.index(0)] * len(out.space)
        for k, d in enumerate([*found.rows, *self.rest]):
            at[d] = b.coord(1 + k)
        key = b.add(b.mul(b.coord(0), b.index(self.size)), inner)

        def load(s: int, i: list[int], t: str, p: int | None) -> int:
            if out.operands[s] == found.weights:
                return slots.load(b, weights, [*b.coords()[: len(self.lead)], inner], t, p)
            return slots.load(b, out.operands[s], i, t, p)

        results = inline(b, out.body, [*at, key], load)
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

        def divisor() -> int:
            return slots.load(after, norm.outputs[0], row, "f32", None)

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
        results = inline(after, out.epilogue, after.coords(), load, lambda _: merged)
        final = Nest(
            "reduce", out.space, (chunks,), tuple(slots.values), out.outputs, weighted, Combine("sum"), ("f32",),
            after.build(*results), out.source,
        )  # fmt: skip
        return [whole, weight, norm, final]

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
