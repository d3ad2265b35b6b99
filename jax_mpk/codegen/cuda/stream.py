"""Contractions whose constant factor streams through the ring: whole rows, contiguous along the reduced axes.

With a few columns a chunk holds whole rows, whose products with each column a warp computes by itself; with more, it
holds a piece of each of some rows, and all warps multiply tiles of 16 rows on tensor cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_mpk.codegen import bodies
from jax_mpk.codegen.cuda.arrays import Array, row_major
from jax_mpk.codegen.cuda.code import Stream
from jax_mpk.codegen.cuda.pieces import MORE_STAGES, STAGE_BYTES, TILE_ROWS, TILE_STEP, Held, Pieces, pieces
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Term, fixed, product
from jax_mpk.codegen.cuda.texts import loader, stores, title
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Graph, Nest
from jax_mpk.plan.ir import Plan

#: Most rows of a chunk, and most parts of a row: `Chunks` in csrc/device/tasks/contract.cuh.
_MOST_ROWS, _MOST_PARTS = 16, 32
#: Most columns of the other factor for whole rows; columns that tiles are worth it for, and most of them.
_MOST_COLUMNS, _TILE_COLUMNS, _MOST_TILE_COLUMNS = 8, 5, 64
#: Fewer bytes a task are not worth the ring.
_LEAST_BYTES = 2048
_TYPES = ("bf16", "f16", "f32")


@dataclass(frozen=True)
class Streamed:
    """A contraction as a constant weight times a few columns.

    Attributes:
      weight, other: slots of the operands.
      swapped: the weight is the right factor.
      free, columns: parallel axes that the weight has, and has not.
      count: columns of every task.
      first: int64 [tasks]: the first element of the weight.
    """

    weight: int
    other: int
    swapped: bool
    free: tuple[int, ...]
    columns: tuple[int, ...]
    count: int
    first: np.ndarray


@dataclass(frozen=True)
class Rows(Streamed):
    """Whole rows of a weight that lies contiguous along the reduced axes.

    Attributes:
      chunk_rows, parts: how rows are cut into chunks.
      height: rows of a chunk that holds a piece of each; 0: chunks hold whole rows or parts of one.
      rows: int64 [tasks].
    """

    chunk_rows: int
    parts: int
    height: int
    rows: np.ndarray


def factors(graph: Graph, op: Nest, strides: dict[int, tuple[int, ...]] | None = None) -> bodies.ContractCode | None:
    """Both factors of a contraction; ``strides``: of operands, by slot, that are not row-major."""
    layouts = tuple(
        (graph.values[v].dtype, (strides or {}).get(slot, row_major(graph.values[v].shape)))
        for slot, v in enumerate(op.operands)
    )
    return bodies.contract_code(op, layouts, len(op.operands) + len(op.outputs))


def match(plan: Plan, op: Nest, boxes: np.ndarray, stage: int = STAGE_BYTES) -> Rows | None:
    """How a contraction streams, or None where it does not.

    Args:
      plan: the plan.
      op: the contraction.
      boxes: int64 [tasks, 2, rank].
      stage: bytes of a stage of the ring.
    """
    if op.kind != "contract" or op.acc != ("f32",):
        return None
    code = factors(plan.graph, op)
    if code is None or code.windows is not None:
        return None
    found = [rows for swapped in (False, True) if (rows := _rows(plan, op, boxes, code, swapped, stage))]
    # Where both factors are constant, the larger one is the weight.
    return max(found, key=lambda rows: math.prod(plan.graph.values[op.operands[rows.weight]].shape), default=None)


def _rows(plan: Plan, op: Nest, boxes: np.ndarray, code: bodies.ContractCode, swapped: bool, stage: int) -> Rows | None:
    weight, other = (code.rhs, code.lhs) if swapped else (code.lhs, code.rhs)
    rank, depth = len(op.space), math.prod(op.rspace)
    values = plan.graph.values
    storage = int(plan.value_storage[op.operands[weight.slot]])
    dtype = values[op.operands[weight.slot]].dtype
    if storage < 0 or plan.storages[storage].kind != "input":
        return None
    if dtype not in _TYPES or values[op.operands[other.slot]].dtype not in _TYPES:
        return None
    inner = row_major(op.rspace)
    if any(e > 1 and weight.strides[rank + d] != inner[d] for d, e in enumerate(op.rspace)):
        return None
    sizes = np.maximum(boxes[:, 1, :rank] - boxes[:, 0, :rank], 0)
    free = tuple(d for d in range(rank) if weight.strides[d])
    columns = tuple(d for d in range(rank) if d not in free)
    count = int(sizes[:, columns].prod(axis=1).max(initial=0))
    rows = sizes[:, free].prod(axis=1)
    item = dtypes.itemsize(dtype)
    if any(op.space[d] > 1 and other.strides[d] for d in free):
        return None
    if count == 0 or not (sizes[:, columns].prod(axis=1) == count).all() or not rows.all():
        return None
    if rows.max(initial=0) * depth * item < _LEAST_BYTES:
        return None
    # Of two factors the one with fewer rows is no weight.
    wide = math.prod(op.space[d] for d in free) >= math.prod(op.space[d] for d in columns)
    same = values[op.operands[other.slot]].dtype == dtype != "f32"
    tiles = same and wide and depth % TILE_STEP == 0 and _TILE_COLUMNS <= count <= _MOST_TILE_COLUMNS
    height = pieces(depth, count, item, "kPassing").rows if tiles else 0
    cut = (0, 0) if height else cut_for(depth, item, count, stage)
    if cut is None:
        return None
    if not consecutive(op, weight.strides, free, sizes, depth):
        return None
    first = weight.constant + boxes[:, 0, free] @ np.array([weight.strides[d] for d in free], np.int64)
    if np.any(first * item % 16):
        return None
    return Rows(weight.slot, other.slot, swapped, free, columns, count, first, *cut, height, rows)


def consecutive(op: Nest, strides: tuple[int, ...], free: tuple[int, ...], sizes: np.ndarray, behind: int) -> bool:
    """Whether what each task has of a weight's free axes is consecutive: axes behind the first one it cuts are whole.

    Args:
      op: the contraction.
      strides: of the weight, by axis.
      free: the axes, in the weight's order.
      sizes: int64 [tasks, rank]: extents of the tasks' boxes.
      behind: elements that belong to one coordinate of all free axes.
    """
    for d in reversed(free):
        if op.space[d] > 1 and strides[d] != behind:
            return False
        behind *= op.space[d]
    split = np.zeros(len(sizes), bool)
    for d in free:
        if np.any(split & (sizes[:, d] != op.space[d])):
            return False
        split |= sizes[:, d] > 1
    return True


def cut_rows(depth: int, itemsize: int, stage: int = STAGE_BYTES) -> tuple[int, int] | None:
    """Rows of a chunk and parts of a row, or None where rows cannot be cut evenly: `Chunks` in contract.cuh."""
    for parts in range(1, _MOST_PARTS + 1):
        size = depth // parts * itemsize
        if depth % parts == 0 and size % 16 == 0 and size <= stage:
            return (min(_MOST_ROWS, stage // size) if parts == 1 else 1), parts
    return None


def cut_for(depth: int, itemsize: int, columns: int, stage: int) -> tuple[int, int] | None:
    """The same, or None where a warp cannot multiply a chunk with so many columns either."""
    cut = cut_rows(depth, itemsize, stage)
    fits = cut is not None and columns <= _MOST_COLUMNS and (cut[1] > 1 or cut[0] * columns <= 32)
    return cut if fits else None


def stream_rows(frame: Frame, member: int, op: Nest) -> bool:
    """Writes a contraction as ``stream_rows`` or ``stream_tiles``; False where it is neither."""
    found = match(frame.plan, op, frame.boxes[member], frame.stage) if frame.stage else None
    if found is None:
        return False
    x = frame.array(op.operands[found.other])
    if x.kind not in (("local", "global") if found.height else ("local",)):
        return False
    factor = other_factor(frame, member, op, found, x)
    if factor is None:
        return False
    start, step = factor
    rank, depth = len(op.space), math.prod(op.rspace)
    low, extents, _ = frame.box(member, rank)
    weight = op.operands[found.weight]
    arrays = [frame.array(v) if v != weight else None for v in op.operands]
    outputs = [frame.array(v, store=True) for v in op.outputs]
    others = [a for v, a in zip(op.operands, arrays, strict=True) if a is not None and v != op.operands[found.other]]
    coords: list[Term] = [fixed(0)] * rank
    decode = decoded(frame, low, extents, {"row": found.free, "m": found.columns}, coords)
    assert op.epilogue is not None
    finish = stores(op.epilogue, coords, loader(arrays), outputs, lambda node: "sum")
    dtype, x_dtype = frame.values[weight].dtype, frame.values[op.operands[found.other]].dtype
    rows = product([extents[d] for d in found.free])
    # Where the epilogue reads what other warps have just written, it comes behind all chunks: nobody waits before them.
    later = not found.height and frame.meetings.would_meet(others, outputs)
    sums = frame.scratch_array("f32", int(found.rows.max()) * found.count) if later else None
    frame.meetings.meet(
        [x, *([] if later else others)], [sums] if sums else outputs, joins=found.parts > 1 or found.height > 0
    )
    frame.line(f"{title(frame, op)}: streams {dtype} rows")
    cut = None
    if found.height:
        held = _held(frame, member, op, found, x, factor)
        cut = held.cut
        frame.line(f"stream_tiles(c, {held.name}, {rows.text},")
    else:
        frame.line(f"stream_rows<{dtype}, {x_dtype}, {found.count}, {depth}>(")
        frame.line(f"    c, {start}, {step}, {rows.text},")
    if sums is None:
        frame.lines_of("[&](int row, int m, f32 sum) {", [*decode, *finish], "});")
    else:
        one = found.count == 1
        where = "row" if one else f"row * {found.count} + m"
        frame.line(f"    [&](int row, int m, f32 sum) {{ {sums.name}[{where}] = sum; }});")
        frame.meetings.meet([sums, *others], outputs)
        frame.line(f"map(c, {product([rows, fixed(found.count)]).text}, [&](int n) {{")
        split = "const int row = n;" if one else f"const int row = n / {found.count}, m = n % {found.count};"
        for text in (split, f"const f32 sum = {sums.name}[n];", *decode, *finish):
            frame.line(f"  {text}")
        frame.line("});")
    frame.code.streams.append(_stream(frame.plan, weight, depth, dtypes.itemsize(dtype), found, cut))
    if cut is not None:
        frame.code.partials = max(frame.code.partials, cut.sums)
    else:
        frame.code.partials = max(frame.code.partials, row_partials(found, found.parts))
    return True


def row_partials(rows: Rows, parts: int) -> int:
    """Bytes that join so many parts of whole rows."""
    return int(rows.rows.max()) * parts * rows.count * 4 if parts > 1 else 0


def _held(frame: Frame, member: int, op: Nest, found: Rows, x: Array, at: tuple[str, int]) -> Held:
    """The factor that threads hold: that of the member in front, where this one has the same, or a new one.

    Args:
      frame: the routine.
      member: number of the contraction in it.
      op: the contraction.
      found: how its weight streams.
      x: the other factor's array.
      at: where that begins, and its step from column to column.
    """
    value, depth, columns = op.operands[found.other], math.prod(op.rspace), found.count
    held = frame.held.get(member - 1)
    key = (value, depth, columns, *at)
    if held is None or held.key != key:
        dtype = frame.values[value].dtype
        reach = "kScratch" if x.kind == "local" else "kHeld"
        cut, passing = (pieces(depth, columns, dtypes.itemsize(dtype), r) for r in (reach, "kPassing"))
        # What passes once anyway comes piece by piece: nobody waits for all of it.
        readers = sum(isinstance(o, Nest) and o.kind == "contract" and value in o.operands for o in frame.ops)
        once = readers == 1 and found.rows.max() <= passing.group * TILE_ROWS
        room = frame.room - MORE_STAGES * frame.stage - frame.code.scratch
        if reach == "kHeld" and (once or cut.shelf > room or cut.block < depth):
            reach, cut = "kPassing", passing
        held = Held(key, f"x{member}", cut)
        words = [*at, *([frame.scratch(cut.shelf)] if cut.shelf else [])]
        frame.line(f"auto {held.name} = factor<{dtype}, {columns}, {depth}, {reach}>(c, {', '.join(map(str, words))});")
    frame.held[member] = held
    return held


def other_factor(frame: Frame, member: int, op: Nest, found: Streamed, x: Array) -> tuple[str, int] | None:
    """Where the factor that does not stream begins, and its step from column to column.

    None where it does not lie contiguous along the reduced axes, aligned to eight elements, with one step.

    Args:
      frame: the routine.
      member: number of the contraction in it.
      op: the contraction.
      found: how it streams.
      x: the factor's array.
    """
    if x.wide:
        return None
    rank = len(op.space)
    low, extents, _ = frame.box(member, rank)
    code = factors(frame.plan.graph, op, {found.other: x.strides})
    assert code is not None
    factor = code.lhs if found.swapped else code.rhs
    inner = row_major(op.rspace)
    stepping = [d for d in found.columns if factor.strides[d] and extents[d].value != 1]
    step = factor.strides[stepping[0]] if stepping else 0
    first = factor.constant + frame.boxes[member][:, 0, :rank] @ np.array(factor.strides[:rank], np.int64)
    if x.kind == "local":
        first = first - frame.low_corner(op.operands[found.other]) @ np.array(x.strides, np.int64)
    contiguous = all(factor.strides[rank + d] == inner[d] for d, e in enumerate(op.rspace) if e > 1)
    if len(stepping) > 1 or not contiguous or step % 8 or np.any(first % 8):
        return None
    at = [f"{t} * {factor.strides[d]}" for d, t in enumerate(low) if factor.strides[d] and t.value != 0]
    start = " + ".join([x.name, *([str(factor.constant)] if factor.constant else []), *at])
    return start + (f" - {x.origin}" if x.origin else ""), step


def decoded(
    frame: Frame, low: Sequence[Term], extents: Sequence[Term], axes: dict[str, tuple[int, ...]], coords: list[Term]
) -> list[str]:
    """Lines that make coordinates of positions; fills in ``coords``.

    Args:
      frame: the routine.
      low, extents: of the task's box.
      axes: by the name of a position, the axes that it counts through.
      coords: by axis.
    """
    lines = []
    for position, along in axes.items():
        terms, more = frame.coordinates(
            position, [low[d] for d in along], [extents[d] for d in along], [f"i{d}" for d in along]
        )
        lines += more
        for d, term in zip(along, terms, strict=True):
            coords[d] = term
    return lines


def _stream(plan: Plan, weight: int, depth: int, item: int, found: Rows, cut: Pieces | None) -> Stream:
    """What the producer does for a contraction; ``cut``: into pieces."""
    storage = int(plan.value_storage[weight])
    first, one = found.first * item, np.ones_like(found.first)
    if cut is not None and cut.width < depth:
        width, block = cut.width * item, cut.block * item
        return Stream(storage, width, first, one * depth * item, found.rows, cut.group, block=block, together=True)
    chunk = depth * item * (found.height or found.chunk_rows) // (found.parts or 1)
    return Stream(storage, chunk, first, found.rows * depth * item, one, 0, together=cut is not None)
