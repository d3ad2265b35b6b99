"""Rules for special functions: each is one scalar operation of the same meaning."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from jax_mpk.graph.build import BlockBuilder, rule
from jax_mpk.graph.ir import Value
from jax_mpk.graph.rules_elementwise import elementwise
from jax_mpk.graph.scalar import Builder

#: Primitive → scalar operation.
_OPS = {
    "bessel_i0e": "bessel_i0e",
    "bessel_i1e": "bessel_i1e",
    "digamma": "digamma",
    "erf_inv": "erf_inv",
    "igamma": "igamma",
    "igamma_grad_a": "igamma_grad_a",
    "igammac": "igammac",
    "lgamma": "lgamma",
    "polygamma": "polygamma",
    "random_gamma_grad": "random_gamma_grad",
    "regularized_incomplete_beta": "betainc",
    "zeta": "zeta",
}


@rule(*_OPS)
def _special(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    name = _OPS[eqn.primitive.name]

    def formula(b: Builder, *args: int) -> int:
        return b.op(name, *args)

    return elementwise(bb, eqn, xs, formula)
