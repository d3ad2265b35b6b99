"""Bounds of regions: what is proved about them is true for every number, and what is not true is never proved."""

import itertools
import random

import pytest

from jax_mpk.graph.bounds import Bound, Span, apart, at_most, evaluate, greatest, least, number, symbol

#: Numbers tried for scalars; these are known to lie among them.
LOW, HIGH = -3, 6


def scalar(value: int, low: int = LOW, high: int = HIGH) -> Bound:
    return symbol("load", (), "s32", value, low, high)


P, Q = scalar(0), scalar(1)


def values(*bounds: Bound) -> list[tuple[int, ...]]:
    """What bounds are, for all numbers."""
    numbers = itertools.product(range(LOW, HIGH + 1), repeat=2)
    return [tuple(evaluate(b, lambda v, _, n=n: n[v]) for b in bounds) for n in numbers]


def random_bound(rng: random.Random, depth: int = 2) -> Bound:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice([P, Q, number(rng.randint(-4, 8))])
    a, b = (random_bound(rng, depth - 1) for _ in range(2))
    kind = rng.randrange(4)
    if kind < 2:
        return a.plus(b, rng.choice([-2, -1, 1, 2]))
    return (least if kind == 2 else greatest)([a, b])


@pytest.mark.parametrize("seed", range(8))
def test_what_is_proved_holds(seed: int) -> None:
    rng = random.Random(seed)
    proved = missed = 0
    for _ in range(150):
        a, b = random_bound(rng), random_bound(rng)
        found, holds = at_most(a, b), all(x <= y for x, y in values(a, b))
        assert holds or not found, f"{a} <= {b}"
        proved += found
        missed += holds and not found
        assert all(a.low <= x <= a.high for (x,) in values(a))
    # Rarely more than ranges and single arguments are needed.
    assert proved > 10 * missed


@pytest.mark.parametrize("seed", range(4))
def test_affine_expressions_are_decided(seed: int) -> None:
    rng = random.Random(seed)
    verdicts = set()
    for _ in range(100):
        a, b = (number(rng.randint(-9, 9)).plus(P, rng.randint(-2, 2)).plus(Q, rng.randint(-2, 2)) for _ in range(2))
        holds = all(x <= y for x, y in values(a, b))
        assert at_most(a, b) == holds
        verdicts.add(holds)
    assert verdicts == {True, False}


@pytest.mark.parametrize("seed", range(4))
def test_regions_that_are_apart_never_meet(seed: int) -> None:
    rng = random.Random(seed)

    def span() -> Span:
        first, length = random_bound(rng, 1), rng.randint(0, 3)
        if rng.random() < 0.3:
            return Span(0, *rng.choice([(first, None), (None, first)]))
        return Span(0, first, first.shifted(length), rng.random() < 0.4)

    def inside(span: Span, x: int, numbers: tuple[int, ...]) -> bool:
        first, end = (None if b is None else evaluate(b, lambda v, _: numbers[v]) for b in (span.first, span.end))
        return ((first is None or x >= first) and (end is None or x < end)) != span.outside

    found = 0
    for _ in range(200):
        a, b = span(), span()
        if not apart((a,), (b,)):
            continue
        found += 1
        for numbers in itertools.product(range(LOW, HIGH + 1), repeat=2):
            assert not any(inside(a, x, numbers) and inside(b, x, numbers) for x in range(-20, 20)), f"{a}, {b}"
    assert found > 10


def clamped(at: Bound, high: int) -> Bound:
    return least([greatest([at, number(0)]), number(high)])


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        (Span(0, None, P), True),
        (Span(0, number(0), P), True),
        (Span(0, None, P.shifted(1)), False),
        (Span(0, P.shifted(1), None), True),
        (Span(0, P, None), False),
        (Span(0, P, P.shifted(1), True), True),
        (Span(0, P.shifted(-1), P.shifted(3), True), True),
        (Span(0, P.shifted(1), P.shifted(2), True), False),
        (Span(0, None, Q), False),
        (Span(1, None, P), False),
        (Span(0, None, least([P, Q])), True),
        (Span(0, None, greatest([P, Q])), False),
    ],
    ids=str,
)
def test_what_lies_before_a_window_is_apart_from_it(reads: Span, expected: bool) -> None:
    window = Span(0, P, P.shifted(1))
    assert apart((reads,), (window,)) is expected
    assert apart((window,), (reads,)) is expected


def test_a_clamped_window_meets_what_lies_before_the_unclamped_position() -> None:
    start = clamped(P, 4)
    window = (Span(0, start, start.shifted(2)),)
    assert apart((Span(0, None, start),), window)
    # P may be 6: then rows 4 and 5 are overwritten, and lie before P.
    assert not apart((Span(0, None, P),), window)
    # Where P is never beyond the last place of the window, or below 0, nothing is clamped.
    small = scalar(0, 0, 4)
    assert clamped(small, 4) == small


def test_text() -> None:
    bound = clamped(P, 4).plus(Q, -2).shifted(3)
    assert str(bound) == "-2*%1 + min(4, max(%0, 0)) + 3"
    assert str(symbol("load", (number(2), P), "s32", 7, 0, 9).shifted(-1)) == "%7[2, %0] - 1"
    assert str(number(0)) == "0"
    assert str(Span(1, P, None)) == "%0 <= i1"
    assert str(Span(0, P, P.shifted(1), True)) == "not %0 <= i0 < %0 + 1"
