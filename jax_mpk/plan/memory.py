"""Storages: which bytes each stored value lives in.

Arguments and results keep their own buffers. Everything else goes into the workspace, where a large storage may take
bytes of an earlier one if every task that touched those has finished, by order already there, before the first task
that touches the new one: reuse never adds a wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_ALIGN = 128
#: Storages smaller than this are not worth sharing bytes.
_SMALL = 4096


@dataclass(eq=False)
class Life:
    """When a workspace storage is in use.

    Attributes:
      nbytes: size.
      first: (segment, routine within it) of the first access.
      last_segment: last segment that touches it; everything is over at the barrier behind it.
      positions: int32 [workers]: last queue position per worker that touches it, within ``last_segment``.
      pinned: must keep its bytes throughout (loop carries, values that live across a loop's rounds, tagged ones).
    """

    nbytes: int
    first: tuple[int, int]
    last_segment: int
    positions: np.ndarray
    pinned: bool = False
    offset: int = field(default=-1)


def assign_offsets(lives: list[Life], known: dict[tuple[int, int], np.ndarray]) -> int:
    """Gives every life an offset; returns the workspace's size in bytes.

    Args:
      lives: in order of first access.
      known: per (segment, routine), the queue positions per worker that have finished when any of its tasks starts.
    """
    end = 0
    free: list[Life] = []  # placed, large, reusable once over
    for life in lives:
        size = -(-max(life.nbytes, 1) // _ALIGN) * _ALIGN
        home = None
        if life.nbytes >= _SMALL and not life.pinned:
            over = [other for other in free if _is_over(other, life, known)]
            fitting = [other for other in over if other.nbytes >= life.nbytes]
            home = min(fitting, key=lambda other: other.nbytes, default=None)
        if home is not None:
            life.offset = home.offset
            free.remove(home)
            # The bytes are as long as before; what follows must wait for the new user.
            life.nbytes = home.nbytes
        else:
            life.offset = end
            end += size
        if life.nbytes >= _SMALL and not life.pinned:
            free.append(life)
    return end


def _is_over(old: Life, new: Life, known: dict[tuple[int, int], np.ndarray]) -> bool:
    if old.last_segment != new.first[0]:
        return old.last_segment < new.first[0]
    return bool(np.all(known[new.first] >= old.positions))
