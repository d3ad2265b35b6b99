"""What the checks of a Plan have in common: names for its parts, derived tables, and the error they raise.

Everything here is derived from the Graph and the Plan alone. The checks work on *names*: name ``v`` is value ``v`` of
the graph, name ``len(values) + k`` is accumulator storage ``k`` of the split reductions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NoReturn

import numpy as np

from jax_mpk.errors import PlanVerificationError
from jax_mpk.graph import dtypes
from jax_mpk.graph.bounds import Spans, apart
from jax_mpk.graph.ir import Block, Branch, Cumulative, Loop, Nest, Op, Sort, Update, blocks
from jax_mpk.graph.spans import Definition, definitions
from jax_mpk.plan.ir import FINISH, MAY, MUST, PARTIAL, READ, WHOLE, Plan, Segment, Split

STAGE_NAMES = {WHOLE: "", PARTIAL: " partial", FINISH: " finish"}
KIND_NAMES = {READ: "read", MUST: "write all of", MAY: "write some of"}


def refuse(message: str) -> NoReturn:
    raise PlanVerificationError(message)


@dataclass(frozen=True)
class BlockFacts:
    """One block of the graph.

    Attributes:
      block: the block.
      ops: positions in ``Plan.ops`` of its own operators.
      owner: position of the Loop or Branch that holds it; -1 for the outermost.
      label: for messages, e.g. "body of op 3".
    """

    block: Block
    ops: tuple[int, ...]
    owner: int
    label: str


@dataclass(frozen=True)
class SegmentFacts:
    """One segment of the schedule.

    Attributes:
      segment: the segment.
      block: number of the block whose operators it computes.
      label: for messages, e.g. "segment 2 (body of op 3)".
    """

    segment: Segment
    block: int
    label: str


@dataclass
class Rows:
    """Accesses recomputed from the operators, in columns.

    Attributes:
      task, member: int64; who, and as which member of its routine (members of a task run in order).
      name, kind: int64; touches what and how.
      pointwise: bool; the member reads each element just before it overwrites that same element, if it does.
      box: int64 [rows, 2, rank]: region, axes beyond the name's own hold [0, 1).
      within: int64; what run-time scalars leave of the box, a position in ``Facts.spans``.
    """

    task: np.ndarray
    member: np.ndarray
    name: np.ndarray
    kind: np.ndarray
    pointwise: np.ndarray
    box: np.ndarray
    within: np.ndarray

    def take(self, index: np.ndarray) -> Rows:
        return Rows(
            self.task[index],
            self.member[index],
            self.name[index],
            self.kind[index],
            self.pointwise[index],
            self.box[index],
            self.within[index],
        )


@dataclass
class Facts:
    """Tables derived from a Plan whose shape :mod:`jax_mpk.plan.verify` has checked.

    Attributes:
      plan: the plan.
      blocks, block_of: blocks of the graph, and the block of each operator.
      producer: operator that defines each value, or -1 (arguments and loop parameters).
      shapes, itemsizes, nbytes: int lists by name.
      start, end: int64 by name: bytes in an address space that holds all storages side by side; -1: none.
      tagged: bool by name: its storage is tagged.
      split_of: the Split of an operator.
      accumulators: names of a split operator's accumulators.
      segments: filled in by the structure check.
      task_segment, task_position: int64 per task: segment, and position in the worker's queue there.
      stored: per routine, the members whose results go to storages.
      homes: routine and member of every place where a stage of an operator is stored.
      tasks_of: tasks of each routine, ascending.
      rows: recomputed accesses; filled in by the coverage check.
      known: how elements of values are computed from integers.
      spans: number of everything that run-time scalars leave of boxes; 0: the whole box.
    """

    plan: Plan
    blocks: list[BlockFacts] = field(default_factory=list)
    block_of: list[int] = field(default_factory=list)
    producer: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    itemsizes: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    start: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    end: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tagged: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    split_of: dict[int, Split] = field(default_factory=dict)
    accumulators: dict[int, tuple[int, ...]] = field(default_factory=dict)
    segments: list[SegmentFacts] = field(default_factory=list)
    task_segment: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    task_position: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    stored: list[tuple[int, ...]] = field(default_factory=list)
    homes: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    tasks_of: list[np.ndarray] = field(default_factory=list)
    rows: Rows | None = None
    known: dict[int, Definition] = field(default_factory=dict)
    spans: dict[Spans, int] = field(default_factory=lambda: {(): 0})

    # -- derived geometry --------------------------------------------------------------------------------------

    @property
    def value_count(self) -> int:
        return len(self.plan.graph.values)

    def number_blocks(self) -> None:
        """Fills in ``blocks``, ``block_of`` and ``producer`` by walking the graph."""
        found: list[Op] = []
        producer = np.full(self.value_count, -2, np.int64)

        def define(values: Sequence[int], op: int) -> None:
            for v in values:
                if not 0 <= v < self.value_count:
                    refuse(f"the graph names value {v}, but has {self.value_count} values")
                if producer[v] != -2:
                    refuse(f"value {v} is defined twice in the graph")
                producer[v] = op

        def visit(block: Block, owner: int, label: str) -> None:
            number = len(self.blocks)
            own: list[int] = []
            self.blocks.append(BlockFacts(block, (), owner, label))
            for op in block.ops:
                position = len(found)
                own.append(position)
                found.append(op)
                self.block_of.append(number)
                define(op.outputs, position)
                if isinstance(op, Loop):
                    define(op.params, -1)
                names = (
                    [f"arm {k}" for k in range(len(op.arms))]
                    if isinstance(op, Branch)
                    else ["body"]
                    if len(blocks(op)) == 1
                    else ["cond", "body"]
                )
                for name, inner in zip(names, blocks(op)):
                    visit(inner, position, f"{name} of op {position}")
            self.blocks[number] = BlockFacts(block, tuple(own), owner, label)

        define(self.plan.graph.inputs, -1)
        visit(self.plan.graph.block, -1, "top level")
        if len(found) != len(self.plan.ops) or any(a is not b and a != b for a, b in zip(found, self.plan.ops)):
            refuse("Plan.ops is not the graph's operators in walk order")
        self.producer = producer

    def inner_blocks(self, op: int) -> list[int]:
        """Numbers of the blocks nested directly in an operator, in the order of ``ir.blocks``."""
        return [b for b, facts in enumerate(self.blocks) if facts.owner == op]

    def output_space(self, op: int) -> tuple[int, ...]:
        """The space that WHOLE and FINISH boxes of an operator lie in."""
        it = self.plan.ops[op]
        return self.plan.graph.values[it.outputs[0]].shape if it.outputs else ()

    def stage_space(self, op: int, stage: int) -> tuple[int, ...]:
        """The space that boxes of one stage of an operator lie in."""
        it = self.plan.ops[op]
        if stage == PARTIAL and isinstance(it, Nest):
            return it.space + it.rspace
        return self.output_space(op)

    def member_boxes(self, routine: int, member: int) -> tuple[np.ndarray, np.ndarray]:
        """Corners, int64 [tasks, rank], of one member for every task of a routine."""
        of = self.plan.routines[routine].members[member]
        rank = len(self.stage_space(of.op, of.stage))
        rows = self.plan.tasks.table["box"][self.tasks_of[routine]].astype(np.int64) + member
        boxes = self.plan.tasks.boxes[rows]
        return boxes[:, 0, :rank], boxes[:, 1, :rank]

    def in_place(self, op: int) -> bool:
        """Whether an Update's output has the storage of its base."""
        it = self.plan.ops[op]
        if not isinstance(it, Update):
            return False
        base, output = self.plan.value_storage[it.base], self.plan.value_storage[it.output]
        return bool(base == output and base >= 0)

    def written(self, op: int, stage: int) -> tuple[int, ...]:
        """Names that a stage of an operator writes where it is stored."""
        return self.accumulators[op] if stage == PARTIAL else tuple(self.plan.ops[op].outputs)

    def overlapping(self, name: int) -> np.ndarray:
        """Names that share at least one byte with ``name``, itself included."""
        start, end = int(self.start[name]), int(self.end[name])
        if start < 0 or start == end:
            return np.zeros(0, np.int64)
        return np.flatnonzero((self.start >= 0) & (self.start < end) & (start < self.end) & (self.start < self.end))

    def is_local(self, value: int) -> bool:
        """Whether a value has no bytes of its own."""
        return bool(self.plan.value_storage[value] < 0)

    def number_spans(self, spans: Sequence[Spans]) -> np.ndarray:
        """int64: numbers of spans."""
        return np.array([self.spans.setdefault(some, len(self.spans)) for some in spans], np.int64)

    def never_meet(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """bool [a, b]: whether spans of these numbers are proved to have no element in common."""
        numbers = list(self.spans)
        mine, at = np.unique(a, return_inverse=True)
        theirs, bt = np.unique(b, return_inverse=True)
        known = [[apart(numbers[i], numbers[j]) for j in theirs.tolist()] for i in mine.tolist()]
        return np.array(known, bool).reshape(len(mine), len(theirs))[np.ix_(at.ravel(), bt.ravel())]

    # -- names for messages ------------------------------------------------------------------------------------

    def op_text(self, op: int, stage: int = WHOLE) -> str:
        it = self.plan.ops[op]
        kind = it.kind if isinstance(it, Nest) else type(it).__name__.lower()
        source = str(it.source)
        return f"op {op} ({kind}{STAGE_NAMES[stage]}{': ' + source if source else ''})"

    def task_text(self, task: int) -> str:
        row = self.plan.tasks.table[task]
        routine = int(row["routine"])
        anchor = self.plan.routines[routine].members[-1]
        rank = len(self.stage_space(anchor.op, anchor.stage))
        at = int(row["box"]) + len(self.plan.routines[routine].members) - 1
        box = self.plan.tasks.boxes[at, :, :rank]
        return (
            f"task {task} of {self.op_text(anchor.op, anchor.stage)} for {box_text(box)} on worker {int(row['worker'])}"
        )

    def name_text(self, name: int) -> str:
        if name >= self.value_count:
            shape = self.shapes[name]
            owner = next(op for op, names in self.accumulators.items() if name in names)
            return f"accumulators {name - self.value_count} {list(shape)} of op {owner}"
        value = self.plan.graph.values[name]
        return f"value {name} {value.dtype}{list(value.shape)}"


def box_text(box: np.ndarray) -> str:
    """A box as slices: ``[0:4, 8:16]``."""
    return "[" + ", ".join(f"{int(a)}:{int(b)}" for a, b in zip(box[0], box[1])) + "]"


def spans_text(spans: Spans) -> str:
    """What run-time scalars leave of a box: `` where %5 <= i1 < %5 + 1``; "" for all."""
    return f" where {' and '.join(map(str, spans))}" if spans else ""


def scanned_axis(op: Op) -> int | None:
    """The axis that every box of an operator must span, if any."""
    return op.axis if isinstance(op, Sort | Cumulative) else None


def build_facts(plan: Plan) -> Facts:
    """Facts about values, blocks and storages; ``plan.storages`` and ``plan.splits`` must be checked already."""
    facts = Facts(plan)
    facts.number_blocks()
    facts.known = definitions(plan.graph)
    for value in plan.graph.values:
        facts.shapes.append(value.shape)
        facts.itemsizes.append(dtypes.itemsize(value.dtype))
    storage_of = [int(s) for s in plan.value_storage]
    for split in plan.splits:
        op = plan.ops[split.op]
        first = len(facts.shapes)
        for acc, storage in zip(op.acc, split.storages):
            facts.shapes.append((len(split.bounds) - 1, *op.space))
            facts.itemsizes.append(dtypes.itemsize(acc))
            storage_of.append(storage)
        facts.split_of[split.op] = split
        facts.accumulators[split.op] = tuple(range(first, len(facts.shapes)))
    facts.nbytes = [prod(shape) * size for shape, size in zip(facts.shapes, facts.itemsizes)]

    # Workspace first, every other buffer behind it: names share bytes exactly where these ranges meet.
    starts, end = [], plan.workspace_bytes
    for home in plan.storages:
        if home.kind == "workspace":
            starts.append(home.offset)
        else:
            starts.append(end)
            end += home.nbytes
    facts.start = np.array([starts[s] if s >= 0 else -1 for s in storage_of], np.int64)
    facts.end = np.where(facts.start < 0, -1, facts.start + np.array(facts.nbytes, np.int64))
    facts.tagged = np.array([s >= 0 and plan.storages[s].tagged for s in storage_of], bool)

    for number, routine in enumerate(plan.routines):
        local = set(routine.local_values)
        stored = [
            at
            for at, member in enumerate(routine.members)
            if member.stage == PARTIAL or not local.intersection(plan.ops[member.op].outputs)
        ]
        facts.stored.append(tuple(stored))
        for at in stored:
            key = routine.members[at].op, routine.members[at].stage
            facts.homes.setdefault(key, []).append((number, at))
    routine_of = plan.tasks.table["routine"]
    order = np.argsort(routine_of, kind="stable")
    cuts = np.searchsorted(routine_of[order], np.arange(len(plan.routines) + 1))
    facts.tasks_of = [order[a:b] for a, b in itertools.pairwise(cuts)]
    return facts
