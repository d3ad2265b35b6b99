"""Shapes of public models, values for their weights, and the bytes that a decode step must read.

Random weights are a function of a parameter's path and of the index alone, in integer arithmetic and one rounding.
Every framework can make the same ones where they are needed, so its answers can be compared with those of the others.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.decoder import Cache, Decoder, DecoderConfig
from models.rope import Llama3Rope

_BF16 = functools.partial(DecoderConfig, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
_QWEN3 = functools.partial(
    _BF16,
    vocab_size=151_936,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    rms_eps=1e-6,
    max_positions=40_960,
    qk_norm=True,
)

SHAPES: dict[str, DecoderConfig] = {
    # For tests: everything that the others have, in no time.
    "tiny": _BF16(
        vocab_size=517,
        hidden_size=64,
        intermediate_size=160,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        qk_norm=True,
        tie_embeddings=False,
    ),
    "llama-3.2-1b": _BF16(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rope_theta=5e5,
        rope_scaling=Llama3Rope(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
        rms_eps=1e-5,
        max_positions=131_072,
    ),
    "qwen3-0.6b": _QWEN3(hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16),
    "qwen3-1.7b": _QWEN3(hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16),
    "qwen3-4b": _QWEN3(hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32),
    "qwen3-8b": _QWEN3(hidden_size=4096, intermediate_size=12_288, num_layers=36, num_heads=32, tie_embeddings=False),
}


def step_bytes(config: DecoderConfig, batch: int, positions: Iterable[int]) -> float:
    """Bytes that a decode step must read: each matrix once, of the embeddings at most the head, and the live cache.

    Args:
        config: the model; its numbers take two bytes each.
        batch: sequences, all at the same position.
        positions: of the token that each step reads, counted from 0.

    Returns:
        The mean over the steps.
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, layers = config.hidden_size, config.num_layers
    layer = (q + 2 * kv) * hidden + q * hidden + 3 * config.intermediate_size * hidden
    weights = 2 * (layers * layer + config.vocab_size * hidden)
    live = [position + 1 for position in positions]
    return weights + batch * 2 * 2 * layers * kv * sum(live) / len(live)


def random_params(config: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """A decoder as `nnx.split` would give it, with random weights that never exist in another dtype."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    filled = [
        (path, leaf.replace(random_weight(".".join(map(str, path)), leaf.shape)))
        for path, leaf in nnx.to_flat_state(abstract)
    ]
    return graphdef, nnx.from_flat_state(filled)


def random_weight(path: str, shape: tuple[int, ...]) -> jax.Array:
    """bf16 weights: a norm's scale around 1, a matrix such that its products have about unit variance."""
    if path.endswith("scale"):
        return _values(path, shape, 1.0, 0.25)
    inputs = shape[1] if path.endswith("embedding") else shape[0]
    return _values(path, shape, 0.0, math.sqrt(3 / inputs))


def random_cache(config: DecoderConfig, batch: int, cache_len: int) -> Cache:
    """A cache as `init_cache` makes it, of unit variance as keys and values have."""
    shape = (batch, cache_len, config.num_kv_heads, config.head_dim)

    def make(layer: int, name: str) -> jax.Array:
        return _values(f"cache.{layer}.{name}", shape, 0.0, math.sqrt(3))

    return tuple((make(layer, "keys"), make(layer, "values")) for layer in range(config.num_layers))


def first_tokens(config: DecoderConfig, batch: int) -> np.ndarray:
    """Tokens for the first step to read, int32[batch]."""
    return ((np.arange(batch) * 7919 + 1) % config.vocab_size).astype(np.int32)


def _values(path: str, shape: tuple[int, ...], middle: float, reach: float) -> jax.Array:
    """bf16 values between middle - reach and middle + reach; `torch_decoder.random_values` makes the same ones."""
    return _hashed(shape, np.uint32(zlib.crc32(path.encode())), np.float32(middle), np.float32(reach))


@functools.partial(jax.jit, static_argnums=0)
def _hashed(shape: tuple[int, ...], seed: jax.Array, middle: jax.Array, reach: jax.Array) -> jax.Array:
    bits = jnp.arange(math.prod(shape), dtype=jnp.uint32) * jnp.uint32(0x9E3779B1) + seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    # Of 256 values: exact in f32, so that only the product and the conversion round.
    unit = ((bits >> 24).astype(jnp.float32) - 127.5) / 128
    return (middle + unit * reach).astype(jnp.bfloat16).reshape(shape)


def with_dtype(config: DecoderConfig, dtype: jax.typing.DTypeLike) -> DecoderConfig:
    """The same model and weights with activations and cache in another dtype."""
    return dataclasses.replace(config, dtype=dtype)
