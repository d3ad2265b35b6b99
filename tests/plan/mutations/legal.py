"""Changes that break nothing."""

from __future__ import annotations

import random
from dataclasses import replace

from jax_mpk.plan.ir import MUST, PARTIAL, READ
from tests.plan.draft import Draft, Queues, Task
from tests.plan.mutations.base import (
    Skip,
    harmless,
    holding,
    nested,
    pick,
    queue_of,
    redeclare,
    signallers_of,
    tagged,
    waiters_of,
)
from tests.plan.mutations.order import move_task
from tests.plan.naive import Order, may_be_tagged, tagged_edges


@harmless
def _event_beside_tags(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    first, second = pick(rng, sorted(tagged_edges(d.plan)))
    event = d.event()
    d.tasks[first].signals.append(event)
    d.tasks[second].waits.append(event)


@harmless
def _events_for_tags(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """Counters take the place of the tags of a storage."""
    at = pick(rng, tagged(d))
    number = {id(t): i for i, t in enumerate(d.tasks)}
    readers, writers = ({number[id(t)] for t in holding(d, at, kind)} for kind in (READ, MUST))
    edges = [(a, b) for a, b in tagged_edges(d.plan) if a in writers and b in readers]
    d.storages[at] = replace(d.storages[at], tagged=False)
    for second in sorted({b for _, b in edges}):
        event = d.event()
        d.tasks[second].waits.append(event)
        for first in sorted(a for a, b in edges if b == second):
            d.tasks[first].signals.append(event)


@harmless
def _tags_beside_events(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """A value with its events is tagged as well."""
    plain = [s for s, storage in enumerate(d.storages) if not storage.tagged and may_be_tagged(d.plan, s)]
    at = pick(rng, plain)
    d.storages[at] = replace(d.storages[at], tagged=True)


@harmless
def _redundant_event(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    order = Order(d.plan)
    count = len(d.tasks)
    known = [(a, b) for b in range(count) for a in range(count) if order.ancestors[b] >> a & 1]
    event = d.event()
    first, second = pick(rng, known)
    d.tasks[first].signals.append(event)
    d.tasks[second].waits.append(event)


@harmless
def _extra_event(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """An event between tasks that nothing orders so far."""
    order = Order(d.plan)
    count = len(d.tasks)
    a = rng.randrange(count)
    free = [
        b
        for b in range(count)
        if b != a and order.segment[a] == order.segment[b] and not order.before(a, b) and not order.before(b, a)
    ]
    event = d.event()
    d.tasks[a].signals.append(event)
    d.tasks[pick(rng, free)].waits.append(event)


@harmless
def _needless_wait(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """Waits go that nothing needs, as long as there are any."""
    changed = False
    for task in rng.sample(d.tasks, len(d.tasks)):
        for event in list(task.waits):
            task.waits.remove(event)
            order = Order(d.build())
            if order.cyclic or not all(order.before(a, b) for a, b in pairs):
                task.waits.append(event)
            else:
                changed = True
    if not changed:
        raise Skip


@harmless
def _unused_event(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    event = d.event()
    if rng.random() < 0.5:
        pick(rng, d.tasks).signals.append(event)


@harmless
def _wait_twice(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    task = pick(rng, [t for t in d.tasks if t.waits])
    task.waits.append(rng.choice(task.waits))


@harmless
def _split_event(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """Two events for one, each signalled by some of the tasks."""
    event = pick(rng, {e for t in d.tasks for e in t.signals})
    signallers, waiters = signallers_of(d, event), waiters_of(d, event)
    if len(signallers) < 2:
        raise Skip
    other = d.event()
    for task in rng.sample(signallers, len(signallers) // 2):
        task.signals[task.signals.index(event)] = other
    for task in waiters:
        task.waits.append(other)


@harmless
def _renumber_events(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    if d.events < 2:
        raise Skip
    new = rng.sample(range(d.events), d.events)
    for task in d.tasks:
        task.waits = [new[e] for e in task.waits]
        task.signals = [new[e] for e in task.signals]


@harmless
def _renumber_tasks(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    rng.shuffle(d.tasks)


@harmless
def _swap_independent(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    ordered = set(pairs)
    number = {id(t): i for i, t in enumerate(d.tasks)}
    places = [
        (q, k)
        for s in d.segments()
        for q in s.queues
        for k in range(len(q) - 1)
        if (number[id(q[k])], number[id(q[k + 1])]) not in ordered and not set(q[k].signals) & set(q[k + 1].waits)
    ]
    queue, k = pick(rng, places)
    queue[k], queue[k + 1] = queue[k + 1], queue[k]


@harmless
def _other_order(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """Queues in the order of a random schedule that keeps what matters in order."""
    needs: dict[int, set[int]] = {i: set() for i in range(len(d.tasks))}
    for a, b in [*pairs, *tagged_edges(d.plan)]:
        needs[b].add(a)
    number = {id(t): i for i, t in enumerate(d.tasks)}
    for i, task in enumerate(d.tasks):
        for e in task.waits:
            needs[i].update(number[id(t)] for t in signallers_of(d, e))
    changed = False
    for segment in d.segments():
        left = {number[id(t)] for q in segment.queues for t in q}
        old = [list(q) for q in segment.queues]
        for q in segment.queues:
            q.clear()
        while left:
            t = rng.choice(sorted(t for t in left if not needs[t] & left))
            left.remove(t)
            segment.queues[d.tasks[t].worker].append(d.tasks[t])
        changed |= old != segment.queues
    if not changed:
        raise Skip


@harmless
def _move_independent(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    move_task(d, rng)


@harmless
def _permute_workers(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    workers = d.plan.target.workers
    if workers < 2:
        raise Skip
    new = rng.sample(range(workers), workers)
    for segment in d.segments():
        queues = list(segment.queues)
        for old, queue in enumerate(queues):
            segment.queues[new[old]] = queue
    for task in d.tasks:
        task.worker = new[task.worker]


@harmless
def _more_workers(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    more = rng.randint(1, 3)
    d.changes["target"] = replace(d.plan.target, workers=d.plan.target.workers + more)
    for segment in d.segments():
        segment.queues += [[] for _ in range(more)]


@harmless
def _larger_buffer(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """A workspace storage grows; what lies behind it moves up."""
    at = pick(rng, [i for i, s in enumerate(d.storages) if s.kind == "workspace"])
    end = d.storages[at].offset + d.storages[at].nbytes
    grow = 16 * rng.randint(1, 8)
    spaces = [s for s in d.storages if s.kind == "workspace"]
    # Only storages wholly behind may move, or sharing bytes would change.
    if any(s.offset < end < s.offset + s.nbytes for s in spaces):
        raise Skip
    for i, s in enumerate(d.storages):
        if i == at:
            d.storages[i] = replace(s, nbytes=s.nbytes + grow)
        elif s.kind == "workspace" and s.offset >= end:
            d.storages[i] = replace(s, offset=s.offset + grow)
    d.changes["workspace_bytes"] = d.plan.workspace_bytes + grow


@harmless
def _larger_memory(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    name = rng.choice(["workspace_bytes", "scratch_bytes"])
    d.changes[name] = getattr(d.plan, name) + rng.randint(1, 64)


@harmless
def _cut_segment(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """A barrier in the middle of a segment, between operators."""
    lists = [d.schedule, *(b for item in nested(d.schedule) for b in item.blocks)]
    places = [(items, k) for items in lists for k, item in enumerate(items) if isinstance(item, Queues)]
    items, k = pick(rng, places)
    segment = items[k]
    routines = sorted({t.routine for q in segment.queues for t in q})
    if len(routines) < 2:
        raise Skip
    first = set(routines[: rng.randint(1, len(routines) - 1)])
    halves = [
        Queues([[t for t in q if (t.routine in first) == early] for q in segment.queues]) for early in (True, False)
    ]
    if any(len({t.routine in first for t in holding(d, s, READ, MUST)}) > 1 for s in tagged(d)):
        raise Skip
    events = [{e for q in half.queues for t in q for e in t.signals} for half in halves]
    waits = [{e for q in half.queues for t in q for e in t.waits} for half in halves]
    if events[0] & events[1] or waits[0] & events[1]:
        raise Skip
    for queue in halves[1].queues:
        for task in queue:
            task.waits = [e for e in task.waits if e in events[1]]
    items[k : k + 1] = halves


@harmless
def _declare_again(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """Accesses in another order, one twice, an empty one."""
    task = pick(rng, [t for t in d.tasks if t.accesses])
    access = rng.choice(task.accesses)
    task.accesses.append([access[0], access[1], access[2].copy(), access[3]])
    empty = access[2].copy()
    empty[1, 0] = empty[0, 0]
    task.accesses.append([access[0], READ, empty, ()])
    rng.shuffle(task.accesses)


@harmless
def _split_task(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """One task becomes two neighbours, each half of its box."""
    whole = [t for t in d.tasks if len(t.boxes) == 1 and d.routines[t.routine].members[0].stage != PARTIAL]
    task = pick(rng, whole)
    op = d.plan.ops[d.routines[task.routine].members[0].op]
    rank = len(d.plan.graph.values[op.outputs[0]].shape)
    axes = [a for a in range(rank) if task.boxes[0][1, a] - task.boxes[0][0, a] > 1 and a != getattr(op, "axis", -1)]
    axis = pick(rng, axes)
    low, high = task.boxes[0][:, axis]
    cut = rng.randint(int(low) + 1, int(high) - 1)
    twin = Task(task.routine, task.worker, [task.boxes[0].copy()], list(task.waits), list(task.signals), [])
    task.boxes[0][1, axis] = cut
    twin.boxes[0][0, axis] = cut
    d.tasks.append(twin)
    queue = queue_of(d, task)
    queue.insert(queue.index(task) + 1, twin)
    redeclare(d)
