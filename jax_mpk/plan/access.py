"""What the tasks of a routine read and write in memory, from the regions of its cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from jax_mpk.graph.bounds import apart
from jax_mpk.graph.ir import Update
from jax_mpk.graph.regions import update_written
from jax_mpk.graph.spans import UNLIMITED, BoxSpans, Definition, op_spans, written_spans
from jax_mpk.plan.cluster import Routine
from jax_mpk.plan.ir import MAY, MUST, READ


@dataclass(frozen=True)
class Access:
    """One value's regions, one per task of a routine.

    Attributes:
      value: value id.
      kind: READ, MUST or MAY.
      lo, hi: int64 [tasks, rank].
      spans: what run-time scalars leave of the boxes, by task.
    """

    value: int
    kind: int
    lo: np.ndarray
    hi: np.ndarray
    spans: BoxSpans = UNLIMITED

    def meets(self, other: Access) -> np.ndarray:
        """bool [own tasks, tasks of ``other``]: whether the regions may meet, both in values of one shape."""
        out: np.ndarray = np.all(self.hi > self.lo, axis=1)[:, None] & np.all(other.hi > other.lo, axis=1)[None]
        for axis in range(self.lo.shape[1]):
            out &= self.lo[:, None, axis] < other.hi[None, :, axis]
            out &= other.lo[None, :, axis] < self.hi[:, None, axis]
        if self.spans.which is not None and other.spans.which is not None and READ in (self.kind, other.kind):
            never = np.array([[apart(a, b) for b in other.spans.spans] for a in self.spans.spans])
            out &= ~never[np.ix_(self.spans.which, other.spans.which)]
        return out


def accesses(
    routine: Routine, in_place: Callable[[Update], bool], known: Mapping[int, Definition], local: Collection[int]
) -> list[Access]:
    """Every access to memory of a routine's tasks; equal ones are listed once, local values not at all.

    Args:
      routine: the routine.
      in_place: whether an Update writes into its base's storage.
      known: the graph's :func:`~jax_mpk.graph.spans.definitions`.
      local: local values of this routine and of others.
    """
    out: list[Access] = []
    for op, lo, hi, touches in zip(routine.ops, routine.cut.lo, routine.cut.hi, routine.cut.touches, strict=True):
        # The base of an Update in place, the last of its regions, is not among the touches.
        for touch, spans in zip(touches, op_spans(op, lo, hi, known, local.__contains__)):
            if touch.value not in local:
                _add(out, Access(touch.value, READ, touch.lo, touch.hi, spans))
        for v in op.outputs:
            if v in local:
                continue
            if isinstance(op, Update) and in_place(op):
                spans = written_spans(op, lo, hi, known, local.__contains__)
                _add(out, Access(v, MAY, *update_written(op, lo, hi), spans))
            else:
                _add(out, Access(v, MUST, lo, hi))
    return out


def _add(out: list[Access], new: Access) -> None:
    for old in out:
        if (old.value, old.kind) == (new.value, new.kind) and np.array_equal(old.lo, new.lo):
            if np.array_equal(old.hi, new.hi) and _equal(old.spans, new.spans):
                return
    out.append(new)


def _equal(a: BoxSpans, b: BoxSpans) -> bool:
    if a.which is None or b.which is None:
        return a.which is b.which
    return a.spans == b.spans and np.array_equal(a.which, b.which)
