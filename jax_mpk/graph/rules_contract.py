"""Rules of the contractions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from jax_mpk.capture import jaxprs
from jax_mpk.graph import dtypes
from jax_mpk.graph.build import BlockBuilder, Load, decompose, element_type, rule
from jax_mpk.graph.ir import Combine, Value
from jax_mpk.graph.scalar import Builder


@rule("dot_general")
def _dot_general(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """Batch × M × N, reduced over K; each of the four may be any number of axes.

    ``precision`` asks for no less than f32 accumulation, which is what every contraction here does; a dot algorithm
    that would round f32 operands first is a permission, not an order.
    """
    left, right = xs
    (left_k, right_k), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left_free = [d for d in range(len(left.shape)) if d not in (*left_k, *left_batch)]
    right_free = [d for d in range(len(right.shape)) if d not in (*right_k, *right_batch)]
    batch, m = len(left_batch), len(left_free)
    space = (
        *(left.shape[d] for d in left_batch),
        *(left.shape[d] for d in left_free),
        *(right.shape[d] for d in right_free),
    )
    rspace = tuple(left.shape[d] for d in left_k)
    dtype = element_type(eqn.outvars[0].aval)
    assert dtype is not None

    def factors(b: Builder, at: list[int], load: Load) -> list[int]:
        k = at[len(space) :]
        out = []
        for slot, parts in enumerate(
            [
                [(left_batch, at[:batch]), (left_free, at[batch : batch + m]), (left_k, k)],
                [(right_batch, at[:batch]), (right_free, at[batch + m : len(space)]), (right_k, k)],
            ]
        ):
            index = {axis: i for axes, nodes in parts for axis, i in zip(axes, nodes, strict=True)}
            out.append(load(slot, [index[axis] for axis in range(len(index))]))
        return out

    if dtype == "b1":
        return bb.reduce(
            space,
            rspace,
            xs,
            lambda b, at, load: b.op("and", *factors(b, at, load)),
            Combine("or"),
            ["b1"],
            ["b1"],
        )

    # Floats are multiplied and summed as floats, whatever integers are asked for.
    floats = left.dtype == right.dtype and dtypes.is_float(left.dtype) and not dtypes.is_float(dtype)
    result = left.dtype if floats else dtype
    acc = accumulator(result)

    def body(b: Builder, at: list[int], load: Load) -> list[int]:
        out = factors(b, at, load)
        if left.dtype == right.dtype:
            return out
        # Operands of different types meet in the result's type, as in XLA.
        return [b.convert(x, dtypes.compute_type(dtype)) for x in out]

    def finish(b: Builder, at: list[int], accs: list[int], load: Load) -> int:
        total = b.convert(accs[0], result) if floats else accs[0]
        return total if dtypes.is_float(dtype) else b.convert(total, dtype)

    return bb.contract(space, rspace, xs, body, acc, [dtype], finish)


def accumulator(dtype: str) -> str:
    """What products are summed in: at least 32 bits."""
    if dtypes.is_float(dtype):
        return dtypes.compute_type(dtype)
    return dtype if dtypes.itemsize(dtype) >= 4 else dtype[0] + "32"


@rule("ragged_dot_general")
def _ragged_dot_general(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """One matrix per group of rows, by JAX's own decomposition into masked contractions."""

    def fn(*args: Any) -> Any:
        return jaxprs.ragged_dot_general(*args, **eqn.params)

    return decompose(bb, eqn, fn, *xs)
