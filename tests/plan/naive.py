"""What conflicts with what, element by element: slow, obvious, and independent of the verifier."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.bounds import Bound, Spans, evaluate
from jax_mpk.graph.ir import Branch, Loop
from jax_mpk.plan.ir import MAY, MUST, READ, LoopNode, Plan, Schedule, Segment


def tagged_edges(plan: Plan) -> set[tuple[int, int]]:
    """Pairs (a, b) of tasks where b, of another routine, reads an element of a tagged storage that a writes."""
    accesses, routine = plan.accesses, plan.tasks.table["routine"]
    cells: dict[int, list[tuple[int, bool, set[tuple[int, ...]]]]] = {}
    for t, value, kind, box in zip(accesses.task, accesses.value, accesses.kind, accesses.box):
        if value >= 0 and plan.storages[plan.value_storage[value]].tagged:
            rank = len(plan.graph.values[value].shape)
            found = set(itertools.product(*(range(int(a), int(b)) for a, b in zip(*box[:, :rank]))))
            cells.setdefault(int(value), []).append((int(t), bool(kind != READ), found))
    out: set[tuple[int, int]] = set()
    for touches in cells.values():
        storing = {routine[t] for t, writes, _ in touches if writes}
        for (a, writes, mine), (b, writes_too, theirs) in itertools.permutations(touches, 2):
            if writes and not writes_too and routine[b] not in storing and mine & theirs:
                out.add((a, b))
    return out


def may_be_tagged(plan: Plan, storage: int) -> bool:
    """Whether a storage keeps the rules of tagged ones."""
    home, accesses = plan.storages[storage], plan.accesses
    values = np.flatnonzero(plan.value_storage == storage).tolist()
    if home.kind != "workspace" or len(values) != 1 or any(storage in split.storages for split in plan.splits):
        return False
    (v,) = values
    control = {op.index for op in plan.ops if isinstance(op, Branch)}
    control |= {op.cond.results[0] for op in plan.ops if isinstance(op, Loop) and op.cond is not None}
    shared = home.nbytes > 0 and any(
        other.kind == "workspace"
        and k != storage
        and max(home.offset, other.offset) < min(home.offset + home.nbytes, other.offset + other.nbytes)
        for k, other in enumerate(plan.storages)
    )
    if v in control or shared or dtypes.itemsize(plan.graph.values[v].dtype) > 4:
        return False
    mine = accesses.value == v
    mine &= np.all(accesses.box[:, 1] > accesses.box[:, 0], axis=1)
    homes = {
        k
        for k, segment in enumerate(segments(plan.schedule))
        for t in np.unique(accesses.task[mine]).tolist()
        if any(t in queue for queue in segment.queues)
    }
    kinds = set(accesses.kind[mine].tolist())
    return len(homes) <= 1 and MAY not in kinds and (MUST in kinds or READ not in kinds)


class Order:
    """Happens-before of the tasks of a plan, as sets of ancestors.

    Args:
      plan: the plan.
      tags: whether a reader of tagged elements comes after whatever their writer does. It does not; what relies on it
        is a plan that races.

    Attributes:
      segment: per task, the number of its segment in schedule order.
      ancestors: per task, a bit set of the tasks of its segment that happen before it.
      cyclic: whether some segment cannot finish.
    """

    def __init__(self, plan: Plan, tags: bool = False):
        tasks = plan.tasks
        tagged: dict[int, set[int]] = {}
        for a, b in tagged_edges(plan):
            tagged.setdefault(b, set()).add(a)
        count = len(tasks.table)
        self.segment = [-1] * count
        self.ancestors = [0] * count
        self.cyclic = False
        for number, segment in enumerate(segments(plan.schedule)):
            queues = [queue.tolist() for queue in segment.queues]
            mine = list(itertools.chain.from_iterable(queues))
            needs: dict[int, set[int]] = {t: set() for t in mine}
            signallers: dict[int, list[int]] = {}
            for t in mine:
                self.segment[t] = number
                for e in tasks.signal_event[tasks.signal_start[t] : tasks.signal_start[t + 1]].tolist():
                    signallers.setdefault(e, []).append(t)
            for queue in queues:
                for a, b in itertools.pairwise(queue):
                    needs[b].add(a)
            for t in mine:
                for e in tasks.wait_event[tasks.wait_start[t] : tasks.wait_start[t + 1]].tolist():
                    needs[t].update(signallers.get(e, ()))
            arrives = {t: tagged.get(t, set()).intersection(mine) for t in mine}
            done: set[int] = set()
            while len(done) < len(mine):
                ready = [t for t in mine if t not in done and needs[t] | arrives[t] <= done]
                if not ready:
                    self.cyclic = True
                    break
                for t in ready:
                    done.add(t)
                    for a in needs[t] | arrives[t] if tags else needs[t]:
                        self.ancestors[t] |= self.ancestors[a] | 1 << a

    def before(self, a: int, b: int) -> bool:
        if self.segment[a] != self.segment[b]:
            return self.segment[a] < self.segment[b]
        return bool(self.ancestors[b] >> a & 1)


def segments(schedule: Schedule) -> Iterator[Segment]:
    for item in schedule:
        if isinstance(item, Segment):
            yield item
        elif isinstance(item, LoopNode):
            yield from segments(item.cond)
            yield from segments(item.body)
        else:
            for arm in item.arms:
                yield from segments(arm)


def conflicting_pairs(plan: Plan) -> list[tuple[int, int]]:
    """Pairs (a, b) of tasks of one segment that touch the same byte, at least one writing, a before b in the plan.

    Values of different shape that share bytes are taken to touch everything between their first and last byte. What is
    read of a tagged storage waits for its tags and needs no order. A read and a write do not touch the same byte if
    their spans never meet, whatever the run-time scalars are; they are tried one after the other.
    """
    start, end = [], plan.workspace_bytes
    for storage in plan.storages:
        if storage.kind == "workspace":
            start.append(storage.offset)
        else:
            start.append(end)
            end += storage.nbytes
    accumulators = [
        (storage, (len(split.bounds) - 1, *plan.ops[split.op].space), acc)
        for split in plan.splits
        for storage, acc in zip(split.storages, plan.ops[split.op].acc)
    ]
    masks: dict[tuple[object, bytes], tuple[int, int]] = {}

    def touch(value: int, box: np.ndarray) -> tuple[tuple[object, ...], int, int]:
        """Layout, exact bytes and spanned bytes."""
        if value >= 0:
            it = plan.graph.values[value]
            storage, shape, dtype = int(plan.value_storage[value]), it.shape, it.dtype
        else:
            storage, shape, dtype = accumulators[-1 - value]
        item = dtypes.itemsize(dtype)
        layout = start[storage], shape, item
        key = layout, box.tobytes()
        if key not in masks:
            mask = np.zeros(shape, bool)
            mask[tuple(slice(int(a), int(b)) for a, b in zip(*box[:, : len(shape)]))] = True
            flat = np.repeat(mask.reshape(prod(shape)), item)
            exact = int.from_bytes(np.packbits(flat, bitorder="little").tobytes(), "little") << start[storage]
            low = exact & -exact
            span = (1 << exact.bit_length()) - low if exact else 0
            masks[key] = exact, span
        return layout, *masks[key]

    @functools.cache
    def never(a: tuple[int, bytes, int], b: tuple[int, bytes, int]) -> bool:
        """Whether regions (value, box, spans) of one layout have no element in common for any numbers tried."""
        boxes = [np.frombuffer(box, np.int64).reshape(2, -1) for _, box, _ in (a, b)]
        spans = [accesses.spans[k] for *_, k in (a, b)]
        shape = plan.graph.values[a[0]].shape
        return all(
            any(not set(x) & set(y) for x, y in zip(*(_elements(box, s, shape, n) for box, s in zip(boxes, spans))))
            for n in _numbers(spans, max(shape))
        )

    order = Order(plan)
    found: list[list[tuple[bool, tuple[object, ...], int, int, tuple[int, bytes, int]]]] = [
        [] for _ in plan.tasks.table
    ]
    accesses = plan.accesses
    rows = zip(accesses.task, accesses.value, accesses.kind, accesses.box, accesses.within.tolist())
    for t, value, kind, box, within in rows:
        if kind != READ or value < 0 or not plan.storages[plan.value_storage[value]].tagged:
            region = int(value), box.tobytes(), within
            found[t].append((bool(kind != READ), *touch(int(value), box), region))

    def meet(x: tuple, y: tuple) -> bool:
        if not (x[0] or y[0]) or not (x[2] & y[2] if x[1] == y[1] else x[3] & y[3]):
            return False
        limited = x[1] == y[1] and x[0] != y[0] and x[4][2] >= 0 and y[4][2] >= 0
        return not (limited and never(x[4], y[4]))

    out = []
    for segment in segments(plan.schedule):
        mine = [t for queue in segment.queues for t in queue.tolist()]
        for a, b in itertools.combinations(mine, 2):
            if any(meet(x, y) for x, y in itertools.product(found[a], found[b])):
                out.append((a, b) if order.before(a, b) else (b, a))
    return out


#: An element of a value, by id and index.
_Element = tuple[int, tuple[int, ...]]


def _elements(box: np.ndarray, spans: Spans, shape: tuple[int, ...], numbers: dict[_Element, int]) -> list[list[int]]:
    """The positions of a region along each axis."""

    def inside(axis: int, x: int) -> bool:
        for span in spans:
            if span.axis == axis:
                low = span.first is None or x >= evaluate(span.first, lambda v, at: numbers[v, at])
                high = span.end is None or x < evaluate(span.end, lambda v, at: numbers[v, at])
                if (low and high) == span.outside:
                    return False
        return True

    return [[x for x in range(*box[:, axis].tolist()) if inside(axis, x)] for axis in range(len(shape))]


def _numbers(spans: Sequence[Spans], extent: int) -> Iterator[dict[_Element, int]]:
    """Numbers for what spans depend on: around an axis of this extent, and far away."""
    found: dict[_Element, None] = {}

    def visit(bound: Bound) -> None:
        for s, _ in bound.terms:
            if s.op == "load":
                found[s.attr, tuple(arg.const for arg in s.args)] = None
            for arg in s.args:
                visit(arg)

    for span in itertools.chain(*spans):
        for limit in (span.first, span.end):
            if limit is not None:
                visit(limit)
    tried = [-(2**31), *range(-extent - 3, 2 * extent + 3), 2**31 - 1]
    for choice in itertools.product(tried, repeat=len(found)):
        yield dict(zip(found, choice))
