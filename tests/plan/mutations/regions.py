"""Boxes, members and declared regions: changes of what a task computes and says that it touches."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from jax_mpk.plan.ir import MAY, MUST, PARTIAL, READ
from tests.plan.draft import Draft
from tests.plan.mutations.base import Outcome, Skip, breaking, lonely, pick, redeclare


@breaking
def _box_off(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, d.tasks)
    member = rng.randrange(len(task.boxes))
    routine = d.routines[task.routine]
    op = d.plan.ops[routine.members[member].op]
    local = set(op.outputs) & set(routine.local_values)
    rank = len(d.plan.graph.values[op.outputs[0]].shape)
    if routine.members[member].stage == PARTIAL:
        rank += len(op.rspace)
    axis = pick(rng, range(rank))
    if np.any(task.boxes[member][1, :rank] <= task.boxes[member][0, :rank]):
        raise Skip
    side = rng.randrange(2)
    task.boxes[member][side, axis] += rng.choice([-1, 1])
    if rng.random() < 0.7:
        redeclare(d)
    return [], [], not local


@breaking
def _shift_box(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, d.tasks)
    routine = d.routines[task.routine]
    if routine.members[-1].stage == PARTIAL:
        raise Skip
    rank = len(d.plan.graph.values[d.plan.ops[routine.members[-1].op].outputs[0]].shape)
    task.boxes[-1][:, pick(rng, range(rank))] += rng.choice([-1, 1])
    if np.all(task.boxes[-1] >= 0):
        redeclare(d)
    return [], [], True


@breaking
def _access_off(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, [t for t in d.tasks if t.accesses])
    access = pick(rng, task.accesses)
    value = access[0]
    if value < 0 or not lonely(task, access):
        raise Skip
    axis = pick(rng, range(len(d.plan.graph.values[value].shape)))
    access[2][rng.randrange(2), axis] += rng.choice([-1, 1])
    return [], [], True


@breaking
def _drop_access(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, [t for t in d.tasks if t.accesses])
    access = pick(rng, [a for a in task.accesses if lonely(task, a)])
    task.accesses = [a for a in task.accesses if a is not access]
    return [], [], True


@breaking
def _wrong_kind(d: Draft, rng: random.Random) -> Outcome:
    task = pick(rng, [t for t in d.tasks if t.accesses])
    access = pick(rng, [a for a in task.accesses if lonely(task, a)])
    access[1] = pick(rng, {READ, MUST, MAY} - {access[1]})
    return [], [], True


@breaking
def _drop_slice(d: Draft, rng: random.Random) -> Outcome:
    """A slice of a split reduction goes missing."""
    tasks = [t for t in d.tasks if d.routines[t.routine].members[-1].stage == PARTIAL]
    task = pick(rng, tasks)
    way = rng.randrange(3)
    op = d.plan.ops[d.routines[task.routine].members[-1].op]
    axis = len(op.space)
    old = task.boxes[-1].copy()
    if way == 0:
        d.drop(task)
    elif way == 1:
        task.boxes[-1][rng.randrange(2), axis] += rng.choice([-1, 1])
        redeclare(d)
    else:
        twin = pick(rng, [t for t in tasks if t.routine == task.routine and t is not task])
        task.boxes[-1][:, axis] = twin.boxes[-1][:, axis]
        redeclare(d)
    return [], [], way == 0 or not np.array_equal(task.boxes[-1], old)


@breaking
def _wrong_split(d: Draft, rng: random.Random) -> Outcome:
    if not d.plan.splits:
        raise Skip
    splits = list(d.plan.splits)
    at = rng.randrange(len(splits))
    bounds = list(splits[at].bounds)
    bounds[rng.randrange(len(bounds))] += rng.choice([-1, 1])
    splits[at] = replace(splits[at], bounds=tuple(bounds))
    d.changes["splits"] = tuple(splits)
    return [], [], True


@breaking
def _swap_members(d: Draft, rng: random.Random) -> Outcome:
    number = pick(rng, [i for i, r in enumerate(d.routines) if len(r.members) > 1])
    routine = d.routines[number]
    at = rng.randrange(len(routine.members) - 1)
    members = list(routine.members)
    members[at], members[at + 1] = members[at + 1], members[at]
    d.routines[number] = replace(routine, members=tuple(members))
    for task in d.tasks:
        if task.routine == number:
            task.boxes[at], task.boxes[at + 1] = task.boxes[at + 1], task.boxes[at]
    return [], [], False


@breaking
def _drop_member(d: Draft, rng: random.Random) -> Outcome:
    number = pick(rng, [i for i, r in enumerate(d.routines) if len(r.members) > 1])
    routine = d.routines[number]
    at = rng.randrange(len(routine.members))
    gone = set(d.plan.ops[routine.members[at].op].outputs)
    keep = [k for k, v in enumerate(routine.local_values) if v not in gone]
    d.routines[number] = replace(
        routine,
        members=routine.members[:at] + routine.members[at + 1 :],
        local_values=tuple(routine.local_values[k] for k in keep),
        local_offsets=tuple(routine.local_offsets[k] for k in keep),
        local_extents=tuple(routine.local_extents[k] for k in keep),
    )
    for task in d.tasks:
        if task.routine == number:
            del task.boxes[at]
    return [], [], False
