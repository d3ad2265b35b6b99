"""Spans: changes of what run-time scalars are said to leave of a region."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jax_mpk.graph.bounds import Bound
from jax_mpk.graph.ir import Loop
from tests.plan.draft import Draft, Task
from tests.plan.mutations.base import Outcome, Skip, breaking, lonely, pick


def _limited(d: Draft, rng: random.Random) -> tuple[Task, list[Any]]:
    """A task and one of its accesses with spans, declared once."""
    found = [(t, a) for t in d.tasks for a in t.accesses if a[3] and lonely(t, a)]
    return pick(rng, found)


def _change_spans(d: Draft, rng: random.Random, change: Callable[[Bound], Bound]) -> Outcome:
    """Changes one limit of an access. No access says what its operators do not touch, so that is certainly wrong."""
    task, access = _limited(d, rng)
    spans = list(access[3])
    at = rng.randrange(len(spans))
    side = pick(rng, [side for side in ("first", "end") if getattr(spans[at], side) is not None])
    old = getattr(spans[at], side)
    new = change(old)
    if new == old:
        raise Skip
    spans[at] = replace(spans[at], **{side: new})
    access[3] = tuple(spans)
    # As if what is claimed were so: the writer of what the reader says it does not touch need not wait, nor the reader.
    others = [t for t in _touching_storage(d, access[0]) if t is not task]
    for other in (task, *others):
        if rng.random() < 0.5:
            other.waits = []
    return [task], others, True


def _touching_storage(d: Draft, value: int) -> list[Task]:
    values = {v for v, s in enumerate(d.value_storage) if s == d.value_storage[value]}
    return [t for t in d.tasks if any(a[0] in values for a in t.accesses)]


@breaking
def _bound_off(d: Draft, rng: random.Random) -> Outcome:
    return _change_spans(d, rng, lambda bound: bound.shifted(rng.choice([-1, 1])))


@breaking
def _wrong_symbol(d: Draft, rng: random.Random) -> Outcome:
    """Another scalar in place of one that a limit depends on."""
    values = d.plan.graph.values
    scalars = [v.id for v in values if v.shape == () and v.dtype == "s32"]
    return _change_spans(d, rng, lambda bound: renamed(bound, {v: rng.choice(scalars) for v in bound.values}))


@breaking
def _other_round(d: Draft, rng: random.Random) -> Outcome:
    """What a loop carries, as it is in another round."""
    carried: dict[int, int] = {}
    for op in d.plan.ops:
        if isinstance(op, Loop):
            carried.update(zip(op.params, op.body.results if rng.random() < 0.7 else op.inits))
    if not carried:
        raise Skip
    return _change_spans(d, rng, lambda bound: renamed(bound, carried))


@breaking
def _drop_limit(d: Draft, rng: random.Random) -> Outcome:
    """Spans of an access go, or are those of another one."""
    task, access = _limited(d, rng)
    others = {a[3] for t in d.tasks for a in t.accesses} - {access[3]}
    access[3] = rng.choice(sorted(others, key=str))
    return [task], [], True


def renamed(bound: Bound, names: dict[int, int]) -> Bound:
    """With other values in place of some."""
    out = Bound((), bound.const)
    for s, k in bound.terms:
        args = tuple(renamed(arg, names) for arg in s.args)
        attr = names.get(s.attr, s.attr) if s.op == "load" else s.attr
        out = out.plus(Bound(((replace(s, args=args, attr=attr), 1),)), k)
    return out
