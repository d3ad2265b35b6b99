"""Long sums, running sums and matrix products, compiled whole: as close to the exact result as XLA's, or nearly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk

#: Elements of the longest arrays; not a multiple of any block.
LONG = (1 << 20) + 77


def constant(*shape: int) -> np.ndarray:
    """Terms whose roundings all point the same way until the sum reaches the next power of two."""
    return np.full(shape, 1.1, np.float32)


def uniform(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).random(shape, dtype=np.float32)


def worst(fn: Callable[..., Any], exact: Callable[..., Any], *args: np.ndarray) -> float:
    """Largest relative error of a megakernel; all results must be positive."""
    want = np.asarray(exact(*(x.astype(np.float64) for x in args)))
    got = np.asarray(jax_mpk.megakernelize(fn)(*args), np.float64)
    assert got.shape == want.shape
    return float(np.max(np.abs(got - want) / want))


SUMS = [((4 * LONG,), 0), ((8, LONG // 4), 1), ((LONG // 4, 8), 0), ((LONG // 16, 64), 0), ((300, 5, 701), (0, 2))]


@pytest.mark.parametrize("make", [constant, uniform])
@pytest.mark.parametrize(("shape", "axes"), SUMS, ids=str)
def test_sums(shape: tuple[int, ...], axes: Any, make: Callable[..., np.ndarray]) -> None:
    assert worst(lambda x: jnp.sum(x, axes), lambda x: x.sum(axes), make(*shape)) < 8e-7


def test_sums_by_a_function_of_the_caller() -> None:
    """Accumulators of two kinds, and a combination that nothing is known about: joined in order."""

    def sums(x: jax.Array) -> jax.Array:
        def join(a: Any, b: Any) -> Any:
            return a[0] + b[0], a[1] + b[1] + 0.0 * a[1] * b[0]

        zero = np.float32(0)
        return jnp.stack(jax.lax.reduce((x, 2 * x), (zero, zero), join, (x.ndim - 1,)))

    assert worst(sums, lambda x: np.stack([x.sum(-1), 2 * x.sum(-1)]), constant(LONG // 2)) < 8e-7
    assert worst(sums, lambda x: np.stack([x.sum(-1), 2 * x.sum(-1)]), uniform(3, LONG // 8)) < 8e-7


def test_positions_of_the_largest() -> None:
    """Runs are joined in their order: the first of equal elements wins."""
    x = np.zeros((LONG // 8, 8), np.float32)
    x[[40_000, 90_000, 100_000], 3] = 1
    assert np.asarray(jax_mpk.megakernelize(lambda x: jnp.argmax(x, 0))(x)).tolist() == [0, 0, 0, 40_000, 0, 0, 0, 0]
    flat = np.zeros(4 * LONG, np.float32)
    flat[[3_000_001, 3_000_000, 4_000_000]] = 1
    assert int(jax_mpk.megakernelize(jnp.argmax)(flat)) == 3_000_000


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("make", [constant, uniform])
@pytest.mark.parametrize(("shape", "axis"), [((4 * LONG,), 0), ((3, LONG // 4), 1), ((LONG // 8, 5), 0)], ids=str)
def test_running_sums(shape: tuple[int, ...], axis: int, make: Callable[..., np.ndarray], reverse: bool) -> None:
    def exact(x: np.ndarray) -> np.ndarray:
        return np.flip(np.cumsum(np.flip(x, axis), axis), axis) if reverse else np.cumsum(x, axis)

    assert worst(lambda x: jax.lax.cumsum(x, axis, reverse), exact, make(*shape)) < 8e-7


@pytest.mark.parametrize("shape", [(1 << 17,), (1 << 15, 3)], ids=str)
def test_other_running_combinations(shape: tuple[int, ...]) -> None:
    x = (np.random.default_rng(0).permutation(np.prod(shape)) + 1).astype(np.float32).reshape(shape)
    got = jax_mpk.megakernelize(lambda x: (jax.lax.cummax(x), jax.lax.cummin(x), jax.lax.cumlogsumexp(x / x)))(x)
    np.testing.assert_array_equal(got[0], np.maximum.accumulate(x, 0))
    np.testing.assert_array_equal(got[1], np.minimum.accumulate(x, 0))
    steps = np.arange(1, shape[0] + 1, dtype=np.float64).reshape(-1, *[1] * (len(shape) - 1))
    np.testing.assert_allclose(got[2], np.broadcast_to(1 + np.log(steps), shape), rtol=1e-6)


@pytest.mark.parametrize("length", [1000, 200_001])
def test_running_sums_of_negative_zeros(length: int) -> None:
    """A sum starts from +0, also where it has been cut into runs."""
    for shape in [(length,), (length, 2)]:
        got = np.asarray(jax_mpk.megakernelize(lambda x: jnp.cumsum(x, 0))(np.full(shape, -0.0, np.float32)))
        assert not got.any() and not np.signbit(got).any()
        total = np.asarray(jax_mpk.megakernelize(lambda x: jnp.sum(x, 0))(np.full(shape, -0.0, np.float32)))
        assert not total.any() and not np.signbit(total).any()


@pytest.mark.parametrize("make", [constant, uniform])
@pytest.mark.parametrize("layout", ["mk,kn", "mk,nk", "km,kn", "k,kn", "mk,k", "k,k"])
def test_products_over_long_axes(layout: str, make: Callable[..., np.ndarray]) -> None:
    sizes = {"m": 4, "n": 5, "k": LONG}
    lhs, rhs = (make(*(sizes[axis] for axis in part)) for part in layout.split(","))

    def product(lib: Any) -> Callable[..., Any]:
        return lambda x, y: lib.einsum(f"{layout}->{'mn' if 'm' in layout and 'n' in layout else ''}", x, y)

    # The kernels' own chains are long enough for roundings of one direction to show.
    limit = 2e-6 if make is constant else 8e-7
    if layout in ("k,kn", "mk,k"):
        assert worst(jnp.matmul, np.matmul, lhs, rhs) < limit
    else:
        assert worst(product(jnp), product(np), lhs, rhs) < limit


@pytest.mark.parametrize("subscripts", ["aij,jib->ab", "ijk,ikj->", "iaj,ibj->ab"])
def test_products_over_several_axes(subscripts: str) -> None:
    """Reduced axes that do not step jointly are cut into many short sums."""
    sizes = dict(zip("aijkb", (3, 700, 900, 30, 2)))
    lhs, rhs = (uniform(*(sizes[axis] for axis in part)) for part in subscripts.split("->")[0].split(","))
    if subscripts == "ijk,ikj->":
        lhs = lhs[:, :300]
        rhs = rhs[..., :300]

    def exact(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum(subscripts, x, y, optimize=True))

    assert worst(lambda x, y: jnp.einsum(subscripts, x, y), exact, lhs, rhs) < 8e-7


def test_products_of_long_integer_axes_wrap() -> None:
    x = np.full((2, LONG), 77_777, np.int32)
    got = np.asarray(jax_mpk.megakernelize(lambda x: x @ x.T)(x))
    assert got.tolist() == [[(77_777**2 * LONG + 2**31) % 2**32 - 2**31] * 2] * 2
