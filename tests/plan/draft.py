"""A Plan taken apart into plain Python objects that tests can change, and put together again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jax_mpk.plan.ir import (
    TASK,
    Accesses,
    BranchNode,
    LoopNode,
    Plan,
    Routine,
    Schedule,
    Segment,
    Storage,
    Tasks,
)


@dataclass(eq=False)
class Task:
    """A task; events are numbers that nothing renumbers."""

    routine: int
    worker: int
    boxes: list[np.ndarray]
    waits: list[int]
    signals: list[int]
    accesses: list[list[Any]]  # [value, kind, box, spans]


@dataclass(eq=False)
class Queues:
    """A segment."""

    queues: list[list[Task]]


@dataclass(eq=False)
class Nested:
    """A loop (cond and body) or a branch (arms)."""

    node: LoopNode | BranchNode
    blocks: list[list[Any]]


@dataclass
class Draft:
    """A plan in pieces.

    Attributes:
      plan: for all that is not repeated here.
      tasks: all tasks, in the order of their numbers.
      schedule: Queues and Nested.
      storages, value_storage, routines, splits, events: as in Plan.
      changes: other fields of Plan to replace.
    """

    plan: Plan
    tasks: list[Task]
    schedule: list[Queues | Nested]
    storages: list[Storage]
    value_storage: list[int]
    routines: list[Routine]
    events: int
    changes: dict[str, Any] = field(default_factory=dict)

    def segments(self) -> list[Queues]:
        return list(_segments(self.schedule))

    def event(self) -> int:
        self.events += 1
        return self.events - 1

    def drop(self, task: Task) -> None:
        """Removes a task from its queue and from the table."""
        self.tasks.remove(task)
        for segment in self.segments():
            for queue in segment.queues:
                if task in queue:
                    queue.remove(task)

    def build(self) -> Plan:
        """The plan with all changes."""
        number = {id(task): i for i, task in enumerate(self.tasks)}
        table, boxes, rows = [], [], []
        rank, arank = self.plan.tasks.boxes.shape[2], self.plan.accesses.box.shape[2]
        for i, task in enumerate(self.tasks):
            table.append((task.routine, task.worker, len(boxes)))
            boxes += task.boxes
            rows += [(i, *access) for access in task.accesses]
        spans = {some: k for k, some in enumerate(dict.fromkeys(r[4] for r in rows if r[4]))}

        def schedule(items: list[Queues | Nested]) -> Schedule:
            out: list[Segment | LoopNode | BranchNode] = []
            for item in items:
                if isinstance(item, Queues):
                    out.append(Segment(tuple(np.array([number[id(t)] for t in q], np.int32) for q in item.queues)))
                elif isinstance(item.node, LoopNode):
                    cond, body = map(schedule, item.blocks)
                    out.append(replace(item.node, cond=cond, body=body))
                else:
                    out.append(replace(item.node, arms=tuple(map(schedule, item.blocks))))
            return tuple(out)

        fields: dict[str, Any] = {
            "storages": tuple(self.storages),
            "value_storage": np.array(self.value_storage, np.int32),
            "routines": tuple(self.routines),
            "events": self.events,
            "schedule": schedule(self.schedule),
            "tasks": Tasks(
                np.array(table, TASK),
                np.array(boxes, np.int64).reshape(len(boxes), 2, rank),
                *_csr([t.waits for t in self.tasks]),
                *_csr([t.signals for t in self.tasks]),
            ),
            "accesses": Accesses(
                np.array([r[0] for r in rows], np.int32),
                np.array([r[1] for r in rows], np.int32),
                np.array([r[2] for r in rows], np.uint8),
                np.array([r[3] for r in rows], np.int64).reshape(len(rows), 2, arank),
                np.array([spans.get(r[4], -1) for r in rows], np.int32),
                tuple(spans),
            ),
            **self.changes,
        }
        return replace(self.plan, **fields)


def take_apart(plan: Plan) -> Draft:
    """A Draft that builds an equal plan."""
    tasks, accesses = plan.tasks, plan.accesses
    found = []
    cuts = np.searchsorted(accesses.task, np.arange(len(tasks.table) + 1))
    for i, row in enumerate(tasks.table):
        count = len(plan.routines[int(row["routine"])].members)
        found.append(
            Task(
                int(row["routine"]),
                int(row["worker"]),
                [tasks.boxes[int(row["box"]) + k].copy() for k in range(count)],
                tasks.wait_event[tasks.wait_start[i] : tasks.wait_start[i + 1]].tolist(),
                tasks.signal_event[tasks.signal_start[i] : tasks.signal_start[i + 1]].tolist(),
                [
                    [
                        int(accesses.value[k]),
                        int(accesses.kind[k]),
                        accesses.box[k].copy(),
                        accesses.spans[accesses.within[k]] if accesses.within[k] >= 0 else (),
                    ]
                    for k in range(cuts[i], cuts[i + 1])
                ],
            )
        )

    def schedule(items: Schedule) -> list[Queues | Nested]:
        out: list[Queues | Nested] = []
        for item in items:
            if isinstance(item, Segment):
                out.append(Queues([[found[t] for t in queue.tolist()] for queue in item.queues]))
            elif isinstance(item, LoopNode):
                out.append(Nested(item, [schedule(item.cond), schedule(item.body)]))
            else:
                out.append(Nested(item, [schedule(arm) for arm in item.arms]))
        return out

    return Draft(
        plan,
        found,
        schedule(plan.schedule),
        list(plan.storages),
        plan.value_storage.tolist(),
        list(plan.routines),
        plan.events,
    )


def _segments(items: list[Queues | Nested]) -> Iterator[Queues]:
    for item in items:
        if isinstance(item, Queues):
            yield item
        else:
            for block in item.blocks:
                yield from _segments(block)


def _csr(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    start = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    return start, np.array([e for x in lists for e in x], np.int32)
