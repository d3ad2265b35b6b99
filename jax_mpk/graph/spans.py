"""Symbolic bounds of what an operator reads and writes: the parts of its boxes that depend on run-time scalars.

:mod:`jax_mpk.graph.regions` gives boxes, whatever the scalars will be. Here indices are evaluated once more, as affine
expressions of run-time scalars and coordinates. Predicates limit them further: an element counts as read only where
the program uses its value, in the chosen case of every ``select`` around the load and where ``load_if`` loads. With
``inside`` for ``start <= i and i < start + 2``,

    select(inside, load_if(inside, new[i - start]), old[i])

reads ``old`` outside ``start : start + 2``, and an update of 2 rows at ``start`` writes within. What lies elsewhere may
be fetched and is dropped, so it does not matter who is writing there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.bounds import Bound, Span, Spans, at_most, greatest, least, number, symbol
from jax_mpk.graph.ir import Graph, Nest, Op, Sort, Update, walk
from jax_mpk.graph.regions import program_boxes, update_boxes
from jax_mpk.graph.scalar import COMPARE, Expr, Node

#: Expressions of more symbols than this are not followed: random numbers, say.
_MOST_SYMBOLS = 64
#: Definitions of more nodes than this are not followed.
_MOST_NODES = 128
#: A predicate node, and whether it holds.
_Fact = tuple[int, bool]
_SWAPPED = {"gt": "lt", "ge": "le"}
_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True)
class Definition:
    """How an element of a value is computed.

    Attributes:
      expr: the program, over the value's coordinates.
      operands: what its slots are.
    """

    expr: Expr
    operands: tuple[_Operand, ...]

    @cached_property
    def size(self) -> int:
        """Nodes, those of the operands' definitions included."""
        return len(self.expr.nodes) + sum(known.size for _, _, known in self.operands if known is not None)

    @cached_property
    def _hash(self) -> int:
        return hash((self.expr, self.operands))

    def __hash__(self) -> int:  # definitions hold definitions
        return self._hash


#: Slot, value, and how that is computed, if that is known.
_Operand = tuple[int, int, Definition | None]


@dataclass(frozen=True)
class BoxSpans:
    """What run-time scalars leave of some boxes.

    Attributes:
      which: per box, a position in ``spans``; None: nothing limits any of them.
      spans: the distinct ones.
    """

    which: np.ndarray | None = None
    spans: tuple[Spans, ...] = ((),)

    def __bool__(self) -> bool:
        return self.which is not None

    def of_stored(self, is_local: Callable[[int], bool]) -> BoxSpans:
        """Without what depends on local values.

        These may be computed several times, and are only as equal as such computations are.
        """
        kept = tuple(tuple(s for s in some if not any(map(is_local, s.values))) for some in self.spans)
        return BoxSpans(self.which, kept) if any(kept) else UNLIMITED


UNLIMITED = BoxSpans()


def definitions(graph: Graph) -> dict[int, Definition]:
    """Values that are computed from others, element by element, by arithmetic on integers: positions, masks."""
    out: dict[int, Definition] = {}
    for op in walk(graph.block):
        if not isinstance(op, Nest) or op.kind != "map":
            continue
        for v, root in zip(op.outputs, op.body.results, strict=True):
            if dtypes.is_float(graph.values[v].dtype):
                continue
            expr = op.body.only(root)
            if any(dtypes.is_float(node.dtype) for node in expr.nodes):
                continue
            slots = sorted({expr.nodes[i].attr for i in expr.loads()})
            found = Definition(expr, tuple((slot, op.operands[slot], out.get(op.operands[slot])) for slot in slots))
            if found.size <= _MOST_NODES:
                out[v] = found
    return out


def op_spans(
    op: Op,
    lo: np.ndarray,
    hi: np.ndarray,
    known: Mapping[int, Definition],
    is_local: Callable[[int], bool],
    *,
    stage_finish: bool = False,
) -> list[BoxSpans]:
    """Per region of :func:`~jax_mpk.graph.regions.op_touches`, in the same order, what it is beside its boxes.

    Args:
      op, lo, hi, stage_finish: as there.
      known: the graph's :func:`definitions`.
      is_local: whether a value is computed by every task that needs it. Nothing is said about these.
    """
    out: list[BoxSpans] = []
    for expr, operands, low, high in program_boxes(op, lo, hi, stage_finish=stage_finish):
        loads = expr.loads()
        if all(dtypes.is_float(expr.nodes[i].dtype) for i in loads):
            out += [UNLIMITED] * len(loads)
            continue
        guards, depends = _guards(expr), _dependencies(expr)
        for i in loads:
            node = expr.nodes[i]
            if is_local(operands[node.attr]):  # type: ignore[index]
                out.append(UNLIMITED)
                continue
            facts, indices = guards.get(i, frozenset()), node.args
            if node.op == "load_if":
                facts, indices = facts | {(node.args[0], True)}, node.args[1:]
            found = _per_box(expr, operands, known, depends, indices, facts, low, high)
            out.append(found.of_stored(is_local))
    if isinstance(op, Update):
        out.append(UNLIMITED)
    if isinstance(op, Sort):
        out += [UNLIMITED] * len(op.operands)
    return out


def written_spans(
    op: Update, lo: np.ndarray, hi: np.ndarray, known: Mapping[int, Definition], is_local: Callable[[int], bool]
) -> BoxSpans:
    """The same for :func:`~jax_mpk.graph.regions.update_written`."""
    *indices, inside = op.index.results
    found = _per_box(
        op.index,
        op.operands,
        known,
        _dependencies(op.index),
        tuple(indices),
        frozenset({(inside, True)}),
        *update_boxes(op, lo, hi),
    )
    return found.of_stored(is_local)


# -- where a value is used -------------------------------------------------------------------------------------


def _guards(expr: Expr) -> dict[int, frozenset[_Fact]]:
    """Per node that any result needs, what holds wherever it is used.

    An index or predicate is used wherever the load it belongs to may be carried out: what is loaded may be dropped
    afterwards, but not before it is known where.
    """
    out: dict[int, frozenset[_Fact]] = dict.fromkeys(expr.results, frozenset())
    for i in range(len(expr.nodes) - 1, -1, -1):
        here = out.get(i)
        if here is None:
            continue
        node = expr.nodes[i]
        for k, a in enumerate(node.args):
            facts = here
            if node.op == "select" and k:
                facts = here | {(node.args[0], k == 1)}
            elif node.op in ("load", "load_if"):
                facts = frozenset({(node.args[0], True)}) if node.op == "load_if" and k else frozenset()
            known = out.get(a)
            out[a] = facts if known is None else known & facts
    return out


# -- boxes -----------------------------------------------------------------------------------------------------


def _per_box(
    expr: Expr,
    operands: tuple[int, ...],
    known: Mapping[int, Definition],
    depends: list[set[int]],
    indices: tuple[int, ...],
    facts: frozenset[_Fact],
    lo: np.ndarray,
    hi: np.ndarray,
) -> BoxSpans:
    """What limits an index, once for all boxes that agree in the coordinates it depends on."""
    said = sorted(fact for fact in facts if _LOAD in depends[fact[0]])
    mentioned = {_LOAD}.union(*(depends[i] for i, _ in said))
    axes = tuple(axis for axis, i in enumerate(indices) if not mentioned.isdisjoint(depends[i]))
    if not axes:
        return UNLIMITED
    part = expr.only(*(indices[axis] for axis in axes), *(i for i, _ in said))
    used = sorted({node.attr for node in part.nodes if node.op == "coord"})
    slots = sorted({node.attr for node in part.nodes if node.op in ("load", "load_if")})
    values = tuple((slot, operands[slot], known.get(operands[slot])) for slot in slots)
    corners, which = np.unique(np.concatenate([lo[:, used], hi[:, used]], axis=1), axis=0, return_inverse=True)
    boxes = tuple(tuple(zip(used, c[: len(used)], c[len(used) :], strict=True)) for c in corners.tolist())
    spans, number = _limits(part, axes, tuple(truth for _, truth in said), values, boxes)
    return BoxSpans(np.array(number)[which.reshape(-1)], spans) if any(spans) else UNLIMITED


#: Among the coordinates that a node depends on: it depends on a load, too.
_LOAD = -1


def _dependencies(expr: Expr) -> list[set[int]]:
    """Coordinates that nodes depend on."""
    out: list[set[int]] = []
    for node in expr.nodes:
        own = {node.attr} if node.op == "coord" else {_LOAD} if node.op in ("load", "load_if") else set()
        out.append(own.union(*(out[a] for a in node.args)))
    return out


@lru_cache(maxsize=4096)  # a model's layers ask for the same
def _limits(
    part: Expr,
    axes: tuple[int, ...],
    truths: tuple[bool, ...],
    values: tuple[_Operand, ...],
    boxes: tuple[tuple[tuple[int, int, int], ...], ...],
) -> tuple[tuple[Spans, ...], tuple[int, ...]]:
    """What limits indices along ``axes``, the first results of a program, given that the others are ``truths``.

    Returns:
      The distinct answers, and which of them each box gets.
    """
    out: list[Spans] = []
    for box in boxes:
        if any(high <= low for _, low, high in box):
            out.append(())
            continue
        forms = _Forms(part, values, {coord: _coordinate(coord, low, high) for coord, low, high in box})
        facts = zip(part.results[len(axes) :], truths, strict=True)
        clauses = [clause for root, truth in facts for clause in forms.clauses(root, truth)]
        spans = [span for axis, root in zip(axes, part.results) for span in _of_axis(axis, forms.form(root), clauses)]
        out.append(tuple(spans))
    distinct = {some: k for k, some in enumerate(dict.fromkeys(out))}
    return tuple(distinct), tuple(distinct[some] for some in out)


def _of_axis(axis: int, at: Bound | None, clauses: list[tuple[list[Bound], bool]]) -> list[Span]:
    """What limits an index; clauses as :meth:`_Forms.clauses` gives them."""
    if at is None:
        return []
    firsts, ends = _extremes(at)
    holes = []
    for clause, negated in clauses:
        sides = [_sides(at, literal) for literal in clause]
        inner = [bound for first, _ in sides for bound in first], [bound for _, end in sides for bound in end]
        if not negated:
            firsts, ends = firsts + inner[0], ends + inner[1]
        elif len(inner[0]) + len(inner[1]) < len(clause):
            continue  # the rest of the conjunction decides, too
        elif all(inner):
            holes.append(Span(axis, greatest(inner[0]), least(inner[1]), True))
        elif inner[0]:
            ends = [*ends, greatest(inner[0])]
        else:
            firsts = [*firsts, least(inner[1])]
    # What is a number shows in the box.
    firsts, ends = ([bound for bound in bounds if bound.terms] for bounds in (firsts, ends))
    out = [hole for hole in dict.fromkeys(holes) if hole.first.terms or hole.end.terms]  # type: ignore[union-attr]
    if firsts or ends:
        out.insert(0, Span(axis, greatest(firsts) if firsts else None, least(ends) if ends else None))
    return out


def _extremes(at: Bound) -> tuple[list[Bound], list[Bound]]:
    """First and end of an index over its box."""
    first = end = at
    for s, k in at.terms:
        if s.op == "coord":
            first = first.replaced(s, number(s.low if k > 0 else s.high))
            end = end.replaced(s, number(s.high if k > 0 else s.low))
    return [first], [end.shifted(1)]


def _coordinate(axis: int, low: int, high: int) -> Bound:
    return number(low) if high == low + 1 else symbol("coord", (), dtypes.INDEX, axis, low, high - 1)


def _sides(at: Bound, literal: Bound) -> tuple[list[Bound], list[Bound]]:
    """What ``literal >= 0`` says about an index: ``([first], [])``, ``([], [end])``, or nothing.

    It says no more and no less than that, so it may be negated.
    """
    if not literal.has_coord:
        return [], []
    above, below = at.plus(literal), at.plus(literal, -1)
    if not above.has_coord:  # at = above - literal <= above
        return [], [above.shifted(1)]
    return ([below], []) if not below.has_coord else ([], [])


def _compared(op: str, a: Bound, b: Bound) -> Bound | None:
    """Whether a comparison holds, if that is known."""
    if op in _SWAPPED:
        op, a, b = _SWAPPED[op], b, a
    if op in ("lt", "le"):
        strict = op == "lt"
        true, false = at_most(a.shifted(int(strict)), b), at_most(b.shifted(int(not strict)), a)
    else:
        apart = at_most(a.shifted(1), b) or at_most(b.shifted(1), a)
        true, false = (a == b, apart) if op == "eq" else (apart, a == b)
    return number(int(true)) if true or false else None


# -- programs as affine expressions ----------------------------------------------------------------------------


class _Forms:
    """Nodes of a program as bounds; None where they are none.

    Args:
      expr: the program.
      operands: what its slots are.
      coords: its coordinates.
    """

    def __init__(self, expr: Expr, operands: tuple[_Operand, ...], coords: Mapping[int, Bound | None]):
        self.expr = expr
        self.operands = {slot: (v, known) for slot, v, known in operands}
        self.coords = coords
        self._known: dict[int, Bound | None] = {}
        self._inner: dict[int, _Forms | None] = {}

    def form(self, i: int) -> Bound | None:
        if i not in self._known:
            node = self.expr.nodes[i]
            inner = self._definition(i)
            if inner is not None:
                found = inner.form(inner.expr.results[0])
            else:
                found = None if dtypes.is_float(node.dtype) else self._of(node)
            self._known[i] = None if found is None or found.size > _MOST_SYMBOLS else found
        return self._known[i]

    def _definition(self, i: int) -> _Forms | None:
        """The program that computes what is loaded, at the index it is loaded from."""
        node = self.expr.nodes[i]
        if node.op != "load" or self.operands[node.attr][1] is None:
            return None
        if i not in self._inner:
            known = self.operands[node.attr][1]
            assert known is not None
            at = {axis: self.form(a) for axis, a in enumerate(node.args)}
            self._inner[i] = _Forms(known.expr, known.operands, at)
        return self._inner[i]

    def clauses(self, i: int, truth: bool) -> Iterator[tuple[list[Bound], bool]]:
        """What a predicate says: each as one inequality ``bound >= 0``, or several of which one is false (True)."""
        node = self.expr.nodes[i]
        inner = self._definition(i)
        if inner is not None:
            yield from inner.clauses(inner.expr.results[0], truth)
        elif node.op == "not":
            yield from self.clauses(node.args[0], not truth)
        elif node.op == ("and" if truth else "or") and node.dtype == "b1":
            for a in node.args:
                yield from self.clauses(a, truth)
        elif node.op in ("and", "or", "ne" if truth else "eq"):
            opposite = self._exact(i, not truth)
            if all(opposite):
                yield [literal for clause in opposite for literal in clause], True
        else:
            for literal in self._exact(i, truth):
                if literal:
                    yield literal, False

    def _exact(self, i: int, truth: bool) -> list[list[Bound]]:
        """A predicate as a conjunction of inequalities, one a list; [] among them: something else."""
        node = self.expr.nodes[i]
        inner = self._definition(i)
        if inner is not None:
            return inner._exact(inner.expr.results[0], truth)
        if node.op == "not":
            return self._exact(node.args[0], not truth)
        if node.op == ("and" if truth else "or") and node.dtype == "b1":
            return [literal for a in node.args for literal in self._exact(a, truth)]
        op = node.op if truth else _NEGATED.get(node.op, "")
        if op not in COMPARE or op == "ne":
            return [[]]
        a, b = map(self.form, node.args)
        if a is None or b is None:
            return [[]]
        if op == "eq":
            return [[b.plus(a, -1)], [a.plus(b, -1)]]
        if op in _SWAPPED:
            a, b = b, a
        return [[b.plus(a, -1).shifted(-1 if op in ("lt", "gt") else 0)]]

    def _of(self, node: Node) -> Bound | None:
        op, dtype = node.op, node.dtype
        if op == "const":
            return number(int(dtypes.from_bits(node.attr, dtype)))
        if op == "coord":
            return self.coords[node.attr]
        args = [self.form(a) for a in node.args]
        if None in args or op in ("acc", "arg", "bitcast"):
            return None
        exact = self._exact_value(node, args)  # type: ignore[arg-type]
        low, high = dtypes.int_range(dtype)
        if exact is not None and low <= exact.low and exact.high <= high:
            return exact
        if any(arg.has_coord for arg in args):  # type: ignore[union-attr]
            return None
        attr = node.attr
        if op in ("load", "load_if"):
            attr, _ = self.operands[node.attr]
        known = self._range(node, args)  # type: ignore[arg-type]
        if known is not None and low <= known[0] and known[1] <= high:
            low, high = known
        return symbol(op, tuple(args), dtype, attr, low, high)  # type: ignore[arg-type]

    def _exact_value(self, node: Node, args: list[Bound]) -> Bound | None:
        """The result as a bound if nothing wraps around."""
        if node.op in ("add", "sub"):
            return args[0].plus(args[1], 1 if node.op == "add" else -1)
        if node.op == "mul":
            for this, other in (args, args[::-1]):
                if not other.terms:
                    return number(0).plus(this, other.const)
        if node.op == "convert":
            return args[0] if node.dtype != "b1" or (args[0].low >= 0 and args[0].high <= 1) else None
        if node.op == "select" and (args[1] == args[2] or not args[0].terms):
            return args[1] if args[0].const else args[2]
        if node.op in COMPARE:
            return _compared(node.op, *args)
        if node.op in ("min", "max"):
            of: Callable[..., Bound] = least if node.op == "min" else greatest
            found = of(args, node.dtype)
            # A coordinate may only stand on its own.
            return None if found.has_coord and any(s.op != "coord" and s.has_coord for s, _ in found.terms) else found
        return None

    def _range(self, node: Node, args: list[Bound]) -> tuple[int, int] | None:
        """What a symbol lies in, where that is less than its type holds."""
        if node.op == "select":
            return min(a.low for a in args[1:]), max(a.high for a in args[1:])
        if node.op in ("div", "rem") and args[0].low >= 0 and args[1].low > 0:
            (a, b) = args
            return (a.low // b.high, a.high // b.low) if node.op == "div" else (0, min(a.high, b.high - 1))
        return None
