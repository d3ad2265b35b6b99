"""Combinations that a user's function defines: its jaxpr over scalars as one scalar program.

``lax.reduce``, ``lax.reduce_window`` and ``lax.scatter_apply`` carry a jaxpr that joins two partial results. Most of
these jaxprs are one familiar operation, which :func:`familiar` names; any other becomes a ``generic`` combination.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jax_mpk.graph import dtypes
from jax_mpk.graph.build import decompose, element_type, unsupported
from jax_mpk.graph.builder import BlockBuilder
from jax_mpk.graph.ir import Combine, Nest, Value
from jax_mpk.graph.scalar import Builder, Expr, inline

_KINDS = {
    "add": "sum",
    "add_any": "sum",
    "mul": "prod",
    "max": "max",
    "min": "min",
    "and": "and",
    "or": "or",
    "xor": "xor",
}

#: (builder, left part, right part) → joined accumulators.
Join = Callable[[Builder, list[int], list[int]], Sequence[int]]


def familiar(jaxpr: Jaxpr, consts: Sequence[Any] = ()) -> str | None:
    """``sum prod max min and or xor`` where the jaxpr is just that operation on its two arguments."""
    if len(jaxpr.eqns) != 1 or len(jaxpr.invars) != 2 or len(jaxpr.outvars) != 1:
        return None
    (eqn,) = jaxpr.eqns
    inner = eqn.params.get("jaxpr")
    if eqn.primitive.name in ("jit", "pjit") and inner is not None:
        inner = getattr(inner, "jaxpr", inner)
        direct = list(eqn.invars) == list(jaxpr.invars) and eqn.outvars == jaxpr.outvars
        return familiar(inner) if direct else None
    if any(isinstance(atom, Literal) for atom in eqn.invars) or eqn.outvars != jaxpr.outvars:
        return None
    return _KINDS.get(eqn.primitive.name) if set(eqn.invars) == set(jaxpr.invars) else None


def combiner(bb: BlockBuilder, eqn: JaxprEqn, jaxpr: Jaxpr, consts: Sequence[Any], acc: Sequence[str]) -> Expr:
    """The program of a generic combination: new accumulators from ``acc k`` and ``arg k``.

    Args:
      bb: block being built.
      eqn: equation that carries the jaxpr, for error messages.
      jaxpr: of 2n scalars, the left part first, giving n.
      consts: values of its constants.
      acc: element types of the accumulators.
    """
    join = joiner(bb, eqn, jaxpr, consts)
    return joined(join, acc)


def joined(join: Join, acc: Sequence[str]) -> Expr:
    """``join`` as the program of a generic combination."""
    b = Builder(())
    left = [b.acc(k, dtype) for k, dtype in enumerate(acc)]
    right = [b.arg(k, dtype) for k, dtype in enumerate(acc)]
    results = join(b, left, right)
    return b.build(*(b.convert(r, dtype, implicit=True) for r, dtype in zip(results, acc, strict=True)))


def generic(join: Join, acc: Sequence[str]) -> Combine:
    """A generic combination from a function on nodes."""
    return Combine("generic", joined(join, acc))


def joiner(bb: BlockBuilder, eqn: JaxprEqn, jaxpr: Jaxpr, consts: Sequence[Any]) -> Join:
    """The jaxpr of a combination as a function on nodes."""
    inner = bb.nested()
    avals: list[Any] = [v.aval for v in jaxpr.invars]
    params = [inner.value((), _named(eqn, aval)) for aval in avals]

    def fn(*args: Any) -> Any:
        return jax.core.eval_jaxpr(jaxpr, consts, *args)

    results = decompose(inner, eqn, fn, *params, avals=avals)
    ops = inner.block(results).ops
    if any(not isinstance(op, Nest) or op.kind != "map" or op.space for op in ops):
        raise unsupported(eqn, "the function that joins two elements is more than a scalar expression")

    def join(b: Builder, left: list[int], right: list[int]) -> list[int]:
        nodes: dict[int, int] = {}
        for value, node in zip(params, [*left, *right], strict=True):
            nodes[value.id] = b.convert(node, value.dtype, implicit=True)
        for op in ops:
            assert isinstance(op, Nest)

            def load(slot: int, _: list[int], dtype: str, pred: int | None, op: Nest = op) -> int:
                assert pred is None
                return nodes[op.operands[slot]]

            nodes.update(zip(op.outputs, inline(b, op.body, [], load), strict=True))
        return [_result(inner, b, nodes, value) for value in results]

    return join


def _result(bb: BlockBuilder, b: Builder, nodes: dict[int, int], value: Value) -> int:
    bits = bb.constant_bits(value)
    return b.compute(nodes[value.id] if bits is None else b.const_bits(bits, value.dtype))


def _named(eqn: JaxprEqn, aval: Any) -> str:
    name = element_type(aval)
    if name is None or aval.shape:
        raise unsupported(eqn, f"it joins elements of type {aval}")
    return name


def compute_types(values: Sequence[Value]) -> list[str]:
    """Element types of accumulators for the values."""
    return [dtypes.compute_type(v.dtype) for v in values]
