"""Replays a Plan in NumPy, one task at a time, as real workers would: queues, events, barriers, bytes.

Storages are byte buffers at their planned places, so values that share memory really overwrite each other; every byte
that nobody has written is poison. A task sees only what it declares to read and changes only what it declares to
write. Any legal interleaving can be replayed: the next step is chosen by a seeded generator or by a function of the
caller, who can so hold back one task until everything else has run.

Tags are replayed as they are: a task starts when the elements it reads carry them. With ``late``, plain stores of a
plan with tagged values may become visible long after tagged ones: a worker sees its own at once, the others see them in
a step of its own, which comes at the latest before it signals an event or passes a barrier.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

import numpy as np

from jax_mpk.errors import DeadlockError
from jax_mpk.graph import dtypes
from jax_mpk.graph.bounds import evaluate
from jax_mpk.graph.ir import Nest, Op, Update
from jax_mpk.graph.reference import eval_epilogue, eval_op, eval_partial, merge
from jax_mpk.graph.regions import update_boxes
from jax_mpk.graph.scalar import Builder, Expr, inline
from jax_mpk.plan.ir import FINISH, PARTIAL, READ, TAGS, BranchNode, LoopNode, Plan, Routine, Schedule, Segment
from jax_mpk.plan.statistics import OpStats, Phases, op_stats, phase_count
from jax_mpk.plan.tags import tagged_accesses

__all__ = ["Choice", "Choose", "OpStats", "Phases", "Simulator", "op_stats", "phase_count"]

Array = np.ndarray[Any, Any]

#: What a worker does next: a task, -1 to go on past a point of control (read a predicate, enter a segment), or
#: ``-2 - task`` to make all its stores visible, those of this task being the oldest late ones.
Choice = tuple[int, int]  # worker, task or less
#: Picks one of the possible next steps; they are given in order of worker.
Choose = Callable[[Sequence[Choice]], Choice]


class _Barrier:
    """Marks the place in a worker's program where it waits for all others."""


@dataclass
class _Worker:
    """One worker's place in its program.

    Attributes:
      program: yields tasks (with the number of times their segment has begun), barriers, and None at control.
      at: what it yielded last; "end" when the program is over.
      late: stores that nobody else sees yet: places and their contents.
      oldest: the first task with any of them.
      ran: the task at ``at`` has run and signals when its stores are visible.
    """

    program: Iterator[tuple[int, int] | _Barrier | None]
    at: tuple[int, int] | _Barrier | str | None = None
    late: list[tuple[Array, Array]] = field(default_factory=list)
    oldest: int = -1
    ran: bool = False


class Simulator:
    """A replay in progress.

    Attributes:
      plan: the plan.
      done: tasks run so far, in order (a task of a loop once per round).

    Args:
      plan: the plan; it need not be verified, but what it names must exist.
      inputs: one array per argument.
      choose: picks the next step; default: by ``seed``, or the lowest worker that can go on.
      seed: for a random interleaving.
      poison: seed of the bytes that unwritten memory holds; None: NaN, or -1.
      strict: what a task reads beyond its declared accesses is poison.
      late: plain stores may be late, if the plan has tagged values.
      max_steps: tasks, late stores, and points of control passed, after which the replay is taken to be endless.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Any],
        *,
        choose: Choose | None = None,
        seed: int | None = None,
        poison: int | None = None,
        strict: bool = True,
        late: bool = False,
        max_steps: int = 1_000_000,
    ):
        self.plan = plan
        self.done: list[int] = []
        self._strict = strict
        rng = random.Random(seed)
        self._choose = choose or ((lambda all_: all_[0]) if seed is None else rng.choice)
        self._noise = None if poison is None else np.random.default_rng(poison)
        self._templates: dict[int, Array] = {}
        self._allocate(inputs)

        tasks = plan.tasks
        self._counts = np.zeros(plan.events, np.int64)
        self._signallers = np.bincount(tasks.signal_event, minlength=plan.events)
        rows = len(tasks.table)
        self._access_start = np.searchsorted(plan.accesses.task, np.arange(rows + 1))
        self._splits = {split.op: split for split in plan.splits}
        first = 0
        self._accumulators: dict[int, list[int]] = {}
        for split in plan.splits:
            self._accumulators[split.op] = [-1 - k for k in range(first, first + len(split.storages))]
            first += len(split.storages)
        self._accumulator_storage = [s for split in plan.splits for s in split.storages]
        self._accumulator_op = {name: op for op, names in self._accumulators.items() for name in names}
        reads, writes = tagged_accesses(plan)
        values = np.unique(plan.accesses.value[np.concatenate([reads, writes])]).tolist()
        self._tags = {v: np.zeros(plan.graph.values[v].shape, np.int64) for v in values}
        self._tag_reads, self._tag_writes = self._tagged_boxes(reads), self._tagged_boxes(writes)
        self._late = late and len(self._tags) > 0
        self._workers = [_Worker(self._program(w)) for w in range(plan.target.workers)]
        self._steps, self._max_steps = 0, max_steps

    # -- running -----------------------------------------------------------------------------------------------

    def run(self, stop_after: int | None = None) -> list[Array]:
        """Replays to the end, or until a task has run for the first time.

        Returns:
          The results as they are in memory.

        Raises:
          DeadlockError: no worker can go on.
        """
        while (task := self.step()) is not None:
            if task == stop_after:
                break
        return self.results()

    def step(self) -> int | None:
        """Runs one task; returns it, or None at the end."""
        while True:
            self._steps += 1
            if self._steps > self._max_steps:
                raise DeadlockError(f"the replay has not ended after {self._max_steps} steps")
            choices = self._possible()
            if not choices:
                if all(worker.at == "end" for worker in self._workers):
                    return None
                if not self._release():
                    raise DeadlockError(self._deadlock_text())
                continue
            number, task = self._choose(choices)
            worker = self._workers[number]
            if task >= 0:
                self._run(worker, task)
                self.done.append(task)
                return task
            if task == -1:
                self._advance(worker)
            else:
                self._show(worker)

    def results(self) -> list[Array]:
        """Copies of the results as they are in memory now, each from the buffer that the caller gave for it."""
        buffers = {s.index: b for s, b in zip(self.plan.storages, self._buffers) if s.kind == "output"}
        types = [self._type(v) for v in self.plan.graph.results]
        # Results without elements need no buffer.
        empty = np.zeros(0, np.uint8)
        return [_typed(buffers.get(number, empty), *of).copy() for number, of in enumerate(types)]

    def value(self, v: int) -> Array:
        """What the bytes of a value hold now."""
        return self._view(v)

    def inputs_intact(self) -> bool:
        """Whether no argument's own buffer has changed."""
        return all(
            np.array_equal(self._buffers[s], self._given[storage.index])
            for s, storage in enumerate(self.plan.storages)
            if storage.kind == "input"
        )

    def _possible(self) -> list[Choice]:
        out = []
        for number, worker in enumerate(self._workers):
            if worker.at is None:
                out.append((number, -1))
            elif isinstance(worker.at, tuple):
                task, times = worker.at
                ready = all(self._counts[e] >= self._signallers[e] * times for e in self._waits(task))
                if ready and not worker.ran and self._missing_tag(task, times) is None:
                    out.append((number, task))
            if worker.late:
                out.append((number, -2 - worker.oldest))
        return out

    def _waits(self, task: int) -> Array:
        tasks = self.plan.tasks
        return tasks.wait_event[tasks.wait_start[task] : tasks.wait_start[task + 1]]

    def _signals(self, task: int) -> Array:
        tasks = self.plan.tasks
        return tasks.signal_event[tasks.signal_start[task] : tasks.signal_start[task + 1]]

    def _advance(self, worker: _Worker) -> None:
        worker.at = next(worker.program, "end")

    def _release(self) -> bool:
        """Lets everybody past a barrier that everybody has reached."""
        if not all(isinstance(worker.at, _Barrier) for worker in self._workers):
            return False
        for worker in self._workers:
            self._advance(worker)
        return True

    def _deadlock_text(self) -> str:
        lines = ["no worker can go on"]
        for number, worker in enumerate(self._workers):
            if isinstance(worker.at, tuple):
                task, times = worker.at
                for event in self._waits(task).tolist():
                    need = int(self._signallers[event]) * times
                    if self._counts[event] < need:
                        lines.append(
                            f"  worker {number}: task {task} waits for event {event}, "
                            f"which has {int(self._counts[event])} of {need} signals"
                        )
                missing = self._missing_tag(task, times)
                if missing is not None:
                    v, element = missing
                    lines.append(
                        f"  worker {number}: task {task} waits for element {list(element)} of tagged value {v}, "
                        f"which has tag {int(self._tags[v][element])} and needs {_tag(times)}"
                    )
            elif isinstance(worker.at, _Barrier):
                lines.append(f"  worker {number}: waits at a barrier")
            elif worker.at == "end":
                lines.append(f"  worker {number}: has finished")
        return "\n".join(lines)

    # -- tags --------------------------------------------------------------------------------------------------

    def _tagged_boxes(self, rows: Array) -> dict[int, list[tuple[int, tuple[Any, ...]]]]:
        """Per task, the value and the region of some accesses."""
        out: dict[int, list[tuple[int, tuple[Any, ...]]]] = {}
        accesses = self.plan.accesses
        for i in rows.tolist():
            value = int(accesses.value[i])
            where = _slices(accesses.box[i], len(self.plan.graph.values[value].shape))
            out.setdefault(int(accesses.task[i]), []).append((value, where))
        return out

    def _missing_tag(self, task: int, times: int) -> tuple[int, tuple[int, ...]] | None:
        """The first element that a task must still wait for, as value and index."""
        for value, where in self._tag_reads.get(task, ()):
            missing = np.argwhere(self._tags[value][where] != _tag(times)).tolist()
            if missing:
                return value, tuple(i + axis.start for i, axis in zip(missing[0], where))
        return None

    def _run(self, worker: _Worker, task: int) -> None:
        """Runs a task, and signals unless some of its worker's stores are late."""
        assert isinstance(worker.at, tuple)
        if self._late:
            worker.oldest = worker.oldest if worker.late else task
            places = [place for place, _ in worker.late] + self._plain_places(task)
            public = [place.copy() for place in places]
            for place, contents in worker.late:
                place[...] = contents
            self._execute(task)
            worker.late = [(place, place.copy()) for place in places]
            for place, old in zip(places, public, strict=True):
                place[...] = old
        else:
            self._execute(task)
        for value, where in self._tag_writes.get(task, ()):
            self._tags[value][where] = _tag(worker.at[1])
        worker.ran = True
        if not worker.late or not len(self._signals(task)):
            self._finish(worker)

    def _plain_places(self, task: int) -> list[Array]:
        """Views of what a task writes, tagged values excepted."""
        out = []
        accesses = self.plan.accesses
        for i in range(self._access_start[task], self._access_start[task + 1]):
            name = int(accesses.value[i])
            if accesses.kind[i] != READ and name not in self._tags:
                view = self._view(name)
                out.append(view[_slices(accesses.box[i], view.ndim)])
        return out

    def _show(self, worker: _Worker) -> None:
        """Makes late stores visible."""
        for place, contents in worker.late:
            place[...] = contents
        worker.late = []
        if worker.ran:
            self._finish(worker)

    def _finish(self, worker: _Worker) -> None:
        """Signals what a task signals that has run, and goes on."""
        assert isinstance(worker.at, tuple)
        np.add.at(self._counts, self._signals(worker.at[0]), 1)
        worker.ran = False
        self._advance(worker)

    # -- control -----------------------------------------------------------------------------------------------

    def _program(self, worker: int) -> Iterator[tuple[int, int] | _Barrier | None]:
        times: dict[int, int] = {}

        def walk(schedule: Schedule) -> Iterator[tuple[int, int] | _Barrier | None]:
            for item in schedule:
                if isinstance(item, Segment):
                    times[id(item)] = times.get(id(item), 0) + 1
                    for task in item.queues[worker].tolist():
                        yield task, times[id(item)]
                elif isinstance(item, LoopNode):
                    yield from loop(item)
                else:
                    yield from branch(item)
                yield _Barrier()

        def loop(node: LoopNode) -> Iterator[tuple[int, int] | _Barrier | None]:
            rounds = 0
            while rounds != node.trips:
                if node.predicate >= 0:
                    yield from walk(node.cond)
                    yield None
                    if not self._view(node.predicate):
                        return
                yield from walk(node.body)
                rounds += 1

        def branch(node: BranchNode) -> Iterator[tuple[int, int] | _Barrier | None]:
            yield None
            which = min(max(int(self._view(node.index)), 0), len(node.arms) - 1)
            yield from walk(node.arms[which])

        return walk(self.plan.schedule)

    # -- memory ------------------------------------------------------------------------------------------------

    def _allocate(self, inputs: Sequence[Any]) -> None:
        plan = self.plan
        self._given = []
        for v, given in zip(plan.graph.inputs, inputs, strict=True):
            value, array = plan.graph.values[v], np.array(given, order="C")
            if (array.shape, dtypes.from_numpy(array.dtype)) != (value.shape, value.dtype):
                raise ValueError(f"value {v} is {value.dtype}{list(value.shape)}, got {array.dtype}{array.shape}")
            self._given.append(array.reshape(-1).view(np.uint8))
        workspace = self._poison(plan.workspace_bytes)
        self._buffers = []
        for storage in plan.storages:
            argument = storage.index if storage.kind == "input" else storage.argument
            if storage.kind == "workspace":
                self._buffers.append(workspace[storage.offset : storage.offset + storage.nbytes])
            elif argument >= 0:
                self._buffers.append(self._given[argument].copy())
            else:
                self._buffers.append(self._poison(storage.nbytes))
        self._scratch = [self._poison(plan.scratch_bytes) for _ in range(plan.target.workers)]

    def _poison(self, nbytes: int) -> Array:
        if self._noise is None:
            return np.full(nbytes, 0xFF, np.uint8)
        return self._noise.integers(0, 256, nbytes, dtype=np.uint8)

    def _type(self, name: int) -> tuple[tuple[int, ...], str]:
        """Shape and element type of a value, or of accumulator storage ``-1 - name``."""
        if name >= 0:
            value = self.plan.graph.values[name]
            return value.shape, value.dtype
        at = self._accumulator_op[name]
        op = self.plan.ops[at]
        assert isinstance(op, Nest)
        acc = op.acc[self._accumulators[at].index(name)]
        return (len(self._splits[at].bounds) - 1, *op.space), acc

    def _view(self, name: int) -> Array:
        shape, dtype = self._type(name)
        storage = self._accumulator_storage[-1 - name] if name < 0 else int(self.plan.value_storage[name])
        if prod(shape) == 0:
            return np.zeros(shape, dtypes.to_numpy(dtype))
        if storage < 0:
            raise ValueError(f"value {name} has no bytes")
        return _typed(self._buffers[storage], shape, dtype)

    def _unread(self, name: int) -> Array:
        """An array of a value's type that holds nothing but poison."""
        found = self._templates.get(name)
        if found is None:
            shape, dtype = self._type(name)
            found = _typed(self._poison(prod(shape) * dtypes.itemsize(dtype)), shape, dtype)
            self._templates[name] = found
        return found.copy()

    # -- tasks -------------------------------------------------------------------------------------------------

    def _execute(self, task: int) -> None:
        plan = self.plan
        row = plan.tasks.table[task]
        routine = plan.routines[int(row["routine"])]
        scratch = self._scratch[int(row["worker"])]
        accesses = range(self._access_start[task], self._access_start[task + 1])
        local: dict[int, _Local] = {}

        def read(name: int) -> Array:
            if not self._strict and name not in local:
                return _clean(self._view(name))
            out, full = self._unread(name), None
            if name in local:
                out[local[name].where] = local[name].held
                return _clean(out)
            for i in accesses:
                if plan.accesses.value[i] == name and plan.accesses.kind[i] == READ:
                    full = self._view(name) if full is None else full
                    where = np.ix_(*self._region(i, out.ndim))
                    out[where] = full[where]
            return _clean(out)

        def write(name: int, lo: Array, part: Array) -> None:
            full = self._view(name)
            for i in accesses:
                if plan.accesses.value[i] == name and plan.accesses.kind[i] != READ:
                    region = [
                        at[(at >= a) & (at < a + size)] for at, a, size in zip(self._region(i, len(lo)), lo, part.shape)
                    ]
                    full[np.ix_(*region)] = part[np.ix_(*(at - a for at, a in zip(region, lo)))]

        for at, member in enumerate(routine.members):
            op = plan.ops[member.op]
            rank = len(plan.graph.values[op.outputs[0]].shape)
            if member.stage == PARTIAL:
                rank += len(op.rspace)
            lo, hi = plan.tasks.boxes[int(row["box"]) + at][:, :rank]
            if np.any(hi <= lo):
                continue
            if member.stage == PARTIAL:
                self._partial(member.op, op, lo, hi, read, write)
                continue
            if member.stage == FINISH:
                parts = [read(name) for name in self._accumulators[member.op]]
                where = _slices((lo, hi))
                acc = [part[0][where] for part in parts]
                for k in range(1, len(self._splits[member.op].bounds) - 1):
                    acc = merge(op.combine, acc, [part[k][where] for part in parts])
                results = eval_epilogue(op, tuple(lo), tuple(hi), acc, read)
            else:
                results = self._evaluate(op, lo, hi, read)
            for v, result in zip(op.outputs, results, strict=True):
                if v in routine.local_values:
                    local[v] = self._keep(routine, scratch, v, lo, hi, result)
                else:
                    write(v, lo, result)

    def _region(self, access: int, rank: int) -> list[Array]:
        """What an access touches: its positions along each axis.

        Limits count if the task itself reads what they depend on: elsewhere the bytes may have been overwritten since.
        """
        accesses = self.plan.accesses
        mine = slice(*self._access_start[accesses.task[access] :][:2])
        read = set(accesses.value[mine][accesses.kind[mine] == READ].tolist())
        low, high = accesses.box[access]
        at = [np.arange(a, b) for a, b in zip(low[:rank].tolist(), high[:rank].tolist())]
        for span in accesses.spans[accesses.within[access]] if accesses.within[access] >= 0 else ():
            if not span.values <= read:
                continue
            inside = np.ones(len(at[span.axis]), bool)
            if span.first is not None:
                inside &= at[span.axis] >= evaluate(span.first, self._element)
            if span.end is not None:
                inside &= at[span.axis] < evaluate(span.end, self._element)
            at[span.axis] = at[span.axis][inside != span.outside]
        return at

    def _element(self, value: int, at: tuple[int, ...]) -> int:
        return int(_clean(self._view(value))[at])

    def _evaluate(self, op: Op, lo: Array, hi: Array, read: Callable[[int], Array]) -> list[Array]:
        if not isinstance(op, Update):
            return eval_op(op, tuple(lo.tolist()), tuple(hi.tolist()), read)
        storage = self.plan.value_storage
        in_place = storage[op.base] == storage[op.output] >= 0
        # Only the updates that can fall into this box: the others read what this task has no business with.
        ulo, uhi = update_boxes(op, lo[None], hi[None])
        part = _restricted(op, tuple(ulo[0].tolist()), tuple(uhi[0].tolist()))

        def read_base(v: int) -> Array:
            return _clean(self._view(v)) if in_place and v == op.base else read(v)

        return eval_op(part, tuple(lo.tolist()), tuple(hi.tolist()), read_base)

    def _partial(
        self,
        number: int,
        op: Nest,
        lo: Array,
        hi: Array,
        read: Callable[[int], Array],
        write: Callable[[int, Array, Array], None],
    ) -> None:
        axes = len(op.space)
        low, high = tuple(lo.tolist()), tuple(hi.tolist())
        parts = eval_partial(op, low[:axes], high[:axes], low[axes:], high[axes:], read)
        bounds = self._splits[number].bounds
        slot = bounds.index(int(lo[axes])) if int(lo[axes]) in bounds[:-1] else len(bounds)
        for name, acc, part in zip(self._accumulators[number], op.acc, parts, strict=True):
            with np.errstate(all="ignore"):
                rounded = np.asarray(part).astype(dtypes.to_numpy(acc))
            write(name, np.concatenate([[slot], lo[:axes]]), rounded[None])

    def _keep(self, routine: Routine, scratch: Array, v: int, lo: Array, hi: Array, result: Array) -> _Local:
        """Puts a box of a local value into scratch."""
        at = routine.local_values.index(v)
        extents, offset = routine.local_extents[at], routine.local_offsets[at]
        dtype = self.plan.graph.values[v].dtype
        size = prod(extents) * dtypes.itemsize(dtype)
        held = _typed(scratch[offset : offset + size], extents, dtype)[_slices((np.zeros_like(lo), hi - lo))]
        held[...] = result
        return _Local(_slices((lo, hi)), held)


@dataclass(frozen=True)
class _Local:
    """The part of a local value that a task has computed.

    Attributes:
      where: its place in the value.
      held: its bytes in scratch; other local values may take them over.
    """

    where: tuple[Any, ...]
    held: Array


def _tag(times: int) -> int:
    """The tag of an execution of a segment."""
    return 1 + times % TAGS


def _clean(array: Array) -> Array:
    """Truth values of poisoned bytes are still truth values."""
    if array.dtype != np.bool_:
        return array
    bits: Array = array.view(np.uint8) & 1
    return bits.view(np.bool_)


def _typed(buffer: Array, shape: Sequence[int], dtype: str) -> Array:
    """The first bytes of a buffer as an array."""
    size = prod(shape) * dtypes.itemsize(dtype)
    if len(buffer) < size:
        raise ValueError(f"{dtype}{list(shape)} needs {size} bytes, there are {len(buffer)}")
    return buffer[:size].view(dtypes.to_numpy(dtype)).reshape(shape)


def _slices(box: Any, rank: int | None = None) -> tuple[Any, ...]:
    """A box as an index; what it selects is an array even if it has no axes."""
    low, high = box
    return (*(slice(int(a), int(b)) for a, b in zip(low[:rank], high[:rank])), Ellipsis)


@cache
def _restricted(op: Update, lo: tuple[int, ...], hi: tuple[int, ...]) -> Update:
    """An Update with only the part ``[lo, hi)`` of its update space."""
    if lo == (0,) * len(lo) and hi == op.space:
        return op

    def shifted(expr: Expr) -> Expr:
        b = Builder(tuple(max(h - a, 0) for a, h in zip(lo, hi)))
        at = [b.add(c, b.index(a)) for c, a in zip(b.coords(), lo)]
        return b.build(*inline(b, expr, at, b.load))

    space = tuple(max(h - a, 0) for a, h in zip(lo, hi))
    return replace(op, space=space, index=shifted(op.index), value=shifted(op.value))
