"""The verifier against mutated plans, judged by adversarial replays and by an element-wise check of order."""

import random

import pytest

from tests.plan import graphs
from tests.plan.campaign import hunt, plans, refusal, run
from tests.plan.mutations import BREAKING, HARMLESS, ORDER_ONLY, Mutation, Skip, corrupt, mutate
from tests.plan.naive import Order, conflicting_pairs
from tests.plan.oracle import harm

#: Wanted of each function: harmful plans refused, as a replay shows, and harmless ones accepted. There are enough
#: functions for more than 1,000 of each.
WANTED = 60


def test_there_are_enough_functions() -> None:
    assert len(graphs.names()) * WANTED >= 1000


@pytest.mark.parametrize("name", graphs.names())
def test_harmful_refused_and_harmless_accepted(name: str) -> None:
    tally = run(graphs.case(name), seed=graphs.names().index(name), refused=WANTED, accepted=WANTED)
    print(f"\n{name}\n{tally.table()}")
    assert not tally.faults, "\n".join(tally.faults)


@pytest.mark.parametrize("kind", [*BREAKING, *HARMLESS])
def test_every_kind_finds_something_to_change(kind: str) -> None:
    """A kind that is meant to break plans breaks some, or a rule, and is refused; a legal one is accepted."""
    tally = hunt(kind)
    found = ("refused", "rule") if kind in BREAKING else ("accepted",)
    assert sum(map(tally.total, found)) > 0, tally.table()
    assert not tally.faults, "\n".join(tally.faults)


@pytest.mark.parametrize("name", graphs.names())
def test_any_wrong_number_is_refused_or_harmless(name: str) -> None:
    """One number anywhere in a plan changes: the verifier never fails in another way than by refusing."""
    rng = random.Random(name)
    case = graphs.case(name)
    source = plans(case, rng)
    refusals = 0
    for _ in range(6):
        plan = next(source)
        for _ in range(20):
            new, what = corrupt(plan, rng)
            if refusal(new) is not None:
                refusals += 1
                continue
            fault = harm(case, Mutation(what, new), seeds=1)
            assert fault is None, f"{what}: {fault}"
    assert refusals > 60


@pytest.mark.parametrize("name", graphs.names())
def test_order_agrees_with_an_elementwise_check(name: str) -> None:
    """Where only the order of tasks changes, the verdict is exactly that of a slow and obvious check."""
    rng = random.Random(name)
    source = plans(graphs.case(name), rng)
    for _ in range(5):
        plan = next(source)
        pairs = conflicting_pairs(plan)
        for kind in ORDER_ONLY * 2:
            try:
                new = mutate(plan, kind, rng).plan
            except Skip:
                continue
            order = Order(new)
            signalled = set(new.tasks.signal_event.tolist())
            good = not order.cyclic and signalled.issuperset(new.tasks.wait_event.tolist())
            good &= all(order.before(a, b) for a, b in pairs)
            assert (refusal(new) is None) == good, f"{kind}: {refusal(new)}"
