"""The same attention of one new position over a cache, spelled in many ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights
from jax import lax

Array = jax.Array
#: Called with queries [batch, kv_heads, group, head_dim], keys and values [batch, cache, kv_heads, head_dim] and which
#: keys are visible, bool[cache]; returns [batch, heads · head_dim] in any order of heads.
Attend = Callable[[Array, Array, Array, Array], Array]
FORMS: dict[str, Attend] = {}


def form(f: Attend) -> Attend:
    FORMS[f.__name__] = f
    return f


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one attention block; the defaults are small."""

    batch: int = 1
    width: int = 32
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    cache: int = 128
    dtype: Any = jnp.float32

    def avals(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Input, four projections, keys, values and position."""

        def of(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, self.dtype)

        narrow = self.kv_heads * self.head_dim
        wide = narrow * self.group
        rows = of(self.batch, self.cache, self.kv_heads, self.head_dim)
        projections = of(self.width, wide), of(self.width, narrow), of(self.width, narrow), of(wide, self.width)
        return of(self.batch, self.width), *projections, rows, rows, jax.ShapeDtypeStruct((), jnp.int32)

    def block(self, attend: Attend) -> Callable[..., tuple[Array, Array, Array]]:
        """Projections, cache update, attention and output projection."""

        def block(
            x: Array, wq: Array, wk: Array, wv: Array, wo: Array, keys: Array, values: Array, pos: Array
        ) -> tuple[Array, Array, Array]:
            row = self.batch, 1, self.kv_heads, self.head_dim
            q = (x @ wq).reshape(self.batch, self.kv_heads, self.group, self.head_dim)
            keys = lax.dynamic_update_slice(keys, (x @ wk).reshape(row), (0, pos, 0, 0))
            values = lax.dynamic_update_slice(values, (x @ wv).reshape(row), (0, pos, 0, 0))
            out = attend(q, keys, values, jnp.arange(self.cache) <= pos)
            return out.reshape(self.batch, -1).astype(x.dtype) @ wo, keys, values

        return block


def scaled(q: Array) -> Array:
    return q * q.shape[-1] ** -0.5


def heads(q: Array) -> Array:
    """[batch, heads, head_dim]."""
    return q.reshape(q.shape[0], -1, q.shape[-1])


def masked(scores: Array, visible: Array) -> Array:
    return jnp.where(visible, scores, -jnp.inf)


@form
def grouped(q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = jnp.einsum("bkgd,bskd->bkgs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(masked(scores, visible), axis=-1).astype(v.dtype), v)


@form
def time_axis(q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = jnp.einsum("btkgd,bskd->bkgts", q[:, None], k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(masked(scores, visible[None, :]), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v)


@form
def keys_first(q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = jnp.einsum("bskd,bkgd->skbg", k, scaled(q))
    weights = jax.nn.softmax(masked(scores, visible[:, None, None, None]), axis=0)
    return jnp.einsum("bskd,skbg->bkgd", v, weights)


@form
def head_dim_first(q: Array, k: Array, v: Array, visible: Array) -> Array:
    weights = jax.nn.softmax(masked(jnp.einsum("bkgd,bskd->gbsk", scaled(q), k), visible[:, None]), axis=2)
    return jnp.einsum("gbsk,bskd->dbgk", weights, v).transpose(1, 3, 2, 0)


@form
def matmul(q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = jnp.matmul(scaled(q), k.transpose(0, 2, 3, 1))
    return jnp.matmul(jax.nn.softmax(masked(scores, visible)), v.transpose(0, 2, 1, 3))


@form
def matmul_of_new_positions(q: Array, k: Array, v: Array, visible: Array) -> Array:
    k, v = (jnp.repeat(a.swapaxes(1, 2), q.shape[2], axis=1) for a in (k, v))
    scores = heads(q)[:, :, None] @ k.swapaxes(-1, -2) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
    return (jax.nn.softmax(masked(scores, visible)) @ v).swapaxes(1, 2)


@form
def repeated_heads(q: Array, k: Array, v: Array, visible: Array) -> Array:
    k, v = (jnp.repeat(a, q.shape[2], axis=2) for a in (k, v))
    weights = jax.nn.softmax(masked(jnp.einsum("bhd,bshd->bhs", heads(scaled(q)), k), visible), axis=-1)
    return jnp.einsum("bhs,bshd->bhd", weights, v)


@form
def tiled_heads(q: Array, k: Array, v: Array, visible: Array) -> Array:
    k, v = (jnp.tile(a, (1, 1, q.shape[2], 1)) for a in (k, v))
    q = heads(scaled(q).swapaxes(1, 2))
    weights = jax.nn.softmax(masked(jnp.einsum("bhd,bshd->bhs", q, k), visible), axis=-1)
    return jnp.einsum("bhs,bshd->bhd", weights, v)


@form
def broadcast_heads(q: Array, k: Array, v: Array, visible: Array) -> Array:
    b, s, n, d = k.shape
    k, v = (jnp.broadcast_to(a[:, :, :, None], (b, s, n, q.shape[2], d)).reshape(b, s, -1, d) for a in (k, v))
    weights = jax.nn.softmax(masked(jnp.einsum("bhd,bshd->bhs", heads(scaled(q)), k), visible), axis=-1)
    return jnp.einsum("bhs,bshd->bhd", weights, v)


@form
def library(q: Array, k: Array, v: Array, visible: Array) -> Array:
    return jax.nn.dot_product_attention(heads(q)[:, None], k, v, mask=visible[None, None, None])


@form
def library_with_bias(q: Array, k: Array, v: Array, visible: Array) -> Array:
    bias = jnp.where(visible, 0.0, -1e9).astype(q.dtype)[None, None, None]
    return jax.nn.dot_product_attention(heads(q)[:, None], k, v, bias=bias)


@form
def library_with_lengths(q: Array, k: Array, v: Array, visible: Array) -> Array:
    lengths = jnp.full(q.shape[0], jnp.sum(visible, dtype=jnp.int32))
    return jax.nn.dot_product_attention(heads(q)[:, None], k, v, key_value_seq_lengths=lengths)


@form
def flax_attention(q: Array, k: Array, v: Array, visible: Array) -> Array:
    return nnx.dot_product_attention(heads(q)[:, None], k, v, mask=visible[None, None, None])


@form
def flax_weights(q: Array, k: Array, v: Array, visible: Array) -> Array:
    weights = dot_product_attention_weights(heads(q)[:, None], k, mask=visible[None, None, None])
    weights = weights.reshape(q.shape[0], k.shape[2], -1, 1, k.shape[1])
    return jnp.einsum("...hgqk,...khd->...qhgd", weights, v)


@form
def mask_added(q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = jnp.einsum("bkgd,bskd->bkgs", scaled(q), k)
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(scores + jnp.where(visible, 0.0, -1e9).astype(q.dtype)), v)


@form
def mask_of_every_head(q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = jnp.einsum("bkgd,bskd->bkgs", q, k)
    seen = jnp.broadcast_to(visible, scores.shape)
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min) / q.shape[-1] ** 0.5
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(scores), v)


@form
def scale_on_both(q: Array, k: Array, v: Array, visible: Array) -> Array:
    root = q.shape[-1] ** -0.25
    scores = jnp.einsum("bkgd,bskd->bkgs", q * root, k) * root
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(masked(scores, visible)), v)


@form
def capped(q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = 30 * jnp.tanh(jnp.einsum("bkgd,bskd->bkgs", scaled(q), k) / 30)
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(masked(scores, visible)), v)


@form
def by_hand(q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = masked(jnp.einsum("bkgd,bskd->bkgs", scaled(q), k).astype(jnp.float32), visible)
    powers = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return jnp.einsum("bkgs,bskd->bkgd", powers / jnp.sum(powers, axis=-1, keepdims=True), v.astype(jnp.float32))


@form
def by_hand_with_inverse(q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = masked(jnp.einsum("bkgd,bskd->bkgs", scaled(q), k).astype(jnp.float32), visible)
    powers = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = (powers * (1 / powers.sum(-1, keepdims=True))).astype(v.dtype)
    return jnp.einsum("bkgs,bskd->bkgd", weights, v)


@form
def divided_last(q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = masked(jnp.einsum("bkgd,bskd->bkgs", scaled(q), k).astype(jnp.float32), visible)
    powers = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.einsum("bkgs,bskd->bkgd", powers, v, preferred_element_type=jnp.float32)
    return out / powers.sum(-1, keepdims=True)


@form
def mapped_over_heads(q: Array, k: Array, v: Array, visible: Array) -> Array:
    def one(q: Array, k: Array, v: Array) -> Array:
        return jax.nn.softmax(masked(k @ scaled(q), visible)) @ v

    per_group = jax.vmap(one, in_axes=(0, None, None))
    per_head = jax.vmap(per_group, in_axes=(0, 1, 1))
    return jax.vmap(per_head)(q, k, v)
