"""Plans as text: the same text for the same plan, tasks as ``op@box``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jax_mpk.graph.ir import Nest
from jax_mpk.plan.ir import (
    FINISH,
    MAY,
    MUST,
    PARTIAL,
    READ,
    WHOLE,
    Accesses,
    LoopNode,
    Plan,
    Schedule,
    Segment,
    Storage,
)
from jax_mpk.plan.statistics import phase_count

_STAGES = {WHOLE: "", PARTIAL: ".part", FINISH: ".join"}
_KINDS = {READ: "reads", MUST: "writes", MAY: "may write"}


def format_plan(plan: Plan, max_tasks: int = 200) -> str:
    """The plan, readable without the code beside it.

    Args:
      plan: the plan; it need not be verified.
      max_tasks: tasks shown per segment; the others are counted.
    """
    return "\n".join(_lines(plan, max_tasks))


def format_task(plan: Plan, task: int) -> str:
    """One task: ``12: op3@[0:4, 0:8] tagged %7 waits e0 e2 signals e5``; several members are joined by ``+``.

    What it reads when the tags have arrived comes first, then the events.
    """
    row = plan.tasks.table[task]
    parts = []
    for at, member in enumerate(plan.routines[int(row["routine"])].members):
        rank = len(_space(plan, member.op, member.stage))
        box = plan.tasks.boxes[int(row["box"]) + at, :, :rank]
        parts.append(f"op{member.op}{_STAGES[member.stage]}@{_box(box)}")
    text = f"{task}: {' + '.join(parts)}"
    tagged = _awaited(plan, task)
    if tagged:
        text += " tagged " + " ".join(f"%{v}" for v in tagged)
    tasks = plan.tasks
    for verb, start, events in (
        ("waits", tasks.wait_start, tasks.wait_event),
        ("signals", tasks.signal_start, tasks.signal_event),
    ):
        mine = events[start[task] : start[task + 1]].tolist()
        if mine:
            text += f" {verb} " + " ".join(f"e{event}" for event in mine)
    return text


def format_accesses(plan: Plan, task: int) -> str:
    """What a task declares to touch, one line per access."""
    accesses = plan.accesses
    first, last = np.searchsorted(accesses.task, [task, task + 1])
    lines = []
    for i in range(int(first), int(last)):
        value = int(accesses.value[i])
        rank = len(plan.graph.values[value].shape) if value >= 0 else accesses.box.shape[2]
        name = f"%{value}" if value >= 0 else f"partial{-1 - value}"
        limits = _limits(accesses, int(accesses.within[i]))
        lines.append(f"{_KINDS[int(accesses.kind[i])]} {name}{_box(accesses.box[i, :, :rank])}{limits}")
    return "\n".join(lines)


def _limits(accesses: Accesses, within: int) -> str:
    """What run-time scalars leave of a box; coordinates of the value are i0, i1 and so on."""
    return f" where {' and '.join(map(str, accesses.spans[within]))}" if within >= 0 else ""


def _limited(plan: Plan) -> dict[int, list[str]]:
    """Per routine, its accesses that run-time scalars limit, as many as are different."""
    accesses = plan.accesses
    out: dict[int, list[str]] = {}
    rows = np.flatnonzero(accesses.within >= 0)
    columns = (plan.tasks.table["routine"][accesses.task[rows]], accesses.value[rows], accesses.kind[rows])
    found = np.unique(np.stack([*columns, accesses.within[rows]], axis=1), axis=0)
    for routine, value, kind, within in found.tolist():
        out.setdefault(routine, []).append(f"{_KINDS[kind]} %{value}{_limits(accesses, within)}")
    return out


def _awaited(plan: Plan, task: int) -> list[int]:
    """Tagged values that a task reads and does not store itself."""
    accesses = plan.accesses
    mine = slice(*np.searchsorted(accesses.task, [task, task + 1]))
    found: dict[int, set[int]] = {READ: set(), MUST: set(), MAY: set()}
    for value, kind in zip(accesses.value[mine].tolist(), accesses.kind[mine].tolist()):
        if value >= 0 and plan.storages[plan.value_storage[value]].tagged:
            found[kind].add(value)
    return sorted(found[READ] - found[MUST] - found[MAY])


def _lines(plan: Plan, max_tasks: int) -> Iterator[str]:
    target, phases = plan.target, phase_count(plan)
    yield (
        f"plan for {target.name} ({target.arch}): {len(plan.ops)} operators → {len(plan.tasks.table)} tasks "
        f"on {target.workers} workers, {plan.events} events, {phases.total} dependent phases"
    )
    yield f"memory: {plan.workspace_bytes} bytes of workspace, {plan.scratch_bytes} of scratch per worker"
    for result, argument in sorted(plan.aliases.items()):
        yield f"result {result} is argument {argument}, updated in place"
    yield ""
    yield "storages"
    held: dict[int, list[int]] = {}
    for v, storage in enumerate(plan.value_storage.tolist()):
        held.setdefault(storage, []).append(v)
    for number, storage in enumerate(plan.storages):
        values = " ".join(f"%{v}" for v in held.get(number, ()))
        yield f"  s{number} {_storage(storage)}: {values or 'partial results'}"
    yield ""
    yield "routines"
    limited = _limited(plan)
    counts = np.bincount(plan.tasks.table["routine"], minlength=len(plan.routines))
    for number, routine in enumerate(plan.routines):
        yield f"  r{number} ({_count(int(counts[number]), 'task')})"
        for member in routine.members:
            yield f"    {_member(plan, member.op, member.stage)}"
        for v, offset, extents in zip(routine.local_values, routine.local_offsets, routine.local_extents):
            value = plan.graph.values[v]
            yield f"      local %{v} {value.dtype}{list(extents)} of {list(value.shape)} at byte {offset}"
        for text in limited.get(number, ()):
            yield f"      {text}"
    for split in plan.splits:
        names = " ".join(f"s{s}" for s in split.storages)
        yield f"  op{split.op} is split at {list(split.bounds)}; partial results in {names}"
    yield ""
    yield from _schedule(plan, plan.schedule, max_tasks, "", iter(range(len(phases.segments))), phases.segments)
    for note in plan.notes:
        yield f"note: {note}"


def _schedule(
    plan: Plan,
    schedule: Schedule,
    max_tasks: int,
    indent: str,
    numbers: Iterator[int],
    phases: tuple[int, ...],
) -> Iterator[str]:
    for item in schedule:
        if isinstance(item, Segment):
            yield from _segment(plan, item, max_tasks, indent, numbers, phases)
        elif isinstance(item, LoopNode):
            how = f"{item.trips} times" if item.trips >= 0 else f"while %{item.predicate}"
            yield f"{indent}loop op{item.op} {how}{_source(plan, item.op)}"
            if item.cond:
                yield f"{indent}  condition"
                yield from _schedule(plan, item.cond, max_tasks, indent + "    ", numbers, phases)
                yield f"{indent}  round"
            yield from _schedule(plan, item.body, max_tasks, indent + "    ", numbers, phases)
        else:
            yield f"{indent}branch op{item.op} by %{item.index}{_source(plan, item.op)}"
            for number, arm in enumerate(item.arms):
                yield f"{indent}  arm {number}"
                yield from _schedule(plan, arm, max_tasks, indent + "    ", numbers, phases)


def _segment(
    plan: Plan,
    segment: Segment,
    max_tasks: int,
    indent: str,
    numbers: Iterator[int],
    phases: tuple[int, ...],
) -> Iterator[str]:
    number = next(numbers)
    total = sum(len(queue) for queue in segment.queues)
    yield f"{indent}segment {number}: {_count(total, 'task')}, {_count(phases[number], 'phase')}"
    shown = 0
    for worker, queue in enumerate(segment.queues):
        part = queue[: max(0, max_tasks - shown)].tolist()
        shown += len(part)
        if part:
            yield f"{indent}  worker {worker}"
        for task in part:
            yield f"{indent}    {format_task(plan, task)}"
    if shown < total:
        yield f"{indent}  … {_count(total - shown, 'more task')}"


def _member(plan: Plan, op: int, stage: int) -> str:
    it = plan.ops[op]
    kind = it.kind if isinstance(it, Nest) else type(it).__name__.lower()
    outputs = " ".join(f"%{v}" for v in it.outputs)
    return f"op{op}{_STAGES[stage]} {kind} {list(_space(plan, op, stage))} → {outputs}{_source(plan, op)}"


def _source(plan: Plan, op: int) -> str:
    text = str(plan.ops[op].source)
    return f"  # {text}" if text else ""


def _space(plan: Plan, op: int, stage: int) -> tuple[int, ...]:
    it = plan.ops[op]
    if stage == PARTIAL and isinstance(it, Nest):
        return it.space + it.rspace
    return plan.graph.values[it.outputs[0]].shape


def _storage(storage: Storage) -> str:
    if storage.kind == "workspace":
        return f"workspace {storage.offset}..{storage.offset + storage.nbytes}{' tagged' if storage.tagged else ''}"
    alias = f" = argument {storage.argument}" if storage.kind == "output" and storage.argument >= 0 else ""
    name = "argument" if storage.kind == "input" else "result"
    return f"{name} {storage.index}{alias} ({storage.nbytes} bytes)"


def _box(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{int(a)}:{int(b)}" for a, b in zip(box[0], box[1])) + "]"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
