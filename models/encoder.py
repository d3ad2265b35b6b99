"""BERT-style sentence encoder in Flax nnx (MiniLM and its relatives).

graphdef, params = nnx.split(Encoder(config, rngs=nnx.Rngs(0)))
embed = embed_function(graphdef)
embeddings = embed(params, token_ids, mask)
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of a BERT-style encoder.

    Attributes:
        vocab_size: rows of the word embedding.
        hidden_size: width of the residual stream and of a sentence embedding.
        intermediate_size: width of the feed-forward layer.
        num_layers: encoder layers.
        num_heads: attention heads; divides `hidden_size`.
        max_positions: rows of the learned position embedding.
        type_vocab_size: rows of the segment embedding; sentences use row 0.
        layer_norm_eps: added to the variance in every norm.
        dtype: dtype of activations and matrix products.
        param_dtype: dtype in which the weights are stored.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")


def _linear(config: EncoderConfig, rngs: nnx.Rngs) -> Callable[..., nnx.Linear]:
    return functools.partial(nnx.Linear, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)


def _norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Two passes: with an epsilon of 1e-12, E[x^2] - E[x]^2 has nothing to hide its rounding.
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


class SelfAttention(nnx.Module):
    """Bidirectional multi-head attention."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        linear, hidden = _linear(config, rngs), config.hidden_size
        self.query = linear(hidden, hidden)
        self.key = linear(hidden, hidden)
        self.value = linear(hidden, hidden)
        self.output = linear(hidden, hidden)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Attends from every token to the tokens of the mask.

        Args:
            x: [batch, T, hidden_size].
            mask: bool[batch, T], False where a row is padded.

        Returns:
            [batch, T, hidden_size].
        """
        batch, length, hidden = x.shape
        heads = (batch, length, self.num_heads, hidden // self.num_heads)
        q, k, v = (proj(x).reshape(heads) for proj in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        # Finite, so that a row of padding only (an unused batch slot) gives no NaN.
        hidden_score = jnp.finfo(jnp.float32).min
        scores = jnp.where(mask[:, None, None, :], scores * heads[-1] ** -0.5, hidden_score)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.output(out.reshape(batch, length, hidden))


class EncoderLayer(nnx.Module):
    """Attention and a GELU feed-forward, each added to its input and then normalised."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        linear = _linear(config, rngs)
        self.attention = SelfAttention(config, rngs=rngs)
        self.attention_norm = _norm(config, rngs)
        self.intermediate = linear(config.hidden_size, config.intermediate_size)
        self.output = linear(config.intermediate_size, config.hidden_size)
        self.output_norm = _norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Arguments and result are those of `SelfAttention.__call__`."""
        x = self.attention_norm(x + self.attention(x, mask))
        inner = jax.nn.gelu(self.intermediate(x), approximate=False)
        return self.output_norm(x + self.output(inner))


class Encoder(nnx.Module):
    """Embeddings and layers; `embed_function` adds the pooling."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        embed = functools.partial(
            nnx.Embed,
            features=config.hidden_size,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.word_embeddings = embed(config.vocab_size)
        self.position_embeddings = embed(config.max_positions)
        self.token_type_embeddings = embed(config.type_vocab_size)
        self.embedding_norm = _norm(config, rngs)
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes single-segment sentences.

        Args:
            tokens: int32[batch, T], T at most `max_positions`.
            mask: bool[batch, T], False where a row is padded.

        Returns:
            Token states [batch, T, hidden_size].

        Raises:
            ValueError: the sentences are longer than the position embedding.
        """
        length, limit = tokens.shape[1], self.position_embeddings.num_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens, but the encoder has {limit} positions")
        x = self.word_embeddings(tokens)
        x = x + self.position_embeddings(jnp.arange(length, dtype=jnp.int32))
        x = x + self.token_type_embeddings(jnp.zeros((1,), jnp.int32))
        x = self.embedding_norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def pool(states: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the real tokens, scaled to unit length.

    Args:
        states: [batch, T, hidden_size].
        mask: bool[batch, T], False where a row is padded.

    Returns:
        f32[batch, hidden_size]; zeros for a row without tokens.
    """
    weights = mask.astype(jnp.float32)[:, :, None]
    total = jnp.sum(states.astype(jnp.float32) * weights, axis=1)
    mean = total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)
    norm = jnp.sqrt(jnp.sum(mean * mean, axis=-1, keepdims=True))
    return mean / jnp.maximum(norm, 1e-12)


def embed_function(
    graphdef: nnx.GraphDef[Encoder],
) -> Callable[[nnx.State, jax.Array, jax.Array], jax.Array]:
    """Makes the pure function of the encoder that `nnx.split` took apart.

    Returns:
        embed(params, tokens int32[batch, T], mask bool[batch, T]) to f32[batch, hidden_size]
        sentence embeddings of unit length.
    """

    def embed(params: nnx.State, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return pool(nnx.merge(graphdef, params)(tokens, mask), mask)

    return embed
