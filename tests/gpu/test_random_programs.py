"""Megakernels on a GPU against ``jax.jit`` there: every kind of task, and random programs."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import jax
import numpy as np
import pytest

import jax_mpk
from tests.codegen.cuda_cases import CASES, Case
from tests.codegen.test_cuda_emulation import check_case
from tests.random_programs.check import disagreement, reference
from tests.random_programs.generate import generate

pytestmark = [
    pytest.mark.gpu,
    # Of jax.jit, where a program has a second derivative of a maximum over windows.
    pytest.mark.filterwarnings("ignore:Using reduced precision for gradient of reduce-window"),
]

#: On a GPU, XLA applies updates of one element in no fixed order, and reduces as if the combination commuted. These are
#: compared with its results on the CPU.
ORDERED = frozenset(["reduce_generic", "scatter_set"])
#: Programs of each family, and of one test.
PROGRAMS, CHUNK = 200, 25


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    args = case.arguments()
    fn = jax_mpk.megakernelize(case.fn)
    for _ in range(2):
        got = jax.tree.leaves(fn(*args))
        with jax.default_device(jax.devices("cpu" if case.name in ORDERED else "gpu")[0]):
            check_case(case, got, args)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("length", [1, 31, 352, 4096, 4097, 50_257, 151_936])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_vocabulary(rows: int, length: int, dtype: str) -> None:
    """Lines as long as vocabularies, with the numbers that sorts tell apart and those they do not."""
    rng = np.random.default_rng(length)
    x = (rng.standard_normal((rows, length)) * 40).astype(jax.numpy.dtype(dtype))
    if dtype != "int8":
        x[:, :: max(1, length // 8)] = np.nan
        x[:, 1 :: max(2, length // 6)] = -0.0
        x[:, 2 :: max(2, length // 6)] = np.inf

    def fn(x: jax.Array) -> list[jax.Array]:
        order = jax.numpy.argsort(x, axis=-1, descending=True)
        return [jax.numpy.sort(x, axis=-1), order, *jax.lax.top_k(x, min(length, 50)), jax.lax.cummax(x, axis=1)]

    check_case(Case("vocabulary", fn, []), jax_mpk.megakernelize(fn)(x), [x])


@pytest.mark.parametrize("family", ["exact", "smooth"])
@pytest.mark.parametrize("first", range(0, PROGRAMS, CHUNK))
def test_random_programs(family: str, first: int) -> None:
    failures = []
    for seed in range(first, first + CHUNK):
        program = generate(seed, family)
        try:
            expected = reference(program)
        except jax.errors.JaxRuntimeError:
            continue
        try:
            got = jax_mpk.megakernelize(program.function())(*expected.args)
            results = [np.asarray(r) for r in got]
            wrong = disagreement(program, expected, results)
            if wrong is not None and "scatter" in program.report():
                with jax.default_device(jax.devices("cpu")[0]):
                    wrong = disagreement(program, reference(program), results)
        except Exception as error:  # whatever it is, it is the finding
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            failures.append(f"{family} {seed}: {wrong}\n{program.report()}")
    jax.clear_caches()
    gc.collect()
    assert not failures, f"{len(failures)} of {CHUNK} programs\n" + "\n".join(failures)
