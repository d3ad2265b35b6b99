"""Puts the arguments of a call where its megakernels read them best; see :mod:`.layouts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as JaxLayout

from jax_mpk.graph.layouts import Layout
from jax_mpk.runtime import layouts, pipeline
from jax_mpk.runtime.call import plan_target
from jax_mpk.runtime.dispatch import CallSite, rebuilder


def place(site: CallSite, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, arrays in the layouts that its megakernels prefer."""
    traced, leaves = site.trace(args, kwargs)
    target = plan_target(site.options)
    wanted: dict[int, Layout] = {}
    for call in traced.calls(site.name, [*(None for _ in traced.consts), *traced.kept], None):
        for leaf, layout in zip(call.operands, pipeline.preferred(call.jaxpr, call.donated, target), strict=True):
            if leaf is not None and layout is not None:
                wanted.setdefault(leaf, layout)
    placed = [_placed(leaf, wanted.get(i)) for i, leaf in enumerate(leaves)]
    return rebuilder(site.tracer, args, kwargs, leaves)(placed)


def _placed(x: Any, layout: Layout | None) -> Any:
    if layout is None or layouts.order(x) == layout:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = Format(JaxLayout(layout), sharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=wanted, weak_type=x.weak_type)
    if not isinstance(x, jax.Array):
        x = jax.device_put(x)
    return jax.device_put(x, Format(JaxLayout(layout), x.sharding))
