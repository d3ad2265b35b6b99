"""Library functions of many primitives, loops among them, compiled whole and against ``jax.jit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import megakernelize

RNG = np.random.default_rng(0)
EDGES = np.linspace(-2, 2, 9).astype(np.float32)
X = RNG.standard_normal((5, 20)).astype(np.float32)
WEIGHTS = RNG.random(8).astype(np.float32)


def key() -> jax.Array:
    return jax.random.key(3)


EXACT = {
    "searchsorted": lambda e, x, w: (jnp.searchsorted(e, x), jnp.searchsorted(e, x, side="right")),
    "searchsorted_sort": lambda e, x, w: jnp.searchsorted(e, x, method="sort"),
    "searchsorted_all": lambda e, x, w: jnp.searchsorted(e, x, method="compare_all"),
    "digitize": lambda e, x, w: (jnp.digitize(x, e), jnp.digitize(x, e[::-1], right=True)),
    "histogram": lambda e, x, w: jnp.histogram(x, bins=e)[0],
    "bincount": lambda e, x, w: jnp.bincount(jnp.abs(x * 3).astype(int).ravel(), length=12),
    "choice": lambda e, x, w: jax.random.choice(key(), 8, (6,), p=w / w.sum()),
    "choice_once": lambda e, x, w: jax.random.choice(key(), 8, (6,), replace=False, p=w / w.sum()),
}
CLOSE = {
    "interp": lambda e, x, w: jnp.interp(x, e, e**2),
    "histogram_edges": lambda e, x, w: jnp.histogram(x, bins=8)[1],
    "histogram_density": lambda e, x, w: jnp.histogram(x, bins=e, density=True)[0],
    "gamma": lambda e, x, w: jax.random.gamma(key(), 2.5 + w),
    "dirichlet": lambda e, x, w: jax.random.dirichlet(key(), 0.5 + w[:3], (4,)),
    "expm": lambda e, x, w: jax.scipy.linalg.expm(x[:, :5]),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    compare(EXACT[name], np.testing.assert_array_equal)


@pytest.mark.parametrize("name", CLOSE)
def test_close(name: str) -> None:
    # The draws of one key are fixed, and none is close to being rejected.
    compare(CLOSE[name], lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7))


def compare(fn: Callable[..., Any], check: Callable[..., None]) -> None:
    got, want = megakernelize(fn)(EDGES, X, WEIGHTS), jax.jit(fn)(EDGES, X, WEIGHTS)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        check(a, b)
