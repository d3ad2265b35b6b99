"""sort, top_k and what is made of them, against ``jax.jit``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk import errors
from jax_mpk.graph.ir import Sort, walk
from tests.graph.harness import check, graph_of
from tests.graph.samples import ALL, FLOATS, exact, wild

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sort_types(rng: np.random.Generator, axis: int) -> None:
    """A stable sort: the permutation is part of the result, so NaNs and zeros must tie as in JAX."""
    arrays = [wild(rng, dtype, (4, 9, 3)) for dtype in ALL]

    def fn(xs: Any) -> Any:
        return [lax.sort((x, lax.broadcasted_iota("int32", x.shape, axis)), dimension=axis, num_keys=1) for x in xs]

    check(fn, arrays)


@pytest.mark.parametrize("num_keys", [1, 2, 3])
def test_several_keys(rng: np.random.Generator, num_keys: int) -> None:
    keys = [wild(rng, "float32", (60,)), exact(rng, "int8", (60,)), exact(rng, "bool", (60,))]
    keys = [np.where(rng.integers(0, 2, 60) == 0, key, key[0]) for key in keys]
    rest = np.arange(60, dtype=np.uint16)
    check(lambda *xs: lax.sort(xs, num_keys=num_keys, is_stable=True), *keys, rest)


def test_unstable_sort_of_keys(rng: np.random.Generator) -> None:
    check(lambda x: lax.sort(x, is_stable=False), wild(rng, "int16", (5, 40)))


def test_numpy_functions(rng: np.random.Generator) -> None:
    x, y = wild(rng, "float32", (6, 5)), exact(rng, "int32", (6, 5))

    def fn(x: Any, y: Any) -> Any:
        return [
            jnp.sort(x),
            jnp.sort(x, axis=0, descending=True),
            jnp.argsort(y, axis=0),
            jnp.argsort(y, descending=True),
            jnp.sort(y, axis=None),
            jnp.lexsort((x[0], y[0])),
            jnp.median(y),
            jnp.unique(y, size=6),
            jnp.searchsorted(jnp.sort(y[0]), y),
        ]

    check(fn, x, y)


def test_trivial_sorts() -> None:
    def fn(x: Any) -> Any:
        return [lax.sort(x, dimension=0), lax.sort(x[:, :0], dimension=1), lax.top_k(x[:1], 1, axis=0), lax.top_k(x, 0)]

    check(fn, np.ones((1, 3), np.float32))


def test_sort_of_keys_is_refused() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises((errors.UnsupportedPrimitiveError, TypeError)):
        graph_of(lambda keys: lax.sort((jnp.arange(3), keys), num_keys=1), keys)


@pytest.mark.parametrize("axis", [0, 1])
def test_top_k_types(rng: np.random.Generator, axis: int) -> None:
    """XLA's total order: NaN first, −NaN last, +0 before −0; among equals the first."""
    arrays = [wild(rng, dtype, (11, 13)) for dtype in ALL]
    check(lambda xs: [lax.top_k(x, k, axis=axis) for x in xs for k in (1, 4, 11)], arrays)


def test_top_k_batched(rng: np.random.Generator) -> None:
    x = exact(rng, "float32", (3, 4, 20))
    check(lambda x: [jax.vmap(lambda r: lax.top_k(r, 3), in_axes=1)(x), jax.nn.one_hot(lax.top_k(x, 2)[1], 4)], x)


def test_top_k_is_one_operator() -> None:
    graph, _ = graph_of(lambda x: lax.top_k(x, 5), np.zeros((4, 100), np.float32))
    (op,) = walk(graph.block)
    assert isinstance(op, Sort)
    assert (op.top_k, op.axis, op.space) == (5, 1, (4, 100))


def test_approx_top_k(rng: np.random.Generator) -> None:
    """On distinct numbers the approximation has one best answer."""
    arrays = [rng.permutation(60).reshape(3, 20).astype(jnp.dtype(dtype)) - 30 for dtype in FLOATS]

    def fn(xs: Any) -> Any:
        return [
            pick(x, 4, reduction_dimension=axis, recall_target=1.0)
            for x in xs
            for pick, axis in ((lax.approx_max_k, -1), (lax.approx_min_k, -1), (lax.approx_max_k, 1))
        ]

    check(fn, arrays)


def test_partial_approx_top_k_is_refused() -> None:
    with pytest.raises(errors.UnsupportedPrimitiveError, match="aggregate_to_topk"):
        graph_of(lambda x: lax.approx_max_k(x, 4, aggregate_to_topk=False), np.zeros((3, 64), np.float32))
