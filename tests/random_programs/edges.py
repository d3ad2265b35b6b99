"""Edge values of every type. What is done with them stands in ``edges_elementwise.py`` and ``edges_arrays.py``.

A :class:`Group` is one program of many independent results: expressions of named arrays. Arrays are arguments, never
constants: XLA evaluates constants when it compiles, by other code than it runs (and dies of integer division by zero).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.random_programs.values import FLOATS, NUMPY, PRECISION, UNSIGNED, bits, int_range

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """One result.

    Attributes:
      code: an expression of the group's arrays.
      ulps: how many units in the last place it may be off; 0: bitwise equal, NaNs being all alike.
      lenient: signs of zeros do not count, and subnormals count as zeros: XLA's own choice depends on shapes.
      unsure: names of arrays; where one of them is subnormal, XLA's own choice depends on its version and on the
        processor, and nothing is compared.
    """

    code: str
    ulps: int = 0
    lenient: bool = False
    unsure: str = ""


@dataclass(frozen=True)
class Group:
    """Results computed by one program.

    Attributes:
      arrays: arguments by name.
      cases: the results.
    """

    arrays: dict[str, Array]
    cases: list[Case] = field(default_factory=list)

    def add(self, *codes: str, ulps: int = 0, lenient: bool = False, unsure: str = "") -> None:
        self.cases.extend(Case(code, ulps, lenient, unsure) for code in codes)


def float_edges(dtype: str) -> Array:
    """Zeros, denormals, extremes, infinities, NaNs, halves, neighbours of one, and values around integer limits."""
    info = np.finfo(np.float32) if dtype == "bf16" else np.finfo(NUMPY[dtype])
    word = np.dtype(f"u{np.dtype(NUMPY[dtype]).itemsize}")
    digits = PRECISION[dtype] - 1
    sign = 1 << (bits(dtype) - 1)
    infinity = {"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000, "f64": 0x7FF0000000000000}[dtype]
    one = {"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000, "f64": 0x3FF0000000000000}[dtype]
    patterns = [
        *(0, 1, 2, (1 << digits) - 1, 1 << digits, (1 << digits) + 1),  # zero, denormals, smallest normal
        *(infinity - 1, infinity, infinity | 1 << (digits - 1), infinity | 3 << (digits - 2)),  # largest, inf, NaNs
        *(one, one + 1, one - 1),
    ]
    patterns += [p | sign for p in patterns]
    special = np.array(patterns, word).view(NUMPY[dtype])
    plain = [0.25, 0.5, 0.75, 1.5, 2.5, 3.5, 2, 3, 10, 100, 127.5, 128, 255.5, 256, 32768, 65504, 3.14159265]
    if info.maxexp > 16:
        plain += [2.0**k for k in (16, 23, 24, 31, 32, 33, 52, 53, 62, 63, 64, 65)] + [2.0**31 - 1, 1e10, 1e30]
        plain += [88.5, 89.5, 104.0]
    signed = np.array([*plain, *(-p for p in plain)], np.float64).astype(NUMPY[dtype])
    return np.concatenate([special, signed])


def int_edges(dtype: str) -> Array:
    low, high = int_range(dtype)
    found = {low, low + 1, -low - 1, high, high - 1, high // 2, high // 2 + 1, high // 3}
    found |= {-1, 0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, -2, -7, -8, -31, -32, -64}
    found |= {2**k for k in range(0, bits(dtype), 5)}
    if dtype in UNSIGNED:
        # What small negative numbers wrap to.
        found |= {high + 1 - k for k in (1, 2, 8, 32)}
    return np.array(sorted(v for v in found if low <= v <= high), NUMPY[dtype])


def edges(dtype: str) -> Array:
    if dtype == "b1":
        return np.array([False, True])
    return float_edges(dtype) if dtype in FLOATS else int_edges(dtype)


def crossed(*arrays: Array) -> list[Array]:
    """All combinations of the elements of several arrays, one array each."""
    index = list(itertools.product(*(range(len(a)) for a in arrays)))
    return [a[[i[k] for i in index]] for k, a in enumerate(arrays)]


def rows(dtype: str) -> Array:
    """Rows that each hold some edge values among plain ones, and all-NaN and all-zero rows for floats."""
    edge = edges(dtype)
    rng = np.random.default_rng(3)
    found = rng.choice(edge, (24, 13))
    if dtype in FLOATS:
        finite = edge[np.isfinite(edge.astype(np.float64)) & (np.abs(edge.astype(np.float64)) < 200)]
        found[:6] = rng.choice(finite, (6, 13))
        zeros = np.array([0.0, -0.0], NUMPY[dtype])
        found[6:8] = rng.choice(zeros, (2, 13))
        found[8] = zeros[1]
        found[9] = np.array(np.nan, NUMPY[dtype])
        found[10, ::2] = -found[9, ::2]
        found[11] = np.array(-np.inf, NUMPY[dtype])
        found[12] = np.array(np.inf, NUMPY[dtype])
    elif dtype != "b1":
        found[:2] = int_range(dtype)[0]
        found[2:4] = int_range(dtype)[1]
    return found


def signs(x: Array) -> Array:
    """Floats as special values and signs only, of which no sum or product is rounded; anything else as it is."""
    if x.dtype.kind in "biu":
        return x
    wide = x.astype(np.float64)
    return np.where(np.isfinite(wide), np.copysign(np.sign(wide), wide), wide).astype(x.dtype)
