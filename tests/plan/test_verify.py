"""The plan verifier, rule by rule: what it accepts, and what its refusals say."""

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from jax_mpk.errors import PlanVerificationError
from jax_mpk.graph.builder import BlockBuilder
from jax_mpk.graph.ir import Branch, Combine, Graph, Loop, Source, Update
from jax_mpk.plan.ir import MAY, READ, BranchNode, Plan
from jax_mpk.plan.simulate import Simulator
from jax_mpk.plan.verify import verify_plan
from jax_mpk.plan.verify_coverage import partition_fault
from jax_mpk.plan.verify_facts import build_facts
from tests.plan import graphs
from tests.plan.draft import Draft, Nested, take_apart
from tests.plan.handmade import Options, make_plan


def refused(plan: Plan, *texts: str) -> str:
    """Asserts that a plan is refused with a message that has all of some patterns."""
    with pytest.raises(PlanVerificationError) as caught:
        verify_plan(plan)
    for text in texts:
        assert re.search(text, str(caught.value)), f"{text!r} is not in:\n{caught.value}"
    return str(caught.value)


def maps(*steps: str, shape: tuple[int, ...] = (8,), donated: bool = False) -> Graph:
    """A chain of maps: each adds one ("same"), or reads the elements in reverse ("turned")."""
    bb = BlockBuilder()
    x = start = bb.value(shape, "f32")
    for number, step in enumerate(steps):

        def body(b, at, load, step=step):
            first = b.sub(b.index(shape[0] - 1), at[0]) if step == "turned" else at[0]
            return b.op("add", load(0, [first, *at[1:]]), b.const(1, "f32"))

        with bb.built_from(Source(step, f"model.py:{number}")):
            (x,) = bb.map(shape, [x], body, ["f32"])
    return Graph(tuple(bb.values), (start.id,), bb.block([x]), donated=frozenset([0] if donated else []))


def edit(plan: Plan, change: Callable[[Draft], object]) -> Plan:
    draft = take_apart(plan)
    change(draft)
    return draft.build()


# -- plans that are right --------------------------------------------------------------------------------------

CHOICES = [
    Options(
        reuse=bool(reuse),
        fuse=bool(fuse),
        fine=bool(fine),
        split=split,
        cut=cut,
        tagged=k % 5 % 2 == 1,
        seed=k,
        bundle=k % 3 == 0,
    )
    for k, (reuse, fuse, fine, split, cut) in enumerate(itertools.product([0, 1], [0, 1], [0, 1], [1, 3], [0, 2]))
]


@pytest.mark.parametrize("name", graphs.names())
def test_legal_plans_are_accepted(name: str) -> None:
    for options in CHOICES:
        verify_plan(make_plan(graphs.case(name).graph, options))


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_any_number_of_workers(workers: int) -> None:
    for name in graphs.names():
        verify_plan(make_plan(graphs.case(name).graph, Options(workers=workers, tiles=5, fine=True)))


def test_nothing_to_compute() -> None:
    verify_plan(make_plan(Graph((), (), BlockBuilder().block([]))))
    bb = BlockBuilder()
    x, y = bb.value((3,), "s8"), bb.value((0, 4), "f32")
    verify_plan(make_plan(Graph(tuple(bb.values), (x.id, y.id), bb.block([y, x, x]))))


def test_a_large_plan() -> None:
    """Tens of thousands of tasks, all of each operator waiting for all of the one before."""
    graph = maps(*["same", "turned"] * 60, shape=(1056, 2))
    plan = make_plan(graph, Options(workers=132, tiles=264, reuse=True))
    assert len(plan.tasks.table) > 30_000
    verify_plan(plan)

    # The last worker's first task of the last operator; its second one comes after it in the queue.
    first = len(plan.tasks.table) - 264

    def forget(d: Draft) -> None:
        d.tasks[first].waits.clear()

    refused(edit(plan, forget), f"task {first} of op 119", "no queue or event")


def test_elements_may_be_overwritten_where_they_were_read() -> None:
    plan = make_plan(maps("same", "same", "same"))
    sharing = edit(plan, lambda d: d.value_storage.__setitem__(2, d.value_storage[1]))
    verify_plan(sharing)
    np.testing.assert_array_equal(Simulator(sharing, [np.zeros(8, np.float32)]).run()[0], np.full(8, 3))

    plan = make_plan(maps("same", "turned", "same"), Options(tiles=1))
    sharing = edit(plan, lambda d: d.value_storage.__setitem__(2, d.value_storage[1]))
    refused(sharing, "the first is not over when the second begins", "model.py:1 turned", "reads .0:8.")


def test_a_finished_reduction_may_overwrite_what_its_epilogue_reads() -> None:
    def graph(residual_at: Callable) -> Graph:
        bb = BlockBuilder()
        x = bb.value((6, 4), "f32")
        (r,) = bb.map((6,), [x], lambda b, at, load: load(0, [at[0], b.index(0)]), ["f32"])
        (y,) = bb.reduce(
            (6,),
            (4,),
            [x, r],
            lambda b, at, load: load(0, at),
            Combine("sum"),
            ["f32"],
            ["f32"],
            lambda b, at, acc, load: b.op("add", acc[0], load(1, residual_at(b, at))),
        )
        (z,) = bb.map((6,), [y], lambda b, at, load: b.op("neg", load(0, at)), ["f32"])
        return Graph(tuple(bb.values), (x.id,), bb.block([z]))

    def share(d: Draft) -> None:
        d.value_storage[2] = d.value_storage[1]

    for split in (1, 2):
        verify_plan(edit(make_plan(graph(lambda b, at: at), Options(split=split)), share))
        turned = graph(lambda b, at: [b.sub(b.index(5), at[0])])
        refused(edit(make_plan(turned, Options(split=split, tiles=1)), share), "not over when the second begins")


# -- updates in place ------------------------------------------------------------------------------------------


def updates(kind: str, *, twice: bool = False) -> Graph:
    """``base`` (a temporary) with four elements set, or added to; ``twice``: two such updates of one base."""
    bb = BlockBuilder()
    x = bb.value((12,), "f32")
    (base,) = bb.map((12,), [x], lambda b, at, load: b.op("neg", load(0, at)), ["f32"])

    def index(b, at, load):
        return [b.add(at[0], b.index(4)), b.const(True, "b1")]

    outs = [bb.update(base, (4,), [x], index, lambda b, at, load: load(0, at), Combine(kind)) for _ in range(1 + twice)]
    (z,) = bb.map((12,), outs, lambda b, at, load: b.op("add", load(0, at), load(len(outs) - 1, at)), ["f32"])
    return Graph(tuple(bb.values), (x.id,), bb.block([z]))


@pytest.mark.parametrize("kind", ["set", "sum"])
def test_update_in_place_reads_its_base_unless_it_only_sets(kind: str) -> None:
    plan = make_plan(updates(kind))
    update = next(op for op in plan.ops if isinstance(op, Update))
    assert plan.value_storage[update.base] == plan.value_storage[update.output]
    verify_plan(plan)
    rows = plan.accesses
    assert np.any((rows.value == update.base) & (rows.kind == READ)) == (kind == "sum")
    assert np.any((rows.value == update.output) & (rows.kind == MAY))


def test_two_updates_of_one_base_cannot_both_be_in_place() -> None:
    plan = make_plan(updates("set", twice=True), Options(tiles=1, workers=1))
    verify_plan(plan)
    first, second = (op for op in plan.ops if isinstance(op, Update))
    draft = take_apart(plan)
    for op in (first, second):
        draft.value_storage[op.output] = draft.value_storage[op.base]
    # Declared as in-place updates are, so that only the sharing is wrong.
    for task in draft.tasks:
        for op in (first, second):
            if any(a[0] == op.output and a[1] != READ for a in task.accesses):
                task.accesses = [a for a in task.accesses if a[0] != op.base]
                for access in task.accesses:
                    if access[0] == op.output:
                        access[1], access[2] = MAY, np.array([[4], [8]])
    refused(draft.build(), f"value {first.output} .* and value {second.output} .* share bytes|race|overwritten")


def test_an_update_carries_the_contents_of_its_base_on() -> None:
    """A reader of the updated value needs the base's writers, even where the update wrote nothing."""
    plan = make_plan(updates("set"), Options(fine=True, tiles=3, workers=3))
    update = next(op for op in plan.ops if isinstance(op, Update))
    verify_plan(plan)
    draft = take_apart(plan)
    reader = next(
        t for t in draft.tasks if any(a[0] == update.output and a[1] == READ and a[2][0, 0] == 0 for a in t.accesses)
    )
    reader.waits.clear()
    refused(draft.build(), f"of value {update.base}", f"of value {update.output}", "no queue or event")


# -- loops and branches ----------------------------------------------------------------------------------------


def counting(flag_in_carry: bool) -> Graph:
    """``while go: x, n, go = x + 1, n + 1, n < 3``; the condition is a carry, or computed."""
    bb = BlockBuilder()
    x = bb.value((6,), "f32")
    zero = bb.constant(0, "s32")
    go = bb.constant(True, "b1")
    params = [bb.value((6,), "f32"), bb.value((), "s32"), bb.value((), "b1")]
    body, cond = bb.nested(), bb.nested()
    (y,) = body.map((6,), [params[0]], lambda b, at, load: b.op("add", load(0, at), b.const(1, "f32")), ["f32"])
    (n,) = body.map((), [params[1]], lambda b, at, load: b.op("add", load(0, []), b.const(1, "s32")), ["s32"])
    (more,) = body.map((), [n], lambda b, at, load: b.op("lt", load(0, []), b.const(3, "s32")), ["b1"])
    test = params[2]
    if not flag_in_carry:
        (test,) = cond.map((), [params[1]], lambda b, at, load: b.op("lt", load(0, []), b.const(3, "s32")), ["b1"])
    out = bb.loop([x, zero, go], params, body.block([y, n, more]), cond=cond.block([test]))
    return Graph(tuple(bb.values), (x.id,), bb.block([out[0]]))


def test_a_predicate_is_not_overwritten_while_slow_workers_read_it() -> None:
    def share(d: Draft) -> None:
        loop = next(op for op in d.plan.ops if isinstance(op, Loop))
        d.value_storage[loop.cond.results[0]] = d.value_storage[loop.params[2]]

    inputs = [np.zeros(6, np.float32)]
    good = make_plan(counting(True), Options(cut=1, workers=8))
    # With every operator in a segment of its own, the carry is only copied after a barrier.
    verify_plan(edit(good, share))
    np.testing.assert_array_equal(Simulator(edit(good, share), inputs).run()[0], np.full(6, 3))

    bad = edit(make_plan(counting(True), Options(workers=8)), share)
    refused(bad, "overwrites the condition of op", "slow workers may still have to read it")
    # The race is real: here one worker reads the predicate of the next round.
    late = Simulator(bad, inputs, choose=lambda choices: min(choices, key=lambda c: (c[1] < 0, -c[0])))
    with pytest.raises(Exception, match="no worker can go on"):
        late.run()


def test_what_a_round_needs_from_outside_survives_all_rounds() -> None:
    case = graphs.case("nested")
    plan = make_plan(case.graph)
    loop = next(op for op in plan.ops if isinstance(op, Loop))
    outside = case.graph.inputs[1]  # read in every round
    inside = next(
        v
        for op in loop.body.ops
        for v in op.outputs
        if plan.value_storage[v] >= 0 and plan.storages[plan.value_storage[v]].kind == "workspace"
    )
    # In the first round the value is still there.
    draft = take_apart(plan)
    draft.value_storage[inside] = draft.value_storage[outside]
    refused(draft.build(), f"value {inside} .* buffer of argument 1|overwritten|race|needs .* bytes")


def test_carries_need_copies() -> None:
    plan = make_plan(graphs.case("carries").graph)
    at, loop = next((i, op) for i, op in enumerate(plan.ops) if isinstance(op, Loop))
    draft = take_apart(plan)
    draft.value_storage[loop.body.results[0]] = draft.value_storage[loop.params[1]]
    refused(draft.build(), f"op {at}", "param 0 .* do not have the same bytes, and no operator copies")


def test_schedule_mirrors_the_graph() -> None:
    plan = make_plan(graphs.case("choice").graph)
    at, branch = next((i, op) for i, op in enumerate(plan.ops) if isinstance(op, Branch))

    def nested(d: Draft) -> Nested:
        return next(item for item in d.schedule if isinstance(item, Nested))

    def drop(d: Draft) -> None:
        node = nested(d)
        d.schedule.remove(node)
        for arm in node.blocks:
            for segment in arm:
                for task in [t for q in segment.queues for t in q]:
                    d.tasks.remove(task)

    refused(edit(plan, drop), f"op {at} .* has no place in the schedule")
    refused(edit(plan, lambda d: d.schedule.append(nested(d))), f"runs op {at} twice")

    def wrong_index(d: Draft) -> None:
        node = nested(d).node
        assert isinstance(node, BranchNode)
        nested(d).node = replace(node, index=branch.index + 1)

    refused(edit(plan, wrong_index), f"branch {at} chooses one of 3 arms by value {branch.index + 1}")
    refused(edit(plan, lambda d: nested(d).blocks.reverse()), "outside its block")


# -- what messages say -----------------------------------------------------------------------------------------


def test_a_race_names_both_tasks() -> None:
    plan = make_plan(maps("same", "turned"))
    text = refused(edit(plan, lambda d: d.tasks[3].waits.clear()))
    assert "task 3 of op 1 (map: model.py:1 turned) for [0:2] on worker" in text
    assert "reads [6:8] of value 1 f32[8]" in text
    assert re.search(r"task 2 of op 0 \(map: model.py:0 same\) for \[5:8\] on worker \d writes \[5:8\]", text)
    assert "no queue or event orders the first before the second" in text


def test_a_deadlock_names_who_waits_for_whom() -> None:
    plan = make_plan(maps("same", "turned"), Options(workers=1, tiles=1))

    def twist(d: Draft) -> None:
        d.segments()[0].queues[0].reverse()

    refused(edit(plan, twist), "segment 0 .* deadlocks", "task 1 of op 1 .* waits for event 0, which needs task 0")


def _box(task: int, side: int, value: int) -> Callable[[Draft], object]:
    return lambda d: d.tasks[task].boxes[0].__setitem__((side, 0), value)


def _storage(number: int, **changes: int) -> Callable[[Draft], object]:
    return lambda d: d.storages.__setitem__(number, replace(d.storages[number], **changes))


def _value_storage(value: int, storage: int) -> Callable[[Draft], object]:
    return lambda d: d.value_storage.__setitem__(value, storage)


#: Storages of the plan that is broken here: 0 is the result, 1 the argument, 2 the temporary.
BROKEN: dict[str, tuple[Callable[[Draft], object], str]] = {
    "hole": (_box(1, 1, 4), r"no task computes \[4:5\] of the space \[8\] of op 0 \(map: model.py:0 same\)"),
    "twice": (_box(1, 0, 1), r"\[1:2\] of the space .* is computed twice: by task 0"),
    "outside": (_box(2, 1, 9), r"box \[5:9\] of op 0 does not lie in its space"),
    "undeclared": (lambda d: d.tasks[0].accesses.pop(0), r"not declared: read \[0:2\] of value 0"),
    "declared": (
        lambda d: d.tasks[0].accesses[0][2].__setitem__((1, 0), 3),
        r"declared, but not so: read \[0:3\] of value 0",
    ),
    "kind": (
        lambda d: d.tasks[0].accesses[1].__setitem__(1, MAY),
        r"declared, but not so: write some of \[0:2\] of value 1",
    ),
    "small": (_storage(0, nbytes=31), "storage 0 has 31 bytes, output 0 has 32"),
    "temporary": (_storage(2, nbytes=31), r"value 1 f32\[8\] needs 32 bytes, storage 2 has 31"),
    "worker": (lambda d: setattr(d.tasks[0], "worker", (d.tasks[0].worker + 1) % 3), "in the queue of worker"),
    "no queue": (lambda d: [q.clear() for q in d.segments()[0].queues], "is in no queue"),
    "two queues": (lambda d: d.segments()[0].queues[0].append(d.segments()[0].queues[0][0]), "is in 2 places"),
    "event": (lambda d: d.tasks[5].waits.append(d.event()), "waits for event 1, which nobody signals"),
    "id": (lambda d: d.tasks[5].waits.append(7), r"event of a wait: entry \d is 7, not in \[0, 1\)"),
    "signals": (lambda d: d.tasks[0].signals.append(0), "signals event 0 twice"),
    "argument": (_value_storage(1, 1), "writes value 1 .* into the buffer of argument 0"),
    "result": (_value_storage(2, 2), "result 0 .* is not its buffer"),
    "no bytes": (_value_storage(1, -1), "stores value 1 .* which has no bytes"),
    "space": (lambda d: d.changes.update(workspace_bytes=31), "lies at bytes 0 to 32 of a workspace of 31"),
    "scratch": (lambda d: d.changes.update(scratch_bytes=1 << 30), "bytes of scratch, a worker has"),
    "alias": (lambda d: d.changes.update(aliases={0: 0}), r"Plan.aliases says \{0: 0\}, the storages say \{\}"),
}


@pytest.mark.parametrize(("change", "text"), list(BROKEN.values()), ids=list(BROKEN))
def test_refusals(change: Callable[[Draft], object], text: str) -> None:
    plan = make_plan(maps("same", "turned"))
    verify_plan(plan)
    refused(edit(plan, change), text)


def test_aliases_are_for_donated_arguments() -> None:
    def alias(d: Draft) -> None:
        d.storages = [replace(s, argument=0) if s.kind == "output" else s for s in d.storages if s.kind != "input"]
        d.value_storage = [0 if s == 0 or v == 0 else s - 1 for v, s in enumerate(d.value_storage)]
        d.changes["aliases"] = {0: 0}

    refused(edit(make_plan(maps("same", "same")), alias), "aliases argument 0, which is not donated")
    verify_plan(edit(make_plan(maps("same", "same", donated=True)), alias))


def test_aligned() -> None:
    plan = make_plan(maps("same", "same"))

    def shift(d: Draft) -> None:
        d.storages = [replace(s, offset=2) if s.kind == "workspace" else s for s in d.storages]
        d.changes["workspace_bytes"] = 64

    refused(edit(plan, shift), "is not aligned at byte 2")


# -- the parts of the proof ------------------------------------------------------------------------------------


def test_partition_fault_finds_exactly_the_faulty_partitions() -> None:
    rng = random.Random(5)
    verdicts = set()
    for _ in range(2000):
        rank = rng.randint(0, 3)
        space = tuple(rng.randint(1, 4) for _ in range(rank))
        boxes = _random_cuts(rng, [([0] * rank, list(space))])
        if rng.random() < 0.7 and rank:
            box = rng.choice(boxes)
            axis = rng.randrange(rank)
            box[rng.randrange(2)][axis] = rng.randint(0, space[axis])
        if rng.random() < 0.2:
            boxes.append(tuple(list(corner) for corner in rng.choice(boxes)))  # type: ignore[arg-type]
        lo = np.array([b[0] for b in boxes], np.int64).reshape(len(boxes), rank)
        hi = np.array([b[1] for b in boxes], np.int64).reshape(len(boxes), rank)
        counts = np.zeros(space, np.int64)
        for a, b in zip(lo, hi):
            counts[tuple(slice(*ends) for ends in zip(a, b))] += 1
        fault = partition_fault(lo, hi, space)
        verdicts.add(fault is None)
        assert (fault is None) == bool(np.all(counts == 1))
        if fault is not None:
            cell, owners = fault
            part = counts[tuple(slice(*ends) for ends in cell.T)]
            assert part.size and np.all(part == len(owners)) and len(owners) != 1
    assert verdicts == {True, False}


def _random_cuts(rng: random.Random, boxes: list) -> list:
    for _ in range(rng.randint(0, 4)):
        lo, hi = boxes.pop(rng.randrange(len(boxes)))
        wide = [d for d in range(len(lo)) if hi[d] - lo[d] > 1]
        if not wide:
            boxes.append((lo, hi))
            continue
        axis = rng.choice(wide)
        cut = rng.randint(lo[axis] + 1, hi[axis] - 1)
        boxes.append((lo, [*hi[:axis], cut, *hi[axis + 1 :]]))
        boxes.append(([*lo[:axis], cut, *lo[axis + 1 :]], hi))
    return boxes


def test_ragged_partitions_are_checked_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_mpk.plan.verify_coverage.MAX_GRID", 0)
    lo, hi = np.array([[0, 0], [0, 2], [1, 0]]), np.array([[1, 2], [3, 4], [3, 2]])
    assert partition_fault(lo, hi, (3, 4)) is None
    fault = partition_fault(lo, hi - [[0, 0], [1, 0], [0, 0]], (3, 4))
    assert fault is not None and len(fault[1]) == 0
    fault = partition_fault(lo - [[0, 0], [0, 1], [0, 0]], hi, (3, 4))
    assert fault is not None and sorted(fault[1]) in ([0, 1], [1, 2])


def test_values_share_bytes_only_where_their_storages_meet() -> None:
    plan = make_plan(graphs.case("temporaries").graph, Options(reuse=True))
    facts = build_facts(plan)
    for a, b in itertools.combinations(range(facts.value_count), 2):
        if facts.start[a] < 0 or facts.start[b] < 0:
            continue
        x, y = (plan.storages[plan.value_storage[v]] for v in (a, b))
        meet = x == y or (
            x.kind == y.kind == "workspace"
            and x.offset < y.offset + facts.nbytes[b]
            and y.offset < x.offset + facts.nbytes[a]
        )
        assert (b in facts.overlapping(a)) == meet
