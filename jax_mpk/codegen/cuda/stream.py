"""Contractions whose constant factor streams through the ring: whole rows, contiguous along the reduced axes."""

from __future__ import annotations

import math

import numpy as np

from jax_mpk.codegen import bodies
from jax_mpk.codegen.cuda.arrays import row_major
from jax_mpk.codegen.cuda.routine import Frame, Stream, product
from jax_mpk.codegen.cuda.scalars import Scalars, Term
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Nest

#: Bytes of a stage of the ring; a chunk fits into one.
STAGE_BYTES = 16 << 10
#: Most rows of a chunk: csrc/device/tasks/contract.cuh.
_MOST_ROWS = 16
#: Most columns of the other factor: beyond, matrix instructions would be worth it.
MOST_COLUMNS = 8
#: Fewer bytes than this a task are not worth the ring.
_LEAST_BYTES = 2048
_TYPES = ("bf16", "f16", "f32")


def chunks(depth: int, itemsize: int) -> tuple[int, int] | None:
    """Rows of a chunk and parts of a row, or None where rows cannot be cut evenly: `Chunks` in contract.cuh."""
    for parts in range(1, 33):
        size = depth // parts * itemsize
        if depth % parts == 0 and size % 16 == 0 and size <= STAGE_BYTES:
            return (min(_MOST_ROWS, STAGE_BYTES // size) if parts == 1 else 1), parts
    return None


def stream_rows(frame: Frame, member: int, op: Nest) -> bool:
    """Writes a contraction as ``stream_rows``; False where it is not one."""
    from jax_mpk.codegen.cuda.members import loader, stores, title

    plan, rank = frame.plan, len(op.space)
    if op.acc != ("f32",) or op.epilogue is None:
        return False
    layouts = tuple((frame.values[v].dtype, row_major(frame.values[v].shape)) for v in op.operands)
    code = bodies.contract_code(op, layouts, len(op.operands) + len(op.outputs))
    if code is None or code.windows is not None:
        return False
    depth = math.prod(op.rspace)
    boxes = frame.boxes[member]
    lo, hi = boxes[:, 0, :rank], boxes[:, 1, :rank]
    sizes = np.maximum(hi - lo, 0)
    inner = row_major(op.rspace)
    for weight, other in ((code.lhs, code.rhs), (code.rhs, code.lhs)):
        v, x = op.operands[weight.slot], op.operands[other.slot]
        storage = int(plan.value_storage[v])
        dtype, x_dtype = frame.values[v].dtype, frame.values[x].dtype
        if storage < 0 or plan.storages[storage].kind != "input" or dtype not in _TYPES or x_dtype not in _TYPES:
            continue
        real = [d for d, e in enumerate(op.rspace) if e > 1]
        if any(weight.strides[rank + d] != inner[d] or other.strides[rank + d] != inner[d] for d in real):
            continue
        free = [d for d in range(rank) if weight.strides[d]]
        columns = [d for d in range(rank) if d not in free]
        if any(other.strides[d] for d in free if op.space[d] > 1):
            continue
        count = int(sizes[:, columns].prod(axis=1).max(initial=0))
        cut = chunks(depth, dtypes.itemsize(dtype))
        if cut is None or not (sizes[:, columns].prod(axis=1) == count).all() or not 0 < count <= MOST_COLUMNS:
            continue
        rows_per_chunk, parts = cut
        if rows_per_chunk * count > 32 and parts == 1:
            continue
        # The rows of every task must be consecutive: axes inside the first cut one are whole.
        expected, consecutive = depth, True
        split = np.zeros(len(lo), bool)
        for d in free:
            inside = [e for e in free if e > d]
            consecutive &= weight.strides[d] == depth * math.prod(op.space[e] for e in inside) or op.space[d] == 1
            consecutive &= bool(np.all(~split | (sizes[:, d] == op.space[d])))
            split |= sizes[:, d] > 1
        del expected
        if not consecutive:
            continue
        source = frame.array(x)
        if source.kind != "local" or count > 1 and len([d for d in columns if other.strides[d]]) > 1:
            continue
        rows = sizes[:, free].prod(axis=1)
        size = rows * depth * dtypes.itemsize(dtype)
        if size.max(initial=0) < _LEAST_BYTES or (rows == 0).any():
            continue
        first = weight.constant + (lo[:, free] * np.array([weight.strides[d] for d in free], np.int64)).sum(axis=1)
        if np.any(first * dtypes.itemsize(dtype) % 16):
            continue
        low, extents, _ = frame.box(member, rank)
        # What x is at the first column of the box; its own strides are those of its place in scratch.
        local = bodies.contract_code(
            op,
            tuple((dt, source.strides if op.operands[k] == x else st) for k, (dt, st) in enumerate(layouts)),
            len(op.operands) + len(op.outputs),
        )
        assert local is not None
        factor = local.lhs if weight is code.rhs else local.rhs
        stepping = [d for d in columns if factor.strides[d] and extents[d].value != 1]
        step = factor.strides[stepping[0]] if stepping else 0
        if any(factor.strides[rank + d] != inner[d] for d in real) or step % 8 or factor.constant % 8:
            continue
        operands = [frame.array(o) for o in op.operands if o != v]
        outputs = [frame.array(o, store=True) for o in op.outputs]
        frame.meet(operands, outputs)
        at = [f"{t} * {factor.strides[d]}" for d, t in enumerate(low) if d in columns and factor.strides[d] and t.value != 0]
        start = " + ".join([source.name, *([str(factor.constant)] if factor.constant else []), *at])
        if source.origin:
            start += f" - {source.origin}"
        frame.line(f"{title(op, frame)}, {dtype} rows streamed")
        row_coords, decode_row = frame.coordinates(
            "row", [low[d] for d in free], [extents[d] for d in free], [f"i{d}" for d in free]
        )
        col_coords, decode_col = frame.coordinates(
            "m", [low[d] for d in columns], [extents[d] for d in columns], [f"i{d}" for d in columns]
        )
        coords: list[Term] = [Term("0")] * rank
        for d, term in (*zip(free, row_coords, strict=True), *zip(columns, col_coords, strict=True)):
            coords[d] = term
        arrays = [frame.array(o) if o != v else None for o in op.operands]
        finish = stores(frame, op.epilogue, coords, loader(arrays), outputs, lambda node: "sum")  # type: ignore[arg-type]
        row_term = product([extents[d] for d in free])
        frame.line(f"stream_rows<{dtype}, {x_dtype}, {count}, {depth}>(")
        frame.line(f"    c, {start}, {step}, {row_term.text},")
        frame.line("    [&](int row, int m, f32 sum) {")
        for text in (*decode_row, *decode_col, *finish):
            frame.line(f"      {text}")
        frame.line("    });")
        chunk = depth // parts * dtypes.itemsize(dtype) * rows_per_chunk
        frame.code.streams.append(Stream(storage, chunk, first * dtypes.itemsize(dtype), size))
        if parts > 1:
            frame.code.partials = max(frame.code.partials, int(rows.max()) * parts * count * 4)
        return True
    return False
