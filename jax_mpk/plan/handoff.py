"""Events: the least waiting that orders every conflicting pair of tasks.

Tasks are added routine by routine in an order that respects the graph. Two tasks conflict where they touch
overlapping regions of one storage and one of them writes. A vector clock per task says what is already known to be
finished when it starts (program order of its worker, and what the events it waits for imply), so a wait that adds
nothing is never made; consumers that need the same set of producers share one event.

What is read from a tagged storage needs no event, and tells nothing: a tag orders its own word only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from jax_mpk.plan.access import Access
from jax_mpk.plan.ir import READ


class Handoffs:
    """The events of one segment.

    Args:
      workers: number of queues.
      storage: per value, the storage it lives in.
      shapes: per value, its shape.
      tagged: storages handed over by tagged words.
      first_task, first_event: ids the segment's tasks and events start at.
    """

    def __init__(
        self,
        workers: int,
        storage: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
        tagged: Collection[int],
        first_task: int,
        first_event: int,
    ):
        self.workers = workers
        self.storage = storage
        self.shapes = shapes
        self.tagged = tagged
        self.first_task = first_task
        self.worker_of: list[np.ndarray] = []  # per routine
        self.position: list[np.ndarray] = []  # per routine: place in the worker's queue, from 1
        self.start_task: list[int] = []
        self.clock = np.zeros((workers, workers), np.int32)  # known finished, per worker, after its last task
        self.known: list[np.ndarray] = []  # per routine: finished positions that all its tasks may rely on
        self.task_clock: list[np.ndarray] = []  # per routine: [tasks, workers] known when each task has finished
        self.history: dict[int, list[tuple[int, Access]]] = {}  # storage → (routine, access) so far
        self.queues: list[list[int]] = [[] for _ in range(workers)]
        self.waits: list[list[int]] = []  # per task of the segment
        self.signals: list[list[int]] = []
        self.events = first_event
        self._closed = 0
        self._last = np.zeros(0, np.int64)
        self._event_of: dict[bytes, int] = {}
        self._event_clock: dict[int, np.ndarray] = {}

    def close(self) -> None:
        """What is added from now on waits, if it must wait for anything before, for all of it at once.

        A signal holds its worker up, so that a few late tasks are not worth many early signals: each worker's last task
        so far speaks for all of them.
        """
        self._closed = len(self.waits)
        self._last = np.array([queue[-1] - self.first_task for queue in self.queues if queue], np.int64)

    def add(self, workers: np.ndarray, touched: list[Access]) -> int:
        """Adds one routine's tasks; returns its number within the segment."""
        routine = len(self.start_task)
        tasks = len(workers)
        first = len(self.waits)
        self.start_task.append(first)
        members, needs = self._needs(tasks, touched)
        self.waits += [[] for _ in range(tasks)]
        self.signals += [[] for _ in range(tasks)]
        positions = np.zeros(tasks, np.int32)
        clocks = np.zeros((tasks, self.workers), np.int32)
        known = np.full(self.workers, np.iinfo(np.int32).max, np.int32)
        rows = {row.tobytes(): row for row in needs}
        member_workers, member_positions, member_clocks = self._gather(members)
        for t in range(tasks):
            w = int(workers[t])
            clock = self.clock[w].copy()
            row = needs[t]
            if row.any() and np.any(clock[member_workers[row]] < member_positions[row]):
                event = self._event(members, rows[row.tobytes()], member_workers, member_positions, member_clocks)
                self.waits[first + t].append(event)
                np.maximum(clock, self._event_clock[event], out=clock)
            np.minimum(known, clock, out=known)
            self.queues[w].append(self.first_task + first + t)
            positions[t] = len(self.queues[w])
            clock[w] = positions[t]
            self.clock[w] = clock
            clocks[t] = clock
        self.worker_of.append(workers)
        self.position.append(positions)
        self.task_clock.append(clocks)
        self.known.append(known)
        for access in touched:
            self.history.setdefault(self.storage[access.value], []).append((routine, access))
        return routine

    def _needs(self, tasks: int, touched: list[Access]) -> tuple[np.ndarray, np.ndarray]:
        """Earlier tasks of the segment (ids within it) and, per new task, which of them it must follow."""
        found: dict[int, np.ndarray] = {}
        for access in touched:
            for routine, earlier in self.history.get(self.storage[access.value], ()):
                if access.kind == READ and (earlier.kind == READ or self.storage[access.value] in self.tagged):
                    continue
                pairs = self._overlap(access, earlier)
                if pairs.any():
                    known = found.get(routine)
                    found[routine] = pairs if known is None else known | pairs
        if not found:
            return np.zeros(0, np.int64), np.zeros((tasks, 0), bool)
        order = sorted(found)
        members = np.concatenate([self.start_task[r] + np.arange(found[r].shape[1]) for r in order])
        needs = np.concatenate([found[r] for r in order], axis=1)
        early = members < self._closed
        if needs[:, early].any():
            waits = np.any(needs[:, early], axis=1, keepdims=True).repeat(len(self._last), axis=1)
            members = np.concatenate([self._last, members[~early]])
            needs = np.concatenate([waits, needs[:, ~early]], axis=1)
        used = np.flatnonzero(needs.any(axis=0))
        used = used[np.argsort(members[used], kind="stable")]
        return members[used], np.ascontiguousarray(needs[:, used])

    def _overlap(self, a: Access, b: Access) -> np.ndarray:
        """bool [tasks of a, tasks of b]: whether the regions may share a byte of one storage."""
        if a.value != b.value and self.shapes[a.value] != self.shapes[b.value]:
            return np.all(a.hi > a.lo, axis=1)[:, None] & np.all(b.hi > b.lo, axis=1)[None]
        return a.meets(b)

    def _gather(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not len(members):
            return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, self.workers), np.int32)
        workers, positions, clocks = [], [], []
        starts = np.array(self.start_task[:-1])
        owner = np.searchsorted(starts, members, side="right") - 1
        for r in np.unique(owner):
            local = members[owner == r] - starts[r]
            workers.append(self.worker_of[r][local])
            positions.append(self.position[r][local])
            clocks.append(self.task_clock[r][local])
        return np.concatenate(workers), np.concatenate(positions), np.concatenate(clocks)

    def _event(
        self, members: np.ndarray, row: np.ndarray, workers: np.ndarray, positions: np.ndarray, clocks: np.ndarray
    ) -> int:
        """The event that all tasks of ``members[row]`` signal, made on first use."""
        chosen = members[row]
        # Within one worker the last of several members implies the others.
        last = np.zeros(self.workers, np.int32)
        np.maximum.at(last, workers[row], positions[row])
        chosen = chosen[positions[row] == last[workers[row]]]
        key = chosen.tobytes()
        event = self._event_of.get(key)
        if event is None:
            event = self._event_of[key] = self.events
            self.events += 1
            self._event_clock[event] = clocks[row].max(axis=0)
            for task in chosen:
                self.signals[task].append(event)
        return event
