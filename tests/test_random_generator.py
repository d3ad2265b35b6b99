"""The generator of random programs: what occurs in a test run, and that the checks notice what is wrong."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jax_mpk.graph.build import load_rules
from tests.random_programs import coverage
from tests.random_programs.check import disagreement, evaluated, reference, run_jit, ulp
from tests.random_programs.generate import FAMILIES, generate, size_of
from tests.random_programs.program import Program
from tests.random_programs.runs import EXACT, SMOOTH
from tests.random_programs.shrink import shrink
from tests.random_programs.values import NUMPY, is_float

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.slow
def test_no_hole(capsys: pytest.CaptureFixture[str]) -> None:
    """Every primitive of the rule table occurs with every element type that JAX allows."""
    seeds = [*(("exact", s) for s in range(EXACT)), *(("smooth", s) for s in range(SMOOTH))]
    counts = coverage.histogram(generate(seed, family) for family, seed in seeds)
    with capsys.disabled():
        print("\n" + coverage.table(counts))
    holes = coverage.holes(counts, load_rules())
    assert not holes, f"{len(holes)} holes: {', '.join(holes)}"


def test_exclusions_are_needed() -> None:
    """What is excluded by name has a rule, and no example."""
    assert not set(coverage.EXCLUDED) & set(coverage.EXAMPLES)
    assert all(reason for reason in (*coverage.EXCLUDED.values(), *coverage.EXCLUDED_PAIRS.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides(family: str) -> None:
    for seed in (0, 16, 17, 23):
        first, second = generate(seed, family), generate(seed, family)
        assert first.source() == second.source()
        assert all(np.array_equal(a, b) for a, b in zip(first.arrays(), second.arrays(), strict=True))


def test_a_smaller_size_is_a_beginning() -> None:
    small, large = generate(33, "exact", 6), generate(33, "exact", 30)
    assert large.instrs[: len(small.instrs) - 2] == small.instrs[: len(small.instrs) - 2]


def test_sizes_go_from_one_to_sixty() -> None:
    sizes = {size_of(seed) for seed in range(200)}
    assert {1, 60} <= sizes


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_hold(family: str) -> None:
    """Results are of the shape and type, and in the range, that the generator thinks."""
    for seed in range(3, 30):
        program = generate(seed, family)
        (results,) = run_jit(program.function(), program.arrays())
        for name, result in zip(program.outputs, results, strict=True):
            info = program.infos[name]
            assert (result.shape, result.dtype) == (info.shape, NUMPY[info.dtype]), name
            found = np.asarray(result).astype(np.float64 if is_float(info.dtype) else object)
            slack = 0.01 * (1 + info.bound) if info.rough else 0
            assert all(info.lo - slack <= v <= info.hi + slack for v in found.ravel()), name
            if is_float(info.dtype) and not info.rough:
                assert np.all(found * 2.0**info.frac == np.floor(found * 2.0**info.frac)), name


def test_a_report_runs() -> None:
    program = generate(6, "exact")
    space: dict[str, object] = {}
    try:
        exec(compile(program.report(), "report", "exec"), space)
    finally:
        # A report is a program of its own and sets this for good.
        jax.config.update("jax_enable_x64", False)
    results = space["program"](*(space[i.name] for i in program.inputs))  # type: ignore[operator]
    want = program.function()(*program.arrays())
    assert all(np.array_equal(a, b) for a, b in zip(results, want, strict=True))


def _swapped(program: Program) -> Program:
    """A program with a planted mistake: its subtractions have their operands the wrong way round."""
    instrs = tuple(
        dataclasses.replace(i, args=i.args[::-1]) if i.code.startswith("lax.sub(") else i for i in program.instrs
    )
    return dataclasses.replace(program, instrs=instrs)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_checks_notice_and_shrink(family: str) -> None:
    def fails(program: Program) -> bool:
        expected = reference(program)
        got = evaluated(_swapped(program).function(), expected.args)
        return disagreement(program, expected, got) is not None

    found = next(p for p in (generate(s, family, 20) for s in range(200)) if "lax.sub(" in p.source() and fails(p))
    expected = reference(found)
    assert disagreement(found, expected, evaluated(found.function(), expected.args)) is None
    small = shrink(found, fails)
    assert fails(small)
    assert len(small.instrs) <= 3
    assert "lax.sub(" in small.source()


def test_ulp() -> None:
    assert ulp(1.0, "f32") == np.spacing(np.float32(1))
    assert ulp(-0.0, "f32") == 0
    assert ulp(3.0, "f64") == np.spacing(3.0)
