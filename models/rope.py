"""Rotary position embeddings: the frequency variants and the half-rotation form that Llama uses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Linear scaling: every frequency is divided by the same factor.

    Attributes:
        factor: how many times longer the context is than in training.
    """

    factor: float

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Divides f64[head_dim / 2] frequencies (radians per position) by the factor."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3 scaling: slow rotations are stretched, fast ones kept, the ones between blended.

    Attributes:
        factor: divisor of the frequencies whose wavelength exceeds the trained context.
        low_freq_factor: trained context / this = the wavelength from which scaling is full.
        high_freq_factor: trained context / this = the wavelength below which nothing changes.
        original_max_position: trained context length, in positions.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Scales f64[head_dim / 2] frequencies (radians per position)."""
        turns = self.original_max_position * frequencies / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return frequencies * (keep + (1.0 - keep) / self.factor)


@dataclasses.dataclass(frozen=True)
class DivisorRope:
    """One divisor per frequency, as GGUF files store Llama 3 scaling.

    Attributes:
        divisors: head_dim / 2 numbers.
    """

    divisors: tuple[float, ...]

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Divides f64[head_dim / 2] frequencies (radians per position), each by its own number.

        Raises:
            ValueError: there are not as many divisors as frequencies.
        """
        if len(self.divisors) != frequencies.size:
            raise ValueError(f"{len(self.divisors)} RoPE divisors for {frequencies.size} frequencies")
        return frequencies / np.asarray(self.divisors)


RopeScaling = LinearRope | Llama3Rope | DivisorRope


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """f32[head_dim / 2], in radians per position; arguments are those of `rotation`."""
    geometric = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return (geometric if scaling is None else scaling.scale(geometric)).astype(np.float32)


def rotation(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles by which `rotate` turns a head.

    Args:
        positions: int32[T].
        head_dim: size of a head, even.
        theta: base of the geometric series of frequencies.
        scaling: how the frequencies are changed for long contexts; None leaves them.

    Returns:
        cos and sin, each f32[T, 1, head_dim / 2]; the unit axis stands for the heads.
    """
    # Angles stay f32 in every compute dtype: bf16 cannot tell position 257 from 256.
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies(head_dim, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + head_dim / 2) of every head.

    Args:
        x: [batch, T, heads, head_dim].
        cos: f32[T, 1, head_dim / 2].
        sin: f32[T, 1, head_dim / 2].

    Returns:
        The rotated heads, in the shape and dtype of `x`; the arithmetic is f32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
