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
from jax_mpk.plan.ir import LoopNode, Plan, Schedule, Segment
from tests.codegen.test_cuda_compiles import plan_of

X = np.ones((20, 20), np.float32)


def text_of(plan: Plan) -> list[str]:
    """Statements of the generated schedule, indentation and addresses left out."""
    source = generate(plan).source
    body = re.search(r"void Shape::schedule\(Role& role\) \{\n(.*?)^\}", source, re.DOTALL | re.MULTILINE)
    assert body is not None
    lines = [line.strip() for line in body[1].splitlines()]
    return [re.sub(r"(decide<\w+>)\(\d+, \d+\)", r"\1", line) for line in lines]


def check(fn: Callable[..., Any], *args: Any) -> tuple[Plan, list[str]]:
    plan, _ = plan_of(fn, list(args), workers=2)
    return plan, text_of(plan)


def test_loop_of_known_trips() -> None:
    _, lines = check(lambda x: lax.fori_loop(0, 5, lambda i, x: x @ x + i, x) + 1, X)
    assert lines == [
        "role.segment(0);",
        "role.barrier();",
        "for (s64 round = 0; round < 5ll && role.running(); ++round) {",
        "role.segment(1);",
        "role.barrier();",
        "}",
        "role.segment(2);",
    ]


def test_while_loop() -> None:
    _, lines = check(lambda x, n: lax.fori_loop(0, n, lambda i, x: x @ x, x), X, np.int32(3))
    assert lines == [
        "role.segment(0);",
        "role.barrier();",
        "while (role.running()) {",
        "role.segment(1);",
        "role.barrier();",
        "if (!role.template decide<b1>) break;",
        "role.segment(2);",
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


def _expected(schedule: Schedule, numbers: Any) -> list[str]:
    """The schedule of a plan, where every loop but none of its neighbours ends with a barrier."""
    barrier, out = "role.barrier();", []
    for k, item in enumerate(schedule):
        if k and not isinstance(schedule[k - 1], LoopNode):
            out.append(barrier)
        if isinstance(item, Segment):
            out.append(f"role.segment({next(numbers)});")
        elif isinstance(item, LoopNode) and item.predicate >= 0:
            out += ["while (role.running()) {", *_expected(item.cond, numbers), barrier]
            out += ["if (!role.template decide<b1>) break;", *_expected(item.body, numbers), barrier, "}"]
        elif isinstance(item, LoopNode):
            out.append(f"for (s64 round = 0; round < {item.trips}ll && role.running(); ++round) {{")
            out += [*_expected(item.body, numbers), barrier, "}"]
        else:
            out.append(f"switch (clamped(role.template decide<s32>, {len(item.arms)})) {{")
            for n, arm in enumerate(item.arms):
                out += [f"case {n}: {{", *_expected(arm, numbers), "break;", "}"]
            out.append("}")
    return out
