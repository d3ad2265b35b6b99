"""Element types of the graph, by their short names.

The names are those of StableHLO's printers, shortened: ``b1``, ``s8``..``s64``, ``u8``..``u64``, ``f16``,
``bf16``, ``f32``, ``f64``. ``f16`` and ``bf16`` are *storage* types: scalar programs convert them to ``f32``,
compute there, and convert back when a value is stored (see :mod:`jax_mpk.graph.scalar`).
"""

from __future__ import annotations

from functools import cache, lru_cache

import ml_dtypes
import numpy as np

#: Type of every index computation inside a scalar program.
INDEX = "s64"

_NUMPY: dict[str, np.dtype] = {
    "b1": np.dtype(np.bool_),
    "s8": np.dtype(np.int8),
    "s16": np.dtype(np.int16),
    "s32": np.dtype(np.int32),
    "s64": np.dtype(np.int64),
    "u8": np.dtype(np.uint8),
    "u16": np.dtype(np.uint16),
    "u32": np.dtype(np.uint32),
    "u64": np.dtype(np.uint64),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in _NUMPY.items()}
_BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}

ALL: tuple[str, ...] = tuple(_NUMPY)


def from_numpy(dtype: object) -> str | None:
    """Short name of a NumPy dtype, or None where the graph has no such element type."""
    return _NAMES.get(np.dtype(dtype))  # type: ignore[call-overload]


def to_numpy(name: str) -> np.dtype:
    return _NUMPY[name]


def itemsize(name: str) -> int:
    """Bytes of one stored element."""
    return _NUMPY[name].itemsize


def is_float(name: str) -> bool:
    return name in ("f16", "bf16", "f32", "f64")


def is_signed(name: str) -> bool:
    return name[0] == "s"


def is_unsigned(name: str) -> bool:
    return name[0] == "u"


def is_int(name: str) -> bool:
    return name[0] in "su"


def compute_type(name: str) -> str:
    """The type arithmetic on ``name`` happens in: f32 for the two storage types, else itself."""
    return "f32" if name in ("f16", "bf16") else name


@cache
def int_range(name: str) -> tuple[int, int]:
    """Smallest and largest value of an integer type (0 and 1 for b1)."""
    if name == "b1":
        return 0, 1
    info = np.iinfo(_NUMPY[name])
    return int(info.min), int(info.max)


def to_bits(value: object, name: str) -> int:
    """Bit pattern of ``value`` stored as ``name``, as an unsigned int: exact for NaN payloads and −0."""
    scalar = np.asarray(value).astype(_NUMPY[name])
    if name == "b1":
        return int(scalar)
    return int(scalar.view(_BITS[scalar.dtype.itemsize * 8]))


@lru_cache(maxsize=4096)
def from_bits(bits: int, name: str) -> np.generic:
    """Inverse of :func:`to_bits`, as a NumPy scalar."""
    dtype = _NUMPY[name]
    if name == "b1":
        return np.bool_(bits)
    return np.asarray([bits], dtype=_BITS[dtype.itemsize * 8]).view(dtype)[0]
