"""The rule of ``platform_dependent``, which lets a function choose a branch by platform."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from jax_mpk.graph.build import BlockBuilder, rule, unsupported
from jax_mpk.graph.ir import Value

#: Platforms that a graph serves which is built for none in particular.
_SERVED = ("cpu", "cuda")


@rule("platform_index")
def _platform_index(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """Number of the branch that the platform takes, or all served ones: the first that names it or the default."""
    platforms: Sequence[tuple[str, ...] | None] = eqn.params["platforms"]
    default = next((k for k, names in enumerate(platforms) if names is None), None)
    chosen = {
        next((k for k, names in enumerate(platforms) if names is not None and name in names), default)
        for name in ((bb.platform,) if bb.platform is not None else _SERVED)
    }
    branch = chosen.pop()
    if chosen:
        raise unsupported(eqn, "CPU and CUDA take different branches, and the graph is built for both")
    if branch is None:
        raise unsupported(eqn, f"there is no branch for {bb.platform or 'CPU and CUDA'}, and no default")
    return [bb.constant(branch, "s32")]
