"""Linear algebra: small, well-conditioned systems, since their factors are rounded."""

from __future__ import annotations

from tests.random_programs import values
from tests.random_programs.generator import Gen, Value
from tests.random_programs.registry import op
from tests.random_programs.values import ROUGH

_TYPES = ("f32", "f64")


def _matrix(g: Gen, dtype: str, n: int) -> Value:
    """Elements between -1 and 1."""
    return g.tame(g.make((n, n), dtype), 1, ROUGH)


@op("cholesky", smooth=_TYPES, weight=0.2)
def _cholesky(g: Gen, dtype: str) -> None:
    n = g.rng.randint(1, 5)
    x = _matrix(g, dtype, n)
    code = f"lax.linalg.cholesky({{0}} @ {{0}}.T + {dtype}({n}) * jnp.eye({n}, dtype={dtype}))"
    g.emit(code, [x], values.rough((n, n), dtype, -4, 4))


@op("triangular_solve", smooth=_TYPES, weight=0.2)
def _triangular_solve(g: Gen, dtype: str) -> None:
    n, k = g.rng.randint(1, 5), g.rng.randint(1, 3)
    left, lower = g.chance(0.5), g.chance(0.5)
    x, b = _matrix(g, dtype, n), g.make((n, k) if left else (k, n), dtype)
    options = f"left_side={left}, lower={lower}, transpose_a={g.chance(0.5)}"
    matrix = f"{{0}} + {dtype}({n + 1}) * jnp.eye({n}, dtype={dtype})"
    code = f"lax.linalg.triangular_solve({matrix}, {{1}}, {options})"
    g.emit(code, [x, b], values.rough(b.info.shape, dtype, -b.info.bound, b.info.bound))


@op("solve", smooth=_TYPES, weight=0.2)
def _solve(g: Gen, dtype: str) -> None:
    """By an LU decomposition whose pivots are far from ties."""
    n, k = g.rng.randint(1, 5), g.rng.randint(1, 3)
    x, b = _matrix(g, dtype, n), g.make((n, k), dtype)
    code = f"jnp.linalg.solve({{0}} + {dtype}({2 * n}) * jnp.eye({n}, dtype={dtype}), {{1}})"
    g.emit(code, [x, b], values.rough((n, k), dtype, -b.info.bound, b.info.bound))
