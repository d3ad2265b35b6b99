"""Recognises a softmax and the contraction that sums values with it.

    m = max_s x      e = exp(x − m)      l = Σ_s e      o = Σ_s (e / l)·v      or      o = (Σ_s e·v) / l

The search goes from the contraction backwards and computes every map on the way in place, all in one builder. So it
does not matter which maps are stored, in which order axes lie, or where masks, scales and roundings are applied: two
programs are the same when they are the same node.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Nest, Op
from jax_mpk.graph.rewrite import Slots, inline_map
from jax_mpk.graph.scalar import Builder, Expr, Node, inline
from jax_mpk.graph.windows import factor
from jax_mpk.plan.live import live_keys

#: A softmax is searched for in a program of no more nodes than this.
_MOST_NODES = 4000


@dataclass(frozen=True)
class Attention:
    """One attention, as the contraction with the values sees it.

    Attributes:
      out: the contraction with the values; its reduced axis is that of the keys.
      weights: the value it multiplies them with.
      values: position of the load of the values in ``out.body``.
      rows: the coordinates of ``out.space`` that number the rows of the scores; those that also choose values first.
      own: how many of them choose values: the others number the rows that share theirs.
      scores: x above, over ``out.space`` and the keys.
      operands: values ``scores`` reads.
      divided: whether ``weights`` is e / l; e otherwise.
      rounded: type the user rounds that l to, or None.
      totals: the sums whose results ``out``'s epilogue reads, by value; their accumulator is l.
      softmax: the map that computes ``weights``.
      live: how many keys the mask leaves, over ``out.space`` and reading ``operands``: all behind have a weight of 0.
        It depends on rows that choose values only. None where no mask is recognised.
    """

    out: Nest
    weights: int
    values: int
    rows: tuple[int, ...]
    own: int
    scores: Expr
    operands: tuple[int, ...]
    divided: bool
    rounded: str | None
    totals: dict[int, Nest]
    softmax: Nest
    live: Expr | None

    @property
    def keys(self) -> int:
        return self.out.rspace[0]

    @property
    def row_extents(self) -> tuple[int, ...]:
        return tuple(self.out.space[d] for d in self.rows)


def find_attention(out: Op, makers: dict[int, Op], uses: Counter[int]) -> Attention | str:
    """The attention a contraction is the last part of, or why it is none; "" where nothing about it looks like one.

    Args:
      out: any operator.
      makers: per value, the operator of the same block that computes it.
      uses: how often each value is read, as a result too.
    """
    if not isinstance(out, Nest) or out.kind != "contract" or len(out.outputs) != 1:
        return ""
    reason = ""
    loads = [factor(out.body, result) for result in out.body.results]
    for this, other in (loads, loads[::-1]):
        if this is None or other is None or this.new >= 0:
            continue
        node = out.body.nodes[this.load]
        weights = out.operands[node.attr]  # type: ignore[index]
        softmax = makers.get(weights)
        if not isinstance(softmax, Nest) or softmax.kind != "map" or len(softmax.outputs) != 1:
            continue
        try:
            found = _Search(out, makers).match(softmax, weights, node.args, other.load)
        except _NotFoundError as error:
            reason = reason or str(error)
            continue
        # Weights that somebody else reads have to be computed anyway; powers are summed, too.
        if uses[weights] <= (1 if found.divided else 2):
            return found
        reason = "its weights have other readers"
    return reason


class _NotFoundError(Exception):
    """The operators are no attention; why not, if they look like one."""


def _need(condition: bool, reason: str = "") -> None:
    if not condition:
        raise _NotFoundError(reason)


class _Search:
    """One builder over the coordinates of the contraction, in which maps are opened.

    Args:
      out: the contraction with the values.
      makers: per value, the operator that computes it.
    """

    def __init__(self, out: Nest, makers: dict[int, Op]):
        self.out = out
        self.builder = Builder(out.space + out.rspace)
        self.slots = Slots()
        self.makers = makers
        self.key = self.builder.coord(len(out.space))
        self._opened: dict[tuple[int, tuple[int, ...], int | None], int] = {}

    def match(self, softmax: Nest, weights: int, index: tuple[int, ...], values: int) -> Attention:
        b, out = self.builder, self.out
        at = inline(b, out.body.only(*index), b.coords(), _no_load)
        i = self._open(self.slots.load(b, weights, at, softmax.body.result().dtype, None))
        if b.nodes[i].op == "convert":  # the user's rounding of the factor
            i = self._open(b.nodes[i].args[0])
        power, total = self._quotient(i)
        power = self._open(power)
        _need(b.nodes[power].op == "exp" and b.nodes[power].dtype == "f32")
        difference = self._open(b.nodes[power].args[0])
        _need(b.nodes[difference].op == "sub")
        scores, top = b.nodes[difference].args
        _need(out.acc == ("f32",), f"it sums in {out.acc[0]}, not in f32")
        _need(len(out.rspace) == 1, "its keys have several axes")
        self._reduction(top, "max", scores)
        totals: dict[int, Nest] = {}
        rounded = None
        if total is not None:
            total = self._open(total)
            if b.nodes[total].op == "convert":
                rounded, total = b.nodes[total].dtype, b.nodes[total].args[0]
            self._reduction(total, "sum", power)
        else:
            totals = self._totals(power)
        found = b.build(scores)
        used = {node.attr for node in found.nodes if node.op == "coord"} - {len(out.space)}
        apart = {node.attr for node in out.body.only(*out.body.nodes[values].args).nodes if node.op == "coord"}
        rows = tuple(sorted(used, key=lambda d: (d not in apart, d)))  # type: ignore[arg-type, return-value]
        # Rows computed once each, not once for every element of the result that reads them.
        once = math.prod(out.space[d] for d in rows) * out.rspace[0] <= math.prod(softmax.space)
        _need(once, "its scores differ from element to element of the result")
        own = len(apart.intersection(rows))
        live = live_keys(b, self._finished(self._whole(scores)), len(out.space), set(rows[:own]))
        return Attention(
            out, weights, values, rows, own, found, tuple(self.slots.values), total is not None, rounded, totals,
            softmax, None if live is None else replace(b.build(live), extents=out.space),
        )  # fmt: skip

    def _quotient(self, i: int) -> tuple[int, int | None]:
        """(e, l) of e / l or e · (1 / l); (e, None) of anything else."""
        nodes = self.builder.nodes
        node = nodes[i]
        if node.op == "div":
            return node.args[0], node.args[1]
        if node.op == "mul":
            for this, other in (node.args, node.args[::-1]):
                inverse = nodes[self._open(other)]
                if inverse.op == "div" and nodes[inverse.args[0]] == ("const", (), "f32", _ONE):
                    return this, inverse.args[1]
        return i, None

    def _totals(self, power: int) -> dict[int, Nest]:
        """Sums of ``power`` that the contraction's epilogue reads."""
        b, epilogue = self.builder, self.out.epilogue
        assert epilogue is not None
        found: dict[int, Nest] = {}
        for i in epilogue.loads():
            node = epilogue.nodes[i]
            value = self.out.operands[node.attr]  # type: ignore[index]
            op = self.makers.get(value)
            if node.op == "load" and isinstance(op, Nest) and op.kind == "reduce":
                at = inline(b, epilogue.only(*node.args), b.coords()[:-1], _no_load)
                self._reduction(self.slots.load(b, ~value, at, "f32", None), "sum", power)
                found[value] = op
        _need(bool(found), "its weights are divided by no sum")
        return found

    def _reduction(self, i: int, kind: str, what: int) -> None:
        """Requires that node ``i`` is the reduction of node ``what`` over the keys."""
        b = self.builder
        node = b.nodes[self._open(self._unclamped(self._open(i)))]
        value = self.slots.values[node.attr] if node.op == "load" else 0  # type: ignore[index]
        reason = f"no {kind} over its keys is that of its weights"
        _need(value < 0, reason)
        op = self.makers[~value]
        assert isinstance(op, Nest) and op.combine is not None
        _need(op.combine.kind == kind and op.rspace == self.out.rspace, reason)
        (element,) = self._inlined(op.body, op.operands, [*node.args, self.key], -1)
        _need(self._whole(element) == self._whole(what), reason)

    def _unclamped(self, i: int) -> int:
        """x of max(−inf, x)."""
        nodes = self.builder.nodes
        if nodes[i].op == "max":
            for this, other in (nodes[i].args, nodes[i].args[::-1]):
                if _is_least(nodes[this]):
                    return other
        return i

    def _open(self, i: int) -> int:
        """What a node stands for, behind implicit roundings, exact conversions, loads of maps and epilogues.

        A reduction's accumulator is the load of a negative value: ``~v`` where ``v`` is what its epilogue makes of it.
        """
        b, slots = self.builder, self.slots
        while True:
            _need(len(b.nodes) <= _MOST_NODES, "its program is too large")
            node = b.nodes[i]
            if node.op == "convert" and (node.attr == "round" or _widens(b.nodes[node.args[0]].dtype, node.dtype)):
                i = node.args[0]
                continue
            value = slots.values[node.attr] if node.op == "load" else -1  # type: ignore[index]
            op = self.makers.get(value)
            if not isinstance(op, Nest) or op.kind == "contract":
                return i
            if op.kind == "map":
                i = inline_map(b, op, value, list(node.args), None, slots, lambda *_: None)
                continue
            assert op.epilogue is not None
            if len(op.outputs) != 1 or op.acc != ("f32",):
                return i
            acc = slots.load(b, ~value, list(node.args), "f32", None)
            (i,) = self._inlined(op.epilogue, op.operands, list(node.args), acc)

    def _inlined(self, expr: Expr, operands: tuple[int, ...], at: list[int], acc: int) -> list[int]:
        b = self.builder
        return inline(b, expr, at, lambda s, i, t, p: self.slots.load(b, operands[s], i, t, p), lambda _: acc)

    def _finished(self, i: int) -> int:
        """Behind the load of a contraction's result, its epilogue: a mask may be there."""
        node = self.builder.nodes[i]
        value = self.slots.values[node.attr] if node.op == "load" else -1  # type: ignore[index]
        op = self.makers.get(value)
        if not isinstance(op, Nest) or op.kind != "contract" or op.epilogue is None:
            return i
        acc = self.slots.load(self.builder, ~value, list(node.args), op.acc[0], None)
        (finished,) = self._inlined(op.epilogue, op.operands, list(node.args), acc)
        return self._whole(finished)

    def _whole(self, i: int) -> int:
        """Node ``i`` with every map it reads computed in place, their maps too."""
        b = self.builder
        expr = b.build(i)
        kept = self.slots.values

        def load(slot: int, at: list[int], dtype: str, pred: int | None) -> int:
            found = self._opened_load(b, kept[slot], at, dtype, pred)
            return self.slots.load(b, kept[slot], at, dtype, pred) if found is None else found

        (whole,) = inline(b, expr, b.coords(), load)
        return whole

    def _opened_load(self, b: Builder, value: int, at: list[int], dtype: str, pred: int | None) -> int | None:
        maker = self.makers.get(value)
        if not isinstance(maker, Nest) or maker.kind != "map":
            return None
        key = value, tuple(at), pred
        if key not in self._opened:
            _need(len(b.nodes) <= _MOST_NODES, "its program is too large")
            self._opened[key] = inline_map(b, maker, value, at, pred, self.slots, self._opened_load)
        return self._opened[key]


_ONE = dtypes.to_bits(1.0, "f32")


def _is_least(node: Node) -> bool:
    return node.op == "const" and dtypes.is_float(node.dtype) and node.attr == dtypes.to_bits(-math.inf, node.dtype)


def _widens(source: str, dtype: str) -> bool:
    """Whether a conversion loses nothing."""
    return (source in ("f16", "bf16") and dtype in ("f32", "f64")) or (source, dtype) == ("f32", "f64")


def _no_load(*_: object) -> int:
    raise _NotFoundError
