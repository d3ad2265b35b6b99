"""Bounds of regions that are known at run time only, and what can be proved about them beforehand.

A :class:`Bound` is an affine expression of integers that have one value throughout an execution of a block: elements of
small values (a position, a loop's counter), and what programs compute from these. A value is named by its id, so equal
symbols are equal numbers wherever they are read, as long as that is within one execution of the block that defines the
value; from one round of a loop, or one launch, to the next they may differ.

Nothing here wraps around: arithmetic that could is a symbol of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from jax_mpk.graph import dtypes, semantics
from jax_mpk.graph.scalar import COMPARE, Node

#: More choices between arguments of minima and maxima than this are not looked at: the proof fails.
_MOST_CHOICES = 8


@dataclass(frozen=True)
class Symbol:
    """An integer that is known at run time only.

    Attributes:
      op: "load" (an element of a value), "load_if" (0 where the first argument is 0), "coord" (a coordinate of the
        program it stands in; never part of a region), or any operation of scalar programs on integers.
      args: indices of an element, arguments of an operation.
      dtype: element type.
      attr: value id of an element, axis of a coordinate; else as in :class:`~jax_mpk.graph.scalar.Node`.
      low, high: what it lies in, inclusive.
    """

    op: str
    args: tuple[Bound, ...]
    dtype: str
    attr: object
    low: int
    high: int

    @cached_property
    def _hash(self) -> int:
        return hash((self.op, self.args, self.dtype, self.attr))

    def __hash__(self) -> int:  # symbols hold bounds, bounds symbols, and both are looked up all the time
        return self._hash

    @cached_property
    def has_coord(self) -> bool:
        return self.op == "coord" or any(arg.has_coord for arg in self.args)

    @cached_property
    def text(self) -> str:
        if self.op == "coord":
            return f"i{self.attr}"
        inner = ", ".join(map(str, self.args))
        if self.op == "load":
            return f"%{self.attr}" + (f"[{inner}]" if self.args else "")
        name = f"{self.dtype}" if self.op == "convert" else self.op if self.op != "load_if" else f"%{self.attr} if"
        return f"{name}({inner})"


@dataclass(frozen=True)
class Bound:
    """``const`` plus the sum of coefficient × symbol, exact.

    Attributes:
      terms: symbols, each once, with coefficients other than 0; in an order of their own.
      const: the constant.
    """

    terms: tuple[tuple[Symbol, int], ...] = ()
    const: int = 0

    @cached_property
    def _hash(self) -> int:
        return hash((self.terms, self.const))

    def __hash__(self) -> int:
        return self._hash

    def plus(self, other: Bound, scale: int = 1) -> Bound:
        """``self + scale * other``."""
        if not other.terms:
            return Bound(self.terms, self.const + scale * other.const)
        sums = dict(self.terms)
        for symbol, k in other.terms:
            sums[symbol] = sums.get(symbol, 0) + scale * k
        return Bound(_in_order(sums), self.const + scale * other.const)

    def shifted(self, by: int) -> Bound:
        return Bound(self.terms, self.const + by)

    def replaced(self, symbol: Symbol, by: Bound) -> Bound:
        """With an expression in place of a symbol."""
        rest = tuple((s, k) for s, k in self.terms if s != symbol)
        return Bound(rest, self.const).plus(by, dict(self.terms)[symbol])

    @cached_property
    def low(self) -> int:
        """The least it can be, by the ranges of its symbols."""
        return self.const + sum(k * (s.low if k > 0 else s.high) for s, k in self.terms)

    @cached_property
    def high(self) -> int:
        """The most it can be."""
        return self.const + sum(k * (s.high if k > 0 else s.low) for s, k in self.terms)

    @cached_property
    def size(self) -> int:
        """How many symbols it is made of, with theirs."""
        return sum(1 + sum(arg.size for arg in s.args) for s, _ in self.terms)

    @cached_property
    def values(self) -> frozenset[int]:
        """Values that it depends on."""
        own: frozenset[int] = frozenset(s.attr for s, _ in self.terms if s.op in ("load", "load_if"))  # type: ignore[misc]
        return own.union(*(arg.values for s, _ in self.terms for arg in s.args))

    @cached_property
    def has_coord(self) -> bool:
        return any(s.has_coord for s, _ in self.terms)

    @cached_property
    def text(self) -> str:
        out = ""
        for s, k in self.terms:
            factor = s.text if abs(k) == 1 else f"{abs(k)}*{s.text}"
            out += (" - " if k < 0 else " + ") + factor
        if self.const or not out:
            out += f" {'-' if self.const < 0 else '+'} {abs(self.const)}"
        return f"-{out[3:]}" if out.startswith(" - ") else out[3:]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Span:
    """The part of a box where ``first <= x < end`` along one axis, or the part where not.

    Attributes:
      axis: the axis.
      first, end: what limits it; None: nothing.
      outside: whether the rest is meant. Both limits are there then.
    """

    axis: int
    first: Bound | None
    end: Bound | None
    outside: bool = False

    @cached_property
    def values(self) -> frozenset[int]:
        """Values that the limits depend on."""
        return frozenset().union(*(limit.values for limit in (self.first, self.end) if limit is not None))

    def __str__(self) -> str:
        low = "" if self.first is None else f"{self.first} <= "
        high = "" if self.end is None else f" < {self.end}"
        return f"{'not ' if self.outside else ''}{low}i{self.axis}{high}"


#: What a region is beside its box: the part of the box that lies in all of these.
Spans = tuple[Span, ...]


# -- making ----------------------------------------------------------------------------------------------------


def number(value: int) -> Bound:
    return Bound((), int(value))


def symbol(op: str, args: tuple[Bound, ...], dtype: str, attr: object, low: int, high: int) -> Bound:
    return Bound(((Symbol(op, args, dtype, attr, low, high), 1),))


def least(bounds: Sequence[Bound], dtype: str = dtypes.INDEX) -> Bound:
    """The smallest of some bounds."""
    kept = _not_implied(bounds, lambda a, b: at_most(b, a))
    low, high = min(b.low for b in kept), min(b.high for b in kept)
    return kept[0] if len(kept) == 1 else symbol("min", kept, dtype, None, low, high)


def greatest(bounds: Sequence[Bound], dtype: str = dtypes.INDEX) -> Bound:
    """The largest of some bounds."""
    kept = _not_implied(bounds, at_most)
    low, high = max(b.low for b in kept), max(b.high for b in kept)
    return kept[0] if len(kept) == 1 else symbol("max", kept, dtype, None, low, high)


def _not_implied(bounds: Sequence[Bound], implied: Callable[[Bound, Bound], bool]) -> tuple[Bound, ...]:
    """``bounds`` without those for which another one always does."""
    kept: list[Bound] = []
    for bound in bounds:
        if not any(implied(bound, other) for other in kept):
            kept = [other for other in kept if not implied(other, bound)] + [bound]
    return tuple(sorted(kept, key=lambda bound: bound.text))


def _in_order(sums: dict[Symbol, int]) -> tuple[tuple[Symbol, int], ...]:
    found = [(s, k) for s, k in sums.items() if k]
    return tuple(sorted(found, key=lambda term: term[0].text)) if len(found) > 1 else tuple(found)


# -- deciding --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 14)
def at_most(a: Bound, b: Bound) -> bool:
    """Whether ``a <= b`` for all values of the symbols.

    Minima and maxima are taken apart; what is left is affine in symbols about which nothing but their ranges is
    known, and least where each of them is at an end of its range. True is a proof; False says nothing.
    """
    return _not_negative(b.plus(a, -1), _MOST_CHOICES)


def _not_negative(d: Bound, choices: int) -> bool:
    if d.low >= 0:
        return True
    if choices == 0:
        return False
    # What must hold for each argument comes before what must hold for one of them, which may be another one each time.
    for needs_all in (True, False):
        for s, k in d.terms:
            if s.op in ("min", "max") and ((s.op == "min") == (k > 0)) == needs_all:
                found = (_not_negative(d.replaced(s, arg), choices - 1) for arg in s.args)
                return all(found) if needs_all else any(found)
    return False


@lru_cache(maxsize=1 << 14)
def apart(a: Spans, b: Spans) -> bool:
    """Whether two parts of boxes are proved to have no element in common, whatever the boxes."""
    return any(_apart(x, y) or _apart(y, x) for x in a for y in b if x.axis == y.axis)


def _apart(x: Span, y: Span) -> bool:
    if y.outside:
        return False
    if x.outside:
        return _is_at_most(x.first, y.first) and _is_at_most(y.end, x.end)
    return _is_at_most(x.end, y.first)


def _is_at_most(a: Bound | None, b: Bound | None) -> bool:
    return a is not None and b is not None and at_most(a, b)


# -- computing -------------------------------------------------------------------------------------------------


def evaluate(bound: Bound, load: Callable[[int, tuple[int, ...]], int]) -> int:
    """The number a bound is.

    Args:
      bound: without coordinates.
      load: gives elements: (value id, index) to the number there.
    """
    return bound.const + sum(k * _symbol_value(s, load) for s, k in bound.terms)


def _symbol_value(s: Symbol, load: Callable[[int, tuple[int, ...]], int]) -> int:
    args = [evaluate(arg, load) for arg in s.args]
    if s.op == "load":
        return load(s.attr, tuple(args))  # type: ignore[arg-type]
    if s.op == "load_if":
        return load(s.attr, tuple(args[1:])) if args[0] else 0  # type: ignore[arg-type]
    if s.op == "select":
        return args[1] if args[0] else args[2]
    if s.op in ("min", "max"):
        return min(args) if s.op == "min" else max(args)
    if s.op in COMPARE:
        return int(getattr(operator, s.op)(*args))
    if s.op == "convert" and s.dtype == "b1":
        return int(args[0] != 0)
    if s.op == "convert":
        low, high = dtypes.int_range(s.dtype)
        return (args[0] - low) % (high - low + 1) + low
    arrays = [np.array(arg, dtypes.to_numpy(s.dtype)) for arg in args]
    return int(semantics.apply(Node(s.op, (), s.dtype, s.attr), arrays))
