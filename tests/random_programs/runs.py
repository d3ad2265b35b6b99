"""The programs of a test run."""

from __future__ import annotations

import gc

import jax
import pytest

from tests.random_programs.check import Refused, report, verdict
from tests.random_programs.generate import generate

#: Programs of each family in a full test run.
EXACT, SMOOTH = 700, 300
#: Programs of each family in a quick one.
QUICK = 25
#: Programs of one test.
CHUNK = 25


def run_chunk(family: str, first: int) -> None:
    """Checks the programs of consecutive seeds; shrinks the first that fails."""
    failures = []
    refused = 0
    with jax.enable_x64(True):
        for seed in range(first, first + CHUNK):
            program = generate(seed, family)
            try:
                wrong = verdict(program)
            except Refused:
                refused += 1
                continue
            if wrong is not None:
                failures.append((program, wrong))
        assert refused < CHUNK // 10, "too little to compare with"
        if failures:
            text = report(*failures[0])
            others = "\n".join(f"{family} {p.seed}: {m}" for p, m in failures[1:])
            pytest.fail(f"{len(failures)} of {CHUNK} programs\n\n{text}\n{others}")
    # Every program leaves compiled code behind.
    jax.clear_caches()
    gc.collect()
