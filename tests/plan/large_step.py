"""One decode step of a large decoder in plain JAX: only shapes, no weights, no device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Params = Any
Cache = tuple[tuple[jax.Array, jax.Array], ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; the defaults are those of a model of eight billion parameters.

    Attributes:
      layers, width, heads, kv_heads, head_dim, ffn, vocab: as usual.
      cache: positions.
      time_axis: whether attention keeps an axis of new positions (of extent 1), as code does that also reads prompts.
    """

    layers: int = 36
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    ffn: int = 12288
    vocab: int = 151_936
    cache: int = 1024
    time_axis: bool = False

    def avals(self) -> tuple[Params, Cache, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Abstract parameters (bf16), cache (bf16), token (s32[1]) and position (s32)."""

        def bf16(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "norm": bf16(self.width),
            "q": bf16(self.width, queries),
            "k": bf16(self.width, keys),
            "v": bf16(self.width, keys),
            "q_norm": bf16(self.head_dim),
            "k_norm": bf16(self.head_dim),
            "out": bf16(queries, self.width),
            "ffn_norm": bf16(self.width),
            "gate": bf16(self.width, self.ffn),
            "up": bf16(self.width, self.ffn),
            "down": bf16(self.ffn, self.width),
        }
        params = {
            "embed": bf16(self.vocab, self.width),
            "layers": [layer] * self.layers,
            "norm": bf16(self.width),
            "head": bf16(self.width, self.vocab),
        }
        rows = bf16(1, self.cache, self.kv_heads, self.head_dim)
        cache = tuple((rows, rows) for _ in range(self.layers))
        return params, cache, jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def step(self) -> Callable[..., tuple[jax.Array, Cache]]:
        """(params, cache, token, pos) to (next token, cache); greedy."""

        def step(params: Params, cache: Cache, token: jax.Array, pos: jax.Array) -> tuple[jax.Array, Cache]:
            x = params["embed"][token]
            written = []
            for p, layer_cache in zip(params["layers"], cache, strict=True):
                attended, layer_cache = self._attention(p, rms_norm(x, p["norm"]), layer_cache, pos)
                x = x + attended
                h = rms_norm(x, p["ffn_norm"])
                x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
                written.append(layer_cache)
            logits = jnp.dot(rms_norm(x, params["norm"]), params["head"], preferred_element_type=jnp.float32)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), tuple(written)

        return step

    def _attention(
        self, p: Params, h: jax.Array, cache: tuple[jax.Array, jax.Array], pos: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        groups = self.heads // self.kv_heads
        q = (h @ p["q"]).reshape(1, self.heads, self.head_dim)
        k = (h @ p["k"]).reshape(1, self.kv_heads, self.head_dim)
        v = (h @ p["v"]).reshape(1, 1, self.kv_heads, self.head_dim)
        q = rotate(rms_norm(q, p["q_norm"]), pos).reshape(1, self.kv_heads, groups, self.head_dim)
        k = rotate(rms_norm(k, p["k_norm"]), pos)
        keys = lax.dynamic_update_slice(cache[0], k[:, None], (0, pos, 0, 0))
        values = lax.dynamic_update_slice(cache[1], v, (0, pos, 0, 0))
        if self.time_axis:
            scores = jnp.einsum("btkgd,bskd->bkgts", q[:, None], keys, preferred_element_type=jnp.float32)
            visible = jnp.arange(self.cache)[None, :] <= pos + jnp.arange(1)[:, None]
            scores = jnp.where(visible, scores * self.head_dim**-0.5, -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
            out = jnp.einsum("bkgts,bskd->btkgd", weights, values).reshape(1, -1)
        else:
            scores = jnp.einsum("bkgd,bskd->bkgs", q, keys, preferred_element_type=jnp.float32)
            scores = jnp.where(jnp.arange(self.cache) <= pos, scores * self.head_dim**-0.5, -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
            out = jnp.einsum("bkgs,bskd->bkgd", weights, values).reshape(1, -1)
        return out @ p["out"], (keys, values)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


def rotate(x: jax.Array, pos: jax.Array) -> jax.Array:
    """Rotary embedding of [1, heads, head_dim] at one position."""
    half = x.shape[-1] // 2
    angle = pos.astype(jnp.float32) * 1e6 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
