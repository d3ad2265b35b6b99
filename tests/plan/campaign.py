"""Mutates many plans and asks verifier and oracle about each: ``python -m tests.plan.campaign [rounds]``."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from jax_mpk.errors import PlanVerificationError
from jax_mpk.graph.fuse import fuse
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.verify import verify_plan
from tests.plan import graphs, handmade
from tests.plan.graphs import Case
from tests.plan.mutations import BREAKING, HARMLESS, Skip, mutate, preserve
from tests.plan.naive import conflicting_pairs
from tests.plan.oracle import harm

VERDICTS = "refused", "accepted", "harmless", "rule", "strict"


@dataclass
class Tally:
    """Verdicts by kind.

    Attributes:
      counts: (kind, verdict) → number. Verdicts: "refused" ones, of which a replay showed the harm, and "accepted"
        harmless ones are what is wanted. "harmless" ones were meant to break something, but did not, and were accepted.
        The others were refused although no replay showed any harm: "rule" ones certainly break a rule of the IR;
        "strict" ones may, or the bytes that raced happened to be equal.
      faults: descriptions of false verdicts.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def total(self, verdict: str) -> int:
        return sum(n for (_, v), n in self.counts.items() if v == verdict)

    def table(self) -> str:
        kinds = [*BREAKING, *HARMLESS]
        lines = ["".join([f"{'kind':20}", *(f"{verdict:>9}" for verdict in VERDICTS)])]
        rows = [(kind, [self.counts[kind, verdict] for verdict in VERDICTS]) for kind in kinds]
        for kind, row in [*rows, ("total", [self.total(verdict) for verdict in VERDICTS])]:
            lines.append("".join([f"{kind:20}", *(f"{n:9}" for n in row)]))
        return "\n".join(lines)


def plans(case: Case, rng: random.Random) -> Iterator[Plan]:
    """Legal plans of a function from both planners, without end."""
    while True:
        for _ in range(3):
            options = handmade.Options(
                workers=rng.choice([2, 3, 4]),
                tiles=rng.choice([2, 3]),
                split=rng.choice([1, 2, 3]),
                reuse=rng.random() < 0.5,
                fuse=rng.random() < 0.5,
                fine=rng.random() < 0.5,
                bundle=rng.random() < 0.3,
                cut=rng.choice([0, 0, 2]),
                tagged=rng.random() < 0.5,
                seed=rng.randrange(1 << 16),
            )
            yield handmade.make_plan(case.graph, options)
        graph = fuse(case.graph) if rng.random() < 0.5 else case.graph
        yield make_plan(graph, handmade.target(rng.choice([2, 3, 4]), tagged=rng.random() < 0.5))


def run(case: Case, seed: int, refused: int, accepted: int, seeds: int = 2) -> Tally:
    """Mutates plans of one function until enough harmful changes were refused and harmless ones accepted.

    Args:
      case: the function.
      seed: of all random choices.
      refused, accepted: how many verdicts of each kind are wanted.
      seeds: random interleavings the oracle tries beside the adversarial ones.
    """
    rng = random.Random(seed)
    tally = Tally()
    source = plans(case, rng)
    rounds = 0
    while tally.total("refused") < refused or tally.total("accepted") < accepted:
        rounds += 1
        assert rounds < 100, "too few places to mutate"
        plan = next(source)
        pairs = conflicting_pairs(plan)
        breaking = rng.sample(list(BREAKING), len(BREAKING)) if tally.total("refused") < refused else []
        harmless = rng.sample(list(HARMLESS), len(HARMLESS)) if tally.total("accepted") < accepted else []
        for kind in breaking:
            _judge_breaking(case, plan, kind, rng, tally, seeds)
        for kind in harmless:
            _judge_harmless(case, plan, pairs, kind, rng, tally)
    return tally


def hunt(kind: str, seed: int = 0, plans_each: int = 40) -> Tally:
    """Tries one kind of change on plans of all functions, until one was refused with reason, or a legal one accepted.

    Args:
      kind: in BREAKING or HARMLESS.
      seed: of all random choices.
      plans_each: how many plans of each function are tried.
    """
    rng = random.Random(f"{kind} {seed}")
    tally = Tally()
    sources = [(case, plans(case, rng)) for case in map(graphs.case, graphs.names())]
    for _ in range(plans_each):
        for case, source in sources:
            plan = next(source)
            if kind in BREAKING:
                _judge_breaking(case, plan, kind, rng, tally, seeds=2)
            else:
                _judge_harmless(case, plan, conflicting_pairs(plan), kind, rng, tally)
            if any(tally.counts[kind, verdict] for verdict in ("refused", "rule", "accepted")):
                return tally
    return tally


def _judge_breaking(case: Case, plan: Plan, kind: str, rng: random.Random, tally: Tally, seeds: int) -> None:
    try:
        mutation = mutate(plan, kind, rng)
    except Skip:
        return
    complaint = refusal(mutation.plan)
    # What breaks a rule for certain is often harmless in every replay: the adversarial ones have to do.
    damage = harm(case, mutation, 0 if mutation.certain else seeds)
    if complaint is None and (damage or mutation.certain):
        tally.faults.append(f"false accept: {kind} of {case.name}: {damage or 'breaks a rule'}")
    verdict = "harmless" if complaint is None else "refused" if damage else "rule" if mutation.certain else "strict"
    tally.counts[kind, verdict] += 1


def _judge_harmless(
    case: Case, plan: Plan, pairs: list[tuple[int, int]], kind: str, rng: random.Random, tally: Tally
) -> None:
    try:
        mutation = preserve(plan, pairs, kind, rng)
    except Skip:
        return
    complaint = refusal(mutation.plan)
    damage = harm(case, mutation, 1) if rng.random() < 0.5 else None
    if damage is not None:
        tally.faults.append(f"not harmless after all: {kind} of {case.name}: {damage}")
    if complaint is not None:
        tally.faults.append(f"false refusal: {kind} of {case.name}: {complaint}")
    tally.counts[kind, "accepted"] += complaint is None


def refusal(plan: Plan) -> str | None:
    """The verifier's complaint about a plan."""
    try:
        verify_plan(plan)
    except PlanVerificationError as error:
        return str(error)
    return None


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    tally = Tally()
    for round_ in range(rounds):
        for number, name in enumerate(graphs.names()):
            part = run(graphs.case(name), 1000 * round_ + number, 60, 60)
            tally.counts += part.counts
            tally.faults += part.faults
    print(tally.table())
    print("\n".join(tally.faults) or "no false verdict")


if __name__ == "__main__":
    main()
