"""The Plan verifier: proves that running a Plan computes its Graph, whatever the workers' speeds.

It sees the Graph and the Plan only and shares no code with the planner. The proof has five parts:

* structure (here): ids are in range, the schedule mirrors the graph's blocks, each task is in one queue once;
* coverage (:mod:`.verify_coverage`): the tasks of each operator partition its space, and the declared accesses are the
  regions that the operators' index maps touch;
* memory (:mod:`.verify_memory`): sizes, aliases, and which value the bytes hold at each point of the schedule;
* order (:mod:`.verify_order`): nothing deadlocks, and conflicting accesses within a segment are ordered by queues and
  events, or never meet, whatever the run-time scalars are; between segments lies a barrier;
* tags (:mod:`.verify_tags`): storages whose elements are their own events keep the rules that make this sound.

Beyond what the classes of :mod:`jax_mpk.plan.ir` say, a Plan must keep to these rules, each a condition that makes a
short proof possible:

* all tasks of one stage of one operator are in one segment, and only in segments of the operator's own block;
* a loop's inits, params, body results and outputs have pairwise the same bytes, as have a branch's outputs and the
  results of its arms (copies between them are operators);
* a result's storage has exactly its size; an argument's buffer is only written where a result aliases it;
* an Update in place declares no READ of its base for "set", and the whole boxes for the other combinations;
* the bytes of a loop's predicate or a branch's index are not written in the segment that begins right after the
  workers have read it, unless each other worker has finished a task of that segment: a slow one may still be reading.
"""

from __future__ import annotations

import itertools

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.bounds import Span
from jax_mpk.graph.ir import Branch, Loop, Nest
from jax_mpk.plan.ir import (
    FINISH,
    PARTIAL,
    TASK,
    WHOLE,
    BranchNode,
    LoopNode,
    Plan,
    Routine,
    Schedule,
    Segment,
    Split,
)
from jax_mpk.plan.verify_coverage import check_coverage
from jax_mpk.plan.verify_facts import STAGE_NAMES, Facts, SegmentFacts, build_facts, refuse
from jax_mpk.plan.verify_memory import check_flow, check_storages, check_wiring
from jax_mpk.plan.verify_order import check_order
from jax_mpk.plan.verify_tags import check_tagged_accesses, check_tagged_storages


def verify_plan(plan: Plan) -> None:
    """Checks a Plan.

    Raises:
      PlanVerificationError: the plan could race, deadlock, leave something unwritten or compute something else than
        its graph says; the text names the tasks, workers, operators and regions.
    """
    _check_tables(plan)
    check_storages(plan)
    for split in plan.splits:
        _check_split(plan, split)
    if len({split.op for split in plan.splits}) != len(plan.splits):
        refuse("an operator has two splits")
    facts = build_facts(plan)
    for number, routine in enumerate(plan.routines):
        _check_routine(facts, number, routine)
    _check_schedule(facts)
    _check_events(facts)
    check_tagged_storages(facts)
    check_wiring(facts)
    check_coverage(facts)
    check_tagged_accesses(facts)
    check_flow(facts, check_order(facts))


# -- tables ----------------------------------------------------------------------------------------------------


def _check_tables(plan: Plan) -> None:
    """Shapes, types and ids of every array, so that the other checks may index freely."""
    tasks, accesses, values = plan.tasks, plan.accesses, len(plan.graph.values)
    if plan.events < 0 or plan.scratch_bytes < 0:
        refuse(f"the plan has {plan.events} events and {plan.scratch_bytes} bytes of scratch")
    if tuple(v.id for v in plan.graph.values) != tuple(range(values)):
        refuse("Graph.values are not numbered by position")
    if plan.value_storage.shape != (values,):
        refuse(f"value_storage has shape {plan.value_storage.shape} for {values} values")
    _check_ids("value_storage", plan.value_storage, -1, len(plan.storages))

    for number, routine in enumerate(plan.routines):
        if not routine.members:
            refuse(f"routine {number} has no members")
        for member in routine.members:
            if not 0 <= member.op < len(plan.ops):
                refuse(f"routine {number} names op {member.op} of {len(plan.ops)}")
            if isinstance(op := plan.ops[member.op], Loop | Branch):
                refuse(f"routine {number} computes op {member.op}, a {type(op).__name__}")
            if member.stage not in (WHOLE, PARTIAL, FINISH):
                refuse(f"routine {number} has stage {member.stage}")
    table = tasks.table
    if table.dtype != TASK or table.ndim != 1:
        refuse(f"the task table has type {table.dtype}{list(table.shape)}")
    _check_ids("routine of a task", table["routine"], 0, len(plan.routines))
    _check_ids("worker of a task", table["worker"], 0, plan.target.workers)
    if tasks.boxes.ndim != 3 or tasks.boxes.shape[1] != 2 or tasks.boxes.dtype != np.int64:
        refuse(f"task boxes have type {tasks.boxes.dtype}{list(tasks.boxes.shape)}")
    members = np.array([len(routine.members) for routine in plan.routines], np.int64)
    if len(table):
        _check_ids("box of a task", table["box"], 0, len(tasks.boxes))
        last = table["box"].astype(np.int64) + members[table["routine"]]
        if int(last.max()) > len(tasks.boxes):
            refuse(f"task {int(last.argmax())} names boxes past the last of {len(tasks.boxes)}")
    for what, start, items in (
        ("wait", tasks.wait_start, tasks.wait_event),
        ("signal", tasks.signal_start, tasks.signal_event),
    ):
        if start.shape != (len(table) + 1,) or items.ndim != 1:
            refuse(f"{what}_start has shape {start.shape} for {len(table)} tasks")
        if start[0] != 0 or int(start[-1]) != len(items) or np.any(np.diff(start) < 0):
            refuse(f"{what}_start does not cut {what}_event into one piece per task")
        _check_ids(f"event of a {what}", items, 0, plan.events)

    rows = len(accesses.task)
    if accesses.box.ndim != 3 or accesses.box.shape[:2] != (rows, 2):
        refuse(f"access boxes have shape {accesses.box.shape} for {rows} accesses")
    if accesses.value.shape != (rows,) or accesses.kind.shape != (rows,):
        refuse("the columns of Plan.accesses have different lengths")
    _check_ids("task of an access", accesses.task, 0, len(table))
    _check_ids("kind of an access", accesses.kind, 0, 3)
    storages = sum(len(split.storages) for split in plan.splits)
    _check_ids("value of an access", accesses.value, -storages, values)
    if accesses.within.shape != (rows,):
        refuse("the columns of Plan.accesses have different lengths")
    if not all(isinstance(span, Span) for spans in accesses.spans for span in spans):
        refuse("Plan.accesses has spans that are none")
    _check_ids("spans of an access", accesses.within, -1, len(accesses.spans))
    if np.any(np.diff(accesses.task) < 0):
        refuse("Plan.accesses are not in the order of their tasks")


def _check_ids(what: str, ids: np.ndarray, low: int, high: int) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        refuse(f"{what}: ids have type {ids.dtype}")
    bad = np.flatnonzero((ids < low) | (ids >= high))
    if len(bad):
        refuse(f"{what}: entry {int(bad[0])} is {int(ids[bad[0]])}, not in [{low}, {high})")


def _check_split(plan: Plan, split: Split) -> None:
    if not 0 <= split.op < len(plan.ops):
        refuse(f"a split names op {split.op} of {len(plan.ops)}")
    op, bounds = plan.ops[split.op], split.bounds
    if not isinstance(op, Nest) or not op.rspace:
        refuse(f"op {split.op} is split over workers, but reduces nothing")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != op.rspace[0]:
        refuse(f"the split of op {split.op} cuts at {bounds}, not from 0 to {op.rspace[0]}")
    if any(a >= b for a, b in itertools.pairwise(bounds)):
        refuse(f"the split of op {split.op} cuts at {bounds}, which do not ascend")
    if len(split.storages) != len(op.acc):
        refuse(f"the split of op {split.op} has {len(split.storages)} storages for {len(op.acc)} accumulators")
    for acc, storage in zip(op.acc, split.storages):
        if not 0 <= storage < len(plan.storages):
            refuse(f"the split of op {split.op} names storage {storage} of {len(plan.storages)}")
        need = (len(bounds) - 1) * int(np.prod(op.space, dtype=np.int64)) * dtypes.itemsize(acc)
        if plan.storages[storage].nbytes < need:
            refuse(
                f"partial results of op {split.op} need {need} bytes, "
                f"storage {storage} has {plan.storages[storage].nbytes}"
            )
        if plan.storages[storage].kind != "workspace":
            refuse(f"partial results of op {split.op} lie outside the workspace")


def _check_routine(facts: Facts, number: int, routine: Routine) -> None:
    plan, what = facts.plan, f"routine {number}"
    rank = plan.tasks.boxes.shape[2]
    seen: set[int] = set()
    for member in routine.members:
        if member.stage != WHOLE and member.op not in facts.split_of:
            refuse(f"{what} has{STAGE_NAMES[member.stage]} tasks of op {member.op}, which is not split")
        if member.op in seen:
            refuse(f"{what} computes op {member.op} twice")
        if facts.block_of[member.op] != facts.block_of[routine.members[0].op]:
            refuse(f"{what} mixes operators of different blocks")
        if len(facts.stage_space(member.op, member.stage)) > rank:
            refuse(f"{what}: boxes of rank {rank} are too short for op {member.op}")
        seen.add(member.op)
    stored = facts.stored[number]
    if len(routine.members) - 1 not in stored:
        refuse(f"{what} stores nothing of its last member")
    local = [v for at, m in enumerate(routine.members) if at not in stored for v in plan.ops[m.op].outputs]
    if sorted(local) != sorted(routine.local_values):
        refuse(f"{what} keeps values {list(routine.local_values)} local: not all outputs of some of its members")
    counts = {
        len(routine.local_values),
        len(routine.local_offsets),
        len(routine.local_extents),
    }
    if len(counts) != 1:
        refuse(f"{what} has local values, offsets and extents of different number")


# -- schedule --------------------------------------------------------------------------------------------------


def _check_schedule(facts: Facts) -> None:
    plan = facts.plan
    done: set[int] = set()

    def visit(schedule: Schedule, block: int) -> None:
        label = facts.blocks[block].label
        for item in schedule:
            if isinstance(item, Segment):
                if len(item.queues) != plan.target.workers:
                    refuse(f"a segment of {label} has {len(item.queues)} queues for {plan.target.workers} workers")
                name = f"segment {len(facts.segments)} ({label})"
                for queue in item.queues:
                    _check_ids(f"task in {name}", queue, 0, len(plan.tasks.table))
                facts.segments.append(SegmentFacts(item, block, name))
                continue
            if item.op not in facts.blocks[block].ops:
                refuse(f"the schedule of {label} runs op {item.op}, which is not of that block")
            if item.op in done:
                refuse(f"the schedule runs op {item.op} twice")
            done.add(item.op)
            op, inner = plan.ops[item.op], facts.inner_blocks(item.op)
            if isinstance(item, LoopNode):
                if not isinstance(op, Loop):
                    refuse(f"the schedule runs op {item.op} as a loop, but it is none")
                _check_loop(item, op)
                if op.cond is not None:
                    visit(item.cond, inner[0])
                visit(item.body, inner[-1])
            elif isinstance(item, BranchNode):
                if not isinstance(op, Branch):
                    refuse(f"the schedule runs op {item.op} as a branch, but it is none")
                if item.index != op.index or len(item.arms) != len(op.arms):
                    refuse(
                        f"branch {item.op} chooses one of {len(item.arms)} arms by value {item.index}; "
                        f"the graph says {len(op.arms)} and value {op.index}"
                    )
                for arm, block_number in zip(item.arms, inner):
                    visit(arm, block_number)

    visit(plan.schedule, 0)
    for position, op in enumerate(plan.ops):
        if isinstance(op, Loop | Branch) and position not in done:
            refuse(f"{facts.op_text(position)} has no place in the schedule")
    _place_tasks(facts)


def _check_loop(node: LoopNode, op: Loop) -> None:
    trips = -1 if op.trips is None else op.trips
    predicate = -1 if op.cond is None else op.cond.results[0]
    if (node.trips, node.predicate) != (trips, predicate):
        refuse(
            f"loop {node.op} has {node.trips} trips and predicate {node.predicate}; "
            f"the graph says {trips} and {predicate}"
        )
    if op.cond is None and node.cond:
        refuse(f"loop {node.op} has a condition in the schedule, but none in the graph")


def _place_tasks(facts: Facts) -> None:
    """Each task is in one queue, on its own worker, in a segment of its own block."""
    plan, count = facts.plan, len(facts.plan.tasks.table)
    facts.task_segment = np.full(count, -1, np.int64)
    facts.task_position = np.zeros(count, np.int64)
    times = np.zeros(count, np.int64)
    for number, segment in enumerate(facts.segments):
        for worker, queue in enumerate(segment.segment.queues):
            wrong = np.flatnonzero(plan.tasks.table["worker"][queue] != worker)
            if len(wrong):
                refuse(f"{facts.task_text(int(queue[wrong[0]]))} is in the queue of worker {worker}")
            np.add.at(times, queue, 1)
            facts.task_segment[queue] = number
            facts.task_position[queue] = np.arange(len(queue))
    for task in np.flatnonzero(times != 1)[:1]:
        where = "no queue" if times[task] == 0 else f"{int(times[task])} places"
        refuse(f"{facts.task_text(int(task))} is in {where}")

    homes: dict[tuple[int, int], int] = {}
    for number, routine in enumerate(plan.routines):
        tasks = facts.tasks_of[number]
        segments = np.unique(facts.task_segment[tasks])
        for s in segments:
            if facts.segments[s].block != facts.block_of[routine.members[0].op]:
                wrong_task = int(tasks[facts.task_segment[tasks] == s][0])
                refuse(f"{facts.task_text(wrong_task)} is in {facts.segments[s].label}, outside its block")
            for at in facts.stored[number]:
                member = routine.members[at]
                home = homes.setdefault((member.op, member.stage), int(s))
                if home != s:
                    refuse(
                        f"tasks of {facts.op_text(member.op, member.stage)} are spread over "
                        f"{facts.segments[home].label} and {facts.segments[s].label}"
                    )


def _check_events(facts: Facts) -> None:
    """An event belongs to one segment, and somebody signals it if anybody waits for it."""
    tasks, plan = facts.plan.tasks, facts.plan
    signaller = np.repeat(np.arange(len(tasks.table)), np.diff(tasks.signal_start))
    waiter = np.repeat(np.arange(len(tasks.table)), np.diff(tasks.wait_start))
    home = np.full(plan.events, -1, np.int64)
    home[tasks.signal_event] = facts.task_segment[signaller]
    for who, events, verb in (
        (signaller, tasks.signal_event, "signals"),
        (waiter, tasks.wait_event, "waits for"),
    ):
        bad = np.flatnonzero(home[events] != facts.task_segment[who])
        if len(bad):
            event, task = int(events[bad[0]]), int(who[bad[0]])
            where = "nobody signals" if home[event] < 0 else f"is signalled in {facts.segments[home[event]].label}"
            refuse(
                f"{facts.task_text(task)} in {facts.segments[facts.task_segment[task]].label} "
                f"{verb} event {event}, which {where}"
            )
    twice = signaller * max(plan.events, 1) + tasks.signal_event
    twice.sort()
    for key in twice[1:][twice[1:] == twice[:-1]][:1]:
        task, event = divmod(int(key), max(plan.events, 1))
        refuse(f"{facts.task_text(task)} signals event {event} twice")
