"""Rules of the primitives that move elements: reshapes, slices, concatenation, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from jax_mpk.capture import jaxprs
from jax_mpk.graph.build import BlockBuilder, Load, reindex, rule, unsupported
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.ir import Combine, Value
from jax_mpk.graph.scalar import Builder


def logical_shape(atom: Any) -> tuple[int, ...]:
    """Shape JAX shows, without the trailing axes of PRNG keys."""
    return tuple(atom.aval.shape)


@rule("broadcast_in_dim")
def _broadcast_in_dim(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    if len(xs) != 1:
        raise unsupported(eqn, "shapes known only at run time are not supported")
    shape = logical_shape(eqn.invars[0])
    axes: tuple[int, ...] = eqn.params["broadcast_dimensions"]

    def index(b: Builder, at: list[int]) -> list[int]:
        return [b.index(0) if size == 1 else at[axis] for size, axis in zip(shape, axes, strict=True)]

    return [reindex(bb, eqn, xs[0], index)]


@rule("reshape")
def _reshape(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    if len(xs) != 1:
        raise unsupported(eqn, "shapes known only at run time are not supported")
    old, new = logical_shape(eqn.invars[0]), logical_shape(eqn.outvars[0])
    # ``dimensions`` is a transposition that comes first.
    order: Sequence[int] = eqn.params.get("dimensions") or range(len(old))

    def index(b: Builder, at: list[int]) -> list[int]:
        transposed = reshape_indices(b, at, new, [old[axis] for axis in order])
        return [transposed[order.index(axis)] for axis in range(len(old))]

    return [reindex(bb, eqn, xs[0], index)]


@rule("squeeze")
def _squeeze(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    old, new = logical_shape(eqn.invars[0]), logical_shape(eqn.outvars[0])
    return [reindex(bb, eqn, xs[0], lambda b, at: reshape_indices(b, at, new, old))]


def reshape_indices(b: Builder, at: Sequence[int], shape: Sequence[int], old: Sequence[int]) -> list[int]:
    """Indices into shape ``old`` of the element at ``at`` in shape ``shape``, both row-major.

    Axes are matched in groups of equal size, so that only those that are really split or merged take part in
    divisions.
    """
    out: list[int] = []
    for new_axes, old_axes in _matching_groups(shape, old):
        sizes = [shape[axis] for axis in new_axes]
        position = b.linearize([at[axis] for axis in new_axes], sizes)
        out.extend(b.delinearize(position, [old[axis] for axis in old_axes]))
    return out


def _matching_groups(shape: Sequence[int], old: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of both shapes, in order, with equal numbers of elements, as short as possible."""
    if math.prod(shape) == 0:
        return [(list(range(len(shape))), list(range(len(old))))]
    groups = []
    i = j = 0
    while i < len(shape) or j < len(old):
        start_i, start_j = i, j
        size_i = size_j = 1
        while True:
            if size_i < size_j or (size_i == size_j and i == start_i and i < len(shape)):
                size_i *= shape[i]
                i += 1
            elif size_j < size_i or (j == start_j and j < len(old)):
                size_j *= old[j]
                j += 1
            if size_i == size_j:
                break
        groups.append((list(range(start_i, i)), list(range(start_j, j))))
    return groups


@rule("transpose")
def _transpose(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    permutation: tuple[int, ...] = tuple(eqn.params["permutation"])

    def index(b: Builder, at: list[int]) -> list[int]:
        return [at[permutation.index(axis)] for axis in range(len(permutation))]

    return [reindex(bb, eqn, xs[0], index)]


@rule("rev")
def _rev(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    shape, axes = logical_shape(eqn.invars[0]), eqn.params["dimensions"]

    def index(b: Builder, at: list[int]) -> list[int]:
        return [b.sub(b.index(shape[d] - 1), i) if d in axes else i for d, i in enumerate(at)]

    return [reindex(bb, eqn, xs[0], index)]


@rule("slice")
def _slice(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    starts: Sequence[int] = eqn.params["start_indices"]
    strides: Sequence[int] = eqn.params["strides"] or (1,) * len(starts)

    def index(b: Builder, at: list[int]) -> list[int]:
        return [
            b.add(b.mul(i, b.index(stride)), b.index(start))
            for i, start, stride in zip(at, starts, strides, strict=True)
        ]

    return [reindex(bb, eqn, xs[0], index)]


@rule("split")
def _split(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    axis: int = eqn.params["axis"]
    out, start = [], 0
    for k, size in enumerate(eqn.params["sizes"]):

        def index(b: Builder, at: list[int], start: int = start) -> list[int]:
            return [b.add(i, b.index(start)) if d == axis else i for d, i in enumerate(at)]

        out.append(reindex(bb, eqn, xs[0], index, result=k))
        start += size
    return out


@rule("unstack")
def _unstack(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    axis: int = eqn.params["axis"]
    out = []
    for k in range(len(eqn.outvars)):

        def index(b: Builder, at: list[int], k: int = k) -> list[int]:
            return [*at[:axis], b.index(k), *at[axis:]]

        out.append(reindex(bb, eqn, xs[0], index, result=k))
    return out


@rule("tile")
def _tile(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    shape = logical_shape(eqn.invars[0])
    return [reindex(bb, eqn, xs[0], lambda b, at: [b.mod(i, size) for i, size in zip(at, shape, strict=True)])]


@rule("concatenate", "stack")
def _concatenate(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    stacked = eqn.primitive.name == "stack"
    axis: int = eqn.params["axis" if stacked else "dimension"]
    shape = jaxprs.physical(eqn.outvars[0].aval)[0]
    dtype = xs[0].dtype
    pieces = []
    start = 0
    for k, x in enumerate(xs):
        size = 1 if stacked else x.shape[axis]
        if size:
            pieces.append((k, start, size))
        start += size

    def body(b: Builder, at: list[int], load: Load) -> int:
        values = []
        for k, start, size in pieces:
            inside = b.in_bounds(at[axis], start, start + size)
            here = [] if stacked else [b.sub(at[axis], b.index(start))]
            values.append(b.compute(load(k, [*at[:axis], *here, *at[axis + 1 :]], pred=inside)))
        out = values[-1]
        for value, (_, start, size) in zip(values[-2::-1], pieces[-2::-1], strict=True):
            out = b.op("select", b.op("lt", at[axis], b.index(start + size)), value, out)
        return out

    return bb.map(shape, xs, body, [dtype])


@rule("pad")
def _pad(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    x, fill = xs
    config: Sequence[tuple[int, int, int]] = eqn.params["padding_config"]
    out: Any = eqn.outvars[0].aval
    rank = len(config)

    def body(b: Builder, at: list[int], load: Load) -> int:
        padding = load(1, at[rank:])
        if 0 in x.shape:
            return padding
        inside = b.const(True, "b1")
        index = []
        for i, size, (low, _, interior) in zip(at[:rank], x.shape[:rank], config, strict=True):
            i = b.sub(i, b.index(low))
            step = interior + 1
            inside = b.op("and", inside, b.in_bounds(i, 0, (size - 1) * step + 1))
            if step > 1:
                inside = b.op("and", inside, b.op("eq", b.mod(i, step), b.index(0)))
                i = b.floordiv(i, step)
            index.append(i)
        value = load(0, [*index, *at[rank:]], pred=inside)
        if bb.constant_bits(fill) == 0:
            return value  # a load that is not performed reads 0
        return b.op("select", inside, b.compute(value), b.compute(padding))

    return bb.map(jaxprs.physical(out)[0], xs, body, [x.dtype])


def clamped_start(b: Builder, start: int, size: int, width: int) -> int:
    """A run-time slice start as an index, moved so that ``width`` elements fit into ``size``."""
    dtype = b.nodes[start].dtype
    if dtype == "u64":  # too large for an index: clamp first
        start = b.op("min", start, b.const(size - width, dtype))
    return b.clamp(b.index(0), b.convert(start, INDEX), b.index(size - width))


@rule("dynamic_slice")
def _dynamic_slice(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    x, *starts = xs
    widths: Sequence[int] = eqn.params["slice_sizes"]
    rank = len(widths)
    if len(starts) != rank:
        raise unsupported(eqn, "shapes known only at run time are not supported")

    def body(b: Builder, at: list[int], load: Load) -> int:
        index = [b.add(i, clamped_start(b, load(k + 1, []), x.shape[k], widths[k])) for k, i in enumerate(at[:rank])]
        return load(0, [*index, *at[rank:]])

    return bb.map(jaxprs.physical(eqn.outvars[0].aval)[0], xs, body, [x.dtype])


@rule("dynamic_update_slice")
def _dynamic_update_slice(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    x, new, *starts = xs
    rank = len(starts)
    if new.shape == x.shape:
        return [new]

    def index(b: Builder, at: list[int], load: Load) -> list[int]:
        out = [b.add(i, clamped_start(b, load(k + 1, []), x.shape[k], new.shape[k])) for k, i in enumerate(at[:rank])]
        return [*out, *at[rank:], b.const(True, "b1")]

    def value(b: Builder, at: list[int], load: Load) -> int:
        return load(0, at)

    return [bb.update(x, new.shape, [new, *starts], index, value, Combine("set"))]
