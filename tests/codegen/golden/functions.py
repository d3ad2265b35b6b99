"""Small functions, each for something that generated CUDA does. Their line numbers are in the golden files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Sample:
    """A function, what it is called with, and which of that is donated."""

    function: Callable[..., Any]
    avals: tuple[jax.ShapeDtypeStruct, ...]
    donated: frozenset[int] = frozenset()


SAMPLES: dict[str, Sample] = {}


def sample(*avals: jax.ShapeDtypeStruct, donated: tuple[int, ...] = ()) -> Callable[..., Any]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        SAMPLES[function.__name__] = Sample(function, avals, frozenset(donated))
        return function

    return register


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


AT = jax.ShapeDtypeStruct((), jnp.int32)


@sample(bf16(1, 1024), bf16(1024), bf16(3072, 1024), bf16(1024, 3072))
def streamed(x, scale, up, down):
    """Rows of weights through the ring: a recomputed norm, tagged hand-offs, long rows in parts, a residual."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    h = jax.nn.silu(jnp.einsum("bk,nk->bn", y.astype(x.dtype) * scale, up))
    return x + jnp.einsum("bk,nk->bn", h, down)


@sample(bf16(16, 1024), bf16(1024), bf16(3072, 1024), bf16(1024, 3072))
def matmul(x, scale, up, down):
    """The same with more rows of activations: tiles of weights for tensor cores, a norm in place of what it reads."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    h = jax.nn.silu(jnp.einsum("bk,nk->bn", y.astype(x.dtype) * scale, up))
    return x + jnp.einsum("bk,nk->bn", h, down)


@sample(
    bf16(1, 1024), bf16(1024, 1024), bf16(4, 64), bf16(4, 64), bf16(1024, 4, 64), bf16(1024, 4, 64), AT, donated=(4, 5)
)
def attention(x, w, k, v, keys, values, at):
    """One step over a cache: keys split over workers, copied by few warps while others wait for queries, and merged.

    New rows come before they are written, writes last.
    """
    q = jnp.einsum("bk,nk->bn", x, w)
    keys = lax.dynamic_update_slice(keys, k[None], (at, 0, 0))
    values = lax.dynamic_update_slice(values, v[None], (at, 0, 0))
    grouped = q.reshape(4, 4, 64)
    scores = jnp.einsum("hgd,thd->hgt", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.arange(1024) <= at, scores * 0.125, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("hgt,thd->hgd", weights, values, preferred_element_type=jnp.float32)
    return mixed.reshape(16, 64).astype(x.dtype), keys, values


@sample(bf16(64, 256), AT, donated=(0,))
def loop(table, token):
    """Rounds in one launch: a branch, an update in place, what all workers follow."""

    def body(i, carry):
        table, token = carry
        row = lax.cond(token % 2 == 0, lambda r: r * 2, lambda r: r + 1, table[token])
        table = lax.dynamic_update_slice(table, row[None], (i, 0))
        return table, jnp.argmax(row).astype(jnp.int32) % 64

    return lax.fori_loop(0, 8, body, (table, token))


@sample(bf16(1, 1024), bf16(1024), bf16(1024, 3072), bf16(3072, 1024))
def columns(x, scale, up, down):
    """Weights as JAX lays them out by default, read transposed: sums in parts, joined by who reads them next."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return x + jax.nn.silu((y.astype(x.dtype) * scale) @ up) @ down
