"""In which order the arguments of a call lie in memory, and who decides it.

A megakernel declares a layout for each of its operands; where an array lies otherwise, XLA copies it in every call. So
the arrays decide: an operand is declared as its array lies, unless the graph needs it row-major. Where that is left to
the compiler (``Format(Layout.AUTO)``), it is declared as it is read best on the target (:func:`.pipeline.preferred`),
and :func:`jax_mpk.place` puts arrays there beforehand.

How arrays lie is written beside the arguments of the program being lowered. Within a loop's body, a nested ``jax.jit``
and the like it does not show which of them an operand is. Such an operand may be any argument of its type. If all of
these lie alike, it is declared so; if not, as it is read best, provided that one of them lies so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from jax_mpk.graph.layouts import Layout
from jax_mpk.runtime.jax_internals import ir

#: How the array of an operand lies: its layout (None: row-major, as arrays do by default), or "auto": as one likes.
Lie = Layout | None | Literal["auto"]
#: How the array of an operand may lie.
Lies = frozenset[Lie]

ROW_MAJOR: Lies = frozenset([None])
AUTO: Lies = frozenset(["auto"])


def order(x: Any) -> Layout:
    """The layout of an array that is passed to a function; also that of a ``jax.ShapeDtypeStruct``."""
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct) and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        # A ShapeDtypeStruct need not have a format, nor a format a layout, nor does Layout.AUTO have an order.
        layout = getattr(getattr(x, "format", None), "layout", None)
        found = getattr(layout, "major_to_minor", None)
        if found is not None:
            return tuple(found)
    return tuple(range(np.ndim(x)))


def of_array(x: Any) -> Lies:
    """How an array lies that is passed to a function."""
    found = order(x)
    return ROW_MAJOR if found == tuple(range(len(found))) else frozenset([found])


def of_operands(ctx: Any, operands: Sequence[Any]) -> list[Lies]:
    """How the operands of an equation lie that is being lowered."""
    main = ctx.module_context.symbol_table["main"]
    known = [_of_attribute(attributes) for attributes in main.arg_attrs]
    if all(lie is None for lie in known):
        return [ROW_MAJOR] * len(operands)
    types = [argument.type for argument in main.arguments]
    return [_of_operand(operand, main, types, known) for operand in operands]


def _of_operand(operand: Any, main: Any, types: Sequence[Any], known: Sequence[Lie]) -> Lies:
    block = getattr(operand, "owner", None)
    if not isinstance(block, ir.Block):
        return ROW_MAJOR  # computed by the program, or no array at all
    if block.owner.operation == main.operation:
        return frozenset([known[ir.BlockArgument(operand).arg_number]])
    same = [lie for lie, type_ in zip(known, types, strict=True) if type_ == operand.type]
    if not same:
        # Inside jax.shard_map an operand is a part of an argument.
        similar = _kind(operand.type)
        same = [lie for lie, type_ in zip(known, types, strict=True) if _kind(type_) == similar]
    return frozenset(same) or ROW_MAJOR


def _kind(type_: Any) -> Any:
    if not isinstance(type_, ir.RankedTensorType):
        return None
    return type_.rank, str(type_.element_type)


def _of_attribute(attributes: Any) -> Lie:
    if "mhlo.layout_mode" not in attributes:
        return None
    mode = ir.StringAttr(attributes["mhlo.layout_mode"]).value
    if mode == "auto":
        return "auto"
    # {0,1}: the axes, innermost first. Tiled layouts, which have more in the braces, are none of ours.
    axes = re.fullmatch(r"\{([\d,]*)\}", mode)
    if axes is None or not axes[1]:
        return None
    layout = tuple(int(axis) for axis in axes[1].split(","))[::-1]
    return None if layout == tuple(range(len(layout))) else layout
