"""Contractions whose constant factor streams through the ring as it lies by default: contiguous along its free axis.

A task has a range of the weight's columns, cut into blocks; a chunk holds some rows of a block, which tensor cores read
transposed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jax_mpk.codegen.cuda.code import COLUMNS, WARPS, Stream
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Term, product
from jax_mpk.codegen.cuda.stream import Streamed, consecutive, decoded, factors, match, other_factor
from jax_mpk.codegen.cuda.texts import loader, stores, title
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Nest
from jax_mpk.plan.ir import Plan

_TYPES = ("bf16", "f16")
#: Columns of a block, and most of the other factor's for each: accumulators must fit into registers.
_BLOCKS = {128: 8, 64: 32}
#: Steps of the reduced axis: `stream_columns` in csrc/device/tasks/columns.cuh.
_STEP = 32
#: Tiles of 16 columns and 8 of the other factor whose sums are in shared memory at a time: the same.
_SUM_TILES = 8
#: Fewer bytes a task are not worth the ring.
_LEAST_BYTES = 2048


@dataclass(frozen=True)
class Columns(Streamed):
    """Columns of a weight that lies contiguous along its free axes.

    Attributes:
      width: columns of a block.
      stride: elements from row to row of the weight.
      widths: int64 [tasks]: columns of the weight.
    """

    width: int
    stride: int
    widths: np.ndarray


def match_columns(plan: Plan, op: Nest, boxes: np.ndarray) -> Columns | None:
    """How a contraction streams, or None where it does not.

    Args:
      plan: the plan.
      op: the contraction.
      boxes: int64 [tasks, 2, rank].
    """
    rank, values = len(op.space), plan.graph.values
    reduced = [rank + d for d, e in enumerate(op.rspace) if e > 1]
    if op.kind != "contract" or op.acc != ("f32",) or len(reduced) != 1 or math.prod(op.rspace) % _STEP:
        return None
    code = factors(plan.graph, op)
    if code is None or code.windows is not None:
        return None
    sizes = np.maximum(boxes[:, 1, :rank] - boxes[:, 0, :rank], 0)
    found = []
    for swapped in (False, True):
        weight, other = (code.rhs, code.lhs) if swapped else (code.lhs, code.rhs)
        storage = int(plan.value_storage[op.operands[weight.slot]])
        dtype = values[op.operands[weight.slot]].dtype
        if storage < 0 or plan.storages[storage].kind != "input":
            continue
        if dtype not in _TYPES or values[op.operands[other.slot]].dtype != dtype:
            continue
        moving = [d for d in range(rank) if op.space[d] > 1]
        both = [d for d in moving if weight.strides[d] and other.strides[d]]
        free = tuple(d for d in moving if weight.strides[d] and not other.strides[d])
        columns = tuple(d for d in range(rank) if d not in both and d not in free)
        stride, count = weight.strides[reduced[0]], int(sizes[:, columns].prod(axis=1).max(initial=0))
        # A task has one part of what both factors are cut into, and consecutive columns.
        if not free or np.any(sizes[:, both] != 1) or np.any(sizes[:, columns].prod(axis=1) != count):
            continue
        if not consecutive(op, weight.strides, free, sizes, 1):
            continue
        first = weight.constant + boxes[:, 0, :rank] @ np.array(weight.strides[:rank], np.int64)
        widths = sizes[:, free].prod(axis=1)
        if widths.min() * math.prod(op.rspace) * dtypes.itemsize(dtype) < _LEAST_BYTES:
            continue
        each = int(np.gcd.reduce(widths))
        width = next((w for w, most in _BLOCKS.items() if each % w == 0 and count <= most), 0)
        if not width or count == 0 or np.any(first % 8) or stride % 8 or stride < widths.max():
            continue
        found.append(Columns(weight.slot, other.slot, swapped, free, columns, count, first, width, stride, widths))
    # Where both factors are constant, the larger one is the weight.
    return max(found, key=lambda c: math.prod(values[op.operands[c.weight]].shape), default=None)


def streamed(plan: Plan, op: Nest, boxes: np.ndarray) -> int | None:
    """The value that a contraction streams, by rows or by columns, or None."""
    found: Streamed | None = match(plan, op, boxes) or match_columns(plan, op, boxes)
    return None if found is None else op.operands[found.weight]


def block_partials(found: Columns) -> int:
    """Bytes of what the warps have of a block's columns."""
    tiles = -(-found.count // 8)
    return WARPS * min(max(_SUM_TILES // tiles, 1), found.width // 16) * tiles * 16 * 8 * 4


def stream_columns(frame: Frame, member: int, op: Nest) -> bool:
    """Writes a contraction as ``stream_columns``; False where it is none."""
    found = match_columns(frame.plan, op, frame.boxes[member]) if frame.stage else None
    if found is None:
        return False
    x = frame.array(op.operands[found.other])
    if x.kind not in ("local", "global"):
        return False
    factor = other_factor(frame, member, op, found, x)
    if factor is None:
        return False
    start, step = factor
    depth = math.prod(op.rspace)
    low, extents, _ = frame.box(member, len(op.space))
    weight = op.operands[found.weight]
    arrays = [frame.array(v) if v != weight else None for v in op.operands]
    outputs = [frame.array(v, store=True) for v in op.outputs]
    coords: list[Term] = list(low)
    decode = decoded(frame, low, extents, {"column": found.free, "m": found.columns}, coords)
    assert op.epilogue is not None
    finish = stores(op.epilogue, coords, loader(arrays), outputs, lambda node: "sum")
    dtype = frame.values[weight].dtype
    width = product([extents[d] for d in found.free])
    frame.meetings.meet([a for a in arrays if a is not None], outputs, joins=True)
    frame.line(f"{title(frame, op)}: streams {dtype} columns")
    shared = str(x.kind == "local").lower()
    frame.line(f"stream_columns<{dtype}, {found.width}, {found.count}, {depth}, {shared}>(")
    frame.line(f"    c, {start}, {step}, {width.text},")
    frame.lines_of("[&](int column, int m, f32 sum) {", [*decode, *finish], "});")
    item = dtypes.itemsize(dtype)
    rows = np.full_like(found.first, depth)
    storage = int(frame.plan.value_storage[weight])
    frame.code.streams.append(
        Stream(
            storage, COLUMNS + found.width * item, found.first * item, found.widths * item, rows, found.stride * item
        )
    )
    frame.code.partials = max(frame.code.partials, block_partials(found))
    return True
