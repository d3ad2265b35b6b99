"""Running reductions against ``jax.jit``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.graph.ir import Cumulative, walk
from tests.graph.harness import check, graph_of
from tests.graph.samples import FLOATS, INTS, NUMBERS, exact, wild

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["cumsum", "cumprod", "cummax", "cummin"])
def test_exact(rng: np.random.Generator, name: str, reverse: bool) -> None:
    """On values for which every order of combination gives the same result; integers wrap."""
    scan = getattr(lax, name)
    bounds = (-1, 2) if name == "cumprod" else (-4, 5)
    arrays = [exact(rng, dtype, (3, 7, 2), *bounds) for dtype in FLOATS]
    arrays += [wild(rng, dtype, (3, 7, 2)) for dtype in INTS]
    check(lambda xs: [scan(x, axis=axis, reverse=reverse) for x in xs for axis in (0, 1, 2)], arrays)


@pytest.mark.parametrize("name", ["cumsum", "cummax", "cummin", "cumlogsumexp"])
def test_infinities_and_nans(name: str) -> None:
    rows = np.array(
        [
            [1.0, np.inf, 2.0, np.nan, 3.0],
            [-np.inf, -np.inf, 1.0, np.inf, -np.inf],
            [-np.inf, -np.inf, -np.inf, -np.inf, -np.inf],
            [5.0, 4.0, -np.inf, 7.0, np.inf],
        ],
        np.float32,
    )
    check(lambda x: [getattr(lax, name)(x, axis=1, reverse=r) for r in (False, True)], rows, ulps=4)


@pytest.mark.parametrize("reverse", [False, True])
def test_rounded(rng: np.random.Generator, reverse: bool) -> None:
    """f32 and f64 differ from XLA by the order of summation, f16 and bf16 by roundings that XLA adds."""
    x = {dtype: rng.normal(size=(4, 50)).astype(jnp.dtype(dtype)) for dtype in FLOATS}
    for dtype, ulps in (("float64", 60), ("float32", 60), ("float16", 30), ("bfloat16", 30)):
        check(lambda x: lax.cumlogsumexp(x, axis=1, reverse=reverse), x[dtype], ulps=ulps)
        check(lambda x: lax.cumsum(jnp.abs(x), axis=1, reverse=reverse), x[dtype], ulps=ulps)


def test_trivial() -> None:
    check(lambda x: [lax.cumsum(x, 0), lax.cumprod(x[:, :0], 1)], np.ones((1, 3), np.float32))


def test_numpy_functions(rng: np.random.Generator) -> None:
    x = exact(rng, "float32", (5, 6))
    check(
        lambda x: [
            jnp.cumsum(x),
            jnp.cumsum(x > 0, axis=1),
            jnp.cumprod(x, axis=0),
            jnp.cumsum(x.astype("bfloat16"), axis=1, dtype="float32"),
            lax.associative_scan(jnp.maximum, x, axis=1),
            jax.grad(lambda x: (jnp.cumsum(x, axis=0) * x).sum())(x),
        ],
        x,
    )


@pytest.mark.parametrize("dtype", NUMBERS)
def test_one_operator(dtype: str) -> None:
    graph, _ = graph_of(lambda x: lax.cumsum(x, 1, reverse=True), np.zeros((2, 9), jnp.dtype(dtype)))
    (op,) = walk(graph.block)
    assert isinstance(op, Cumulative)
    assert op.reverse
    assert op.acc == ({"float16": "f32", "bfloat16": "f32"}.get(dtype, graph.values[op.outputs[0]].dtype),)
