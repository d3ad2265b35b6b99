"""Kernels of plans for an H100 compile to what they claim, for every kind of task and for random programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_mpk.capture import capture
from jax_mpk.codegen.cuda import generate
from jax_mpk.errors import UnsupportedError
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.plan.ir import PARTIAL, Member, Plan
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.targets import H100
from jax_mpk.runtime import nvrtc
from tests.codegen.cuda_cases import CASES, Case, named
from tests.codegen.sass import missing
from tests.random_programs.generate import generate as random_program

pytestmark = pytest.mark.usefixtures("x64")
#: Random programs of each family.
PROGRAMS = 24


def plan_of(fn: Any, args: list[Any], workers: int = H100.workers, **target: Any) -> tuple[Plan, list[Any]]:
    """A plan for an H100 with so many SMs, and what else is different about it, and the arguments of its graph."""
    captured = capture(jax.make_jaxpr(fn)(*args))
    graph = fuse(build_graph(captured.jaxpr))
    plan = make_plan(graph, dataclasses.replace(H100, workers=workers, **target))
    return plan, [*(np.asarray(c) for c in captured.consts), *args]


def compile_twice(plan: Plan) -> tuple[str, nvrtc.Compiled]:
    """The source of a plan's kernel, which must be the same every time, and what the compiler makes of it."""
    program, again = generate(plan), generate(plan)
    assert program == again
    return program.source, nvrtc.compile_source(program.source, program.arch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, tmp_path: Path) -> None:
    plan, _ = plan_of(case.fn, case.arguments())
    source, compiled = compile_twice(plan)
    for text in case.text:
        assert text in source
    assert compiled.resources.spill_bytes == 0
    if case.sass:
        assert not missing(compiled.cubin, case.sass, tmp_path)


@pytest.mark.parametrize("family", ["exact", "smooth"])
@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_random_program(family: str, seed: int) -> None:
    program = random_program(seed, family)
    plan, _ = plan_of(program.function(), program.arrays())
    compile_twice(plan)


def test_split_members_are_refused() -> None:
    case = named("contract")
    plan, _ = plan_of(case.fn, case.arguments())
    member = Member(plan.routines[0].members[0].op, PARTIAL)
    routine = dataclasses.replace(plan.routines[0], members=(member, *plan.routines[0].members[1:]))
    with pytest.raises(UnsupportedError, match="PARTIAL"):
        generate(dataclasses.replace(plan, routines=(routine, *plan.routines[1:])))
