"""Functions that random programs call: small users of JAX features that need a ``def`` of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_jvp
def halved(x: Any) -> Any:
    """A function with a derivative of its own."""
    return x * x.dtype.type(0.5)


@halved.defjvp
def _halved_jvp(primals: Any, tangents: Any) -> Any:
    return halved(*primals), halved(*tangents)


@jax.custom_vjp
def through(x: Any) -> Any:
    """A function with a transpose of its own."""
    return jnp.negative(x)


through.defvjp(lambda x: (through(x), None), lambda _, g: (g,))


def add_any(x: Any, y: Any) -> Any:
    """``x + y`` as differentiation adds cotangents."""
    _, transpose = jax.vjp(lambda v: (lax.neg(v), lax.neg(v)), x)
    return lax.neg(transpose((x, y))[0])


def bound(primitive: str, *args: Any, **params: Any) -> Any:
    """A primitive that no public function of this JAX leads to, or only together with others."""
    from jax._src.ad_checkpoint import name_p
    from jax._src.lax import lax as internal

    known = {"name": name_p}
    return (known.get(primitive) or getattr(internal, f"{primitive}_p")).bind(*args, **params)


def larger(a: Any, b: Any) -> Any:
    """The larger of two (value, position) pairs, the smaller position among equals: a generic reduction."""
    (x, i), (y, j) = a, b
    second = (y > x) | ((y == x) & (j < i))
    return lax.select(second, y, x), lax.select(second, j, i)


def largest(x: Any, start: Any, axes: tuple[int, ...]) -> Any:
    """The largest elements along axes and their positions in the whole array."""
    positions = lax.reshape(lax.iota(jnp.int32, x.size), x.shape)
    return lax.reduce((x, positions), (start, jnp.int32(-1)), larger, axes)


def flat(results: Any) -> tuple[Any, ...]:
    """The arrays of a nested result, in order."""
    return tuple(jax.tree.leaves(results))


def hashed(x: Any) -> Any:
    """The hash under JAX's random numbers, of an array's own elements."""
    from jax.extend.random import threefry2x32_p

    return threefry2x32_p.bind(x, x, x, x)[0]


def least(x: Any) -> Any:
    """The smallest value of an array's type (of bools the other one: their extremes have no primitive of their own)."""
    kind = x.dtype.type
    return kind(-jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype == bool or jnp.iinfo(x.dtype).min)


def most(x: Any) -> Any:
    """The largest value of an array's type; see :func:`least`."""
    kind = x.dtype.type
    return kind(jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype != bool and jnp.iinfo(x.dtype).max)


def pooled(x: Any) -> Any:
    """Max pooling over pairs in a row."""
    return lax.reduce_window(x, least(x), lax.max, (1, 2), (1, 1), "VALID")


def pooled_jvp(x: Any, t: Any) -> Any:
    """The derivative of :func:`pooled`."""
    return jax.jvp(pooled, [x], [t])[1]
