"""Tagged storages, rule by rule: what the verifier accepts, what its refusals say, and what replays show."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from jax_mpk.errors import DeadlockError
from jax_mpk.graph.builder import BlockBuilder
from jax_mpk.graph.ir import Branch, Graph, Loop, Source, Update
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.printer import format_plan
from jax_mpk.plan.simulate import Simulator, phase_count
from jax_mpk.plan.tags import tagged_accesses, tags_as_events
from jax_mpk.plan.verify import verify_plan
from tests.plan import graphs
from tests.plan.campaign import plans, refusal
from tests.plan.draft import Draft
from tests.plan.handmade import Options, make_plan
from tests.plan.mutations import Skip, mutate
from tests.plan.naive import may_be_tagged, tagged_edges
from tests.plan.oracle import harm
from tests.plan.test_verify import edit, maps, refused, updates

#: Storages: 0 the result, 1 the argument, 2 and 3 the temporaries (values 1 and 2).
CHAIN = ("same", "turned", "turned")


X = np.zeros(8, np.float32)


def tag(*storages: int) -> Callable[[Draft], None]:
    def change(d: Draft) -> None:
        for s in storages:
            d.storages[s] = replace(d.storages[s], tagged=True)

    return change


def without_events(d: Draft) -> None:
    for task in d.tasks:
        task.waits, task.signals = [], []


def chain(*storages: int, options: Options | None = None) -> Plan:
    """A chain of three maps with some temporaries tagged, and no other order."""
    plan = make_plan(maps(*CHAIN), options or Options())
    return edit(edit(plan, tag(*storages)), without_events)


def test_tags_replace_events() -> None:
    verify_plan(chain(2, 3))
    refused(chain(2), "reads what has perhaps not been written yet", "of value 2")
    refused(chain(3), "reads what has perhaps not been written yet", "of value 1")
    for seed in range(20):
        results = Simulator(chain(2, 3), [X], seed=seed, late=True).run()
        np.testing.assert_array_equal(results[0], np.full(8, 3))


def test_tags_beside_events_change_nothing() -> None:
    verify_plan(edit(make_plan(maps(*CHAIN)), tag(2, 3)))


def test_a_routine_does_not_wait_for_what_it_stores() -> None:
    plan = make_plan(maps("same", "same", "turned"), Options(bundle=True, tiles=2))
    assert len(plan.routines) == 2
    tagged = edit(plan, tag(2))
    verify_plan(tagged)
    reads, writes = tagged_accesses(tagged)
    assert len(reads) == 0 and len(writes) == 2
    np.testing.assert_array_equal(Simulator(tagged, [X]).run()[0], np.full(8, 3))


def _share(d: Draft) -> None:
    d.value_storage[2] = d.value_storage[1]


def _overlap(d: Draft) -> None:
    d.storages[3] = replace(d.storages[3], offset=d.storages[2].offset + 16)


BROKEN: dict[str, tuple[Callable[[Draft], object], str]] = {
    "argument": (tag(1), "storage 1 is tagged, but is input 0"),
    "result": (tag(0), "storage 0 is tagged, but is output 0"),
    "two values": (_share, r"storage 2 is tagged, but holds 2 values: \[1, 2\]"),
    "no value": (lambda d: d.value_storage.__setitem__(1, 3), "storage 2 is tagged, but holds 0 values"),
    "overlap": (_overlap, "storage 2 is tagged, but shares bytes with storage 3"),
}


@pytest.mark.parametrize(("change", "text"), list(BROKEN.values()), ids=list(BROKEN))
def test_refusals(change: Callable[[Draft], object], text: str) -> None:
    plan = edit(make_plan(maps(*CHAIN)), tag(2))
    verify_plan(plan)
    refused(edit(plan, change), text)


def test_wide_elements_leave_no_room_for_a_tag() -> None:
    bb = BlockBuilder()
    x = bb.value((4,), "s64")
    (y,) = bb.map((4,), [x], lambda b, at, load: b.op("neg", load(0, at)), ["s64"])
    (z,) = bb.map((4,), [y], lambda b, at, load: b.op("neg", load(0, at)), ["s64"])
    plan = make_plan(Graph(tuple(bb.values), (x.id,), bb.block([z])))
    verify_plan(plan)
    refused(edit(plan, tag(2)), r"value 1 s64\[4\] has no room for a tag in a machine word")


def test_updates_in_place() -> None:
    plan = make_plan(updates("set"))
    update = next(op for op in plan.ops if isinstance(op, Update))
    refused(edit(plan, tag(int(plan.value_storage[update.base]))), "holds 2 values")
    # An update that copies its base stores all of its output.
    apart = make_plan(updates("set"), Options(in_place=False, tiles=1))
    output = apart.value_storage[update.output]
    verify_plan(edit(apart, tag(output)))


def test_partial_results() -> None:
    plan = make_plan(graphs.case("reduction").graph, Options(split=2))
    storage = plan.splits[0].storages[0]
    refused(edit(plan, tag(storage)), f"storage {storage} is tagged, but holds partial results")


def test_what_loops_and_branches_read() -> None:
    for name in ("while", "choice"):
        plan = make_plan(graphs.case(name).graph)
        op = next(op for op in plan.ops if isinstance(op, Loop | Branch))
        v = op.index if isinstance(op, Branch) else op.cond.results[0] if op.cond else -1
        refused(edit(plan, tag(int(plan.value_storage[v]))), f"value {v} .* is read between segments")


def test_carries() -> None:
    plan = make_plan(graphs.case("carries").graph)
    loop = next(op for op in plan.ops if isinstance(op, Loop))
    for p in loop.params:
        refused(edit(plan, tag(int(plan.value_storage[p]))), r"is tagged, but holds \d values")


def test_one_segment_only() -> None:
    plan = edit(make_plan(maps("same", "turned"), Options(cut=1)), tag(2))
    refused(plan, r"in segment 1 \(top level\) touches tagged value 1 f32\[8\], which belongs to segment 0|segment 0")


def test_what_is_read_is_written() -> None:
    """The second of two routines reads a value that the first only keeps to itself."""
    bb = BlockBuilder()
    x = bb.value((8,), "f32")
    (y,) = bb.map((8,), [x], lambda b, at, load: b.op("neg", load(0, at)), ["f32"])
    (z,) = bb.map((8,), [y], lambda b, at, load: b.op("neg", load(0, at)), ["f32"])
    (w,) = bb.map(
        (8,), [y, z], lambda b, at, load: b.op("add", load(0, [b.sub(b.index(7), at[0])]), load(1, at)), ["f32"]
    )
    graph = Graph(tuple(bb.values), (x.id,), bb.block([w]))
    plan = edit(make_plan(graph, Options(bundle=True, tiles=2)), tag(2, 3))
    assert [len(routine.members) for routine in plan.routines] == [2, 1]
    verify_plan(plan)

    def keep(d: Draft) -> None:
        d.routines[0] = replace(d.routines[0], local_values=(1,), local_offsets=(0,), local_extents=((4,),))
        d.changes["scratch_bytes"] = 16
        for task in d.tasks:
            if task.routine == 0:
                task.accesses = [a for a in task.accesses if a[0] != 1]

    refused(edit(plan, keep), r"task \d of op 2 .* reads tagged value 1 f32\[8\], which nobody writes")


def test_what_nobody_writes_is_not_waited_for() -> None:
    def forget(d: Draft) -> None:
        d.tasks = [t for t in d.tasks if t.routine]
        for queue in d.segments()[0].queues:
            queue[:] = [t for t in queue if t.routine]

    plan = edit(chain(2, 3), forget)
    refused(plan, "no task computes")
    assert phase_count(plan).total == 2
    with pytest.raises(DeadlockError, match=r"waits for element \[\d\] of tagged value 1"):
        Simulator(plan, [X]).run()


def test_a_deadlock_through_tags_is_named() -> None:
    plan = chain(2, 3, options=Options(workers=1, tiles=1))
    bad = edit(plan, lambda d: d.segments()[0].queues[0].reverse())
    refused(bad, "segment 0 .* deadlocks", "task 2 of op 2 .* waits for tags of value 2 .*, which need task 1 of op 1")
    with pytest.raises(
        DeadlockError, match=r"task 2 waits for element \[0\] of tagged value 2, which has tag 0 and need"
    ):
        Simulator(bad, [X]).run()


def test_a_tag_orders_nothing_but_its_element() -> None:
    """The first temporary is plain; a tagged path from its writer to the last reader is no order."""
    bb = BlockBuilder()
    x = bb.value((8,), "f32")

    def one(source: str, *operands):
        with bb.built_from(Source(source)):
            (out,) = bb.map(
                (8,),
                list(operands),
                lambda b, at, load: b.op("add", load(0, at), load(len(operands) - 1, [b.sub(b.index(7), at[0])])),
                ["f32"],
            )
        return out

    p = one("plain", x)
    t = one("tagged", p)
    y = one("reader", t, p)
    graph = Graph(tuple(bb.values), (x.id,), bb.block([y]))
    # The first two tasks are on one worker, the last on another; without the event of the first for the last, the
    # second's tag is all that seems to order them.
    made = (make_plan(graph, Options(workers=2, tiles=1, seed=seed)) for seed in range(99))
    plan = next(plan for plan in made if plan.tasks.table["worker"].tolist() in ([0, 0, 1], [1, 1, 0]))
    plan = edit(plan, tag(3))
    verify_plan(plan)
    bad = edit(plan, without_events)
    refused(bad, "no queue or event orders the first before the second", "task 0 of op 0", "task 2 of op 2")
    given = np.arange(8, dtype=np.float32)
    (want,) = Simulator(plan, [given]).run()

    def latest(choices):
        return min(choices, key=lambda c: (c[1] < -1, c))

    for seed in range(20):
        np.testing.assert_array_equal(Simulator(plan, [given], seed=seed, late=True).run()[0], want)
    np.testing.assert_array_equal(Simulator(plan, [given], choose=latest, late=True).run()[0], want)
    # Only late stores show it: by then the first task has always run.
    np.testing.assert_array_equal(Simulator(bad, [given], choose=latest).run()[0], want)
    assert np.isnan(Simulator(bad, [given], choose=latest, late=True).run()[0]).all()


def test_an_event_that_a_tagged_path_seems_to_imply_is_needed() -> None:
    """Without it a plan is always refused, and where the first of two tasks writes, late stores show why."""
    shown = found = 0
    for name in graphs.names():
        rng = random.Random(name)
        case, source = graphs.case(name), plans(graphs.case(name), rng)
        for _ in range(8):
            try:
                mutation = mutate(next(source), "rely_on_tags", rng)
            except Skip:
                continue
            assert refusal(mutation.plan) is not None
            found += 1
            shown += harm(case, mutation) is not None
    assert found > 8 and shown > 3, (found, shown)


@pytest.mark.parametrize("name", graphs.names())
def test_who_waits_for_whom(name: str) -> None:
    """Tagged edges as pretended events are those found element by element."""
    for seed in range(4):
        plan = make_plan(graphs.case(name).graph, Options(tagged=True, fine=seed % 2 == 0, seed=seed))
        assert all(may_be_tagged(plan, s) for s, storage in enumerate(plan.storages) if storage.tagged)
        tasks, events = tags_as_events(plan)
        count = len(tasks.table)
        waits = np.repeat(np.arange(count), np.diff(tasks.wait_start))
        signals = np.repeat(np.arange(count), np.diff(tasks.signal_start))
        edges = {
            (int(a), int(b))
            for e in range(plan.events, events)
            for a in signals[tasks.signal_event == e]
            for b in waits[tasks.wait_event == e]
        }
        assert edges == tagged_edges(plan)


def looping(rounds: int) -> Plan:
    """A loop that adds two a round to each of two elements, on two workers, by way of a tagged value."""
    bb = BlockBuilder()
    x = bb.value((2,), "f32")
    param = bb.value((2,), "f32")
    body = bb.nested()

    def step(bb: BlockBuilder, v):
        (out,) = bb.map(
            (2,),
            [v],
            lambda b, at, load: b.op("add", load(0, [b.sub(b.index(1), at[0])]), b.const(1, "f32")),
            ["f32"],
        )
        return out

    out = bb.loop([x], [param], body.block([step(body, step(body, param))]), trips=rounds)
    plan = make_plan(Graph(tuple(bb.values), (x.id,), bb.block([out[0]])), Options(workers=2, tiles=2))
    tagged = next(s for s in range(len(plan.storages)) if may_be_tagged(plan, s))
    return edit(plan, tag(tagged))


def test_tags_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more rounds than there are tags, a stale tag is still always the one before."""
    monkeypatch.setattr("jax_mpk.plan.simulate.TAGS", 3)
    plan = looping(11)
    verify_plan(plan)
    for seed in range(10):
        result = Simulator(plan, [np.zeros(2, np.float32)], seed=seed, late=True).run()[0]
        np.testing.assert_array_equal(result, np.full(2, 22))


def test_text() -> None:
    text = format_plan(chain(2, 3))
    assert "workspace 0..32 tagged: %1" in text
    assert "op1@[0:2] tagged %1" in text
