"""Rules for sorting and for the largest elements of rows.

``sort`` compares as JAX does: −0 equals +0, and all NaNs are equal and last. ``top_k`` compares as XLA does, in the
total order of IEEE 754: −NaN < −inf < … < −0 < +0 < … < inf < NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from jax_mpk.capture import jaxprs
from jax_mpk.graph.build import BlockBuilder, Load, rule, unsupported
from jax_mpk.graph.ir import Sort, Value
from jax_mpk.graph.scalar import Builder


@rule("sort")
def _sort(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    axis, num_keys = eqn.params["dimension"], eqn.params["num_keys"]
    if any(jaxprs.trailing(atom.aval) for atom in eqn.invars):
        raise unsupported(eqn, "PRNG keys cannot be sorted; sort their key_data instead")
    if xs[0].shape[axis] <= 1 or 0 in xs[0].shape:
        return xs
    outputs = [bb.value(x.shape, x.dtype) for x in xs]
    bb.emit(
        Sort(
            space=xs[0].shape,
            axis=axis,
            operands=tuple(x.id for x in xs),
            outputs=tuple(out.id for out in outputs),
            num_keys=num_keys,
            stable=eqn.params["is_stable"],
            source=bb.source,
        )
    )
    return outputs


@rule("top_k")
def _top_k(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    return largest(bb, xs[0], eqn.params["k"], eqn.params["axis"])


@rule("approx_top_k")
def _approx_top_k(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """The exact result, which is the best that the approximation may return."""
    if not eqn.params["aggregate_to_topk"]:
        raise unsupported(eqn, "aggregate_to_topk=False asks for the partial results of one algorithm")
    (x,) = xs
    k, axis = eqn.params["k"], eqn.params["reduction_dimension"] % len(x.shape)
    if eqn.params["is_max_k"]:
        return largest(bb, x, k, axis)

    def negated(b: Builder, at: list[int], load: Load) -> int:
        return b.op("neg", b.compute(load(0, at)))

    (flipped,) = bb.map(x.shape, [x], negated, [x.dtype])
    values, positions = largest(bb, flipped, k, axis)
    return [*bb.map(values.shape, [values], negated, [x.dtype]), positions]


def largest(bb: BlockBuilder, x: Value, k: int, axis: int) -> list[Value]:
    """The k largest elements along an axis, in descending order, and their s32 positions."""
    shape = (*x.shape[:axis], k, *x.shape[axis + 1 :])
    if 0 in shape:
        return [bb.constant(0, x.dtype, shape), bb.constant(0, "s32", shape)]
    if x.shape[axis] == 1:
        return [x, bb.constant(0, "s32", shape)]
    values, positions = bb.value(shape, x.dtype), bb.value(shape, "s32")
    bb.emit(
        Sort(
            space=x.shape,
            axis=axis,
            operands=(x.id,),
            outputs=(values.id, positions.id),
            num_keys=1,
            top_k=k,
            source=bb.source,
        )
    )
    return [values, positions]
