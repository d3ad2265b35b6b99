"""A second, simple planner: legal plans that owe nothing to jax_mpk's own.

Every operator is cut along one axis, one event joins each pair of operators (or of tasks, with ``fine``) that touch the
same bytes, and order within a queue is the graph's. Nothing here is meant to be fast on a device; what matters is that
the plans use every feature of the IR and are legal by construction.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import (
    Block,
    Branch,
    Cumulative,
    Graph,
    Loop,
    Nest,
    Op,
    Sort,
    Update,
    blocks,
    reads,
    walk,
)
from jax_mpk.graph.regions import op_touches, update_written
from jax_mpk.graph.spans import UNLIMITED, BoxSpans, definitions, op_spans, written_spans
from jax_mpk.plan.ir import (
    FINISH,
    MAY,
    MUST,
    PARTIAL,
    READ,
    TAGGED_ITEMSIZE,
    WHOLE,
    BranchNode,
    LoopNode,
    Member,
    Plan,
    Schedule,
    Segment,
    Split,
    Storage,
    Target,
)
from tests.plan.wiring import Control, Wired, explicit
from tests.plan.work import Work, tables


@dataclass(frozen=True)
class Options:
    """How to plan.

    Attributes:
      workers: queues.
      tiles: boxes per operator, at most.
      split: slices that reductions are cut into, where they are long enough.
      reuse: workspace bytes are used again when their value is dead.
      fuse: maps and reductions with readers in the same segment only become local values, at random.
      fine: events join tasks whose regions overlap; otherwise operators.
      in_place: updates overwrite their base where nobody needs it afterwards.
      bundle: neighbours whose tasks touch the same boxes one by one become one routine.
      cut: segments of at most so many operators (0: as long as possible).
      tagged: some of the values that allow it are handed over by tagged words, chosen at random.
      seed: for placement and the other random choices.
    """

    workers: int = 3
    tiles: int = 3
    split: int = 1
    reuse: bool = False
    fuse: bool = False
    fine: bool = False
    in_place: bool = True
    bundle: bool = False
    cut: int = 0
    tagged: bool = False
    seed: int = 0


def target(workers: int, tagged: bool = False) -> Target:
    """A target for tests; the costs mean nothing."""
    return Target(
        name=f"test-{workers}",
        arch="cpu",
        workers=workers,
        scratch_bytes=1 << 20,
        l2_bytes=1 << 24,
        bandwidth=1e10,
        cache_bandwidth=1e11,
        flops=1e11,
        handoff=1e-6,
        task_overhead=1e-6,
        granule=16,
        tagged_bytes=1 << 20 if tagged else 0,
    )


def make_plan(graph: Graph, options: Options | None = None) -> Plan:
    """A legal plan for a graph."""
    options = options or Options()
    wired = explicit(graph, in_place=options.in_place)
    return _Planner(wired, options).run()


class _Planner:
    def __init__(self, wired: Wired, options: Options):
        self.wired, self.options, self.graph = wired, options, wired.graph
        self.rng = random.Random(options.seed)
        self.ops = tuple(walk(self.graph.block))
        self.number = {id(op): i for i, op in enumerate(self.ops)}
        self.shapes = [v.shape for v in self.graph.values]
        self.splits: list[Split] = []
        self.accumulator: dict[int, list[int]] = {}
        self.acc_types: list[str] = []
        self.known = definitions(self.graph)
        self.local = self._choose_local()
        self.work: list[Work] = []
        self.tasks = 0
        self.events = 0
        self.clock = 0
        self.spans: list[tuple[int, int]] = []  # of loops and branches, in clock ticks
        self.control: list[tuple[int, int, int]] = []  # value, from, to
        self.segments: list[list[Work]] = []

    def run(self) -> Plan:
        shape = self._block(self.graph.block)
        self.tasks = 0
        for work in self.work:
            work.first, self.tasks = self.tasks, self.tasks + len(work.workers)
        self.tagged = self._choose_tagged()
        storages, value_storage, workspace = self._memory()
        for works in self.segments:
            self._events(works, storages, value_storage)
        schedule = self._schedule(shape)
        return self._emit(storages, value_storage, workspace, schedule)

    # Which values are local.

    def _choose_local(self) -> set[int]:
        if not self.options.fuse:
            return set()
        wired, chosen = self.wired, set()
        sizes = Counter(wired.home)
        for block in _all_blocks(self.graph.block):
            for run in self._runs(block):
                if isinstance(run, Control):
                    continue
                for op in run:
                    outside = {v for other in block.ops if other not in run for v in reads(other)}
                    free = all(
                        sizes[wired.home[v]] == 1
                        and v not in block.results
                        and v not in outside
                        and prod(self.shapes[v]) * 8 <= 4096
                        for v in op.outputs
                    )
                    used = [other for other in run if set(op.outputs) & set(reads(other))]
                    # A local value is computed when it is read: what it reads must not be overwritten by then.
                    free &= all(sizes[wired.home[v]] == 1 for v in reads(op))
                    if free and used and not isinstance(op, Update) and self.rng.random() < 0.7:
                        chosen.add(self.number[id(op)])
        return chosen

    def _runs(self, block: Block) -> list[list[Op] | Control]:
        out: list[list[Op] | Control] = []
        for op in block.ops:
            if isinstance(op, Control):
                out.append(op)
            elif out and isinstance(out[-1], list) and not 0 < self.options.cut <= len(out[-1]):
                out[-1].append(op)
            else:
                out.append([op])
        return out

    # Blocks, in order; the result mirrors the schedule, with segments by number.

    def _block(self, block: Block) -> list:
        out: list = []
        for run in self._runs(block):
            begin = self.clock
            if isinstance(run, Loop):
                node = self.number[id(run)]
                cond = [] if run.cond is None else self._block(run.cond)
                body = self._block(run.body)
                self.clock += 1
                self.spans.append((begin, self.clock))
                if run.cond is not None:
                    self.control.append((run.cond.results[0], begin, self.clock))
                self.control += [(p, begin, self.clock) for p in run.params]
                out.append((node, cond, body))
            elif isinstance(run, Branch):
                arms = [self._block(arm) for arm in run.arms]
                self.clock += 1
                self.control.append((run.index, begin, self.clock))
                for v in run.outputs:
                    self.control.append((v, begin, self.clock))
                out.append((self.number[id(run)], arms))
            else:
                out.append(len(self.segments))
                self.segments.append([])
                producers = {v: op for op in run for v in op.outputs}
                for op in run:
                    if self.number[id(op)] not in self.local:
                        self._operator(op, producers)
                if self.options.bundle:
                    self._bundle(self.segments[-1])
        return out

    def _bundle(self, works: list[Work]) -> None:
        """Merges neighbours where each task of the second meets only its own counterpart of the first."""
        at = 0
        while at + 1 < len(works):
            a, b = works[at], works[at + 1]
            ops = {m.op for m in a.members} & {m.op for m in b.members}
            if len(a.workers) != len(b.workers) or ops or len(a.members) > 4:
                at += 1
                continue
            meet = np.zeros((len(b.workers), len(a.workers)), bool)
            for x in a.accesses:
                for y in b.accesses:
                    if x[1] != READ or y[1] != READ:
                        meet |= self._meet(x, y)
            if np.any(meet & ~np.eye(len(meet), dtype=bool)):
                at += 1
                continue
            a.members += b.members
            a.boxes += b.boxes
            a.accesses += b.accesses
            works.remove(b)
            self.work.remove(b)

    def _operator(self, op: Op, producers: dict[int, Op]) -> None:
        space = self.graph.values[op.outputs[0]].shape
        if prod(space) == 0:
            return
        slices = 1
        if isinstance(op, Nest) and op.rspace and op.combine is not None:
            slices = min(self.options.split, op.rspace[0])
        if slices < 2:
            self._routine(op, WHOLE, *self._tile(op, space), producers)
            return
        assert isinstance(op, Nest)
        bounds = tuple(round(op.rspace[0] * k / slices) for k in range(slices + 1))
        position = self.number[id(op)]
        first = len(self.acc_types)
        self.acc_types += op.acc
        self.accumulator[position] = list(range(first, len(self.acc_types)))
        self.splits.append(Split(position, bounds, tuple(op.acc)))  # storages follow
        lo, hi = self._tile(op, space)
        lows, highs = [], []
        for a, b in itertools.pairwise(bounds):
            rest = op.rspace[1:]
            lows.append(np.concatenate([lo, np.tile([a, *[0] * len(rest)], (len(lo), 1))], axis=1))
            highs.append(np.concatenate([hi, np.tile([b, *rest], (len(hi), 1))], axis=1))
        self._routine(op, PARTIAL, np.concatenate(lows), np.concatenate(highs), producers)
        self._routine(op, FINISH, lo, hi, producers)

    def _tile(self, op: Op, space: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        free = [d for d in range(len(space)) if not isinstance(op, Sort | Cumulative) or d != op.axis]
        if not free:
            return np.zeros((1, len(space)), np.int64), np.array([space], np.int64).reshape(1, -1)
        axis = max(free, key=lambda d: space[d])
        tiles = min(self.options.tiles, space[axis])
        cuts = [space[axis] * k // tiles for k in range(tiles + 1)]
        lo = np.zeros((tiles, len(space)), np.int64)
        hi = np.tile(np.array(space, np.int64), (tiles, 1))
        lo[:, axis], hi[:, axis] = cuts[:-1], cuts[1:]
        return lo, hi

    def is_local(self, value: int) -> bool:
        return any(value in self.ops[op].outputs for op in self.local)

    def _routine(self, op: Op, stage: int, lo: np.ndarray, hi: np.ndarray, producers: dict[int, Op]) -> None:
        members = [(op, stage, lo, hi)]
        # Local producers, latest first: each one's box is the hull of what later members read of it.
        wanted: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        order = list(producers.values())
        todo = [(op, stage, lo, hi)]
        touched = []
        for candidate in [None, *reversed(order)]:
            if candidate is not None:
                found = [wanted.pop(v) for v in candidate.outputs if v in wanted]
                if not found:
                    continue
                member = (candidate, WHOLE, *self._hull(candidate, [x for f in found for x in f]))
                members.insert(0, member)
                todo = [member]
            for this, this_stage, a, b in todo:
                touches = op_touches(self.graph, this, a, b, stage_finish=this_stage == FINISH)
                touched.append((this, this_stage, a, b, touches))
                for touch in touches:
                    producer = producers.get(touch.value)
                    if producer is not None and self.number[id(producer)] in self.local:
                        wanted.setdefault(touch.value, []).append((touch.lo, touch.hi))
        local = {v for this, *_ in members[:-1] for v in this.outputs}
        rows: list[tuple[int, int, np.ndarray, np.ndarray, BoxSpans]] = []
        for this, this_stage, a, b, touches in touched:
            anchor = this is op
            in_place = anchor and self._in_place(this)
            limits = op_spans(this, a, b, self.known, self.is_local, stage_finish=this_stage == FINISH)
            for k, (touch, spans) in enumerate(zip(touches, limits, strict=True)):
                if in_place and k == len(touches) - 1 and this.combine.kind == "set":
                    continue
                if touch.value not in local:
                    rows.append((touch.value, READ, touch.lo, touch.hi, spans))
            if this_stage == FINISH:
                slices = len(next(s for s in self.splits if s.op == self.number[id(this)]).bounds) - 1
                for k in self.accumulator[self.number[id(this)]]:
                    rows.append((-1 - k, READ, _first(0, a), _first(slices, b), UNLIMITED))
            if not anchor:
                continue
            if this_stage == PARTIAL:
                assert isinstance(this, Nest)
                axes = len(this.space)
                bounds = next(s for s in self.splits if s.op == self.number[id(this)]).bounds
                part = np.searchsorted(np.array(bounds), a[:, axes])
                for k in self.accumulator[self.number[id(this)]]:
                    rows.append((-1 - k, MUST, _first(part, a[:, :axes]), _first(part + 1, b[:, :axes]), UNLIMITED))
            elif in_place:
                spans = written_spans(this, a, b, self.known, self.is_local)
                rows.append((this.output, MAY, *update_written(this, a, b), spans))
            else:
                rows += [(v, MUST, a, b, UNLIMITED) for v in this.outputs]
        shift = self.rng.randrange(self.options.workers)
        workers = (np.arange(len(lo)) + shift) % self.options.workers
        self.clock += 1
        work = Work(
            tuple(Member(self.number[id(m[0])], m[1]) for m in members),
            [(m[2], m[3]) for m in members],
            workers,
            rows,
            self.tasks,
            [[] for _ in lo],
            [[] for _ in lo],
            self.clock,
        )
        self.tasks += len(lo)
        self.work.append(work)
        self.segments[-1].append(work)

    def _hull(self, op: Op, boxes: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        big = np.iinfo(np.int64).max
        empty = [np.any(b <= a, axis=1)[:, None] for a, b in boxes]
        lo = np.min([np.where(e, big, a) for e, (a, b) in zip(empty, boxes)], axis=0)
        hi = np.max([np.where(e, 0, b) for e, (a, b) in zip(empty, boxes)], axis=0)
        none = np.all(empty, axis=0)
        lo, hi = np.where(none, 0, lo), np.where(none, 0, hi)
        if isinstance(op, Sort | Cumulative):
            extent = self.shapes[op.outputs[0]][op.axis]
            lo[:, op.axis], hi[:, op.axis] = 0, np.where(none[:, 0], 0, extent)
        return lo, hi

    def _in_place(self, op: Op) -> bool:
        return isinstance(op, Update) and self.wired.home[op.base] == self.wired.home[op.output]

    def _choose_tagged(self) -> set[int]:
        """Values of one segment, of their own bytes, that some other routine reads."""
        if not self.options.tagged:
            return set()
        graph, sizes = self.graph, Counter(self.wired.home)
        outside = {v for v, _, _ in self.control} | {*graph.inputs, *graph.results}
        segments: dict[int, set[int]] = {}
        written: dict[int, int] = {}
        read: set[int] = set()
        for number, works in enumerate(self.segments):
            for k, work in enumerate(works):
                for v, kind, *_ in work.accesses:
                    segments.setdefault(v, set()).add(number)
                    if kind == MUST:
                        written[v] = k
                    elif kind == READ and written.get(v, k) != k:
                        read.add(v)
        found = [
            v
            for v in sorted(read)
            if v >= 0
            and v not in outside
            and sizes[self.wired.home[v]] == 1
            and len(segments[v]) == 1
            and dtypes.itemsize(graph.values[v].dtype) <= TAGGED_ITEMSIZE
        ]
        return {v for v in found if self.rng.random() < 0.7}

    # Bytes.

    def _memory(self) -> tuple[list[Storage], np.ndarray, int]:
        graph, home = self.graph, self.wired.home
        nbytes = [prod(v.shape) * dtypes.itemsize(v.dtype) for v in graph.values]
        storages: list[Storage] = []
        of: dict[int, int] = {}
        for number, v in enumerate(graph.results):
            of[home[v]] = len(storages)
            storages.append(Storage("output", number, self.wired.aliases.get(number, -1), 0, nbytes[v]))
        for number, v in enumerate(graph.inputs):
            if home[v] not in of:
                of[home[v]] = len(storages)
                storages.append(Storage("input", number, -1, 0, nbytes[v]))
        life: dict[int, list[int]] = {}
        size: dict[int, int] = {}

        def use(key: int, at: int, need: int) -> None:
            life.setdefault(key, []).append(at)
            size[key] = max(size.get(key, 0), need)

        accumulators = {}
        for s in self.splits:
            op = self.ops[s.op]
            for k, acc in zip(self.accumulator[s.op], s.storages):
                accumulators[k] = (len(s.bounds) - 1) * prod(op.space) * dtypes.itemsize(acc)
        for work in self.work:
            for name, *_ in work.accesses:
                if name < 0:
                    use(name, work.at, accumulators[-1 - name])
                elif home[name] not in of:
                    use(home[name], work.at, nbytes[name])
        for v, begin, end in self.control:
            if home[v] not in of:
                use(home[v], begin, nbytes[v])
                use(home[v], end, nbytes[v])
        spans = {key: [min(times), max(times)] for key, times in life.items()}
        # What is used in a loop and outside it keeps its bytes throughout the loop.
        carried = {home[p] for op in self.ops if isinstance(op, Loop) for p in op.params}
        for _ in self.spans:
            for begin, end in self.spans:
                for key, span in spans.items():
                    inside = [begin < t <= end for t in (span[0], span[1])]
                    if any(inside) and (not all(inside) or key in carried):
                        span[0], span[1] = min(span[0], begin), max(span[1], end)
        offset, end = {}, 0
        placed: list[int] = []
        for key in sorted(spans, key=lambda k: (spans[k][0], k)):
            need = -(-size[key] // 16) * 16
            busy = sorted(
                (offset[other], offset[other] + -(-size[other] // 16) * 16)
                for other in placed
                if not self.options.reuse
                or self.tagged & {key, other}
                or (spans[other][0] <= spans[key][1] and spans[key][0] <= spans[other][1])
            )
            at = 0
            for a, b in busy:
                if at + need <= a:
                    break
                at = max(at, b)
            offset[key] = at
            end = max(end, at + need)
            placed.append(key)
        for key in placed:
            of[key] = len(storages)
            storages.append(Storage("workspace", -1, -1, offset[key], size[key], key in self.tagged))
        self.splits = [replace(s, storages=tuple(of[-1 - k] for k in self.accumulator[s.op])) for s in self.splits]
        local = {v for op in self.local for v in self.ops[op].outputs}
        value_storage = np.array([-1 if v in local else of.get(home[v], -1) for v in range(len(nbytes))], np.int32)
        self.name_storage = {-1 - k: of[-1 - k] for k in accumulators}
        return storages, value_storage, end

    # Events.

    def _events(self, works: list[Work], storages: list[Storage], value_storage: np.ndarray) -> None:
        def span(name: int) -> tuple[object, int, int]:
            s = self.name_storage[name] if name < 0 else int(value_storage[name])
            it = storages[s]
            if it.kind == "workspace":
                return "workspace", it.offset, it.offset + it.nbytes
            return s, 0, it.nbytes

        def meets(a: tuple, b: tuple) -> bool:
            if b[1] == READ and (a[1] == READ or b[0] in self.tagged):
                return False
            x, y = span(a[0]), span(b[0])
            return x[0] == y[0] and x[1] < y[2] and y[1] < x[2]

        ancestors: list[set[int]] = []
        for j, later in enumerate(works):
            mine: set[int] = set()
            for i in reversed(range(j)):
                if i in mine:
                    continue
                pairs = [(a, b) for a in works[i].accesses for b in later.accesses if meets(a, b)]
                if not pairs:
                    continue
                if self.options.fine:
                    self._fine(works[i], later, pairs)
                else:
                    mine |= {i} | ancestors[i]
                    for signals in works[i].signals:
                        signals.append(self.events)
                    for waits in later.waits:
                        waits.append(self.events)
                    self.events += 1
            ancestors.append(mine)

    def _fine(self, earlier: Work, later: Work, pairs: list[tuple]) -> None:
        """One event per later task, signalled by the earlier tasks whose regions meet its own."""
        meet = np.zeros((len(later.waits), len(earlier.signals)), bool)
        for x, y in pairs:
            meet |= self._meet(x, y, sharing=True)
        # Program order does for tasks of the same worker: the earlier routine is earlier in every queue.
        meet &= later.workers[:, None] != earlier.workers[None]
        for t in np.flatnonzero(meet.any(axis=1)):
            for s in np.flatnonzero(meet[t]):
                earlier.signals[s].append(self.events)
            later.waits[t].append(self.events)
            self.events += 1

    def _meet(self, x: tuple, y: tuple, sharing: bool = False) -> np.ndarray:
        """bool [tasks of y, tasks of x]: whether regions overlap; ``sharing``: the names share bytes."""
        (u, _, alo, ahi, _), (v, _, blo, bhi, _) = x, y
        home, values = self.wired.home, self.graph.values
        same = u == v or (u >= 0 and v >= 0 and home[u] == home[v] and values[u] == replace(values[v], id=u))
        if not same:
            shared = sharing or (u >= 0 and v >= 0 and home[u] == home[v])
            return np.full((len(blo), len(alo)), shared)
        hit = np.all(bhi > blo, axis=1)[:, None] & np.all(ahi > alo, axis=1)[None]
        for d in range(alo.shape[1]):
            hit &= (blo[:, d, None] < ahi[None, :, d]) & (alo[None, :, d] < bhi[:, d, None])
        return hit

    # Tables.

    def _schedule(self, shape: list) -> Schedule:
        out = []
        for item in shape:
            if isinstance(item, int):
                queues: list[list[int]] = [[] for _ in range(self.options.workers)]
                for work in self.segments[item]:
                    for t, w in enumerate(work.workers.tolist()):
                        queues[w].append(work.first + t)
                out.append(Segment(tuple(np.array(q, np.int32) for q in queues)))
            elif isinstance(self.ops[item[0]], Loop):
                op = self.ops[item[0]]
                out.append(
                    LoopNode(
                        item[0],
                        self._schedule(item[1]),
                        self._schedule(item[2]),
                        -1 if op.cond is None else op.cond.results[0],
                        -1 if op.trips is None else op.trips,
                    )
                )
            else:
                op = self.ops[item[0]]
                out.append(BranchNode(item[0], op.index, tuple(map(self._schedule, item[1]))))
        return tuple(out)

    def _emit(self, storages: list[Storage], value_storage: np.ndarray, workspace: int, schedule: Schedule) -> Plan:
        routines, tasks, accesses, scratch = tables(self.work, self.graph, self.local)
        return Plan(
            graph=self.graph,
            ops=self.ops,
            target=target(self.options.workers),
            storages=tuple(storages),
            value_storage=value_storage,
            workspace_bytes=workspace,
            aliases=dict(self.wired.aliases),
            routines=routines,
            tasks=tasks,
            accesses=accesses,
            splits=tuple(self.splits),
            events=self.events,
            schedule=schedule,
            scratch_bytes=scratch,
        )


def _all_blocks(block: Block) -> Iterator[Block]:
    yield block
    for op in block.ops:
        for inner in blocks(op):
            yield from _all_blocks(inner)


def _first(first: int | np.ndarray, rest: np.ndarray) -> np.ndarray:
    return np.concatenate([np.broadcast_to(first, (len(rest),))[:, None], rest], axis=1)
