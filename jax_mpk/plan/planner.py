"""make_plan: a fused Graph becomes a Plan for one target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.bounds import Spans
from jax_mpk.graph.ir import Block, Branch, Graph, Loop, Note, Op, Update, blocks, reads, walk
from jax_mpk.graph.spans import definitions
from jax_mpk.plan import costs, ir
from jax_mpk.plan.access import Access, accesses
from jax_mpk.plan.cluster import Clusterer, Routine
from jax_mpk.plan.defer import deferred
from jax_mpk.plan.handoff import Handoffs
from jax_mpk.plan.ir import MUST, READ
from jax_mpk.plan.locals import lay_out
from jax_mpk.plan.memory import Life, assign_offsets
from jax_mpk.plan.place import Placer
from jax_mpk.plan.prepare import Prepared, prepare
from jax_mpk.plan.split_reduce import split_reductions
from jax_mpk.plan.split_softmax import split_softmax
from jax_mpk.plan.tile import Tiler


def make_plan(graph: Graph, target: ir.Target) -> ir.Plan:
    """Plans a graph.

    Args:
      graph: the fused graph.
      target: the device to plan for; it need not be present.

    Returns:
      The plan; :func:`jax_mpk.plan.verify.verify_plan` proves it.
    """
    split = split_reductions(split_softmax(graph, target), target)
    return _Planner(prepare(split), target).run()


class _Planner:
    def __init__(self, prepared: Prepared, target: ir.Target):
        self.graph = prepared.graph
        self.share = prepared.share
        self.aliases = prepared.aliases
        self.target = target
        self.ops = tuple(walk(self.graph.block))
        self.op_number = {id(op): i for i, op in enumerate(self.ops)}
        self.shapes = tuple(v.shape for v in self.graph.values)
        self.tiler = Tiler(self.graph, target, self.share)
        self.pinned = self._pinned()
        self.known = definitions(self.graph)
        self.local: set[int] = set()  # so far
        # Filled segment by segment.
        self.routines: list[ir.Routine] = []
        self.routine_number: dict[tuple, int] = {}
        self.task_rows: list[tuple[int, int, int]] = []
        self.boxes: list[np.ndarray] = []
        self.box_count = 0
        self.waits: list[list[int]] = []
        self.signals: list[list[int]] = []
        self.touched: list[tuple[np.ndarray, Access]] = []
        self.events = 0
        self.tagged: set[int] = set()  # values handed over by tagged words
        self.segments: list[tuple[Handoffs, list[list[Access]]]] = []
        self.loop_segments: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def run(self) -> ir.Plan:
        schedule = self._block(self.graph.block)
        storages, value_storage, workspace = self._storages()
        tasks = self._tasks()
        return ir.Plan(
            graph=self.graph,
            ops=self.ops,
            target=self.target,
            storages=storages,
            value_storage=value_storage,
            workspace_bytes=workspace,
            aliases=dict(self.aliases),
            routines=tuple(self.routines),
            tasks=tasks,
            accesses=self._accesses(),
            splits=(),
            events=self.events,
            schedule=schedule,
            scratch_bytes=max((_scratch(self.graph, r) for r in self.routines), default=0),
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        """What passes have not fused and no routine has joined since, and what has not been joined.

        An epilogue that its readers compute for themselves is part of a fusion of another kind.
        """
        routines: dict[int, set[int]] = {}  # by value
        for number, routine in enumerate(self.routines):
            for member in routine.members:
                for v in self.ops[member.op].outputs:
                    routines.setdefault(v, set()).add(number)

        def holds(note: Note) -> bool:
            if note.between is None:
                return True
            first, second = (routines.get(v, set()) for v in note.between)
            elsewhere = note.about == "epilogue" and note.between[1] in self.local
            return bool(first) and not elsewhere and not second <= first

        return (*(str(note) for note in self.graph.notes if holds(note)), *self.notes)

    # -- schedule ----------------------------------------------------------------------------------------------

    def _block(self, block: Block) -> ir.Schedule:
        items: list[ir.Segment | ir.LoopNode | ir.BranchNode] = []
        for stretch in _stretches(block):
            if isinstance(stretch, list):
                items.append(self._segment(stretch))
                continue
            number = self.op_number[id(stretch)]
            if isinstance(stretch, Loop):
                first = len(self.segments)
                cond = () if stretch.cond is None else self._block(stretch.cond)
                body = self._block(stretch.body)
                self.loop_segments.append((first, len(self.segments)))
                predicate = -1 if stretch.cond is None else stretch.cond.results[0]
                trips = -1 if stretch.trips is None else stretch.trips
                items.append(ir.LoopNode(number, cond, body, predicate, trips))
            else:
                arms = tuple(self._block(arm) for arm in stretch.arms)
                items.append(ir.BranchNode(number, stretch.index, arms))
        return tuple(items)

    def _segment(self, ops: list[Op]) -> ir.Segment:
        clusterer = Clusterer(self.graph, self.target, self.tiler, self.pinned, self.share)
        placer = Placer(self.target)
        clustered = clusterer.run(ops, _after(ops, self.share))
        self.notes += clusterer.notes
        made = {v for routine in clustered for op in routine.ops for v in op.outputs}
        early, late = deferred(clustered, self.share, lambda routine: self._may_wait(routine, made))
        routines = early + late
        self.local.update(v for routine in routines for v in routine.local)
        touched = [accesses(routine, self.tiler.in_place, self.known, self.local) for routine in routines]
        places = [placer.place(routine) for routine in early]
        # Loads are equal enough by now; late routines are spread among themselves.
        placer = Placer(self.target)
        places += [placer.place(routine) for routine in late]
        self.tagged |= self._tagged(touched, places)
        first_task, first_event = len(self.task_rows), self.events
        handoffs = Handoffs(self.target.workers, self.share, self.shapes, self.tagged, first_task, first_event)
        last = max((k for k, routine in enumerate(early) if not self._is_short(routine)), default=-1)
        for number, (routine, workers, found) in enumerate(zip(routines, places, touched, strict=True)):
            handoffs.add(workers, found)
            # Where something short follows anyway, late routines may wait for all before it: that costs no phase.
            if late and number == last < len(early) - 1:
                handoffs.close()
            self._emit(routine, workers, found)
        self.waits += handoffs.waits
        self.signals += handoffs.signals
        self.events = handoffs.events
        self.segments.append((handoffs, touched))
        return ir.Segment(tuple(np.array(q, np.int32) for q in handoffs.queues))

    def _may_wait(self, routine: Routine, made: set[int]) -> bool:
        """Whether a routine is a short update in place, such as a write to a cache, or short and needs nothing that its
        segment makes, such as the step of a loop's counter.
        """
        makers = (op for op in routine.ops if not set(op.outputs) <= set(routine.local))
        updates = all(isinstance(op, Update) and self.tiler.in_place(op) for op in makers)
        needs = {v for op in routine.ops for v in reads(op) if v not in routine.local}
        return self._is_short(routine) and (updates or needs.isdisjoint(made))

    def _is_short(self, routine: Routine) -> bool:
        return routine.cut.seconds <= self.target.handoff

    def _tagged(self, touched: list[list[Access]], places: list[np.ndarray]) -> set[int]:
        """Values of a segment that tagged words can hand over, where program order does not: the cheapest way first."""
        tagged: set[int] = set()
        written: dict[int, tuple[Access, np.ndarray]] = {}
        most: Counter[int] = Counter()  # elements that a task reads
        for access in (access for found in touched for access in found if access.kind == READ):
            volume = costs.volume(access.lo, access.hi).max(initial=0)
            most[access.value] = max(most[access.value], int(volume))
        for found, workers in zip(touched, places, strict=True):
            for access in found:
                if access.kind == READ and access.value in written and access.value not in tagged:
                    write, writers = written[access.value]
                    if np.any(access.meets(write) & (workers[:, None] != writers[None])):
                        tagged.add(access.value)
            for access in found:
                if access.kind == MUST and self._may_be_tagged(access.value, most[access.value]):
                    written[access.value] = access, workers
        return tagged

    def _may_be_tagged(self, v: int, read: int) -> bool:
        itemsize = dtypes.itemsize(self.graph.values[v].dtype)
        size = int(np.prod(self.shapes[v], dtype=np.int64)) * itemsize
        return v not in self.pinned and self.target.may_tag(size, itemsize, read * itemsize)

    def _emit(self, routine: Routine, workers: np.ndarray, found: list[Access]) -> None:
        members = tuple(ir.Member(self.op_number[id(op)]) for op in routine.ops)
        local = routine.local
        homes, _ = lay_out(self.graph, routine.ops, list(zip(routine.cut.lo, routine.cut.hi, strict=True)), set(local))
        offsets, extents = zip(*(homes[v] for v in local), strict=True) if local else ((), ())
        number = len(self.routines)
        self.routines.append(ir.Routine(members, local, offsets, extents))
        first = len(self.task_rows)
        count = len(routine.ops)
        tasks = routine.cut.tasks
        self.task_rows += [(number, int(w), self.box_count + t * count) for t, w in enumerate(workers)]
        # Rows are task-major: all members of task 0, then of task 1, …
        rank = max((lo.shape[1] for lo in routine.cut.lo), default=0)
        corners = np.zeros((tasks, count, 2, rank), np.int64)
        corners[:, :, 1] = 1
        for m, (lo, hi) in enumerate(zip(routine.cut.lo, routine.cut.hi, strict=True)):
            corners[:, m, 0, : lo.shape[1]] = lo
            corners[:, m, 1, : hi.shape[1]] = hi
        self.boxes.append(corners.reshape(tasks * count, 2, rank))
        self.box_count += tasks * count
        ids = np.arange(first, first + tasks, dtype=np.int32)
        self.touched += [(ids, access) for access in found]

    # -- values and bytes --------------------------------------------------------------------------------------

    def _pinned(self) -> set[int]:
        """Values that cannot be local: used outside the stretch that computes them, or sharing storage."""
        pinned = set(self.graph.inputs) | set(self.graph.results)
        sizes = np.bincount(np.array(self.share, np.int64), minlength=len(self.share))
        pinned.update(v for v, home in enumerate(self.share) if sizes[home] > 1)

        def visit(block: Block) -> None:
            pinned.update(block.results)
            defined: dict[int, int] = {}
            for number, stretch in enumerate(_stretches(block)):
                group = stretch if isinstance(stretch, list) else [stretch]
                for op in group:
                    pinned.update(v for v in reads(op) if defined.get(v, -1) != number)
                    for inner in blocks(op):
                        visit(inner)
                        pinned.update(v for v in reads(op))
                    defined.update(dict.fromkeys(op.outputs, number))
                    if isinstance(op, Loop | Branch):
                        pinned.update(op.outputs)
                        pinned.update(op.operands)

        visit(self.graph.block)
        return pinned

    def _storages(self) -> tuple[tuple[ir.Storage, ...], np.ndarray, int]:
        graph = self.graph
        nbytes = [int(np.prod(v.shape, dtype=np.int64)) * dtypes.itemsize(v.dtype) for v in graph.values]
        homes: dict[int, int] = {}  # share class → storage
        storages: list[ir.Storage] = []
        for number, v in enumerate(graph.results):
            homes[self.share[v]] = len(storages)
            storages.append(ir.Storage("output", number, self.aliases.get(number, -1), 0, nbytes[v]))
        for number, v in enumerate(graph.inputs):
            if self.share[v] not in homes:
                homes[self.share[v]] = len(storages)
                storages.append(ir.Storage("input", number, -1, 0, nbytes[v]))
        lives = self._lives(homes, nbytes)
        known = {
            (s, r): handoffs.known[r]
            for s, (handoffs, _) in enumerate(self.segments)
            for r in range(len(handoffs.known))
        }
        workspace = assign_offsets(list(lives.values()), known)
        for home, life in lives.items():
            homes[home] = len(storages)
            storages.append(ir.Storage("workspace", -1, -1, life.offset, life.nbytes, home in self.tagged))
        value_storage = np.full(len(graph.values), -1, np.int32)
        for v in range(len(graph.values)):
            if v not in self.local and self.share[v] in homes:
                value_storage[v] = homes[self.share[v]]
        return tuple(storages), value_storage, workspace

    def _lives(self, homes: dict[int, int], nbytes: list[int]) -> dict[int, Life]:
        lives: dict[int, Life] = {}
        touched_in: dict[int, set[int]] = {}
        for s, (handoffs, routines) in enumerate(self.segments):
            for r, found in enumerate(routines):
                for access in found:
                    home = self.share[access.value]
                    if home in homes:
                        continue
                    life = lives.get(home)
                    if life is None:
                        life = lives[home] = Life(0, (s, r), s, np.zeros(self.target.workers, np.int32))
                    life.nbytes = max(life.nbytes, nbytes[access.value])
                    if life.last_segment != s:
                        life.last_segment, life.positions = s, np.zeros(self.target.workers, np.int32)
                    np.maximum.at(life.positions, handoffs.worker_of[r], handoffs.position[r])
                    touched_in.setdefault(home, set()).add(s)
        # What lives in a loop and outside it, or is carried by one, keeps its bytes, and so does what is tagged: no
        # order is known that has all readers done.
        carried = {self.share[v] for op in self.ops if isinstance(op, Loop) for v in (*op.params, *op.outputs)}
        control = {
            self.share[v]
            for op in self.ops
            for v in (
                (op.index,) if isinstance(op, Branch) else op.cond.results if isinstance(op, Loop) and op.cond else ()
            )
        }
        for home, segments in touched_in.items():
            crosses = any(
                any(a <= s < b for s in segments) and not all(a <= s < b for s in segments)
                for a, b in self.loop_segments
            )
            lives[home].pinned = crosses or home in carried or home in control or home in self.tagged
        return lives

    # -- tables ------------------------------------------------------------------------------------------------

    def _tasks(self) -> ir.Tasks:
        rank = max((c.shape[2] for c in self.boxes), default=0)
        table = np.array(self.task_rows, dtype=np.int32).reshape(-1, 3)
        records = np.zeros(len(table), ir.TASK)
        for column, name in enumerate(("routine", "worker", "box")):
            records[name] = table[:, column]
        padded = [_pad(c, rank) for c in self.boxes]
        boxes = np.concatenate(padded) if padded else np.zeros((0, 2, 0), np.int64)
        wait_start, wait_event = _csr(self.waits)
        signal_start, signal_event = _csr(self.signals)
        return ir.Tasks(records, boxes, wait_start, wait_event, signal_start, signal_event)

    def _accesses(self) -> ir.Accesses:
        rank = max((a.lo.shape[1] for _, a in self.touched), default=0)
        if not self.touched:
            empty = np.zeros(0, np.int32)
            return ir.Accesses(empty, empty, np.zeros(0, np.uint8), np.zeros((0, 2, rank), np.int64), empty, ())
        task = np.concatenate([ids for ids, _ in self.touched])
        value = np.concatenate([np.full(len(ids), a.value, np.int32) for ids, a in self.touched])
        kind = np.concatenate([np.full(len(ids), a.kind, np.uint8) for ids, a in self.touched])
        box = np.concatenate([_pad(np.stack([a.lo, a.hi], axis=1), rank) for _, a in self.touched])
        spans: dict[Spans, int] = {(): -1}
        for _, access in self.touched:
            for some in access.spans.spans:
                spans.setdefault(some, len(spans) - 1)
        within = np.full(len(task), -1, np.int32)
        at = 0
        for ids, access in self.touched:
            if access.spans.which is not None:
                numbers = np.array([spans[some] for some in access.spans.spans], np.int32)
                within[at : at + len(ids)] = numbers[access.spans.which]
            at += len(ids)
        order = np.argsort(task, kind="stable")
        regions = tuple(some for some in spans if some)
        return ir.Accesses(task[order], value[order], kind[order], box[order], within[order], regions)


def _stretches(block: Block) -> Iterator[list[Op] | Loop | Branch]:
    """Runs of straight-line operators, and the loops and branches between them."""
    run: list[Op] = []
    for op in block.ops:
        if isinstance(op, Loop | Branch):
            if run:
                yield run
            run = []
            yield op
        else:
            run.append(op)
    if run:
        yield run


def _after(ops: list[Op], share: tuple[int, ...]) -> list[set[int]]:
    """Per operator of a stretch, the later ones that touch a storage either of them writes."""
    after: list[set[int]] = [set() for _ in ops]
    writers: dict[int, list[int]] = {}
    readers: dict[int, list[int]] = {}
    for position, op in enumerate(ops):
        read = {share[v] for v in reads(op)}
        written = {share[v] for v in op.outputs}
        for home in read | written:
            for earlier in writers.get(home, ()):
                after[earlier].add(position)
        for home in written:
            for earlier in readers.get(home, ()):
                after[earlier].add(position)
        for home in written:
            writers.setdefault(home, []).append(position)
        for home in read:
            readers.setdefault(home, []).append(position)
    for position, later in enumerate(after):
        later.discard(position)
    return after


def _scratch(graph: Graph, routine: ir.Routine) -> int:
    ends = [
        offset + int(np.prod(extents)) * dtypes.itemsize(graph.values[v].dtype)
        for v, offset, extents in zip(routine.local_values, routine.local_offsets, routine.local_extents, strict=True)
    ]
    return max(ends, default=0)


def _pad(boxes: np.ndarray, rank: int) -> np.ndarray:
    missing = rank - boxes.shape[2]
    if missing == 0:
        return boxes
    pad = np.zeros((len(boxes), 2, missing), np.int64)
    pad[:, 1] = 1
    return np.concatenate([boxes, pad], axis=2)


def _csr(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    start = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(x) for x in lists], out=start[1:])
    return start, np.array([e for x in lists for e in x], np.int32)
