"""What the generator knows about every value of a program: shape, element type, and bounds.

Integers may wrap freely: that is exact. Floats of the *exact* family are multiples of ``2**-frac`` between ``lo`` and
``hi``, few enough that every one of them, and every sum in any order, is representable in its type; so any order of
evaluation, any fusion and any wider intermediate type gives the same bits. Floats of the *smooth* family have
``frac = ROUGH``: they are rounded somewhere, and only continuous operations may use them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

SIGNED = ("s8", "s16", "s32", "s64")
UNSIGNED = ("u8", "u16", "u32", "u64")
INTS = SIGNED + UNSIGNED
FLOATS = ("f16", "bf16", "f32", "f64")
NUMBERS = INTS + FLOATS
ALL = ("b1", *NUMBERS)
#: PRNG keys are values too.
KEY = "key"

NUMPY = {
    "b1": np.bool_,
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "u8": np.uint8,
    "u16": np.uint16,
    "u32": np.uint32,
    "u64": np.uint64,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "f64": np.float64,
}
#: Bits of the significand, the hidden one included.
PRECISION = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}
#: Floats of the exact family that leave room for a product and a few sums: |v| ≤ bound, multiples of 2**-frac.
SMALL = {"f16": (8, 2), "bf16": (4, 1), "f32": (64, 4), "f64": (256, 8)}
#: ``frac`` of floats that are rounded somewhere.
ROUGH = -1
#: Rough values stay this small, so that f16 does not overflow and no error is blown up by sheer size.
ROUGH_BOUND = 32

#: Signs of zeros among a value's elements: no -0 occurs; -0 may occur where IEEE says so; XLA does not promise which
#: (it drops additions of constant zeros, sums from zero or not, and picks either zero as a maximum).
POSITIVE, DEFINED, LOOSE = 0, 1, 2


def bits(dtype: str) -> int:
    return 8 if dtype == "b1" else np.dtype(NUMPY[dtype]).itemsize * 8


def int_range(dtype: str) -> tuple[int, int]:
    if dtype == "b1":
        return 0, 1
    info = np.iinfo(NUMPY[dtype])
    return int(info.min), int(info.max)


def is_float(dtype: str) -> bool:
    return dtype in FLOATS


def size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


@dataclass(frozen=True)
class Info:
    """What is known of one value.

    Attributes:
      shape: sizes of its axes.
      dtype: short element type name, or ``"key"``.
      lo, hi: every element lies between them.
      frac: floats: elements are multiples of ``2**-frac``, or ROUGH.
      zeros: floats: what is known of the signs of zeros.
    """

    shape: tuple[int, ...]
    dtype: str
    lo: float = 0
    hi: float = 0
    frac: int = 0
    zeros: int = POSITIVE

    @property
    def size(self) -> int:
        return size(self.shape)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def bound(self) -> float:
        """Largest absolute value."""
        return max(abs(self.lo), abs(self.hi))

    @property
    def rough(self) -> bool:
        return self.frac == ROUGH

    def of_shape(self, *shape: int) -> Info:
        return dataclasses.replace(self, shape=tuple(shape))

    def exact(self, terms: int = 1) -> bool:
        """Whether ``terms`` such values can be added in any order without rounding (rough values: overflowing)."""
        if not is_float(self.dtype):
            return True
        if self.rough:
            return self.bound * terms <= 2.0**14
        return self.frac <= 14 and self.bound * terms * 2.0**self.frac <= 2.0 ** PRECISION[self.dtype]


def full(shape: tuple[int, ...], dtype: str) -> Info:
    """A bool or integer value of which nothing is known."""
    lo, hi = int_range(dtype)
    return Info(shape, dtype, lo, hi)


def rough(shape: tuple[int, ...], dtype: str, lo: float, hi: float) -> Info:
    return Info(shape, dtype, lo, hi, ROUGH, LOOSE)


def integer(shape: tuple[int, ...], dtype: str, lo: float, hi: float) -> Info:
    """An integer with these mathematical bounds; what does not fit wraps."""
    low, high = int_range(dtype)
    return Info(shape, dtype, lo, hi) if low <= lo and hi <= high else full(shape, dtype)


def number(shape: tuple[int, ...], dtype: str, lo: float, hi: float, frac: int = 0, zeros: int = POSITIVE) -> Info:
    """An integer or float with these mathematical bounds."""
    if not is_float(dtype):
        return integer(shape, dtype, lo, hi)
    if frac == ROUGH:
        zeros = LOOSE
    return Info(shape, dtype, lo, hi, frac, zeros)


def union(*infos: Info) -> Info:
    """What is known of a value that is any of several of one type; the shape is the first one's."""
    first = infos[0]
    if first.dtype == KEY:
        return first
    frac = ROUGH if any(i.rough for i in infos) else max(i.frac for i in infos)
    return Info(
        first.shape,
        first.dtype,
        min(i.lo for i in infos),
        max(i.hi for i in infos),
        frac,
        max(i.zeros for i in infos),
    )


def frac_of(*infos: Info, add: bool = False) -> int:
    """``frac`` of sums (the finest) or, with ``add``, of products."""
    if any(i.rough for i in infos):
        return ROUGH
    return sum(i.frac for i in infos) if add else max(i.frac for i in infos)


def product(a: Info, b: Info) -> tuple[float, float]:
    """Bounds of a product."""
    corners = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    return min(corners), max(corners)
