"""The rule of ``platform_dependent``, which lets a function choose a branch by platform."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from jax_mpk.graph.build import BlockBuilder, rule, unsupported
from jax_mpk.graph.ir import Value

#: Platforms that one graph serves; a choice between them cannot be made here.
_SERVED = ("cpu", "cuda")


@rule("platform_index")
def _platform_index(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """Number of the branch that all served platforms take: the only one or the default."""
    platforms: Sequence[tuple[str, ...] | None] = eqn.params["platforms"]
    default = next((k for k, names in enumerate(platforms) if names is None), None)
    chosen = {
        next((k for k, names in enumerate(platforms) if names is not None and name in names), default)
        for name in _SERVED
    }
    branch = chosen.pop()
    if branch is None or chosen:
        raise unsupported(eqn, "CPU and CUDA take different branches, or one of them none")
    return [bb.constant(branch, "s32")]
