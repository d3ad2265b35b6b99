"""The tasks of one routine as columns, and the tables of a Plan made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Graph, walk
from jax_mpk.graph.spans import BoxSpans
from jax_mpk.plan.ir import TASK, Accesses, Member, Routine, Tasks


@dataclass(eq=False)
class Work:
    """The tasks of one routine.

    Attributes:
      members: operators and stages, the anchor last.
      boxes: corners [tasks, rank] per member.
      workers: per task.
      accesses: (name, kind, lo, hi, spans) columns over the tasks.
      first: number of the first task.
      block: for liveness: position in the walk order.
    """

    members: tuple[Member, ...]
    boxes: list[tuple[np.ndarray, np.ndarray]]
    workers: np.ndarray
    accesses: list[tuple[int, int, np.ndarray, np.ndarray, BoxSpans]]
    first: int
    waits: list[list[int]] = field(default_factory=list)
    signals: list[list[int]] = field(default_factory=list)
    at: int = 0


def tables(works: Sequence[Work], graph: Graph, local: set[int]) -> tuple[tuple[Routine, ...], Tasks, Accesses, int]:
    """Routines, tasks, accesses and the bytes of scratch.

    Args:
      works: routines, in the order of their first tasks.
      graph: their graph.
      local: positions of operators that only leave local values.
    """
    ops = tuple(walk(graph.block))
    spaces = [len(lo[0]) for work in works for lo, _ in work.boxes]
    rank = max([*spaces, 1])
    table, boxes, routines = [], [], []
    scratch = 0
    for work in works:
        kept = [v for m in work.members if m.op in local for v in ops[m.op].outputs]
        extents, offsets, at = [], [], 0
        for member, (lo, hi) in zip(work.members, work.boxes):
            for v in ops[member.op].outputs if member.op in local else ():
                extents.append(tuple(int(e) for e in (hi - lo).max(axis=0)))
                offsets.append(at)
                item = dtypes.itemsize(graph.values[v].dtype)
                at += -(-prod(extents[-1]) * item // 16) * 16
        scratch = max(scratch, at)
        for t, w in enumerate(work.workers.tolist()):
            table.append((len(routines), w, len(boxes)))
            for lo, hi in work.boxes:
                boxes.append(_padded(lo[t], hi[t], rank))
        routines.append(Routine(work.members, tuple(kept), tuple(offsets), tuple(extents)))
    waits = [w for work in works for w in work.waits]
    signals = [s for work in works for s in work.signals]
    arank = max([len(lo[0]) for work in works for _, _, lo, *_ in work.accesses] + [1])
    rows = []
    for work in works:
        for name, kind, lo, hi, spans in work.accesses:
            for t in range(len(lo)):
                rows.append(
                    (
                        work.first + t,
                        name,
                        kind,
                        lo[t],
                        hi[t],
                        () if spans.which is None else spans.spans[spans.which[t]],
                    )
                )
    rows.sort(key=lambda row: row[0])
    spans = tuple(dict.fromkeys(r[5] for r in rows if r[5]))
    return (
        tuple(routines),
        Tasks(
            np.array(table, TASK),
            np.array(boxes, np.int64).reshape(len(boxes), 2, rank),
            *_csr(waits),
            *_csr(signals),
        ),
        Accesses(
            np.array([r[0] for r in rows], np.int32),
            np.array([r[1] for r in rows], np.int32),
            np.array([r[2] for r in rows], np.uint8),
            np.array([_padded(r[3], r[4], arank) for r in rows], np.int64).reshape(-1, 2, arank),
            np.array([spans.index(r[5]) if r[5] else -1 for r in rows], np.int32),
            spans,
        ),
        scratch,
    )


def _padded(lo: np.ndarray, hi: np.ndarray, rank: int) -> np.ndarray:
    out = np.zeros((2, rank), np.int64)
    out[1] = 1
    out[0, : len(lo)], out[1, : len(hi)] = lo, hi
    return out


def _csr(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    start = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    return start, np.array([e for x in lists for e in x], np.int32)
