"""Closed-over arrays: what a compiled entry point keeps of them.

``jax.jit`` puts their values into its executable. Here they are passed as arguments, and their values are fixed when
the entry point is made: NumPy arrays, which may be written to, are copied. A ``jax.Array`` cannot change, but it can
be deleted or donated. On the CPU a view of its memory outlives both, and costs nothing until the array is donated:
XLA then copies it, since something else refers to its memory. Elsewhere, and for arrays on several devices, on a mesh
with explicit axes or in a layout of their own, the array itself is kept: it must not be deleted, and where it lies the
call runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jax_mpk.runtime import layouts

#: Copies of NumPy arrays by the memory they were made of.
Copies = weakref.WeakValueDictionary[Any, jax.Array]

#: NumPy constants up to this size stay in the HLO: functions often make them anew in every trace.
_SMALL = 4096


def is_small(value: Any) -> bool:
    """Whether a constant may stay in the HLO."""
    return isinstance(value, np.ndarray | np.generic) and value.nbytes <= _SMALL


class Constants:
    """The closed-over arrays of one entry point.

    Attributes:
      values: what to pass for them. They are not committed to a device, so that they decide nothing about where the
        call runs.
    """

    def __init__(self, originals: Iterable[Any], known: Copies):
        """Takes the values of ``originals``; copies of NumPy arrays are shared through ``known``."""
        originals = [c for c in originals if not is_small(c)]
        # Arrays are kept, so that their ids stay their own; NumPy arrays are found by what they contain.
        self._originals = [None if isinstance(c, np.ndarray) else c for c in originals]
        self.values = tuple(_copy(c, known) if isinstance(c, np.ndarray) else _view(c) for c in originals)

    def find(self, value: Any) -> int | None:
        """Which of :attr:`values` stands for a closed-over array, if any does."""
        numpy = isinstance(value, np.ndarray)
        for i, (original, kept) in enumerate(zip(self._originals, self.values, strict=True)):
            if (original is None and _equal(kept, value)) if numpy else original is value:
                return i
        return None


def _copy(value: np.ndarray, known: Copies) -> jax.Array:
    # Each trace has an object of its own for the same array.
    key = (value.ctypes.data, value.shape, value.dtype.str)
    made = known.get(key)
    if made is None or not _equal(made, value):
        made = known[key] = jax.device_put(np.array(value, order="C"))
    return made


def _equal(kept: jax.Array, value: np.ndarray) -> bool:
    if kept.shape != value.shape or kept.dtype != jax.dtypes.canonicalize_dtype(value.dtype):
        return False
    return np.array_equal(_bytes(np.asarray(kept)), _bytes(np.asarray(value, kept.dtype)))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _view(value: Any) -> Any:
    """An array of the same memory that stays when ``value`` is deleted; ``value`` itself where there is none."""
    if not isinstance(value, jax.Array) or len(value.devices()) > 1:
        return value
    if layouts.of_array(value) != layouts.ROW_MAJOR:
        return value
    (device,) = value.devices()
    mesh = value.aval.sharding.mesh
    if device.platform != "cpu" or not (mesh.empty or mesh.are_all_axes_auto):
        return value
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_view(jax.random.key_data(value)), impl=jax.random.key_impl(value))
    if value.weak_type:
        return jax.numpy.array(value)  # as a rule a scalar, and a view would be strongly typed
    # Guards are about what the program moves; this moves nothing.
    with jax.default_device(device), jax.transfer_guard("allow"):
        return jax.device_put(np.asarray(value))
