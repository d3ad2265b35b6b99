"""Code of the members that go along whole lines of an axis: scans and sorts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jax_mpk.codegen.cuda.code import WARPS
from jax_mpk.codegen.cuda.members import accumulated, combined
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Term
from jax_mpk.codegen.cuda.texts import accumulator, accumulators, loader, partials, stores, title
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Cumulative, Sort
from jax_mpk.plan.ir import Plan

#: All threads share a line of at least this length, if there are fewer lines than threads in so many warps.
_TOGETHER_LENGTH, _TOGETHER_WARPS = 64, 4
#: Longest lines whose sort keeps its two lists of positions in scratch.
_SCRATCH_LENGTH = 4096
#: Bytes of `DigitCounts` in csrc/device/tasks/sort.cuh.
_COUNT_BYTES = (WARPS * 256 + 9) * 4


def memory_slots(plan: Plan) -> np.ndarray:
    """Per worker the number of its device memory for what does not fit in scratch, or -1: it runs nothing like that."""
    large = [
        any(isinstance(op, Sort) and op.space[op.axis] > _SCRATCH_LENGTH for op in (plan.ops[m.op] for m in r.members))
        for r in plan.routines
    ]
    table = plan.tasks.table
    workers = np.unique(table["worker"][np.array(large, bool)[table["routine"]]])
    slots = np.full(plan.target.workers, -1, np.int64)
    slots[workers] = np.arange(len(workers))
    return slots


def scratch_bytes(op: Sort) -> int:
    """Scratch that a sort of long lines needs, at most."""
    length = op.space[op.axis]
    return _COUNT_BYTES + (8 * length if length <= _SCRATCH_LENGTH else 0) + 256


@dataclass(frozen=True)
class _Lines:
    """The lines of a member's box.

    Attributes:
      count: of them.
      most: as many as any task has; 0: nothing to do.
      coords: coordinates of line n, the axis itself left out.
      decode: statements that compute them.
    """

    count: Term
    most: int
    coords: list[Term]
    decode: list[str]


def _lines(frame: Frame, member: int, rank: int, axis: int) -> _Lines:
    low, extents, _ = frame.box(member, rank)
    boxes = frame.boxes[member]
    sizes = np.maximum(boxes[:, 1, :rank] - boxes[:, 0, :rank], 0)
    count = np.where(sizes.all(axis=1), np.delete(sizes, axis, axis=1).prod(axis=1), 0)
    others = [d for d in range(rank) if d != axis]
    names = [f"i{d}" for d in others]
    coords, decode = frame.coordinates("n", [low[d] for d in others], [extents[d] for d in others], names)
    return _Lines(frame.number(count), int(count.max(initial=0)), coords, decode)


def emit_cumulative(frame: Frame, member: int, op: Cumulative) -> None:
    length = op.space[op.axis]
    operands = [frame.array(v) for v in op.operands]
    outputs = [frame.array(v, store=True) for v in op.outputs]
    lines = _lines(frame, member, len(op.space), op.axis)
    together = length >= _TOGETHER_LENGTH and lines.most < 32 * _TOGETHER_WARPS
    frame.meetings.meet(operands, outputs, joins=together)
    frame.line(title(frame, op))
    if lines.most == 0:
        return
    along = f"const int i{op.axis} = {length - 1} - r;" if op.reverse else f"const int i{op.axis} = r;"
    coords = [*lines.coords[: op.axis], Term(f"i{op.axis}"), *lines.coords[op.axis :]]
    acc = accumulators(op.acc)
    if together:
        frame.code.partials = max(frame.code.partials, partials(op.acc))
    frame.line(f"{'scan_together' if together else 'scan'}<{acc}>(")
    frame.line(f"    c, {lines.count.text}, {length},")
    body = accumulated(op.body, op.combine, op.acc, coords, loader(operands), "r", from_zero=True)
    frame.lines_of(f"[&](int n, int r) -> {acc} {{", [*lines.decode, along, *body], "},")
    frame.lines_of(f"[&](const {acc}& a, const {acc}& b) -> {acc} {{", combined(op.combine, op.acc), "},")
    finish = stores(op.epilogue, coords, loader(operands), outputs, lambda node: accumulator(op.acc, "a", node))
    frame.lines_of(f"[&](int n, int r, const {acc}& a) {{", [*lines.decode, along, *finish], "});")


def emit_sort(frame: Frame, member: int, op: Sort) -> None:
    length = op.space[op.axis]
    operands = [frame.array(v) for v in op.operands]
    outputs = [frame.array(v, store=True) for v in op.outputs]
    lines = _lines(frame, member, len(op.space), op.axis)
    frame.meetings.meet(operands, outputs)
    frame.line(title(frame, op))
    if lines.most == 0:
        return
    top = op.top_k is not None
    kept = length if op.top_k is None else op.top_k

    def at(position: str) -> list[Term]:
        return [*lines.coords[: op.axis], Term(position), *lines.coords[op.axis :]]

    def key(k: int, position: str) -> str:
        return f"ordered<{'true' if top else 'false'}>({operands[k].load(at(position))})"

    if top:
        stored = [outputs[0].store(at("to"), operands[0].load(at("i"))), outputs[1].store(at("to"), "i")]
    else:
        stored = [output.store(at("to"), operand.load(at("i"))) for operand, output in zip(operands, outputs)]
    sizes = [dtypes.itemsize(operands[k].dtype) for k in range(op.num_keys)]
    if _counts(lines.most, length, sizes):
        frame.line("sort_by_counting(")
        frame.line(f"    c, {lines.count.text}, {length}, {kept},")
        less = list(lines.decode)
        for k in range(op.num_keys - 1):
            less.append(f"const auto a{k} = {key(k, 'i')}, b{k} = {key(k, 'j')};")
            less.append(f"if (a{k} != b{k}) return a{k} < b{k};")
        less.append(f"return {key(op.num_keys - 1, 'i')} < {key(op.num_keys - 1, 'j')};")
        frame.lines_of("[&](int n, int i, int j) -> bool {", less, "},")
    else:
        counts = frame.scratch(_COUNT_BYTES)
        if length <= _SCRATCH_LENGTH:
            place = frame.scratch(8 * length)
            lists = f"c.template local<u32>({place}), c.template local<u32>({place + 4 * length})"
        else:
            frame.code.memory = max(frame.code.memory, 8 * length)
            memory = f"c.template memory<u32>({frame.number(frame.memory).text}"
            lists = f"{memory}, 0), {memory}, {4 * length})"
        frame.line("sort_by_digits(")
        frame.line(f"    c, {lines.count.text}, {length}, {kept}, {sum(sizes)}, {lists},")
        frame.line(f"    *c.template local<DigitCounts<C>>({counts}),")
        digit = list(lines.decode)
        first = 0
        for k in range(op.num_keys - 1, -1, -1):
            shift = f"8 * (pass - {first})" if first else "8 * pass"
            text = f"return static_cast<u32>({key(k, 'i')} >> ({shift}) & 255);"
            first += sizes[k]
            digit.append(f"if (pass < {first}) {text}" if k else text)
        frame.lines_of("[&](int n, int i, int pass) -> u32 {", digit, "},")
    frame.lines_of("[&](int n, int to, int i) {", [*lines.decode, *stored], "});")


def _counts(rows: int, length: int, key_bytes: list[int]) -> bool:
    """Whether counting smaller elements takes less time than passing over the digits, in cycles."""
    threads = 32 * WARPS
    counting = math.ceil(rows * length / threads) * length * 20 * len(key_bytes)
    digits = rows * sum(key_bytes) * (3000 + 250 * math.ceil(length / threads))
    return counting <= digits and rows * length < 2**31
