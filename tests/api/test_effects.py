"""Functions with side effects are refused, or split; an effect is never dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import jax_mpk
from jax_mpk import megakernelize

log: list[float] = []
X = jnp.arange(1.0, 5.0)


def record(value) -> None:
    log.append(float(value))


def callback(x) -> None:
    io_callback(record, None, x[0])


def ordered_callback(x) -> None:
    io_callback(record, None, x[0], ordered=True)


def debug_callback(x) -> None:
    jax.debug.callback(record, x[0])


def in_a_loop(x) -> None:
    jax.lax.fori_loop(0, 1, lambda i, c: (callback(x), c)[1], 0)


def in_a_branch(x) -> None:
    jax.lax.cond(x[0] > 0, callback, lambda x: None, x)


CALLERS = {
    "eager": lambda f: f(X),
    "jit": lambda f: jax.jit(f)(X),
    "jit, no result used": lambda f: jax.jit(lambda x: (f(x), x)[1])(X),
    "scan": lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0, X[None]),
    "lower": lambda f: f.lower(X).compile()(X),
    "trace": lambda f: f.trace(X).lower().compile()(X),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("f", [callback, ordered_callback, debug_callback, in_a_loop, in_a_branch])
def test_callback_without_results(f, caller) -> None:
    name = "debug_callback" if f is debug_callback else "io_callback"
    with pytest.raises(jax_mpk.UnsupportedPrimitiveError, match=rf"`{name}`.*side effect(.|\n)*test_effects\.py:\d+"):
        CALLERS[caller](megakernelize(f))
    log.clear()
    CALLERS[caller](megakernelize(f, on_unsupported="split"))
    jax.effects_barrier()
    assert log == [1.0]


@pytest.mark.parametrize("f", [callback, debug_callback])
def test_callback_under_vmap(f) -> None:
    rows = jnp.stack([X, X + 1])
    with pytest.raises(jax_mpk.UnsupportedPrimitiveError, match="side effect"):
        jax.vmap(megakernelize(f))(rows)
    log.clear()
    jax.vmap(megakernelize(f, on_unsupported="split"))(rows)
    jax.effects_barrier()
    assert sorted(log) == [1.0, 2.0]


CLOSED_OVER = jax.new_ref(jnp.zeros(4))


def write(ref, x) -> None:
    ref[...] = x * 2


def write_and_return(ref, x):
    ref[...] = x * 2
    return x + 1


def write_closed_over(ref, x) -> None:
    CLOSED_OVER[...] = x * 2


def write_closed_over_and_return(ref, x):
    CLOSED_OVER[...] = x * 2
    return x + 1


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("f", [write, write_and_return, write_closed_over, write_closed_over_and_return])
def test_references(f, outer) -> None:
    ref = jax.new_ref(jnp.zeros(4))
    CLOSED_OVER[...] = jnp.zeros(4)
    with pytest.raises(jax_mpk.UnsupportedPrimitiveError, match=r"swap(.|\n)*test_effects\.py:\d+"):
        outer(megakernelize(f))(ref, X)
    written = CLOSED_OVER if "closed" in f.__name__ else ref
    np.testing.assert_array_equal(written[...], jnp.zeros(4))
    outer(megakernelize(f, on_unsupported="split"))(ref, X)
    np.testing.assert_array_equal(written[...], X * 2)


def test_unused_reference() -> None:
    np.testing.assert_array_equal(megakernelize(lambda ref, x: x + 1)(jax.new_ref(X), X), X + 1)
