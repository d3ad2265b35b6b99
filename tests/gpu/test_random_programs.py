"""Random programs as kernels on a GPU, against ``jax.jit`` there."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jax_mpk
from tests.random_programs.check import disagreement, reference
from tests.random_programs.generate import generate

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("x64")]

#: Programs of each family.
EXACT, SMOOTH = 225, 75


@pytest.mark.parametrize(
    ("family", "seed"),
    [*(("exact", seed) for seed in range(EXACT)), *(("smooth", seed) for seed in range(SMOOTH))],
)
def test_program(family: str, seed: int) -> None:
    program = generate(seed, family)
    expected = reference(program)
    results = jax_mpk.megakernelize(program.function())(*expected.args)
    wrong = disagreement(program, expected, [np.asarray(r) for r in jax.tree.leaves(results)])
    assert wrong is None, f"{wrong}\n\n{program}"
    jax.clear_caches()
