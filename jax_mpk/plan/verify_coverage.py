"""Coverage: tasks partition every operator's space, local values hold what is read, accesses are what is declared."""

from __future__ import annotations

from math import prod

import numpy as np

from jax_mpk.graph.ir import Branch, Loop, Nest, Op, Update
from jax_mpk.graph.regions import op_touches, update_written
from jax_mpk.graph.scalar import Expr
from jax_mpk.graph.spans import UNLIMITED, BoxSpans, op_spans, written_spans
from jax_mpk.plan.ir import FINISH, MAY, MUST, PARTIAL, READ, WHOLE, Routine
from jax_mpk.plan.verify_facts import (
    KIND_NAMES,
    Facts,
    Rows,
    box_text,
    refuse,
    scanned_axis,
    spans_text,
)

#: Cells of the grid that a partition is checked on before it is checked pair by pair instead.
MAX_GRID = 1 << 22


def check_coverage(facts: Facts) -> None:
    """Fills in ``facts.rows``; raises where a space is not partitioned or an access is not as declared."""
    for number in range(len(facts.plan.routines)):
        _check_boxes(facts, number)
    _check_partitions(facts)
    rows: list[tuple[np.ndarray, ...]] = []
    for number, routine in enumerate(facts.plan.routines):
        _check_scratch(facts, number, routine)
        rows += _routine_rows(facts, number, routine)
    facts.rows = _concatenate(facts, rows)
    _compare_accesses(facts, facts.rows)


# -- boxes and partitions --------------------------------------------------------------------------------------


def _check_boxes(facts: Facts, number: int) -> None:
    """Boxes lie in their spaces, span scanned axes and cut reductions only where the split says."""
    plan, tasks = facts.plan, facts.tasks_of[number]
    for at, member in enumerate(plan.routines[number].members):
        lo, hi = facts.member_boxes(number, at)
        space = np.array(facts.stage_space(member.op, member.stage), np.int64)
        bad = np.any((lo < 0) | (hi < lo) | (hi > space), axis=1)
        rows = plan.tasks.boxes[plan.tasks.table["box"][tasks].astype(np.int64) + at]
        bad |= np.any(rows[:, 0, len(space) :] != 0, axis=1)
        bad |= np.any(rows[:, 1, len(space) :] != 1, axis=1)
        for k in np.flatnonzero(bad)[:1]:
            refuse(
                f"{facts.task_text(int(tasks[k]))}: box {box_text(rows[k])} of op {member.op} does not "
                f"lie in its space {space.tolist()}"
            )
        op = plan.ops[member.op]
        axis = scanned_axis(op)
        if axis is not None:
            bad = (np.any(hi <= lo, axis=1)) | (lo[:, axis] == 0) & (hi[:, axis] == space[axis])
            for k in np.flatnonzero(~bad)[:1]:
                refuse(
                    f"{facts.task_text(int(tasks[k]))}: op {member.op} needs all of axis {axis}, "
                    f"but has {box_text(rows[k])}"
                )
        if member.stage == PARTIAL:
            assert isinstance(op, Nest)
            first = len(op.space)
            bounds = facts.split_of[member.op].bounds
            cell = np.searchsorted(np.array(bounds[:-1]), lo[:, first])
            cell = np.minimum(cell, len(bounds) - 2)
            good = (lo[:, first] == np.array(bounds[:-1])[cell]) & (hi[:, first] == np.array(bounds[1:])[cell])
            good &= np.all(lo[:, first + 1 :] == 0, axis=1)
            good &= np.all(hi[:, first + 1 :] == space[first + 1 :], axis=1)
            for k in np.flatnonzero(~good)[:1]:
                refuse(
                    f"{facts.task_text(int(tasks[k]))}: its reduced part is none of the slices that "
                    f"the split at {bounds} makes"
                )


def _check_partitions(facts: Facts) -> None:
    plan = facts.plan
    computed = {m.op for r, tasks in zip(plan.routines, facts.tasks_of) if len(tasks) for m in r.members}
    for position, op in enumerate(plan.ops):
        if isinstance(op, Loop | Branch):
            continue
        split = position in facts.split_of
        size = prod(facts.output_space(position))
        if position not in computed and size:
            refuse(f"no task computes {facts.op_text(position)}")
        stages = {
            stage
            for stage in (WHOLE, PARTIAL, FINISH)
            for routine, _ in facts.homes.get((position, stage), ())
            if len(facts.tasks_of[routine])
        }
        if split and WHOLE in stages:
            refuse(f"{facts.op_text(position)} is split, but some task computes it whole")
        if split:
            stages.add(PARTIAL)
        for stage in sorted(stages):
            _check_partition(facts, position, stage)
        if stages - {PARTIAL}:
            for v in op.outputs:
                if plan.value_storage[v] < 0 and facts.nbytes[v]:
                    refuse(f"{facts.op_text(position)} stores {facts.name_text(v)}, which has no bytes")


def _check_partition(facts: Facts, op: int, stage: int) -> None:
    space = facts.stage_space(op, stage)
    lows, highs, tasks = [], [], []
    for routine, member in facts.homes.get((op, stage), ()):
        lo, hi = facts.member_boxes(routine, member)
        lows.append(lo)
        highs.append(hi)
        tasks.append(facts.tasks_of[routine])
    if prod(space) == 0:
        return
    lo = np.concatenate([*lows, np.zeros((0, len(space)), np.int64)])
    hi = np.concatenate([*highs, np.zeros((0, len(space)), np.int64)])
    fault = partition_fault(lo, hi, space)
    if fault is not None:
        cell, owners = fault
        names = np.concatenate([*tasks, np.zeros(0, np.int64)])[owners]
        what = f"{box_text(cell)} of the space {list(space)} of {facts.op_text(op, stage)}"
        if len(names) == 0:
            refuse(f"no task computes {what}")
        refuse(f"{what} is computed twice: by {facts.task_text(int(names[0]))} and by {facts.task_text(int(names[1]))}")


def partition_fault(lo: np.ndarray, hi: np.ndarray, space: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """Where boxes fail to partition a space (which is not empty).

    Args:
      lo, hi: int64 [boxes, rank]: corners, inside the space.
      space: extents.

    Returns:
      None where each point is in one box; else a part of the space, int64 [2, rank], that is in no box or in several,
      and the boxes it is in.
    """
    rank = len(space)
    filled = np.flatnonzero(np.all(hi > lo, axis=1))
    lo, hi = lo[filled], hi[filled]
    if rank == 0:
        return None if len(filled) == 1 else (np.zeros((2, 0), np.int64), filled)
    cuts, first, last = [], [], []
    for d in range(rank):
        edges = np.unique(np.concatenate([lo[:, d], hi[:, d], [0, space[d]]]))
        cuts.append(edges)
        first.append(np.searchsorted(edges, lo[:, d]))
        last.append(np.searchsorted(edges, hi[:, d]))
    shape = tuple(len(edges) for edges in cuts)
    if prod(shape) > MAX_GRID:
        return _pairwise_fault(lo, hi, space, filled)
    # Each box adds 1 to the cells of the grid that its corners span: signed corners, then running sums.
    counts = np.zeros(shape, np.int64)
    for corner in range(1 << rank):
        index = tuple(last[d] if corner >> d & 1 else first[d] for d in range(rank))
        np.add.at(counts, index, -1 if corner.bit_count() & 1 else 1)
    for d in range(rank):
        np.cumsum(counts, axis=d, out=counts)
    inner = counts[tuple(slice(0, n - 1) for n in shape)]
    if np.all(inner == 1):
        return None
    at = np.unravel_index(int(np.argmax(inner != 1)), inner.shape)
    cell = np.array([[cuts[d][i] for d, i in enumerate(at)], [cuts[d][i + 1] for d, i in enumerate(at)]], np.int64)
    inside = np.all((lo <= cell[0]) & (hi >= cell[1]), axis=1)
    return cell, filled[inside]


def _pairwise_fault(
    lo: np.ndarray, hi: np.ndarray, space: tuple[int, ...], filled: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """As :func:`partition_fault`, for boxes too ragged for a grid: disjoint, and of the right volume together."""
    step = max(1, (1 << 22) // max(len(lo), 1))
    for at in range(0, len(lo), step):
        low = np.maximum(lo[at : at + step, None], lo[None])
        high = np.minimum(hi[at : at + step, None], hi[None])
        meet = np.all(low < high, axis=2)
        meet[np.arange(len(meet)), np.arange(at, at + len(meet))] = False
        if meet.any():
            i, j = map(int, np.argwhere(meet)[0])
            return np.stack([low[i, j], high[i, j]]), filled[[at + i, j]]
    volume = sum(prod(map(int, h - a)) for a, h in zip(lo, hi))
    if volume != prod(space):
        # Which part is missing is hard to say here; name the whole space.
        return np.array([[0] * len(space), space], np.int64), np.zeros(0, np.int64)
    return None


# -- local values ----------------------------------------------------------------------------------------------


def _check_scratch(facts: Facts, number: int, routine: Routine) -> None:
    """Local values fit, and those alive together do not overlap, unless one replaces the other element by element."""
    plan = facts.plan
    if plan.scratch_bytes > plan.target.scratch_bytes:
        refuse(f"tasks use {plan.scratch_bytes} bytes of scratch, a worker has {plan.target.scratch_bytes}")
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    for at, member in enumerate(routine.members):
        for v in _operands(plan.ops[member.op], member.stage):
            if v in routine.local_values:
                if v not in born:
                    refuse(f"routine {number}: op {member.op} reads local value {v} before it is computed")
                dies[v] = at
        for v in plan.ops[member.op].outputs if at not in facts.stored[number] else ():
            born[v] = dies[v] = at
    spans: list[tuple[int, int, int]] = []
    for v, offset, extents in zip(routine.local_values, routine.local_offsets, routine.local_extents):
        if len(extents) != len(facts.shapes[v]):
            refuse(f"routine {number} lays local {facts.name_text(v)} out as {extents}")
        end = offset + prod(extents) * facts.itemsizes[v]
        if offset < 0 or end > plan.scratch_bytes:
            refuse(
                f"routine {number}: local {facts.name_text(v)} lies at bytes {offset} to {end} of "
                f"{plan.scratch_bytes} bytes of scratch"
            )
        if offset % facts.itemsizes[v]:
            refuse(f"routine {number}: local {facts.name_text(v)} is not aligned at byte {offset}")
        for other, a, b in spans:
            together = born[v] <= dies[other] and born[other] <= dies[v]
            if together and a < end and offset < b and not _replaces(facts, number, routine, v, other, born, dies):
                refuse(f"routine {number}: local values {other} and {v} overlap in scratch")
        spans.append((v, offset, end))


def _replaces(
    facts: Facts, number: int, routine: Routine, a: int, b: int, born: dict[int, int], dies: dict[int, int]
) -> bool:
    """Whether one of two local values takes the other's place: its only maker reads an element, for the last time, just
    before it writes that same element to the same bytes.
    """
    new, old = (a, b) if born[a] > born[b] else (b, a)
    at = born[new]
    member = routine.members[at]
    i, j = map(routine.local_values.index, (new, old))
    return (
        at == dies[old]
        and routine.local_offsets[i] == routine.local_offsets[j]
        and routine.local_extents[i] == routine.local_extents[j]
        and facts.itemsizes[new] == facts.itemsizes[old]
        and old in _pointwise(facts, facts.plan.ops[member.op], member.stage)
        and np.array_equal(facts.member_boxes(number, at), facts.member_boxes(number, born[old]))
    )


def _operands(op: Op, stage: int) -> set[int]:
    """Values that a stage of an operator reads."""
    if isinstance(op, Update):
        return {*op.operands, op.base}
    if not isinstance(op, Nest) or stage == WHOLE:
        return set(op.operands)
    expr = op.body if stage == PARTIAL else op.epilogue
    assert expr is not None
    return {op.operands[expr.nodes[i].attr] for i in expr.loads()}  # type: ignore[index]


# -- accesses --------------------------------------------------------------------------------------------------


def _routine_rows(facts: Facts, number: int, routine: Routine) -> list[tuple[np.ndarray, ...]]:
    """What the tasks of one routine touch, empty boxes included.

    Returns:
      Columns (task, member, name, kind, pointwise, within, lo, hi), one tuple per access of the routine.
    """
    plan, tasks = facts.plan, facts.tasks_of[number]
    out: list[tuple[np.ndarray, ...]] = []
    if len(tasks) == 0:
        return out
    extents = dict(zip(routine.local_values, routine.local_extents))
    local: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    mine: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # stored by an earlier member
    later = {v for at in facts.stored[number] for v in plan.ops[routine.members[at].op].outputs}
    for at, member in enumerate(routine.members):
        lo, hi = facts.member_boxes(number, at)
        op, stored = plan.ops[member.op], at in facts.stored[number]
        in_place = stored and facts.in_place(member.op)
        last_reads = _pointwise(facts, op, member.stage) if stored else frozenset()

        def add(
            name: int,
            kind: int,
            lo: np.ndarray,
            hi: np.ndarray,
            spans: BoxSpans = UNLIMITED,
            pointwise: bool = False,
            at: int = at,
        ) -> None:
            fill = np.ones(len(tasks), np.int64)
            within = fill * 0 if spans.which is None else facts.number_spans(spans.spans)[spans.which]
            out.append((tasks, fill * at, fill * name, fill * kind, fill * pointwise, within, lo, hi))

        touches = op_touches(plan.graph, op, lo, hi, stage_finish=member.stage == FINISH)
        limits = op_spans(op, lo, hi, facts.known, facts.is_local, stage_finish=member.stage == FINISH)
        for k, (touch, spans) in enumerate(zip(touches, limits, strict=True)):
            base = isinstance(op, Update) and k == len(touches) - 1  # regions put it last
            if in_place and base:
                assert isinstance(op, Update)
                if op.base in local:
                    refuse(f"routine {number} updates value {op.base} in place, but holds it in scratch")
                if op.combine.kind != "set":
                    add(op.base, READ, touch.lo, touch.hi, pointwise=True)
            elif touch.value in local:
                _check_held(facts, tasks, touch.value, local[touch.value], touch.lo, touch.hi)
            else:
                if touch.value in mine:
                    _check_held(facts, tasks, touch.value, mine[touch.value], touch.lo, touch.hi)
                elif touch.value in later:
                    refuse(f"routine {number}: op {member.op} reads value {touch.value}, which a later member stores")
                add(touch.value, READ, touch.lo, touch.hi, spans, touch.value in last_reads)
        if member.stage == FINISH:
            splits = len(facts.split_of[member.op].bounds) - 1
            for name in facts.accumulators[member.op]:
                add(name, READ, _with_first(0, lo), _with_first(splits, hi))
        if member.stage == PARTIAL:
            assert isinstance(op, Nest)
            bounds = np.array(facts.split_of[member.op].bounds[:-1], np.int64)
            axes = len(op.space)
            cell = np.searchsorted(bounds, lo[:, axes])
            for name in facts.accumulators[member.op]:
                add(name, MUST, _with_first(cell, lo[:, :axes]), _with_first(cell + 1, hi[:, :axes]))
        elif in_place:
            assert isinstance(op, Update)
            add(op.output, MAY, *update_written(op, lo, hi), written_spans(op, lo, hi, facts.known, facts.is_local))
            mine[op.output] = lo, hi
        else:
            for v in op.outputs:
                if stored:
                    add(v, MUST, lo, hi)
                    mine[v] = lo, hi
                else:
                    _check_extents(facts, tasks, v, extents[v], lo, hi)
                    local[v] = lo, hi
    return out


def _with_first(first: int | np.ndarray, rest: np.ndarray) -> np.ndarray:
    column = np.broadcast_to(np.asarray(first, np.int64), (len(rest),))
    return np.concatenate([column[:, None], rest], axis=1)


def _check_held(
    facts: Facts,
    tasks: np.ndarray,
    value: int,
    have: tuple[np.ndarray, np.ndarray],
    lo: np.ndarray,
    hi: np.ndarray,
) -> None:
    """The part of a value that a task computes itself holds what its later members read of it."""
    outside = np.any((lo < have[0]) | (hi > have[1]), axis=1) & np.all(hi > lo, axis=1)
    for k in np.flatnonzero(outside)[:1]:
        refuse(
            f"{facts.task_text(int(tasks[k]))} reads {box_text(np.stack([lo[k], hi[k]]))} of "
            f"{facts.name_text(value)}, but computes only {box_text(np.stack([have[0][k], have[1][k]]))} itself"
        )


def _check_extents(
    facts: Facts,
    tasks: np.ndarray,
    value: int,
    extents: tuple[int, ...],
    lo: np.ndarray,
    hi: np.ndarray,
) -> None:
    for k in np.flatnonzero(np.any(hi - lo > np.array(extents, np.int64), axis=1))[:1]:
        refuse(
            f"{facts.task_text(int(tasks[k]))} computes {box_text(np.stack([lo[k], hi[k]]))} of local "
            f"{facts.name_text(value)}, which is laid out as {list(extents)}"
        )


def _pointwise(facts: Facts, op: Op, stage: int) -> frozenset[int]:
    """Operands of which an element's computation reads only that same element, at the very end."""
    if not isinstance(op, Nest) or stage == PARTIAL or len(op.outputs) != 1:
        return frozenset()
    reduced = bool(op.rspace)
    last = op.epilogue if op.epilogue is not None else op.body
    programs = [(op.body, not reduced), (last, True)] if last is not op.body else [(last, not reduced)]
    good: dict[int, bool] = {}
    for expr, allowed in programs:
        for i in expr.loads():
            slot: int = expr.nodes[i].attr  # type: ignore[assignment]
            v = op.operands[slot]
            same = facts.shapes[v] == op.space and _is_identity(expr, i)
            # The body of a finished reduction runs in other tasks, which are ordered on their own.
            same = (same and allowed) or (stage == FINISH and expr is op.body and reduced)
            good[v] = good.get(v, True) and same
    return frozenset(v for v, same in good.items() if same)


def _is_identity(expr: Expr, load: int) -> bool:
    node = expr.nodes[load]
    indices = node.args[1:] if node.op == "load_if" else node.args
    return all(
        ((at := expr.nodes[i]).op == "coord" and at.attr == d) or expr.extents[d] == 1 for d, i in enumerate(indices)
    )


# -- declared against recomputed -------------------------------------------------------------------------------


def _concatenate(facts: Facts, parts: list[tuple[np.ndarray, ...]]) -> Rows:
    """One table of the non-empty rows; boxes are padded to the largest rank with [0, 1)."""
    rank = max([len(shape) for shape in facts.shapes] + [1])
    count = sum(len(part[0]) for part in parts)
    box = np.zeros((count, 2, rank), np.int64)
    box[:, 1] = 1
    at = 0
    for part in parts:
        lo, hi = part[6], part[7]
        box[at : at + len(lo), 0, : lo.shape[1]] = lo
        box[at : at + len(hi), 1, : hi.shape[1]] = hi
        at += len(lo)
    empty = np.zeros(0, np.int64)
    columns = [np.concatenate([empty, *(part[c].astype(np.int64) for part in parts)]) for c in range(6)]
    rows = Rows(columns[0], columns[1], columns[2], columns[3], columns[4] != 0, box, columns[5])
    filled = np.flatnonzero(np.all(box[:, 1] > box[:, 0], axis=1))
    return rows.take(filled[np.argsort(rows.task[filled], kind="stable")])


def _compare_accesses(facts: Facts, rows: Rows) -> None:
    """The declared accesses are, as a set, exactly the recomputed ones."""
    declared, values = facts.plan.accesses, facts.value_count
    rank = max(rows.box.shape[2], declared.box.shape[2])
    name = declared.value.astype(np.int64)
    name = np.where(name >= 0, name, values - 1 - name)
    known = np.array([*(facts.spans.get(spans, -1) for spans in declared.spans), 0], np.int64)
    given = _flatten(declared.task, name, declared.kind, known[declared.within], declared.box, rank)
    given = given[np.all(_highs(given, rank) > _lows(given, rank), axis=1)]
    found = _flatten(rows.task, rows.name, rows.kind, rows.within, rows.box, rank)
    given, found = _unique_rows(given), _unique_rows(found)
    if given.shape == found.shape and np.array_equal(given, found):
        return
    have, want = set(map(bytes, given)), set(map(bytes, found))
    missing = [row for row in found if bytes(row) not in have]
    extra = [row for row in given if bytes(row) not in want]
    if not missing and not extra:
        return
    first = min(row[0] for row in (*missing, *extra))

    numbers = list(facts.spans)

    def text(row: np.ndarray) -> str:
        axes = len(facts.shapes[row[1]])
        box = np.stack([_lows(row[None], rank)[0], _highs(row[None], rank)[0]])
        shown = box_text(box[:, :axes] if np.all(box[:, axes:] == [[0], [1]]) else box)
        limits = spans_text(numbers[row[3]]) if row[3] >= 0 else " with other limits at run time"
        return f"{KIND_NAMES[int(row[2])]} {shown}{limits} of {facts.name_text(int(row[1]))}"

    lines = [f"accesses of {facts.task_text(int(first))} are not what its operators touch"]
    lines += [f"  declared, but not so: {text(row)}" for row in extra if row[0] == first][:3]
    lines += [f"  not declared: {text(row)}" for row in missing if row[0] == first][:3]
    refuse("\n".join(lines))


def _flatten(
    task: np.ndarray, name: np.ndarray, kind: np.ndarray, within: np.ndarray, box: np.ndarray, rank: int
) -> np.ndarray:
    out = np.zeros((len(task), 4 + 2 * rank), np.int64)
    out[:, 0], out[:, 1], out[:, 2], out[:, 3] = task, name, kind, within
    out[:, 4 + rank :] = 1
    out[:, 4 : 4 + box.shape[2]] = box[:, 0]
    out[:, 4 + rank : 4 + rank + box.shape[2]] = box[:, 1]
    return out


def _lows(flat: np.ndarray, rank: int) -> np.ndarray:
    return flat[:, 4 : 4 + rank]


def _highs(flat: np.ndarray, rank: int) -> np.ndarray:
    return flat[:, 4 + rank :]


def _unique_rows(rows: np.ndarray) -> np.ndarray:
    """Distinct rows in a fixed order."""
    if len(rows) == 0:
        return rows
    # Sorting by a hash is several times faster than sorting rows; equal hashes of different rows fall back.
    factors = np.random.default_rng(1).integers(1, 2**62, rows.shape[1], dtype=np.uint64) * 2 + 1
    mixed = rows.astype(np.uint64) * factors
    key = np.bitwise_xor.reduce(mixed ^ (mixed >> np.uint64(29)), axis=1)
    rows = rows[np.argsort(key, kind="stable")]
    key.sort()
    same_key = key[1:] == key[:-1]
    same = np.all(rows[1:] == rows[:-1], axis=1)
    if np.any(same_key & ~same):
        return np.unique(rows, axis=0)
    return rows[np.concatenate([[True], ~same])]
