"""Scalar programs as C++ statements.

A node that is used once is written where it is used, as long as lines stay short; all others get a name. Index nodes
are 32 bits wide wherever their range allows. Operations are those of csrc/device/scalar.cuh; plain operators appear
only where C++ means the same by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.scalar import Builder, Expr, Node, inline

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
_COMPARE = frozenset("eq ne lt le gt ge".split())
_INT32 = (-(2**31), 2**31 - 1)
#: An expression longer than this gets a name.
_LONG = 72

#: Text of a load, given its slot, its index texts, its element type and the text of its predicate (None: always).
Load = Callable[[int, list["Term"], str, "str | None"], str]


class Term:
    """An expression as text.

    Attributes:
      text: C++.
      atomic: needs no parentheses.
      wide: an index that is held in 64 bits.
      value: the constant it is, or None.
    """

    __slots__ = ("atomic", "text", "value", "wide")

    def __init__(self, text: str, atomic: bool = True, wide: bool = False, value: int | None = None):
        self.text, self.atomic, self.wide, self.value = text, atomic, wide, value

    @property
    def known(self) -> int:
        """The constant it is; it must be one."""
        assert self.value is not None, f"{self.text} is no constant"
        return self.value

    def __str__(self) -> str:
        return self.text if self.atomic else f"({self.text})"


def fixed(value: int) -> Term:
    """An index that is the same for every task; none of them is negative."""
    return Term(str(value), value=value)


def product(terms: Sequence[Term]) -> Term:
    """The product of extents."""
    constant = math.prod(t.value for t in terms if t.value is not None)
    rest = [str(t) for t in terms if t.value is None]
    if not rest:
        return fixed(constant)
    if constant == 0:
        return fixed(0)
    texts = rest if constant == 1 else [*rest, str(constant)]
    return Term(" * ".join(texts), len(texts) == 1)


class Scalars:
    """Writes one program.

    Args:
      expr: the program.
      coords: its coordinates; all are C++ expressions of type int.
      load: text of a load.
      leaf: text of an ``acc`` or ``arg`` node.
      prefix: of the names it makes.
    """

    def __init__(
        self,
        expr: Expr,
        coords: Sequence[Term],
        load: Load,
        leaf: Callable[[Node], str] | None = None,
        prefix: str = "t",
    ):
        b = Builder(expr.extents)
        self._roots = inline(b, expr, b.coords(), lambda slot, at, dtype, pred: b.load(slot, at, dtype, pred))
        self._nodes, self._ranges = b.nodes, b.ranges
        self._coords, self._load, self._leaf, self._prefix = coords, load, leaf, prefix
        self._uses = [0] * len(b.nodes)
        needed = set(self._roots)
        for i in range(len(b.nodes) - 1, -1, -1):
            if i in needed:
                needed.update(b.nodes[i].args)
                for a in b.nodes[i].args:
                    self._uses[a] += 1
        for r in self._roots:
            self._uses[r] += 1
        self._order = sorted(needed)
        self._terms: dict[int, Term] = {}
        self._names = 0
        self.lines: list[str] = []

    def results(self) -> list[Term]:
        """Writes the statements; returns the texts of the results."""
        for i in self._order:
            term = self._term(i)
            leaf = self._nodes[i].op in ("const", "coord", "acc", "arg")
            if not leaf and (self._uses[i] > 1 or len(term.text) > _LONG):
                term = self._named(i, term)
            self._terms[i] = term
        return [self._terms[r] for r in self._roots]

    def _named(self, i: int, term: Term) -> Term:
        name = f"{self._prefix}{self._names}"
        self._names += 1
        dtype = self._type(i)
        self.lines.append(f"const {dtype} {name} = {term.text};")
        return Term(name, True, dtype == INDEX)

    def _wide(self, i: int) -> bool:
        known = self._ranges[i]
        return known is None or known[0] < _INT32[0] or known[1] > _INT32[1]

    def _tame(self, i: int) -> bool:
        """Whether an index cannot have wrapped around."""
        known = self._ranges[i]
        return known is not None and known != dtypes.int_range(INDEX)

    def _type(self, i: int) -> str:
        node = self._nodes[i]
        return "int" if node.dtype == INDEX and not self._wide(i) else node.dtype

    def _arg(self, i: int, a: int) -> str:
        """Argument ``a`` of node ``i``, an operation that knows nothing of narrow indices."""
        term = self._terms[a]
        if self._nodes[a].dtype == INDEX and not term.wide:
            return f"s64({term.text})"
        return term.text

    def _index(self, a: int, wide: bool) -> Term:
        """An index argument in the width of an operation."""
        term = self._terms[a]
        if wide and not term.wide:
            return Term(f"s64({term.text})", True, True)
        return term

    def _term(self, i: int) -> Term:
        node = self._nodes[i]
        wide = node.dtype == INDEX and self._wide(i)
        if node.op == "const":
            return constant(node.attr, node.dtype)
        if node.op == "coord":
            return self._coords[node.attr]
        if node.op in ("load", "load_if"):
            args = [self._terms[a] for a in node.args]
            pred = str(args.pop(0)) if node.op == "load_if" else None
            text = self._load(node.attr, args, node.dtype, pred)
            if pred is not None:
                return Term(f"{pred} ? {text} : {node.dtype}{{}}", False, node.dtype == INDEX)
            return Term(text, True, node.dtype == INDEX)
        if node.op in ("acc", "arg"):
            assert self._leaf is not None
            return Term(self._leaf(node), True, node.dtype == INDEX)
        return self._operation(i, node, wide)

    def _operation(self, i: int, node: Node, wide: bool) -> Term:
        op, args = node.op, node.args
        source = self._nodes[args[-1]].dtype
        if op == "select":
            p, a, b = args
            if node.dtype == INDEX:
                return Term(f"{self._terms[p]} ? {self._index(a, wide)} : {self._index(b, wide)}", False, wide)
            return Term(f"{self._terms[p]} ? {self._terms[a]} : {self._terms[b]}", False)
        if source == INDEX and len(args) == 2 and (op in _COMPARE or (node.dtype == INDEX and self._tame(i))):
            common = wide or any(self._terms[a].wide for a in args)
            left, right = (self._index(a, common) for a in args)
            exact = op not in ("div", "rem") or (self._nodes[args[1]].op == "const" and right.value not in (0, -1))
            text = None
            if op in _INFIX and exact:
                text = f"{left} {_INFIX[op]} {right}"
            elif op in ("max", "min"):
                text = f"op_{op}({left.text}, {right.text})"
            if text is not None:
                if common and node.dtype == INDEX and not wide:
                    return Term(f"int({text})", True)
                return Term(text, op in ("max", "min"), wide)
        if op in _COMPARE or (source == "b1" and op in ("and", "or", "xor")):
            left, right = (Term(self._arg(i, a), self._terms[a].atomic) for a in args)
            return Term(f"{left} {_INFIX[op]} {right}", False)
        if op == "not" and source == "b1":
            return Term(f"!{self._terms[args[0]]}", True)
        if node.dtype in ("f32", "f64") and op in ("add", "sub", "mul", "div"):
            return Term(f"{self._terms[args[0]]} {_INFIX[op]} {self._terms[args[1]]}", False)
        if op == "neg" and node.dtype in ("f32", "f64"):
            return Term(f"-{self._terms[args[0]]}", False)
        if op == "convert":
            if node.dtype == INDEX and not wide and source in ("s8", "s16", "s32", "u8", "u16", "b1"):
                return Term(f"int({self._terms[args[0]].text})", True)
            text = self._terms[args[0]].text if source == INDEX else self._arg(i, args[0])
            return Term(f"convert<{node.dtype}>({text})", True, wide or node.dtype == INDEX)
        listed = ", ".join(self._arg(i, a) for a in args)
        if op == "bitcast":
            return Term(f"bitcast<{node.dtype}>({listed})", True, node.dtype == INDEX)
        if op == "reduce_precision":
            exponent, mantissa = node.attr
            return Term(f"op_reduce_precision<{exponent}, {mantissa}>({listed})", True)
        text = f"op_{op}({listed})"
        if node.dtype == INDEX and not wide:
            text = f"int({text})"
        return Term(text, True, node.dtype == INDEX and wide)


def constant(bits: int, dtype: str) -> Term:
    """A constant as C++, exactly."""
    value = dtypes.from_bits(bits, dtype)
    if dtype == "b1":
        return Term("true" if value else "false")
    if dtype in ("f16", "bf16"):
        return Term(f"{dtype}{{{bits:#x}}}")
    if dtype in ("f32", "f64"):
        suffix = "f" if dtype == "f32" else ""
        if not math.isfinite(float(value)):
            return Term(f"bitcast<{dtype}>({dtype.replace('f', 'u')}({bits:#x}{'u' if dtype == 'f32' else 'ull'}))")
        text = str(np.float32(value)) if dtype == "f32" else repr(float(value))
        return Term(text + suffix, not text.startswith("-"))
    number = int(value)
    if dtype == INDEX:
        if _INT32[0] < number <= _INT32[1]:
            return Term(str(number), number >= 0, False, number)
        text = f"{number}ll" if number != -(2**63) else "(-9223372036854775807ll - 1)"
        return Term(text, number >= 0 or number == -(2**63), True, number)
    if dtype in ("s32", "u32"):
        text = f"{number}u" if dtype == "u32" else str(number) if number != -(2**31) else "(-2147483647 - 1)"
        return Term(text, number >= 0 or number == -(2**31), False, number)
    return Term(f"{dtype}({number}{'ull' if dtype == 'u64' else ''})", True, False, number)


def offset(indices: Sequence[Term], strides: Sequence[int], *, wide: bool = False) -> str:
    """Element offset of an array, in 64 bits if ``wide``."""
    terms: list[str] = []
    total = 0
    for index, stride in zip(indices, strides, strict=True):
        if index.value is not None:
            total += index.value * stride
        elif stride:
            at = f"s64({index.text})" if wide and not index.wide else str(index) if stride != 1 else index.text
            terms.append(at if stride == 1 else f"{at} * {stride}")
    if total or not terms:
        terms.append(str(total))
    return " + ".join(terms)
