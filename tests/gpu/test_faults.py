"""Generated kernels on a GPU that lose a hand-off, and tags that wrap: the GPU's half of test_cuda_faults.py."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

import jax_mpk
from jax_mpk import config
from tests.codegen.cuda_cases import Case
from tests.codegen.cuda_faults import FAULTY, TAG, Faulty, branches_and_loops, exact_arguments, faulty, late
from tests.codegen.test_cuda_emulation import check_case
from tests.codegen.test_cuda_faults import OFF, ON, is_poisoned, runs
from tests.gpu.programs import call, planned

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with (
        jax.enable_x64(True),
        jax.default_matmul_precision("highest"),
        config.override(deadline_ms=500),
    ):
        yield
        jax_mpk.check()


@pytest.mark.parametrize("case", FAULTY, ids=lambda case: case.name)
def test_lost(case: Faulty) -> None:
    args = Case(case.name, case.fn, case.shapes).arguments()
    plan, results = planned(case.fn, *args, OFF)
    run = jax.jit(call(faulty(plan, case.text, case.instead), results))
    intact = jax_mpk.megakernelize(case.fn)
    expected = Case(case.name, case.fn, [], rough=True)

    check_case(expected, run(*args, OFF), [*args, OFF])
    for _ in range(2):
        got = run(*args, ON)
        assert all(is_poisoned(np.asarray(r)) for r in got)
        with pytest.raises(jax_mpk.DeadlineError, match=case.report):
            jax_mpk.check()
        # The same executable, and another one.
        check_case(expected, run(*args, OFF), [*args, OFF])
        check_case(expected, [intact(*args, OFF)], [*args, OFF])


def test_lost_and_raised_by_the_next_call() -> None:
    case = next(case for case in FAULTY if case.kind == TAG)
    args = Case(case.name, case.fn, case.shapes).arguments()
    plan, results = planned(case.fn, *args, OFF)
    run = jax.jit(call(faulty(plan, case.text, case.instead), results))
    # Several launches are under way before anybody looks.
    launched = [run(*args, switch) for switch in (ON, OFF, ON)]
    assert all(is_poisoned(np.asarray(r)) for r in jax.tree.leaves(launched))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"DeadlineError: .*{case.report}"):
        jax.block_until_ready(run(*args, OFF))
    check_case(Case(case.name, case.fn, [], rough=True), run(*args, OFF), [*args, OFF])


def test_tags_wrap() -> None:
    x, w = exact_arguments(256)
    plan, results = planned(branches_and_loops, x, w, OFF, OFF, OFF)
    assert sum(storage.tagged for storage in plan.storages) >= 4
    lost = next(case for case in FAULTY if case.kind == TAG)
    run = jax.jit(call(late(faulty(plan, lost.text, lost.instead)), results))
    reference = jax.jit(branches_and_loops)

    def all_right() -> None:
        for arm, trips in runs():
            args = [x, w, np.int32(arm), np.int32(trips), OFF]
            for have, want in zip(run(*args), reference(*args), strict=True):
                np.testing.assert_array_equal(np.asarray(have), np.asarray(want))

    all_right()
    got = run(x, w, OFF, OFF, ON)
    assert all(is_poisoned(np.asarray(r)) for r in got)
    with pytest.raises(jax_mpk.DeadlineError, match=r"tag of value %\d+\[5\]: expected 6, seen 5"):
        jax_mpk.check()
    all_right()
