"""Choosing the next token, in code that belongs inside the compiled step."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. All fields are fixed when the step is compiled.

    Attributes:
        temperature: divisor of the logits; 0 chooses the most likely token.
        top_k: sample among the k most likely tokens; None among all.
        top_p: sample among the fewest most likely tokens whose probabilities, after temperature
            and top_k, reach this sum, in (0, 1]; the token that reaches it is included.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} keeps no token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]")


def greedy(logits: jax.Array) -> jax.Array:
    """The most likely token of each row, the first one on a tie: [batch, vocab] to int32[batch]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def nucleus(sorted_logits: jax.Array, top_p: float) -> jax.Array:
    """Removes the improbable tail of each row.

    Args:
        sorted_logits: f32[batch, n], in descending order.
        top_p: probability to keep, in (0, 1].

    Returns:
        The logits, with minus infinity after the shortest prefix of probability >= `top_p`.
    """
    probabilities = jax.nn.softmax(sorted_logits, axis=-1)
    # The sum *before* a token decides, so the first token always stays.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.where(before < top_p, sorted_logits, -jnp.inf)


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per row.

    Args:
        logits: f32[batch, vocab].
        key: scalar `jax.random` key; unused when the temperature is 0.
        sampling: the distribution to draw from.

    Returns:
        int32[batch].
    """
    if sampling.temperature == 0:
        return greedy(logits)
    scaled = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return jax.random.categorical(key, scaled).astype(jnp.int32)
    # One descending sort serves both filters, and only the k survivors are drawn from.
    vocab = logits.shape[-1]
    values, tokens = lax.top_k(scaled, min(sampling.top_k or vocab, vocab))
    if sampling.top_p < 1:
        values = nucleus(values, sampling.top_p)
    choice = jax.random.categorical(key, values)
    return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
