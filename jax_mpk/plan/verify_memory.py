"""Memory: sizes and aliases of storages, and which value the bytes hold at each point of the schedule.

Within a segment :mod:`.verify_order` shows that values sharing bytes take turns. Here the segments, loops and branches
are walked in order with the set of values whose bytes hold them ("valid"). A loop is walked until that set no longer
changes: what is valid when a round begins must be so in the first round and in all others.
"""

from __future__ import annotations

from math import prod

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Branch, Loop
from jax_mpk.plan.ir import READ, BranchNode, LoopNode, Plan, Schedule, Segment
from jax_mpk.plan.verify_facts import Facts, refuse
from jax_mpk.plan.verify_order import Summary


def check_storages(plan: Plan) -> None:
    """Each storage by itself: kind, size, place, and who may live there."""
    graph, seen = plan.graph, set()
    if plan.workspace_bytes < 0:
        refuse(f"the workspace has {plan.workspace_bytes} bytes")
    for number, storage in enumerate(plan.storages):
        what = f"storage {number}"
        key = (storage.kind, storage.index)
        if storage.nbytes < 0:
            refuse(f"{what} has {storage.nbytes} bytes")
        if storage.kind == "workspace":
            if storage.offset < 0 or storage.offset + storage.nbytes > plan.workspace_bytes:
                refuse(
                    f"{what} lies at bytes {storage.offset} to {storage.offset + storage.nbytes} "
                    f"of a workspace of {plan.workspace_bytes}"
                )
            if storage.argument != -1:
                refuse(f"{what} is workspace, but aliases argument {storage.argument}")
            continue
        if storage.kind not in ("input", "output"):
            refuse(f"{what} has kind {storage.kind!r}")
        buffers = graph.inputs if storage.kind == "input" else graph.results
        if not 0 <= storage.index < len(buffers):
            refuse(f"{what} is {storage.kind} {storage.index} of {len(buffers)}")
        if key in seen:
            refuse(f"{storage.kind} {storage.index} has two storages")
        seen.add(key)
        if storage.nbytes != _nbytes(plan, buffers[storage.index]):
            refuse(
                f"{what} has {storage.nbytes} bytes, {storage.kind} {storage.index} has "
                f"{_nbytes(plan, buffers[storage.index])}"
            )
        if storage.offset:
            refuse(f"{what} is a buffer of its own, but has offset {storage.offset}")
        if storage.kind == "input" and storage.argument not in (-1, storage.index):
            refuse(f"{what} is argument {storage.index}, but aliases argument {storage.argument}")
    _check_aliases(plan)
    _check_places(plan)


def _check_aliases(plan: Plan) -> None:
    graph = plan.graph
    aliases = {s.index: s.argument for s in plan.storages if s.kind == "output" and s.argument != -1}
    if aliases != dict(plan.aliases):
        refuse(f"Plan.aliases says {dict(plan.aliases)}, the storages say {aliases}")
    if len(set(aliases.values())) != len(aliases):
        refuse(f"two results alias one argument: {aliases}")
    inputs = {s.index for s in plan.storages if s.kind == "input"}
    for result, argument in aliases.items():
        if not 0 <= argument < len(graph.inputs):
            refuse(f"result {result} aliases argument {argument} of {len(graph.inputs)}")
        if argument not in graph.donated:
            refuse(f"result {result} aliases argument {argument}, which is not donated")
        a, b = graph.values[graph.inputs[argument]], graph.values[graph.results[result]]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            refuse(f"result {result} ({b.dtype}{list(b.shape)}) aliases argument {argument} ({a.dtype}{list(a.shape)})")
        if argument in inputs:
            refuse(f"argument {argument} has a storage of its own beside that of result {result}")


def _check_places(plan: Plan) -> None:
    """Values fit their storages; arguments and results are where their buffers are."""
    graph = plan.graph
    for v, value in enumerate(graph.values):
        s = int(plan.value_storage[v])
        if s < 0:
            continue
        storage = plan.storages[s]
        if _nbytes(plan, v) > storage.nbytes:
            refuse(
                f"value {v} {value.dtype}{list(value.shape)} needs {_nbytes(plan, v)} bytes, "
                f"storage {s} has {storage.nbytes}"
            )
        if storage.offset % dtypes.itemsize(value.dtype):
            refuse(f"value {v} {value.dtype} is not aligned at byte {storage.offset}")
    for number, v in enumerate(graph.inputs):
        s = int(plan.value_storage[v])
        if s < 0:
            continue
        storage = plan.storages[s]
        argument = storage.index if storage.kind == "input" else storage.argument
        if storage.kind == "workspace" or argument != number:
            refuse(f"argument {number} (value {v}) has storage {s}, which is not its buffer")
    for number, v in enumerate(graph.results):
        s = int(plan.value_storage[v])
        if _nbytes(plan, v) == 0:
            continue
        if s < 0 or (plan.storages[s].kind, plan.storages[s].index) != ("output", number):
            refuse(f"result {number} (value {v}) has storage {s}, which is not its buffer")


def _nbytes(plan: Plan, value: int) -> int:
    it = plan.graph.values[value]
    return prod(it.shape) * dtypes.itemsize(it.dtype)


# -- the schedule ----------------------------------------------------------------------------------------------


def check_wiring(facts: Facts) -> None:
    """What loops and branches pass on has the same bytes on both sides."""
    for position, op in enumerate(facts.plan.ops):
        if isinstance(op, Loop):
            for k, p in enumerate(op.params):
                names = [("init", op.inits[k]), ("result of its body", op.body.results[k])]
                if facts.start[p] >= 0:
                    _check_same_bytes(facts, position, f"param {k}", p, names)
                _check_same_bytes(facts, position, f"output {k}", op.outputs[k], [("param", p)])
        elif isinstance(op, Branch):
            for k, v in enumerate(op.outputs):
                names = [(f"result of arm {a}", arm.results[k]) for a, arm in enumerate(op.arms)]
                _check_same_bytes(facts, position, f"output {k}", v, names)


def check_flow(facts: Facts, summaries: list[Summary]) -> None:
    """Walks the schedule; raises where a value is used that its bytes do not hold."""
    _check_writes(facts)
    _Flow(facts, summaries).run()


def _check_same_bytes(facts: Facts, op: int, what: str, name: int, others: list[tuple[str, int]]) -> None:
    if facts.start[name] < 0 or facts.nbytes[name] == 0:
        return
    for role, other in others:
        if facts.start[other] != facts.start[name]:
            refuse(
                f"{facts.op_text(op)}: {what} ({facts.name_text(name)}) and the {role} "
                f"({facts.name_text(other)}) do not have the same bytes, and no operator copies"
            )


def _check_writes(facts: Facts) -> None:
    """Accesses are to names with bytes, and no argument's own buffer is written."""
    rows = facts.rows
    assert rows is not None
    for row in np.flatnonzero(facts.start[rows.name] < 0)[:1]:
        refuse(
            f"{facts.task_text(int(rows.task[row]))} touches {facts.name_text(int(rows.name[row]))}, which has no bytes"
        )
    for name in np.unique(rows.name[rows.kind != READ]).tolist():
        if name < facts.value_count:
            storage = facts.plan.storages[facts.plan.value_storage[name]]
            if storage.kind == "input":
                task = int(rows.task[(rows.name == name) & (rows.kind != READ)][0])
                refuse(
                    f"{facts.task_text(task)} writes {facts.name_text(name)} into the buffer of "
                    f"argument {storage.index}"
                )


class _Flow:
    """Walks a schedule with the set of valid names (bool by name)."""

    def __init__(self, facts: Facts, summaries: list[Summary]):
        self.facts = facts
        self.summaries = {id(segment.segment): summary for segment, summary in zip(facts.segments, summaries)}
        #: The name that last overwrote a name, for messages.
        self.killer: dict[int, int] = {}
        self.empty = np.array(facts.nbytes, np.int64) == 0
        self.inner = {
            op: self._names_inside(op) for op, it in enumerate(facts.plan.ops) if isinstance(it, Loop | Branch)
        }

    def run(self) -> None:
        plan = self.facts.plan
        state = self.empty.copy()
        for v in plan.graph.inputs:
            if self.facts.start[v] >= 0:
                state[v] = True
        state = self._walk(plan.schedule, state, True)
        for number, v in enumerate(plan.graph.results):
            self._need(state, v, f"at the end, result {number}", True)

    def _names_inside(self, op: int) -> np.ndarray:
        """Names that exist only within a loop or branch (bool by name)."""
        facts, todo = self.facts, [op]
        out = np.zeros(len(facts.shapes), bool)
        while todo:
            owner = todo.pop()
            it = facts.plan.ops[owner]
            if isinstance(it, Loop):
                out[list(it.params)] = True
            for number in facts.inner_blocks(owner):
                for inner in facts.blocks[number].ops:
                    out[list(facts.plan.ops[inner].outputs)] = True
                    out[list(facts.accumulators.get(inner, ()))] = True
                    todo.append(inner)
        return out & ~self.empty

    def _need(self, state: np.ndarray, name: int, who: str, report: bool) -> None:
        if not report or state[name]:
            return
        facts = self.facts
        op = int(facts.producer[name]) if name < facts.value_count else -1
        by = self.killer.get(name)
        why = (
            f"which {facts.name_text(by)} has overwritten"
            if by is not None
            else "which has no bytes"
            if facts.start[name] < 0
            else f"which {facts.op_text(op)} has not written there"
            if op >= 0
            else "which is not there"
        )
        refuse(f"{who} needs {facts.name_text(name)}, {why}")

    def _walk(self, schedule: Schedule, state: np.ndarray, report: bool) -> np.ndarray:
        for item in schedule:
            if isinstance(item, Segment):
                state = self._segment(item, state, report)
            elif isinstance(item, LoopNode):
                state = self._loop(item, state, report)
            else:
                state = self._branch(item, state, report)
        return state

    def _segment(self, segment: Segment, state: np.ndarray, report: bool) -> np.ndarray:
        summary = self.summaries[id(segment)]
        for name, task in summary.uses.items():
            if report and not state[name]:
                self._need(state, name, self.facts.task_text(task), report)
        state = state.copy()
        for name, by in summary.kills.items():
            if state[name]:
                self.killer[name] = by
            state[name] = False
        for name in summary.defines:
            state[name] = True
            self.killer.pop(name, None)
        return state

    def _loop(self, node: LoopNode, entry: np.ndarray, report: bool) -> np.ndarray:
        facts, op = self.facts, self.facts.plan.ops[node.op]
        assert isinstance(op, Loop)
        who = facts.op_text(node.op)
        head = entry & ~self.inner[node.op]
        for p, init in zip(op.params, op.inits):
            if facts.start[p] >= 0:
                self._need(entry, init, f"at the start, {who}", report)
            head[p] = entry[init] and (facts.start[p] >= 0 or self.empty[p])

        def round_(head: np.ndarray, report: bool) -> tuple[np.ndarray, np.ndarray]:
            """State where the loop may end, and at the head of the next round."""
            tested = self._walk(node.cond, head, report)
            if node.predicate >= 0:
                self._need(tested, node.predicate, f"the condition of {who}", report)
                if report:
                    self._check_late_readers(node.predicate, node.body, f"condition of {who}")
            end = self._walk(node.body, tested, report)
            after = end & ~self.inner[node.op]
            for p, result in zip(op.params, op.body.results):
                if facts.start[p] >= 0:
                    self._need(end, result, f"the next round of {who}", report)
                after[p] = end[result] and (facts.start[p] >= 0 or self.empty[p])
            return tested, after

        while True:
            _, after = round_(head, False)
            # What a round leaves behind must be there when it begins, whichever round it is.
            meet = head & after
            if np.array_equal(meet, head):
                break
            head = meet
        tested, after = round_(head, report)
        last = tested if node.trips < 0 else after if node.trips > 0 else head
        out = last & ~self.inner[node.op]
        for v, p in zip(op.outputs, op.params):
            out[v] = last[p]
        return out | self.empty

    def _branch(self, node: BranchNode, entry: np.ndarray, report: bool) -> np.ndarray:
        facts, op = self.facts, self.facts.plan.ops[node.op]
        assert isinstance(op, Branch)
        who = facts.op_text(node.op)
        self._need(entry, node.index, f"the choice of {who}", report)
        out = np.ones_like(entry)
        for arm, block in zip(node.arms, op.arms):
            if report:
                self._check_late_readers(node.index, arm, f"choice of {who}")
            end = self._walk(arm, entry, report)
            left = end & ~self.inner[node.op]
            for v, result in zip(op.outputs, block.results):
                if facts.start[v] >= 0:
                    self._need(end, result, f"the end of {who}", report)
                left[v] = end[result]
            out &= left
        return out | self.empty

    def _check_late_readers(self, name: int, schedule: Schedule, who: str) -> None:
        """Work that follows a predicate without a barrier does not overwrite it under a slow worker's eyes."""
        for segment in _first_segments(schedule):
            summary = self.summaries[id(segment)]
            for v in sorted(summary.written - summary.settled):
                if name in self.facts.overlapping(v):
                    label = next(s.label for s in self.facts.segments if s.segment is segment)
                    refuse(
                        f"{self.facts.name_text(v)} overwrites the {who} ({self.facts.name_text(name)}) in "
                        f"{label}, while slow workers may still have to read it"
                    )


def _first_segments(schedule: Schedule) -> list[Segment]:
    """Segments that a schedule may begin with, before any barrier."""
    if not schedule:
        return []
    item = schedule[0]
    if isinstance(item, Segment):
        return [item]
    if isinstance(item, BranchNode):
        return [segment for arm in item.arms for segment in _first_segments(arm)]
    return _first_segments(item.cond or item.body)
