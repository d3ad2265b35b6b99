"""Puts routines that nobody waits for, such as the writes to a cache, behind all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax_mpk.graph.ir import reads
from jax_mpk.plan.cluster import Routine


def deferred(
    routines: Sequence[Routine], share: Sequence[int], may_move: Callable[[Routine], bool]
) -> tuple[list[Routine], list[Routine]]:
    """The routines of a segment that stay, and those that come behind them all.

    Where they stand in program order they hold up their workers, and with them what waits for the next tasks of those.
    A routine is moved if no routine that stays reads or overwrites what it stores, or overwrites what it reads. Two
    that are both moved keep their order, as do two that both stay.

    Args:
      routines: in program order.
      share: per value, a name for the storage it lives in.
      may_move: whether a routine is one to move.
    """
    stay: list[Routine] = []
    move: list[Routine] = []
    touched: set[int] = set()  # storages of the routines behind this one that stay
    written: set[int] = set()
    for routine in reversed(routines):
        stores = {share[v] for op in routine.ops for v in op.outputs if v not in routine.local}
        loads = {share[v] for op in routine.ops for v in reads(op) if v not in routine.local}
        if may_move(routine) and stores.isdisjoint(touched) and loads.isdisjoint(written):
            move.append(routine)
        else:
            stay.append(routine)
            touched |= loads | stores
            written |= stores
    return stay[::-1], move[::-1]
