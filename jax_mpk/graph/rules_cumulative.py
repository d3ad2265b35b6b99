"""Rules for running sums, products, maxima, minima and log-sum-exps.

f16 and bf16 accumulate in f32 and are rounded once per element, where XLA rounds every partial sum.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from jax_mpk.graph import dtypes
from jax_mpk.graph.build import BlockBuilder, Load, rule
from jax_mpk.graph.combiners import generic
from jax_mpk.graph.ir import Combine, Value
from jax_mpk.graph.scalar import Builder

_KINDS = {"cumsum": "sum", "cumprod": "prod", "cummax": "max", "cummin": "min"}


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    (x,) = xs
    axis, reverse = eqn.params["axis"], eqn.params["reverse"]
    if x.shape[axis] <= 1 or 0 in x.shape:
        return xs
    acc = dtypes.compute_type(x.dtype)
    kind = _KINDS.get(eqn.primitive.name)
    combine = Combine(kind) if kind is not None else generic(_logaddexp, [acc])

    def body(b: Builder, at: list[int], load: Load) -> int:
        return b.compute(load(0, at))

    return bb.cumulative(x.shape, axis, reverse, [x], body, combine, [acc], [x.dtype])


def _logaddexp(b: Builder, left: list[int], right: list[int]) -> list[int]:
    """log(exp(x) + exp(y)) as ``jax.numpy.logaddexp`` computes it."""
    (x,), (y,) = left, right
    apart = b.sub(x, y)
    rest = b.op("log1p", b.op("exp", b.op("neg", b.op("abs", apart))))
    # inf − inf is NaN, and so is a NaN argument: the plain sum is right for both.
    equal_infinities = b.op("ne", apart, apart)
    return [b.op("select", equal_infinities, b.add(x, y), b.add(b.op("max", x, y), rest))]
