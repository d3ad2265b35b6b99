"""Judges a plan by replaying it with interleavings chosen to go wrong."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from jax_mpk.plan.ir import Plan
from jax_mpk.plan.simulate import Choice, Choose, Simulator
from tests.plan.graphs import Case
from tests.plan.mutations import Mutation
from tests.plan.naive import segments

#: More than any of the functions needs, so that loops which never end are found soon.
MAX_STEPS = 3000


def harm(case: Case, mutation: Mutation, seeds: int = 2) -> str | None:
    """What some interleaving does wrong, or None where none of those tried does.

    Args:
      case: the function and its results.
      mutation: the plan, and which tasks to hurry and to hold back.
      seeds: random interleavings, after the adversarial ones.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for number, choose in enumerate(_schedules(mutation, seeds)):
            found = replay(case, mutation.plan, choose, poison=number % 2 or None, sample=number)
            if found is not None:
                return found
    return None


def replay(
    case: Case, plan: Plan, choose: Choose | None = None, poison: int | None = None, sample: int = 0
) -> str | None:
    """What is wrong with one replay of a plan."""
    inputs, expected = case.samples[sample % len(case.samples)]
    try:
        simulator = Simulator(plan, inputs, choose=choose, poison=poison, late=True, max_steps=MAX_STEPS)
        results = simulator.run()
    except Exception as error:  # a plan that is not one may fail in any way
        return f"{type(error).__name__}: {error}"
    for number, (got, want) in enumerate(zip(results, expected, strict=True)):
        if not np.array_equal(got, want, equal_nan=got.dtype.kind == "f"):
            return f"result {number} is wrong"
    return None if simulator.inputs_intact() else "an argument's buffer has changed"


def _schedules(mutation: Mutation, seeds: int) -> Iterator[Choose]:
    ancestors = _ancestors(mutation.plan, mutation.early)
    if mutation.early or mutation.late:
        yield _steer(mutation.early, ancestors, mutation.late)
        yield _steer(mutation.late, _ancestors(mutation.plan, mutation.late), mutation.early)
    # Workers from the last to the first, with slow readers of predicates; then every late store as late as can be.
    yield lambda choices: min(choices, key=lambda c: (c[1] < 0, -c[0]))
    yield lambda choices: min(choices, key=lambda c: (c[1] < -1, c[0]))
    for seed in range(seeds):
        yield random.Random(seed).choice


def _steer(early: frozenset[int], ancestors: set[int], late: frozenset[int]) -> Choose:
    """Prefers ``early``, then what they wait for, then anything; ``late`` only when nothing else is left.

    Where an early task reads tagged elements of a late one, that one runs, but its other stores stay late.
    """

    def rank(choice: Choice) -> int:
        task = choice[1]
        if task == -1 or task in early:
            return 0
        if task < -1:
            return 4 if -2 - task in late else 1
        return 3 if task in late else 1 if task in ancestors else 2

    def choose(choices: Sequence[Choice]) -> Choice:
        return min(choices, key=lambda c: (rank(c), c))

    return choose


def _ancestors(plan: Plan, tasks: frozenset[int]) -> set[int]:
    """Tasks that must run before some of the given ones can."""
    table = plan.tasks
    before: dict[int, list[int]] = {}
    for segment in segments(plan.schedule):
        for queue in segment.queues:
            for a, b in zip(queue[:-1].tolist(), queue[1:].tolist()):
                before.setdefault(b, []).append(a)
    signallers: dict[int, list[int]] = {}
    for t in range(len(table.table)):
        for e in table.signal_event[table.signal_start[t] : table.signal_start[t + 1]].tolist():
            signallers.setdefault(e, []).append(t)
    found: set[int] = set()
    todo = list(tasks)
    while todo:
        t = todo.pop()
        waits = table.wait_event[table.wait_start[t] : table.wait_start[t + 1]].tolist()
        for a in (*before.get(t, ()), *(s for e in waits for s in signallers.get(e, ()))):
            if a not in found:
                found.add(a)
                todo.append(a)
    return found
