"""Buffers of donated arguments are reused, and nothing else is overwritten."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import megakernelize
from tests.api.support import assert_same, integers, operations, pointer


def write(cache, row, pos):
    """A KV cache of one layer: writes a row, then reads all."""
    cache = jax.lax.dynamic_update_slice(cache, row[None], (pos, 0))
    return cache, (cache * jnp.arange(cache.shape[0], dtype=cache.dtype)[:, None]).sum(0)


def fresh() -> jax.Array:
    return integers(0, 16, 8)


ROW = integers(1, 8)
in_place = megakernelize(write, donate_argnums=0)


def test_eager_call_updates_in_place() -> None:
    cache = fresh()
    expected = jax.jit(write)(cache, ROW, 3)
    where = pointer(cache)
    result = in_place(cache, ROW, 3)
    assert cache.is_deleted()
    assert pointer(result[0]) == where
    assert_same(result, expected)


def test_many_steps_stay_in_place() -> None:
    cache = fresh()
    where = pointer(cache)
    for pos in range(16):
        cache, _ = in_place(cache, ROW + pos, pos)
    assert pointer(cache) == where
    assert_same(cache, ROW + jnp.arange(16.0)[:, None])


def test_donation_by_name_and_of_a_pytree() -> None:
    def f(caches, x):
        return {k: v.at[0].set(x) for k, v in caches.items()}

    caches = {name: integers(i, 4) for i, name in enumerate("abc")}
    where = {k: pointer(v) for k, v in caches.items()}
    result = megakernelize(f, donate_argnames="caches")(caches=caches, x=7.0)
    assert {k: pointer(v) for k, v in result.items()} == where


def test_under_jit() -> None:
    outer = jax.jit(in_place, donate_argnums=0)
    cache = fresh()
    expected = jax.jit(write)(cache, ROW, 3)
    where = pointer(cache)
    result = outer(cache, ROW, 3)
    assert pointer(result[0]) == where
    assert_same(result, expected)
    assert operations(outer.lower(fresh(), ROW, 3).compile()) == ["custom-call"]


def test_lowered_and_compiled_ahead_of_time() -> None:
    compiled = in_place.lower(fresh(), ROW, 3).compile()
    assert operations(compiled) == ["custom-call"]
    cache = fresh()
    where = pointer(cache)
    result, _ = compiled(cache, ROW, 3)
    assert pointer(result) == where and cache.is_deleted()


def test_scan_carry() -> None:
    def run(f, cache):
        return jax.lax.scan(lambda c, pos: f(c, ROW + pos, pos), cache, jnp.arange(16))

    loop = jax.jit(run, static_argnums=0, donate_argnums=1)
    cache = fresh()
    expected = jax.jit(run, static_argnums=0)(write, cache)
    where = pointer(cache)
    result = loop(in_place, cache)
    assert pointer(result[0]) == where
    assert_same(result, expected)
    # XLA copies its loop counter, but not the cache.
    assert not re.search(r"f32\[16,8\]\S* copy\(", loop.lower(in_place, fresh()).compile().as_text())


def test_caller_that_does_not_donate_keeps_its_array() -> None:
    cache = fresh()
    kept = np.array(cache)
    outer = jax.jit(in_place)
    assert_same(outer(cache, ROW, 3), jax.jit(write)(cache, ROW, 3))
    np.testing.assert_array_equal(cache, kept)
    # The caller reads it after the call.
    assert_same(jax.jit(lambda c: (in_place(c, ROW, 3), c * 2))(cache), (jax.jit(write)(cache, ROW, 3), cache * 2))
    # Nothing is donated without being asked for.
    assert_same(megakernelize(write)(cache, ROW, 3), jax.jit(write)(cache, ROW, 3))
    np.testing.assert_array_equal(cache, kept)


@pytest.mark.cpu
@pytest.mark.parametrize("view", [np.asarray, np.from_dlpack])
def test_memory_that_numpy_sees_is_not_overwritten(view) -> None:
    cache = fresh()
    seen, kept = view(cache), np.array(cache)
    assert_same(in_place(cache, ROW, 3), jax.jit(write)(jnp.asarray(kept), ROW, 3))
    np.testing.assert_array_equal(seen, kept)

    array = np.array(kept)
    in_place(jnp.asarray(array), ROW, 3)
    in_place(array, ROW, 3)
    np.testing.assert_array_equal(array, kept)


def test_donated_input_read_after_its_update() -> None:
    def f(cache, row, pos):
        new, total = write(cache, row, pos)
        return new, total, cache.sum(0), cache[pos] - new[pos]

    cache = fresh()
    expected = jax.jit(f)(cache, ROW, 3)
    assert_same(megakernelize(f, donate_argnums=0)(cache, ROW, 3), expected)


def test_donated_input_returned_unchanged() -> None:
    def f(cache, row):
        return cache, cache + row

    cache = fresh()
    expected = jax.jit(f)(cache, ROW)
    assert_same(megakernelize(f, donate_argnums=0)(cache, ROW), expected)


def test_input_returned_unchanged() -> None:
    x = fresh()
    f = megakernelize(lambda x: (x, x, x + 1))
    assert_same(f(x), (x, x, x + 1))
    x.delete()
    y = fresh()
    first, second, _ = f(y)
    y.delete()
    assert_same(first, second)


def test_same_array_twice() -> None:
    x = fresh()
    f = megakernelize(lambda a, b: (a.at[0].set(b[1]), b + a))
    assert_same(f(x, x), jax.jit(lambda a, b: (a.at[0].set(b[1]), b + a))(x, x))

    def swap(a, b):
        return a.at[0].add(1.0), b.at[1].add(1.0)

    for argnums in (0, (0, 1)):
        with pytest.raises(Exception, match=r"[Dd]onate"):
            jax.jit(swap, donate_argnums=argnums)(x, x)
        with pytest.raises(Exception, match=r"[Dd]onate"):
            megakernelize(swap, donate_argnums=argnums)(x, x)
        x = fresh()
    # Under an outer jit that donates nothing, one array may stand for both.
    assert_same(jax.jit(megakernelize(swap, donate_argnums=(0, 1)))(x, x), swap(x, x))


def test_results_in_another_order_than_donated_arguments() -> None:
    def f(a, b, c, x):
        return c.at[0].set(x), x, a.at[1].set(x), b.at[2].set(x)

    step = megakernelize(f, donate_argnums=(0, 1, 2))
    args = [integers(i, 4) for i in range(3)]
    expected = jax.jit(f)(*args, 7.0)
    where = [pointer(a) for a in args]
    compiled = step.lower(*args, 7.0).compile()
    assert operations(compiled) == ["custom-call"]
    result = step(*args, 7.0)
    assert_same(result, expected)
    assert [pointer(result[i]) for i in (2, 3, 0)] == where
    args = [integers(i, 4) for i in range(3)]
    assert_same(compiled(*args, 7.0), expected)
    assert jax.tree.structure(compiled.out_info) == jax.tree.structure(result)


def test_results_in_another_order_in_every_call() -> None:
    def f(a, b, c, key):
        return (b.at[0].set(1), a.at[0].set(2)), jax.random.fold_in(key, 0), c.sum(keepdims=True)

    def arguments(*shape: int):
        return *(integers(i, *shape) for i in range(3)), jax.random.key(0)

    expected = jax.jit(f)(*arguments(8))
    step = megakernelize(f, donate_argnums=(0, 1))
    turned = lambda a, b, c, key: (f(a, b, c, key), c[::-1])  # noqa: E731
    other = megakernelize(turned, donate_argnums=(0, 1, 2))
    compiled = step.lower(*arguments(8)).compile()
    rows = [jnp.stack([x, x + 1]) for x in arguments(8)[:3]]
    vmapped = jax.vmap(f, (0, 0, 0, None))(*rows, jax.random.key(0))
    for _ in range(3):
        assert_same(step(*arguments(8)), expected)
        args = arguments(8)
        assert_same(other(*args), turned(*arguments(8)))
        assert args[2].is_deleted()
        assert_same(compiled(*arguments(8)), expected)
        donated = [jnp.copy(x) for x in rows]
        assert_same(jax.vmap(step, (0, 0, 0, None))(*donated, jax.random.key(0)), vmapped)


def test_update_that_swaps_two_caches() -> None:
    def f(a, b):
        return b.at[0].set(1.0), a.at[0].set(2.0)

    a, b = integers(0, 8), integers(1, 8)
    expected = jax.jit(f)(a, b)
    assert_same(megakernelize(f, donate_argnums=(0, 1))(a, b), expected)

    a, b = integers(0, 8), integers(1, 8)
    assert_same(megakernelize(lambda a, b: (b, a), donate_argnums=(0, 1))(a, b), (integers(1, 8), integers(0, 8)))


def test_vmap_with_batched_and_unbatched_cache() -> None:
    rows = jnp.stack([ROW, ROW + 1, ROW + 2])
    expected = jax.vmap(write, (None, 0, None))(fresh(), rows, 3)
    cache = fresh()
    kept = np.array(cache)
    assert_same(jax.vmap(in_place, (None, 0, None))(cache, rows, 3), expected)
    np.testing.assert_array_equal(cache, kept)
    assert_same(jax.jit(jax.vmap(in_place, (None, 0, None)))(fresh(), rows, 3), expected)

    caches = jnp.stack([fresh(), fresh() + 1, fresh() + 2])
    positions = jnp.array([0, 15, 99])
    expected = jax.jit(jax.vmap(write))(caches, rows, positions)
    batched = jax.jit(jax.vmap(in_place), donate_argnums=0)
    where = pointer(caches)
    result = batched(caches, rows, positions)
    assert_same(result, expected)
    assert pointer(result[0]) == where


def test_vmap_where_the_cache_stays_unbatched() -> None:
    def f(cache, x):
        return cache.at[0].add(1.0), cache.sum() + x

    expected = jax.vmap(f, (None, 0), (None, 0))(fresh(), ROW)
    assert_same(jax.vmap(megakernelize(f, donate_argnums=0), (None, 0), (None, 0))(fresh(), ROW), expected)


def test_unusable_donation_warns() -> None:
    with pytest.warns(UserWarning, match=r"donated buffers were not usable: .*\[16,8\]") as caught:
        x = fresh()
        megakernelize(lambda x: x.sum(), donate_argnums=0)(x)
    assert not x.is_deleted()
    assert caught[0].filename == __file__


def test_other_shapes_donate_otherwise() -> None:
    def f(a, b):
        return a.at[0].set(0.0) + 0 * b.sum() if a.shape == b.shape else a[:2] + b.sum()

    step = megakernelize(f, donate_argnums=0)
    a, b = integers(0, 4), integers(1, 4)
    assert_same(step(a, b), a.at[0].set(0.0) if not a.is_deleted() else integers(0, 4).at[0].set(0.0))
    a = integers(0, 6)
    with pytest.warns(UserWarning, match="not usable"):
        assert_same(step(a, b), a[:2] + b.sum())
    assert not a.is_deleted()
    for _ in range(2):
        a = integers(0, 4)
        where = pointer(a)
        assert pointer(step(a, b)) == where


def test_donated_buffer_that_the_plan_does_not_take_over() -> None:
    square = megakernelize(lambda a: a @ a, donate_argnums=0)
    expected = fresh()[:8] @ fresh()[:8]
    for x in (fresh()[:8], fresh()[:8]):
        assert_same(square(x), expected)
        assert x.is_deleted()
    assert_same(square(np.asarray(fresh()[:8])), expected)
    # Neither when it is compiled ahead of time, nor batched.
    compiled = square.lower(fresh()[:8]).compile()
    x = fresh()[:8]
    assert_same(compiled(x), expected)
    assert x.is_deleted()
    named = megakernelize(lambda n, *, a, b: (a @ b * n, b), static_argnums=0, donate_argnames="a")
    a, b = fresh()[:8], fresh()[:8]
    named.lower(1, a=a, b=b).compile()(b=b, a=a)
    assert a.is_deleted() and not b.is_deleted()
    rows = jnp.stack([fresh()[:8]] * 2)
    assert_same(jax.vmap(square)(rows), jnp.stack([expected] * 2))
    assert rows.is_deleted()

    # A result that is the argument itself stays.
    for how in ("error", "split"):
        same = megakernelize(lambda a, b: (b, a, a @ b), donate_argnums=(0, 1), on_unsupported=how)
        assert_same(same(fresh()[:8], fresh()[:8]), (fresh()[:8], fresh()[:8], expected))
        compiled = same.lower(fresh()[:8], fresh()[:8]).compile()
        assert_same(compiled(fresh()[:8], fresh()[:8]), (fresh()[:8], fresh()[:8], expected))
