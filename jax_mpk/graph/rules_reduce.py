"""Rules of the reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from jax_mpk.capture import jaxprs
from jax_mpk.graph import dtypes
from jax_mpk.graph.build import BlockBuilder, Load, element_type, rule, unsupported
from jax_mpk.graph.combiners import compute_types, familiar, generic, joiner
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.ir import Combine, Value
from jax_mpk.graph.scalar import Builder

_KINDS = {
    "reduce_sum": "sum",
    "reduce_prod": "prod",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
    "reduce_xor": "xor",
}
_ON_BOOLS = {"max": "or", "min": "and", "sum": "or", "prod": "and"}


def split_axes(shape: Sequence[int], axes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Extents of the axes that stay and of those reduced, each in order."""
    kept = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    return kept, tuple(shape[axis] for axis in sorted(axes))


def merge_axes(at: Sequence[int], rank: int, axes: Sequence[int]) -> list[int]:
    """Operand indices from coordinates over kept axes followed by reduced ones."""
    kept = iter(at[: rank - len(axes)])
    reduced = iter(at[rank - len(axes) :])
    return [next(reduced) if axis in axes else next(kept) for axis in range(rank)]


@rule(*_KINDS)
def _reduce(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    (x,) = xs
    return [_reduced(bb, x, tuple(eqn.params["axes"]), _KINDS[eqn.primitive.name])]


def _reduced(bb: BlockBuilder, x: Value, axes: tuple[int, ...], kind: str) -> Value:
    if x.dtype == "b1":
        kind = _ON_BOOLS.get(kind, kind)
    space, rspace = split_axes(x.shape, axes)

    def body(b: Builder, at: list[int], load: Load) -> int:
        return b.compute(load(0, merge_axes(at, len(x.shape), axes)))

    acc = dtypes.compute_type(x.dtype)
    (result,) = bb.reduce(space, rspace, [x], body, Combine(kind), [acc], [x.dtype])
    return result


#: Collectives that are reductions where their axes are positions, as ``jax.vmap`` makes them of its named axis.
_COLLECTIVES = {"psum": "sum", "pmax": "max", "pmin": "min"}


@rule(*_COLLECTIVES)
def _collective(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """A reduction over axes of the operands themselves; several devices are not reached from a kernel."""
    axes = tuple(eqn.params["axes"])
    named = [axis for axis in axes if not isinstance(axis, int)]
    if named:
        raise unsupported(
            eqn,
            f"it reduces over the mesh axes {', '.join(map(str, named))}, and a megakernel runs on one device; call it "
            "between megakernels, inside jax.shard_map",
        )
    if eqn.params.get("axis_index_groups") is not None:
        raise unsupported(eqn, "axis_index_groups is not supported")
    kind = _COLLECTIVES[eqn.primitive.name]
    return [_reduced(bb, x, axes, kind) for x in xs]


@rule("argmax", "argmin")
def _arg_reduce(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    (x,) = xs
    axes = tuple(eqn.params["axes"])
    dtype = element_type(eqn.outvars[0].aval)
    if len(axes) != 1 or dtype is None:
        raise unsupported(eqn, "exactly one axis must be searched")
    space, rspace = split_axes(x.shape, axes)

    def body(b: Builder, at: list[int], load: Load) -> int:
        return b.compute(load(0, merge_axes(at, len(x.shape), axes)))

    def position(b: Builder, at: list[int], acc: list[int], load: Load) -> int:
        return b.convert(acc[1], dtype)

    acc = [dtypes.compute_type(x.dtype), INDEX]
    return bb.reduce(space, rspace, xs, body, Combine(eqn.primitive.name), acc, [dtype], position)


@rule("reduce")
def _generic_reduce(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """``lax.reduce`` of several operands by any function of two elements, from given initial values."""
    count = len(xs) // 2
    operands, inits = xs[:count], xs[count:]
    axes = tuple(eqn.params["dimensions"])
    shape = operands[0].shape
    space, rspace = split_axes(shape, axes)
    jaxpr, consts = jaxprs.open_jaxpr(eqn.params["jaxpr"])
    consts = [*consts, *eqn.params.get("consts", ())]
    join = joiner(bb, eqn, jaxpr, consts)
    acc = compute_types(operands)
    out_dtypes = [x.dtype for x in operands]
    if 0 in rspace:
        return bb.map(space, inits, lambda b, at, load: [load(k, []) for k in range(count)], out_dtypes)

    def body(b: Builder, at: list[int], load: Load) -> list[int]:
        index = merge_axes(at, len(shape), axes)
        return [b.compute(load(k, index)) for k in range(count)]

    def finish(b: Builder, at: list[int], accs: list[int], load: Load) -> Sequence[int]:
        return join(b, [b.compute(load(count + k, [])) for k in range(count)], accs)

    name: Any = familiar(jaxpr, consts)
    if operands[0].dtype == "b1":
        name = _ON_BOOLS.get(name, name)
    combine = Combine(name) if name is not None else generic(join, acc)
    return bb.reduce(space, rspace, xs, body, combine, acc, out_dtypes, finish)
