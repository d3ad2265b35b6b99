"""Replays of plans against the graph's reference, and the statistics of plans."""

import numpy as np
import pytest

from jax_mpk.errors import DeadlockError
from jax_mpk.graph.builder import BlockBuilder
from jax_mpk.graph.ir import Graph
from jax_mpk.plan.ir import READ
from jax_mpk.plan.printer import format_accesses, format_plan
from jax_mpk.plan.simulate import Simulator, op_stats, phase_count
from tests.plan import graphs
from tests.plan.draft import Nested, take_apart
from tests.plan.handmade import Options, make_plan
from tests.plan.test_verify import CHOICES, edit, maps


@pytest.mark.parametrize("name", graphs.names())
def test_replays_give_the_reference_whatever_the_interleaving(name: str) -> None:
    case = graphs.case(name)
    for number, options in enumerate(CHOICES):
        plan = make_plan(case.graph, options)
        inputs, expected = case.samples[number % len(case.samples)]
        simulator = Simulator(plan, inputs, seed=number if number % 3 else None, poison=number % 2 or None)
        for got, want in zip(simulator.run(), expected, strict=True):
            np.testing.assert_array_equal(got, want)
        assert simulator.inputs_intact()


def test_stops_after_any_task() -> None:
    plan = make_plan(maps("same", "turned"), Options(tiles=2))
    for task in range(4):
        simulator = Simulator(plan, [np.zeros(8, np.float32)])
        simulator.run(stop_after=task)
        assert simulator.done[-1] == task
        assert np.isnan(simulator.results()[0]).any() == (len(simulator.done) < 4)
    assert simulator.step() is None or simulator.done[-1] != task


def test_values_can_be_looked_at() -> None:
    plan = make_plan(maps("same", "turned"), Options(tiles=2, workers=1))
    simulator = Simulator(plan, [np.zeros(8, np.float32)])
    assert np.isnan(simulator.value(1)).all()
    simulator.step()
    np.testing.assert_array_equal(simulator.value(1), [1] * 4 + [np.nan] * 4)


def test_a_deadlock_names_what_is_missing() -> None:
    plan = make_plan(maps("same", "turned"), Options(workers=2, tiles=2))
    draft = take_apart(plan)
    draft.tasks[0].waits.append(draft.event())
    draft.tasks[3].signals.append(draft.events - 1)
    with pytest.raises(DeadlockError, match=r"task 0 waits for event 1, which has 0 of 1 signals") as caught:
        Simulator(draft.build(), [np.zeros(8, np.float32)]).run()
    assert "waits for event 0, which has 1 of 2 signals" in str(caught.value)


def test_a_missing_event_shows_under_the_right_interleaving() -> None:
    plans = (make_plan(maps("same", "turned"), Options(workers=2, tiles=2, seed=k)) for k in range(99))
    # Task 2 reads what task 1 writes, here from another worker.
    plan = next(p for p in plans if p.tasks.table["worker"][1] != p.tasks.table["worker"][2])
    bad = edit(plan, lambda d: d.tasks[2].waits.clear())
    inputs = [np.zeros(8, np.float32)]
    assert not np.isnan(Simulator(bad, inputs, choose=lambda c: min(c, key=lambda x: x[1])).run()[0]).any()
    assert np.isnan(Simulator(bad, inputs, choose=lambda c: min(c, key=lambda x: x[1] == 1)).run()[0]).any()


def test_tasks_see_only_what_they_declare() -> None:
    plan = make_plan(maps("same"), Options(workers=1, tiles=1))

    def shrink(d):
        access = next(a for a in d.tasks[0].accesses if a[1] == READ)
        access[2][1, 0] -= 1

    bad, inputs = edit(plan, shrink), [np.zeros(8, np.float32)]
    assert np.isnan(Simulator(bad, inputs).run()[0]).tolist() == [False] * 7 + [True]
    assert not np.isnan(Simulator(bad, inputs, strict=False).run()[0]).any()


def test_memory_is_shared_for_real() -> None:
    plan = make_plan(maps("turned", "turned", "turned"), Options(reuse=True, tiles=1, workers=1))
    first, second = plan.value_storage[1], plan.value_storage[2]
    overlap = edit(plan, lambda d: d.storages.__setitem__(second, d.storages[first]))
    simulator = Simulator(overlap, [np.zeros(8, np.float32)])
    simulator.step()
    simulator.step()
    np.testing.assert_array_equal(simulator.value(1), simulator.value(2))


def test_endless_loops_end() -> None:
    case = graphs.case("while")
    plan = make_plan(case.graph)
    draft = take_apart(plan)
    node = next(item for item in draft.schedule if isinstance(item, Nested))
    node.blocks[0] = []  # the predicate is never computed, and poison is true
    with pytest.raises(DeadlockError, match="has not ended after 500 steps"):
        Simulator(draft.build(), case.inputs, max_steps=500).run()


def test_wrong_arguments_are_named() -> None:
    plan = make_plan(maps("same"))
    with pytest.raises(ValueError, match=r"value 0 is f32\[8\], got float64"):
        Simulator(plan, [np.zeros(8)])


# -- statistics ------------------------------------------------------------------------------------------------


def test_phases_are_events_between_workers() -> None:
    assert phase_count(make_plan(maps("turned"), Options(tiles=3))).total == 1
    assert phase_count(make_plan(maps("turned", "turned", "turned"), Options(tiles=3, fine=True))).total == 3
    # All on one worker: program order is free.
    assert phase_count(make_plan(maps("turned", "turned"), Options(workers=1))).total == 1
    # Barriers separate phases, too.
    cut = phase_count(make_plan(maps("same", "same"), Options(workers=1, cut=1)))
    assert (cut.segments, cut.total) == ((1, 1), 2)


def test_phases_of_loops_count_once_and_of_branches_by_the_longest_arm() -> None:
    phases = phase_count(make_plan(graphs.case("choice").graph, Options(cut=1)))
    assert phases.total < sum(phases.segments)
    trips = [phase_count(make_plan(graphs.case("carries").graph, Options(cut=c))) for c in (1,)]
    assert all(p.total == sum(p.segments) for p in trips)


def test_phases_agree_with_a_longest_path() -> None:
    for name in graphs.names():
        plan = make_plan(graphs.case(name).graph, Options(fine=True, seed=3))
        assert phase_count(plan).segments == tuple(_longest(plan))


def _longest(plan):
    from tests.plan.naive import segments

    tasks = plan.tasks
    for segment in segments(plan.schedule):
        mine = [t for queue in segment.queues for t in queue.tolist()]
        signals = {t: set(tasks.signal_event[tasks.signal_start[t] : tasks.signal_start[t + 1]].tolist()) for t in mine}
        level = dict.fromkeys(mine, 1)
        for _ in mine:
            for queue in segment.queues:
                for a, b in zip(queue[:-1].tolist(), queue[1:].tolist()):
                    level[b] = max(level[b], level[a])
            for t in mine:
                waits = set(tasks.wait_event[tasks.wait_start[t] : tasks.wait_start[t + 1]].tolist())
                for s in mine:
                    if waits & signals[s]:
                        far = tasks.table["worker"][s] != tasks.table["worker"][t]
                        level[t] = max(level[t], level[s] + int(far))
        yield max(level.values(), default=0)


def test_streamed_bytes_are_of_arguments_nobody_writes() -> None:
    case = graphs.case("contraction")
    plan = make_plan(case.graph, Options(workers=4, tiles=4))
    stats = {s.op: s for s in op_stats(plan)}
    contracts = [i for i, op in enumerate(plan.ops) if getattr(op, "kind", "") == "contract"]
    first, second = (stats[i] for i in contracts)
    # x is 6 by 9 and a is 9 by 8; every task reads all of x and its own columns of a.
    assert first.tasks == first.workers == 4
    assert first.streamed == (4 * (54 + 18), 4.0 * (54 + 18), 4 * (54 + 18))
    # h is computed here, so only b counts; its six rows are cut among four tasks.
    assert second.streamed[2] <= 4 * 40


# -- text ------------------------------------------------------------------------------------------------------


def test_text_is_readable_and_always_the_same() -> None:
    plan = make_plan(maps("same", "turned"), Options(workers=2, tiles=2))
    text = format_plan(plan)
    assert text == format_plan(make_plan(maps("same", "turned"), Options(workers=2, tiles=2)))
    for part in (
        "2 operators → 4 tasks on 2 workers, 1 events, 2 dependent phases",
        "s0 result 0 (32 bytes): %2",
        "op1 map [8] → %2  # model.py:1 turned",
        "segment 0: 4 tasks, 2 phases",
        "2: op1@[0:4] waits e0",
    ):
        assert part in text, text
    assert "… 3 more tasks" in format_plan(plan, max_tasks=1)
    assert format_accesses(plan, 2) == "reads %1[4:8]\nwrites %2[0:4]"


@pytest.mark.parametrize("name", graphs.names())
def test_any_plan_has_a_text(name: str) -> None:
    for options in CHOICES[::5]:
        assert format_plan(make_plan(graphs.case(name).graph, options), max_tasks=5)


def test_empty_plans() -> None:
    plan = make_plan(Graph((), (), BlockBuilder().block([])))
    assert Simulator(plan, []).run() == []
    assert phase_count(plan).total == 0
    assert "0 operators" in format_plan(plan)
