"""Puts instructions together to programs."""

from __future__ import annotations

import functools
import itertools

from tests.random_programs import (  # noqa: F401  (they fill the table)
    ops_control,
    ops_elementwise,
    ops_index,
    ops_linalg,
    ops_math,
    ops_moves,
    ops_random,
    ops_reduce,
)
from tests.random_programs.generator import Gen, Skip
from tests.random_programs.program import Program
from tests.random_programs.registry import OPS, Op
from tests.random_programs.values import KEY, is_float

#: Programs have from 1 to so many primitives.
MAX_SIZE = 60
FAMILIES = ("exact", "smooth")
#: Instructions tried before a program stays shorter than asked.
_TRIES = 40


@functools.cache
def table(family: str) -> tuple[list[Op], list[float]]:
    """Instructions of a family and their accumulated weights."""
    ops = [o for o in OPS.values() if o.dtypes(family)]
    return ops, list(itertools.accumulate(o.exact_weight if family == "exact" else o.weight for o in ops))


@functools.cache
def pairs(family: str) -> list[tuple[Op, str]]:
    """What a run over many seeds places at least once: every instruction with every type, in a mixed order.

    The smooth family is there for floats; other types need not occur in it.
    """
    ops = table(family)[0]
    every = [(o, t) for o in ops for t in o.dtypes(family) if family == "exact" or is_float(t)]
    # A fixed permutation: neighbouring seeds get unrelated pairs.
    step = next(s for s in range(len(every) * 5 // 8, len(every) + 1) if _coprime(s, len(every)))
    return [every[k * step % len(every)] for k in range(len(every))]


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def _place(g: Gen) -> None:
    """Appends some instruction."""
    ops, weights = table("exact" if g.exact else "smooth")
    for _ in range(_TRIES):
        chosen = g.rng.choices(ops, cum_weights=weights)[0]
        dtypes = chosen.dtypes("exact" if g.exact else "smooth")
        known = [t for t in dtypes if any(v.info.dtype == t for v in g.visible())]
        dtype = g.rng.choice(known) if known and g.chance(0.8) else g.rng.choice(dtypes)
        if attempt(g, chosen, dtype):
            return


def attempt(g: Gen, chosen: Op, dtype: str) -> bool:
    """Appends an instruction, or leaves the program as it was."""
    frame = g.frames[-1]
    values_before, instrs_before, left = len(frame.values), len(frame.instrs), g.left
    try:
        chosen.place(g, dtype)
    except Skip:
        # Inputs made on the way stay, unused.
        if g.depth:
            del frame.values[values_before:], frame.instrs[instrs_before:]
        else:
            made = {name for i in frame.instrs[instrs_before:] for name in i.names}
            del frame.instrs[instrs_before:]
            frame.values[values_before:] = [v for v in frame.values[values_before:] if v.name not in made]
        g.left = left
        return False
    return True


def generate(seed: int, family: str, size: int | None = None) -> Program:
    """The random program of a seed.

    Args:
      seed: decides everything else.
      family: "exact" or "smooth".
      size: about how many primitives, 1 to 60; by default the seed decides. A smaller size gives a beginning of
        the larger program.
    """
    drawn = size_of(seed) if size is None else size
    g = Gen(seed, family, MAX_SIZE)
    g.place = _place
    focus = focus_of(seed, family)
    while focus or MAX_SIZE - g.left < drawn:
        if focus and (drawn - (MAX_SIZE - g.left) <= 2 * len(focus) or g.chance(0.4)):
            chosen = focus.pop(0)
            if any(attempt(g, *chosen) for _ in range(_TRIES)):
                continue
        _place(g)
    return _finished(g, seed, family)


_SMALL = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15)
_LARGE = (20, 25, 30, 40, 50, 60)


def size_of(seed: int) -> int:
    """Number of primitives of a seed's program: mostly small, since those are cheap, sometimes the largest."""
    cycle, k = divmod(seed, 16)
    return _SMALL[k % len(_SMALL)] if k else _LARGE[cycle % len(_LARGE)]


def focus_of(seed: int, family: str) -> list[tuple[Op, str]]:
    """Pairs that a seed's program must hold; consecutive seeds take consecutive pairs, larger programs more."""
    counts = [max(1, min(6, size_of(k or 16) // 2)) for k in range(16)]
    cycle, k = divmod(seed, 16)
    start = cycle * sum(counts) + sum(counts[:k])
    every = pairs(family)
    return [every[(start + n) % len(every)] for n in range(counts[k])]


def _finished(g: Gen, seed: int, family: str) -> Program:
    frame = g.frames[0]
    # Nested functions may drop what they read.
    read = {name for i in frame.instrs if not i.blocks for name in i.args}
    of_arrays = [v for v in frame.values if v.info.dtype != KEY]
    made = [v for v in of_arrays if not v.name.startswith("a")]
    # What nobody reads is a result, so that nothing is computed in vain; some other values are results too.
    results = [v for v in made if v.name not in read]
    results += [v for v in made if v.name in read and g.chance(0.15)]
    inputs = [v for v in of_arrays if v.name.startswith("a")]
    if inputs and g.chance(0.15):
        results.append(g.rng.choice(inputs))
    if results and g.chance(0.1):
        results.append(g.rng.choice(results))
    if not results:
        results = inputs[:1] or [g.input((3,), "f32")]
    return Program(
        family,
        seed,
        tuple(g.inputs),
        tuple(frame.instrs),
        tuple(v.name for v in results),
        g.infos,
    )
