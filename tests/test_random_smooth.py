"""Random programs of rounded numbers: errors like those of ``jax.jit``; and programs that hypothesis looks for."""

from __future__ import annotations

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.random_programs.check import report, verdict
from tests.random_programs.generate import FAMILIES, MAX_SIZE, generate
from tests.random_programs.runs import CHUNK, QUICK, SMOOTH, run_chunk


@pytest.mark.parametrize("first", range(0, QUICK, CHUNK))
def test_a_few(first: int) -> None:
    run_chunk("smooth", first)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, SMOOTH, CHUNK))
def test_many(first: int) -> None:
    run_chunk("smooth", first)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(family=st.sampled_from(FAMILIES), seed=st.integers(0, 2**32 - 1), size=st.integers(1, MAX_SIZE))
def test_any(family: str, seed: int, size: int) -> None:
    """Sizes over the whole range; a smaller size is the beginning of the same program, so failures shrink."""
    with jax.enable_x64(True):
        program = generate(seed, family, size)
        wrong = verdict(program)
        assert wrong is None, report(program, wrong, attempts=0)
