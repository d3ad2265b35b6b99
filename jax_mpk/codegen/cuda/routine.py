"""The frame of a routine's code: arrays, boxes, words of the task it reads, and where its threads must meet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from jax_mpk.codegen.cuda.arrays import UNIT, Array, buffer_of, is_wide, local_bytes, register, row_major
from jax_mpk.codegen.cuda.code import PREFETCH, WARPS, Code, Operand, Stream
from jax_mpk.codegen.cuda.live import Live
from jax_mpk.codegen.cuda.meetings import Meetings, Place, overlap
from jax_mpk.codegen.cuda.pieces import Held
from jax_mpk.codegen.cuda.scalars import Scalars, Term, fixed, offset, product
from jax_mpk.codegen.cuda.staging import Copied, Staged, shares
from jax_mpk.codegen.cuda.views import View
from jax_mpk.errors import TaskTooLargeError, task_too_large
from jax_mpk.graph import dtypes
from jax_mpk.plan.ir import Plan, Routine

_ALIGN = 128
#: Rows of fewer elements are brought by element.
_SHORT = 32

#: Largest copy in scratch of a tagged value that its task reads again: a load from device memory takes a microsecond.
_COPY_BYTES = 4 << 10
#: Warps that copy rows of untagged values, so many bytes at least, while all others wait for tagged ones.
_COPIERS, _ASIDE_BYTES = 3, 4 << 10

Brought = TypeVar("Brought", Staged, Copied)


@dataclass(frozen=True)
class _Rows:
    """A box of a value that is brought to scratch, as rows of elements consecutive here and there.

    Attributes:
      start: element of the value that the box begins with.
      count, length: rows, and elements of a row.
      source, target: offsets of row n, in the value from ``start`` and in scratch.
      lines: statements that compute what these offsets need.
    """

    start: str
    count: Term
    length: Term
    source: str
    target: str
    lines: list[str]


def too_large(plan: Plan, routine: Routine, reason: str) -> TaskTooLargeError:
    """The error for a routine whose tasks the generated code cannot hold."""
    source = plan.ops[routine.members[-1].op].source
    return task_too_large(source.primitive, source.line, reason)


class Frame:
    """Writes what members of a routine share.

    Args:
      plan: the plan.
      routine: the routine.
      live: its members, and which positions of theirs are live.
      boxes: int64 [members, tasks, 2, rank].
      staged: tagged values to bring to scratch first.
      copied: other values to copy there meanwhile.
      memory: int64 [tasks]: number of the device memory that a task may use, or -1.
      views: local values that lie as another one.
      room: bytes of scratch for local values and for what is brought there. What does not fit is read where it is.
      stage: bytes of a stage of the ring; 0: there is none, and nothing streams.
    """

    def __init__(
        self,
        plan: Plan,
        routine: Routine,
        live: Live,
        boxes: np.ndarray,
        staged: Sequence[Staged],
        copied: Sequence[Copied],
        memory: np.ndarray,
        views: Mapping[int, View],
        *,
        room: int,
        stage: int,
    ):
        self.plan = plan
        self.routine = routine
        self.boxes = boxes
        self.memory = memory
        self.views = views
        self.room = room
        self.stage = stage
        self.live = live
        self.ops = [op for op in live.ops if op is not None]
        self._local_bytes = local_bytes(plan, routine)
        self.code = Code(scratch=max((end for _, end in self._local_bytes.values()), default=0))
        self.values = plan.graph.values
        self._local = {v: k for k, v in enumerate(routine.local_values)}
        self._maker = {v: m for m, op in enumerate(live.ops) if op is not None for v in op.outputs}
        self._maker |= {view.target: self._maker[v] for v, view in views.items()}
        self._numbers: dict[bytes, Term] = {}
        self._names: dict[tuple[str, int], str] = {}
        self.meetings = Meetings(self.code.lines)
        self._copies: dict[int, Array | None] = {}
        self._registers: dict[int, Array] = {}
        self._brought: dict[int, Staged | Copied] = {}
        self._brought_at: dict[int, tuple[int, tuple[int, ...]]] = {}  # value → byte, extents its layout has
        self._written = {int(plan.value_storage[v]) for op in self.ops for v in op.outputs}
        self.held: dict[int, Held] = {}  # by member
        self._early: dict[str, str] = {}  # loads of single elements, and where their results are
        self._scalars = [Term(f"live{k}") for k in range(len(live.scalars.results))]
        scalars = self._live_scalars(range(len(self._scalars)))
        counts = self._live_scalars(sorted({k for limits in live.limits for k in limits.values()}))
        room -= self.code.scratch
        waited = self._fitting([s for s in staged if any(s.value in op.operands for op in self.ops)], room)
        copied = [copy for copy in copied if copy.value not in self._registers]
        copied = self._fitting(copied, room - sum(map(self._brought_bytes, waited)))
        # By size, so that routines that differ in the order of their operands have the same code.
        copied.sort(key=self._brought_bytes)
        waited.sort(key=self._brought_bytes)
        aside = [copy for copy in copied if waited and self._is_aside(copy)]
        copied = [copy for copy in copied if copy not in aside]
        # Nobody who waits for tagged values should wait for what bounds live positions before.
        late = bool(aside) and all(copy.shift is None for copy in copied)
        self.code.lines += [] if late else scalars
        for copy in copied:
            self._copy(copy)
        if aside:
            if copied:
                self.line("copies_mark();")
            self._copy_aside(aside, scalars if late else [])
        sizes = [self._brought_bytes(value) - _ALIGN for value in waited]
        for value, warps in zip(waited, shares(sizes, WARPS - _COPIERS if aside else WARPS), strict=True):
            self._stage(value, *warps)
        self.code.lines += counts if late else []
        self.meetings.arrive()
        if copied:
            self.line("copies_wait_marked();" if aside else "copies_wait();")
        if copied or waited:
            self.line("c.sync();")
        self.line("c.stamp(1);")

    def line(self, text: str = "") -> None:
        self.code.lines.append(text)

    def brings(self, v: int) -> bool:
        """Whether a value was brought to scratch."""
        return v in self._brought

    # -- numbers -----------------------------------------------------------------------------------------------

    def number(self, column: np.ndarray) -> Term:
        """A number that may differ from task to task."""
        column = np.ascontiguousarray(column, np.int64)
        if len(column) == 0 or (column == column[0]).all():
            value = int(column[0]) if len(column) else 0
            return Term(str(value), value >= 0, False, value)
        key = column.tobytes()
        found = self._numbers.get(key)
        if found is None:
            if np.abs(column).max() > 2**31 - 1:
                raise too_large(self.plan, self.routine, "its box reaches beyond 2^31 elements along an axis")
            name = f"at{len(self._numbers)}"
            self.line(f"const int {name} = c.box({self.code.words});")
            self.code.columns.append((self.code.words, column))
            self.code.words += 1
            found = self._numbers[key] = Term(name)
        return found

    def _live_scalars(self, wanted: Sequence[int]) -> list[str]:
        """Statements that compute some of what bounds the live positions."""
        expr = self.live.scalars.only(*(self.live.scalars.results[k] for k in wanted))
        used = {op: {node.attr for node in expr.nodes if node.op.startswith(op)} for op in ("coord", "load")}
        columns = [self.number(c) if k in used["coord"] else fixed(0) for k, c in enumerate(self.live.columns)]
        arrays = [self.array(v) if k in used["load"] else None for k, v in enumerate(self.live.operands)]

        def load(slot: int, indices: list[Term], dtype: str, pred: str | None) -> str:
            array = arrays[slot]
            assert array is not None
            text = array.load(indices)
            if array.kind == "register" or pred is not None or any(index.value is None for index in indices):
                return text
            # It is under way while threads wait for something else.
            if text not in self._early:
                name = self._early[text] = f"early{len(self._early)}"
                self.line(f"const {dtype} {name} = {text};")
                if array.kind == "global" and math.prod(array.shape) == 1 and array.storage not in self._written:
                    self._registers[self.live.operands[slot]] = register(name, array.dtype, array.shape)
            return self._early[text]

        scalars = Scalars(expr, columns, load, prefix="u")
        results = scalars.results()
        texts = [f"const int {self._scalars[k]} = {term.text};" for k, term in zip(wanted, results, strict=True)]
        return [*scalars.lines, *texts]

    def live_count(self, member: int, coord: int) -> Term | None:
        """How many positions along a coordinate a member runs over; None: all."""
        scalar = self.live.limits[member].get(coord)
        return None if scalar is None else self._scalars[scalar]

    def box(self, member: int, rank: int) -> tuple[list[Term], list[Term], int]:
        """Low corner and extents of a member's box, and the most elements a task has."""
        boxes = self.boxes[member]
        low = [self.number(boxes[:, 0, d]) for d in range(rank)]
        sizes = np.maximum(boxes[:, 1, :rank] - boxes[:, 0, :rank], 0)
        most = int(sizes.prod(axis=1).max(initial=0))
        if most > 2**31 - 1:
            raise too_large(self.plan, self.routine, "it has more than 2^31 elements")
        return low, [self.live_count(member, d) or self.number(sizes[:, d]) for d in range(rank)], most

    def coordinates(
        self, position: str, low: Sequence[Term], extents: Sequence[Term], names: Sequence[str]
    ) -> tuple[list[Term], list[str]]:
        """Coordinates of element ``position`` of a box, and the statements that compute them.

        The last axis counts fastest, but axes whose extents only the task knows come behind all others: nothing is then
        divided by what the compiler does not know.
        """
        coords = list(low)
        lines: list[str] = []
        inner: list[Term] = []
        axes = [d for d, e in enumerate(extents) if e.value != 1]
        axes.sort(key=lambda d: extents[d].value is not None)
        for d in reversed(axes):
            at = f"{position} / {product(inner)}" if inner else position
            if d != axes[0]:
                at = f"{at} % {extents[d]}"
            if low[d].value != 0:
                at = f"{low[d]} + {at}"
            lines.append(f"const int {names[d]} = {at};")
            coords[d] = Term(names[d])
            inner.insert(0, extents[d])
        return coords, lines[::-1]

    def whole(self, position: str, sizes: Sequence[int]) -> tuple[list[Term], list[str]]:
        """Coordinates along axes that are gone through whole."""
        zero = [fixed(0)] * len(sizes)
        full = [fixed(e) for e in sizes]
        return self.coordinates(position, zero, full, [f"{position}{d}" for d in range(len(sizes))])

    def lines_of(self, head: str, lines: Sequence[str], end: str) -> None:
        """A lambda among the arguments of a call."""
        self.line(f"    {head}")
        for text in lines:
            self.line(f"      {text}")
        self.line(f"    {end}")

    # -- arrays ------------------------------------------------------------------------------------------------

    def is_local(self, v: int) -> bool:
        return v in self._local

    def share(self, v: int, w: int) -> bool:
        """Whether two values have bytes in common."""
        return overlap(self._home(v), self._home(w))

    def _home(self, v: int) -> Place:
        """Where a value lies: bytes of scratch, or a storage; what is brought to scratch lies where it comes from."""
        v = self.views[v].target if v in self.views else v
        return self._local_bytes[v] if v in self._local else int(self.plan.value_storage[v])

    def array(self, v: int, *, store: bool = False, again: bool = True) -> Array:
        """Value ``v`` as the next member reads or writes it; ``again``: others may read what it stores."""
        value = self.values[v]
        if v in self._registers:
            return self._registers[v]
        if v in self.views:
            return replace(self.array(self.views[v].target), strides=self.views[v].strides, shape=value.shape)
        if v in self._local:
            k = self._local[v]
            extents = self.routine.local_extents[k]
            maker = self._maker[v]
            low = [self.number(self.boxes[maker][:, 0, d]) for d in range(len(extents))]
            return self._in_scratch(f"l{k}", value.dtype, self.routine.local_offsets[k], extents, low)
        if v in self._brought and not store:
            at, extents = self._brought_at[v]
            low = [self.number(self._brought[v].lo[:, d]) for d in range(len(extents))]
            return self._in_scratch(f"s{list(self._brought).index(v)}", value.dtype, at, extents, low)
        storage = int(self.plan.value_storage[v])
        tagged = self.plan.storages[storage].tagged
        copy = self._copy_of(v) if tagged and again and v in self._maker else None
        if copy is not None and not store:
            return copy
        kind = "global" if not tagged else "own" if store or v in self._maker else "tagged"
        name = self._pointer(storage, value.dtype, tagged)
        return Array(
            kind, name, value.dtype, row_major(value.shape), "", is_wide(value.shape), None, storage, value.shape, copy
        )

    def in_register(self, member: int, v: int) -> Array | None:
        """Where every thread keeps the only element that a task has of a local value; None where there may be others.

        It takes the place of scratch from here on.
        """
        boxes = self.boxes[member][:, :, : len(self.values[v].shape)]
        if v not in self._local or v in self.views or not np.all(boxes[:, 1] - boxes[:, 0] == 1):
            return None
        value = self.values[v]
        return self._registers.setdefault(v, register(f"l{self._local[v]}", value.dtype, value.shape))

    def _copy_of(self, v: int) -> Array | None:
        """Scratch for what a task stores of tagged value ``v``, if its other members read that."""
        if v not in self._copies:
            value, box = self.values[v], self.boxes[self._maker[v]]
            rank = len(value.shape)
            extents = tuple(int(e) for e in (box[:, 1, :rank] - box[:, 0, :rank]).max(axis=0, initial=0))
            size = math.prod(extents) * dtypes.itemsize(value.dtype)
            self._copies[v] = None
            if any(v in op.operands for op in self.ops) and 0 < size <= _COPY_BYTES:
                low = [self.number(box[:, 0, d]) for d in range(rank)]
                name = f"c{len(self._copies)}"
                self._copies[v] = self._in_scratch(name, value.dtype, self.scratch(size), extents, low)
        return self._copies[v]

    def low_corner(self, v: int) -> np.ndarray:
        """int64 [tasks, rank]: what lies first in scratch of a value that is there."""
        if v in self._brought:
            return self._brought[v].lo
        return self.boxes[self._maker[v]][:, 0, : len(self.values[v].shape)]

    def _in_scratch(self, name: str, dtype: str, at: int, extents: Sequence[int], low: Sequence[Term]) -> Array:
        if (name, at) not in self._names:
            self._names[name, at] = name
            self.line(f"{dtype}* const {name} = c.template local<{dtype}>({at});")
        strides = row_major(extents)
        terms = [(t, s) for t, s in zip(low, strides, strict=True) if t.value != 0]
        origin = ""
        if terms:
            key = "+".join(f"{t} * {s}" if s != 1 else str(t) for t, s in terms)
            found = self._names.get((key, -1))
            if found is None:
                found = self._names[key, -1] = f"o{sum(k[1] == -1 for k in self._names)}"
                self.line(f"const int {found} = {key.replace('+', ' + ')};")
            origin = found
        size = math.prod(extents) * dtypes.itemsize(dtype)
        return Array("local", name, dtype, strides, origin, False, (at, at + size), -1, tuple(extents))

    def _pointer(self, storage: int, dtype: str, tagged: bool) -> str:
        key = (dtype, storage)
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"g{sum(k[1] >= 0 and v[0] == 'g' for k, v in self._names.items())}"
            word = self.code.words
            self.code.operands.append(Operand(word, storage))
            self.code.words += 1 if tagged else 2
            if tagged:
                self.line(f"const auto {name} = c.template tagged<{dtype}>({word});")
            else:
                self.line(f"{dtype}* const {name} = c.template global<{dtype}>({word});")
        return name

    def scratch(self, size: int) -> int:
        """Bytes of scratch for the whole routine."""
        at = -(-self.code.scratch // _ALIGN) * _ALIGN
        self.code.scratch = at + size
        return at

    def scratch_array(self, dtype: str, count: int) -> Array:
        """A vector in scratch that only the current member uses."""
        return self._in_scratch(
            f"v{self.code.scratch}", dtype, self.scratch(count * dtypes.itemsize(dtype)), (count,), [fixed(0)]
        )

    # -- what is brought to scratch first ------------------------------------------------------------------------

    def _brought_bytes(self, what: Staged | Copied) -> int:
        """Most scratch that a value takes."""
        if isinstance(what, Copied) and what.place >= 0:
            return 0
        return math.prod(self._extents(what)) * dtypes.itemsize(self.values[what.value].dtype) + _ALIGN

    def _extents(self, what: Staged | Copied) -> tuple[int, ...]:
        """Of a value in scratch, with what lies between its rows."""
        extents = [int(e) for e in (what.hi - what.lo).max(axis=0)] if self.values[what.value].shape else []
        if extents and isinstance(what, Copied):
            extents[-1] += what.pad
        return tuple(extents)

    def _fitting(self, values: Sequence[Brought], room: int) -> list[Brought]:
        """Those of the values that fit into so many bytes, small ones first."""
        chosen = set()
        for k in sorted(range(len(values)), key=lambda k: self._brought_bytes(values[k])):
            room -= self._brought_bytes(values[k])
            if room >= 0:
                chosen.add(k)
        return [value for k, value in enumerate(values) if k in chosen]

    def _bring(self, what: Staged | Copied) -> tuple[Array, list[Term]]:
        """Scratch for a value's box: the array and the box's extents."""
        value = self.values[what.value]
        sizes = what.hi - what.lo
        extents = self._extents(what)
        self._brought[what.value] = what
        place = what.place if isinstance(what, Copied) else -1
        size = math.prod(extents) * dtypes.itemsize(value.dtype)
        at = self.routine.local_offsets[place] if place >= 0 else self.scratch(size)
        self._brought_at[what.value] = at, extents
        array = self.array(what.value)
        numbers = [self.number(sizes[:, d]) for d in range(len(extents))]
        if isinstance(what, Copied) and what.shift is not None:
            numbers[what.shift.axis] = self._scalars[what.shift.count]
        return array, numbers

    def _rows(self, what: Staged | Copied, size: list[Term], target: Array) -> _Rows:
        """A box as rows of consecutive elements; ``size``: its extents."""
        strides = row_major(self.values[what.value].shape)
        run, _ = self._row_axes(what)
        low = [(self.number(what.lo[:, d]), stride) for d, stride in enumerate(strides)]
        if isinstance(what, Copied) and what.shift is not None:
            low.append((self._scalars[what.shift.first], strides[what.shift.axis]))
        start = " + ".join(f"{t} * {k}" if k != 1 else t.text for t, k in low if t.value != 0)
        coords, lines = self.coordinates("n", [fixed(0)] * run, size[:run], [f"n{d}" for d in range(run)])
        moving = [(d, c) for d, c in enumerate(coords) if c.value != 0]
        source = " + ".join(f"{c} * {strides[d]}" for d, c in moving)
        into = " + ".join(f"{c} * {target.strides[d]}" for d, c in moving)
        return _Rows(start or "0", product(size[:run]), product(size[run:]), source or "0", into or "0", lines)

    def _row_axes(self, what: Staged | Copied) -> tuple[int, list[int]]:
        """First axis of a row: it and those behind it are consecutive, in memory and in scratch; axes of many rows."""
        shape, extents = self.values[what.value].shape, self._extents(what)
        sizes = what.hi - what.lo
        first = len(shape) - 1
        while first > 0 and (sizes[:, first] == shape[first]).all() and extents[first] == shape[first]:
            first -= 1
        first = max(first, 0)
        return first, [d for d in range(first) if (sizes[:, d] != 1).any()]

    def _stage(self, what: Staged, warp: int, warps: int) -> None:
        value = self.values[what.value]
        source = self._pointer(int(self.plan.value_storage[what.value]), value.dtype, True)
        target, size = self._bring(what)
        rows = self._rows(what, size, target)
        self.line(f"// waits for {value.dtype}[{','.join(map(str, value.shape))}]")
        if rows.count.value == 1:
            self.line(f"stage(c, {source}, {rows.start}, {rows.length.text}, {target.name}, {warp}, {warps});")
            return
        if rows.length.value is not None and rows.count.value is not None and rows.length.value <= _SHORT:
            # Short rows: each thread waits for elements of any of them.
            length = rows.length.value
            self.line(f"stage_each(c, {source}, {rows.count.value * length}, {warp}, {warps},")
            self.line(f"    [&](int k, const BringOne<{value.dtype}, C>& bring) {{")
            for text in (f"const int n = k / {length};", *rows.lines):
                self.line(f"  {text}")
            at, to = f"{rows.start} + {rows.source} + k % {length}", f"{target.name} + {rows.target} + k % {length}"
            self.line(f"  bring({at}, {to});")
            self.line("});")
            return
        # Each warp brings rows of its own: it waits for one after the other.
        first = f"c.warp() - {warp}" if warp else "c.warp()"
        until = f"n < {rows.count.text}"
        if warps != WARPS:
            until = f"0 <= n && {until} && c.warp() < {warp + warps}"
        self.line(f"for (int n = {first}; {until}; n += {warps}) {{")
        for text in rows.lines:
            self.line(f"  {text}")
        places = f"{source}, {rows.start} + {rows.source}, {rows.length.text}, {target.name} + {rows.target}"
        self.line(f"  stage(c, {places}, c.warp(), 1);")
        self.line("}")

    def _copy(self, what: Copied) -> None:
        value = self.values[what.value]
        source = self._pointer(int(self.plan.value_storage[what.value]), value.dtype, False)
        target, size = self._bring(what)
        rows = self._rows(what, size, target)
        self.line(f"// copies {value.dtype}[{','.join(map(str, value.shape))}] meanwhile")
        self._prefetch(what)
        unit = what.unit // dtypes.itemsize(value.dtype)
        units = f"{rows.length} / {unit}" if rows.length.value is None else str(rows.length.value // unit)
        if rows.count.value == 1:
            self.line(f"map(c, {units}, [&](int k) {{")
        else:
            self.line(f"copy_rows(c, {rows.count.text}, {units}, [&](int n, int k) {{")
        for text in rows.lines:
            self.line(f"  {text}")
        to_text = " + ".join(t for t in (target.name, rows.target) if t != "0")
        from_text = " + ".join(t for t in (source, rows.start, rows.source) if t != "0")
        self.line(f"  copy_async<{what.unit}>({to_text} + k * {unit}, {from_text} + k * {unit});")
        self.line("});")

    def _is_aside(self, what: Copied) -> bool:
        """Whether few warps can copy a value: rows of one power of two of units, and one distance between them."""
        run, moving = self._row_axes(what)
        sizes = what.hi - what.lo
        length = sizes[:, run:].prod(axis=1) * dtypes.itemsize(self.values[what.value].dtype)
        if what.unit != 16 or len(moving) != 1 or length[0] == 0 or (length != length[0]).any():
            return False
        return 32 * 16 * _COPIERS % length[0] == 0 and sizes[:, moving[0]].max() * length[0] >= _ASIDE_BYTES

    def _copy_aside(self, copied: Sequence[Copied], scalars: Sequence[str]) -> None:
        """Has the last warps compute the scalars and copy the values. Who reads these waits, see ``meet``."""
        lines = list(scalars)
        for what in copied:
            value = self.values[what.value]
            item = dtypes.itemsize(value.dtype)
            source = self._pointer(int(self.plan.value_storage[what.value]), value.dtype, False)
            target, size = self._bring(what)
            rows = self._rows(what, size, target)
            assert target.bytes is not None
            self.meetings.expect(target.bytes)
            self._prefetch(what)
            _, (axis,) = self._row_axes(what)
            steps = [strides[axis] * item for strides in (target.strides, row_major(value.shape))]
            units = rows.length.known * item // 16
            start = f" + {rows.start}" if rows.start != "0" else ""
            lines.append(f"// copies {value.dtype}[{','.join(map(str, value.shape))}] meanwhile")
            lines.append(f"copy_aside<{_COPIERS}, {units}, {steps[0]}, {steps[1]}>(")
            lines.append(f"    c, {rows.count.text}, {target.name}, {source}{start});")
        self.line(f"if (c.warp() >= {WARPS - _COPIERS}) {{")
        for text in lines:
            self.line(f"  {text}")
        self.line("}")

    def _prefetch(self, what: Copied) -> None:
        """Has the producer bring rows that lie in device memory to the L2 cache, long before the task copies them."""
        run, moving = self._row_axes(what)
        shape = self.values[what.value].shape
        item = dtypes.itemsize(self.values[what.value].dtype)
        strides = row_major(shape)
        sizes = what.hi - what.lo
        storage = int(self.plan.value_storage[what.value])
        size = sizes[:, run:].prod(axis=1) * item
        if self.plan.storages[storage].kind == "workspace" or what.unit != 16 or len(moving) > 1:
            return
        rows = sizes[:, moving[0]] if moving else np.ones(len(size), np.int64)
        stride = strides[moving[0]] * item if moving else 0
        first = what.lo @ np.array(strides, np.int64) * item
        if what.shift is None:
            self.code.streams.append(Stream(storage, PREFETCH, first, size, np.where(size > 0, rows, 0), stride))
            return
        found = self.first_and_count(what.shift.first, what.shift.count)
        if found is not None and moving == [what.shift.axis]:
            lines, column = found
            self.code.streams.append(Stream(storage, PREFETCH, first, size, column, stride, lines))

    def first_and_count(self, first: int | None, count: int) -> tuple[tuple[str, ...], np.ndarray] | None:
        """How the producer computes where live rows begin, and how many there are, from one number of each task.

        The producer waits for nobody: what it reads may be a round of a loop old. It then asks for rows too few or too
        many, which costs time, but never for any outside the value.

        Args:
          first, count: results of the live positions' scalars; None: they begin where the task's box does.

        Returns:
          None where that takes more numbers.
        """
        scalars = self.live.scalars
        wanted = (count,) if first is None else (first, count)
        expr = scalars.only(*(scalars.results[k] for k in wanted))
        columns = sorted({node.attr for node in expr.nodes if node.op == "coord"})
        if len(columns) > 1:
            return None

        def load(slot: int, indices: list[Term], dtype: str, pred: str | None) -> str:
            v = self.live.operands[slot]
            buffer, unit = buffer_of(self.plan, self.plan.storages[int(self.plan.value_storage[v])])
            base = f"launch.buffers[{buffer}]" + (f" + {unit * UNIT}" if unit else "")
            where = offset(indices, row_major(self.values[v].shape))
            return f"static_cast<const volatile {dtype}*>({base})[{where}]"

        written = Scalars(expr, [Term("at")] * len(self.live.columns), load)
        names = ("first", "count")[-len(wanted) :]
        texts = [f"{name} = {term.text};" for name, term in zip(names, written.results(), strict=True)]
        lines = (*written.lines, *texts)
        tasks = len(self.boxes[0])
        return lines, self.live.columns[columns[0]] if columns else np.zeros(tasks, np.int64)
