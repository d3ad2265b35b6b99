"""One wrong number anywhere in a plan."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np

from jax_mpk.plan.ir import TASK, Plan
from tests.plan.draft import take_apart


def corrupt(plan: Plan, rng: random.Random) -> tuple[Plan, str]:
    """Changes one number somewhere in a plan; returns the plan and where."""
    names = (
        "table boxes wait_start wait_event signal_start signal_event task value kind box within value_storage "
        "queue".split()
    )
    name = rng.choice([*names, "storage", "routine", "local", "split", "total"])

    def other(x: int) -> int:
        return x + rng.choice([-1, 1]) if rng.random() < 0.7 else rng.randint(-2, 12)

    def changed(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        if array.dtype == TASK:
            field = rng.choice(TASK.names or ())
            array[field][:] = changed(array[field])
        elif array.size:
            at = rng.randrange(array.size)
            value = other(int(array.flat[at]))
            array.flat[at] = max(value, 0) if array.dtype.kind == "u" else value
        return array

    def within(items: tuple[Any, ...]) -> tuple[int, Any]:
        at = rng.randrange(len(items))
        return at, items[at]

    tasks, accesses = plan.tasks, plan.accesses
    if name in ("table", "boxes", "wait_start", "wait_event", "signal_start", "signal_event"):
        return replace(plan, tasks=replace(tasks, **{name: changed(getattr(tasks, name))})), name
    if name in ("task", "value", "kind", "box", "within"):
        return replace(plan, accesses=replace(accesses, **{name: changed(getattr(accesses, name))})), name
    if name == "value_storage":
        return replace(plan, value_storage=changed(plan.value_storage)), name
    if name == "queue":
        draft = take_apart(plan)
        queues = [q for s in draft.segments() for q in s.queues if q]
        if queues:
            queue = rng.choice(queues)
            queue[rng.randrange(len(queue))] = rng.choice(draft.tasks)
        return draft.build(), name
    if name == "storage" and plan.storages:
        at, storage = within(plan.storages)
        field = rng.choice(["index", "argument", "offset", "nbytes", "tagged"])
        old = getattr(storage, field)
        storage = replace(storage, **{field: not old if field == "tagged" else other(old)})
        return replace(plan, storages=(*plan.storages[:at], storage, *plan.storages[at + 1 :])), f"storage.{field}"
    if name in ("routine", "local") and plan.routines:
        at, routine = within(plan.routines)
        if name == "local" and routine.local_values:
            field = rng.choice(["local_values", "local_offsets"])
            k, old = within(getattr(routine, field))
            new = (*getattr(routine, field)[:k], other(old), *getattr(routine, field)[k + 1 :])
            routine = replace(routine, **{field: new})
        else:
            k, member = within(routine.members)
            field = rng.choice(["op", "stage"])
            member = replace(member, **{field: other(getattr(member, field))})
            routine = replace(routine, members=(*routine.members[:k], member, *routine.members[k + 1 :]))
        return replace(plan, routines=(*plan.routines[:at], routine, *plan.routines[at + 1 :])), f"routine.{field}"
    if name == "split" and plan.splits:
        at, split = within(plan.splits)
        field = rng.choice(["bounds", "storages"])
        k, old = within(getattr(split, field))
        split = replace(split, **{field: (*getattr(split, field)[:k], other(old), *getattr(split, field)[k + 1 :])})
        return replace(plan, splits=(*plan.splits[:at], split, *plan.splits[at + 1 :])), f"split.{field}"
    field = rng.choice(["workspace_bytes", "events", "scratch_bytes"])
    return replace(plan, **{field: other(getattr(plan, field))}), field
