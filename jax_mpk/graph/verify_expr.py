"""Checks one scalar program: form, types, and that every load stays inside its operand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax_mpk.graph import dtypes
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.ir import Value
from jax_mpk.graph.scalar import BINARY, COMPARE, LEAVES, TERNARY, UNARY, Builder, Expr, Node, Range

_STORAGE = ("f16", "bf16")
_FLOAT_ONLY = frozenset(
    "floor ceil round_even round_away exp exp2 expm1 log log1p sqrt rsqrt cbrt sin cos tan asin acos atan sinh cosh "
    "tanh asinh acosh atanh logistic erf erfc erf_inv lgamma digamma bessel_i0e bessel_i1e is_finite reduce_precision "
    "pow atan2 nextafter igamma igammac igamma_grad_a random_gamma_grad zeta polygamma betainc".split()
)
_INT_ONLY = frozenset("popcount clz shl shr_logical shr_arith".split())
_BITS = frozenset("not and or xor".split())
_ARITHMETIC = frozenset("neg abs sign add sub mul div rem max min".split())
_COUNTS = {**dict.fromkeys(UNARY, 1), **dict.fromkeys(BINARY, 2), **dict.fromkeys(TERNARY, 3)}


class Broken(Exception):
    """What is wrong, in words; the caller adds where."""


@dataclass(frozen=True)
class Leaves:
    """Which leaves a program may have.

    Attributes:
      operands: values behind the slots.
      acc: element types of accumulators ``acc k``.
      arg: element types of right-hand parts ``arg k``.
      empty: the program is never run, so that loads may point anywhere.
    """

    operands: Sequence[Value] = ()
    acc: Sequence[str] = ()
    arg: Sequence[str] = ()
    empty: bool = False


def ranges(expr: Expr) -> list[Range]:
    """Inclusive bounds of every integer and b1 node (None for floats), whatever the loads return."""
    b = Builder(expr.extents)
    at: list[int] = []
    for node in expr.nodes:
        args = [at[a] for a in node.args]
        if node.op == "coord":
            at.append(b.coord(node.attr))  # type: ignore[arg-type]
        elif node.op == "const":
            at.append(b.const_bits(node.attr, node.dtype))  # type: ignore[arg-type]
        elif node.op == "load":
            at.append(b.load(node.attr, args, node.dtype))  # type: ignore[arg-type]
        elif node.op == "load_if":
            at.append(b.load(node.attr, args[1:], node.dtype, args[0]))  # type: ignore[arg-type]
        elif node.op == "acc":
            at.append(b.acc(node.attr, node.dtype))  # type: ignore[arg-type]
        elif node.op == "arg":
            at.append(b.arg(node.attr, node.dtype))  # type: ignore[arg-type]
        else:
            at.append(b.op(node.op, *args, dtype=node.dtype, attr=node.attr))
    return [b.ranges[i] for i in at]


def check_expr(expr: Expr, extents: Sequence[int], results: Sequence[str], leaves: Leaves) -> None:
    """Raises :class:`Broken` unless the program is sound.

    Args:
      expr: the program.
      extents: the coordinates it must be over.
      results: element types it must compute.
      leaves: what it may read.
    """
    if expr.extents != tuple(extents):
        raise Broken(f"a program over {expr.extents} where the space is {tuple(extents)}")
    for i, node in enumerate(expr.nodes):
        if any(not 0 <= a < i for a in node.args):
            raise Broken(f"node {i} ({node.op}) uses nodes {node.args}, which do not come before it")
        try:
            _check_node(node, [expr.nodes[a] for a in node.args], expr, leaves)
        except Broken as error:
            raise Broken(f"node {i} ({node.op}): {error}") from None
    if any(not 0 <= r < len(expr.nodes) for r in expr.results):
        raise Broken(f"results {expr.results} of {len(expr.nodes)} nodes")
    have = [expr.nodes[r].dtype for r in expr.results]
    if have != list(results):
        raise Broken(f"a program computes ({', '.join(have)}) where ({', '.join(results)}) is wanted")
    if not leaves.empty:
        _check_bounds(expr, leaves)


def _check_bounds(expr: Expr, leaves: Leaves) -> None:
    known = ranges(expr)
    for i in expr.loads():
        node = expr.nodes[i]
        slot: int = node.attr  # type: ignore[assignment]
        if node.op == "load_if" and known[node.args[0]] != (1, 1):
            continue
        indices = node.args if node.op == "load" else node.args[1:]
        value = leaves.operands[slot]
        for axis, (arg, size) in enumerate(zip(indices, value.shape, strict=True)):
            bounds = known[arg]
            if bounds is None or bounds[0] < 0 or bounds[1] >= size:
                seen = "anything" if bounds is None else f"{bounds[0]} to {bounds[1]}"
                raise Broken(f"node {i} loads slot {slot} (%{value.id}) at {seen} of axis {axis}, which has {size}")


def _check_node(node: Node, args: Sequence[Node], expr: Expr, leaves: Leaves) -> None:
    if node.dtype not in dtypes.ALL:
        raise Broken(f"unknown element type {node.dtype}")
    if node.op in LEAVES:
        _check_leaf(node, args, expr, leaves)
        return
    if node.op not in _COUNTS:
        raise Broken("unknown operation")
    if len(args) != _COUNTS[node.op]:
        raise Broken(f"{len(args)} arguments instead of {_COUNTS[node.op]}")
    kinds = [a.dtype for a in args]
    if node.op == "convert":
        _check_convert(node, kinds[0])
        return
    if node.op == "bitcast":
        if "b1" in (node.dtype, kinds[0]) or dtypes.itemsize(node.dtype) != dtypes.itemsize(kinds[0]):
            raise Broken(f"{kinds[0]} and {node.dtype} differ in width")
        return
    if node.op == "select":  # moves a value of any type
        if kinds[0] != "b1" or kinds[1] != kinds[2] or kinds[1] != node.dtype:
            raise Broken(f"{node.dtype} from ({', '.join(kinds)})")
        return
    if any(kind in _STORAGE for kind in (*kinds, node.dtype)):
        raise Broken(f"arithmetic on ({', '.join(kinds)}); f16 and bf16 are converted to f32 first")
    if len(set(kinds)) != 1:
        raise Broken(f"arguments of different types ({', '.join(kinds)})")
    kind = kinds[0]
    predicate = node.op in COMPARE or node.op == "is_finite"
    if node.dtype != ("b1" if predicate else kind):
        raise Broken(f"{node.dtype} from {kind}")
    allowed = (
        dtypes.is_float(kind)
        if node.op in _FLOAT_ONLY
        else dtypes.is_int(kind)
        if node.op in _INT_ONLY
        else not dtypes.is_float(kind)
        if node.op in _BITS
        else kind != "b1" or node.op not in _ARITHMETIC
    )
    if not allowed:
        raise Broken(f"not an operation on {kind}")
    if node.op == "reduce_precision" and not _is_precision(node.attr):
        raise Broken(f"precision {node.attr} is not (exponent bits, mantissa bits)")


def _is_precision(attr: object) -> bool:
    return isinstance(attr, tuple) and len(attr) == 2 and all(isinstance(n, int) and n >= 0 for n in attr)


def _check_convert(node: Node, source: str) -> None:
    if node.attr not in (None, "round"):
        raise Broken(f"attribute {node.attr!r}")
    if node.attr == "round" and dtypes.compute_type(source) != dtypes.compute_type(node.dtype):
        raise Broken(f"{source} to {node.dtype} is not a rounding that follows from storage types")


def _check_leaf(node: Node, args: Sequence[Node], expr: Expr, leaves: Leaves) -> None:
    number = node.attr
    if not isinstance(number, int):
        raise Broken(f"attribute {number!r} is not a number")
    if node.op == "coord":
        if args or node.dtype != INDEX or not 0 <= number < len(expr.extents):
            raise Broken(f"axis {number} of {len(expr.extents)}, as {node.dtype}")
    elif node.op == "const":
        bits = 1 if node.dtype == "b1" else dtypes.itemsize(node.dtype) * 8
        if args or not 0 <= number < 1 << bits:
            raise Broken(f"{number} is not a bit pattern of {node.dtype}")
    elif node.op in ("acc", "arg"):
        kinds = leaves.acc if node.op == "acc" else leaves.arg
        if args or not 0 <= number < len(kinds) or kinds[number] != node.dtype:
            raise Broken(f"number {number} as {node.dtype}, where there is ({', '.join(kinds)})")
    else:
        if not 0 <= number < len(leaves.operands):
            raise Broken(f"slot {number} of {len(leaves.operands)} operands")
        value = leaves.operands[number]
        if node.op == "load_if" and (not args or args[0].dtype != "b1"):
            raise Broken("the predicate is not b1")
        indices = args if node.op == "load" else args[1:]
        if len(indices) != len(value.shape) or any(index.dtype != INDEX for index in indices):
            kinds = ", ".join(index.dtype for index in indices)
            raise Broken(f"indices ({kinds}) for {len(value.shape)} axes of %{value.id}")
        if node.dtype != value.dtype:
            raise Broken(f"reads {node.dtype} where %{value.id} is {value.dtype}")
