"""Tagged hand-offs in the tables of a Plan: which accesses wait for tags, and who waits for whom."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jax_mpk.plan.ir import READ, Plan, Tasks

#: Most elements of an overlap matrix held at once.
_CHUNK = 1 << 22


def tagged_accesses(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Positions in ``plan.accesses`` of reads that wait for tags, and of writes that publish them; none is empty."""
    rows = plan.accesses
    tagged = np.array([*(storage.tagged for storage in plan.storages), False], bool)
    found = (rows.value >= 0) & tagged[plan.value_storage[np.maximum(rows.value, 0)]]
    touches = np.flatnonzero(found & np.all(rows.box[:, 1] > rows.box[:, 0], axis=1))
    key = plan.tasks.table["routine"][rows.task[touches]].astype(np.int64) * len(plan.graph.values)
    key += rows.value[touches]
    reads = rows.kind[touches] == READ
    # A routine does not wait for what it stores itself: its tasks read only their own part of it.
    waits = reads & ~np.isin(key, key[~reads])
    return touches[waits], touches[~reads]


def tags_as_events(plan: Plan) -> tuple[Tasks, int]:
    """The tasks with an event in place of each set of tagged elements some task waits for, and the number of events.

    For whoever asks what waits for what. It is no plan that could be run instead: events would order more.
    """
    tasks, rows = plan.tasks, plan.accesses
    reads, writes = tagged_accesses(plan)
    if not len(reads):
        return tasks, plan.events
    waits: list[np.ndarray] = []  # (task, event) pairs
    signals: list[np.ndarray] = []
    events = plan.events
    for value in np.unique(rows.value[reads]):
        readers, writers = (index[rows.value[index] == value] for index in (reads, writes))
        boxes, group = np.unique(rows.box[readers], axis=0, return_inverse=True)
        waits.append(np.stack([rows.task[readers], events + group.reshape(-1)], axis=1))
        step = max(1, _CHUNK // max(len(writers), 1))
        for at in range(0, len(boxes), step):
            low = np.maximum(boxes[at : at + step, None, 0], rows.box[None, writers, 0])
            high = np.minimum(boxes[at : at + step, None, 1], rows.box[None, writers, 1])
            box, writer = np.nonzero(np.all(low < high, axis=2))
            signals.append(np.stack([rows.task[writers[writer]], events + at + box], axis=1))
        events += len(boxes)
    signal_start, signal_event = _with(
        tasks.signal_start, tasks.signal_event, np.unique(np.concatenate(signals), axis=0)
    )
    # What nobody writes is waited for by nobody: such plans are not run, but may be looked at.
    pairs = np.unique(np.concatenate(waits), axis=0)
    wait_start, wait_event = _with(tasks.wait_start, tasks.wait_event, pairs[np.isin(pairs[:, 1], signal_event)])
    merged = replace(
        tasks, wait_start=wait_start, wait_event=wait_event, signal_start=signal_start, signal_event=signal_event
    )
    return merged, events


def _with(start: np.ndarray, items: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of numbers, with (row, number) pairs added."""
    rows = np.concatenate([np.repeat(np.arange(len(start) - 1), np.diff(start)), pairs[:, 0]])
    order = np.argsort(rows, kind="stable")
    new_start = np.searchsorted(rows[order], np.arange(len(start)))
    return new_start.astype(start.dtype), np.concatenate([items, pairs[:, 1].astype(items.dtype)])[order]
