"""The cost model: what bytes, flops, tasks and hand-offs cost on a target. Nothing else knows.

The tiler asks it before there is a plan, the estimate of a finished plan afterwards, so both mean the same seconds.
A worker gets an even share of every resource: device memory, last-level cache and arithmetic. The three work beside
each other, but memory and cache not all the time: what a task needs first, it waits for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jax_mpk.graph.fuse_maps import programs, work
from jax_mpk.graph.ir import Branch, Loop, Nest, Op, Sort, Update
from jax_mpk.graph.regions import update_boxes
from jax_mpk.plan.ir import FINISH, PARTIAL, WHOLE, Target

#: Scalar operations of the generic bodies run at this fraction of the target's multiply-add rate.
_SCALAR_RATE = 1 / 16
#: Tasks share a value when they read this many times the bytes there are.
_SHARED = 1.5
#: Part of the time of the less busy one of memory and cache that is not hidden behind the other.
_EXPOSED = 0.5


def volume(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """float64 [boxes]: elements of boxes, int64 [boxes, axes] each corner; 0 for empty ones."""
    return np.prod(np.maximum(hi - lo, 0).astype(np.float64), axis=1)


# -- bytes -----------------------------------------------------------------------------------------------------


def fresh_share(total: Any, once: Any) -> np.ndarray:
    """Share of the bytes read that no task has read before: 1 unless most of them are read again and again.

    Args:
      total: bytes the tasks of a routine read of a value, all together.
      once: the same with every byte counted once.
    """
    total, once = np.asarray(total, np.float64), np.asarray(once, np.float64)
    shared = total > _SHARED * once
    return np.where(shared, once / np.where(shared, total, 1.0), 1.0)


def memory_bytes(target: Target, nbytes: Any, fresh: Any, argument: Any, size: Any) -> np.ndarray:
    """The part of accesses that device memory serves; the last-level cache serves all of them.

    What an earlier task wrote is in the cache. So is an argument's byte that another task reads as well, but however
    often it is read, it has to come from memory once.

    Args:
      target: the device.
      nbytes: bytes a task moves.
      fresh: :func:`fresh_share` of the value and routine.
      argument: whether the bytes are in device memory at first.
      size: bytes of the storage; one that is larger than the cache stays in device memory.
    """
    fresh, argument = np.asarray(fresh), np.asarray(argument, bool)
    cached = (np.asarray(size) <= target.l2_bytes) & ((fresh < 1) | ~argument)
    return np.where(cached, np.where(argument, fresh, 0.0), 1.0) * nbytes


def evaluations(op: Op, stage: int, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """How often tasks run an operator's main program: its loads touch no more elements than that.

    Args:
      op: the operator; infinite for a Sort, which has no program.
      stage: WHOLE, PARTIAL or FINISH.
      lo, hi: the tasks' boxes.
    """
    if isinstance(op, Nest):
        if stage == FINISH:
            return np.zeros(len(lo))
        # A partial task's box spans the reduced axes too.
        return volume(lo, hi) * (1 if stage == PARTIAL else math.prod(op.rspace))
    if isinstance(op, Update):
        return volume(*_hit(op, lo, hi))
    return np.full(len(lo), np.inf) if isinstance(op, Sort) else volume(lo, hi)


def _hit(op: Update, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The updates that may fall into boxes of the output."""
    rank = len(op.index.results) - 1
    return update_boxes(op, lo[:, :rank], hi[:, :rank])


def staged_bytes(target: Target, nbytes: Any, itemsize: Any, tagged: Any) -> np.ndarray:
    """The part of what tasks move of a value made by others that they wait for before anything else.

    Where there are tagged words, all of it that scratch can hold; a tag comes with each element.

    Args:
      target: the device.
      nbytes: bytes a task moves.
      itemsize: bytes of an element.
      tagged: whether the value is handed over by tagged words.
    """
    nbytes = np.asarray(nbytes, np.float64)
    words = nbytes / itemsize * np.where(np.asarray(itemsize) <= 2, 4, 8)
    return np.where(nbytes <= target.tagged_bytes // 4, np.where(tagged, words, nbytes), 0.0)


# -- flops -----------------------------------------------------------------------------------------------------


def flops(op: Op, lo: np.ndarray, hi: np.ndarray, stage: int = WHOLE) -> np.ndarray:
    """Multiply-add equivalents, twice, of boxes of an operator.

    The box of an Update is searched for updates, not computed.
    """
    assert not isinstance(op, Loop | Branch)
    count = volume(*_hit(op, lo, hi)) if isinstance(op, Update) else volume(lo, hi)
    return count * _element_flops(op, stage)


def _element_flops(op: Op, stage: int) -> float:
    if isinstance(op, Nest):
        inner = 1 if stage == PARTIAL else math.prod(op.rspace)
        after = 0.0 if op.epilogue is None or stage == PARTIAL else (work(op.epilogue) + 1) / _SCALAR_RATE
        each = 2.0 if op.kind == "contract" else (work(op.body) + 1) / _SCALAR_RATE
        return after + (0.0 if stage == FINISH else inner * each)
    rows = op.space[op.axis] if isinstance(op, Sort) else 1
    return sum(work(expr) + 1 for expr in programs(op)) / _SCALAR_RATE + 4 * math.log2(rows + 1)


# -- seconds ---------------------------------------------------------------------------------------------------


def task_seconds(target: Target, cache: Any, memory: Any, arithmetic: Any, staged: Any = 0.0) -> Any:
    """Seconds of tasks that run beside others on all workers.

    Args:
      target: the device.
      cache: bytes each task moves, but for those staged.
      memory: those among them that come from or go to device memory.
      arithmetic: flops of each.
      staged: bytes that each waits for before anything else: :func:`staged_bytes`.
    """
    cache, memory = np.asarray(cache), np.asarray(memory)
    # Bytes from memory pass through the cache on their way, which takes no time of its own.
    streamed, passed = memory / target.bandwidth, (cache - memory) / target.cache_bandwidth
    busiest = np.maximum(streamed, cache / target.cache_bandwidth)
    moving = busiest + _EXPOSED * np.maximum(streamed + passed - busiest, 0.0)
    busy = np.maximum(moving, np.asarray(arithmetic) / target.flops) + np.asarray(staged) / target.cache_bandwidth
    return busy * target.workers + target.task_overhead


def handoff_seconds(target: Target) -> float:
    """What one more dependent phase costs."""
    return target.handoff if target.workers > 1 else target.task_overhead
