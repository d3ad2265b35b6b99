"""Writing a word stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Array = np.ndarray


class Writer:
    """Collects 64-bit words; arrays are appended as blocks."""

    def __init__(self) -> None:
        self._blocks: list[Array] = []
        self._words: list[int] = []
        self._symbols: dict[str, int] = {}

    def put(self, *words: int) -> None:
        self._words.extend(words)

    def many(self, words: Sequence[int]) -> None:
        """A count and the words."""
        self._words.append(len(words))
        self._words.extend(words)

    def symbol(self, name: str) -> int:
        """Number of a name in the symbol table."""
        return self._symbols.setdefault(name, len(self._symbols))

    def put_symbol(self, name: str) -> None:
        self._words.append(self.symbol(name))

    def array(self, words: Array) -> None:
        """Words without a count."""
        self._flush()
        self._blocks.append(np.ascontiguousarray(words, np.int64).reshape(-1))

    def packed(self, numbers: Array | Iterable[int]) -> None:
        """A count and 32-bit integers, two per word, the first in the lower half."""
        flat = np.asarray(numbers, np.int32).reshape(-1)
        self._words.append(len(flat))
        if len(flat) % 2:
            flat = np.append(flat, np.int32(0))
        self.array(np.ascontiguousarray(flat, "<i4").view("<i8"))

    def text(self, text: str) -> None:
        """A length in bytes and the bytes, eight per word."""
        data = text.encode()
        self._words.append(len(data))
        data += b"\0" * (-len(data) % 8)
        self._words.extend(np.frombuffer(data, "<i8").tolist())

    def symbols(self) -> list[str]:
        return list(self._symbols)

    def words(self) -> Array:
        """Everything so far, as one array."""
        self._flush()
        return np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.int64)

    def _flush(self) -> None:
        if self._words:
            self._blocks.append(np.array(self._words, np.int64))
            self._words = []
