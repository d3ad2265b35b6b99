"""Functions of JAX's libraries whose inner loops, branches and updates are compiled along with everything else."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import megakernelize
from tests.references import quick_jit

KEY = jax.random.key(3)


def _same_bits_everywhere(v: Any) -> Any:
    """An update of several elements by one value that no loop computes."""
    bits = jax.lax.broadcasted_iota(jnp.uint32, (3, 5, 7), 0) & jnp.uint32(0x400000) | jnp.uint32(0x3F800000)
    ones = jax.lax.bitcast_convert_type(bits, jnp.float32)
    start = v[1].astype(jnp.int32)
    return jax.lax.dynamic_update_slice(ones[2], ones[1, 1:5, 2:3], (start, start))


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "searchsorted": lambda v: jnp.searchsorted(v, v * 0.7),
    "searchsorted sort": lambda v: jnp.searchsorted(v, v * 0.7, side="right", method="sort"),
    "interp": lambda v: jnp.interp(v * 0.7, v, v * v),
    "interp grad": jax.grad(lambda v: jnp.interp(v * 0.7, v, v * v).sum()),
    "digitize": lambda v: jnp.digitize(v * 0.9, v),
    "bincount": lambda v: jnp.bincount(v.astype(jnp.int32) % 3, length=4),
    "histogram": lambda v: jnp.histogram(v, 3),
    "histogram2d": lambda v: jnp.histogram2d(v, v * v, 2),
    "unique": lambda v: jnp.unique(jnp.floor(v / 2), size=4, return_counts=True),
    "median": lambda v: (jnp.median(v), jnp.percentile(v, 30.0)),
    "convolve": lambda v: jnp.convolve(v, v[::-1], mode="same"),
    "expm": lambda v: jax.scipy.linalg.expm(jnp.outer(v, v) * 0.01),
    "solve": lambda v: jnp.linalg.solve(jnp.outer(v, v) + 3 * jnp.eye(v.size), v),
    "associative_scan": lambda v: jax.lax.associative_scan(jnp.multiply, 1 + v / 8, reverse=True),
    "map in batches": lambda v: jax.lax.map(lambda x: x * x, v, batch_size=3),
    "segment_sum": lambda v: jax.ops.segment_sum(v, jnp.arange(v.size) % 3, 3),
    "choice": lambda v: jax.random.choice(KEY, v.size, (5,), p=v / v.sum()),
    "permutation": lambda v: jax.random.permutation(KEY, v),
    "gamma": lambda v: jax.random.gamma(KEY, v + 1),
    "beta": lambda v: jax.random.beta(KEY, v + 1, 2.0),
    "dirichlet": lambda v: jax.random.dirichlet(KEY, v + 1),
    "t": lambda v: jax.random.t(KEY, v + 2),
    "same bits everywhere": _same_bits_everywhere,
    "ball": lambda v: jax.random.ball(KEY, 3) + v[0],
}


#: By turns.
TARGETS = ("cpu-1", "cpu-5+tagged")


@pytest.mark.parametrize(("name", "target"), [(name, TARGETS[i % 2]) for i, name in enumerate(FUNCTIONS)])
def test_equals_jit(name: str, target: str) -> None:
    v = jnp.arange(7, dtype=jnp.float32)
    got = megakernelize(FUNCTIONS[name], target=target)(v)
    want = quick_jit(FUNCTIONS[name])(v)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
