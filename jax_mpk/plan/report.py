"""What a Plan amounts to, as figures and as the text of ``explain``: pure functions of the Plan."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePath

import numpy as np

from jax_mpk.graph.ir import Cumulative, Loop, Nest, Op, Sort, Update
from jax_mpk.graph.scalar import Expr
from jax_mpk.plan.estimate import rounds, task_seconds, timeline, traffic, unique_bytes
from jax_mpk.plan.ir import FINISH, PARTIAL, READ, Plan, Routine
from jax_mpk.plan.statistics import phase_count

#: A contraction that streams at least this much should keep every worker busy.
LARGE_BYTES = 1_000_000
#: Below this share of busy workers, or above this deviation from the mean, a large contraction is noted.
_BUSY, _EVEN = 0.95, 0.05


@dataclass(frozen=True)
class RoutineStats:
    """One routine of a plan.

    Attributes:
      routine: position in ``Plan.routines``.
      line: the user's ``file:line``, or "".
      text: what it computes.
      contraction: whether that includes a contraction.
      times: runs in one launch (loops of unknown length count once).
      tasks: its tasks.
      busy: share of the workers that stream bytes for it.
      streamed_bytes: bytes of arguments that its tasks read, all workers together.
      imbalance: largest deviation from the mean of the bytes streamed by a busy worker, as a fraction of it.
      seconds: predicted time of the worker with most to do, for one run.
      handoff: how its results reach their readers: "tagged", "counters", "in order" (of a queue, or by a barrier),
        "result" (of the call), several joined by "+".
    """

    routine: int
    line: str
    text: str
    contraction: bool
    times: int
    tasks: int
    busy: float
    streamed_bytes: int
    imbalance: float
    seconds: float
    handoff: str


@dataclass(frozen=True)
class PlanStats:
    """A plan in figures; bytes, seconds and counts are those of one launch.

    Loops whose number of rounds is only known at run time count one round, every arm of a branch counts for bytes and
    the slowest one for time.

    Attributes:
      workers: queues.
      operators: operators of the fused graph.
      tasks: tasks in the tables; those of a loop's body count once.
      events: events.
      phases: dependent phases, one more than the most hand-offs between workers on any dependency chain; a loop
        counts once.
      weight_bytes: bytes of arguments read, each counted once per segment, but those of ``cache_bytes``.
      cache_bytes: the same for donated arguments that results share the buffer of. A read bounded by a run-time
        scalar counts in full.
      activation_bytes: bytes that tasks read and write in between, repeated reads included.
      written_bytes: bytes written into results.
      workspace_bytes: memory for values between tasks.
      scratch_bytes: most scratch memory a task uses.
      scratch_limit: what the target has.
      aliased: results that share a donated argument's buffer.
      predicted_s: ``work_s + handoff_s``.
      work_s: tasks on the predicted critical path.
      handoff_s: hand-offs between workers on it.
      roofline_s: ``(weight_bytes + cache_bytes) / bandwidth``.
      bandwidth: of the target, bytes per second.
      routines: one each.
    """

    workers: int
    operators: int
    tasks: int
    events: int
    phases: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    written_bytes: int
    workspace_bytes: int
    scratch_bytes: int
    scratch_limit: int
    aliased: int
    predicted_s: float
    work_s: float
    handoff_s: float
    roofline_s: float
    bandwidth: float
    routines: tuple[RoutineStats, ...]

    @property
    def large_contractions(self) -> tuple[RoutineStats, ...]:
        """Routines with a contraction that stream more than 1 MB."""
        return tuple(r for r in self.routines if r.contraction and r.streamed_bytes > LARGE_BYTES)


def plan_stats(plan: Plan) -> PlanStats:
    """Counts and predicts everything about a plan."""
    moved = traffic(plan)
    seconds = task_seconds(plan, moved)
    clock = timeline(plan, seconds)
    rows, table = plan.accesses, plan.tasks.table
    times = np.zeros(len(table), np.int64)
    weights = cache = 0.0
    kind = np.array([storage.kind for storage in plan.storages] or [""])
    # Accumulators are values -1, -2, …
    extra = [storage for split in plan.splits for storage in split.storages]
    home = np.array([*plan.value_storage, *reversed(extra)], np.int64)
    where = kind[home[rows.value]]
    for segment, count in rounds(plan.schedule):
        tasks = np.concatenate(segment.queues) if segment.queues else np.zeros(0, np.int32)
        times[tasks] += count
        inside = np.zeros(len(table), bool)
        inside[tasks] = True
        reads = inside[rows.task] & (rows.kind == READ) & moved.argument
        weights += count * unique_bytes(plan, moved, np.flatnonzero(reads & (where == "input")))
        cache += count * unique_bytes(plan, moved, np.flatnonzero(reads & (where == "output")))
    every = moved.nbytes * times[rows.task]
    written = every[(rows.kind != READ) & (where == "output")].sum()
    # A result that tasks read again is an activation too.
    passed = every[(where == "workspace") | (where == "output") & (rows.kind == READ) & ~moved.argument].sum()
    return PlanStats(
        workers=plan.target.workers,
        operators=len(plan.ops),
        tasks=len(table),
        events=plan.events,
        phases=phase_count(plan).total,
        weight_bytes=round(weights),
        cache_bytes=round(cache),
        activation_bytes=round(passed),
        written_bytes=round(written),
        workspace_bytes=plan.workspace_bytes,
        scratch_bytes=plan.scratch_bytes,
        scratch_limit=plan.target.scratch_bytes,
        aliased=len(plan.aliases),
        predicted_s=clock.work_s + clock.handoff_s,
        work_s=clock.work_s,
        handoff_s=clock.handoff_s,
        roofline_s=float(weights + cache) / plan.target.bandwidth,
        bandwidth=plan.target.bandwidth,
        routines=tuple(_routines(plan, np.where(moved.argument, moved.nbytes, 0), seconds, times)),
    )


def _routines(plan: Plan, streamed: np.ndarray, seconds: np.ndarray, times: np.ndarray) -> list[RoutineStats]:
    """Statistics per routine.

    Args:
      plan: the plan.
      streamed: bytes of arguments moved, per access.
      seconds: predicted, per task.
      times: runs per launch, per task.
    """
    table, workers, rows = plan.tasks.table, plan.target.workers, plan.accesses
    count = len(plan.routines)
    shape = (count, workers)
    nbytes, busy = np.zeros(shape), np.zeros(shape)
    np.add.at(busy, (table["routine"], table["worker"]), seconds)
    reads = rows.kind == READ
    task = table[rows.task[reads]]
    np.add.at(nbytes, (task["routine"], task["worker"]), streamed[reads])
    tasks = np.bincount(table["routine"], minlength=count)
    often = np.zeros(count, np.int64)
    often[table["routine"]] = times
    signalling = set(table["routine"][np.diff(plan.tasks.signal_start) > 0].tolist())
    out = []
    for number, routine in enumerate(plan.routines):
        used = nbytes[number][nbytes[number] > 0]
        mean = used.mean() if len(used) else 1.0
        ops = [plan.ops[member.op] for member in routine.members]
        out.append(
            RoutineStats(
                routine=number,
                line=_line(ops),
                text=_routine_text(plan, routine),
                contraction=any(_is_contraction(op) for op in ops),
                times=int(often[number]),
                tasks=int(tasks[number]),
                busy=len(used) / workers,
                streamed_bytes=round(used.sum()),
                imbalance=float(np.abs(used - mean).max(initial=0.0) / mean),
                seconds=float(busy[number].max(initial=0.0)),
                handoff=_handoff(plan, routine, number in signalling),
            )
        )
    return out


def _handoff(plan: Plan, routine: Routine, signals: bool) -> str:
    """How the results of a routine are handed over; ``signals``: some of its tasks signal events."""
    found = set()
    for member in routine.members:
        for v in plan.ops[member.op].outputs:
            storage = plan.storages[plan.value_storage[v]] if plan.value_storage[v] >= 0 else None
            if storage is not None and v not in routine.local_values and member.stage != PARTIAL:
                plain = "result" if storage.kind == "output" else "counters" if signals else "in order"
                found.add("tagged" if storage.tagged else plain)
        if member.stage == PARTIAL:
            found.add("counters" if signals else "in order")
    return "+".join(kind for kind in ("tagged", "counters", "in order", "result") if kind in found)


# -- text ------------------------------------------------------------------------------------------------------


def explain(plan: Plan, *, name: str, equations: int) -> str:
    """What a person asks about a megakernel: is it one op, how fast should it be and why, what was not possible.

    Args:
      plan: the plan.
      name: the function's.
      equations: equations of its jaxpr, nested ones included.
    """
    stats = plan_stats(plan)
    unit = "worker" if plan.target.arch == "cpu" else "SM"
    indent = " " * (len(name) + 3)
    counts = (
        _number(equations, "equation"),
        _number(stats.operators, "operator"),
        _number(len(plan.routines), "routine"),
        f"{_number(stats.tasks, 'task')} on {_number(stats.workers, unit)}",
    )
    cache = f" + {_bytes(stats.cache_bytes)} live cache (at most)" if stats.cache_bytes else ""
    share = stats.roofline_s / stats.predicted_s if stats.predicted_s else 0.0
    lines = [
        f"{name}   1 custom call   {' → '.join(counts)}   {_number(stats.phases, 'dependent phase')}, "
        f"{_number(stats.events, 'event')}",
        f"{indent}reads {_bytes(stats.weight_bytes)} weights{cache}   predicted {_seconds(stats.predicted_s)} = "
        f"{_seconds(stats.work_s)} bytes + {_seconds(stats.handoff_s)} phases   "
        f"({share:.0%} of {_bytes(stats.bandwidth)}/s)",
        f"{indent}moves {_bytes(stats.activation_bytes)} of activations between tasks, "
        f"writes {_bytes(stats.written_bytes)} of results",
        f"{indent}memory: {_bytes(stats.workspace_bytes)} workspace; scratch {_bytes(stats.scratch_bytes)} of "
        f"{_bytes(stats.scratch_limit)} per {unit}; "
        f"{_number(stats.aliased, 'result')} in the buffer of a donated argument",
        *_table(stats),
        *_notes(plan, stats),
    ]
    return "\n".join(lines) + "\n"


def _table(stats: PlanStats) -> list[str]:
    """One line per user line and kind of routine, in order of first appearance."""
    groups: dict[tuple[str, str, int, str], list[RoutineStats]] = {}
    for routine in stats.routines:
        groups.setdefault((routine.line, routine.text, routine.tasks, routine.handoff), []).append(routine)
    rows = []
    for (line, _, tasks, handoff), members in groups.items():
        seconds = sum(r.seconds * r.times for r in members)
        streamed = sum(r.streamed_bytes * r.times for r in members)
        rows.append(
            (
                PurePath(line).name or "-",
                f"{sum(r.times for r in members)} ×",
                _number(tasks, "task"),
                f"reads {_bytes(streamed)}" if streamed else "",
                f"{seconds / stats.predicted_s:.1%} of the time" if stats.predicted_s else "",
                handoff,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)] if rows else []
    return [
        f"  {row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
        + f"  {text}"
        for row, (_, text, _, _) in zip(rows, groups)
    ]


def _notes(plan: Plan, stats: PlanStats) -> list[str]:
    found = Counter(plan.notes)
    for routine in stats.large_contractions:
        where = f"{PurePath(routine.line).name or 'a routine'}: {routine.text}"
        if routine.busy < _BUSY:
            found[f"{where} keeps {routine.busy:.0%} of the workers busy"] += 1
        elif routine.imbalance > _EVEN:
            found[f"{where} is uneven: a worker reads {routine.imbalance:.0%} more or less than the mean"] += 1
    if any(isinstance(op, Loop) and op.trips is None for op in plan.ops):
        found["a loop's number of rounds is only known at run time; the figures count one"] += 1
    if not found:
        return ["  no notes"]
    return [f"  note: {note}" + (f" ({times} ×)" if times > 1 else "") for note, times in found.items()]


def _routine_text(plan: Plan, routine: Routine) -> str:
    """Its members in order, the maps among them only counted where there is anything else."""
    parts: list[str] = []
    maps = 0
    factors: list[tuple[str, str]] = []  # of the contraction(s) at the end of parts: before the last ×, after it

    def flush() -> None:
        nonlocal maps
        if maps:
            parts.append(_number(maps, "map"))
        maps = 0

    for member in routine.members:
        op = plan.ops[member.op]
        stage = {PARTIAL: " (part)", FINISH: " (joined)"}.get(member.stage, "")
        if isinstance(op, Nest) and op.kind == "map":
            maps += 1
            continue
        sizes = _contraction_sizes(op) if _is_contraction(op) and isinstance(op, Nest) else None
        if sizes is not None and not maps and factors and factors[-1][0] == sizes[0] and not stage:
            # Siblings, such as several projections of one vector.
            factors.append(sizes)
            parts[-1] = f"contract {sizes[0]}×({'+'.join(after for _, after in factors)})"
            continue
        flush()
        factors = [sizes] if sizes is not None and not stage else []
        parts.append((f"contract {sizes[0]}×{sizes[1]}" if sizes is not None else _op_text(op)) + stage)
    flush()
    kept = [part for part in parts if not _maps(part)]
    kept = [part if (n := len(list(same))) == 1 else f"{part} ({n} ×)" for part, same in groupby(kept)]
    total = sum(_maps(part) for part in parts)
    if not kept:
        return _number(total, "map")
    return " → ".join(kept) + (f" + {_number(total, 'map')}" if total else "")


def _maps(part: str) -> int:
    """How many maps a part counts; 0 if it is anything else."""
    return int(part.split()[0].replace(",", "")) if part.endswith((" map", " maps")) else 0


def _op_text(op: Op) -> str:
    if isinstance(op, Nest):
        assert op.combine is not None
        return f"{op.combine.kind} over {_product(op.rspace)}"
    if isinstance(op, Update):
        return f"update {_product(op.space)}"
    if isinstance(op, Cumulative):
        return f"cumulative {op.combine.kind}"
    if isinstance(op, Sort):
        return f"top {op.top_k}" if op.top_k is not None else "sort"
    return type(op).__name__.lower()


def _is_contraction(op: Op) -> bool:
    return isinstance(op, Nest) and op.kind == "contract"


def _contraction_sizes(op: Nest) -> tuple[str, str]:
    """A contraction as [batch×]M×K and N: the axes of the first factor, the reduced ones, those of the second."""
    axes = [_coordinates(op.body, result) for result in op.body.results]
    sizes: dict[str, list[int]] = {"batch": [], "m": [], "n": []}
    for axis, extent in enumerate(op.space):
        first, second = (axis in found for found in axes)
        sizes["batch" if first and second else "n" if second else "m"].append(extent)
    batch = math.prod(sizes["batch"])
    before = f"{batch} × " if batch > 1 else ""
    return f"{before}{math.prod(sizes['m'])}×{math.prod(op.rspace)}", f"{math.prod(sizes['n'])}"


def _coordinates(expr: Expr, root: int) -> set[int]:
    """Coordinate axes that a node depends on."""
    found: set[int] = set()
    stack, seen = [root], {root}
    while stack:
        node = expr.nodes[stack.pop()]
        if node.op == "coord":
            found.add(node.attr)
        fresh = set(node.args) - seen
        seen |= fresh
        stack += fresh
    return found


def _line(ops: list[Op]) -> str:
    """The line of the routine's last contraction, or of its last operator."""
    heavy = [op for op in ops if _is_contraction(op)] or ops
    return heavy[-1].source.line


def _product(extents: tuple[int, ...]) -> str:
    return "×".join(str(e) for e in extents if e != 1) or "1"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _seconds(count: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e-6:.3g} µs"
