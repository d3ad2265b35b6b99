"""Random programs of small integers and dyadic fractions: the bits of ``jax.jit``."""

from __future__ import annotations

import pytest

from tests.random_programs.runs import CHUNK, EXACT, QUICK, run_chunk


@pytest.mark.parametrize("first", range(0, QUICK, CHUNK))
def test_a_few(first: int) -> None:
    run_chunk("exact", first)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, EXACT, CHUNK))
def test_many(first: int) -> None:
    run_chunk("exact", first)
