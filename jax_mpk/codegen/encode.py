"""encode: a Plan becomes a Program, one stream of 64-bit words.

The stream, in order; csrc/host/program.cc, decode_code.cc and decode_routine.cc read it. "List" is a count and the
items; "packed" a count and 32-bit integers, two per word; "text" a length in bytes and eight bytes per word; names are
numbers of the symbol table. -1 stands for none.

    header     magic, version, number of words, workers, workspace bytes, bytes of local values
    symbols    list of texts: instructions, element types, kinds
    storages   list of: kind, argument or result number, aliased argument, offset, bytes, is tagged
    codes      list of: rank, axis of each loop, bytes of a lane, number of arrays,
                 list of accesses (slot, constant, offset register, its level, predicate register, its level, stepped
                   only, stride of each loop),
                 packed first instruction of each level,
                 list of instructions (name + level << 32, four 16-bit registers, immediate),
                 list of results (register, type), list of accumulators (register, type)
    routines   list of: text,
                 list of local values (offset, bytes, list of extents),
                 list of members (kind, axes, parallel axes, extents, list of operands, list of outputs, body, epilogue,
                   list of cut points, list of accumulator types, and what its kind needs, see `_Routines`);
                 an array is: is local, storage or local number, type, list of extents
    boxes      axes, wide (0: packed, 1: words), number of rows; low and high corner of each row
    tasks      packed routines, packed workers, packed rows of boxes (one per member, task by task)
    events     number; packed starts and events of waits, packed starts and events of signals
    regions    list of arrays (value or -1 - accumulators, storage, bytes of an element, list of extents), empty and
               the end where nothing is tagged; boxes as above; packed starts, arrays and rows of boxes of what tasks
               read when its tags have arrived; the same of all they write
    schedule   list of items: "segment", packed queue of each worker; "loop", 1, rounds, body or "loop", 0, storage of
               the predicate, condition, body; "branch", storage of the index, list of arms
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar, cast

import numpy as np

from jax_mpk.codegen import bodies
from jax_mpk.codegen.ir import Code, MemberText, Program, RoutineText
from jax_mpk.codegen.lanes import parallel_lanes
from jax_mpk.codegen.vm import Layout
from jax_mpk.codegen.words import Writer
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Combine, Cumulative, Nest, Op, Sort, Source, Update
from jax_mpk.graph.scalar import Builder, Expr
from jax_mpk.plan.ir import FINISH, PARTIAL, READ, BranchNode, LoopNode, Plan, Routine, Schedule, Segment
from jax_mpk.plan.tags import tagged_accesses

MAGIC = int.from_bytes(b"jax_mpk", "little")
#: Changes whenever the meaning of a word does, here and in csrc/host/program.h.
VERSION = 3
#: Most axes of a member or an array (csrc/host/bodies.h refuses more).
MAX_AXES = 32

_Op = TypeVar("_Op", Nest, Cumulative)

#: An array of a member: is local, storage or local number, type, extents; and its strides in elements.
Array = tuple[bool, int, str, tuple[int, ...], tuple[int, ...]]


def encode(plan: Plan) -> Program:
    """Encodes a verified plan."""
    w = Writer()
    tail = Writer()
    tail._symbols = w._symbols  # one table for both
    routines = _Routines(plan, tail)
    for number, routine in enumerate(plan.routines):
        routines.add(number, routine)
    w.put(plan.target.workers, plan.workspace_bytes, plan.scratch_bytes)
    header = w.words()

    for storage in plan.storages:
        w.put_symbol(storage.kind)
        w.put(storage.index, storage.argument, storage.offset, storage.nbytes, int(storage.tagged))
    w.put(len(routines.codes))
    for code in routines.codes:
        _put_code(w, code)
    w.put(len(plan.routines))
    w.array(tail.words())
    _put_tasks(w, plan)
    _put_regions(w, plan)
    _put_schedule(w, plan, plan.schedule)
    rest = w.words()[len(header) :]

    s = Writer()
    s.put(len(w.symbols()))
    for name in w.symbols():
        s.text(name)
    s.put(len(plan.storages))
    symbols = s.words()
    start = np.array([MAGIC, VERSION, 3 + len(header) + len(symbols) + len(rest)], np.int64)
    words = np.concatenate([start, header, symbols, rest])
    return Program(words, plan.workspace_bytes, tuple(routines.texts))


class _Routines:
    """Encodes routines; codes that are alike are encoded once.

    Attributes:
      codes: in order of their numbers.
      texts: for the printer.
    """

    def __init__(self, plan: Plan, writer: Writer):
        self.plan = plan
        self.w = writer
        self.codes: list[Code] = []
        self.texts: list[RoutineText] = []
        self._numbers: dict[int, int] = {}
        self._compiled: dict[object, object] = {}
        self._splits = {split.op: split for split in plan.splits}
        table = plan.tasks.table
        order = np.argsort(table["routine"], kind="stable")
        edges = np.searchsorted(table["routine"][order], np.arange(len(plan.routines) + 1))
        self._first_box = [table["box"][order[a:b]] for a, b in pairwise(edges)]

    def add(self, number: int, routine: Routine) -> None:
        w, values = self.w, self.plan.graph.values
        ops = [self.plan.ops[m.op] for m in routine.members]
        label = str(ops[-1].source)
        w.text(label)
        local = dict(zip(routine.local_values, range(len(routine.local_values)), strict=True))
        w.put(len(local))
        for v, offset, extents in zip(routine.local_values, routine.local_offsets, routine.local_extents, strict=True):
            w.put(offset, math.prod(extents) * dtypes.itemsize(values[v].dtype))
            w.many(extents)
        w.put(len(ops))
        members = []
        for m, (member, op) in enumerate(zip(routine.members, ops, strict=True)):
            self._member = _Member(self, routine, local, self._first_box[number] + m)
            members.append(self._member.put(op, member.op, member.stage))
        self.texts.append(RoutineText(label, len(self._first_box[number]), tuple(members)))

    def code(self, code: Code) -> int:
        number = self._numbers.get(id(code))
        if number is None:
            number = self._numbers[id(code)] = len(self.codes)
            self.codes.append(code)
        return number

    def compiled(self, make, *key):  # type: ignore[no-untyped-def]
        """``make(*key)``, remembered."""
        found = self._compiled.get((make, key))
        if found is None:
            found = self._compiled[make, key] = make(*key)
        return found


class _Member:
    """Encodes one member of a routine."""

    def __init__(self, routines: _Routines, routine: Routine, local: dict[int, int], rows: np.ndarray):
        self.routines = routines
        self.plan = routines.plan
        self.w = routines.w
        self.routine = routine
        self.local = local
        self.rows = rows
        self.codes: list[tuple[str, Code]] = []

    def put(self, op: Op, number: int, stage: int) -> MemberText:
        if stage == FINISH:
            assert isinstance(op, Nest)
            self._reduce(*self._finish(op, number))
        elif isinstance(op, Update):
            self._update(op)
        elif isinstance(op, Cumulative):
            self._cumulative(op)
        elif isinstance(op, Sort):
            self._sort(op)
        elif isinstance(op, Nest):
            split = self.routines._splits[number] if stage == PARTIAL else None
            operands = [self._array(v) for v in op.operands]
            outputs = [self._array(v) for v in op.outputs]
            bounds: tuple[int, ...] = ()
            if split is not None:
                bounds = split.bounds
                op, outputs = self._partial(op, split.storages, len(bounds) - 1)
            if op.kind == "map":
                self._map(op, operands, outputs)
            elif op.kind == "contract":
                self._contract(op, operands, outputs, bounds)
            else:
                self._reduce(op, operands, outputs, bounds)
        else:
            raise TypeError(f"a routine holds a {type(op).__name__}")
        return MemberText(self.title, tuple(self.codes))

    # -- arrays ------------------------------------------------------------------------------------------------

    def _array(self, v: int) -> Array:
        value = self.plan.graph.values[v]
        if v in self.local:
            k = self.local[v]
            return True, k, value.dtype, value.shape, _row_major(self.routine.local_extents[k])
        storage = int(self.plan.value_storage[v])
        return False, storage, value.dtype, value.shape, _row_major(value.shape)

    def _extents(self, rank: int) -> list[int]:
        """Sizes of the largest of the tasks' boxes."""
        corners = self.plan.tasks.boxes[self.rows]
        if not len(corners):
            return [0] * rank
        return (corners[:, 1] - corners[:, 0]).max(axis=0)[:rank].tolist()

    def _head(
        self,
        kind: str,
        space: Sequence[int],
        rspace: Sequence[int],
        operands: Sequence[Array],
        outputs: Sequence[Array],
    ) -> None:
        w = self.w
        rank = len(space) + len(rspace)
        if max(rank, *(len(a[3]) for a in (*operands, *outputs))) > MAX_AXES:
            raise ValueError(f"a {kind} has more than {MAX_AXES} axes")
        w.put_symbol(kind)
        w.put(rank, len(space), *space, *rspace)
        for arrays in (operands, outputs):
            w.put(len(arrays))
            for local, number, dtype, shape, _ in arrays:
                w.put(int(local), number, w.symbol(dtype))
                w.many(shape)
        extents = "x".join(map(str, space)) + (" reduced " + "x".join(map(str, rspace)) if rspace else "")
        reads = " ".join(_name(a) for a in operands)
        self.title = f"{kind} {extents or 'scalar'}: {' '.join(_name(a) for a in outputs)} = ({reads})"

    def _codes(
        self,
        body: Code | None,
        epilogue: Code | None = None,
        bounds: Sequence[int] = (),
        acc: Sequence[str] = (),
    ) -> None:
        for name, code in (("body", body), ("epilogue", epilogue)):
            if code is None:
                self.w.put(-1)
            else:
                self.w.put(self.routines.code(code))
                self.codes.append((name, code))
        self.w.many(bounds)
        self.w.many([self.w.symbol(dtype) for dtype in acc])

    # -- kinds -------------------------------------------------------------------------------------------------

    def _map(self, op: Nest, operands: list[Array], outputs: list[Array]) -> None:
        code = self.routines.compiled(bodies.map_code, op.body, _layouts(operands), _layouts(outputs))
        self._head("map", op.space, (), operands, outputs)
        self._codes(code)

    def _partial(self, op: Nest, storages: Sequence[int], splits: int) -> tuple[Nest, list[Array]]:
        """The part of a split reduction: its outputs are the accumulators."""
        shape = (splits, *op.space)
        outputs = [
            (False, storage, dtype, shape, _row_major(shape)) for storage, dtype in zip(storages, op.acc, strict=True)
        ]
        return replace(op, epilogue=_accumulators(op.space, op.acc)), outputs

    def _finish(self, op: Nest, number: int) -> tuple[Nest, list[Array], list[Array], tuple[int, ...]]:
        """The join of a split reduction: a reduction over the partial accumulators, in order of split."""
        split = self.routines._splits[number]
        splits = len(split.bounds) - 1
        b = Builder((*op.space, splits))
        *at, part = (b.coord(d) for d in range(len(op.space) + 1))
        slots = range(len(op.operands), len(op.operands) + len(op.acc))
        loads = [b.load(slot, [part, *at], dtype) for slot, dtype in zip(slots, op.acc, strict=True)]
        assert op.combine is not None
        kind = op.combine
        if kind.kind == "dot":
            kind = Combine("or" if op.acc[0] == "b1" else "sum")
        elif kind.kind in ("argmax", "argmin"):
            # The body gives the positions itself.
            kind = Combine("generic", bodies.combiner(kind, op.acc))
        shape = (splits, *op.space)
        operands = [self._array(v) for v in op.operands]
        for storage, dtype in zip(split.storages, op.acc, strict=True):
            operands.append((False, storage, dtype, shape, _row_major(shape)))
        joined = replace(op, kind="reduce", rspace=(splits,), body=b.build(*loads), combine=kind)
        return joined, operands, [self._array(v) for v in op.outputs], ()

    def _epilogue(self, op: Nest, operands: list[Array], outputs: list[Array]) -> Code:
        assert op.epilogue is not None
        layouts = _layouts(outputs)
        if outputs and len(outputs[0][3]) > len(op.space):  # partial accumulators: one split at a time
            layouts = tuple((dtype, strides[1:]) for dtype, strides in layouts)
        return self.routines.compiled(bodies.map_code, op.epilogue, _layouts(operands), layouts, op.acc)

    def _reduce(self, op: Nest, operands: list[Array], outputs: list[Array], bounds: tuple[int, ...] = ()) -> None:
        assert op.combine is not None
        partial = self._extents(len(op.space) + len(op.rspace))
        extents = partial if bounds else [*partial[: len(op.space)], *op.rspace]
        layouts = _layouts(operands)
        first = parallel_lanes(op, extents, layouts)
        rank = len(op.space) + len(op.rspace)
        order = tuple(range(rank))
        if first >= 0:
            order = (*range(first), *range(len(op.space), rank), *range(first, len(op.space)))
        body = self.routines.compiled(bodies.reduce_code, _anonymous(op), order, layouts, len(outputs))
        self._head("reduce", op.space, op.rspace, operands, outputs)
        self._codes(body, self._epilogue(op, operands, outputs), bounds, op.acc)
        kind = op.combine.kind
        fold = -1
        if kind in bodies.OPERATION:
            fold = self.w.symbol(f"{bodies.OPERATION[kind]}.{op.acc[0]}")
        self.w.put(first, int(kind != "generic"), fold)

    def _contract(self, op: Nest, operands: list[Array], outputs: list[Array], bounds: tuple[int, ...]) -> None:
        arrays = len(operands) + len(outputs)
        code = self.routines.compiled(_contract, _anonymous(op), _layouts(operands), arrays)
        if code is None:
            kind = "or" if op.acc[0] == "b1" else "sum"
            general = replace(op, kind="reduce", body=bodies.product(op), combine=Combine(kind))
            self._reduce(general, operands, outputs, bounds)
            return
        self._head("contract", op.space, op.rspace, operands, outputs)
        self._codes(code.windows, self._epilogue(op, operands, outputs), bounds, op.acc)
        for f in (code.lhs, code.rhs):
            self.w.put(f.slot, f.constant, *f.strides, f.axis)
            if f.axis >= 0:
                self.w.put(f.shift, f.length, f.start_result)
                self.w.put(f.fresh_slot, f.fresh_constant, f.fresh_result, *f.fresh_strides)

    def _cumulative(self, op: Cumulative) -> None:
        operands = [self._array(v) for v in op.operands]
        outputs = [self._array(v) for v in op.outputs]
        rank = len(op.space)
        behind = math.prod(self._extents(rank)[op.axis + 1 :])
        lanes = behind >= 16 or behind >= op.space[op.axis]
        order = tuple(range(rank))
        if not lanes:
            order = (*(d for d in range(rank) if d != op.axis), op.axis)
        code = self.routines.compiled(
            bodies.cumulative_code, _anonymous(op), order, _layouts(operands), _layouts(outputs)
        )
        self._head("cumulative", op.space, (), operands, outputs)
        self._codes(code, None, (), op.acc)
        self.w.put(op.axis + 1 if lanes else -1, op.axis, int(op.reverse), int(op.combine.kind == "sum"))

    def _update(self, op: Update) -> None:
        operands = [self._array(v) for v in (*op.operands, op.base)]
        output = self._array(op.output)
        layout = _layouts([output])[0]
        update = self.routines.compiled(bodies.update_code, _anonymous_update(op), _layouts(operands), layout)
        self._head("update", op.space, (), operands, [output])
        self._codes(update.code)
        self.w.put(len(update.target))
        for t in update.target:
            self.w.put(t.axis, t.constant, t.uniform, t.general, t.level)
        self.w.put(int(op.combine.kind != "set"), *update.bounds, update.access)

    def _sort(self, op: Sort) -> None:
        operands = [self._array(v) for v in op.operands]
        outputs = [self._array(v) for v in op.outputs]
        self._head("sort", op.space, (), operands, outputs)
        self._codes(None)
        self.w.put(op.axis, op.num_keys, -1 if op.top_k is None else op.top_k)


def _anonymous(op: _Op) -> _Op:
    """The operator without what tells layers of a model apart: alike operators share code."""
    return replace(op, operands=(), outputs=(), source=Source(""))


def _anonymous_update(op: Update) -> Update:
    return replace(op, base=-1, operands=(), output=-1, source=Source(""))


def _contract(op: Nest, operands: tuple[Layout, ...], arrays: int) -> bodies.ContractCode | None:
    return bodies.contract_code(op, operands, arrays)


def _accumulators(space: Sequence[int], acc: Sequence[str]) -> Expr:
    b = Builder(space)
    return b.build(*(b.acc(k, dtype) for k, dtype in enumerate(acc)))


def _layouts(arrays: Sequence[Array]) -> tuple[Layout, ...]:
    return tuple((dtype, strides) for _, _, dtype, _, strides in arrays)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


def _name(array: Array) -> str:
    local, number, dtype, shape, _ = array
    return f"{'local' if local else 'storage'} {number}:{dtype}[{','.join(map(str, shape))}]"


def _put_code(w: Writer, code: Code) -> None:
    w.put(len(code.order), *code.order, code.lane_bytes, code.arrays, len(code.accesses))
    if code.lane_bytes > 65535:
        raise ValueError(f"an operator needs {code.lane_bytes} bytes of registers a lane, more than 65535")
    for access in code.accesses:
        w.put(access.slot, access.constant, *access.offset, *access.predicate)
        w.put(int(access.stepped_only), *access.strides)
    w.packed(code.begin)
    w.put(len(code.instructions))
    for i in code.instructions:
        a, b, c = (*i.args, 0, 0, 0)[:3]
        registers = i.out | a << 16 | b << 32 | c << 48
        w.put(w.symbol(i.symbol) | i.use_level << 32)
        w.put(registers - (1 << 64) if registers >= 1 << 63 else registers, i.immediate)
    for registers_of in (code.results, code.accumulators):
        w.put(len(registers_of))
        for at, dtype in registers_of:
            w.put(at, w.symbol(dtype))


def _put_tasks(w: Writer, plan: Plan) -> None:
    tasks = plan.tasks
    members = np.array([len(routine.members) for routine in plan.routines], np.int64)
    counts = members[tasks.table["routine"]]
    starts = np.repeat(tasks.table["box"].astype(np.int64), counts)
    within = np.arange(len(starts)) - np.repeat(np.cumsum(counts) - counts, counts)
    numbers = _put_boxes(w, tasks.boxes)
    w.packed(tasks.table["routine"])
    w.packed(tasks.table["worker"])
    w.packed(numbers[starts + within])
    w.put(plan.events)
    for column in (tasks.wait_start, tasks.wait_event, tasks.signal_start, tasks.signal_event):
        w.packed(column)


def _put_boxes(w: Writer, boxes: np.ndarray) -> np.ndarray:
    """Writes boxes, int64 [boxes, 2, rank], each once: layers of a model cut their work alike. Returns their rows."""
    rank = boxes.shape[2]
    flat = np.ascontiguousarray(boxes.reshape(len(boxes), 2 * rank), np.int64)
    rows = np.arange(len(flat))
    if rank and len(flat):
        keys = flat.view(np.dtype((np.void, flat.dtype.itemsize * 2 * rank))).reshape(-1)
        _, kept, where = np.unique(keys, return_index=True, return_inverse=True)
        flat, rows = flat[kept], where.reshape(-1)
    wide = bool(flat.size and flat.max() > np.iinfo(np.int32).max)
    w.put(rank, int(wide), len(flat))
    if wide:
        w.array(flat)
    else:
        w.packed(flat)
    return rows


def _put_regions(w: Writer, plan: Plan) -> None:
    if not any(storage.tagged for storage in plan.storages):
        w.put(0)
        return
    rows = plan.accesses
    reads, _ = tagged_accesses(plan)
    writes = np.flatnonzero((rows.kind != READ) & np.all(rows.box[:, 1] > rows.box[:, 0], axis=1))
    both = np.concatenate([reads, writes])
    values, array = np.unique(rows.value[both], return_inverse=True)
    accumulators = [
        (storage, acc, (len(split.bounds) - 1, *cast(Nest, plan.ops[split.op]).space))
        for split in plan.splits
        for storage, acc in zip(split.storages, cast(Nest, plan.ops[split.op]).acc, strict=True)
    ]
    w.put(len(values))
    for v in values.tolist():
        value = plan.graph.values[v]
        here = (int(plan.value_storage[v]), value.dtype, value.shape) if v >= 0 else accumulators[-1 - v]
        w.put(v, here[0], dtypes.itemsize(here[1]))
        w.many(here[2])
    box = _put_boxes(w, rows.box[both])
    for part in (slice(0, len(reads)), slice(len(reads), None)):
        w.packed(np.searchsorted(rows.task[both[part]], np.arange(len(plan.tasks.table) + 1)))
        w.packed(array.reshape(-1)[part])
        w.packed(box[part])


def _put_schedule(w: Writer, plan: Plan, schedule: Schedule) -> None:
    w.put(len(schedule))
    for item in schedule:
        if isinstance(item, Segment):
            w.put_symbol("segment")
            for queue in item.queues:
                w.packed(queue)
        elif isinstance(item, LoopNode):
            w.put_symbol("loop")
            if item.predicate < 0:
                w.put(1, item.trips)
            else:
                w.put(0, int(plan.value_storage[item.predicate]))
                _put_schedule(w, plan, item.cond)
            _put_schedule(w, plan, item.body)
        else:
            assert isinstance(item, BranchNode)
            w.put_symbol("branch")
            w.put(int(plan.value_storage[item.index]), len(item.arms))
            for arm in item.arms:
                _put_schedule(w, plan, arm)
