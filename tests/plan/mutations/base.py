"""What all kinds of mutations share: their registries, and how a change becomes a plan."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_mpk.plan.ir import Plan
from tests.plan.draft import Draft, Nested, Queues, Task, take_apart
from tests.plan.naive import Order


@dataclass(frozen=True)
class Mutation:
    """A changed plan.

    Attributes:
      kind: name of the change.
      plan: the plan.
      early, late: tasks for a replay to run as soon, and as late, as it can.
      certain: it breaks a rule of the IR whatever a replay shows.
    """

    kind: str
    plan: Plan
    early: frozenset[int] = frozenset()
    late: frozenset[int] = frozenset()
    certain: bool = False


class Skip(Exception):
    """The plan has nothing that a mutation could change."""


#: What a mutator returns: tasks to run early, tasks to run late, whether it is certainly wrong.
Outcome = tuple[list[Task], list[Task], bool]
Mutator = Callable[[Draft, random.Random], Outcome]
BREAKING: dict[str, Mutator] = {}
#: The same for harmless changes, which get the pairs of tasks whose order matters.
Harmless = Callable[[Draft, random.Random, list[tuple[int, int]]], None]
HARMLESS: dict[str, Harmless] = {}


def breaking(fn: Mutator) -> Mutator:
    BREAKING[fn.__name__.strip("_")] = fn
    return fn


def harmless(fn: Harmless) -> Harmless:
    HARMLESS[fn.__name__.strip("_")] = fn
    return fn


def mutate(plan: Plan, kind: str, rng: random.Random) -> Mutation:
    """One change of a kind in :data:`BREAKING`.

    Raises:
      Skip: the plan has no place for it.
    """
    draft = take_apart(plan)
    early, late, certain = BREAKING[kind](draft, rng)
    number = {id(task): i for i, task in enumerate(draft.tasks)}
    tasks = [frozenset(number[id(t)] for t in part if id(t) in number) for part in (early, late)]
    return Mutation(kind, draft.build(), tasks[0], tasks[1], certain)


def preserve(plan: Plan, pairs: list[tuple[int, int]], kind: str, rng: random.Random) -> Mutation:
    """One change of a kind in :data:`HARMLESS`; raises Skip like :func:`mutate`.

    Args:
      plan: the plan.
      pairs: its :func:`~tests.plan.naive.conflicting_pairs`.
      kind: name of the change.
      rng: chooses.
    """
    draft = take_apart(plan)
    before = {id(task): i for i, task in enumerate(draft.tasks)}
    HARMLESS[kind](draft, rng, pairs)
    new = draft.build()
    after = {before[id(task)]: i for i, task in enumerate(draft.tasks) if id(task) in before}
    order = Order(new)
    if order.cyclic or not all(order.before(after[a], after[b]) for a, b in pairs):
        raise Skip("the change would not be harmless")
    return Mutation(kind, new)


def pick(rng: random.Random, items: Any) -> Any:
    items = list(items)
    if not items:
        raise Skip
    return rng.choice(items)


def queue_of(draft: Draft, task: Task) -> list[Task]:
    return next(q for s in draft.segments() for q in s.queues if task in q)


def home_of(draft: Draft, task: Task) -> Queues:
    return next(s for s in draft.segments() for q in s.queues if task in q)


def signallers_of(draft: Draft, event: int) -> list[Task]:
    return [t for t in draft.tasks if event in t.signals]


def waiters_of(draft: Draft, event: int) -> list[Task]:
    return [t for t in draft.tasks if event in t.waits]


def touching(draft: Draft, value: int) -> list[Task]:
    return [t for t in draft.tasks if any(a[0] == value for a in t.accesses)]


def redeclare(draft: Draft) -> None:
    """Makes all accesses what the boxes now say, where that can be said."""
    from jax_mpk.plan import verify_coverage
    from jax_mpk.plan.verify_facts import build_facts

    plan = draft.build()
    facts = build_facts(plan)
    parts: list[Any] = []
    try:
        for number, routine in enumerate(plan.routines):
            parts += verify_coverage._routine_rows(facts, number, routine)
    except AssertionError:
        return
    rows = verify_coverage._concatenate(facts, parts)
    rank = plan.accesses.box.shape[2]
    values = facts.value_count
    for task in draft.tasks:
        task.accesses = []
    numbers = list(facts.spans)
    for t, name, kind, box, within in zip(rows.task, rows.name, rows.kind, rows.box, rows.within):
        value = int(name) if name < values else values - 1 - int(name)
        draft.tasks[t].accesses.append([value, int(kind), box[:, :rank].copy(), numbers[within]])


def nested(items: list[Any]) -> list[Nested]:
    out = []
    for item in items:
        if isinstance(item, Nested):
            out.append(item)
            for block in item.blocks:
                out += nested(block)
    return out


def tagged(d: Draft) -> list[int]:
    return [s for s, storage in enumerate(d.storages) if storage.tagged]


def holding(d: Draft, storage: int, *kinds: int) -> list[Task]:
    """Tasks that touch what a storage holds, in one of some ways."""
    values = {v for v, s in enumerate(d.value_storage) if s == storage}
    return [t for t in d.tasks if any(a[0] in values and a[1] in kinds for a in t.accesses)]


def lonely(task: Task, access: list[Any]) -> bool:
    """Whether an access is not empty and declared once."""
    same = [a for a in task.accesses if a[:2] == access[:2] and np.array_equal(a[2], access[2]) and a[3] == access[3]]
    return len(same) == 1 and bool(np.all(access[2][1] > access[2][0]))
