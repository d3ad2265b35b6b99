"""How many keys a mask leaves: which part of a cache attention has to read is known at run time only.

A mask is recognised where scores become −inf, or a number next to it, for every key beyond a position:

    select(key <= position, score, −inf)        score + select(key <= position, 0, −inf)

The weights of all such keys are exactly 0 as long as one key in front of them is live; where none is, every key counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jax_mpk.graph import dtypes
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.scalar import Builder

#: What a masked score is at most. Next to any score that f32 arithmetic gives it, e^(masked − best) is 0.
_MASKED = -1e30
#: Least factor that leaves it so.
_SCALE = 1e-4


def live_keys(b: Builder, scores: int, axis: int, fixed: set[int]) -> int | None:
    """A node that bounds the keys whose weights can differ from 0, or None where there is none.

    Args:
      b: holds the program; the node is added to it.
      scores: node of the scores, all maps in it computed in place.
      axis: the coordinate of the keys.
      fixed: coordinates that the bound may depend on; where it depends on others, it is that of their last position.

    Returns:
      An index node: the keys from there on have a weight of 0. At least 1 and at most the number of keys.
    """
    return _Bounds(b, axis, fixed).of_scores(scores)


class _Bounds:
    def __init__(self, b: Builder, axis: int, fixed: set[int]):
        self.b = b
        self.axis = axis
        self.key = b.coord(axis)
        self.fixed = fixed
        #: Sums in narrow types: least and largest value, type.
        self.narrow: list[tuple[int, int, str]] = []

    def of_scores(self, i: int) -> int | None:
        """The bound behind which node ``i`` is masked."""
        node = self.b.nodes[i]
        if node.op == "convert" and dtypes.is_float(self.b.nodes[node.args[0]].dtype):
            return self.of_scores(node.args[0])
        if node.op == "add":
            return self._first(node.args, self.of_scores)
        if node.op in ("mul", "div"):  # by a scale, say
            choices = (node.args, node.args[::-1]) if node.op == "mul" else (node.args,)
            return next((self.of_scores(value) for value, scale in choices if self._is_scale(scale)), None)
        if node.op != "select":
            return None
        pred, *cases = node.args
        for masked, truth in ((cases[1], True), (cases[0], False)):
            if self._is_masked(masked):
                return self._of_predicate(pred, truth, self._is_masked(masked, -math.inf))
        return None

    def _first(self, args: tuple[int, ...], of: Callable[[int], int | None]) -> int | None:
        return next((found for a in args if (found := of(a)) is not None), None)

    def _is_masked(self, i: int, most: float = _MASKED) -> bool:
        node = self.b.nodes[i]
        if node.op == "convert":
            return self._is_masked(node.args[0], most)
        if node.op != "const" or not dtypes.is_float(node.dtype):
            return False
        return bool(float(dtypes.from_bits(node.attr, node.dtype)) <= most)  # type: ignore[arg-type]

    def _is_zero(self, i: int) -> bool:
        node = self.b.nodes[i]
        return node.op == "const" and dtypes.from_bits(node.attr, node.dtype) == 0

    def _is_scale(self, i: int) -> bool:
        """Whether a masked score multiplied with, or divided by, this is still one."""
        node = self.b.nodes[i]
        if node.op != "const" or not dtypes.is_float(node.dtype):
            return False
        return bool(_SCALE <= float(dtypes.from_bits(node.attr, node.dtype)) <= 1 / _SCALE)  # type: ignore[arg-type]

    def _of_predicate(self, i: int, truth: bool, infinite: bool) -> int | None:
        """The bound of the keys for which a predicate can have a truth value.

        Other conditions beside it may mask all keys in front of the bound. If the mask is finite, all keys count then.
        """
        node = self.b.nodes[i]
        if node.op == "not":
            return self._of_predicate(node.args[0], not truth, infinite)
        if node.op == ("and" if truth else "or"):
            return self._first(node.args, lambda a: self._of_predicate(a, truth, infinite)) if infinite else None
        if node.op in ("ne", "eq") and self._is_zero(node.args[1]):  # a mask held as a number
            held = self.b.nodes[node.args[0]]
            if held.op == "convert" and self.b.nodes[held.args[0]].dtype == "b1":
                return self._of_predicate(held.args[0], truth == (node.op == "ne"), infinite)
            return None
        op = node.op if truth else {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le"}.get(node.op, "")
        if op in ("ge", "gt"):
            return self._limit(node.args[1], node.args[0], op == "ge")
        return self._limit(node.args[0], node.args[1], op == "le") if op in ("le", "lt") else None

    def _limit(self, key: int, most: int, inclusive: bool) -> int | None:
        """The bound of key + constant <= most (or <)."""
        b = self.b
        terms, shift = b.linear(self._index(key))
        if terms != {self.key: 1} or not dtypes.is_int(b.nodes[most].dtype) or b.nodes[most].dtype == "u64":
            return None
        found = self._extremes(self._index(most))
        if found is None:
            return None
        low, high = found
        # Every row has a live key, and no position wrapped around.
        good = b.op("gt", b.add(low, b.index(int(inclusive) - shift)), b.index(0))
        for a, z, dtype in self.narrow:
            least, greatest = dtypes.int_range(dtype)
            fits = b.op("and", b.op("ge", a, b.index(least)), b.op("le", z, b.index(greatest)))
            good = b.op("and", good, fits)
        keys = b.index(b.extents[self.axis])
        count = b.clamp(b.index(1), b.add(high, b.index(int(inclusive) - shift)), keys)
        return b.op("select", good, count, keys)

    def _index(self, i: int) -> int:
        return self.b.convert(i, INDEX)

    def _extremes(self, i: int) -> tuple[int, int] | None:
        """Least and largest value of an index over the coordinates that are not fixed; None where unknown."""
        b, node = self.b, self.b.nodes[i]
        if node.op == "convert" and not self._is_fixed(i):
            source = b.nodes[node.args[0]]
            if source.op != "add" or not dtypes.is_int(source.dtype):
                return None
            parts = [self._extremes(self._index(a)) for a in source.args]
            if parts[0] is None or parts[1] is None:
                return None
            low, high = b.add(parts[0][0], parts[1][0]), b.add(parts[0][1], parts[1][1])
            self.narrow.append((low, high, source.dtype))
            return low, high
        terms, constant = b.linear(i)
        low = high = b.index(constant)
        for atom, scale in terms.items():
            first = last = b.mul(atom, b.index(scale))
            if b.nodes[atom].op == "coord" and not self._is_fixed(atom):
                if b.nodes[atom].attr == self.axis:
                    return None
                most = scale * (b.extents[b.nodes[atom].attr] - 1)  # type: ignore[call-overload]
                first, last = b.index(min(most, 0)), b.index(max(most, 0))
            elif not self._is_fixed(atom):
                inner = self._extremes(atom) if scale == 1 and b.nodes[atom].op == "convert" else None
                if inner is None:
                    return None
                first, last = inner
            low, high = b.add(low, first), b.add(high, last)
        return low, high

    def _is_fixed(self, i: int) -> bool:
        """Whether a node depends on no coordinates but those that a bound may depend on."""
        coords = {node.attr for node in self.b.build(i).nodes if node.op == "coord"}
        return coords <= self.fixed
