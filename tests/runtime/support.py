"""Programs of real functions, run without XLA."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jax_mpk import megakernelize
from jax_mpk.codegen.encode import encode
from jax_mpk.plan.ir import Plan, Tasks
from jax_mpk.runtime.native import run_program


@dataclass
class Case:
    """A function compiled for some arguments."""

    plan: Plan
    arguments: list[np.ndarray]
    expected: list[np.ndarray]

    def run(self, plan: Plan | None = None, **options: Any) -> list[np.ndarray]:
        results = [np.zeros_like(e) for e in self.expected]
        # Arguments that results take over are copied into them, as XLA would.
        program = encode(plan or self.plan).words.tobytes()
        run_program(program, self.arguments, results, **options)
        return results

    def check(self, **options: Any) -> None:
        for actual, expected in zip(self.run(**options), self.expected, strict=True):
            np.testing.assert_array_equal(actual, expected)


def case(function: Callable[..., Any], *args: Any, workers: int = 3, tagged: bool = False) -> Case:
    target = f"cpu-{workers}" + ("+tagged" if tagged else "")
    lowered = megakernelize(function, target=target).lower(*args)
    expected = jax.tree.leaves(jax.jit(function)(*args))
    return of_plan(lowered.plan, jax.tree.leaves(args), expected)


def of_plan(plan: Plan, arguments: Sequence[Any], expected: Sequence[Any]) -> Case:
    return Case(plan, [np.array(a, order="C") for a in arguments], [np.array(e, order="C") for e in expected])


def without_wait(plan: Plan, task: int, event: int) -> Plan:
    """The plan with one edge less: ``task`` no longer waits for ``event``."""
    tasks = plan.tasks
    at = next(i for i in range(tasks.wait_start[task], tasks.wait_start[task + 1]) if tasks.wait_event[i] == event)
    start = tasks.wait_start.copy()
    start[task + 1 :] -= 1
    return replace(plan, tasks=_with(tasks, wait_start=start, wait_event=np.delete(tasks.wait_event, at)))


def without_signal(plan: Plan, task: int, event: int) -> Plan:
    """The plan in which ``task`` signals another event of its segment that it signals already, or none."""
    tasks = plan.tasks
    at = next(
        i for i in range(tasks.signal_start[task], tasks.signal_start[task + 1]) if tasks.signal_event[i] == event
    )
    start = tasks.signal_start.copy()
    start[task + 1 :] -= 1
    return replace(plan, tasks=_with(tasks, signal_start=start, signal_event=np.delete(tasks.signal_event, at)))


def _with(tasks: Tasks, **columns: np.ndarray) -> Tasks:
    return replace(tasks, **columns)
