"""Order: segments do not deadlock, and conflicting accesses within one segment are ordered by queues and events.

Happens-before within a segment is program order of each queue plus, for every event, all its signallers before each
task that waits for it. Tags are waited for, too, and so can deadlock, but an element that has arrived says nothing
about what else its writer did: no order follows. A vector clock per task (how many tasks of each worker happen before
it, itself included) makes "a before b" one comparison, and "all of these before all of those" one comparison of two
vectors.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from jax_mpk.graph.ir import Update
from jax_mpk.plan.ir import READ
from jax_mpk.plan.verify_facts import (
    KIND_NAMES,
    Facts,
    Rows,
    SegmentFacts,
    box_text,
    refuse,
    spans_text,
)
from jax_mpk.plan.verify_tags import TagWaits, tag_waits

#: Most elements of an overlap matrix held at once.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Summary:
    """What a segment does to the bytes, for the check of the whole schedule.

    Attributes:
      uses: names that must be valid when the segment begins, each with a task that needs it.
      defines: names valid afterwards.
      kills: names whose bytes are overwritten, each with the name that does it.
      written: names defined at any time.
      settled: of these, those whose every writer runs after some task of each other worker.
    """

    uses: dict[int, int]
    defines: tuple[int, ...]
    kills: dict[int, int]
    written: frozenset[int]
    settled: frozenset[int]


@dataclass(frozen=True)
class Definition:
    """Who defines a name in a segment.

    Attributes:
      op: the operator.
      task: one of its tasks.
    """

    op: int
    task: int


def check_order(facts: Facts) -> list[Summary]:
    """Checks every segment by itself; raises on deadlock or a pair of conflicting accesses without order."""
    assert facts.rows is not None
    # Rows by segment, in one pass.
    home = facts.task_segment[facts.rows.task]
    order = np.argsort(home, kind="stable")
    cuts = np.searchsorted(home[order], np.arange(len(facts.segments) + 1))
    defined: list[dict[int, Definition]] = [{} for _ in facts.segments]
    for (op, stage), places in facts.homes.items():
        for routine, _ in places:
            tasks = facts.tasks_of[routine]
            for name in facts.written(op, stage) if len(tasks) else ():
                defined[facts.task_segment[tasks[0]]][name] = Definition(op, int(tasks[0]))
    out = []
    for number, segment in enumerate(facts.segments):
        rows = facts.rows.take(order[cuts[number] : cuts[number + 1]])
        clocks = vector_clocks(facts, segment, tag_waits(facts, rows))
        out.append(_Segment(facts, segment, clocks, rows, defined[number]).check())
    return out


# -- deadlock and clocks ---------------------------------------------------------------------------------------


def vector_clocks(facts: Facts, segment: SegmentFacts, tags: TagWaits) -> np.ndarray:
    """Clocks, int32 [tasks of the segment, workers], queue after queue; raises if the segment cannot finish."""
    tasks, queues = facts.plan.tasks, [queue.tolist() for queue in segment.segment.queues]
    workers = len(queues)
    first = np.concatenate([[0], np.cumsum([len(queue) for queue in queues])])
    clocks = np.zeros((int(first[-1]), workers), np.int32)

    wait_start, wait_event = tasks.wait_start.tolist(), tasks.wait_event.tolist()
    signal_start, signal_event = tasks.signal_start.tolist(), tasks.signal_event.tolist()
    # Tags are numbered behind the events.
    missing = dict(tags.writers)
    for task in itertools.chain.from_iterable(queues):
        for event in signal_event[signal_start[task] : signal_start[task + 1]]:
            missing[event] = missing.get(event, 0) + 1
    event_clock: dict[int, np.ndarray] = {}
    blocked: dict[int, list[int]] = {}
    position = [0] * workers
    ready = list(range(workers))[::-1]
    while ready:
        worker = ready.pop()
        queue, base = queues[worker], int(first[worker])
        while position[worker] < len(queue):
            at = position[worker]
            task = queue[at]
            waits = wait_event[wait_start[task] : wait_start[task + 1]]
            pending = next((e for e in itertools.chain(waits, tags.waits.get(task, ())) if missing[e]), None)
            if pending is not None:
                blocked.setdefault(pending, []).append(worker)
                break
            clock = clocks[base + at]
            if at:
                clock[:] = clocks[base + at - 1]
            for event in waits:
                np.maximum(clock, event_clock[event], out=clock)
            clock[worker] = at + 1
            for event in signal_event[signal_start[task] : signal_start[task + 1]]:
                known = event_clock.get(event)
                if known is None:
                    event_clock[event] = clock.copy()
                else:
                    np.maximum(known, clock, out=known)
                missing[event] -= 1
                if not missing[event]:
                    ready.extend(blocked.pop(event, ()))
            for tag in tags.writes.get(task, ()):
                missing[tag] -= 1
                if not missing[tag]:
                    ready.extend(blocked.pop(tag, ()))
            position[worker] = at + 1
    stuck = [w for w in range(workers) if position[w] < len(queues[w])]
    if stuck:
        _refuse_deadlock(facts, segment, tags, stuck, position, missing)
    return clocks


def _refuse_deadlock(
    facts: Facts,
    segment: SegmentFacts,
    tags: TagWaits,
    stuck: list[int],
    position: list[int],
    missing: dict[int, int],
) -> None:
    tasks = facts.plan.tasks
    lines = [f"{segment.label} deadlocks: {len(stuck)} of {len(position)} workers wait forever"]
    for worker in stuck[:4]:
        task = int(segment.segment.queues[worker][position[worker]])
        waits = tasks.wait_event[tasks.wait_start[task] : tasks.wait_start[task + 1]].tolist()
        event = next(e for e in itertools.chain(waits, tags.waits.get(task, ())) if missing[e])
        behind = next(
            int(t)
            for w in stuck
            for t in segment.segment.queues[w][position[w] :]
            if event in tasks.signal_event[tasks.signal_start[t] : tasks.signal_start[t + 1]]
            or event in tags.writes.get(int(t), ())
        )
        what = f"tags of {facts.name_text(tags.names[event])}" if event in tags.names else f"event {event}"
        needs = "need" if event in tags.names else "needs"
        lines.append(f"  {facts.task_text(task)} waits for {what}, which {needs} {facts.task_text(behind)}")
    refuse("\n".join(lines))


# -- regions ---------------------------------------------------------------------------------------------------


def _same_layout(facts: Facts, u: int, v: int) -> bool:
    """Whether equal positions of two names are equal bytes."""
    return (
        facts.start[u] == facts.start[v]
        and facts.shapes[u] == facts.shapes[v]
        and facts.itemsizes[u] == facts.itemsizes[v]
    )


def _overlap(facts: Facts, a: Rows, b: Rows, u: int, v: int) -> np.ndarray:
    """bool [b, a]: whether rows of name v and of name u may touch the same byte."""
    if u == v or _same_layout(facts, u, v):
        out = np.ones((len(b.task), len(a.task)), bool)
        for d in range(len(facts.shapes[u])):
            out &= b.box[:, 0, d, None] < a.box[None, :, 1, d]
            out &= a.box[None, :, 0, d] < b.box[:, 1, d, None]
        if a.within.any() and b.within.any() and out.any():
            read = (a.kind == READ)[None] | (b.kind == READ)[:, None]
            out &= ~(read & facts.never_meet(b.within, a.within))
        return out
    (a0, a1), (b0, b1) = _byte_span(facts, a, u), _byte_span(facts, b, v)
    return (b0[:, None] < a1[None]) & (a0[None] < b1[:, None])


def _byte_span(facts: Facts, rows: Rows, name: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last byte of each row's box."""
    shape = facts.shapes[name]
    low, high = np.zeros(len(rows.task), np.int64), np.zeros(len(rows.task), np.int64)
    for d, size in enumerate(shape):
        low = low * size + rows.box[:, 0, d]
        high = high * size + rows.box[:, 1, d] - 1
    start, item = int(facts.start[name]), facts.itemsizes[name]
    return start + low * item, start + (high + 1) * item


# -- one segment -----------------------------------------------------------------------------------------------


@dataclass
class _Segment:
    """The accesses of one segment by name, and the pairs that must be ordered."""

    facts: Facts
    segment: SegmentFacts
    clocks: np.ndarray
    rows: Rows
    defined: dict[int, Definition]
    reads: dict[int, np.ndarray] = field(default_factory=dict)
    writes: dict[int, np.ndarray] = field(default_factory=dict)
    _touching: dict[int, set[int]] = field(default_factory=dict)
    _bases: dict[int, int | None] = field(default_factory=dict)
    _ordered: dict[tuple[int, int], bool] = field(default_factory=dict)
    _before: dict[tuple[int, int], bool] = field(default_factory=dict)
    _frontiers: dict[tuple[int, bool], np.ndarray] = field(default_factory=dict)
    _floors: dict[tuple[int, bool], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        facts, queues = self.facts, self.segment.segment.queues
        first = np.concatenate([[0], np.cumsum([len(queue) for queue in queues])])
        self.worker = facts.plan.tasks.table["worker"][self.rows.task].astype(np.int64)
        self.position = facts.task_position[self.rows.task]
        self.clock_row = first[self.worker] + self.position
        order = np.argsort(self.rows.name, kind="stable")
        names, starts = np.unique(self.rows.name[order], return_index=True)
        for name, index in zip(names.tolist(), np.split(order, starts[1:])):
            is_read = self.rows.kind[index] == READ
            self.reads[name], self.writes[name] = index[is_read], index[~is_read]
        self.names = names.tolist()

    def check(self) -> Summary:
        for v in self.defined:
            self._check_reads_after_writes(v)
        sharing = {v: self.facts.overlapping(v).tolist() for v in self.defined}
        touched = set(self.names) | set(self.defined)
        pairs = [
            (u, v)
            for v, others in sharing.items()
            for u in others
            if u in touched and u != v and not (u in self.defined and u < v)
        ]
        self._compare(pairs)
        dead: set[int] = set()
        for u, v in pairs:
            dead.update(self._check_turns(u, v))
        kills = {u: v for v, others in sharing.items() for u in others if u not in self.defined}
        uses = {u: int(self.rows.task[i[0]]) for u, i in self.reads.items() if len(i)}
        for v, definition in self.defined.items():
            base = self._base(v)
            if base is not None:
                uses.setdefault(base, definition.task)
        return Summary(
            uses={u: task for u, task in uses.items() if u not in self.defined},
            defines=tuple(v for v in self.defined if v not in dead),
            kills={**kills, **{v: v for v in dead}},
            settled=frozenset(v for v in self.defined if np.all(self._floor(v, False) >= 1)),
            written=frozenset(self.defined),
        )

    # Which pairs must be ordered.

    def _compare(self, pairs: list[tuple[int, int]]) -> None:
        """Notes the pairs of names that are ordered as a whole, whatever the regions: nearly all of them."""
        names = sorted({name for pair in pairs for name in pair})
        row = {name: i for i, name in enumerate(names)}
        ends = np.array([self._frontier(name, True) for name in names])
        begins = np.array([self._floor(name, False) for name in names])
        step = max(1, CHUNK // self.clocks.shape[1])
        for at in range(0, len(pairs), step):
            part = pairs[at : at + step]
            first, second = (np.array([row[pair[k]] for pair in part]) for k in (0, 1))
            for (u, v), there, back in zip(
                part,
                np.all(ends[first] <= begins[second], axis=1).tolist(),
                np.all(ends[second] <= begins[first], axis=1).tolist(),
            ):
                self._ordered[u, v], self._ordered[v, u] = there, back

    def _base(self, name: int) -> int | None:
        """The name whose contents an Update in place carries on, if ``name`` is the output of one."""
        if name not in self._bases:
            op = int(self.facts.producer[name]) if name < self.facts.value_count else -1
            it = self.facts.plan.ops[op] if op >= 0 and self.facts.in_place(op) else None
            self._bases[name] = it.base if isinstance(it, Update) else None
        return self._bases[name]

    def _lineage(self, name: int) -> list[int]:
        """``name`` and the names written in this segment whose contents it carries on."""
        out = [name]
        while (base := self._base(out[-1])) is not None and base in self.defined:
            out.append(base)
        return out

    def _check_reads_after_writes(self, v: int) -> None:
        if not len(self.reads.get(v, ())) or self.facts.tagged[v]:
            return  # what is read of a tagged value has arrived, whoever wrote it
        for source in self._lineage(v):
            fault = None
            if np.any(self._frontier(source, False) > self._floor(v, True)):
                fault = self._unordered(self.writes.get(source), self.reads[v], source, v)
            fault = fault or self._out_of_turn(self.writes.get(source), self.reads[v], source, v)
            if fault is not None:
                self._refuse_pair(*fault, "reads what has perhaps not been written yet")

    def _check_turns(self, u: int, v: int) -> list[int]:
        """Two names of the same bytes take turns; returns those that are gone after the segment."""
        if u in self.defined and (self._ordered[u, v] or self._ordered[v, u]):
            if self._plain(u) and self._plain(v) and self._routines(u).isdisjoint(self._routines(v)):
                return [u if self._ordered[u, v] else v]
        if u not in self.defined or u in self._lineage(v):
            # u was there before: all its readers come before v's writers.
            fault = self._fault(u, v)
            if fault is not None:
                self._refuse_pair(*fault, "overwrites what is perhaps still needed")
            return [u] if u in self.defined else []
        if v in self._lineage(u):
            return self._check_turns(v, u)
        if self._is_before(u, v) and not (self._is_before(v, u) and self._first(v, u)):
            return [u]
        if self._is_before(v, u):
            return [v]
        if self._first(v, u):
            u, v = v, u
        fault = self._fault(u, v)
        if fault is None:
            # Ordered as such, but between an in-place update and the contents it carries on.
            refuse(
                f"in {self.segment.label}, {self.facts.name_text(u)} and {self.facts.name_text(v)} "
                f"share bytes, but neither is done with before the other begins"
            )
        self._refuse_pair(*fault, "overwrites what is perhaps still needed")
        return []

    def _plain(self, name: int) -> bool:
        """Whether a name written here has contents of its own and is really written."""
        return self._base(name) is None and len(self.writes.get(name, ())) > 0

    def _first(self, u: int, v: int) -> bool:
        """Whether u comes first in the graph; decides between names whose accesses never meet."""
        return self.defined[u].op < self.defined[v].op

    def _is_before(self, u: int, v: int) -> bool:
        """Whether name u is done with before name v begins, both written in this segment."""
        found = self._before.get((u, v))
        if found is None:
            found = v not in self._lineage(u) and self._fault(u, v) is None
            base = self._base(v)
            if found and base is not None and u not in self._lineage(v):
                # v goes on with the bytes of its base, so u must be done with before that, too.
                found = base in self.defined and self._is_before(u, base)
            base = self._base(u)
            if found and base in self.defined and base != v:
                found = self._is_before(base, v)
            self._before[u, v] = found
        return found

    def _fault(self, u: int, v: int) -> tuple[int, int] | None:
        """Rows of names u and v that touch the same byte without the one of u coming before v's write of it."""
        everything = self._all(u)
        if not self._ordered[u, v]:
            fault = self._unordered(everything, self.writes.get(v), u, v)
            if fault is not None:
                return fault
        return self._out_of_turn(everything, self.writes.get(v), u, v)

    def _out_of_turn(
        self, before: np.ndarray | None, after: np.ndarray | None, u: int, v: int
    ) -> tuple[int, int] | None:
        """As :meth:`_unordered`, for rows of one task: its members run in order, each all at once.

        A member may read an element and then write that same element; else reading and writing the same bytes is
        no order at all.
        """
        if before is None or after is None or not self._routines(u) & self._routines(v):
            return None
        rows = self.rows
        both = np.intersect1d(rows.task[before], rows.task[after])
        before, after = (index[np.isin(rows.task[index], both)] for index in (before, after))
        same = _same_layout(self.facts, u, v)
        for j in after.tolist():
            mine = before[rows.task[before] == rows.task[j]]
            early = rows.member[mine] < rows.member[j]
            if same:
                early |= (rows.member[mine] == rows.member[j]) & rows.pointwise[mine] & (rows.kind[mine] == READ)
            late = mine[~early]
            if len(late):
                meet = _overlap(self.facts, rows.take(late), rows.take(np.array([j])), u, v)[0]
                if meet.any():
                    return int(late[np.argmax(meet)]), j
        return None

    def _routines(self, name: int) -> set[int]:
        found = self._touching.get(name)
        if found is None:
            index = self._all(name)
            tasks = self.rows.task[index] if index is not None else np.zeros(0, np.int64)
            found = set(np.unique(self.facts.plan.tasks.table["routine"][tasks]).tolist())
            self._touching[name] = found
        return found

    # Happens-before.

    def _all(self, name: int) -> np.ndarray | None:
        if name not in self.reads:
            return None
        return np.concatenate([self.reads[name], self.writes[name]])

    def _frontier(self, name: int, everything: bool) -> np.ndarray:
        """By worker: one past the position of its last task that writes (or touches at all) a name."""
        found = self._frontiers.get((name, everything))
        if found is None:
            found = np.zeros(self.clocks.shape[1], np.int64)
            index = self._all(name) if everything else self.writes.get(name)
            if index is not None:
                np.maximum.at(found, self.worker[index], self.position[index] + 1)
            self._frontiers[name, everything] = found
        return found

    def _floor(self, name: int, reads: bool) -> np.ndarray:
        """By worker: how many of its tasks happen before every reader (or writer) of a name."""
        found = self._floors.get((name, reads))
        if found is None:
            index = (self.reads if reads else self.writes).get(name)
            if index is None or len(index) == 0:
                found = np.full(self.clocks.shape[1], np.iinfo(np.int32).max)
            else:
                found = self.clocks[np.unique(self.clock_row[index])].min(axis=0)
            self._floors[name, reads] = found
        return found

    def _unordered(self, before: np.ndarray | None, after: np.ndarray | None, u: int, v: int) -> tuple[int, int] | None:
        """Rows i of ``before`` and j of ``after`` that may touch the same byte without i happening before j."""
        if before is None or after is None or len(before) == 0 or len(after) == 0:
            return None
        before = before[np.argsort(self.worker[before], kind="stable")]
        workers, starts = np.unique(self.worker[before], return_index=True)
        a = self.rows.take(before)
        last = (self.position[before] + 1).astype(np.int32)
        # Readers of one box need the same tasks: compare each distinct box once.
        boxes = self.rows.box[after].reshape(len(after), -1)
        flat = np.ascontiguousarray(np.concatenate([boxes, self.rows.within[after, None]], axis=1))
        _, pick, group = np.unique(
            flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1]))).ravel(),
            return_index=True,
            return_inverse=True,
        )
        need = np.zeros((len(pick), len(workers)), np.int32)
        step = max(1, CHUNK // len(before))
        for at in range(0, len(pick), step):
            b = self.rows.take(after[pick[at : at + step]])
            meet = _overlap(self.facts, a, b, u, v)
            need[at : at + step] = np.maximum.reduceat(np.where(meet, last[None], 0), starts, axis=1)
        for at in range(0, len(after), step):
            rows = after[at : at + step]
            seen = self.clocks[self.clock_row[rows][:, None], workers[None]]
            late = np.argwhere(seen < need[group[at : at + step]])
            if len(late):
                j = int(rows[late[0, 0]])
                meet = _overlap(self.facts, a, self.rows.take(np.array([j])), u, v)[0]
                meet &= self.worker[before] == workers[late[0, 1]]
                meet &= last > seen[late[0, 0], late[0, 1]]
                return int(before[np.flatnonzero(meet)[0]]), j
        return None

    def _refuse_pair(self, i: int, j: int, what: str) -> None:
        facts, rows = self.facts, self.rows

        def text(row: int) -> str:
            name = int(rows.name[row])
            box = rows.box[row][:, : len(facts.shapes[name])]
            kind = KIND_NAMES[int(rows.kind[row])].split(" ")[0] + "s"
            region = box_text(box) + spans_text(list(facts.spans)[rows.within[row]])
            return f"{facts.task_text(int(rows.task[row]))} {kind} {region} of {facts.name_text(name)}"

        why = "no queue or event orders the first before the second"
        if rows.task[i] == rows.task[j]:
            why = "the first is not over when the second begins"
        refuse(f"race in {self.segment.label}: the second {what}\n  {text(i)}\n  {text(j)}\n  {why}")
