"""Factorizations and triangular systems against ``jax.jit``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.graph.harness import check

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2)


def _triangle(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Matrices whose triangles are well conditioned."""
    return rng.normal(size=shape) * 0.3 + 2 * np.eye(shape[-1])


def test_cholesky(rng: np.random.Generator) -> None:
    a = rng.normal(size=(2, 5, 5))
    positive = a @ a.swapaxes(1, 2) + np.eye(5)
    indefinite = positive - 4 * np.eye(5)
    check(lambda *xs: [jnp.linalg.cholesky(x) for x in xs], positive, indefinite, atol=1e-12)
    check(jnp.linalg.cholesky, positive.astype(np.float32), atol=2e-5)


@pytest.mark.parametrize("left_side", [True, False])
@pytest.mark.parametrize("lower", [True, False])
def test_triangular_solve(rng: np.random.Generator, left_side: bool, lower: bool) -> None:
    a = _triangle(rng, 2, 4, 4)
    b = rng.normal(size=(2, 4, 3) if left_side else (2, 3, 4))

    def fn(a: Any, b: Any) -> Any:
        return [
            lax.linalg.triangular_solve(
                a, b, left_side=left_side, lower=lower, transpose_a=transpose, unit_diagonal=unit
            )
            for transpose in (False, True)
            for unit in (False, True)
        ]

    check(fn, a, b, atol=1e-11)


@pytest.mark.parametrize("shape", [(4, 4), (2, 5, 3), (3, 5)])
def test_lu(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    check(lax.linalg.lu, rng.normal(size=shape), atol=1e-12)


def test_singular_lu() -> None:
    check(lax.linalg.lu, np.array([[0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [0.0, 0.0, 0.0]]), atol=1e-15)


def test_solvers(rng: np.random.Generator) -> None:
    a, b = _triangle(rng, 4, 4), rng.normal(size=(4, 2))

    def fn(a: Any, b: Any) -> Any:
        return [
            jnp.linalg.solve(a, b),
            jnp.linalg.inv(a),
            jnp.linalg.det(a),
            *jnp.linalg.slogdet(a),
            jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(a @ a.T), True), b),
        ]

    check(fn, a, b, atol=1e-11)


def test_custom_linear_solve(rng: np.random.Generator) -> None:
    a, b = _triangle(rng, 3, 3), rng.normal(size=3)

    def fn(a: Any, b: Any) -> Any:
        def steps(matvec: Any, b: Any) -> Any:
            return lax.fori_loop(0, 30, lambda _, x: x + 0.3 * (b - matvec(x)), jnp.zeros_like(b))

        return lax.custom_linear_solve(lambda x: a @ x, b, steps, transpose_solve=steps)

    check(fn, a, b, atol=1e-11)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_empty_matrices(batch: tuple[int, ...]) -> None:
    check(jnp.linalg.cholesky, np.ones((*batch, 0, 0)))
    check(
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True), np.ones((*batch, 0, 0)), np.ones((*batch, 0, 4))
    )
    check(lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True), np.eye(3), np.ones((3, 0)))
