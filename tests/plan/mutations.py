"""Small changes to legal plans: some that must be harmless, others that usually are not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jax_mpk.graph.bounds import Bound
from jax_mpk.graph.ir import Loop, Update
from jax_mpk.plan.ir import MAY, MUST, PARTIAL, READ, TASK, BranchNode, LoopNode, Plan
from tests.plan.draft import Draft, Nested, Queues, Task, take_apart
from tests.plan.naive import Order, conflicting_pairs, may_be_tagged, tagged_edges


@dataclass(frozen=True)
class Mutation:
    """A changed plan.

    Attributes:
      kind: name of the change.
      plan: the plan.
      early, late: tasks for a replay to run as soon, and as late, as it can.
      certain: it breaks a rule of the IR whatever a replay shows.
    """

    kind: str
    plan: Plan
    early: frozenset[int] = frozenset()
    late: frozenset[int] = frozenset()
    certain: bool = False


class Skip(Exception):
    """The plan has nothing that a mutation could change."""


#: Kinds that change nothing but the order of tasks: the naive check of order knows all about them.
ORDER_ONLY = ("drop_wait", "drop_signal", "drop_event", "swap_neighbours", "reverse_queue", "move_task")

#: What a mutator returns: tasks to run early, tasks to run late, whether it is certainly wrong.
Outcome = tuple[list[Task], list[Task], bool]
Mutator = Callable[[Draft, random.Random], Outcome]
BREAKING: dict[str, Mutator] = {}
#: The same for harmless changes, which get the pairs of tasks whose order matters.
Harmless = Callable[[Draft, random.Random, list[tuple[int, int]]], None]
HARMLESS: dict[str, Harmless] = {}


def breaking(fn: Mutator) -> Mutator:
    BREAKING[fn.__name__.strip("_")] = fn
    return fn


def harmless(fn: Harmless) -> Harmless:
    HARMLESS[fn.__name__.strip("_")] = fn
    return fn


def mutate(plan: Plan, kind: str, rng: random.Random) -> Mutation:
    """One change of a kind in :data:`BREAKING`.

    Raises:
      Skip: the plan has no place for it.
    """
    draft = take_apart(plan)
    early, late, certain = BREAKING[kind](draft, rng)
    number = {id(task): i for i, task in enumerate(draft.tasks)}
    tasks = [frozenset(number[id(t)] for t in part if id(t) in number) for part in (early, late)]
    return Mutation(kind, draft.build(), tasks[0], tasks[1], certain)


def preserve(plan: Plan, pairs: list[tuple[int, int]], kind: str, rng: random.Random) -> Mutation:
    """One change of a kind in :data:`HARMLESS`; raises Skip like :func:`mutate`.

    Args:
      plan: the plan.
      pairs: its :func:`~tests.plan.naive.conflicting_pairs`.
      kind: name of the change.
      rng: chooses.
    """
    draft = take_apart(plan)
    before = {id(task): i for i, task in enumerate(draft.tasks)}
    HARMLESS[kind](draft, rng, pairs)
    new = draft.build()
    after = {before[id(task)]: i for i, task in enumerate(draft.tasks) if id(task) in before}
    order = Order(new)
    if order.cyclic or not all(order.before(after[a], after[b]) for a, b in pairs):
        raise Skip("the change would not be harmless")
    return Mutation(kind, new)


def _pick(rng: random.Random, items: Any) -> Any:
    items = list(items)
    if not items:
        raise Skip
    return rng.choice(items)


def _queue(draft: Draft, task: Task) -> list[Task]:
    return next(q for s in draft.segments() for q in s.queues if task in q)


def _home(draft: Draft, task: Task) -> Queues:
    return next(s for s in draft.segments() for q in s.queues if task in q)


def _signallers(draft: Draft, event: int) -> list[Task]:
    return [t for t in draft.tasks if event in t.signals]


def _waiters(draft: Draft, event: int) -> list[Task]:
    return [t for t in draft.tasks if event in t.waits]


def _touching(draft: Draft, value: int) -> list[Task]:
    return [t for t in draft.tasks if any(a[0] == value for a in t.accesses)]


def _redeclare(draft: Draft) -> None:
    """Makes all accesses what the boxes now say, where that can be said."""
    from jax_mpk.plan import verify_coverage
    from jax_mpk.plan.verify_facts import build_facts

    plan = draft.build()
    facts = build_facts(plan)
    parts: list[Any] = []
    try:
        for number, routine in enumerate(plan.routines):
            parts += verify_coverage._routine_rows(facts, number, routine)
    except AssertionError:
        return
    rows = verify_coverage._concatenate(facts, parts)
    rank = plan.accesses.box.shape[2]
    values = facts.value_count
    for task in draft.tasks:
        task.accesses = []
    numbers = list(facts.spans)
    for t, name, kind, box, within in zip(rows.task, rows.name, rows.kind, rows.box, rows.within):
        value = int(name) if name < values else values - 1 - int(name)
        draft.tasks[t].accesses.append([value, int(kind), box[:, :rank].copy(), numbers[within]])


def corrupt(plan: Plan, rng: random.Random) -> tuple[Plan, str]:
    """Changes one number somewhere in a plan; returns the plan and where."""
    names = (
        "table boxes wait_start wait_event signal_start signal_event task value kind box within value_storage "
        "queue".split()
    )
    name = rng.choice([*names, "storage", "routine", "local", "split", "total"])

    def other(x: int) -> int:
        return x + rng.choice([-1, 1]) if rng.random() < 0.7 else rng.randint(-2, 12)

    def changed(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        if array.dtype == TASK:
            field = rng.choice(TASK.names or ())
            array[field][:] = changed(array[field])
        elif array.size:
            at = rng.randrange(array.size)
            value = other(int(array.flat[at]))
            array.flat[at] = max(value, 0) if array.dtype.kind == "u" else value
        return array

    def within(items: tuple[Any, ...]) -> tuple[int, Any]:
        at = rng.randrange(len(items))
        return at, items[at]

    tasks, accesses = plan.tasks, plan.accesses
    if name in ("table", "boxes", "wait_start", "wait_event", "signal_start", "signal_event"):
        return replace(plan, tasks=replace(tasks, **{name: changed(getattr(tasks, name))})), name
    if name in ("task", "value", "kind", "box", "within"):
        return replace(plan, accesses=replace(accesses, **{name: changed(getattr(accesses, name))})), name
    if name == "value_storage":
        return replace(plan, value_storage=changed(plan.value_storage)), name
    if name == "queue":
        draft = take_apart(plan)
        queues = [q for s in draft.segments() for q in s.queues if q]
        if queues:
            queue = rng.choice(queues)
            queue[rng.randrange(len(queue))] = rng.choice(draft.tasks)
        return draft.build(), name
    if name == "storage" and plan.storages:
        at, storage = within(plan.storages)
        field = rng.choice(["index", "argument", "offset", "nbytes", "tagged"])
        old = getattr(storage, field)
        storage = replace(storage, **{field: not old if field == "tagged" else other(old)})
        return replace(plan, storages=(*plan.storages[:at], storage, *plan.storages[at + 1 :])), f"storage.{field}"
    if name in ("routine", "local") and plan.routines:
        at, routine = within(plan.routines)
        if name == "local" and routine.local_values:
            field = rng.choice(["local_values", "local_offsets"])
            k, old = within(getattr(routine, field))
            new = (*getattr(routine, field)[:k], other(old), *getattr(routine, field)[k + 1 :])
            routine = replace(routine, **{field: new})
        else:
            k, member = within(routine.members)
            field = rng.choice(["op", "stage"])
            member = replace(member, **{field: other(getattr(member, field))})
            routine = replace(routine, members=(*routine.members[:k], member, *routine.members[k + 1 :]))
        return replace(plan, routines=(*plan.routines[:at], routine, *plan.routines[at + 1 :])), f"routine.{field}"
    if name == "split" and plan.splits:
        at, split = within(plan.splits)
        field = rng.choice(["bounds", "storages"])
        k, old = within(getattr(split, field))
        split = replace(split, **{field: (*getattr(split, field)[:k], other(old), *getattr(split, field)[k + 1 :])})
        return replace(plan, splits=(*plan.splits[:at], split, *plan.splits[at + 1 :])), f"split.{field}"
    field = rng.choice(["workspace_bytes", "events", "scratch_bytes"])
    return replace(plan, **{field: other(getattr(plan, field))}), field


# -- changes that usually break something ----------------------------------------------------------------------


@breaking
def _drop_wait(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, [t for t in d.tasks if t.waits])
    event = task.waits.pop(rng.randrange(len(task.waits)))
    return [task], _signallers(d, event), False


@breaking
def _drop_signal(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, [t for t in d.tasks if t.signals])
    event = task.signals.pop(rng.randrange(len(task.signals)))
    return _waiters(d, event), [task], False


@breaking
def _drop_event(d: Draft, rng: random.Random) -> Outcome:
    event = _pick(rng, {e for t in d.tasks for e in t.waits})
    waiters, signallers = _waiters(d, event), _signallers(d, event)
    for task in d.tasks:
        task.waits = [e for e in task.waits if e != event]
        task.signals = [e for e in task.signals if e != event]
    return waiters, signallers, False


@breaking
def _wrong_event(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, [t for t in d.tasks if t.waits])
    mine = {e for q in _home(d, task).queues for t in q for e in t.signals}
    at = rng.randrange(len(task.waits))
    event, task.waits[at] = task.waits[at], _pick(rng, mine - set(task.waits))
    return [task], _signallers(d, event), False


@breaking
def _swap_neighbours(d: Draft, rng: random.Random) -> Outcome:
    queue = _pick(rng, [q for s in d.segments() for q in s.queues if len(q) > 1])
    at = rng.randrange(len(queue) - 1)
    queue[at], queue[at + 1] = queue[at + 1], queue[at]
    return [queue[at]], [queue[at + 1]], False


@breaking
def _reverse_queue(d: Draft, rng: random.Random) -> Outcome:
    queue = _pick(rng, [q for s in d.segments() for q in s.queues if len(q) > 1])
    queue.reverse()
    return [queue[0]], [queue[-1]], False


@breaking
def _move_task(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, d.tasks)
    queues = _home(d, task).queues
    worker = _pick(rng, [w for w in range(len(queues)) if w != task.worker])
    queues[task.worker].remove(task)
    queues[worker].insert(rng.randint(0, len(queues[worker])), task)
    task.worker = worker
    return [task], [], False


@breaking
def _move_to_segment(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, d.tasks)
    home = _home(d, task)
    other = _pick(rng, [s for s in d.segments() if s is not home])
    home.queues[task.worker].remove(task)
    queue = other.queues[task.worker]
    queue.insert(rng.randint(0, len(queue)), task)
    return [task], [], False


@breaking
def _claim_other_worker(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, d.tasks)
    task.worker = _pick(rng, set(range(d.plan.target.workers)) - {task.worker})
    return [], [], True


@breaking
def _merge_segments(d: Draft, rng: random.Random) -> Outcome:
    lists = [d.schedule, *(b for item in _nested(d.schedule) for b in item.blocks)]
    places = [
        (items, k)
        for items in lists
        for k in range(len(items) - 1)
        if isinstance(items[k], Queues) and isinstance(items[k + 1], Queues)
    ]
    items, k = _pick(rng, places)
    second = items.pop(k + 1)
    late = [t for q in items[k].queues for t in q]
    early = [t for q in second.queues for t in q]
    for queue, more in zip(items[k].queues, second.queues):
        queue += more
    return early, late, False


def _nested(items: list[Any]) -> list[Nested]:
    out = []
    for item in items:
        if isinstance(item, Nested):
            out.append(item)
            for block in item.blocks:
                out += _nested(block)
    return out


@breaking
def _swap_items(d: Draft, rng: random.Random) -> Outcome:
    lists = [d.schedule, *(b for item in _nested(d.schedule) for b in item.blocks)]
    items = _pick(rng, [items for items in lists if len(items) > 1])
    at = rng.randrange(len(items) - 1)
    items[at], items[at + 1] = items[at + 1], items[at]
    return [], [], False


@breaking
def _wrong_control(d: Draft, rng: random.Random) -> Outcome:
    item = _pick(rng, _nested(d.schedule))
    if isinstance(item.node, BranchNode):
        if rng.random() < 0.5 and len(item.blocks) > 1:
            item.blocks.reverse()
            item.node = replace(item.node, arms=item.node.arms[::-1])
        else:
            item.node = replace(item.node, index=item.node.index - 1)
    elif item.node.trips >= 0:
        item.node = replace(item.node, trips=item.node.trips + rng.choice([-1, 1]))
    else:
        item.node = replace(item.node, predicate=item.node.predicate - 1)
    # Arms without tasks may be exchanged without anybody noticing.
    return [], [], not (isinstance(item.node, BranchNode) and not any(_tasks(b) for b in item.blocks))


def _tasks(items: list[Any]) -> list[Task]:
    out: list[Task] = []
    for item in items:
        blocks = item.blocks if isinstance(item, Nested) else []
        out += [t for q in item.queues for t in q] if isinstance(item, Queues) else []
        for block in blocks:
            out += _tasks(block)
    return out


@breaking
def _shrink_buffer(d: Draft, rng: random.Random) -> Outcome:
    used = set(d.value_storage) | {s for split in d.plan.splits for s in split.storages}
    at = _pick(rng, [s for s in used if s >= 0 and d.storages[s].nbytes])
    storage = d.storages[at]
    d.storages[at] = replace(storage, nbytes=storage.nbytes - rng.randint(1, min(4, storage.nbytes)))
    return [], [], False


@breaking
def _shrink_workspace(d: Draft, rng: random.Random) -> Outcome:
    end = max([s.offset + s.nbytes for s in d.storages if s.kind == "workspace"], default=0)
    if end == 0:
        raise Skip
    d.changes["workspace_bytes"] = end - rng.randint(1, min(end, 16))
    return [], [], False


@breaking
def _early_reuse(d: Draft, rng: random.Random) -> Outcome:
    space = [i for i, s in enumerate(d.storages) if s.kind == "workspace" and s.nbytes]
    at = _pick(rng, space)
    other = d.storages[_pick(rng, set(space) - {at})]
    shift = rng.choice([0, 0, 16, -16])
    offset = min(max(other.offset + shift, 0), d.plan.workspace_bytes - d.storages[at].nbytes)
    if offset < 0:
        raise Skip
    d.storages[at] = replace(d.storages[at], offset=offset)
    early = [t for v, s in enumerate(d.value_storage) if s == at for t in _touching(d, v)]
    return early, [], False


@breaking
def _share_storage(d: Draft, rng: random.Random) -> Outcome:
    def size(v: int) -> int:
        return d.storages[d.value_storage[v]].nbytes

    values = [v for v, s in enumerate(d.value_storage) if s >= 0 and _touching(d, v)]
    v = _pick(rng, [v for v in values if d.storages[d.value_storage[v]].kind == "workspace"])
    fits = [u for u in values if d.value_storage[u] != d.value_storage[v] and size(u) >= size(v)]
    d.value_storage[v] = d.value_storage[_pick(rng, fits)]
    return _touching(d, v), [], False


@breaking
def _late_predicate(d: Draft, rng: random.Random) -> Outcome:
    """The predicate of a loop shares bytes with what its body begins with."""
    loops = [item for item in _nested(d.schedule) if isinstance(item.node, LoopNode) and item.node.predicate >= 0]
    item = _pick(rng, loops)
    if not item.blocks[1] or not isinstance(item.blocks[1][0], Queues):
        raise Skip
    begin = [t for q in item.blocks[1][0].queues for t in q]
    values = {a[0] for t in begin for a in t.accesses if a[0] >= 0 and a[1] != READ}
    space = [v for v in sorted(values) if d.storages[d.value_storage[v]].kind == "workspace"]
    v = _pick(rng, space)
    d.value_storage[item.node.predicate] = d.value_storage[v]
    return [t for t in begin if any(a[0] == v for a in t.accesses)], [], False


@breaking
def _steal_base(d: Draft, rng: random.Random) -> Outcome:
    """An update in place although its base is needed, or is an argument."""
    ops = [op for op in d.plan.ops if isinstance(op, Update)]
    op = _pick(rng, [op for op in ops if d.value_storage[op.base] != d.value_storage[op.output]])
    if d.value_storage[op.base] < 0 or d.value_storage[op.output] < 0:
        raise Skip
    d.value_storage[op.output] = d.value_storage[op.base]
    _redeclare(d)
    return _touching(d, op.output), [], False


@breaking
def _box_off(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, d.tasks)
    member = rng.randrange(len(task.boxes))
    routine = d.routines[task.routine]
    op = d.plan.ops[routine.members[member].op]
    local = set(op.outputs) & set(routine.local_values)
    rank = len(d.plan.graph.values[op.outputs[0]].shape)
    if routine.members[member].stage == PARTIAL:
        rank += len(op.rspace)
    axis = _pick(rng, range(rank))
    if np.any(task.boxes[member][1, :rank] <= task.boxes[member][0, :rank]):
        raise Skip
    side = rng.randrange(2)
    task.boxes[member][side, axis] += rng.choice([-1, 1])
    if rng.random() < 0.7:
        _redeclare(d)
    return [], [], not local


@breaking
def _shift_box(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, d.tasks)
    routine = d.routines[task.routine]
    if routine.members[-1].stage == PARTIAL:
        raise Skip
    rank = len(d.plan.graph.values[d.plan.ops[routine.members[-1].op].outputs[0]].shape)
    task.boxes[-1][:, _pick(rng, range(rank))] += rng.choice([-1, 1])
    if np.all(task.boxes[-1] >= 0):
        _redeclare(d)
    return [], [], True


@breaking
def _access_off(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, [t for t in d.tasks if t.accesses])
    access = _pick(rng, task.accesses)
    value = access[0]
    if value < 0 or not _lonely(task, access):
        raise Skip
    axis = _pick(rng, range(len(d.plan.graph.values[value].shape)))
    access[2][rng.randrange(2), axis] += rng.choice([-1, 1])
    return [], [], True


def _lonely(task: Task, access: list[Any]) -> bool:
    """Whether an access is not empty and declared once."""
    same = [a for a in task.accesses if a[:2] == access[:2] and np.array_equal(a[2], access[2]) and a[3] == access[3]]
    return len(same) == 1 and bool(np.all(access[2][1] > access[2][0]))


@breaking
def _drop_access(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, [t for t in d.tasks if t.accesses])
    access = _pick(rng, [a for a in task.accesses if _lonely(task, a)])
    task.accesses = [a for a in task.accesses if a is not access]
    return [], [], True


@breaking
def _wrong_kind(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, [t for t in d.tasks if t.accesses])
    access = _pick(rng, [a for a in task.accesses if _lonely(task, a)])
    access[1] = _pick(rng, {READ, MUST, MAY} - {access[1]})
    return [], [], True


@breaking
def _drop_task(d: Draft, rng: random.Random) -> Outcome:
    d.drop(_pick(rng, d.tasks))
    return [], [], False


@breaking
def _drop_slice(d: Draft, rng: random.Random) -> Outcome:
    """A slice of a split reduction goes missing."""
    tasks = [t for t in d.tasks if d.routines[t.routine].members[-1].stage == PARTIAL]
    task = _pick(rng, tasks)
    way = rng.randrange(3)
    op = d.plan.ops[d.routines[task.routine].members[-1].op]
    axis = len(op.space)
    old = task.boxes[-1].copy()
    if way == 0:
        d.drop(task)
    elif way == 1:
        task.boxes[-1][rng.randrange(2), axis] += rng.choice([-1, 1])
        _redeclare(d)
    else:
        twin = _pick(rng, [t for t in tasks if t.routine == task.routine and t is not task])
        task.boxes[-1][:, axis] = twin.boxes[-1][:, axis]
        _redeclare(d)
    return [], [], way == 0 or not np.array_equal(task.boxes[-1], old)


@breaking
def _wrong_split(d: Draft, rng: random.Random) -> Outcome:
    if not d.plan.splits:
        raise Skip
    splits = list(d.plan.splits)
    at = rng.randrange(len(splits))
    bounds = list(splits[at].bounds)
    bounds[rng.randrange(len(bounds))] += rng.choice([-1, 1])
    splits[at] = replace(splits[at], bounds=tuple(bounds))
    d.changes["splits"] = tuple(splits)
    return [], [], True


@breaking
def _duplicate_task(d: Draft, rng: random.Random) -> Outcome:
    task = _pick(rng, d.tasks)
    queue = _queue(d, task)
    if rng.random() < 0.5:
        queue.insert(rng.randint(0, len(queue)), task)
        return [], [], True
    twin = Task(
        task.routine,
        task.worker,
        [b.copy() for b in task.boxes],
        list(task.waits),
        list(task.signals),
        [[v, k, b.copy(), s] for v, k, b, s in task.accesses],
    )
    d.tasks.append(twin)
    queue.insert(queue.index(task) + 1, twin)
    return [], [], True


@breaking
def _wrong_alias(d: Draft, rng: random.Random) -> Outcome:
    graph = d.plan.graph
    at = _pick(rng, [i for i, s in enumerate(d.storages) if s.kind == "output"])
    storage = d.storages[at]
    argument = _pick(rng, set(range(-1, len(graph.inputs))) - {storage.argument})
    d.storages[at] = replace(storage, argument=argument)
    aliases = {k: v for k, v in d.plan.aliases.items() if k != storage.index}
    if argument >= 0:
        aliases[storage.index] = argument
        home = graph.inputs[argument]
        if rng.random() < 0.5:
            d.value_storage[home] = at
    d.changes["aliases"] = aliases
    return [], [], argument < 0 or argument not in graph.donated


@breaking
def _swap_results(d: Draft, rng: random.Random) -> Outcome:
    outputs = [i for i, s in enumerate(d.storages) if s.kind == "output"]
    a = _pick(rng, outputs)
    b = _pick(rng, set(outputs) - {a})
    for x, y in ((a, b), (b, a)):
        d.storages[x] = replace(d.storages[x], index=d.plan.storages[y].index)
    return [], [], True


@breaking
def _write_argument(d: Draft, rng: random.Random) -> Outcome:
    """A value computed by the plan lands in the buffer of an argument."""
    inputs = [i for i, s in enumerate(d.storages) if s.kind == "input"]
    at = _pick(rng, inputs)
    values = [
        v
        for v, s in enumerate(d.value_storage)
        if s >= 0 and d.storages[s].kind == "workspace" and d.storages[s].nbytes <= d.storages[at].nbytes
    ]
    v = _pick(rng, [v for v in values if _touching(d, v)])
    d.value_storage[v] = at
    return _touching(d, v), [], False


@breaking
def _swap_members(d: Draft, rng: random.Random) -> Outcome:
    number = _pick(rng, [i for i, r in enumerate(d.routines) if len(r.members) > 1])
    routine = d.routines[number]
    at = rng.randrange(len(routine.members) - 1)
    members = list(routine.members)
    members[at], members[at + 1] = members[at + 1], members[at]
    d.routines[number] = replace(routine, members=tuple(members))
    for task in d.tasks:
        if task.routine == number:
            task.boxes[at], task.boxes[at + 1] = task.boxes[at + 1], task.boxes[at]
    return [], [], False


@breaking
def _drop_member(d: Draft, rng: random.Random) -> Outcome:
    number = _pick(rng, [i for i, r in enumerate(d.routines) if len(r.members) > 1])
    routine = d.routines[number]
    at = rng.randrange(len(routine.members))
    gone = set(d.plan.ops[routine.members[at].op].outputs)
    keep = [k for k, v in enumerate(routine.local_values) if v not in gone]
    d.routines[number] = replace(
        routine,
        members=routine.members[:at] + routine.members[at + 1 :],
        local_values=tuple(routine.local_values[k] for k in keep),
        local_offsets=tuple(routine.local_offsets[k] for k in keep),
        local_extents=tuple(routine.local_extents[k] for k in keep),
    )
    for task in d.tasks:
        if task.routine == number:
            del task.boxes[at]
    return [], [], False


def _local(d: Draft, rng: random.Random, least: int) -> int:
    return int(_pick(rng, [i for i, r in enumerate(d.routines) if len(r.local_values) >= least]))


@breaking
def _scratch_overlap(d: Draft, rng: random.Random) -> Outcome:
    number = _local(d, rng, 2)
    offsets = list(d.routines[number].local_offsets)
    a, b = rng.sample(range(len(offsets)), 2)
    offsets[a] = offsets[b]
    d.routines[number] = replace(d.routines[number], local_offsets=tuple(offsets))
    return [], [], False


@breaking
def _scratch_small(d: Draft, rng: random.Random) -> Outcome:
    number = _local(d, rng, 1)
    extents = [list(e) for e in d.routines[number].local_extents]
    one = _pick(rng, [e for e in extents if e])
    axis = rng.randrange(len(one))
    one[axis] -= 1
    d.routines[number] = replace(d.routines[number], local_extents=tuple(map(tuple, extents)))
    return [], [], False


def _tagged(d: Draft) -> list[int]:
    return [s for s, storage in enumerate(d.storages) if storage.tagged]


def _holding(d: Draft, storage: int, *kinds: int) -> list[Task]:
    """Tasks that touch what a storage holds, in one of some ways."""
    values = {v for v, s in enumerate(d.value_storage) if s == storage}
    return [t for t in d.tasks if any(a[0] in values and a[1] in kinds for a in t.accesses)]


@breaking
def _rely_on_tags(d: Draft, rng: random.Random) -> Outcome:
    """An event goes because a tagged path seems to imply it; one between writer and reader, if possible.

    Replays have late stores. They have no late loads, and no stores that some workers see before others do.
    """
    if not _tagged(d):
        raise Skip
    pairs = conflicting_pairs(d.plan)
    events = sorted({e for t in d.tasks for e in t.waits})
    found: tuple[int, int, int] | None = None
    for event in rng.sample(events, len(events)):
        waits = [list(t.waits) for t in d.tasks]
        for task in d.tasks:
            task.waits = [e for e in task.waits if e != event]
        without = d.build()
        for task, old in zip(d.tasks, waits, strict=True):
            task.waits = old
        order, implied = Order(without), Order(without, tags=True)
        lost = [(a, b) for a, b in pairs if not order.before(a, b) and implied.before(a, b)]
        stored = [(a, b) for a, b in lost if _written(d.tasks[a]) & {v for v, *_ in d.tasks[b].accesses}]
        if lost:
            found = event, *rng.choice(stored or lost)
        if stored:
            break
    if found is None:
        raise Skip
    event, first, second = found
    d.events -= 1  # the last event takes the number
    for task in d.tasks:
        for events in (task.waits, task.signals):
            events[:] = [event if e == d.events else e for e in events if e != event]
    return [d.tasks[second]], [d.tasks[first]], False


def _written(task: Task) -> set[int]:
    return {value for value, kind, *_ in task.accesses if kind != READ}


@breaking
def _lose_tags(d: Draft, rng: random.Random) -> Outcome:
    """A tagged storage becomes a plain one, with no event in place of its tags."""
    at = _pick(rng, _tagged(d))
    d.storages[at] = replace(d.storages[at], tagged=False)
    return _holding(d, at, READ), _holding(d, at, MUST), False


@breaking
def _overlap_tags(d: Draft, rng: random.Random) -> Outcome:
    """Another storage takes bytes of a tagged one."""
    at = _pick(rng, [s for s in _tagged(d) if d.storages[s].nbytes])
    other = _pick(rng, {s for s, x in enumerate(d.storages) if x.kind == "workspace" and x.nbytes} - {at})
    offset = d.storages[at].offset + rng.choice([0, d.storages[at].nbytes // 16 * 8])
    d.storages[other] = replace(d.storages[other], offset=offset)
    d.changes["workspace_bytes"] = max(d.plan.workspace_bytes, offset + d.storages[other].nbytes)
    return _holding(d, other, MUST, MAY), _holding(d, at, READ), True


@breaking
def _tag_anything(d: Draft, rng: random.Random) -> Outcome:
    at = _pick(rng, [s for s, storage in enumerate(d.storages) if not storage.tagged])
    d.storages[at] = replace(d.storages[at], tagged=True)
    return [], [], not may_be_tagged(d.plan, at)


@breaking
def _tag_carried(d: Draft, rng: random.Random) -> Outcome:
    """Tags on what is updated in place, carried by a loop, or read between segments."""
    shared = [s for s in set(d.value_storage) if s >= 0 and d.value_storage.count(s) > 1]
    between = [n.node.index if isinstance(n.node, BranchNode) else n.node.predicate for n in _nested(d.schedule)]
    at = _pick(rng, {*shared, *(d.value_storage[v] for v in between if v >= 0)} - {-1})
    d.storages[at] = replace(d.storages[at], tagged=True)
    return [], [], True


@breaking
def _share_tags(d: Draft, rng: random.Random) -> Outcome:
    """A second value moves into a tagged storage."""
    at = _pick(rng, _tagged(d))
    values = [v for v, s in enumerate(d.value_storage) if s not in (-1, at) and _touching(d, v)]
    fits = [v for v in values if d.storages[d.value_storage[v]].nbytes <= d.storages[at].nbytes]
    v = _pick(rng, fits)
    d.value_storage[v] = at
    return _touching(d, v), [], True


def _limited(d: Draft, rng: random.Random) -> tuple[Task, list[Any]]:
    """A task and one of its accesses with spans, declared once."""
    found = [(t, a) for t in d.tasks for a in t.accesses if a[3] and _lonely(t, a)]
    return _pick(rng, found)


def _change_spans(d: Draft, rng: random.Random, change: Callable[[Bound], Bound]) -> Outcome:
    """Changes one limit of an access. No access says what its operators do not touch, so that is certainly wrong."""
    task, access = _limited(d, rng)
    spans = list(access[3])
    at = rng.randrange(len(spans))
    side = _pick(rng, [side for side in ("first", "end") if getattr(spans[at], side) is not None])
    old = getattr(spans[at], side)
    new = change(old)
    if new == old:
        raise Skip
    spans[at] = replace(spans[at], **{side: new})
    access[3] = tuple(spans)
    # As if what is claimed were so: the writer of what the reader says it does not touch need not wait, nor the reader.
    others = [t for t in _touching_storage(d, access[0]) if t is not task]
    for other in (task, *others):
        if rng.random() < 0.5:
            other.waits = []
    return [task], others, True


def _touching_storage(d: Draft, value: int) -> list[Task]:
    values = {v for v, s in enumerate(d.value_storage) if s == d.value_storage[value]}
    return [t for t in d.tasks if any(a[0] in values for a in t.accesses)]


@breaking
def _bound_off(d: Draft, rng: random.Random) -> Outcome:
    return _change_spans(d, rng, lambda bound: bound.shifted(rng.choice([-1, 1])))


@breaking
def _wrong_symbol(d: Draft, rng: random.Random) -> Outcome:
    """Another scalar in place of one that a limit depends on."""
    values = d.plan.graph.values
    scalars = [v.id for v in values if v.shape == () and v.dtype == "s32"]
    return _change_spans(d, rng, lambda bound: renamed(bound, {v: rng.choice(scalars) for v in bound.values}))


@breaking
def _other_round(d: Draft, rng: random.Random) -> Outcome:
    """What a loop carries, as it is in another round."""
    carried: dict[int, int] = {}
    for op in d.plan.ops:
        if isinstance(op, Loop):
            carried.update(zip(op.params, op.body.results if rng.random() < 0.7 else op.inits))
    if not carried:
        raise Skip
    return _change_spans(d, rng, lambda bound: renamed(bound, carried))


@breaking
def _drop_limit(d: Draft, rng: random.Random) -> Outcome:
    """Spans of an access go, or are those of another one."""
    task, access = _limited(d, rng)
    others = {a[3] for t in d.tasks for a in t.accesses} - {access[3]}
    access[3] = rng.choice(sorted(others, key=str))
    return [task], [], True


def renamed(bound: Bound, names: dict[int, int]) -> Bound:
    """With other values in place of some."""
    out = Bound((), bound.const)
    for s, k in bound.terms:
        args = tuple(renamed(arg, names) for arg in s.args)
        attr = names.get(s.attr, s.attr) if s.op == "load" else s.attr
        out = out.plus(Bound(((replace(s, args=args, attr=attr), 1),)), k)
    return out


# -- changes that break nothing --------------------------------------------------------------------------------


@harmless
def _event_beside_tags(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    first, second = _pick(rng, sorted(tagged_edges(d.plan)))
    event = d.event()
    d.tasks[first].signals.append(event)
    d.tasks[second].waits.append(event)


@harmless
def _events_for_tags(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """Counters take the place of the tags of a storage."""
    at = _pick(rng, _tagged(d))
    number = {id(t): i for i, t in enumerate(d.tasks)}
    readers, writers = ({number[id(t)] for t in _holding(d, at, kind)} for kind in (READ, MUST))
    edges = [(a, b) for a, b in tagged_edges(d.plan) if a in writers and b in readers]
    d.storages[at] = replace(d.storages[at], tagged=False)
    for second in sorted({b for _, b in edges}):
        event = d.event()
        d.tasks[second].waits.append(event)
        for first in sorted(a for a, b in edges if b == second):
            d.tasks[first].signals.append(event)


@harmless
def _tags_beside_events(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """A value with its events is tagged as well."""
    plain = [s for s, storage in enumerate(d.storages) if not storage.tagged and may_be_tagged(d.plan, s)]
    at = _pick(rng, plain)
    d.storages[at] = replace(d.storages[at], tagged=True)


@harmless
def _redundant_event(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    order = Order(d.plan)
    count = len(d.tasks)
    known = [(a, b) for b in range(count) for a in range(count) if order.ancestors[b] >> a & 1]
    event = d.event()
    first, second = _pick(rng, known)
    d.tasks[first].signals.append(event)
    d.tasks[second].waits.append(event)


@harmless
def _extra_event(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """An event between tasks that nothing orders so far."""
    order = Order(d.plan)
    count = len(d.tasks)
    a = rng.randrange(count)
    free = [
        b
        for b in range(count)
        if b != a and order.segment[a] == order.segment[b] and not order.before(a, b) and not order.before(b, a)
    ]
    event = d.event()
    d.tasks[a].signals.append(event)
    d.tasks[_pick(rng, free)].waits.append(event)


@harmless
def _needless_wait(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """Waits go that nothing needs, as long as there are any."""
    changed = False
    for task in rng.sample(d.tasks, len(d.tasks)):
        for event in list(task.waits):
            task.waits.remove(event)
            order = Order(d.build())
            if order.cyclic or not all(order.before(a, b) for a, b in pairs):
                task.waits.append(event)
            else:
                changed = True
    if not changed:
        raise Skip


@harmless
def _unused_event(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    event = d.event()
    if rng.random() < 0.5:
        _pick(rng, d.tasks).signals.append(event)


@harmless
def _wait_twice(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    task = _pick(rng, [t for t in d.tasks if t.waits])
    task.waits.append(rng.choice(task.waits))


@harmless
def _split_event(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """Two events for one, each signalled by some of the tasks."""
    event = _pick(rng, {e for t in d.tasks for e in t.signals})
    signallers, waiters = _signallers(d, event), _waiters(d, event)
    if len(signallers) < 2:
        raise Skip
    other = d.event()
    for task in rng.sample(signallers, len(signallers) // 2):
        task.signals[task.signals.index(event)] = other
    for task in waiters:
        task.waits.append(other)


@harmless
def _renumber_events(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    if d.events < 2:
        raise Skip
    new = rng.sample(range(d.events), d.events)
    for task in d.tasks:
        task.waits = [new[e] for e in task.waits]
        task.signals = [new[e] for e in task.signals]


@harmless
def _renumber_tasks(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    rng.shuffle(d.tasks)


@harmless
def _swap_independent(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    ordered = set(pairs)
    number = {id(t): i for i, t in enumerate(d.tasks)}
    places = [
        (q, k)
        for s in d.segments()
        for q in s.queues
        for k in range(len(q) - 1)
        if (number[id(q[k])], number[id(q[k + 1])]) not in ordered and not set(q[k].signals) & set(q[k + 1].waits)
    ]
    queue, k = _pick(rng, places)
    queue[k], queue[k + 1] = queue[k + 1], queue[k]


@harmless
def _other_order(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """Queues in the order of a random schedule that keeps what matters in order."""
    needs: dict[int, set[int]] = {i: set() for i in range(len(d.tasks))}
    for a, b in [*pairs, *tagged_edges(d.plan)]:
        needs[b].add(a)
    number = {id(t): i for i, t in enumerate(d.tasks)}
    for i, task in enumerate(d.tasks):
        for e in task.waits:
            needs[i].update(number[id(t)] for t in _signallers(d, e))
    changed = False
    for segment in d.segments():
        left = {number[id(t)] for q in segment.queues for t in q}
        old = [list(q) for q in segment.queues]
        for q in segment.queues:
            q.clear()
        while left:
            t = rng.choice(sorted(t for t in left if not needs[t] & left))
            left.remove(t)
            segment.queues[d.tasks[t].worker].append(d.tasks[t])
        changed |= old != segment.queues
    if not changed:
        raise Skip


@harmless
def _move_independent(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    _move_task(d, rng)


@harmless
def _permute_workers(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    workers = d.plan.target.workers
    if workers < 2:
        raise Skip
    new = rng.sample(range(workers), workers)
    for segment in d.segments():
        queues = list(segment.queues)
        for old, queue in enumerate(queues):
            segment.queues[new[old]] = queue
    for task in d.tasks:
        task.worker = new[task.worker]


@harmless
def _more_workers(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    more = rng.randint(1, 3)
    d.changes["target"] = replace(d.plan.target, workers=d.plan.target.workers + more)
    for segment in d.segments():
        segment.queues += [[] for _ in range(more)]


@harmless
def _larger_buffer(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """A workspace storage grows; what lies behind it moves up."""
    at = _pick(rng, [i for i, s in enumerate(d.storages) if s.kind == "workspace"])
    end = d.storages[at].offset + d.storages[at].nbytes
    grow = 16 * rng.randint(1, 8)
    spaces = [s for s in d.storages if s.kind == "workspace"]
    # Only storages wholly behind may move, or sharing bytes would change.
    if any(s.offset < end < s.offset + s.nbytes for s in spaces):
        raise Skip
    for i, s in enumerate(d.storages):
        if i == at:
            d.storages[i] = replace(s, nbytes=s.nbytes + grow)
        elif s.kind == "workspace" and s.offset >= end:
            d.storages[i] = replace(s, offset=s.offset + grow)
    d.changes["workspace_bytes"] = d.plan.workspace_bytes + grow


@harmless
def _larger_memory(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    name = rng.choice(["workspace_bytes", "scratch_bytes"])
    d.changes[name] = getattr(d.plan, name) + rng.randint(1, 64)


@harmless
def _cut_segment(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """A barrier in the middle of a segment, between operators."""
    lists = [d.schedule, *(b for item in _nested(d.schedule) for b in item.blocks)]
    places = [(items, k) for items in lists for k, item in enumerate(items) if isinstance(item, Queues)]
    items, k = _pick(rng, places)
    segment = items[k]
    routines = sorted({t.routine for q in segment.queues for t in q})
    if len(routines) < 2:
        raise Skip
    first = set(routines[: rng.randint(1, len(routines) - 1)])
    halves = [
        Queues([[t for t in q if (t.routine in first) == early] for q in segment.queues]) for early in (True, False)
    ]
    if any(len({t.routine in first for t in _holding(d, s, READ, MUST)}) > 1 for s in _tagged(d)):
        raise Skip
    events = [{e for q in half.queues for t in q for e in t.signals} for half in halves]
    waits = [{e for q in half.queues for t in q for e in t.waits} for half in halves]
    if events[0] & events[1] or waits[0] & events[1]:
        raise Skip
    for queue in halves[1].queues:
        for task in queue:
            task.waits = [e for e in task.waits if e in events[1]]
    items[k : k + 1] = halves


@harmless
def _declare_again(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """Accesses in another order, one twice, an empty one."""
    task = _pick(rng, [t for t in d.tasks if t.accesses])
    access = rng.choice(task.accesses)
    task.accesses.append([access[0], access[1], access[2].copy(), access[3]])
    empty = access[2].copy()
    empty[1, 0] = empty[0, 0]
    task.accesses.append([access[0], READ, empty, ()])
    rng.shuffle(task.accesses)


@harmless
def _split_task(d: Draft, rng: random.Random, pairs: list[tuple[int, int]]) -> None:
    """One task becomes two neighbours, each half of its box."""
    whole = [t for t in d.tasks if len(t.boxes) == 1 and d.routines[t.routine].members[0].stage != PARTIAL]
    task = _pick(rng, whole)
    op = d.plan.ops[d.routines[task.routine].members[0].op]
    rank = len(d.plan.graph.values[op.outputs[0]].shape)
    axes = [a for a in range(rank) if task.boxes[0][1, a] - task.boxes[0][0, a] > 1 and a != getattr(op, "axis", -1)]
    axis = _pick(rng, axes)
    low, high = task.boxes[0][:, axis]
    cut = rng.randint(int(low) + 1, int(high) - 1)
    twin = Task(task.routine, task.worker, [task.boxes[0].copy()], list(task.waits), list(task.signals), [])
    task.boxes[0][1, axis] = cut
    twin.boxes[0][0, axis] = cut
    d.tasks.append(twin)
    queue = _queue(d, task)
    queue.insert(queue.index(task) + 1, twin)
    _redeclare(d)
