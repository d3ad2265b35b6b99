"""What a routine brings to scratch before it starts: tagged values, which it waits for there, and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_mpk.codegen.cuda.live import Shift
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.tags import tagged_accesses


@dataclass(frozen=True)
class Staged:
    """A tagged value in shared memory.

    Attributes:
      value: value id.
      lo, hi: int64 [tasks, rank]: the box each task of the routine brings; empty ones hold lo == hi.
    """

    value: int
    lo: np.ndarray
    hi: np.ndarray


@dataclass(frozen=True)
class Copied:
    """A value copied to scratch.

    Attributes:
      value: value id.
      lo, hi: int64 [tasks, rank]: the box each task copies.
      unit: bytes copied at a time: 16, 8 or 4.
      pad: elements between rows, so that columns spread over the banks of shared memory.
      shift: where the box begins along an axis, and how much of it there is, where that is known at run time.
      place: position of the local value in whose place it is copied, or -1.
    """

    value: int
    lo: np.ndarray
    hi: np.ndarray
    unit: int
    pad: int
    shift: Shift | None = None
    place: int = -1


def shares(sizes: Sequence[int], warps: int) -> list[tuple[int, int]]:
    """First warp and number of warps that bring each of some values of so many bytes, all at the same time."""
    if len(sizes) > warps:
        return [(k % warps, 1) for k in range(len(sizes))]
    counts = [1] * len(sizes)
    for _ in range(warps - len(sizes) if sizes else 0):
        most = max(range(len(sizes)), key=lambda k: sizes[k] / counts[k])
        counts[most] += 1
    return [(sum(counts[:k]), count) for k, count in enumerate(counts)]


class Staging:
    """The staged values of every routine of a plan."""

    def __init__(self, plan: Plan):
        self._plan = plan
        reads, _ = tagged_accesses(plan)
        rows = plan.accesses
        self._task, self._value, self._box = rows.task[reads], rows.value[reads], rows.box[reads]
        self._routine = plan.tasks.table["routine"][self._task]

    def of(self, routine: int, tasks: np.ndarray) -> list[Staged]:
        """What the tasks (ids, ascending) of a routine wait for, where each task's part of a value is one box.

        A box never holds elements that the plan does not say the task reads: they could depend on the task.
        """
        mine = self._routine == routine
        out = []
        for value in np.unique(self._value[mine]).tolist():
            rank = len(self._plan.graph.values[value].shape)
            chosen = mine & (self._value == value)
            merged = merged_boxes(self._task[chosen], self._box[chosen][:, :, :rank], tasks)
            if merged is not None:
                out.append(Staged(value, *merged))
        return out


def merged_boxes(task: np.ndarray, box: np.ndarray, tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Per task the union of its boxes, if that is a box."""
    rank = box.shape[2]
    lo, hi = np.zeros((len(tasks), rank), np.int64), np.zeros((len(tasks), rank), np.int64)
    start = np.searchsorted(task, tasks)
    end = np.searchsorted(task, tasks, side="right")
    first = end > start
    lo[first], hi[first] = box[start[first], 0], box[start[first], 1]
    for k in range(1, int((end - start).max(initial=0))):
        more = start + k < end
        a_lo, a_hi, b_lo, b_hi = lo[more], hi[more], box[start[more] + k, 0], box[start[more] + k, 1]
        same = (a_lo == b_lo) & (a_hi == b_hi)
        touching = (a_lo <= b_hi) & (b_lo <= a_hi)
        line = (same.sum(axis=1) >= rank - 1) & touching.all(axis=1)
        inside = np.all((b_lo >= a_lo) & (b_hi <= a_hi), axis=1) | np.all((a_lo >= b_lo) & (a_hi <= b_hi), axis=1)
        if not np.all(line | inside):
            return None
        lo[more], hi[more] = np.minimum(a_lo, b_lo), np.maximum(a_hi, b_hi)
    return lo, hi
