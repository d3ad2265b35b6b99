"""Where the threads of a routine's tasks meet."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mpk.codegen.cuda.arrays import Array

#: Bytes of scratch, a storage, or `_PARTIALS`.
Place = tuple[int, int] | int
_PARTIALS = -2


class Meetings:
    """Knows what a routine's threads have touched since they met, and writes barriers where they have to meet again.

    Args:
      lines: the routine's code.
    """

    def __init__(self, lines: list[str]):
        self._lines = lines
        self._since: list[tuple[Place, bool]] = []  # what, and whether it was written
        self._landing: list[Place] = []  # bytes of scratch whose copies nobody has waited for
        self._arrival = -1  # the line where everybody waits for what is brought, if nothing is behind it yet

    def expect(self, place: tuple[int, int]) -> None:
        """Copies to these bytes of scratch are under way: who touches them first waits."""
        self._landing.append(place)

    def arrive(self) -> None:
        """What follows is where everybody waits for what is brought."""
        self._arrival = len(self._lines)

    def meet(self, reads: Sequence[Array], writes: Sequence[Array], *, joins: bool = False) -> None:
        """A barrier, if what comes next touches what earlier code of the routine wrote, or overwrites what it read.

        Args:
          reads, writes: what comes next.
          joins: it uses the partials.
        """
        new = _touched(reads, writes)
        if joins:
            new.append((_PARTIALS, True))
        first, self._arrival = self._arrival, -1
        landing = any(overlap(a, b) for a in self._landing for b, _ in new)
        if landing and first >= 0:  # there is a barrier already, and nothing behind it yet
            self._lines[first : self._lines.index("c.sync();", first)] = ["copies_wait();"]
            self._landing.clear()
        elif self._meets(new):
            if landing:
                self._lines.append("copies_wait();")
                self._landing.clear()
            self._lines.append("c.sync();")
            self._since.clear()
        self._since += new

    def would_meet(self, reads: Sequence[Array], writes: Sequence[Array]) -> bool:
        """Whether ``meet`` would put a barrier there."""
        return self._meets(_touched(reads, writes))

    def met(self) -> None:
        """What was written last ended with a barrier."""
        self._since.clear()

    def met_before(self, reads: Sequence[Array]) -> None:
        """What was written last has a barrier in it, behind which it reads these arrays and the partials."""
        self._since = [(_PARTIALS, False), *_touched(reads, [])]

    def _meets(self, new: Sequence[tuple[Place, bool]]) -> bool:
        since = [*self._since, *((a, True) for a in self._landing)]
        return any((w or wrote) and overlap(a, b) for a, wrote in since for b, w in new)


def _places(a: Array) -> list[Place]:
    if a.kind == "register":
        return []
    return [a.storage if a.bytes is None else a.bytes, *(_places(a.copy) if a.copy is not None else [])]


def _touched(reads: Sequence[Array], writes: Sequence[Array]) -> list[tuple[Place, bool]]:
    return [(p, False) for a in reads for p in _places(a)] + [(p, True) for a in writes for p in _places(a)]


def overlap(a: Place, b: Place) -> bool:
    """Whether two places have bytes in common."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a[0] < b[1] and b[0] < a[1]
