"""Arrays to try rules on."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NUMBERS = FLOATS + INTS
ALL = ("bool", *NUMBERS)

_SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan])


def exact(rng: np.random.Generator, dtype: str, shape: Sequence[int], low: int = -4, high: int = 5) -> np.ndarray:
    """Small whole numbers (none negative for unsigned types): sums and products of a few are exact in every type."""
    whole = rng.integers(low, high, shape)
    if dtype == "bool":
        return whole > 0
    return (np.abs(whole) if dtype[0] == "u" else whole).astype(jnp.dtype(dtype))


def wild(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Any values of the type: full range, many equal ones, and for floats signed zeros, infinities and NaNs."""
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype not in FLOATS:
        info = np.iinfo(dtype)
        anything = rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
        few = rng.choice(np.array([info.min, info.max, 0, 1], dtype), shape)
        return np.where(rng.integers(0, 2, shape) == 0, anything, few)
    ordinary = rng.normal(size=shape).round(1)
    return np.where(rng.integers(0, 3, shape) == 0, rng.choice(_SPECIAL, shape), ordinary).astype(jnp.dtype(dtype))


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bit patterns, which tell NaNs and zeros apart."""
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind not in "biu" else array
