"""What the contractions of a program want of the ring in shared memory: csrc/device/ring.cuh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jax_mpk.codegen.cuda.columns import block_partials, match_columns
from jax_mpk.codegen.cuda.pieces import STAGE_BYTES, TILE_STAGES, pieces
from jax_mpk.codegen.cuda.stream import Rows, cut_for, match, row_partials
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


def tasks_by_routine(plan: Plan) -> list[np.ndarray]:
    """int64 [tasks of it], per routine."""
    routine = plan.tasks.table["routine"]
    order = np.argsort(routine, kind="stable")
    edges = np.searchsorted(routine[order], np.arange(len(plan.routines) + 1))
    return [order[a:b] for a, b in pairwise(edges)]


def wanted(plan: Plan) -> Wanted:
    """What the routines of a plan want."""
    first = plan.tasks.table["box"].astype(np.int64)
    whole: list[tuple[Rows, int, int]] = []  # with elements of a row, and bytes of each
    partials, cut_to_fit = 0, False
    for routine, tasks in zip(plan.routines, tasks_by_routine(plan), strict=True):
        for m, member in enumerate(routine.members):
            op = plan.ops[member.op]
            if not isinstance(op, Nest):
                continue
            boxes = plan.tasks.boxes[first[tasks] + m]
            if (rows := match(plan, op, boxes)) is not None:
                depth = math.prod(op.rspace)
                item = dtypes.itemsize(plan.graph.values[op.operands[rows.weight]].dtype)
                if rows.height:
                    partials, cut_to_fit = max(partials, pieces(depth, rows.count, item, "kPassing").sums), True
                else:
                    whole.append((rows, depth, item))
            elif (columns := match_columns(plan, op, boxes)) is not None:
                partials, cut_to_fit = max(partials, block_partials(columns)), True
    stage = STAGE_BYTES if cut_to_fit else _stage(whole)
    for rows, depth, item in whole:
        cut = cut_for(depth, item, rows.count, stage)
        assert cut is not None
        partials = max(partials, row_partials(rows, cut[1]))
    return Wanted(stage, TILE_STAGES if cut_to_fit else FEWEST_STAGES, partials)


def _stage(whole: list[tuple[Rows, int, int]]) -> int:
    """Bytes of a stage that whole rows fill best, or the usual ones."""
    best, most = STAGE_BYTES, _fill(whole, STAGE_BYTES) * _BETTER
    for stage in _OTHER_STAGES:
        if (fill := _fill(whole, stage)) > most:
            best, most = stage, fill
    return best


def _fill(whole: list[tuple[Rows, int, int]], stage: int) -> float:
    """The part of stages of that size that rows fill; 0 where some would not stream."""
    nbytes = chunks = 0
    for rows, depth, item in whole:
        cut = cut_for(depth, item, rows.count, stage)
        if cut is None:
            return 0.0
        chunk_rows, parts = cut
        nbytes += int(rows.rows.sum()) * depth * item
        chunks += int((-(-rows.rows // chunk_rows)).sum()) * parts
    return nbytes / (chunks * stage) if chunks else 0.0
