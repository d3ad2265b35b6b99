"""What becomes of a routine: its lines, the words of a task that they read, and what the producer does for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

#: Consumer warps; one more warp produces. Twelve in all leave each thread 168 registers, thirteen only 128.
WARPS = 11
#: Words of a task before those its code reads: `TaskWords` in csrc/device/persistent.cuh.
FIRST_WORD = 5
#: Added to a job of the producer that names no size of chunks: rows known at run time, found in the first way; as often
#: again for every later one.
LIVE = 1 << 20
#: Instead of the size of a chunk: rows are brought to the L2 cache, at once or at the speed of memory.
PREFETCH, PACED = 0, 1
#: Added to the bytes of a row of a block of columns, in place of the size of a chunk.
COLUMNS = 1 << 16


@dataclass(frozen=True)
class Operand:
    """Words of a task that say where an array lies: two for a buffer (number, offset), one for tagged words (offset).

    Attributes:
      word: first word.
      storage: the storage.
    """

    word: int
    storage: int


@dataclass(frozen=True)
class Stream:
    """What the producer does for a task: `StreamJob` in csrc/device/ring.cuh.

    Attributes:
      storage: the input.
      chunk_bytes: size of all chunks but the last; COLUMNS and more: rows stream in blocks of columns; PREFETCH or
        PACED: nothing streams, rows come to the L2 cache.
      first, size: int64 [tasks]: first byte; bytes in all, or of one row.
      rows: int64 [tasks] rows; where these are known at run time, ``at`` of ``live``.
      stride: where nothing streams, or columns do, bytes from row to row; where a chunk holds a part of each of some
        rows, the tiles of a group; else 0.
      live: statements that compute ``first`` row and ``count`` of rows to bring to the L2 cache from ``at``; (): these
        are known.
      block: bytes of each row of a group that stream before what follows of them.
      together: whether all warps read every chunk; else one warp does.
    """

    storage: int
    chunk_bytes: int
    first: np.ndarray
    size: np.ndarray
    rows: np.ndarray
    stride: int
    live: tuple[str, ...] = ()
    block: int = 0
    together: bool = False


@dataclass
class Code:
    """What became of a routine.

    Attributes:
      lines: body of its function.
      operands: words that hold arrays.
      columns: words that hold numbers: (word, int64 [tasks]).
      streams: in the order its members consume them.
      words: number of words, the first ones included.
      scratch: bytes of scratch.
      partials: bytes that members need to join the parts of one output.
      memory: bytes of device memory a worker needs for what does not fit in scratch.
    """

    lines: list[str] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)
    columns: list[tuple[int, np.ndarray]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    words: int = FIRST_WORD
    scratch: int = 0
    partials: int = 0
    memory: int = 0


def live_rows(codes: Sequence[Code]) -> dict[tuple[str, ...], int]:
    """Numbers of the different ways in which the producer finds rows that are live."""
    found: dict[tuple[str, ...], int] = {}
    for stream in (stream for code in codes for stream in code.streams if stream.live):
        found.setdefault(stream.live, len(found))
    return found
