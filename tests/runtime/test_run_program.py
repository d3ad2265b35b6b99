"""The executor on Programs of real functions, without XLA in between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk.errors import DeadlockError, LaunchError
from jax_mpk.plan.ir import Plan
from jax_mpk.runtime.native import parse_program, run_program
from tests.runtime.support import case, without_wait


def integers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def layers(x, ws):
    for w in ws:
        x = jnp.clip(x @ w - x.sum(0), -9, 9)
    return x, x.sum(), jnp.sort(x[0])


def control(x, n):
    def body(i, x):
        x = jax.lax.cond(i % 3 == 0, lambda x: x[::-1] + 1, lambda x: jnp.cumsum(x, 0) % 7, x)
        return jax.lax.while_loop(lambda x: x.sum() > 100, lambda x: x // 2 - 1, x)

    return jax.lax.fori_loop(0, n, body, x)


# Large enough to be spread over workers.
LAYERS = (integers(0, 6, 128), [integers(i, 128, 128) for i in range(4)])
CONTROL = (integers(9, 8, 12), 7)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 3, 8, 64])
def test_any_number_of_workers_and_threads(workers, threads) -> None:
    for function, args in ((layers, LAYERS), (control, CONTROL)):
        made = case(function, *args, workers=workers)
        made.check(threads=threads)
        for seed in range(5):
            made.check(threads=threads, chaos_seed=seed)


@pytest.mark.parametrize("trips", [0, 1, 1000])
def test_dynamic_trip_counts(trips) -> None:
    made = case(lambda n: jax.lax.while_loop(lambda i: i < n, lambda i: i + 1, 0), jnp.int32(trips), workers=2)
    made.check()
    made.check(chaos_seed=trips)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_million_trips(workers) -> None:
    made = case(
        lambda n: jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] + 2), (0, 0)),
        jnp.int32(10**6),
        workers=workers,
    )
    made.check()


def test_holding_a_task_back_changes_nothing() -> None:
    made = case(layers, *LAYERS)
    for task in range(0, len(made.plan.tasks.table), 3):
        made.check(held_task=task, threads=1)


def test_tasks_without_a_share_of_a_member_leave_it_alone() -> None:
    """A sort belongs to a routine of several tasks, one of which does it."""

    def ordered(x):
        keys, payload = jax.lax.sort((x, x > 0), num_keys=1)
        return keys, payload, jnp.stack([x, keys], 1), payload.min()

    made = case(ordered, integers(3, 7), workers=64)
    assert made.plan.tasks.table["routine"].tolist().count(0) > 1
    for task in range(len(made.plan.tasks.table)):
        made.check(held_task=task, threads=1, chaos_seed=task)


def waiting_tasks(plan: Plan) -> list[tuple[int, int]]:
    """(task, event) of every wait."""
    start, events = plan.tasks.wait_start, plan.tasks.wait_event
    return [(t, int(e)) for t in range(len(plan.tasks.table)) for e in events[start[t] : start[t + 1]]]


def test_missing_edges_show_when_the_task_they_wait_for_is_held_back() -> None:
    made = case(layers, *LAYERS, workers=3)
    start, events = made.plan.tasks.signal_start, made.plan.tasks.signal_event
    edges = waiting_tasks(made.plan)
    assert len(edges) > 5
    seen = 0
    for task, event in edges:
        plan = without_wait(made.plan, task, event)
        signalling = [t for t in range(task) if event in events[start[t] : start[t + 1]]]
        outcomes = [made.run(plan, held_task=t, threads=1, chaos_seed=seed) for t in signalling for seed in range(2)]
        seen += any(
            not np.array_equal(a, e, equal_nan=True) for o in outcomes for a, e in zip(o, made.expected, strict=True)
        )
    assert seen == len(edges)


def test_deadlock_is_named() -> None:
    made = case(layers, *LAYERS, workers=3)
    plan = made.plan
    # A task that waits for an event which it is the only one, or one of those, to signal.
    start, events = plan.tasks.signal_start, plan.tasks.signal_event
    task = next(t for t in range(len(plan.tasks.table)) if start[t + 1] > start[t])
    event = int(events[start[task]])
    broken = with_wait(plan, task, event)
    for options in ({}, {"threads": 1}, {"chaos_seed": 3}):
        with pytest.raises(DeadlockError) as error:
            made.run(broken, **options)
        text = str(error.value)
        worker = int(plan.tasks.table["worker"][task])
        assert f"worker {worker} at task {task}" in text
        assert f"event {event}: expected " in text and ", seen " in text
        assert "test_run_program.py" in text
    made.check()


def with_wait(plan: Plan, task: int, event: int) -> Plan:
    from dataclasses import replace

    tasks = plan.tasks
    start = tasks.wait_start.copy()
    wait_event = np.insert(tasks.wait_event, start[task], event)
    start[task + 1 :] += 1
    return replace(plan, tasks=replace(tasks, wait_start=start, wait_event=wait_event))


def test_donated_arguments_and_separate_buffers() -> None:
    """Where the caller gives a result a buffer of its own, it starts as a copy of the argument."""
    from jax_mpk import megakernelize
    from jax_mpk.codegen.encode import encode

    def f(cache, x):
        return cache.at[1].set(x)

    cache, x = integers(0, 4, 3), integers(1, 3)
    plan = megakernelize(f, donate_argnums=0, target="cpu-2").lower(cache, x).plan
    assert plan.aliases == {0: 0}
    program = encode(plan).words.tobytes()
    expected = cache.copy()
    expected[1] = x
    result = np.zeros_like(cache)
    run_program(program, [cache, x], [result], chaos_seed=1)
    np.testing.assert_array_equal(result, expected)
    in_place = cache.copy()
    run_program(program, [in_place, x], [in_place], chaos_seed=1)
    np.testing.assert_array_equal(in_place, expected)


@pytest.mark.parametrize("target", ["cpu-1", "cpu-3", "cpu-64", "cpu-8+tagged"])
def test_launches_in_a_row(target) -> None:
    """A launch reads and overwrites what the one before has left in a donated buffer."""
    from jax_mpk import megakernelize
    from jax_mpk.codegen.encode import encode

    def step(cache, rows, at):
        new = jax.lax.dynamic_update_slice(cache, (rows @ cache.T @ cache) % 5 - 2, (at, 0))
        return new, new[::-1].cumsum(0), cache.sum(0)

    cache, rows = integers(0, 24, 16), integers(1, 3, 16)
    plan = megakernelize(step, donate_argnums=0, target=target).lower(cache, rows, jnp.int32(0)).plan
    assert plan.aliases == {0: 0}
    program = encode(plan).words.tobytes()
    expected = cache
    for launch in range(12):
        at = np.int32(5 * launch % 22)
        expected, *others = jax.jit(step)(expected, rows, at)
        results = [np.zeros_like(other) for other in others]
        run_program(program, [cache, rows, at], [cache, *results], chaos_seed=launch, threads=1 + launch % 2)
        np.testing.assert_array_equal(cache, expected)
        for result, other in zip(results, others, strict=True):
            np.testing.assert_array_equal(result, other)


def test_buffers_that_do_not_fit_are_refused() -> None:
    from jax_mpk.codegen.encode import encode

    made = case(lambda x: x + 1, integers(0, 4))
    program = parse_program(encode(made.plan).words.tobytes())
    assert program.tasks > 0 and program.workers == 3
    with pytest.raises(LaunchError, match="bytes"):
        run_program(program, made.arguments, [np.zeros(3, np.float32)])
    with pytest.raises(LaunchError, match="bytes"):
        run_program(program, [np.zeros(3, np.float32)], [np.zeros(4, np.float32)])
    with pytest.raises(LaunchError, match="results"):
        run_program(program, made.arguments, [])
    with pytest.raises(ValueError, match="contiguous"):
        run_program(program, [np.zeros(8, np.float32)[::2]], [np.zeros(4, np.float32)])


def test_broken_programs_are_refused() -> None:
    from jax_mpk.codegen.encode import encode

    words = encode(case(layers, *LAYERS).plan).words
    for program in (b"", b"1234567", words.tobytes()[:-8], words[1:].tobytes(), words[: len(words) // 2].tobytes()):
        with pytest.raises((ValueError, RuntimeError)):
            parse_program(program)
