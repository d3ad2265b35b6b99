"""Tagged hand-offs in the executor: readiness by tags, late plain stores, and what they show."""

import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import config, megakernelize
from jax_mpk.errors import DeadlockError
from jax_mpk.plan import targets
from jax_mpk.plan.ir import TAGS, Plan
from jax_mpk.plan.simulate import Simulator
from jax_mpk.plan.verify import verify_plan
from tests.plan import graphs, handmade
from tests.plan.draft import take_apart
from tests.plan.large_step import Shape
from tests.plan.mutations import Skip, mutate
from tests.plan.test_verify_tags import looping
from tests.runtime.support import Case, case, of_plan
from tests.runtime.test_run_program import CONTROL, LAYERS, control, layers


def count_tagged(plan: Plan) -> int:
    return sum(storage.tagged for storage in plan.storages)


def test_target_names() -> None:
    made = case(layers, *LAYERS, workers=3, tagged=True)
    assert made.plan.target.name == "cpu-3+tagged"
    assert count_tagged(made.plan) > 2
    assert count_tagged(case(layers, *LAYERS, workers=3).plan) == 0
    # Tags took the place of events.
    assert made.plan.events < case(layers, *LAYERS, workers=3).plan.events
    assert "tagged" in megakernelize(layers, target="cpu-3+tagged").explain(*LAYERS)


@pytest.mark.parametrize("workers", [2, 3, 8, 64])
def test_any_interleaving(workers) -> None:
    for function, args in ((layers, LAYERS), (control, CONTROL)):
        made = case(function, *args, workers=workers, tagged=True)
        for threads in (1, 2, 4):
            with config.override(threads=threads):
                made.check(threads=threads)
                for seed in range(4):
                    made.check(threads=threads, chaos_seed=seed)


@pytest.mark.parametrize("workers", [3, 8])
def test_same_bits_as_with_counters(workers) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((24, 40)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).standard_normal((40, 40)), jnp.float32)

    def f(x, w):
        for _ in range(3):
            x = jax.nn.softmax(x @ w) + jnp.tanh(x) * x.mean(0)
        return x, jnp.argsort(x[0]), (x @ w.T).astype(jnp.bfloat16)

    expected = [np.asarray(y) for y in megakernelize(f, target=f"cpu-{workers}")(x, w)]
    tagged = megakernelize(f, target=f"cpu-{workers}+tagged")
    assert count_tagged(tagged.lower(x, w).plan)
    for threads in (1, 2, 4):
        for chaos in (None, 5, 6):
            with config.override(threads=threads, chaos=chaos):
                for got, want in zip(tagged(x, w), expected, strict=True):
                    assert np.asarray(got).tobytes() == want.tobytes()


def test_holding_stores_back_changes_nothing() -> None:
    made = case(layers, *LAYERS, workers=3, tagged=True)
    for task in range(0, len(made.plan.tasks.table), 2):
        made.check(held_stores=task, threads=1)
        made.check(held_task=task, threads=1, chaos_seed=task)


def test_a_decode_step() -> None:
    """Norms, attention over a cache and a sampled token: the same bits with tags and with counters."""
    shape = Shape(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=128, cache=64)
    rng = np.random.default_rng(0)

    def filled(aval):
        if aval.dtype == jnp.int32:
            return jnp.full(aval.shape, 5, aval.dtype)
        return jnp.asarray(rng.standard_normal(aval.shape) * 0.2, aval.dtype)

    args = jax.tree.map(filled, shape.avals())
    # Also over live keys: a target without them rounds weights at another place.
    counters = megakernelize(shape.step(), target=replace(targets.cpu(8, tagged=True), tagged_bytes=0))
    assert count_tagged(counters.lower(*args).plan) == 0
    expected = jax.tree.leaves(counters(*args))
    tagged = megakernelize(shape.step(), target="cpu-8+tagged")
    assert count_tagged(tagged.lower(*args).plan) > 3
    for chaos in (None, 1, 2, 3):
        with config.override(chaos=chaos):
            for got, want in zip(jax.tree.leaves(tagged(*args)), expected, strict=True):
                assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def handmade_case(name: str, **options) -> Case:
    it = graphs.case(name)
    return of_plan(handmade.make_plan(it.graph, handmade.Options(tagged=True, **options)), *it.samples[0])


@pytest.mark.parametrize("name", graphs.names())
def test_plans_of_the_other_planner(name) -> None:
    for seed in range(3):
        made = handmade_case(name, seed=seed, split=1 + seed, fine=seed != 1, reuse=True, bundle=seed == 2)
        verify_plan(made.plan)
        for chaos in range(4):
            made.check(chaos_seed=chaos, threads=1 + chaos % 2)
        for task in range(0, len(made.plan.tasks.table), 5):
            made.check(held_stores=task, threads=1)


def test_a_plan_that_relies_on_a_tagged_path_goes_wrong() -> None:
    """Where an event is dropped since tags seem to imply it, late stores show it, here and in replays."""
    native = replayed = chaotic = 0
    for name in ("chain", "contraction", "in_place", "scatter", "temporaries"):
        it, rng = graphs.case(name), random.Random(1)
        for seed in range(12):
            made = handmade_case(name, seed=seed, fine=True, workers=2 + seed % 2)
            try:
                mutation = mutate(made.plan, "rely_on_tags", rng)
            except Skip:
                continue
            (first,) = mutation.late

            def wrong(results, expected=made.expected):
                return any(not np.array_equal(a, e) for a, e in zip(results, expected, strict=True))

            def choose(choices, first=first):
                return min(choices, key=lambda c: (c[1] == -2 - first, c))

            held = wrong(made.run(mutation.plan, held_stores=first, threads=1, chaos_seed=seed))
            native += held
            chaotic += any(wrong(made.run(mutation.plan, threads=1, chaos_seed=k)) for k in range(20))
            replayed += wrong(Simulator(mutation.plan, it.samples[0][0], choose=choose, late=True).run())
            made.check(held_stores=first, threads=1, chaos_seed=seed)
            for chaos in range(5):
                made.check(threads=1 + chaos % 2, chaos_seed=chaos)
            assert not wrong(Simulator(made.plan, it.samples[0][0], choose=choose, late=True).run())
    assert min(native, replayed, chaotic) > 3, (native, replayed, chaotic)


@pytest.mark.parametrize("threads", [1, 2])
def test_more_rounds_than_tags(threads) -> None:
    rounds = TAGS + 10
    plan = looping(rounds)
    verify_plan(plan)
    assert count_tagged(plan) == 1
    of_plan(plan, [np.zeros(2, np.float32)], [np.full(2, 2 * rounds, np.float32)]).check(threads=threads)


def test_a_deadlock_names_value_and_element() -> None:
    made = case(layers, *LAYERS, workers=3, tagged=True)
    draft = take_apart(made.plan)
    # A task that reads a tagged value now comes before one of its own worker that writes a part of it.
    queue = next(q for q in draft.segments()[0].queues if len(q) > 2)
    queue.reverse()
    broken = draft.build()
    for options in ({}, {"threads": 1}, {"chaos_seed": 3}):
        with pytest.raises(DeadlockError) as error:
            made.run(broken, **options)
        text = str(error.value)
        worker = int(made.plan.tasks.table["worker"][draft.tasks.index(queue[0])])
        assert f"worker {worker} at task {draft.tasks.index(queue[0])} (" in text
        assert "test_run_program.py" in text and ", tag of value " in text
        assert "]: expected 2, seen 0" in text
    made.check()


def test_tags_of_one_launch_say_nothing_in_the_next() -> None:
    """Tags are the launch's own: a program run again waits again."""
    f = megakernelize(layers, target="cpu-3+tagged")
    expected = [np.asarray(y) for y in f(*LAYERS)]
    others = (LAYERS[0] + 1, LAYERS[1])
    for _ in range(3):
        f(*others)
        for got, want in zip(f(*LAYERS), expected, strict=True):
            np.testing.assert_array_equal(got, want)
