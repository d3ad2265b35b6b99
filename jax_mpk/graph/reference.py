"""The Graph in NumPy: what every operator computes, for a whole graph or for one box of one operator.

Slow and plain; plans and executors are compared with it. Sums and products of factors of floats are accumulated in f64
and rounded once, so that no order of summation is preferred. Updates that add to the same element of an f16 or bf16
value likewise add up in f32 and are rounded once. The scalar operations are those of :mod:`jax_mpk.graph.semantics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jax_mpk.graph import dtypes, semantics
from jax_mpk.graph.ir import Block, Branch, Combine, Cumulative, Graph, Loop, Nest, Op, Sort, Update
from jax_mpk.graph.scalar import Expr

Array = np.ndarray[Any, Any]
#: Current contents of a value, by id.
Read = Callable[[int], Array]
Box = tuple[Sequence[int], Sequence[int]]  # corners, the second exclusive

#: Most elements that one step of a reduction evaluates at once.
_CHUNK = 1 << 22
#: Trips after which a while loop is taken to be endless.
_MAX_TRIPS = 10_000_000


def evaluate(graph: Graph, inputs: Sequence[Any]) -> list[Array]:
    """Results of the whole graph.

    Args:
      graph: the graph.
      inputs: one array per graph input, of its value's shape and element type (PRNG keys: their uint32 data).
    """
    env: dict[int, Array] = {}
    for v, given in zip(graph.inputs, inputs, strict=True):
        value, array = graph.values[v], np.asarray(given)
        if (array.shape, dtypes.from_numpy(array.dtype)) != (value.shape, value.dtype):
            raise ValueError(f"input %{v} is {value.dtype}{list(value.shape)}, got {array.dtype}{list(array.shape)}")
        env[v] = array
    return run_block(graph, graph.block, env)


def run_block(graph: Graph, block: Block, env: dict[int, Array]) -> list[Array]:
    """Runs a block; ``env`` holds the values it reads and receives those it writes."""
    for op in block.ops:
        if isinstance(op, Loop):
            results = _run_loop(graph, op, env)
        elif isinstance(op, Branch):
            which = min(max(int(env[op.index]), 0), len(op.arms) - 1)
            results = run_block(graph, op.arms[which], dict(env))
        else:
            shape = graph.values[op.outputs[0]].shape
            results = eval_op(op, (0,) * len(shape), shape, env.__getitem__)
        for v, array in zip(op.outputs, results, strict=True):
            env[v] = array
    return [env[v] for v in block.results]


def eval_op(op: Op, lo: Sequence[int], hi: Sequence[int], read: Read) -> list[Array]:
    """The box ``[lo, hi)`` of every output of an operator other than Loop and Branch, in storage types."""
    if isinstance(op, Nest):
        return _eval_nest(op, lo, hi, read)
    if isinstance(op, Update):
        return [_eval_update(op, lo, hi, read)]
    if isinstance(op, Cumulative):
        return _eval_cumulative(op, lo, hi, read)
    if isinstance(op, Sort):
        return _eval_sort(op, lo, hi, read)
    raise TypeError(f"{type(op).__name__} is not evaluated box by box")


def eval_expr(
    expr: Expr,
    box: Box,
    read: Callable[[int], Array],
    acc: Sequence[Array] = (),
    arg: Sequence[Array] = (),
) -> list[Array]:
    """Results of a scalar program on a box of its coordinates.

    Args:
      expr: the program.
      box: corners of the box.
      read: contents of an operand slot.
      acc: accumulators; they broadcast against the box.
      arg: right-hand parts, in combiners.

    Returns:
      Arrays that broadcast to the box: an axis that a result does not depend on may have extent 1.
    """
    rank = len(expr.extents)
    coords = []
    for axis, (low, high) in enumerate(zip(*box, strict=True)):
        shape = [1] * rank
        shape[axis] = high - low
        coords.append(np.arange(low, high, dtype=np.int64).reshape(shape))
    done: list[Array] = []
    for node in expr.nodes:
        args = [done[a] for a in node.args]
        out: Array
        if node.op == "coord":
            out = coords[node.attr]  # type: ignore[call-overload]
        elif node.op == "const":
            out = np.full((1,) * rank, dtypes.from_bits(node.attr, node.dtype))  # type: ignore[arg-type]
        elif node.op == "load":
            out = _gather(read(node.attr), args, rank)  # type: ignore[arg-type]
        elif node.op == "load_if":
            out = _gather_if(read(node.attr), args[0], args[1:])  # type: ignore[arg-type]
        elif node.op == "acc":
            out = acc[node.attr]  # type: ignore[call-overload]
        elif node.op == "arg":
            out = arg[node.attr]  # type: ignore[call-overload]
        else:
            out = semantics.apply(node, args)
        if out.dtype != dtypes.to_numpy(node.dtype):
            raise TypeError(f"{node} computes {out.dtype}")
        done.append(out)
    return [done[r] for r in expr.results]


def _gather(array: Array, indices: Sequence[Array], rank: int) -> Array:
    for index, size in zip(indices, array.shape, strict=True):
        if index.size and (index.min() < 0 or index.max() >= size):
            raise IndexError(f"load at {index.min()}..{index.max()} of an axis of {size}")
    if not indices:
        return np.broadcast_to(array, (1,) * rank)
    return np.asarray(array[tuple(indices)])


def _gather_if(array: Array, pred: Array, indices: Sequence[Array]) -> Array:
    zero = np.zeros((), array.dtype)
    if not pred.any():
        return np.broadcast_to(zero, pred.shape).copy()
    safe = [np.where(pred, index, 0) for index in indices]
    return np.where(pred, _gather(array, safe, pred.ndim), zero)


# -- map, reduce, contract -------------------------------------------------------------------------------------


def _eval_nest(op: Nest, lo: Sequence[int], hi: Sequence[int], read: Read) -> list[Array]:
    if op.kind == "map":
        results = eval_expr(op.body, (lo, hi), lambda slot: read(op.operands[slot]))
        return _filled(results, lo, hi)
    outs: list[list[Array]] = []
    pieces = list(_pieces(lo, hi, max(1, math.prod(op.rspace)) if op.kind == "reduce" else 1))
    for low, high in pieces:
        acc = eval_partial(op, low, high, (0,) * len(op.rspace), op.rspace, read)
        outs.append(eval_epilogue(op, low, high, acc, read))
    if len(pieces) == 1:
        return outs[0]
    joined = [np.empty([b - a for a, b in zip(lo, hi)], part.dtype) for part in outs[0]]
    for (low, high), parts in zip(pieces, outs, strict=True):
        where = tuple(slice(a - base, b - base) for a, b, base in zip(low, high, lo))
        for out, part in zip(joined, parts, strict=True):
            out[where] = part
    return joined


def eval_partial(
    op: Nest,
    lo: Sequence[int],
    hi: Sequence[int],
    rlo: Sequence[int],
    rhi: Sequence[int],
    read: Read,
) -> list[Array]:
    """Accumulators over the box ``[lo, hi)`` of the parallel axes and ``[rlo, rhi)``, not empty, of the reduced axes.

    Accumulators of float sums are f64 so that parts may be merged in any order; :func:`eval_epilogue` rounds them.
    """
    assert op.combine is not None
    size = math.prod(b - a for a, b in zip(lo, hi))
    if op.kind == "contract":
        return [_contract(op, (*lo, *rlo), (*hi, *rhi), read)]
    out: list[Array] | None = None
    for low, high in _pieces(rlo, rhi, max(1, size)):
        parts = eval_expr(op.body, ((*lo, *low), (*hi, *high)), lambda slot: read(op.operands[slot]))
        shape = [b - a for a, b in zip((*lo, *low), (*hi, *high))]
        flat = [np.broadcast_to(p, shape).reshape(*shape[: len(lo)], math.prod(shape[len(lo) :])) for p in parts]
        acc = _fold(op.combine, op.acc, flat, low)
        out = acc if out is None else merge(op.combine, out, acc)
    assert out is not None
    return out


def merge(combine: Combine, left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
    """Accumulators of two adjacent parts, ``left`` the one of smaller positions."""
    kind = combine.kind
    if kind == "generic":
        assert combine.expr is not None
        return _combine_generic(combine.expr, left, right)
    if kind in ("argmax", "argmin"):
        (a, i), (b, j) = left, right
        better = b > a if kind == "argmax" else b < a
        if a.dtype.kind == "f":
            better = (better | np.isnan(b)) & ~np.isnan(a)
        return [np.where(better, b, a), np.where(better, j, i)]
    with np.errstate(all="ignore"):
        return [_JOIN[kind](left[0], right[0])]


def eval_epilogue(op: Nest, lo: Sequence[int], hi: Sequence[int], acc: Sequence[Array], read: Read) -> list[Array]:
    """The box of the outputs, from complete accumulators."""
    assert op.epilogue is not None
    with np.errstate(all="ignore"):
        rounded = [a.astype(dtypes.to_numpy(t)) for a, t in zip(acc, op.acc, strict=True)]
    results = eval_expr(op.epilogue, (lo, hi), lambda slot: read(op.operands[slot]), acc=rounded)
    return _filled(results, lo, hi)


_JOIN: dict[str, Callable[[Array, Array], Array]] = {
    "sum": np.add,
    "dot": np.add,
    "prod": np.multiply,
    "max": semantics.maximum,
    "min": semantics.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _fold(combine: Combine, acc: Sequence[str], parts: list[Array], first: Sequence[int]) -> list[Array]:
    """Combines along the last axis; ``first`` is the position of its first element."""
    kind = combine.kind
    if kind == "generic":
        assert combine.expr is not None
        while parts[0].shape[-1] > 1:
            even = parts[0].shape[-1] // 2 * 2
            joined = _combine_generic(
                combine.expr, [p[..., 0:even:2] for p in parts], [p[..., 1:even:2] for p in parts]
            )
            parts = [np.concatenate([j, p[..., even:]], axis=-1) for j, p in zip(joined, parts, strict=True)]
        return [p[..., 0] for p in parts]
    (part,) = parts
    if kind in ("argmax", "argmin"):
        at = (np.argmax if kind == "argmax" else np.argmin)(part, axis=-1)
        value = np.take_along_axis(part, at[..., None], axis=-1)[..., 0]
        return [value, at.astype(np.int64) + first[0]]
    with np.errstate(all="ignore"):
        if kind == "sum":
            # From +0 on, which shows where all terms are -0.
            return [np.add.reduce(part.astype(_exact(acc[0])), axis=-1, dtype=_exact(acc[0])) + _exact(acc[0]).type(0)]
        if kind in ("max", "min"):
            return [_extreme(kind, part)]
        join = _JOIN[kind]
        assert isinstance(join, np.ufunc)
        return [np.asarray(join.reduce(part, axis=-1, dtype=part.dtype))]


def _extreme(kind: str, part: Array) -> Array:
    """Largest or smallest element along the last axis, -0 below +0."""
    out = np.asarray((np.maximum if kind == "max" else np.minimum).reduce(part, axis=-1))
    if part.dtype.kind != "f":
        return out
    negative = (
        np.all(np.signbit(part) | (part != 0), axis=-1)
        if kind == "max"
        else (np.any(np.signbit(part) & (part == 0), axis=-1))
    )
    return np.where(out == 0, np.where(negative, -0.0, 0.0), out).astype(part.dtype)


def _exact(dtype: str) -> np.dtype:
    """Type to sum in: f64 for floats; integers wrap in their own."""
    return np.dtype(np.float64) if dtypes.is_float(dtype) else dtypes.to_numpy(dtype)


def _combine_generic(expr: Expr, left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
    shape = left[0].shape
    box = ((), ())
    results = eval_expr(expr, box, _no_operands, acc=left, arg=right)
    return [np.broadcast_to(r, shape) for r in results]


def _no_operands(slot: int) -> Array:
    raise ValueError("a combination reads no operands")


def _contract(op: Nest, lo: Sequence[int], hi: Sequence[int], read: Read) -> Array:
    """Sum of products over the reduced axes of a box, through einsum."""
    rank, parallel = len(lo), len(op.space)
    kind = _exact(op.acc[0])
    factors = eval_expr(op.body, (lo, hi), lambda slot: read(op.operands[slot]))
    with np.errstate(all="ignore"):
        # Through the accumulator's type first: that is what the factors are converted to.
        factors = [f.astype(dtypes.to_numpy(op.acc[0])).astype(kind) for f in factors]
        names = [[axis for axis in range(rank) if f.shape[axis] != 1] for f in factors]
        used = sorted(set(names[0]) | set(names[1]))
        result = [axis for axis in used if axis < parallel]
        squeezed = [f.reshape([f.shape[axis] for axis in own]) for f, own in zip(factors, names)]
        out = np.einsum(squeezed[0], names[0], squeezed[1], names[1], result, optimize=True)
        # Reduced axes that neither factor depends on count the same product several times.
        repeats = math.prod(hi[axis] - lo[axis] for axis in range(parallel, rank) if axis not in used)
        out = (out * np.asarray(repeats).astype(kind)).astype(kind)
    shape = [hi[axis] - lo[axis] if axis in result else 1 for axis in range(parallel)]
    return np.broadcast_to(out.reshape(shape), [hi[axis] - lo[axis] for axis in range(parallel)])


# -- the other operators ---------------------------------------------------------------------------------------


def _eval_update(op: Update, lo: Sequence[int], hi: Sequence[int], read: Read) -> Array:
    base = read(op.base)
    out = base[tuple(slice(a, b) for a, b in zip(lo, hi))].copy()
    size = math.prod(op.space)
    if size == 0 or out.size == 0:
        return out
    box = ((0,) * len(op.space), op.space)

    def operand(slot: int) -> Array:
        return read(op.operands[slot])

    flat = [np.broadcast_to(x, op.space).reshape(size) for x in eval_expr(op.index, box, operand)]
    (value,) = eval_expr(op.value, box, operand)
    value = np.broadcast_to(value, op.space).reshape(size)
    *where, valid = flat
    for index, size_of_axis in zip(where, base.shape, strict=True):
        if np.any(valid & ((index < 0) | (index >= size_of_axis))):
            raise IndexError("an update that claims to be in bounds is not")
    for index, a, b in zip(where, lo, hi, strict=True):
        valid = valid & (index >= a) & (index < b)
    keep = np.flatnonzero(valid)
    target = tuple(index[keep] - a for index, a in zip(where, lo, strict=True))
    value = value[keep]
    flat_target = np.ravel_multi_index(target, out.shape) if target else np.zeros(len(keep), np.int64)
    flat_out = out.reshape(-1)
    if op.combine.kind == "set":
        # Row-major order and "the last one wins": keep the last update of every element.
        last, first_from_end = np.unique(flat_target[::-1], return_index=True)
        flat_out[last] = value[::-1][first_from_end]
        return flat_out.reshape(out.shape)
    wide = flat_out.astype(value.dtype)
    for chosen in _rounds(flat_target):
        at = flat_target[chosen]
        (wide[at],) = merge(op.combine, [wide[at]], [value[chosen]])
    return wide.astype(out.dtype).reshape(out.shape)


def _rounds(target: Array) -> Iterator[Array]:
    """Positions of the first, second, … occurrence of every distinct target, in order."""
    order = np.argsort(target, kind="stable")
    ordered = target[order]
    start = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[start, len(ordered)])
    occurrence = np.arange(len(ordered)) - np.repeat(start, counts)
    for k in range(int(counts.max(initial=0))):
        yield order[occurrence == k]


def _eval_cumulative(op: Cumulative, lo: Sequence[int], hi: Sequence[int], read: Read) -> list[Array]:
    axis = op.axis
    start, stop = list(lo), list(hi)
    if op.reverse:
        stop[axis] = op.space[axis]
    else:
        start[axis] = 0
    shape = [b - a for a, b in zip(start, stop)]
    parts = eval_expr(op.body, (start, stop), lambda slot: read(op.operands[slot]))
    parts = [np.moveaxis(np.broadcast_to(p, shape), axis, -1) for p in parts]
    if op.reverse:
        parts = [p[..., ::-1] for p in parts]
    acc = _scan(op.combine, op.acc, parts)
    if op.reverse:
        acc = [a[..., ::-1] for a in acc]
    acc = [np.moveaxis(a, -1, axis) for a in acc]
    own = tuple(slice(a - base, b - base) for a, b, base in zip(lo, hi, start))
    with np.errstate(all="ignore"):
        rounded = [a[own].astype(dtypes.to_numpy(t)) for a, t in zip(acc, op.acc, strict=True)]
    results = eval_expr(op.epilogue, (lo, hi), lambda slot: read(op.operands[slot]), acc=rounded)
    return _filled(results, lo, hi)


def _scan(combine: Combine, acc: Sequence[str], parts: list[Array]) -> list[Array]:
    """Running combinations along the last axis."""
    kind = combine.kind
    join = _JOIN.get(kind)
    if isinstance(join, np.ufunc):
        (part,) = parts
        wide = part.astype(_exact(acc[0])) if kind == "sum" else part
        with np.errstate(all="ignore"):
            running = join.accumulate(wide, axis=-1, dtype=wide.dtype)
            # Sums start from +0, which shows where all terms are -0.
            return [running + wide.dtype.type(0) if kind == "sum" else running]
    if kind in ("argmax", "argmin"):
        parts = [*parts, np.broadcast_to(np.arange(parts[0].shape[-1]), parts[0].shape)]
    out = [p.copy() for p in parts]
    for k in range(1, out[0].shape[-1]):
        joined = merge(combine, [o[..., k - 1] for o in out], [p[..., k] for p in parts])
        for o, j in zip(out, joined, strict=True):
            o[..., k] = j
    return out


def _eval_sort(op: Sort, lo: Sequence[int], hi: Sequence[int], read: Read) -> list[Array]:
    axis = op.axis
    rows = tuple(slice(None) if d == axis else slice(a, b) for d, (a, b) in enumerate(zip(lo, hi)))
    operands = [np.moveaxis(read(v)[rows], axis, -1) for v in op.operands]
    if op.top_k is not None:
        (key,) = operands
        # Descending with ties to the smaller position: ascending order of the complement is stable.
        order = np.argsort(~total_order(key), axis=-1, kind="stable")[..., : op.top_k]
        operands = [key, np.broadcast_to(np.arange(key.shape[-1], dtype=np.int32), key.shape)]
    else:
        order = np.lexsort([_sort_key(k) for k in operands[: op.num_keys]][::-1], axis=-1)
    own = slice(lo[axis], hi[axis])
    return [np.moveaxis(np.take_along_axis(x, order, axis=-1)[..., own], -1, axis).copy() for x in operands]


def _sort_key(array: Array) -> Array:
    """Integers in JAX's order of the elements: -0 equals +0, NaNs are equal and last."""
    if dtypes.is_float(dtypes.from_numpy(array.dtype) or ""):
        wide = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
        array = np.where(np.isnan(wide), np.nan, np.where(wide == 0, 0.0, wide)).astype(wide.dtype)
    return total_order(array)


def total_order(array: Array) -> Array:
    """Integers in the total order of the elements: -NaN, -inf, …, -0, +0, …, inf, NaN."""
    if dtypes.is_float(dtypes.from_numpy(array.dtype) or ""):
        bits = np.ascontiguousarray(array).view(np.dtype(f"i{array.dtype.itemsize}"))
        return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)
    return array


def _run_loop(graph: Graph, op: Loop, env: dict[int, Array]) -> list[Array]:
    carry = [env[v] for v in op.inits]
    trips = 0
    while trips < (_MAX_TRIPS if op.trips is None else op.trips):
        inner = dict(env)
        inner.update(zip(op.params, carry, strict=True))
        if op.cond is not None and not bool(run_block(graph, op.cond, dict(inner))[0]):
            return carry
        carry = run_block(graph, op.body, inner)
        trips += 1
    if op.trips is None:
        raise RuntimeError(f"a loop of {op.source} ran for {_MAX_TRIPS} rounds")
    return carry


# -- helpers ---------------------------------------------------------------------------------------------------


def _filled(results: Sequence[Array], lo: Sequence[int], hi: Sequence[int]) -> list[Array]:
    shape = [b - a for a, b in zip(lo, hi)]
    return [np.array(np.broadcast_to(r, shape)) for r in results]


def _pieces(lo: Sequence[int], hi: Sequence[int], weight: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Splits a box, in row-major order, so that a piece times ``weight`` stays within the chunk size."""
    shape = [b - a for a, b in zip(lo, hi)]
    axis = next((d for d, n in enumerate(shape) if n > 1), None)
    if math.prod(shape) * weight <= _CHUNK or axis is None:
        yield tuple(lo), tuple(hi)
        return
    rest = math.prod(shape[axis + 1 :]) * weight
    step = max(1, _CHUNK // max(1, rest))
    for start in range(lo[axis], hi[axis], step):
        low, high = list(lo), list(hi)
        low[axis], high[axis] = start, min(start + step, hi[axis])
        if step == 1:
            yield from _pieces(low, high, weight)
        else:
            yield tuple(low), tuple(high)
