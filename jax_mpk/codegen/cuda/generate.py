"""generate: a verified Plan becomes CUDA C++ for one persistent kernel, and the tables it walks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jax_mpk._version import __version__
from jax_mpk.codegen.cuda.architectures import check_architecture, check_streams
from jax_mpk.codegen.cuda.arrays import UNIT, buffer_count, buffer_of
from jax_mpk.codegen.cuda.code import COLUMNS, PACED, WARPS, Code, Stream, live_rows
from jax_mpk.codegen.cuda.copies import copies
from jax_mpk.codegen.cuda.inline import inline_members
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.codegen.cuda.lines import emit_cumulative, emit_sort, memory_slots, scratch_bytes
from jax_mpk.codegen.cuda.live import live_members
from jax_mpk.codegen.cuda.members import emit_contract, emit_map, emit_reduce
from jax_mpk.codegen.cuda.pieces import PIECE_ROWS, STAGE_BYTES, TILE_STAGES
from jax_mpk.codegen.cuda.ring import FEWEST_STAGES, NO_RING, Wanted, tasks_by_routine, wanted
from jax_mpk.codegen.cuda.routine import Frame, too_large
from jax_mpk.codegen.cuda.rows import row_chain
from jax_mpk.codegen.cuda.staging import Staging
from jax_mpk.codegen.cuda.tables import State, Tables, build_tables, segments, state_layout
from jax_mpk.codegen.cuda.updates import emit_update
from jax_mpk.codegen.cuda.views import take_views
from jax_mpk.errors import UnsupportedError
from jax_mpk.graph.ir import Cumulative, Nest, Sort, Update
from jax_mpk.plan.ir import WHOLE, LoopNode, Plan, Schedule, Segment, Target

ENTRY = "jax_mpk_kernel"
#: Most stages of the ring, and bytes in flight: docs/experiments.md.
_STAGES, _FLIGHT_BYTES = 24, 50 << 10
#: More warps than this are not needed to keep up with memory.
_ENOUGH_READERS = 8
#: Dynamic shared memory of a CTA on sm_90.
_SHARED_BYTES = 232_448
#: Of that, about as much as all but the ring and scratch takes.
_OTHER_BYTES = 8 << 10


_LIVE_ROWS = "__device__ void {}live_rows(const Launch& launch, u32 way, int at, int& first, int& count)"

_Made = tuple[list[Code], list[int], dict[tuple[str, ...], int], State, Tables, dict[str, int]]


def generate(plan: Plan, *, trace: bool = False) -> CudaProgram:
    """The program of a verified plan. The same plan gives the same text, byte for byte.

    Raises:
      UnsupportedError: the plan has members that only the CPU executor runs.
      TargetError: there is no code for the target's architecture, or none for a kind of task.
      TaskTooLargeError: a task does not fit the device (shared memory, 32-bit extents).
    """
    check_architecture(plan.target)
    # What streams needs a ring beside the scratch of all tasks; where there is no room for one, nothing streams.
    made = _made(plan, streams=True) or _made(plan, streams=False)
    if made is None:
        needs = [code.scratch + code.partials for code in routine_codes(plan, NO_RING)]
        most = int(np.argmax(needs))
        reason = f"its scratch takes {needs[most]} of the {_SHARED_BYTES} bytes of shared memory that an SM has"
        raise too_large(plan, plan.routines[most], reason)
    codes, case, bodies, state, tables, shape = made
    shape["kTrace"] = state.size if trace else 0
    text = _source(plan, shape, case, bodies, live_rows(codes))
    producer = 1 if shape["kStages"] else 0
    return CudaProgram(
        source=text,
        entry=ENTRY,
        arch=plan.target.arch,
        workers=plan.target.workers,
        threads=(WARPS + producer) * 32,
        shared_bytes=shape["shared"],
        tables=tables.words.tobytes(),
        state_bytes=state.size + (32 * len(plan.tasks.table) if trace else 0),
        workspace_bytes=plan.workspace_bytes,
        arguments=len(plan.graph.inputs),
        results=len(plan.graph.results),
        labels=_task_labels(plan),
        values=_value_names(plan, state),
    )


def _made(plan: Plan, *, streams: bool) -> _Made | None:
    """Everything of a program but its text; None if it needs more shared memory than there is."""
    ring = wanted(plan) if streams else NO_RING
    codes = routine_codes(plan, ring)
    streaming = [r for r, code in enumerate(codes) if any(stream.chunk_bytes > PACED for stream in code.streams)]
    check_streams(plan.target, [_label(plan, r) for r in streaming])
    bodies: dict[tuple[str, ...], int] = {}
    case = [bodies.setdefault(tuple(code.lines), len(bodies)) for code in codes]
    count = len(segments(plan.schedule))
    memory = max((code.memory for code in codes), default=0)
    state = state_layout(plan, count, memory, int(memory_slots(plan).max(initial=-1)) + 1)
    tables = build_tables(plan, state, case, codes)
    shape = _shape(plan, codes, state, tables, count, ring.stage or STAGE_BYTES)
    return None if shape is None else (codes, case, bodies, state, tables, shape)


def routine_codes(plan: Plan, ring: Wanted) -> list[Code]:
    """What becomes of each routine beside such a ring."""
    table = plan.tasks.table
    staging = Staging(plan)
    slots = memory_slots(plan)
    out = []
    for number, (routine, tasks) in enumerate(zip(plan.routines, tasks_by_routine(plan), strict=True)):
        first = table["box"][tasks].astype(np.int64)
        boxes = np.stack([plan.tasks.boxes[first + m] for m in range(len(routine.members))])
        if any(member.stage != WHOLE for member in routine.members):
            raise UnsupportedError(
                f"{_label(plan, number)}: a reduction whose parts are tasks of their own (PARTIAL and FINISH members) "
                "has no code for GPUs; split the reduced axis in the graph instead, as plan/split_reduce.py does"
            )
        ops = inline_members(plan, routine, boxes)
        views = take_views(plan, routine, ops, boxes)
        memory = slots[table["worker"][tasks]]
        room = _SHARED_BYTES - _OTHER_BYTES - ring.fewest * ring.stage - ring.partials
        room -= sum(scratch_bytes(op) for op in ops if isinstance(op, Sort))
        staged = staging.of(number, tasks)
        # Values whose live parts do not begin scratch: staged boxes begin where the plan says, others do not fit.
        barred = {s.value for s in staged}
        while True:
            live = live_members(plan, routine, ops, boxes, barred)
            copied = copies(plan, routine, live, boxes)
            frame = Frame(plan, routine, live, boxes, staged, copied, memory, views, room=room, stage=ring.stage)
            left = {v for v in live.shifts if not frame.brings(v)}
            if not left:
                break
            barred |= left
        behind = 0
        for m, op in enumerate(live.ops):
            if op is None or m < behind:
                continue
            behind = m + row_chain(frame, m, live.ops)
            if behind > m:
                continue
            if isinstance(op, Update):
                emit_update(frame, m, op)
            elif isinstance(op, Cumulative):
                emit_cumulative(frame, m, op)
            elif isinstance(op, Sort):
                emit_sort(frame, m, op)
            else:
                assert isinstance(op, Nest)
                {"map": emit_map, "reduce": emit_reduce, "contract": emit_contract}[op.kind](frame, m, op)
        out.append(frame.code)
    return out


def _shape(
    plan: Plan, codes: list[Code], state: State, tables: Tables, segment_count: int, stage: int
) -> dict[str, int] | None:
    """Sizes and offsets: the members of `Shape` in the generated text; None if there is too little shared memory."""
    at = 0
    out: dict[str, int] = {}

    def place(name: str, size: int) -> None:
        nonlocal at
        out[name] = at
        at += -(-size // 128) * 128

    place("kBarriers", (2 * _STAGES + 3) * 8)
    place("kControl", (2 * segment_count + 3) * 4)
    place("kSlots", 2 * tables.task_words * 4)
    place("kPartials", max(code.partials for code in codes) if codes else 0)
    place("kScratch", max(code.scratch for code in codes) if codes else 0)
    streaming = [stream for code in codes for stream in code.streams if stream.chunk_bytes > PACED]
    columns = any(stream.chunk_bytes >= COLUMNS for stream in streaming)
    tiles = any(stream.together for stream in streaming)
    room = (_SHARED_BYTES - at) // stage
    if at > _SHARED_BYTES or (streaming and room < (TILE_STAGES if tiles else FEWEST_STAGES)):
        return None
    stages, readers = _ring(min(_STAGES, room)) if streaming else (0, 1)
    out["kRing"] = at
    return {
        "kWorkers": plan.target.workers,
        "kWarps": WARPS,
        "kSegments": segment_count,
        "kDepth": max(1, _depth(plan.schedule)),
        "kResultCount": len(plan.graph.results),
        "kEvents": state.events,
        "kMemory": state.memory,
        "kMemoryBytes": state.memory_bytes,
        "kQueues": tables.queues,
        "kStreams": tables.streams,
        "kResults": tables.results,
        "kTasks": tables.tasks,
        "kTaskWords": tables.task_words,
        "kJobs": tables.jobs,
        "kStages": stages,
        "kReaders": readers,
        "kStageBytes": stage,
        "kFlight": min(_flight(streaming), max(stages - 1, 1)),
        "kLiveRows": len(live_rows(codes)),
        "kTiles": tiles + 2 * columns,
        "kPace": _pace(plan.target) if any(s.chunk_bytes == PACED for code in codes for s in code.streams) else 0,
        **out,
        "shared": at + stages * stage,
    }


def _task_labels(plan: Plan) -> tuple[tuple[int, str], ...]:
    """Names of tasks: (first task, name), each for all tasks up to the next one."""
    routine = plan.tasks.table["routine"]
    first = np.flatnonzero(np.diff(routine, prepend=-1))
    return tuple((int(task), _label(plan, int(routine[task]))) for task in first)


def _value_names(plan: Plan, state: State) -> tuple[tuple[int, str], ...]:
    """Names of tagged values, as plans print them: (where the words begin, name)."""
    tagged = [(state.tagged[s] // UNIT, f"%{v}") for v, s in enumerate(plan.value_storage.tolist()) if s >= 0]
    return tuple(sorted(entry for entry in tagged if entry[0] >= 0))


def _flight(streaming: Sequence[Stream]) -> int:
    """Chunks in flight. Short ones, as those of rows that do not fill a stage, are more."""
    chunks = nbytes = 0
    for stream in streaming:
        # A chunk has parts of several rows, or consecutive bytes.
        columns = stream.chunk_bytes >= COLUMNS
        whole = STAGE_BYTES if columns else stream.chunk_bytes * (PIECE_ROWS if stream.block else 1)
        size = int((stream.size * stream.rows).sum())
        chunks, nbytes = chunks - (-size // whole), nbytes + size
    return _FLIGHT_BYTES * chunks // nbytes if nbytes else 1


def _pace(target: Target) -> int:
    """Bytes a cycle that are a worker's share of what memory brings, at a clock that no GPU exceeds by much."""
    return max(1, int(target.bandwidth / target.workers / 1.8e9))


def _ring(room: int) -> tuple[int, int]:
    """Stages of the ring and warps that read them: all of these have equally many, and few warps have none."""
    choices = [(stages, readers) for stages in range(1, room + 1) for readers in range(1, WARPS + 1)]
    even = [(stages, readers) for stages, readers in choices if stages % readers == 0]
    return max(even, key=lambda c: (c[0] * min(c[1], _ENOUGH_READERS), c[1]))


def _label(plan: Plan, routine: int) -> str:
    source = plan.ops[plan.routines[routine].members[-1].op].source
    line = Path(source.line).name if source.line else ""
    return " ".join(part for part in (line, source.scope, source.primitive) if part)


def _source(
    plan: Plan,
    shape: dict[str, int],
    case: list[int],
    bodies: dict[tuple[str, ...], int],
    live: dict[tuple[str, ...], int],
) -> str:
    lines = [
        f"// Generated by jax_mpk {__version__} for {plan.target.name} ({plan.target.arch}): {len(plan.tasks.table)}",
        f"// tasks of {len(bodies)} kinds on {plan.target.workers} SMs.",
        '#include "jax_mpk.cuh"',
        "",
        "namespace mpk {",
        "",
        "struct Shape {",
        f"  using Launch = mpk::Launch<{buffer_count(plan)}>;",
        "  enum : int {",
        *(f"    {name} = {value}," for name, value in shape.items() if name != "shared"),
        "  };",
        "  template <class C> __device__ static void run(C& c, u32 routine);",
        *([f"  static {_LIVE_ROWS.format('')};"] if live else []),
        "  template <class Role> __device__ static bool advance(Progress<Shape>& at, Role& role);",
        "};",
        "using C = Context<Shape>;",
        "",
    ]
    for body, number in bodies.items():
        users = [r for r, k in enumerate(case) if k == number]
        labels = list(dict.fromkeys(_label(plan, r) for r in users))
        more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
        lines.append(f"// {'; '.join(labels[:3])}{more}  (routines {_ranges(users)})")
        lines.append(f"__device__ __forceinline__ void routine_{number}(C& c) {{")
        lines += [f"  {text}" if text else "" for text in body]
        lines += ["}", ""]
    lines += [
        "template <class Any>",
        "__device__ __forceinline__ void Shape::run(Any& c, u32 routine) {",
        "  switch (routine) {",
    ]
    lines += [f"    case {k}: return routine_{k}(c);" for k in range(len(bodies))]
    lines += [
        "  }",
        "}",
        "",
        *_live_rows(live),
        "template <class Role>",
        "__device__ __forceinline__ bool Shape::advance(Progress<Shape>& at, Role& role) {",
        *(f"  {text}" for text in _Schedule(plan).function()),
        "}",
        "",
        "}  // namespace mpk",
        "",
    ]
    threads = (WARPS + (1 if shape["kStages"] else 0)) * 32
    lines += [
        f'extern "C" __global__ void __launch_bounds__({threads}, 1)',
        f"{ENTRY}(const __grid_constant__ mpk::Shape::Launch launch) {{",
        "  mpk::run_worker<mpk::Shape>(launch);",
        "}",
        "",
    ]
    return "\n".join(lines)


def _live_rows(ways: dict[tuple[str, ...], int]) -> list[str]:
    """The function that says where the rows begin that a task will copy, and how many there are."""
    if not ways:
        return []
    out = [f"{_LIVE_ROWS.format('Shape::')} {{", "  switch (way) {"]
    for lines, number in ways.items():
        out += [f"    case {number}: {{", *(f"      {text}" for text in lines), "      return;", "    }"]
    return [*out, "  }", "}", ""]


def _ranges(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return shown + (f", … {numbers[-1]}" if len(numbers) > 6 else "")


class _Schedule:
    """The schedule as C++, which both roles of a worker follow: it returns at every segment, and goes on behind it."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._next = 0

    def function(self) -> list[str]:
        """Its body; ``at`` is how far a worker is."""
        lines = self._lines(self._plan.schedule, 0)
        behind = [f"  case {n}: goto behind_{n};" for n in range(self._next)]
        return ["switch (at.segment) {", *behind, "}", *lines, "return false;"]

    def _lines(self, schedule: Schedule, depth: int) -> list[str]:
        """Statements; ``depth``: how many loops around them count their rounds."""
        out: list[str] = []
        for k, item in enumerate(schedule):
            # Loops end with a barrier of their own: behind their last round, or before the predicate that ends them.
            if k and not isinstance(schedule[k - 1], LoopNode):
                out.append("role.barrier();")
            if isinstance(item, Segment):
                out += [f"at.segment = {self._next};", "return true;", f"behind_{self._next}:"]
                self._next += 1
            elif isinstance(item, LoopNode):
                out += self._loop(item, depth)
            else:
                out.append(
                    f"switch (clamped(role.template decide<s32>({self._place(item.index)}), {len(item.arms)})) {{"
                )
                for n, arm in enumerate(item.arms):
                    lines = self._lines(arm, depth)
                    out += [f"  case {n}: {{", *(f"    {text}" for text in lines), "    break;", "  }"]
                out.append("}")
        return out

    def _loop(self, loop: LoopNode, depth: int) -> list[str]:
        if loop.predicate < 0:
            round = f"at.rounds[{depth}]"
            head = f"for ({round} = 0; {round} < {loop.trips}ll && role.running(); ++{round}) {{"
            return [head, *(f"  {text}" for text in [*self._lines(loop.body, depth + 1), "role.barrier();"]), "}"]
        inner = [
            *self._lines(loop.cond, depth),
            "role.barrier();",
            f"if (!role.template decide<b1>({self._place(loop.predicate)})) break;",
            *self._lines(loop.body, depth),
            "role.barrier();",
        ]
        return ["while (role.running()) {", *(f"  {text}" for text in inner), "}"]

    def _place(self, value: int) -> str:
        buffer, unit = buffer_of(self._plan, self._plan.storages[int(self._plan.value_storage[value])])
        return f"{buffer}, {unit}"


def _depth(schedule: Schedule) -> int:
    """How many loops that count their rounds are nested at most."""
    most = 0
    for item in schedule:
        if isinstance(item, LoopNode):
            inner = max(_depth(item.cond), _depth(item.body)) + (item.predicate < 0)
        else:
            inner = max(map(_depth, getattr(item, "arms", ())), default=0)
        most = max(most, inner)
    return most
