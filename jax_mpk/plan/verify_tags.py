"""Tags: storages whose elements are their own events.

A tag orders its own element and nothing else, so :mod:`.verify_order` derives no order from it. What makes it sound is
checked here: that an element, once it carries the tag of this execution of its segment, cannot change before everybody
has read it, and that it will come to carry that tag.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jax_mpk.graph.ir import Branch, Loop
from jax_mpk.plan.ir import READ, TAGGED_ITEMSIZE
from jax_mpk.plan.verify_facts import Facts, Rows, refuse

#: Most elements of an overlap matrix held at once.
CHUNK = 1 << 22


def check_tagged_storages(facts: Facts) -> None:
    """A tagged storage lies in the workspace, holds one value of narrow elements and shares no byte.

    What is updated in place or carried by a loop or branch is never alone in its storage.
    """
    plan = facts.plan
    start = np.array([s.offset if s.kind == "workspace" else -1 for s in plan.storages], np.int64)
    end = np.array([s.offset + s.nbytes if s.kind == "workspace" else -1 for s in plan.storages], np.int64)
    # Read between segments, by everybody at once and without a look at tags.
    control = {op.index for op in plan.ops if isinstance(op, Branch)}
    control |= {op.cond.results[0] for op in plan.ops if isinstance(op, Loop) and op.cond is not None}
    partial = {s for split in plan.splits for s in split.storages}
    for number, storage in enumerate(plan.storages):
        if not storage.tagged:
            continue
        what = f"storage {number} is tagged, but"
        if storage.kind != "workspace":
            refuse(f"{what} is {storage.kind} {storage.index}")
        if number in partial:
            refuse(f"{what} holds partial results")
        values = np.flatnonzero(plan.value_storage == number).tolist()
        if len(values) != 1:
            refuse(f"{what} holds {len(values)} values: {values}")
        if facts.itemsizes[values[0]] > TAGGED_ITEMSIZE:
            refuse(f"{what} {facts.name_text(values[0])} has no room for a tag in a machine word")
        if values[0] in control:
            refuse(f"{what} {facts.name_text(values[0])} is read between segments")
        for other in np.flatnonzero((start < end[number]) & (start[number] < end) & (start < end)).tolist():
            if other != number and storage.nbytes:
                refuse(f"{what} shares bytes with storage {other}")


def check_tagged_accesses(facts: Facts) -> None:
    """A tagged value is written and read within one segment.

    Every element is then written in each execution of that segment: coverage has shown that the tasks which store an
    operator partition its space.
    """
    rows = facts.rows
    assert rows is not None
    touches = rows.take(np.flatnonzero(facts.tagged[rows.name]))
    written = np.unique(touches.name[touches.kind != READ])
    for i in np.flatnonzero(~np.isin(touches.name, written))[:1]:
        refuse(
            f"{facts.task_text(int(touches.task[i]))} reads tagged {facts.name_text(int(touches.name[i]))}, "
            f"which nobody writes"
        )
    home = np.full(len(facts.shapes), -1, np.int64)
    home[touches.name] = facts.task_segment[touches.task]
    for i in np.flatnonzero(home[touches.name] != facts.task_segment[touches.task])[:1]:
        name, task = int(touches.name[i]), int(touches.task[i])
        refuse(
            f"{facts.task_text(task)} in {facts.segments[facts.task_segment[task]].label} touches tagged "
            f"{facts.name_text(name)}, which belongs to {facts.segments[home[name]].label}"
        )


@dataclass
class TagWaits:
    """Tags that tasks of a segment wait for; all tags of one region of a value have one number, behind the events.

    Attributes:
      waits: per task, the numbers it waits for before it starts.
      writes: per task, the numbers it writes tags of.
      writers: per number, how many tasks write tags of it.
      names: per number, the name the tags are of.
    """

    waits: dict[int, list[int]] = field(default_factory=dict)
    writes: dict[int, list[int]] = field(default_factory=dict)
    writers: dict[int, int] = field(default_factory=dict)
    names: dict[int, int] = field(default_factory=dict)


def tag_waits(facts: Facts, rows: Rows) -> TagWaits:
    """Who waits for whose tags among the tasks of a segment, given its accesses."""
    out = TagWaits()
    number = facts.plan.events
    touches = rows.take(np.flatnonzero(facts.tagged[rows.name]))
    routine = facts.plan.tasks.table["routine"][touches.task].astype(np.int64)
    key = routine * len(facts.shapes) + touches.name
    own = np.isin(key, key[touches.kind != READ])
    order = np.argsort(touches.name, kind="stable")
    names, starts = np.unique(touches.name[order], return_index=True)
    for name, index in zip(names.tolist(), np.split(order, starts[1:])):
        readers, writers = index[(touches.kind[index] == READ) & ~own[index]], index[touches.kind[index] != READ]
        if not len(readers):
            continue
        # Readers of one box wait for the same tasks.
        axes = max(len(facts.shapes[name]), 1)
        boxes, group = np.unique(touches.box[readers, :, :axes], axis=0, return_inverse=True)
        for task, k in sorted(set(zip(touches.task[readers].tolist(), (number + group.reshape(-1)).tolist()))):
            out.waits.setdefault(task, []).append(k)
        out.names.update(dict.fromkeys(range(number, number + len(boxes)), name))
        out.writers.update(dict.fromkeys(range(number, number + len(boxes)), 0))
        step = max(1, CHUNK // len(writers))
        for at in range(0, len(boxes), step):
            part, write = boxes[at : at + step, None], touches.box[None, writers, :, :axes]
            meet = np.all((part[:, :, 0] < write[:, :, 1]) & (write[:, :, 0] < part[:, :, 1]), axis=2)
            for k, writer in zip(*(found.tolist() for found in np.nonzero(meet))):
                out.writes.setdefault(int(touches.task[writers[writer]]), []).append(number + at + k)
                out.writers[number + at + k] += 1
        number += len(boxes)
    return out
