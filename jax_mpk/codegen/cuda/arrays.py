"""Arrays as the code of a routine sees them: in scratch, in a buffer, handed over by tagged words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jax_mpk.codegen.cuda.scalars import Term, offset
from jax_mpk.graph import dtypes
from jax_mpk.plan.ir import Plan, Routine, Storage

#: Offsets of operands are in units of so many bytes.
UNIT = 16


@dataclass(frozen=True)
class Array:
    """A value, as one member of a routine reads or writes it.

    Attributes:
      kind: "local" (shared memory), "global" (a buffer), "tagged" (tagged words, waited for), "own" (tagged words that
        this task stores), or "register" (one element, which every thread has).
      name: of the C++ variable.
      dtype: element type.
      strides: in elements.
      origin: what to subtract from an offset: text, or "".
      wide: offsets need 64 bits.
      bytes: (first, end) in scratch of a local array, else None.
      storage: of anything but local arrays and registers, else -1.
      shape: extents of what lies in memory.
      copy: of what this task stores, in scratch, for those of its members that read it.
    """

    kind: str
    name: str
    dtype: str
    strides: tuple[int, ...]
    origin: str
    wide: bool
    bytes: tuple[int, int] | None
    storage: int
    shape: tuple[int, ...]
    copy: Array | None = None

    def at(self, indices: Sequence[Term]) -> str:
        where = offset(indices, self.strides, wide=self.wide)
        return f"{where} - {self.origin}" if self.origin else where

    def load(self, indices: Sequence[Term]) -> str:
        if self.kind == "register":
            return self.name
        where = self.at(indices)
        if self.kind == "tagged":
            return f"{self.name}.get(c, {where})"
        if self.kind == "own":
            return f"{self.name}.own({where})"
        return f"{self.name}[{where}]"

    def store(self, indices: Sequence[Term], value: str) -> str:
        """A statement; for a register, what ends the lambda that computes it."""
        if self.kind == "register":
            return f"return {value};"
        where = self.at(indices)
        if self.copy is not None:
            return f"{self.name}.put({where}, {self.copy.name}[{self.copy.at(indices)}] = {value});"
        if self.kind in ("tagged", "own"):
            return f"{self.name}.put({where}, {value});"
        return f"{self.name}[{where}] = {value};"


def register(name: str, dtype: str, shape: tuple[int, ...]) -> Array:
    """An element that every thread has in a variable, as an array of some shape."""
    return Array("register", name, dtype, (0,) * len(shape), "", False, None, -1, shape)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def is_wide(shape: Sequence[int]) -> bool:
    return math.prod(shape) > 2**31 - 1


def local_bytes(plan: Plan, routine: Routine) -> dict[int, tuple[int, int]]:
    """First byte in scratch, and end, of each of a routine's local values."""
    return {
        v: (at, at + math.prod(extents) * dtypes.itemsize(plan.graph.values[v].dtype))
        for v, at, extents in zip(routine.local_values, routine.local_offsets, routine.local_extents, strict=True)
    }


def buffer_count(plan: Plan) -> int:
    """Buffers that a launch names, one at least."""
    return max(1, len(plan.graph.inputs) + len(plan.graph.results) + (1 if plan.workspace_bytes else 0))


def buffer_of(plan: Plan, storage: Storage) -> tuple[int, int]:
    """Number of the buffer a storage lies in (arguments, results, workspace) and the offset in units."""
    arguments, results = len(plan.graph.inputs), len(plan.graph.results)
    if storage.kind == "input":
        return storage.index, 0
    if storage.kind == "output":
        return arguments + storage.index, 0
    assert storage.offset % UNIT == 0
    return arguments + results, storage.offset // UNIT
