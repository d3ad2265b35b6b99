"""Llama-family decoder in Flax nnx with a static key/value cache.

One module covers Llama, SmolLM2, Qwen2, Qwen2.5 and Qwen3; they differ in `DecoderConfig` only.
Prefill and decode are the same forward pass over T tokens at positions pos .. pos + T - 1.

The module is used through pure functions, which is what JAX transformations want:

    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    prefill, decode_step = step_functions(graphdef)
    cache = init_cache(config, batch=1, cache_len=256)
    logits, cache = prefill(params, cache, tokens, length)
    logits, cache = decode_step(params, cache, next_tokens, length)

Attribute names follow the Hugging Face checkpoints, so that a tensor's name is its path here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from models.rope import RopeScaling, rotate, rotation

Scalar = jax.Array | int

LayerCache = tuple[jax.Array, jax.Array]
Cache = tuple[LayerCache, ...]
"""One (keys, values) pair per layer, each [batch, cache_len, num_kv_heads, head_dim]."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one decoder of the family from another.

    Attributes:
        vocab_size: rows of the token embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated feed-forward layer.
        num_layers: decoder layers.
        num_heads: query heads; a multiple of `num_kv_heads`.
        num_kv_heads: key and value heads.
        head_dim: size of a head, even.
        rope_theta: base of the rotary frequencies.
        rope_scaling: change of the rotary frequencies for long contexts, if any.
        rms_eps: added to the mean square in every norm.
        max_positions: context length the model was trained for, in positions.
        qk_norm: whether queries and keys are normalised per head before rotation (Qwen3).
        qkv_bias: whether the query, key and value projections have biases (Qwen2).
        output_bias: whether the attention's output projection has a bias.
        tie_embeddings: whether the head is the transposed token embedding.
        dtype: dtype of activations, matrix products and the cache.
        param_dtype: dtype in which the weights are stored.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_eps: float = 1e-5
    max_positions: int = 2048
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    tie_embeddings: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need pairs")


def init_cache(config: DecoderConfig, batch: int, cache_len: int) -> Cache:
    """Zeros for `cache_len` positions: per layer two [batch, cache_len, num_kv_heads, head_dim]."""
    shape = (batch, cache_len, config.num_kv_heads, config.head_dim)
    # Every array is its own buffer: a donated buffer must not appear twice.
    return tuple((jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.num_layers))


def _linear(config: DecoderConfig, rngs: nnx.Rngs) -> Callable[..., nnx.Linear]:
    return functools.partial(
        nnx.Linear,
        use_bias=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _norm(config: DecoderConfig, size: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    # nnx.RMSNorm computes in f32 whatever its dtype; `dtype` is that of the result.
    return nnx.RMSNorm(
        size,
        epsilon=config.rms_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Grouped-query attention over the cache."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        linear, hidden = _linear(config, rngs), config.hidden_size
        q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = linear(hidden, q_size, use_bias=config.qkv_bias)
        self.k_proj = linear(hidden, kv_size, use_bias=config.qkv_bias)
        self.v_proj = linear(hidden, kv_size, use_bias=config.qkv_bias)
        self.o_proj = linear(q_size, hidden, use_bias=config.output_bias)
        self.q_norm = _norm(config, config.head_dim, rngs) if config.qk_norm else None
        self.k_norm = _norm(config, config.head_dim, rngs) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        cache: LayerCache,
        pos: Scalar,
    ) -> tuple[jax.Array, LayerCache]:
        """Attends from T new positions to every position up to their own.

        Args:
            x: [batch, T, hidden_size].
            cos: f32[T, 1, head_dim / 2], of the positions pos .. pos + T - 1.
            sin: like `cos`.
            cache: keys and values, each [batch, cache_len, num_kv_heads, head_dim].
            pos: int32 scalar, position of the first of the T tokens.

        Returns:
            [batch, T, hidden_size] and the cache with the T positions written.
        """
        batch, length, _ = x.shape
        kv_heads, head_dim = self.config.num_kv_heads, self.config.head_dim
        q = self.q_proj(x).reshape(batch, length, self.config.num_heads, head_dim)
        k = self.k_proj(x).reshape(batch, length, kv_heads, head_dim)
        v = self.v_proj(x).reshape(batch, length, kv_heads, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        keys = lax.dynamic_update_slice(cache[0], k, (0, pos, 0, 0))
        values = lax.dynamic_update_slice(cache[1], v, (0, pos, 0, 0))

        # Query head h reads key/value head h // group.
        q = q.reshape(batch, length, kv_heads, -1, head_dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, keys, preferred_element_type=jnp.float32)
        query_pos = pos + jnp.arange(length, dtype=jnp.int32)
        key_pos = jnp.arange(keys.shape[1], dtype=jnp.int32)
        visible = key_pos[None, :] <= query_pos[:, None]
        scores = jnp.where(visible, scores * head_dim**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        out = jnp.einsum("bkgts,bskd->btkgd", weights, values)
        return self.o_proj(out.reshape(batch, length, -1)), (keys, values)


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        linear = _linear(config, rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, T, hidden_size] to the same shape."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = _norm(config, config.hidden_size, rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = _norm(config, config.hidden_size, rngs)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        cache: LayerCache,
        pos: Scalar,
    ) -> tuple[jax.Array, LayerCache]:
        """Arguments and results are those of `Attention.__call__`."""
        attended, cache = self.self_attn(self.input_layernorm(x), cos, sin, cache, pos)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nnx.Module):
    """The whole model: embedding, layers, final norm and head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, config.hidden_size, rngs)
        self.lm_head = (
            None
            if config.tie_embeddings
            else _linear(config, rngs)(
                config.hidden_size,
                config.vocab_size,
                preferred_element_type=jnp.float32,
            )
        )

    def __call__(self, tokens: jax.Array, cache: Cache, pos: Scalar) -> tuple[jax.Array, Cache]:
        """Runs the layers over T tokens.

        Args:
            tokens: int32[batch, T].
            cache: see `Cache`; must have room for positions pos .. pos + T - 1, because XLA
                would silently move a write that reaches past the end.
            pos: int32 scalar, position of the first of the T tokens.

        Returns:
            Hidden states [batch, T, hidden_size] before the final norm, and the new cache.
        """
        positions = pos + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        config = self.config
        cos, sin = rotation(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = self.embed_tokens(tokens)
        written = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, layer_cache = layer(x, cos, sin, layer_cache, pos)
            written.append(layer_cache)
        return x, tuple(written)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and head: [..., hidden_size] to f32[..., vocab_size]."""
        normed = self.norm(hidden)
        if self.lm_head is not None:
            return self.lm_head(normed)
        # Accumulated and returned in f32: bf16 would merge neighbouring logits.
        table = self.embed_tokens.embedding[...].astype(normed.dtype)
        return jnp.einsum("...h,vh->...v", normed, table, preferred_element_type=jnp.float32)


class StepFunctions(NamedTuple):
    """Pure functions over the parameters of one decoder.

    Attributes:
        prefill: (params, cache, tokens int32[batch, T], length int32) to
            (logits f32[batch, vocab_size] after token length - 1, cache). Tokens past `length`
            are padding: what they leave in the cache is overwritten before it becomes visible.
        decode_step: (params, cache, tokens int32[batch], pos int32) to
            (logits f32[batch, vocab_size] for the next token, cache).
    """

    prefill: Callable[[nnx.State, Cache, jax.Array, Scalar], tuple[jax.Array, Cache]]
    decode_step: Callable[[nnx.State, Cache, jax.Array, Scalar], tuple[jax.Array, Cache]]


def step_functions(graphdef: nnx.GraphDef[Decoder]) -> StepFunctions:
    """Makes the pure functions of the decoder that `nnx.split` took apart."""

    def prefill(params: nnx.State, cache: Cache, tokens: jax.Array, length: Scalar) -> tuple[jax.Array, Cache]:
        model = nnx.merge(graphdef, params)
        hidden, cache = model(tokens, cache, 0)
        last = lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=False)
        return model.logits(last), cache

    def decode_step(params: nnx.State, cache: Cache, tokens: jax.Array, pos: Scalar) -> tuple[jax.Array, Cache]:
        model = nnx.merge(graphdef, params)
        hidden, cache = model(tokens[:, None], cache, pos)
        return model.logits(hidden[:, 0]), cache

    return StepFunctions(prefill, decode_step)
