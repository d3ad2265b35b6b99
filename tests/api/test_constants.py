"""Arrays that a function closes over keep the values of the first call, as in jax.jit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import megakernelize
from tests.api.support import assert_same, integers, pointer


@pytest.fixture(params=[megakernelize, jax.jit], ids=["megakernelize", "jit"])
def compiler(request):
    return request.param


def test_numpy_array_that_changes(compiler) -> None:
    table = np.ones(3000, np.float32)
    f = compiler(lambda x: (x + table).sum())
    assert f(1.0) == 6000
    table[:] = 5
    assert f(1.0) == 6000
    assert f(jnp.ones(3000)) == 18000  # another trace
    assert f(1.0) == 6000


def test_numpy_array_is_copied_once() -> None:
    table = np.ones(3000, np.float32)
    f = megakernelize(lambda x: (x + table).sum())
    entries = [f._site.lower((x,), {})[1] for x in (1.0, np.float32(1), jnp.ones(3000))]
    assert len({pointer(entry.consts[0]) for entry in entries}) == 1


@pytest.mark.parametrize("make", [jnp.ones, lambda n: np.ones(n, np.float32)], ids=["jax", "numpy"])
def test_global_that_is_bound_anew(compiler, make) -> None:
    weights = make(3000)
    f = compiler(lambda x: (x * weights).sum())
    x = jnp.ones(3000)
    assert [f(x) for _ in range(3)] == [3000] * 3
    weights = weights * 2
    assert f(x) == 3000
    for _ in range(2):
        jax.clear_caches()
        assert [f(x) for _ in range(3)] == [6000] * 3


def test_constant_made_anew_in_every_trace(compiler) -> None:
    f = compiler(lambda x: (x * np.tri(100, dtype=np.float32)).sum())
    g = compiler(lambda x: (x * jax.device_put(np.tri(100, dtype=np.float32))).sum())
    x = jnp.ones((100, 100))
    for h in (f, g):
        assert [h(x) for _ in range(3)] == [5050] * 3
        jax.clear_caches()
        assert [h(x) for _ in range(3)] == [5050] * 3
    with jax.checking_leaks():
        assert [g(x) for _ in range(2)] == [5050] * 2


def test_array_is_not_copied() -> None:
    w = integers(0, 64, 64)
    _, entry, *_ = megakernelize(lambda x: x @ w)._site.lower((w,), {})
    assert pointer(entry.consts[0]) == pointer(w)


@pytest.mark.parametrize("spend", [lambda w: w.delete(), jax.jit(lambda w: w + 1, donate_argnums=0)])
def test_array_deleted_or_donated_later(compiler, spend) -> None:
    w, key, scalar = jnp.ones((64, 64)), jax.random.key(3), jax.jit(lambda: 2.0)()
    f = compiler(lambda x: x * scalar + w.sum() + jax.random.bits(key))
    expected = f(1.0)
    for x in (w, scalar):
        spend(x)
    jax.random.key_data(key).delete()
    _ = [jnp.zeros((64, 64)) + i for i in range(4)]  # would get the memory if it were free
    assert_same(f(1.0), expected)


def test_donated_argument_that_is_closed_over(compiler) -> None:
    w = jnp.ones((64, 64))
    f = compiler(lambda a: (a.at[0].set(3.0), w.sum()), donate_argnums=0)
    for a in (w, jnp.ones((64, 64))):
        updated, total = f(a)
        assert total == 4096
        np.testing.assert_array_equal(updated, jnp.ones((64, 64)).at[0].set(3.0))


def test_committed_constant_decides_no_device(compiler) -> None:
    devices = jax.devices()
    for w in (jax.device_put(jnp.ones(3000), devices[1]), np.ones(3000, np.float32), jnp.ones(3000)):
        f = compiler(functools.partial(lambda w, x: x + w.sum(), w))
        result = f(1.0)
        assert result.devices() == {devices[0]} and not result.committed
        result = f(jax.device_put(1.0, devices[2]))
        assert result.devices() == {devices[2]} and result.committed and result == 3001


def test_transfer_guard(compiler) -> None:
    table, w = np.ones(3000, np.float32), jnp.ones(3000)
    f = compiler(lambda x: x + table.sum() + w.sum())
    x = jnp.ones(3)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            result = f(x)
    np.testing.assert_array_equal(result, np.full(3, 6001))
