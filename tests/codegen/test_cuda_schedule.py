"""The schedule of generated kernels: what both roles of a worker follow, against the plan's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.codegen.cuda import generate
from jax_mpk.codegen.cuda.tables import segments
from jax_mpk.plan.ir import LoopNode, Plan, Schedule, Segment
from tests.codegen.test_cuda_compiles import plan_of

X = np.ones((20, 20), np.float32)


def text_of(plan: Plan) -> list[str]:
    """Statements of the generated schedule; indentation, addresses, and the way back behind each segment left out."""
    source = generate(plan).source
    body = re.search(r"bool Shape::advance\([^)]*\) \{\n(.*?)^\}", source, re.DOTALL | re.MULTILINE)
    assert body is not None
    lines = [line.strip() for line in body[1].splitlines()]
    count = len(segments(plan.schedule))
    back = ["switch (at.segment) {", *(f"case {n}: goto behind_{n};" for n in range(count)), "}"]
    assert lines[: len(back)] == back and lines[-1] == "return false;"
    return [re.sub(r"(decide<\w+>)\(\d+, \d+\)", r"\1", line) for line in lines[len(back) : -1]]


def segment(n: int) -> list[str]:
    return [f"at.segment = {n};", "return true;", f"behind_{n}:"]


def check(fn: Callable[..., Any], *args: Any) -> tuple[Plan, list[str]]:
    plan, _ = plan_of(fn, list(args), workers=2)
    return plan, text_of(plan)


def test_loop_of_known_trips() -> None:
    _, lines = check(lambda x: lax.fori_loop(0, 5, lambda i, x: x @ x + i, x) + 1, X)
    assert lines == [
        *segment(0),
        "role.barrier();",
        "for (at.rounds[0] = 0; at.rounds[0] < 5ll && role.running(); ++at.rounds[0]) {",
        *segment(1),
        "role.barrier();",
        "}",
        *segment(2),
    ]


def test_nested_loops_of_known_trips() -> None:
    def outer(i: Any, x: Any) -> Any:
        return lax.fori_loop(0, 3, lambda j, x: x @ x + j, x) + i

    plan, lines = check(lambda x: lax.fori_loop(0, 5, outer, x), X)
    assert lines == _expected(plan.schedule, iter(range(1000)))
    assert "kDepth = 2," in generate(plan).source and any("at.rounds[1] < 3ll" in line for line in lines)


def test_while_loop() -> None:
    _, lines = check(lambda x, n: lax.fori_loop(0, n, lambda i, x: x @ x, x), X, np.int32(3))
    assert lines == [
        *segment(0),
        "role.barrier();",
        "while (role.running()) {",
        *segment(1),
        "role.barrier();",
        "if (!role.template decide<b1>) break;",
        *segment(2),
        "role.barrier();",
        "}",
    ]


def test_branch_with_an_arm_that_does_nothing() -> None:
    plan, lines = check(lambda x, p: lax.cond(p, lambda x: x @ x, lambda x: x, x), X, np.bool_(True))
    assert lines == _expected(plan.schedule, iter(range(1000)))
    assert "switch (clamped(role.template decide<s32>, 2)) {" in lines


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nested(seed: int) -> None:
    def inner(j: Any, y: Any, x: Any) -> Any:
        arms = [lambda y: y @ x, lambda y: lax.fori_loop(0, j, lambda _, z: z @ z, y), jnp.tanh]
        return lax.switch(j + seed, arms, y)

    def outer(i: Any, x: Any) -> Any:
        return lax.fori_loop(0, i, lambda j, y: inner(j, y, x), x)

    plan, lines = check(lambda x, n: lax.fori_loop(0, n, outer, x), X, np.int32(3))
    assert lines == _expected(plan.schedule, iter(range(1000)))


def _expected(schedule: Schedule, numbers: Any, depth: int = 0) -> list[str]:
    """The schedule of a plan, where every loop but none of its neighbours ends with a barrier."""
    barrier, out = "role.barrier();", []
    for k, item in enumerate(schedule):
        if k and not isinstance(schedule[k - 1], LoopNode):
            out.append(barrier)
        if isinstance(item, Segment):
            out += segment(next(numbers))
        elif isinstance(item, LoopNode) and item.predicate >= 0:
            out += ["while (role.running()) {", *_expected(item.cond, numbers, depth), barrier]
            out += ["if (!role.template decide<b1>) break;", *_expected(item.body, numbers, depth), barrier, "}"]
        elif isinstance(item, LoopNode):
            count = f"at.rounds[{depth}]"
            out.append(f"for ({count} = 0; {count} < {item.trips}ll && role.running(); ++{count}) {{")
            out += [*_expected(item.body, numbers, depth + 1), barrier, "}"]
        else:
            out.append(f"switch (clamped(role.template decide<s32>, {len(item.arms)})) {{")
            for n, arm in enumerate(item.arms):
                out += [f"case {n}: {{", *_expected(arm, numbers, depth), "break;", "}"]
            out.append("}")
    return out
