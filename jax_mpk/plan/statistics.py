"""Numbers about a Plan for reports: dependent phases, and how operators are spread over the workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_mpk.errors import DeadlockError
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Branch, Loop
from jax_mpk.graph.regions import op_touches
from jax_mpk.plan.ir import FINISH, PARTIAL, LoopNode, Plan, Schedule, Segment, Tasks
from jax_mpk.plan.tags import tags_as_events


@dataclass(frozen=True)
class Phases:
    """Longest chains of tasks that depend on each other across workers.

    Attributes:
      segments: per segment in schedule order.
      total: of one pass through the schedule: loops once, branches by their longest arm.
    """

    segments: tuple[int, ...]
    total: int


@dataclass(frozen=True)
class OpStats:
    """How one operator was spread.

    Attributes:
      op: position in ``Plan.ops``.
      tasks: number of tasks that compute it (recomputation included).
      workers: number of workers that run any of them.
      streamed: bytes per worker of operands that no task ever writes: (least, mean, most) over all workers.
    """

    op: int
    tasks: int
    workers: int
    streamed: tuple[int, float, int]


def phase_count(plan: Plan) -> Phases:
    """Counts the dependent phases: a hand-off between two workers costs one, program order costs nothing."""
    tasks, _ = tags_as_events(plan)
    segments: list[int] = []

    def visit(schedule: Schedule) -> int:
        total = 0
        for item in schedule:
            if isinstance(item, Segment):
                segments.append(_segment_phases(tasks, item))
                total += segments[-1]
            elif isinstance(item, LoopNode):
                total += visit(item.cond) + visit(item.body)
            else:
                total += max([visit(arm) for arm in item.arms], default=0)
        return total

    total = visit(plan.schedule)
    return Phases(tuple(segments), total)


def op_stats(plan: Plan) -> list[OpStats]:
    """How each operator was spread over the workers, in the order of ``Plan.ops``; nothing for loops and branches."""
    graph, tasks = plan.graph, plan.tasks
    constant = {v for v in graph.inputs if plan.value_storage[v] < 0} | {
        v for v in range(len(graph.values)) if (s := plan.value_storage[v]) >= 0 and plan.storages[s].kind == "input"
    }
    counts = np.zeros(len(plan.ops), np.int64)
    users = np.zeros((len(plan.ops), plan.target.workers), bool)
    streamed = np.zeros((len(plan.ops), plan.target.workers), np.int64)
    order = np.argsort(tasks.table["routine"], kind="stable")
    cuts = np.searchsorted(tasks.table["routine"][order], np.arange(len(plan.routines) + 1))
    for number, routine in enumerate(plan.routines):
        mine = tasks.table[order[cuts[number] : cuts[number + 1]]]
        for at, member in enumerate(routine.members):
            op = plan.ops[member.op]
            rank = len(graph.values[op.outputs[0]].shape) + (len(op.rspace) if member.stage == PARTIAL else 0)
            boxes = tasks.boxes[mine["box"].astype(np.int64) + at]
            lo, hi = boxes[:, 0, :rank], boxes[:, 1, :rank]
            counts[member.op] += int(np.all(hi > lo, axis=1).sum())
            users[member.op, mine["worker"][np.all(hi > lo, axis=1)]] = True
            seen: set[tuple[int, bytes, bytes]] = set()
            for touch in op_touches(graph, op, lo, hi, stage_finish=member.stage == FINISH):
                key = touch.value, touch.lo.tobytes(), touch.hi.tobytes()
                if touch.value not in constant or key in seen:
                    continue
                seen.add(key)
                size = np.maximum(touch.hi - touch.lo, 0).prod(axis=1)
                size *= dtypes.itemsize(graph.values[touch.value].dtype)
                np.add.at(streamed[member.op], mine["worker"], size)
    return [
        OpStats(i, int(counts[i]), int(users[i].sum()), (int(row.min()), float(row.mean()), int(row.max())))
        for i, row in enumerate(streamed)
        if not isinstance(plan.ops[i], Loop | Branch)
    ]


def _segment_phases(tasks: Tasks, segment: Segment) -> int:
    waits, wait_start = tasks.wait_event.tolist(), tasks.wait_start.tolist()
    signals, signal_start = tasks.signal_event.tolist(), tasks.signal_start.tolist()
    queues = [queue.tolist() for queue in segment.queues]
    left: dict[int, int] = {}
    for queue in queues:
        for task in queue:
            for event in signals[signal_start[task] : signal_start[task + 1]]:
                left[event] = left.get(event, 0) + 1
    # Per event the latest phase of a signaller, its worker, and the latest of any other worker.
    latest: dict[int, tuple[int, int, int]] = {}
    blocked: dict[int, list[int]] = {}
    position, phase = [0] * len(queues), [1] * len(queues)
    ready = list(range(len(queues)))
    while ready:
        worker = ready.pop()
        while position[worker] < len(queues[worker]):
            task = queues[worker][position[worker]]
            mine = waits[wait_start[task] : wait_start[task + 1]]
            pending = next((event for event in mine if left.get(event, 0)), None)
            if pending is not None:
                blocked.setdefault(pending, []).append(worker)
                break
            now = phase[worker]
            for event in mine:
                first, by, second = latest[event]
                now = max(now, first + 1 if by != worker else max(first, second + 1))
            phase[worker] = now
            for event in signals[signal_start[task] : signal_start[task + 1]]:
                first, by, second = latest.get(event, (0, -1, 0))
                if by == worker:
                    first = max(first, now)
                elif now > first:
                    first, by, second = now, worker, first
                else:
                    second = max(second, now)
                latest[event] = first, by, second
                left[event] -= 1
                if not left[event]:
                    ready.extend(blocked.pop(event, ()))
            position[worker] += 1
    if any(at < len(queue) for at, queue in zip(position, queues)):
        raise DeadlockError("a segment of the plan deadlocks")
    return max((p for p, queue in zip(phase, queues) if queue), default=0)
