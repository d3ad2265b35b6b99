"""Scalar programs: what one element of an operator's index space computes.

An :class:`Expr` is a DAG of scalar nodes over the *coordinates* of an index space. Its leaves are coordinates,
constants and loads of operand elements; a load names its operand by slot and gives one index node per axis, so
transposes, slices, broadcasts, pads, reshapes and gathers are all loads with another index. Fusing a producer
into a consumer is :func:`inline`: the producer's coordinates are replaced by the consumer's index nodes.

Arithmetic on ``f16`` and ``bf16`` happens in ``f32``: those types appear only at loads, constants, ``convert``
and ``bitcast``. A ``convert`` whose attribute is ``"round"`` was introduced by that rule, not by the user; a pair
of such conversions around an intermediate value is dropped, as XLA does under its default "excess precision".

:class:`Builder` hash-conses nodes, keeps index arithmetic in a canonical linear form and knows the value range of
every integer node, so ``(i * 64 + d) // 64`` becomes ``i`` and a clamp that cannot bite disappears.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from jax_mpk.graph import dtypes
from jax_mpk.graph.dtypes import INDEX

#: Elementwise operations by number of arguments. Comparisons return b1; ``select`` is (pred, on_true, on_false).
UNARY = frozenset(
    "neg abs sign floor ceil round_even round_away exp exp2 expm1 log log1p sqrt rsqrt cbrt sin cos tan asin acos "
    "atan sinh cosh tanh asinh acosh atanh logistic erf erfc erf_inv lgamma digamma bessel_i0e bessel_i1e "
    "is_finite not popcount clz convert bitcast reduce_precision".split()
)
COMPARE = frozenset("eq ne lt le gt ge".split())
BINARY = COMPARE | frozenset(
    "add sub mul div rem pow max min atan2 nextafter and or xor shl shr_logical shr_arith igamma igammac "
    "igamma_grad_a random_gamma_grad zeta polygamma".split()
)
TERNARY = frozenset(["select", "betainc"])
#: Leaves: ``coord`` (attr: axis), ``const`` (attr: bit pattern), ``load`` / ``load_if`` (attr: operand slot),
#: ``acc`` (attr: accumulator number, in epilogues and combiners), ``arg`` (attr: number, in combiners).
LEAVES = frozenset("coord const load load_if acc arg".split())


class Node(NamedTuple):
    """One scalar operation.

    Attributes:
      op: name from the tables above.
      args: positions of the argument nodes. ``load``: one index (type ``s64``) per operand axis, in bounds.
        ``load_if``: a ``b1`` predicate, then the indices; reads 0 where the predicate is false, and only where it
        is true must the indices be in bounds.
      dtype: short name of the result's type.
      attr: what the operation needs beside its arguments: see ``LEAVES``; ``reduce_precision``: (exponent bits,
        mantissa bits); ``convert``: "round" for an implicit rounding, else None.
    """

    op: str
    args: tuple[int, ...]
    dtype: str
    attr: Any = None


@dataclass(frozen=True)
class Expr:
    """A scalar program.

    Attributes:
      nodes: operations, arguments before users.
      results: positions of the results.
      extents: sizes of the coordinate axes the program may mention; coordinate d lies in [0, extents[d]).
    """

    nodes: tuple[Node, ...]
    results: tuple[int, ...]
    extents: tuple[int, ...]

    def result(self, k: int = 0) -> Node:
        return self.nodes[self.results[k]]

    def only(self, *results: int) -> Expr:
        """The program for other results (positions of nodes), without the nodes they do not need."""
        needed = set(results)
        for i in range(len(self.nodes) - 1, -1, -1):
            if i in needed:
                needed.update(self.nodes[i].args)
        position = {i: k for k, i in enumerate(sorted(needed))}
        nodes = tuple(self.nodes[i]._replace(args=tuple(position[a] for a in self.nodes[i].args)) for i in position)
        return Expr(nodes, tuple(position[r] for r in results), self.extents)

    def loads(self) -> tuple[int, ...]:
        """Positions of the load nodes."""
        return self._loads

    @cached_property
    def _loads(self) -> tuple[int, ...]:
        return tuple(i for i, node in enumerate(self.nodes) if node.op in ("load", "load_if"))

    @cached_property
    def index_nodes(self) -> tuple[int, ...]:
        """Positions of the nodes that indices and predicates of loads depend on, ascending."""
        needed: set[int] = set()
        for i in range(len(self.nodes) - 1, -1, -1):
            if i in needed or self.nodes[i].op in ("load", "load_if"):
                needed.update(self.nodes[i].args)
        return tuple(sorted(needed))

    @cached_property
    def index_coords(self) -> dict[int, frozenset[int]]:
        """Coordinates that each of ``index_nodes`` depends on."""
        out: dict[int, frozenset[int]] = {}
        for i in self.index_nodes:
            node = self.nodes[i]
            own = frozenset([node.attr]) if node.op == "coord" else frozenset()
            out[i] = own.union(*(out[a] for a in node.args if a in out))
        return out

    def __str__(self) -> str:
        from jax_mpk.graph.printer import format_expr

        return format_expr(self)


Range = tuple[int, int] | None  # inclusive; None: unknown
_Linear = tuple[dict[int, int], int]  # {node: coefficient}, constant


class Builder:
    """Builds one :class:`Expr`; nodes are positions in the growing list.

    Args:
      extents: sizes of the coordinate axes.
    """

    def __init__(self, extents: Sequence[int]):
        self.extents = tuple(extents)
        self.nodes: list[Node] = []
        self.ranges: list[Range] = []
        self._memo: dict[Node, int] = {}
        self._linear: dict[int, _Linear] = {}

    # -- leaves ------------------------------------------------------------------------------------------------

    def coord(self, axis: int) -> int:
        extent = self.extents[axis]
        if extent == 1:
            return self.index(0)
        return self._add(Node("coord", (), INDEX, axis), (0, max(extent - 1, 0)))

    def coords(self) -> list[int]:
        return [self.coord(axis) for axis in range(len(self.extents))]

    def const(self, value: object, dtype: str) -> int:
        return self.const_bits(dtypes.to_bits(value, dtype), dtype)

    def const_bits(self, bits: int, dtype: str) -> int:
        known: Range = None
        if not dtypes.is_float(dtype):
            exact = int(dtypes.from_bits(bits, dtype))
            known = (exact, exact)
        return self._add(Node("const", (), dtype, bits), known)

    def index(self, value: int) -> int:
        # Shapes and parameters in jaxprs may be NumPy integers, which do not wrap.
        exact = _wrapped(int(value))
        return self._add(Node("const", (), INDEX, exact % 2**64), (exact, exact))

    def load(self, slot: int, indices: Sequence[int], dtype: str, pred: int | None = None) -> int:
        """Element of operand ``slot``. ``pred`` None: the indices are always in bounds."""
        known = dtypes.int_range(dtype) if not dtypes.is_float(dtype) else None
        if pred is not None:
            truth = self.ranges[pred]
            if truth == (0, 0):
                return self.const(0, dtype)
            if truth != (1, 1):
                return self._add(Node("load_if", (pred, *indices), dtype, slot), known)
        return self._add(Node("load", tuple(indices), dtype, slot), known)

    def acc(self, k: int, dtype: str) -> int:
        return self._add(Node("acc", (), dtype, k), None if dtypes.is_float(dtype) else dtypes.int_range(dtype))

    def arg(self, k: int, dtype: str) -> int:
        return self._add(Node("arg", (), dtype, k), None if dtypes.is_float(dtype) else dtypes.int_range(dtype))

    # -- operations --------------------------------------------------------------------------------------------

    def op(self, name: str, *args: int, dtype: str | None = None, attr: Hashable = None) -> int:
        """Applies an elementwise operation; ``dtype`` is needed only by convert and bitcast."""
        if name in COMPARE or name == "is_finite":
            dtype = "b1"
        elif dtype is None:
            dtype = self.nodes[args[-1]].dtype
        simple = self._simplify(name, args, dtype, attr)
        if simple is not None:
            return simple
        return self._add(Node(name, args, dtype, attr), self._range(name, args, dtype))

    def add(self, a: int, b: int) -> int:
        return self.op("add", a, b)

    def sub(self, a: int, b: int) -> int:
        return self.op("sub", a, b)

    def mul(self, a: int, b: int) -> int:
        return self.op("mul", a, b)

    def floordiv(self, a: int, divisor: int) -> int:
        """Index ``a`` (not negative) divided by a positive constant."""
        return self.op("div", a, self.index(divisor))

    def mod(self, a: int, divisor: int) -> int:
        return self.op("rem", a, self.index(divisor))

    def clamp(self, low: int, x: int, high: int) -> int:
        return self.op("min", self.op("max", x, low), high)

    def convert(self, x: int, dtype: str, *, implicit: bool = False) -> int:
        """Value conversion as XLA's ``convert``; ``implicit`` marks a rounding the user did not write."""
        if self.nodes[x].dtype == dtype:
            return x
        return self.op("convert", x, dtype=dtype, attr="round" if implicit else None)

    def compute(self, x: int) -> int:
        """``x`` in the type arithmetic on it happens in."""
        return self.convert(x, dtypes.compute_type(self.nodes[x].dtype), implicit=True)

    def in_bounds(self, x: int, low: int, high: int) -> int:
        """``low <= x < high`` for an index and two Python ints."""
        return self.op("and", self.op("ge", x, self.index(low)), self.op("lt", x, self.index(high)))

    def linearize(self, indices: Sequence[int], shape: Sequence[int]) -> int:
        """Row-major position of an element."""
        out = self.index(0)
        for index, size in zip(indices, shape, strict=True):
            out = self.add(self.mul(out, self.index(size)), index)
        return out

    def delinearize(self, position: int, shape: Sequence[int]) -> list[int]:
        out = []
        for size in reversed(shape):
            if size == 1:
                out.append(self.index(0))
                continue
            out.append(self.mod(position, size))
            position = self.floordiv(position, size)
        return out[::-1]

    def build(self, *results: int) -> Expr:
        """The program for ``results``, without the nodes they do not need."""
        return Expr(tuple(self.nodes), (), self.extents).only(*results)

    # -- internals ---------------------------------------------------------------------------------------------

    def _add(self, node: Node, known: Range) -> int:
        found = self._memo.get(node)
        if found is None:
            found = self._memo[node] = len(self.nodes)
            self.nodes.append(node)
            self.ranges.append(known)
        return found

    def const_value(self, i: int) -> int | None:
        """Value of an integer or b1 node known exactly, else None."""
        known = self.ranges[i]
        return known[0] if known is not None and known[0] == known[1] else None

    def linear(self, i: int) -> _Linear:
        """Index node ``i`` as a sum of coefficient × atom plus a constant."""
        found = self._linear.get(i)
        if found is None:
            value = self.const_value(i)
            found = self._linear[i] = ({}, value) if value is not None else ({i: 1}, 0)
        return found

    def _from_linear(self, terms: dict[int, int], constant: int) -> int:
        terms = {atom: c for atom, c in sorted(terms.items()) if c}
        out: int | None = None
        for atom, c in terms.items():
            term = atom
            if c != 1:
                bounds = self.ranges[atom]
                known = None if bounds is None else _ordered(bounds[0] * c, bounds[1] * c)
                known = _fits(known, INDEX) or dtypes.int_range(INDEX)
                term = self._add(Node("mul", (atom, self.index(c)), INDEX), known)
                self._linear.setdefault(term, ({atom: c}, 0))
            out = term if out is None else self._sum(out, term)
        if out is None:
            return self.index(constant)
        return out if constant == 0 else self._sum(out, self.index(constant))

    def _sum(self, a: int, b: int) -> int:
        (ta, ca), (tb, cb) = self.linear(a), self.linear(b)
        node = self._add(Node("add", (a, b), INDEX), self._range("add", (a, b), INDEX))
        self._linear.setdefault(node, (_merge(ta, tb, 1), ca + cb))
        return node

    def _bounds(self, terms: dict[int, int], constant: int) -> Range:
        low = high = constant
        for atom, c in terms.items():
            known = self.ranges[atom]
            if known is None:
                return None
            a, b = _ordered(known[0] * c, known[1] * c)
            low, high = low + a, high + b
        return low, high

    def _simplify(self, name: str, args: tuple[int, ...], dtype: str, attr: Hashable) -> int | None:
        nodes, ranges = self.nodes, self.ranges
        if dtype == INDEX and name in ("add", "sub", "mul"):
            (ta, ca), (tb, cb) = self.linear(args[0]), self.linear(args[1])
            if name == "mul":
                if ta and tb:
                    return None
                terms, scale, other = (tb, ca, cb) if not ta else (ta, cb, ca)
                return self._from_linear({atom: c * scale for atom, c in terms.items()}, scale * other)
            sign = 1 if name == "add" else -1
            return self._from_linear(_merge(ta, tb, sign), ca + sign * cb)
        if dtype == INDEX and name in ("div", "rem"):
            divisor, known = self.const_value(args[1]), ranges[args[0]]
            if divisor is None or divisor <= 0 or known is None or known[0] < 0:
                return None
            terms, constant = self.linear(args[0])
            inner_node = nodes[args[0]]
            if name == "div" and inner_node.op == "div" and (by := self.const_value(inner_node.args[1])):
                if by > 0 and _fits((0, by * divisor), INDEX):
                    return self.op("div", inner_node.args[0], self.index(by * divisor))
            whole = {atom: c for atom, c in terms.items() if c % divisor == 0}
            rest = {atom: c for atom, c in terms.items() if c % divisor}
            rest_range = self._bounds(rest, constant % divisor)
            if rest_range is not None and 0 <= rest_range[0] and rest_range[1] < divisor:
                if name == "rem":
                    return self._from_linear(rest, constant % divisor)
                return self._from_linear({a: c // divisor for a, c in whole.items()}, constant // divisor)
            if whole and rest_range is not None and rest_range[0] >= 0:
                inner = self._from_linear(rest, constant % divisor)
                small = self.op(name, inner, self.index(divisor))
                if name == "rem":
                    return small
                outer = self._from_linear({a: c // divisor for a, c in whole.items()}, constant // divisor)
                return self.add(outer, small)
            return None
        if name in ("max", "min") and ranges[args[0]] is not None and ranges[args[1]] is not None:
            (a0, a1), (b0, b1) = ranges[args[0]], ranges[args[1]]  # type: ignore[misc]
            if name == "max":
                return args[0] if a0 >= b1 else args[1] if b0 >= a1 else None
            return args[0] if a1 <= b0 else args[1] if b1 <= a0 else None
        if name in COMPARE:
            truth = _compare(name, ranges[args[0]], ranges[args[1]])
            return None if truth is None else self.const(truth, "b1")
        if name == "not" and dtype == "b1" and (value := self.const_value(args[0])) is not None:
            return self.const(not value, "b1")
        if name in ("and", "or") and dtype == "b1":
            for this, other in (args, args[::-1]):
                value = self.const_value(this)
                if value is not None:
                    return other if bool(value) == (name == "and") else this
            return args[0] if args[0] == args[1] else None
        if name == "select":
            value = self.const_value(args[0])
            if value is not None:
                return args[1] if value else args[2]
            return args[1] if args[1] == args[2] else None
        if name == "convert":
            return self._simplify_convert(args[0], dtype, attr)
        if name == "bitcast" and nodes[args[0]].dtype == dtype:
            return args[0]
        return None

    def _simplify_convert(self, x: int, dtype: str, attr: Hashable) -> int | None:
        node, known = self.nodes[x], self.ranges[x]
        if node.dtype == dtype:
            return x
        if node.op == "const" and not dtypes.is_float(node.dtype) and not dtypes.is_float(dtype):
            value = int(dtypes.from_bits(node.attr, node.dtype))  # type: ignore[arg-type]
            if dtype == "b1":
                return self.const(value != 0, "b1")
            low, high = dtypes.int_range(dtype)
            return self.const((value - low) % (high - low + 1) + low, dtype)
        if node.op == "const" and node.dtype in ("f16", "bf16") and dtype in ("f32", "f64"):
            return self.const(dtypes.from_bits(node.attr, node.dtype), dtype)  # type: ignore[arg-type]
        if node.op == "convert":
            inner = node.args[0]
            source = self.nodes[inner].dtype
            # f32 → bf16 → f32 where the narrowing was ours: keep the excess precision.
            if node.attr == "round" and source == dtype:
                return inner
            # integer → integer → integer where the middle type holds the value.
            if not any(map(dtypes.is_float, (source, node.dtype, dtype))) and "b1" not in (node.dtype, dtype):
                if self.ranges[inner] is not None and _fits(self.ranges[inner], node.dtype) is not None:
                    return self.convert(inner, dtype)
        if dtype == INDEX and node.op in ("add", "sub", "mul") and dtypes.is_int(node.dtype):
            # An index computed in a narrower type without overflow: redo it in s64, where it is linear.
            wide = [self.convert(a, INDEX) for a in node.args]
            exact = self._range(node.op, tuple(wide), INDEX)
            if exact is not None and _fits(exact, node.dtype) is not None and known is not None:
                return self.op(node.op, *wide)
        return None

    def _range(self, name: str, args: tuple[int, ...], dtype: str) -> Range:
        if dtypes.is_float(dtype):
            return None
        if dtype == "b1":
            return 0, 1
        full = dtypes.int_range(dtype)
        known = [self.ranges[a] for a in args]
        if name == "select":
            known, args = known[1:], args[1:]
        if any(k is None for k in known):
            return full
        if any(dtypes.is_float(self.nodes[a].dtype) for a in args):
            return full
        ranges: list[tuple[int, int]] = known  # type: ignore[assignment]
        out: Range = None
        if name == "add":
            (a0, a1), (b0, b1) = ranges
            out = a0 + b0, a1 + b1
        elif name == "sub":
            (a0, a1), (b0, b1) = ranges
            out = a0 - b1, a1 - b0
        elif name == "mul":
            (a0, a1), (b0, b1) = ranges
            products = (a0 * b0, a0 * b1, a1 * b0, a1 * b1)
            out = min(products), max(products)
        elif name in ("max", "min"):
            pick = max if name == "max" else min
            (a0, a1), (b0, b1) = ranges
            out = pick(a0, b0), pick(a1, b1)
        elif name == "select":
            out = min(r[0] for r in ranges), max(r[1] for r in ranges)
        elif name == "convert":
            out = ranges[0]
        elif name in ("div", "rem") and ranges[0][0] >= 0 and ranges[1][0] > 0:
            (_, a1), (b0, b1) = ranges
            out = (ranges[0][0] // b1, a1 // b0) if name == "div" else (0, min(a1, b1 - 1))
        elif name == "rem" and ranges[1][0] > 0:
            (a0, a1), (_, b1) = ranges
            out = (max(a0, 1 - b1) if a0 < 0 else 0), (min(a1, b1 - 1) if a1 > 0 else 0)
        elif name == "and" and ranges[0][0] >= 0 and ranges[1][0] >= 0:
            out = 0, min(ranges[0][1], ranges[1][1])
        elif name in ("shr_logical", "shr_arith") and ranges[0][0] >= 0:
            # shr_arith copies the top bit, of unsigned values too.
            if name == "shr_logical" or ranges[0][1] <= full[1] >> dtypes.is_unsigned(dtype):
                out = 0, ranges[0][1]
        elif name in ("popcount", "clz"):
            out = 0, dtypes.itemsize(dtype) * 8
        elif name == "sign":
            out = -1, 1
        fitted = _fits(out, dtype)
        return fitted if fitted is not None else full


def inline(
    builder: Builder,
    expr: Expr,
    coords: Sequence[int],
    load: Callable[[int, list[int], str, int | None], int],
    leaf: Callable[[Node], int] | None = None,
) -> list[int]:
    """Copies ``expr`` into ``builder`` at other coordinates: the one substitution every fusion is made of.

    Args:
      builder: receives the nodes.
      expr: the program to copy.
      coords: nodes of ``builder`` that replace coordinate 0, 1, ….
      load: called as (slot, index nodes, dtype, predicate node or None) for each load.
      leaf: called for ``acc`` and ``arg`` nodes; by default they are copied.

    Returns:
      The nodes of ``expr``'s results.
    """
    at: list[int] = []
    for node in expr.nodes:
        if node.op == "coord":
            at.append(coords[node.attr])  # type: ignore[call-overload]
        elif node.op == "const":
            at.append(builder.const_bits(node.attr, node.dtype))  # type: ignore[arg-type]
        elif node.op == "load":
            at.append(load(node.attr, [at[a] for a in node.args], node.dtype, None))  # type: ignore[arg-type]
        elif node.op == "load_if":
            pred, *indices = (at[a] for a in node.args)
            at.append(load(node.attr, indices, node.dtype, pred))  # type: ignore[arg-type]
        elif node.op in ("acc", "arg"):
            make = builder.acc if node.op == "acc" else builder.arg
            at.append(leaf(node) if leaf is not None else make(node.attr, node.dtype))  # type: ignore[arg-type]
        else:
            at.append(builder.op(node.op, *(at[a] for a in node.args), dtype=node.dtype, attr=node.attr))
    return [at[r] for r in expr.results]


def _merge(a: dict[int, int], b: dict[int, int], sign: int) -> dict[int, int]:
    out = dict(a)
    for atom, c in b.items():
        out[atom] = out.get(atom, 0) + sign * c
    return {atom: c for atom, c in out.items() if c}


def _wrapped(value: int) -> int:
    """A Python int as index arithmetic holds it."""
    low, high = dtypes.int_range(INDEX)
    return (value - low) % (high - low + 1) + low


def _ordered(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a <= b else (b, a)


def _fits(known: Range, dtype: str) -> Range:
    if known is None:
        return None
    low, high = dtypes.int_range(dtype)
    return known if low <= known[0] and known[1] <= high else None


def _compare(name: str, a: Range, b: Range) -> bool | None:
    if a is None or b is None:
        return None
    if name in ("gt", "ge"):
        return _compare({"gt": "lt", "ge": "le"}[name], b, a)
    if name == "lt":
        return True if a[1] < b[0] else False if a[0] >= b[1] else None
    if name == "le":
        return True if a[1] <= b[0] else False if a[0] > b[1] else None
    same = a[0] == a[1] == b[0] == b[1]
    apart = a[1] < b[0] or b[1] < a[0]
    equal = True if same else False if apart else None
    return equal if equal is None or name == "eq" else not equal
