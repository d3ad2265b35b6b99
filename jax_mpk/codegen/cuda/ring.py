"""What the contractions of a program want of the ring in shared memory: csrc/device/ring.cuh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jax_mpk.codegen.cuda.columns import block_partials, match_columns
from jax_mpk.codegen.cuda.pieces import STAGE_BYTES, TILE_STAGES, pieces
from jax_mpk.codegen.cuda.stream import Rows, match, row_partials
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Nest
from jax_mpk.plan.ir import Plan

#: Fewest stages of a ring without tiles.
FEWEST_STAGES = 4
#: Other sizes of a stage, for rows that fill one badly: a short chunk keeps the producer as long as another. For whole
#: rows only; pieces of tiles and blocks of columns are cut to fit.
_OTHER_STAGES = (10 << 10, 12 << 10)
#: By so much they must be filled better: larger chunks keep a task's last warps waiting.
_BETTER = 1.2


@dataclass(frozen=True)
class Wanted:
    """What routines want.

    Attributes:
      stage: bytes of a stage.
      fewest: stages, at least.
      partials: bytes to join parts of outputs: there is one place for those of all routines.
    """

    stage: int
    fewest: int
    partials: int


NO_RING = Wanted(stage=0, fewest=0, partials=0)


def wanted(plan: Plan, order: np.ndarray, edges: np.ndarray) -> Wanted:
    """What the routines of a plan want.

    Args:
      plan: the plan.
      order: int64 [tasks]: tasks by routine.
      edges: int64 [routines + 1]: where those of each routine begin there.
    """
    first = plan.tasks.table["box"].astype(np.int64)
    whole: list[tuple[Nest, np.ndarray, Rows]] = []
    partials, tiles, others = 0, False, False
    for routine, (a, b) in zip(plan.routines, pairwise(edges), strict=True):
        for m, member in enumerate(routine.members):
            op = plan.ops[member.op]
            if not isinstance(op, Nest):
                continue
            boxes = plan.tasks.boxes[first[order[a:b]] + m]
            if (rows := match(plan, op, boxes)) is None:
                if (columns := match_columns(plan, op, boxes)) is not None:
                    partials, others = max(partials, block_partials(columns)), True
            elif rows.height:
                partials, tiles = max(partials, pieces(*_size(plan, op, rows), "kPassing").sums), True
            else:
                whole.append((op, boxes, rows))
    stage = STAGE_BYTES if tiles or others else _stage(plan, whole)
    for op, boxes, rows in whole:
        cut = rows if stage == STAGE_BYTES else match(plan, op, boxes, stage)
        assert cut is not None
        partials = max(partials, row_partials(cut))
    return Wanted(stage, TILE_STAGES if tiles or others else FEWEST_STAGES, partials)


def _size(plan: Plan, op: Nest, rows: Rows) -> tuple[int, int, int]:
    """Elements of a row, columns of the other factor, bytes of an element."""
    return math.prod(op.rspace), rows.count, dtypes.itemsize(plan.graph.values[op.operands[rows.weight]].dtype)


def _stage(plan: Plan, whole: list[tuple[Nest, np.ndarray, Rows]]) -> int:
    """Bytes of a stage that whole rows fill best, or the usual ones."""
    best, most = STAGE_BYTES, _fill(plan, whole, STAGE_BYTES) * _BETTER
    for stage in _OTHER_STAGES:
        if (fill := _fill(plan, whole, stage)) > most:
            best, most = stage, fill
    return best


def _fill(plan: Plan, whole: list[tuple[Nest, np.ndarray, Rows]], stage: int) -> float:
    """The part of stages of that size that rows fill; 0 where some would not stream."""
    nbytes = chunks = 0
    for op, boxes, rows in whole:
        cut = match(plan, op, boxes, stage)
        if cut is None:
            return 0.0
        depth, _, item = _size(plan, op, rows)
        nbytes += int(rows.rows.sum()) * depth * item
        chunks += int((-(-rows.rows // cut.chunk_rows)).sum()) * cut.parts
    return nbytes / (chunks * stage) if chunks else 0.0
