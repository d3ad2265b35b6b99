"""Rules for gather and the scatter family.

Both address windows of an operand by start positions that are read from an index array. XLA's treatment of starts that
leave the operand is reproduced exactly: a gather clamps them (and, in ``fill`` mode, replaces the window's elements); a
scatter drops the *whole* window, or clamps the start in ``clip`` mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn
from jax.lax import GatherScatterMode

from jax_mpk.capture import jaxprs
from jax_mpk.graph import dtypes
from jax_mpk.graph.build import BlockBuilder, Load, rule, unsupported
from jax_mpk.graph.combiners import Join, combiner, joined
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.ir import Combine, Value
from jax_mpk.graph.scalar import Builder

_MODES = (
    GatherScatterMode.CLIP,
    GatherScatterMode.FILL_OR_DROP,
    GatherScatterMode.PROMISE_IN_BOUNDS,
)
_INT32_MAX = 2**31 - 1

#: How old and new values join, by primitive. ``scatter-sub`` adds negated updates.
_COMBINE = {
    "scatter": "set",
    "scatter-add": "sum",
    "scatter-sub": "sum",
    "scatter-mul": "prod",
    "scatter-min": "min",
    "scatter-max": "max",
}
#: The same for truth values, on which maximum and minimum are "or" and "and".
_ON_BOOLS: dict[str, Join] = {
    "sum": lambda b, old, new: [b.op("or", old[0], new[0])],
    "prod": lambda b, old, new: [b.op("and", old[0], new[0])],
    "min": lambda b, old, new: [b.op("and", old[0], new[0])],
    "max": lambda b, old, new: [b.op("or", old[0], new[0])],
}


def _shape(eqn: JaxprEqn, operand: int) -> tuple[int, ...]:
    aval: Any = eqn.invars[operand].aval
    return tuple(aval.shape)


@rule("gather")
def _gather(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    operand, indices = xs
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    if mode not in _MODES:
        raise unsupported(eqn, f"its mode is {mode}")
    sizes = eqn.params["slice_sizes"]
    shape = _shape(eqn, 0)
    aval: Any = eqn.outvars[0].aval
    rank = len(aval.shape)
    # Output axes are those of the index array (without its last) and, at offset_dims, those of the window.
    batch_axes = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    without_window = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window_dims = [d for d in range(len(shape)) if d not in without_window]
    fill = mode == GatherScatterMode.FILL_OR_DROP
    # JAX compares in s32, to which wider indices wrap around, unless the operand needs s64.
    compared = "s32" if max(shape, default=0) <= _INT32_MAX else "s64"

    def body(b: Builder, at: list[int], load: Load) -> int:
        batch = [at[axis] for axis in batch_axes]
        position = [b.index(0) for _ in shape]
        inside: int | None = None
        for k, d in enumerate(numbers.start_index_map):
            start = load(1, [*batch, b.index(k)])
            high = shape[d] - sizes[d]
            if fill:
                start = b.convert(start, compared)
                fits = b.in_bounds(b.convert(start, INDEX), 0, high + 1)
                inside = fits if inside is None else b.op("and", inside, fits)
            position[d] = _clamped(b, start, high)
        for d, axis in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
            position[d] = batch[axis]
        for d, axis in zip(window_dims, numbers.offset_dims, strict=True):
            position[d] = b.add(position[d], at[axis])
        position += at[rank:]
        if inside is None:
            return load(0, position)
        return _or_fill(b, inside, load(0, position, inside), eqn.params["fill_value"])

    return bb.map(jaxprs.physical(aval)[0], [operand, indices], body, [operand.dtype])


def _or_fill(b: Builder, inside: int, found: int, fill_value: object) -> int:
    """``found``, which reads 0 outside, or the fill value there."""
    dtype = b.nodes[found].dtype
    bits = dtypes.to_bits(fill_value, dtype)
    if bits == 0:
        return found
    filler = b.compute(b.const_bits(bits, dtype))
    return b.convert(b.op("select", inside, b.compute(found), filler), dtype, implicit=True)


def _clamped(b: Builder, start: int, high: int) -> int:
    """A start position moved into [0, high], as an index."""
    if b.nodes[start].dtype == "u64":
        # The largest u64 would be negative as an index, but clamps to the end.
        start = b.op("min", start, b.const(max(high, 0), "u64"))
    return b.clamp(b.index(0), b.convert(start, INDEX), b.index(high))


@rule(*_COMBINE)
def _scatter(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    operand, indices, updates = xs
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    if mode not in _MODES:
        raise unsupported(eqn, f"its mode is {mode}")
    name, shape = eqn.primitive.name, _shape(eqn, 0)
    updates_shape = _shape(eqn, 2)
    window_axes = list(numbers.update_window_dims)
    batch_axes = [axis for axis in range(len(updates_shape)) if axis not in window_axes]
    without_window = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window_dims = [d for d in range(len(shape)) if d not in without_window]
    sizes = [1] * len(shape)
    for d, axis in zip(window_dims, window_axes, strict=True):
        sizes[d] = updates_shape[axis]
    # Windows one after the other, whatever the layout of the updates: where windows overlap, later ones win.
    order = batch_axes + window_axes
    space = [updates_shape[axis] for axis in order] + list(jaxprs.trailing(eqn.invars[2].aval))

    def index(b: Builder, at: list[int], load: Load) -> list[int]:
        batch, window = at[: len(batch_axes)], at[len(batch_axes) : len(order)]
        position = [b.index(0) for _ in shape]
        inside = b.const(True, "b1")
        for k, d in enumerate(numbers.scatter_dims_to_operand_dims):
            start, high = load(0, [*batch, b.index(k)]), shape[d] - sizes[d]
            clip = mode == GatherScatterMode.CLIP
            position[d] = _clamped(b, start, high) if clip else b.convert(start, INDEX)
            inside = b.op("and", inside, b.in_bounds(position[d], 0, high + 1))
        for d, axis in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
            position[d] = batch[axis]
        for d, coord in zip(window_dims, window, strict=True):
            position[d] = b.add(position[d], coord)
        return [*position, *at[len(order) :], inside]

    def value(b: Builder, at: list[int], load: Load) -> int:
        where = [at[order.index(axis)] for axis in range(len(order))]
        new = load(1, [*where, *at[len(order) :]])
        if kind == "set":
            return new
        new = b.compute(new)
        return b.op("neg", new) if name == "scatter-sub" else new

    kind, program = _COMBINE[name], None
    if operand.dtype == "b1" and kind != "set":
        kind, program = "generic", joined(_ON_BOOLS[kind], ["b1"])
    if name == "scatter" and eqn.params["update_jaxpr"] is not None:
        # lax.scatter_apply: a function of the old value (and of an update that it ignores).
        kind, accs = "generic", (dtypes.compute_type(operand.dtype),)
        program = combiner(bb, eqn, eqn.params["update_jaxpr"], eqn.params["update_consts"], accs)
    return [bb.update(operand, space, [indices, updates], index, value, Combine(kind, program))]
