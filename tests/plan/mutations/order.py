"""Events, queues, segments and control: changes of which tasks there are and when they run."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from jax_mpk.plan.ir import BranchNode
from tests.plan.draft import Draft, Nested, Queues, Task
from tests.plan.mutations.base import Outcome, breaking, home_of, nested, pick, queue_of, signallers_of, waiters_of

#: Kinds that change nothing but the order of tasks: the naive check of order knows all about them.
ORDER_ONLY = ("drop_wait", "drop_signal", "drop_event", "swap_neighbours", "reverse_queue", "move_task")


@breaking
def _drop_wait(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, [t for t in d.tasks if t.waits])
    event = task.waits.pop(rng.randrange(len(task.waits)))
    return [task], signallers_of(d, event), False


@breaking
def _drop_signal(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, [t for t in d.tasks if t.signals])
    event = task.signals.pop(rng.randrange(len(task.signals)))
    return waiters_of(d, event), [task], False


@breaking
def _drop_event(d: Draft, rng: random.Random) -> Outcome:
    event = pick(rng, {e for t in d.tasks for e in t.waits})
    waiters, signallers = waiters_of(d, event), signallers_of(d, event)
    for task in d.tasks:
        task.waits = [e for e in task.waits if e != event]
        task.signals = [e for e in task.signals if e != event]
    return waiters, signallers, False


@breaking
def _wrong_event(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, [t for t in d.tasks if t.waits])
    mine = {e for q in home_of(d, task).queues for t in q for e in t.signals}
    at = rng.randrange(len(task.waits))
    event, task.waits[at] = task.waits[at], pick(rng, mine - set(task.waits))
    return [task], signallers_of(d, event), False


@breaking
def _swap_neighbours(d: Draft, rng: random.Random) -> Outcome:
    queue = pick(rng, [q for s in d.segments() for q in s.queues if len(q) > 1])
    at = rng.randrange(len(queue) - 1)
    queue[at], queue[at + 1] = queue[at + 1], queue[at]
    return [queue[at]], [queue[at + 1]], False


@breaking
def _reverse_queue(d: Draft, rng: random.Random) -> Outcome:
    queue = pick(rng, [q for s in d.segments() for q in s.queues if len(q) > 1])
    queue.reverse()
    return [queue[0]], [queue[-1]], False


@breaking
def move_task(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, d.tasks)
    queues = home_of(d, task).queues
    worker = pick(rng, [w for w in range(len(queues)) if w != task.worker])
    queues[task.worker].remove(task)
    queues[worker].insert(rng.randint(0, len(queues[worker])), task)
    task.worker = worker
    return [task], [], False


@breaking
def _move_to_segment(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, d.tasks)
    home = home_of(d, task)
    other = pick(rng, [s for s in d.segments() if s is not home])
    home.queues[task.worker].remove(task)
    queue = other.queues[task.worker]
    queue.insert(rng.randint(0, len(queue)), task)
    return [task], [], False


@breaking
def _claim_other_worker(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, d.tasks)
    task.worker = pick(rng, set(range(d.plan.target.workers)) - {task.worker})
    return [], [], True


@breaking
def _merge_segments(d: Draft, rng: random.Random) -> Outcome:
    lists = [d.schedule, *(b for item in nested(d.schedule) for b in item.blocks)]
    places = [
        (items, k)
        for items in lists
        for k in range(len(items) - 1)
        if isinstance(items[k], Queues) and isinstance(items[k + 1], Queues)
    ]
    items, k = pick(rng, places)
    second = items.pop(k + 1)
    late = [t for q in items[k].queues for t in q]
    early = [t for q in second.queues for t in q]
    for queue, more in zip(items[k].queues, second.queues):
        queue += more
    return early, late, False


@breaking
def _swap_items(d: Draft, rng: random.Random) -> Outcome:
    lists = [d.schedule, *(b for item in nested(d.schedule) for b in item.blocks)]
    items = pick(rng, [items for items in lists if len(items) > 1])
    at = rng.randrange(len(items) - 1)
    items[at], items[at + 1] = items[at + 1], items[at]
    return [], [], False


@breaking
def _wrong_control(d: Draft, rng: random.Random) -> Outcome:
    item = pick(rng, nested(d.schedule))
    if isinstance(item.node, BranchNode):
        if rng.random() < 0.5 and len(item.blocks) > 1:
            item.blocks.reverse()
            item.node = replace(item.node, arms=item.node.arms[::-1])
        else:
            item.node = replace(item.node, index=item.node.index - 1)
    elif item.node.trips >= 0:
        item.node = replace(item.node, trips=item.node.trips + rng.choice([-1, 1]))
    else:
        item.node = replace(item.node, predicate=item.node.predicate - 1)
    # Arms without tasks may be exchanged without anybody noticing.
    return [], [], not (isinstance(item.node, BranchNode) and not any(_tasks(b) for b in item.blocks))


def _tasks(items: list[Any]) -> list[Task]:
    out: list[Task] = []
    for item in items:
        blocks = item.blocks if isinstance(item, Nested) else []
        out += [t for q in item.queues for t in q] if isinstance(item, Queues) else []
        for block in blocks:
            out += _tasks(block)
    return out


@breaking
def _drop_task(d: Draft, rng: random.Random) -> Outcome:
    d.drop(pick(rng, d.tasks))
    return [], [], False


@breaking
def _duplicate_task(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, d.tasks)
    queue = queue_of(d, task)
    if rng.random() < 0.5:
        queue.insert(rng.randint(0, len(queue)), task)
        return [], [], True
    twin = Task(
        task.routine,
        task.worker,
        [b.copy() for b in task.boxes],
        list(task.waits),
        list(task.signals),
        [[v, k, b.copy(), s] for v, k, b, s in task.accesses],
    )
    d.tasks.append(twin)
    queue.insert(queue.index(task) + 1, twin)
    return [], [], True
