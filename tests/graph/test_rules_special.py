"""Special functions against ``jax.jit``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.graph.ir import Nest, walk
from tests.graph.harness import check, graph_of
from tests.graph.samples import FLOATS

pytestmark = pytest.mark.usefixtures("x64")

#: No infinite order: XLA's value there is an accident of its series.
_EDGES = np.array([0.0, 1.0, -1.0, 2.0, -2.0, -3.0, 0.5, -0.5, 1.5, -2.5, np.nan, 1e-3, 12.0])
_INFINITE = np.array([np.inf, -np.inf])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(13)


_SLOW = pytest.param("igamma_grad_a", 256, marks=pytest.mark.slow)


def tolerance(dtype: str, ulps: float) -> dict[str, float]:
    """XLA's own f32 and f64 errors; f16 and bf16 are computed in f32 and rounded."""
    if dtype in ("float16", "bfloat16"):
        return {"ulps": 1.01, "atol": 1e-5}
    return {"ulps": ulps, "atol": 3e-6 if dtype == "float32" else 1e-13}


@pytest.mark.parametrize("dtype", FLOATS)
def test_erf_inv(rng: np.random.Generator, dtype: str) -> None:
    inside = np.concatenate([_EDGES, rng.uniform(-1, 1, 3000), 1 - 10 ** rng.uniform(-7, 0, 500)])
    # XLA's f64 log1p is off by several units.
    check(lax.erf_inv, inside.astype(jnp.dtype(dtype)), ulps=16 if dtype == "float64" else 2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "ulps"), [("lgamma", 60), ("digamma", 1e5), ("bessel_i0e", 8), ("bessel_i1e", 8)])
def test_unary(rng: np.random.Generator, name: str, ulps: float, dtype: str) -> None:
    x = np.concatenate([_EDGES[1:], _INFINITE, rng.normal(size=300) * 3, rng.uniform(0, 90, 300)])
    check(getattr(lax, name), x.astype(jnp.dtype(dtype)), **tolerance(dtype, ulps))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("name", "ulps"), [("igamma", 256), ("igammac", 256), ("zeta", 256), ("polygamma", 512), _SLOW]
)
def test_binary(rng: np.random.Generator, name: str, ulps: float, dtype: str) -> None:
    a, b = (
        grid.reshape(-1) for grid in np.meshgrid(_EDGES[_EDGES > 0], np.concatenate([_EDGES[_EDGES > 0], [np.nan]]))
    )
    orders = rng.integers(0, 5, 200) + (1 if name == "zeta" else 0) if name in ("zeta", "polygamma") else None
    a = np.concatenate([a, rng.uniform(0.1, 12, 200) if orders is None else orders])
    b = np.concatenate([b, rng.uniform(0.1, 12, 200)])
    kind = jnp.dtype(dtype)
    check(getattr(lax, name), a.astype(kind), b.astype(kind), **tolerance(dtype, ulps))


@pytest.mark.parametrize("name", ["igamma", "igammac", "zeta", "polygamma"])
def test_outside_the_domain(name: str) -> None:
    """Poles, negative arguments and fractional orders."""
    a, b = (grid.reshape(-1) for grid in np.meshgrid(_EDGES, _EDGES))
    # JAX changed its mind about the digamma pole at 0.
    keep = ~((a == 0) & (b == 0))
    check(getattr(lax, name), a[keep], b[keep], ulps=4096, atol=1e-9)


@pytest.mark.parametrize("q", [1.0, 0.5, -2.0, np.nan])
def test_zeta_of_infinite_orders(q: float) -> None:
    check(lax.zeta, _INFINITE, np.full(2, q), ulps=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_betainc(rng: np.random.Generator, dtype: str) -> None:
    edges = np.array([0.0, -1.0, 1.0, 2.0, 0.5, np.inf, np.nan, 1e-3, 30.0])
    grid = [g.reshape(-1) for g in np.meshgrid(edges, edges, edges)]
    inner = [rng.uniform(0.1, 10, 200), rng.uniform(0.1, 10, 200), rng.uniform(0, 1, 200)]
    args = [np.concatenate(pair).astype(jnp.dtype(dtype)) for pair in zip(grid, inner, strict=True)]
    check(lax.betainc, *args, **tolerance(dtype, 300))


def test_broadcasting(rng: np.random.Generator) -> None:
    """Scalars, and axes of extent 1, beside whole arrays."""
    a, b = rng.uniform(0.5, 3, (1, 4)), rng.uniform(0.5, 3, (3, 4))

    def fn(a: Any, b: Any) -> Any:
        return [lax.igamma(a, b), lax.igamma(a[0, 0], b), lax.zeta(b + 1, a), lax.betainc(a[0, 0], b, a / 4)]

    check(fn, a, b, atol=1e-12)


@pytest.mark.slow
def test_scipy_functions(rng: np.random.Generator) -> None:
    x = rng.uniform(0.2, 3, 50).astype(np.float32)

    def fn(x: Any) -> Any:
        special = jax.scipy.special
        return [
            special.gammaln(x),
            special.betaln(x, x + 1),
            special.ndtri(x / 4),
            special.i0(x),
            special.i1(x),
            special.gammainc(x, x * 2),
            jax.grad(lambda x: special.gammainc(x, x).sum())(x),
            jax.scipy.stats.norm.ppf(x / 4),
        ]

    check(fn, x, ulps=64, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("lgamma", 1), ("digamma", 1), ("erf_inv", 1), ("bessel_i0e", 1), ("igamma", 2), ("zeta", 2), ("betainc", 3)],
)
def test_one_operation(name: str, arguments: int) -> None:
    graph, _ = graph_of(getattr(lax, name), *[np.zeros((3,), np.float32)] * arguments)
    (op,) = walk(graph.block)
    assert isinstance(op, Nest)
    assert [node.op for node in op.body.nodes if node.op not in ("coord", "load")] == [name]
