"""Tagged storages, and events that tags seem to make needless."""

from __future__ import annotations

import random
from dataclasses import replace

from jax_mpk.plan.ir import MAY, MUST, READ, BranchNode
from tests.plan.draft import Draft, Task
from tests.plan.mutations.base import Outcome, Skip, breaking, holding, nested, pick, tagged, touching
from tests.plan.naive import Order, conflicting_pairs, may_be_tagged


@breaking
def _rely_on_tags(d: Draft, rng: random.Random) -> Outcome:
    """An event goes because a tagged path seems to imply it; one between writer and reader, if possible.

    Replays have late stores. They have no late loads, and no stores that some workers see before others do.
    """
    if not tagged(d):
        raise Skip
    pairs = conflicting_pairs(d.plan)
    events = sorted({e for t in d.tasks for e in t.waits})
    found: tuple[int, int, int] | None = None
    for event in rng.sample(events, len(events)):
        waits = [list(t.waits) for t in d.tasks]
        for task in d.tasks:
            task.waits = [e for e in task.waits if e != event]
        without = d.build()
        for task, old in zip(d.tasks, waits, strict=True):
            task.waits = old
        order, implied = Order(without), Order(without, tags=True)
        lost = [(a, b) for a, b in pairs if not order.before(a, b) and implied.before(a, b)]
        stored = [(a, b) for a, b in lost if _written(d.tasks[a]) & {v for v, *_ in d.tasks[b].accesses}]
        if lost:
            found = event, *rng.choice(stored or lost)
        if stored:
            break
    if found is None:
        raise Skip
    event, first, second = found
    d.events -= 1  # the last event takes the number
    for task in d.tasks:
        for events in (task.waits, task.signals):
            events[:] = [event if e == d.events else e for e in events if e != event]
    return [d.tasks[second]], [d.tasks[first]], False


def _written(task: Task) -> set[int]:
    return {value for value, kind, *_ in task.accesses if kind != READ}


@breaking
def _lose_tags(d: Draft, rng: random.Random) -> Outcome:
    """A tagged storage becomes a plain one, with no event in place of its tags."""
    at = pick(rng, tagged(d))
    d.storages[at] = replace(d.storages[at], tagged=False)
    return holding(d, at, READ), holding(d, at, MUST), False


@breaking
def _overlap_tags(d: Draft, rng: random.Random) -> Outcome:
    """Another storage takes bytes of a tagged one."""
    at = pick(rng, [s for s in tagged(d) if d.storages[s].nbytes])
    other = pick(rng, {s for s, x in enumerate(d.storages) if x.kind == "workspace" and x.nbytes} - {at})
    offset = d.storages[at].offset + rng.choice([0, d.storages[at].nbytes // 16 * 8])
    d.storages[other] = replace(d.storages[other], offset=offset)
    d.changes["workspace_bytes"] = max(d.plan.workspace_bytes, offset + d.storages[other].nbytes)
    return holding(d, other, MUST, MAY), holding(d, at, READ), True


@breaking
def _tag_anything(d: Draft, rng: random.Random) -> Outcome:
    at = pick(rng, [s for s, storage in enumerate(d.storages) if not storage.tagged])
    d.storages[at] = replace(d.storages[at], tagged=True)
    return [], [], not may_be_tagged(d.plan, at)


@breaking
def _tag_carried(d: Draft, rng: random.Random) -> Outcome:
    """Tags on what is updated in place, carried by a loop, or read between segments."""
    shared = [s for s in set(d.value_storage) if s >= 0 and d.value_storage.count(s) > 1]
    between = [n.node.index if isinstance(n.node, BranchNode) else n.node.predicate for n in nested(d.schedule)]
    at = pick(rng, {*shared, *(d.value_storage[v] for v in between if v >= 0)} - {-1})
    d.storages[at] = replace(d.storages[at], tagged=True)
    return [], [], True


@breaking
def _share_tags(d: Draft, rng: random.Random) -> Outcome:
    """A second value moves into a tagged storage."""
    at = pick(rng, tagged(d))
    values = [v for v, s in enumerate(d.value_storage) if s not in (-1, at) and touching(d, v)]
    fits = [v for v in values if d.storages[d.value_storage[v]].nbytes <= d.storages[at].nbytes]
    v = pick(rng, fits)
    d.value_storage[v] = at
    return touching(d, v), [], True
