"""on_unsupported="split": megakernels for what can be compiled, XLA for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk import megakernelize
from tests.api.support import assert_same, integers, operations, pointer


def unsupported(x):
    """Something that no rule lowers."""
    return jnp.linalg.eigvalsh(x @ x.T)


def kernels(f, *args) -> int:
    return operations(f.lower(*args).compile()).count("custom-call")


X = integers(0, 4, 4)


def test_refused_without_split() -> None:
    with pytest.raises(jax_mpk.UnsupportedPrimitiveError, match="eigh"):
        megakernelize(unsupported)(X)


def test_equal_results_with_as_few_kernels_as_possible() -> None:
    def f(x, y):
        a = x + y  # first island, all of it
        b = y * 2
        c = unsupported(a) * 0 + a  # XLA, then the second island
        d = jnp.sort(b) + 1
        return c + d, b, d.sum()

    split = megakernelize(f, on_unsupported="split")
    y = integers(1, 4, 4)
    expected = jax.jit(f)(X, y)
    assert_same(split(X, y), expected)
    assert_same(jax.jit(split)(X, y), expected)
    lowered = split.lower(X, y)
    assert len(lowered.kernels) == 2
    assert lowered.as_text().count("@jax_mpk_cpu") == 2
    with pytest.raises(ValueError, match="2 megakernels"):
        _ = lowered.plan
    text = split.explain(X, y)
    assert "2 custom calls" in text and "left to XLA" in text and "eigh" in text


def test_whole_function_is_one_kernel() -> None:
    f = megakernelize(lambda x: (x @ x).sum(), on_unsupported="split")
    assert_same(f(X), (X @ X).sum())
    assert len(f.lower(X).kernels) == 1


def test_function_without_anything_to_compile() -> None:
    f = megakernelize(lambda x: jnp.linalg.svd(x, compute_uv=False), on_unsupported="split")
    assert not f.lower(X).kernels
    np.testing.assert_array_equal(f(X), jnp.linalg.svd(X, compute_uv=False))


def test_inside_loops_and_branches() -> None:
    def f(x, n):
        def body(c, _):
            return jnp.clip(c @ x, -5, 5) + unsupported(c) * 0, c[0]

        x, rows = jax.lax.scan(body, x, None, length=3)
        x = jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c + 1 + unsupported(c) * 0, x)
        return jax.lax.cond(n > 0, lambda x: unsupported(x) * 0 + x, lambda x: x * 2, x), rows

    split = megakernelize(f, on_unsupported="split")
    for n in (0, 1):
        assert_same(split(X, n), jax.jit(f)(X, n))
    assert len(split.lower(X, 1).kernels) >= 3


def test_under_transformations() -> None:
    def f(x):
        return (unsupported(x + 1) * 0 + x).sum(0)

    split = megakernelize(f, on_unsupported="split")
    batch = jnp.stack([X, X + 1])
    np.testing.assert_array_equal(jax.vmap(split)(batch), jax.vmap(f)(batch))
    np.testing.assert_array_equal(jax.jit(jax.vmap(split))(batch), jax.vmap(f)(batch))
    assert_same(jax.lax.scan(lambda c, x: (c, split(x)), 0.0, batch)[1], jax.vmap(f)(batch))


def test_donation_across_islands() -> None:
    def f(cache, x):
        factor = unsupported(x) * 0 + x
        return cache.at[0].set(factor[0]), cache.sum()

    cache = integers(1, 8, 4)
    expected = jax.jit(f)(cache, X)
    split = megakernelize(f, on_unsupported="split", donate_argnums=0)
    where = pointer(cache)
    result = split(cache, X)
    assert_same(result, expected)
    assert cache.is_deleted() and pointer(result[0]) == where


def test_side_effects_keep_their_order(capfd) -> None:
    def f(x):
        jax.debug.print("first {}", x[0, 0], ordered=True)
        y = x + 1
        jax.debug.print("second {}", y[0, 0], ordered=True)
        return y

    split = megakernelize(f, on_unsupported="split")
    result = split(X)
    jax.effects_barrier()
    assert_same(result, X + 1)
    out = capfd.readouterr().out
    assert out.index("first") < out.index("second")


def test_unsupported_element_types() -> None:
    def f(x):
        z = x.astype(jnp.complex64) * 2j
        return z, jnp.abs(x) + 1, (z * 2).imag + 1

    assert_same(megakernelize(f, on_unsupported="split")(X), jax.jit(f)(X))
