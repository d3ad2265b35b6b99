"""Which untagged values a routine copies to scratch in the background, while it waits for tagged ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jax_mpk.codegen.cuda.arrays import local_bytes, row_major
from jax_mpk.codegen.cuda.columns import streamed
from jax_mpk.codegen.cuda.live import Live, Shift
from jax_mpk.codegen.cuda.meetings import overlap
from jax_mpk.codegen.cuda.staging import Copied
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Nest, Op, Update, Value, reads
from jax_mpk.graph.regions import op_touches
from jax_mpk.graph.windows import own_index
from jax_mpk.plan.ir import Plan, Routine

#: Most bytes of one value, and of all values of a routine.
_ONE, _ALL = 36 << 10, 72 << 10
#: What takes no scratch of its own may be as large as that is.
_SCRATCH = 1 << 20


def copies(plan: Plan, routine: Routine, live: Live, boxes: np.ndarray) -> list[Copied]:
    """What a routine copies: small parts of buffers that no member of it writes, other than what it streams."""
    graph, ops = plan.graph, live.ops
    local = set(routine.local_values)
    written = {int(plan.value_storage[v]) for op in ops if op is not None for v in op.outputs if v not in local}
    regions: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    barred: set[int] = set()
    for m, op in enumerate(ops):
        if op is None:
            continue
        if not isinstance(op, Nest):
            barred.update(op.operands, (op.base,) if isinstance(op, Update) else ())
            continue
        weight = None if live.limits[m] else streamed(plan, op, boxes[m])
        if weight is not None:
            barred.add(weight)
        rank = len(op.space)
        for touch in op_touches(graph, op, boxes[m][:, 0, :rank], boxes[m][:, 1, :rank]):
            storage = int(plan.value_storage[touch.value])
            if touch.value in local or storage < 0 or storage in written or plan.storages[storage].tagged:
                continue
            old = regions.get(touch.value)
            regions[touch.value] = (touch.lo, touch.hi) if old is None else _union(*old, touch.lo, touch.hi)
    out, total = [], 0
    for v, (lo, hi) in regions.items():
        place = None if v in live.shifts else _place(plan, routine, ops, boxes, v, lo, hi)
        most = _ONE if place is None else _SCRATCH
        copied = None if v in barred else _copied(v, graph.values[v], lo, hi, most, live.shifts.get(v))
        if copied is None:
            continue
        if place is not None and copied.unit == 16:
            out.append(replace(copied, pad=0, place=place))
            continue
        size = int((hi - lo).max(axis=0).prod()) * dtypes.itemsize(graph.values[v].dtype)
        if size <= _ONE and total + size <= _ALL:
            out.append(copied)
            total += size
    return out


def _union(a_lo: np.ndarray, a_hi: np.ndarray, b_lo: np.ndarray, b_hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes around pairs of boxes, empty ones left out."""
    a_empty, b_empty = (np.any(hi <= lo, axis=1)[:, None] for lo, hi in ((a_lo, a_hi), (b_lo, b_hi)))
    lo = np.where(a_empty, b_lo, np.where(b_empty, a_lo, np.minimum(a_lo, b_lo)))
    return lo, np.where(a_empty, b_hi, np.where(b_empty, a_hi, np.maximum(a_hi, b_hi)))


def _place(
    plan: Plan, routine: Routine, ops: Sequence[Op | None], boxes: np.ndarray, v: int, lo: np.ndarray, hi: np.ndarray
) -> int | None:
    """The local value in whose place ``v`` may be copied: a map makes it, element by element, out of ``v``.

    Nothing reads ``v`` behind that map, and no other local value lies there.
    """
    readers = [m for m, op in enumerate(ops) if op is not None and v in reads(op)]
    op = ops[readers[-1]] if readers else None
    if (
        not isinstance(op, Nest)
        or op.kind != "map"
        or len(op.outputs) != 1
        or op.outputs[0] not in routine.local_values
    ):
        return None
    value, made, rank = plan.graph.values[v], plan.graph.values[op.outputs[0]], len(op.space)
    local = routine.local_values.index(made.id)
    if value.shape != op.space or dtypes.itemsize(value.dtype) != dtypes.itemsize(made.dtype):
        return None
    if v not in own_index(op):
        return None
    box = boxes[readers[-1]]
    same = np.array_equal(lo, box[:, 0, :rank]) and np.array_equal(hi, box[:, 1, :rank])
    if not same or tuple((hi - lo).max(axis=0).tolist()) != tuple(routine.local_extents[local]):
        return None
    spans = local_bytes(plan, routine)
    place = spans.pop(made.id)
    if any(overlap(place, other) for other in spans.values()):
        return None
    return local


def _copied(v: int, value: Value, lo: np.ndarray, hi: np.ndarray, limit: int, shift: Shift | None) -> Copied | None:
    """How boxes of value ``v`` are copied, or None where they are too large or lie at odd places."""
    shape, item = value.shape, dtypes.itemsize(value.dtype)
    hi = np.maximum(hi, lo)
    sizes = hi - lo
    most = int(sizes.max(axis=0).prod()) * item if shape else item
    if most > limit or most == 0:
        return None
    if not shape:
        return Copied(v, lo, hi, item, 0) if item in (4, 8, 16) else None
    # Axes behind the first cut one are whole: every row is a run of them.
    steps = [lo[:, d] * s * item for d, s in enumerate(row_major(shape))]
    run = sizes[:, -1] * item
    last = len(shape) if shift is not None and shift.axis == len(shape) - 1 else len(shape) - 1
    strides = [s * item for d, s in enumerate(row_major(shape)[:last]) if shape[d] > 1]
    for unit in (16, 8, 4):
        if all((x % unit == 0).all() for x in (*steps, run)) and all(s % unit == 0 for s in strides) and unit >= item:
            rows = int(sizes[:, :-1].prod(axis=1).max(initial=0)) if len(shape) > 1 else 1
            pad = 16 // item if rows > 1 and unit == 16 and int(sizes[:, -1].max()) * item % 128 == 0 else 0
            return Copied(v, lo, hi, unit, pad, shift)
    return None
