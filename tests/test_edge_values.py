"""Edge values: every primitive gives what ``jax.jit`` gives, bit for bit, or within stated units in the last place."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest

import jax_mpk
from jax_mpk import config
from jax_mpk.graph.build import load_rules
from tests.random_programs import coverage, edges_arrays, edges_elementwise
from tests.random_programs.check import WORKERS, differs, evaluated, run_jit
from tests.random_programs.edges import Case, Group
from tests.random_programs.program import NAMES
from tests.random_programs.values import FLOATS, NUMPY

pytestmark = pytest.mark.usefixtures("x64")

Array = np.ndarray[Any, Any]
GROUPS = {**dict(edges_elementwise.groups()), **dict(edges_arrays.groups())}
#: Types whose groups run on every version of Python and JAX; the others differ from them in nothing that these decide.
#: So do those of keys, "keys".
EVERYWHERE = ("b1", "u8", "s32", "bf16", "f32", "keys")


def everywhere_or_slow(name: str) -> Any:
    """The name of a group as a parameter."""
    of_type = name.rpartition(" ")[2]
    return pytest.param(name, marks=[pytest.mark.slow] if of_type not in EVERYWHERE else [])


def function(cases: list[Case], names: Mapping[str, Any] = NAMES) -> Any:
    """One function that computes every case from the group's arrays."""
    codes = [compile(case.code, case.code, "eval") for case in cases]

    def program(**arrays: Array) -> list[Any]:
        return [eval(code, {**names, **arrays}) for code in codes]

    return program


@pytest.mark.parametrize("name", [everywhere_or_slow(name) for name in GROUPS])
def test_edge_values(name: str) -> None:
    group = GROUPS[name]
    want = reference(group, exact=name.rpartition(" ")[2] not in FLOATS)
    workers = WORKERS[list(GROUPS).index(name) % len(WORKERS)]
    with config.override(chaos=workers):
        got = jax_mpk.megakernelize(function(group.cases), target=f"cpu-{workers}")(**group.arrays)
        got = [np.asarray(g) for g in got]
    faults = [fault(group, k, g, w) for k, (g, w) in enumerate(zip(got, want, strict=True))]
    faults = [f for f in faults if f]
    assert not faults, f"{name}: {len(faults)} of {len(group.cases)} cases\n" + "\n".join(map(str, faults))


@pytest.mark.slow
def test_no_hole() -> None:
    """Every primitive of the rule table sees edge values of every element type that JAX allows."""
    counts: collections.Counter[coverage.Pair] = collections.Counter()
    for group in GROUPS.values():
        counts.update(coverage.pairs_of(jax.make_jaxpr(function(group.cases))(**group.arrays)))
    holes = coverage.holes(counts, load_rules())
    assert not holes, f"{len(holes)} holes: {', '.join(holes)}"


def reference(group: Group, exact: bool) -> list[Array]:
    """Results of ``jax.jit``, compiled quickly where nothing is rounded but by conversions: the bits are the same."""
    program = function(group.cases)
    if not exact:
        return [np.asarray(r) for r in jax.jit(program)(**group.arrays)]
    (results,) = run_jit(lambda *args: program(**dict(zip(group.arrays, args))), list(group.arrays.values()))
    return results


def fault(group: Group, number: int, got: Array, want: Array) -> str | None:
    """What is wrong with a result, or None."""
    case = group.cases[number]
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{case.code}: {got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}"
    wrong = differs(got, want)
    for name in case.unsure.split():
        wrong &= ~subnormal(group.arrays[name])
    if case.lenient and wrong.any() and want.dtype.kind not in "biu":
        wrong &= distance(got, want) > 0
    if case.ulps and wrong.any():
        wrong &= distance(got, want) > case.ulps
        if wrong.any():
            # Where XLA is off itself, being right is fine.
            wrong &= distance(got, accurate(group, case, want.dtype)) > case.ulps
    if not wrong.any():
        return None
    at = int(np.flatnonzero(wrong)[0])
    given = {n: a.ravel()[at] for n, a in group.arrays.items() if a.shape == want.shape}
    return (
        f"{case.code}: {int(wrong.sum())} of {want.size} wrong, the first at {at}"
        f"{f' for {given}' if given else ''}: got {got.ravel()[at]!r}, jax.jit has {want.ravel()[at]!r}"
    )


def subnormal(a: Array) -> Array:
    """Where an array holds subnormal numbers, by bits."""
    return (position(a) == 0) & (np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}") << 1 != 0)


def distance(a: Array, b: Array) -> Array:
    """Units in the last place between floats; NaN is far from everything but NaN, subnormals count as zeros."""
    steps = np.abs(position(a) - position(b))
    nan = np.isnan(a) != np.isnan(b)
    return np.where(nan, np.inf, np.where(np.isnan(a), 0, steps.astype(np.float64)))


def position(a: Array) -> Array:
    """Number of a float in the order of its type's normal numbers, as Python integers."""
    width = a.dtype.itemsize * 8
    raw = np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}").astype(object)
    size = raw & ((1 << (width - 1)) - 1)
    digits = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[a.dtype.name]
    size = np.where(size >> digits == 0, 0, size)
    return np.where(raw >> (width - 1) == 1, -size, size)


def accurate(group: Group, case: Case, dtype: Any) -> Array:
    """A result in f64, rounded once: by XLA, or for f64 by NumPy and SciPy, which are more accurate."""
    wide = {n: a.astype(np.float64) if a.dtype == dtype else a for n, a in group.arrays.items()}
    fn = function([case], {**NAMES, **dict.fromkeys(FLOATS, NUMPY["f64"])})
    if dtype == np.float64:
        (result,) = evaluated(lambda *args: fn(**dict(zip(wide, args))), list(wide.values()))
    else:
        (result,) = jax.jit(fn)(**wide)
    with np.errstate(all="ignore"):
        return np.asarray(result).astype(dtype)
