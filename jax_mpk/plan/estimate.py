"""What a Plan moves and how long it should take on its target: bytes per task, and the tasks' predicted timeline.

Everything follows from the Plan's tables; nothing here asks how the planner came to them. What bytes and flops cost is
:mod:`jax_mpk.plan.costs`. The timeline has every task take the time of its bytes and flops, start when its worker is
free and its events and tags have arrived, and every hand-off between workers cost the same. Loads are not predicted to
run ahead of what a task waits for, so a device that prefetches is somewhat faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jax_mpk.errors import DeadlockError
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Cumulative, Nest, Op, Sort, Update
from jax_mpk.graph.scalar import Expr
from jax_mpk.plan import costs
from jax_mpk.plan.ir import FINISH, MAY, READ, WHOLE, LoopNode, Plan, Routine, Schedule, Segment
from jax_mpk.plan.tags import tags_as_events

#: Largest grid of cells on which overlapping boxes are counted exactly.
_MOST_CELLS = 1 << 20


@dataclass(frozen=True)
class Traffic:
    """Bytes behind ``Plan.accesses``.

    Attributes:
      nbytes: float64 per row: what the task moves. A load at an index only known at run time may reach a whole axis,
        but moves no more elements than it is evaluated for.
      argument: bool per row: the bytes are an argument's (or those of a result that shares its buffer).
      fresh: float64 per row: the share of the bytes that no task of the routine has read before, 1 unless most are read
        again and again. All but the first read of a byte may find it in the last-level cache.
    """

    nbytes: np.ndarray
    argument: np.ndarray
    fresh: np.ndarray


@dataclass(frozen=True)
class Timeline:
    """The predicted run of a schedule; a loop takes its known number of rounds, or one, a branch its slowest arm.

    Attributes:
      work_s: seconds of tasks on the critical path.
      handoff_s: seconds of hand-offs and barriers on it.
    """

    work_s: float = 0.0
    handoff_s: float = 0.0


def rounds(schedule: Schedule, times: int = 1) -> Iterator[tuple[Segment, int]]:
    """Every segment and how often one launch runs it: loops of unknown length once, every arm of a branch."""
    for item in schedule:
        if isinstance(item, Segment):
            yield item, times
        elif isinstance(item, LoopNode):
            trips = 1 if item.trips < 0 else item.trips
            yield from rounds(item.cond, times * trips)
            yield from rounds(item.body, times * trips)
        else:
            for arm in item.arms:
                yield from rounds(arm, times)


# -- bytes -----------------------------------------------------------------------------------------------------


def traffic(plan: Plan) -> Traffic:
    """Bytes of every access of a plan."""
    rows = plan.accesses
    routine = plan.tasks.table["routine"][rows.task]
    volume = costs.volume(rows.box[:, 0], rows.box[:, 1])
    size, home, argument = _value_facts(plan)
    elements = volume.copy()
    order = np.lexsort((rows.value, routine))
    for group in _runs(routine[order], rows.value[order]):
        at = order[group]
        value = int(rows.value[at[0]])
        for some in (at[rows.kind[at] == READ], at[rows.kind[at] == MAY]):
            if len(some) and value >= 0:
                limit = _evaluations(plan, plan.routines[routine[at[0]]], rows.task[some], value)
                elements[some] = np.minimum(elements[some], limit)
    nbytes = elements * size[rows.value]
    fresh = np.ones(len(nbytes))
    for group in _runs(routine[order], rows.value[order]):
        at = order[group]
        at = at[rows.kind[at] == READ]
        if len(at) > 1:
            fresh[at] = costs.fresh_share(nbytes[at].sum(), _union(rows.box[at]) * size[rows.value[at[0]]])
    return Traffic(nbytes, argument[home[rows.value]] & (home[rows.value] >= 0), fresh)


def unique_bytes(plan: Plan, moved: Traffic, rows: np.ndarray) -> float:
    """Bytes that reads touch, each counted once.

    Args:
      plan: the plan.
      moved: its traffic.
      rows: positions in ``plan.accesses`` of reads.
    """
    accesses = plan.accesses
    size, _, _ = _value_facts(plan)
    order = rows[np.argsort(accesses.value[rows], kind="stable")]
    total = 0.0
    for group in _runs(accesses.value[order]):
        at = order[group]
        value = int(accesses.value[at[0]])
        elements = _union(accesses.box[at])
        itemsize = size[value]
        if value >= 0 and np.any(moved.nbytes[at] < itemsize * costs.volume(accesses.box[at, 0], accesses.box[at, 1])):
            elements = min(elements, _distinct_evaluations(plan, np.unique(accesses.task[at]), value))
        total += elements * itemsize
    return total


def _value_facts(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Element size and storage per value, then whether each storage is an argument's.

    Accumulators come last, so that -1 - k finds them; a storage of -1 is none.
    """
    size = [dtypes.itemsize(v.dtype) for v in plan.graph.values]
    home = [int(s) for s in plan.value_storage]
    extra: list[tuple[int, int]] = []
    for split in plan.splits:
        op = plan.ops[split.op]
        extra += [(dtypes.itemsize(acc), storage) for acc, storage in zip(op.acc, split.storages, strict=True)]
    size += [s for s, _ in reversed(extra)]
    home += [h for _, h in reversed(extra)]
    argument = [s.kind == "input" or s.argument >= 0 for s in plan.storages]
    return np.array(size, np.float64), np.array(home, np.int64), np.array([*argument, False], bool)


def _evaluations(plan: Plan, routine: Routine, tasks: np.ndarray, value: int) -> np.ndarray:
    """How many elements of a value each task can load (or update) at most, from how often it does so."""
    total = np.zeros(len(tasks))
    for position, member in enumerate(routine.members):
        op = plan.ops[member.op]
        rows = plan.tasks.table["box"][tasks] + position
        lo, hi = plan.tasks.boxes[rows, 0], plan.tasks.boxes[rows, 1]
        total += _loads(op, member.stage, lo, hi, value)
    return total


def _distinct_evaluations(plan: Plan, tasks: np.ndarray, value: int) -> float:
    """The same for all tasks together, repeated computations of one element counted once."""
    boxes: dict[tuple[int, int], list[np.ndarray]] = {}
    table = plan.tasks.table
    for number in np.unique(table["routine"][tasks]):
        mine = tasks[table["routine"][tasks] == number]
        for position, member in enumerate(plan.routines[number].members):
            found = plan.tasks.boxes[table["box"][mine] + position]
            boxes.setdefault((member.op, member.stage), []).append(found)
    total = 0.0
    for (number, stage), parts in boxes.items():
        box = np.concatenate(parts)
        once = _loads(plan.ops[number], stage, box[:, 0], box[:, 1], value)
        volume = costs.volume(box[:, 0], box[:, 1]).sum()
        total += float(once.sum()) * (_union(box) / volume if volume else 0.0)
    return total


def _loads(op: Op, stage: int, lo: np.ndarray, hi: np.ndarray, value: int) -> np.ndarray:
    """Evaluations of an operator's loads of a value over boxes of its output; infinite where that says nothing."""
    runs = costs.evaluations(op, stage, lo, hi)
    if isinstance(op, Nest):
        sizes = np.maximum(hi - lo, 0).astype(np.float64)
        total = np.zeros(len(lo))
        if op.epilogue is not None:
            total += _distinct_loads(op.epilogue, op.operands, value, sizes[:, : len(op.space)])
        if stage == WHOLE:
            sizes = np.concatenate(
                [sizes[:, : len(op.space)], np.tile(np.array(op.rspace, float), (len(lo), 1))], axis=1
            )
        return total if stage == FINISH else total + _distinct_loads(op.body, op.operands, value, sizes)
    if isinstance(op, Cumulative):
        return runs * sum(_count(expr, op.operands, value) for expr in (op.body, op.epilogue))
    if isinstance(op, Update):
        each = sum(_count(expr, op.operands, value) for expr in (op.index, op.value)) + (op.output == value)
        return runs * each + costs.volume(lo, hi) * (op.base == value)
    return runs if isinstance(op, Sort) and value in op.operands else np.zeros(len(lo))


def _distinct_loads(expr: Expr, operands: tuple[int, ...], value: int, sizes: np.ndarray) -> np.ndarray:
    """float64 [boxes]: elements that loads of a value touch, from the extents of the coordinates they depend on."""
    total = np.zeros(len(sizes))
    for node in (expr.nodes[i] for i in expr.loads()):
        if operands[node.attr] == value:
            indices = node.args[1:] if node.op == "load_if" else node.args
            used = sorted(frozenset().union(*(expr.index_coords[i] for i in indices)))
            total += sizes[:, used].prod(axis=1)
    return total


def _count(expr: Expr, operands: tuple[int, ...], value: int) -> int:
    return sum(operands[expr.nodes[i].attr] == value for i in expr.loads())


# -- time ------------------------------------------------------------------------------------------------------


def task_seconds(plan: Plan, moved: Traffic) -> np.ndarray:
    """float64 per task: predicted seconds, hand-offs not included."""
    size, home, _ = _value_facts(plan)
    rows = plan.accesses
    sizes = np.array([s.nbytes for s in plan.storages] or [0])[home[rows.value]]
    tagged = np.array([s.tagged for s in plan.storages] or [False])[home[rows.value]] & (home[rows.value] >= 0)
    memory = costs.memory_bytes(plan.target, moved.nbytes, moved.fresh, moved.argument, sizes)
    count = len(plan.tasks.table)

    def sums(nbytes: np.ndarray) -> np.ndarray:
        return np.bincount(rows.task, weights=nbytes, minlength=count)

    handed = (home[rows.value] >= 0) & ~moved.argument
    waited = np.where(handed, costs.staged_bytes(plan.target, moved.nbytes, size[rows.value], tagged), 0)
    cache, memory = np.where(waited > 0, 0, moved.nbytes), np.where(waited > 0, 0, memory)
    return costs.task_seconds(plan.target, sums(cache), sums(memory), _flops(plan), sums(waited))


def _flops(plan: Plan) -> np.ndarray:
    table = plan.tasks.table
    flops = np.zeros(len(table))
    order = np.argsort(table["routine"], kind="stable")
    for group in _runs(table["routine"][order]):
        tasks = order[group]
        for position, member in enumerate(plan.routines[table["routine"][tasks[0]]].members):
            boxes = plan.tasks.boxes[table["box"][tasks] + position]
            flops[tasks] += costs.flops(plan.ops[member.op], boxes[:, 0], boxes[:, 1], member.stage)
    return flops


def timeline(plan: Plan, seconds: np.ndarray) -> Timeline:
    """Runs the schedule of a plan in predicted time.

    Args:
      plan: the plan.
      seconds: per task.
    """
    return _Clock(plan, seconds).schedule(plan.schedule)


@dataclass
class _Best:
    """The latest of some tasks, and the latest on another worker than that one's.

    Attributes:
      first, second: when it finishes, and the hand-offs on the path to it; -1: there is none.
      worker: of ``first``.
    """

    first: tuple[float, int] = (-1.0, 0)
    worker: int = -1
    second: tuple[float, int] = (-1.0, 0)

    def add(self, end: tuple[float, int], worker: int) -> None:
        if end > self.first:
            if worker != self.worker:
                self.second = self.first
            self.first, self.worker = end, worker
        elif worker != self.worker and end > self.second:
            self.second = end

    def of_others(self, worker: int) -> tuple[float, int]:
        return self.second if worker == self.worker else self.first


class _Clock:
    def __init__(self, plan: Plan, seconds: np.ndarray):
        self.plan = plan
        self.seconds = seconds.tolist()
        tasks, events = tags_as_events(plan)
        self.waits = _rows(tasks.wait_start, tasks.wait_event)
        self.signals = _rows(tasks.signal_start, tasks.signal_event)
        self.threshold = np.bincount(tasks.signal_event, minlength=events).tolist()

    def schedule(self, schedule: Schedule) -> Timeline:
        parts: list[tuple[Timeline, int]] = []
        for item in schedule:
            if isinstance(item, Segment):
                parts.append((self.segment(item), 1))
            elif isinstance(item, LoopNode):
                trips = 1 if item.trips < 0 else item.trips
                parts += [(self.schedule(item.cond), trips), (self.schedule(item.body), trips)]
            else:
                arms = [self.schedule(arm) for arm in item.arms]
                parts.append((max(arms, key=lambda t: t.work_s + t.handoff_s, default=Timeline()), 1))
        work_s = sum(part.work_s * times for part, times in parts)
        # Between two parts, and between two rounds, lies a barrier.
        barriers = max(0, sum(times for part, times in parts if part.work_s) - 1)
        handoff_s = sum(part.handoff_s * times for part, times in parts) + barriers * self.plan.target.handoff
        return Timeline(work_s, handoff_s)

    def segment(self, segment: Segment) -> Timeline:
        """Steps every queue until its next task waits for an event, then resumes it when the event is complete."""
        handoff = self.plan.target.handoff
        queues = [queue.tolist() for queue in segment.queues]
        place = [0] * len(queues)
        end: list[tuple[float, int]] = [(0.0, 0)] * len(queues)  # finish of the last task, hand-offs on its path
        missing: dict[int, int] = {}
        times: dict[int, _Best] = {}
        blocked: dict[int, list[int]] = {}
        ready = list(range(len(queues)))
        while ready:
            w = ready.pop()
            while place[w] < len(queues[w]):
                task = queues[w][place[w]]
                unmet = next((e for e in self.waits[task] if missing.get(e, self.threshold[e])), None)
                if unmet is not None:
                    blocked.setdefault(unmet, []).append(w)
                    break
                start = end[w]
                for e in self.waits[task]:
                    if e in times:
                        finish, handoffs = times[e].of_others(w)
                        start = max(start, (finish + handoff, handoffs + 1)) if finish >= 0 else start
                end[w] = (start[0] + self.seconds[task], start[1])
                place[w] += 1
                for e in self.signals[task]:
                    if e not in times:
                        times[e] = _Best()
                    times[e].add(end[w], w)
                    missing[e] = missing.get(e, self.threshold[e]) - 1
                    if not missing[e]:
                        ready += blocked.pop(e, [])
        if any(at < len(queue) for at, queue in zip(place, queues)):
            raise DeadlockError("a segment of the plan deadlocks")
        finish, handoffs = max(end, default=(0.0, 0))
        return Timeline(finish - handoffs * handoff, handoffs * handoff)


# -- boxes -----------------------------------------------------------------------------------------------------


def _rows(start: np.ndarray, items: np.ndarray) -> list[list[int]]:
    flat, edges = items.tolist(), start.tolist()
    return [flat[a:b] for a, b in pairwise(edges)]


def _runs(*columns: np.ndarray) -> Iterator[slice]:
    """Stretches of equal rows of sorted columns."""
    count = len(columns[0])
    if not count:
        return
    change = np.zeros(count - 1, bool)
    for column in columns:
        change |= column[1:] != column[:-1]
    edges = [0, *(np.flatnonzero(change) + 1).tolist(), count]
    yield from (slice(a, b) for a, b in pairwise(edges))


def _union(boxes: np.ndarray) -> float:
    """Number of elements in at least one of some boxes, int64 [boxes, 2, rank]."""
    boxes = boxes[np.all(boxes[:, 1] > boxes[:, 0], axis=1)]
    if not len(boxes):
        return 0.0
    varies = np.any(boxes != boxes[:1], axis=(0, 1))
    common = float(np.prod((boxes[0, 1] - boxes[0, 0])[~varies], dtype=np.float64))
    if not varies.any():
        return common
    boxes = np.unique(boxes[:, :, varies], axis=0)
    lo, hi = boxes[:, 0], boxes[:, 1]
    edges = [np.unique(np.concatenate([lo[:, a], hi[:, a]])) for a in range(lo.shape[1])]
    if math.prod(len(e) - 1 for e in edges) > _MOST_CELLS:
        whole = np.prod((hi.max(axis=0) - lo.min(axis=0)).astype(np.float64))
        return common * min(float(whole), float(costs.volume(lo, hi).sum()))
    cells = np.ones([1] * len(edges))
    for axis, e in enumerate(edges):
        cells = cells * np.diff(e).reshape([-1 if a == axis else 1 for a in range(len(edges))])
    covered = np.zeros(cells.shape, bool)
    low = np.stack([np.searchsorted(e, lo[:, a]) for a, e in enumerate(edges)], axis=1).tolist()
    high = np.stack([np.searchsorted(e, hi[:, a]) for a, e in enumerate(edges)], axis=1).tolist()
    for a, b in zip(low, high):
        covered[tuple(map(slice, a, b))] = True
    return common * float(cells[covered].sum())
