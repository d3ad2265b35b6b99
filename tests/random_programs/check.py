"""Runs a program and judges its results against ``jax.jit``.

*Exact* programs must agree with ``jax.jit`` to the last bit (zeros only up to their sign where
:data:`~tests.random_programs.values.LOOSE` says so), and so must integers and bools of *smooth* programs.

*Rounded* results of smooth programs are judged by their error against the same program in f64::

    |result - wide|  <=  2 * error + 4 * ulp(largest |wide|)

Errors are measured array by array, in the largest element: within an array elements share a history of products, sums
and normalisations whose intermediate values are of the array's size, not of the element's, so an element that happens
to be small cannot be asked for more digits than what it was computed from. ``error`` is that of ``jax.jit``, taken at
the inputs and at inputs moved by up to one unit in their last place. Without the latter a scalar that ``jax.jit``
happens to hit exactly would leave no room for another order of the same roundings; with them, ``error`` is at least
what the inputs' own roundings cause, which no way of computing can be asked to beat.

For f64 results nothing more precise is at hand. They are compared with the NumPy evaluation of the graph in f64, whose
special functions are more accurate than XLA's, and ``error`` is the larger one of ``jax.jit``'s distance from it and of
the error of the program with f64 replaced by f32, scaled by the ratio of the two types' precisions. Both sides may be
off, so three times the error is allowed. That the graph means what the program says is checked as well, where no
narrower type has a part in it: ``jax.jit`` itself must be within a hundred times what the scaled error allows.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tests.random_programs.program import Program
from tests.random_programs.shrink import shrink
from tests.random_programs.values import FLOATS, LOOSE, NUMPY, PRECISION, Info, is_float
from tests.references import QUICK

Array = np.ndarray[Any, Any]
#: Number of moved copies of the inputs.
_MOVED = 2


@dataclass(frozen=True)
class Reference:
    """What a program's results are compared with.

    Attributes:
      args: the inputs.
      results: those of ``jax.jit``.
      wide: those of an evaluation in f64, None where a result must agree exactly.
      allowed: largest error allowed, per result; 0: must agree exactly.
    """

    args: list[Any]
    results: list[Array]
    wide: list[Array | None]
    allowed: list[float]


def run_jit(fn: Callable[..., Any], *variants: Sequence[Any]) -> list[list[Array]]:
    """Results of a function under ``jax.jit`` for several lists of arguments of the same types.

    Compiled quickly: to the same results where nothing is rounded, elsewhere to results with errors of the same size.
    """
    lowered = jax.jit(fn).lower(*variants[0])
    try:
        compiled = lowered.compile(compiler_options=QUICK)
    except jax.errors.JaxRuntimeError:
        # The older emitters cannot clamp bools.
        compiled = lowered.compile()
    return [[np.asarray(r) for r in compiled(*args)] for args in variants]


def reference(program: Program) -> Reference:
    """Runs a program with ``jax.jit``, and in f64 where that is needed."""
    args = program.arrays()
    infos = [program.infos[name] for name in program.outputs]
    rough = [i.rough for i in infos]
    if not any(rough):
        (results,) = run_jit(program.function(), args)
        return Reference(args, results, [None] * len(results), [0.0] * len(results))
    moved = [_moved(program, args, k) for k in range(_MOVED)]
    results, *others = run_jit(program.function(), args, *moved)
    (wide,) = run_jit(program.function(float_types=dict.fromkeys(FLOATS, "f64")), program.arrays(wide=True))
    narrow = accurate = None
    if any(r and i.dtype == "f64" for r, i in zip(rough, infos)):
        changed = program.function(float_types={"f64": "f32"})
        narrow_args = [a.astype(np.float32) if a.dtype == np.float64 else a for a in args]
        (narrow,) = run_jit(changed, narrow_args)
        wide_fn = program.function(float_types=dict.fromkeys(FLOATS, "f64"))
        accurate = evaluated(wide_fn, program.arrays(wide=True))
    narrower = any(is_float(i.dtype) and i.dtype != "f64" for i in program.infos.values())
    allowed, truth = [], []
    for k, info in enumerate(infos):
        if not rough[k] or not info.size:
            allowed.append(0.0)
            truth.append(None)
            continue
        error = max(_distance(run[k], wide[k]) for run in (results, *others))
        unit = 4 * ulp(float(np.max(np.abs(wide[k]))), info.dtype)
        if info.dtype == "f64":
            assert narrow is not None and accurate is not None
            scaled = _distance(narrow[k], wide[k]) * 2.0 ** (PRECISION["f32"] - PRECISION["f64"])
            off = _distance(results[k], accurate[k])
            error = max(error, scaled, off)
            if not (narrower or off <= 100 * (3 * scaled + unit)):
                # Whatever the subject computes from this graph is wrong.
                error = 0.0
            allowed.append(3 * error + unit)
            truth.append(accurate[k])
        else:
            allowed.append(2 * error + unit)
            truth.append(wide[k])
    return Reference(args, results, truth, allowed)


def _distance(a: Array, b: Array) -> float:
    return float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0))


def _moved(program: Program, args: Sequence[Any], number: int) -> list[Any]:
    """Floating-point inputs moved by -1, 0 or 1 units in the last place."""
    rng = np.random.default_rng([program.seed, 7, number])
    out = []
    for given, array in zip(program.inputs, args, strict=True):
        dtype = given.info.dtype
        if is_float(dtype):
            step = rng.integers(-1, 2, array.shape) * 2.0 ** (1 - PRECISION[dtype])
            array = (array.astype(np.float64) * (1 + step)).astype(NUMPY[dtype])
        out.append(array)
    return out


def ulp(scale: float, dtype: str) -> float:
    """Distance of neighbouring numbers of a type at a scale."""
    if scale == 0:
        return 0.0
    return float(2.0 ** (np.floor(np.log2(scale)) + 1 - PRECISION[dtype]))


def disagreement(program: Program, expected: Reference, got: Sequence[Array]) -> str | None:
    """What is wrong with the results of a program, or None."""
    if len(got) != len(program.outputs):
        return f"{len(got)} results instead of {len(program.outputs)}"
    for k, name in enumerate(program.outputs):
        info, want, have = program.infos[name], expected.results[k], np.asarray(got[k])
        if have.shape != want.shape or have.dtype != want.dtype:
            return f"result {k} ({name}) is {have.dtype}{list(have.shape)} instead of {want.dtype}{list(want.shape)}"
        if expected.wide[k] is None:
            wrong = differs(have, want, info)
            note = ""
        else:
            error = np.abs(have.astype(np.float64) - expected.wide[k])
            # Written so that NaN is wrong.
            wrong = ~(error <= expected.allowed[k])
            note = f", off by {np.max(error):.3g} where {expected.allowed[k]:.3g} is allowed"
        if wrong.any():
            at = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(wrong)))
            where = at if want.shape else ()
            return (
                f"result {k} ({name}, {info.dtype}{list(info.shape)}) has {int(wrong.sum())} wrong elements of "
                f"{want.size}, the first at {list(where)}: got {have[where]!r}, jax.jit has {want[where]!r}{note}"
            )
    return None


def differs(have: Array, want: Array, info: Info | None = None) -> Array:
    """Where two arrays are not the same, bit for bit (NaNs are all alike)."""
    if want.dtype == np.bool_ or want.dtype.kind in "iu":
        return np.asarray(have != want)
    same = np.asarray(have == want)
    if info is None or info.zeros != LOOSE:
        same &= np.signbit(have) == np.signbit(want)
    return ~(same | (np.isnan(have) & np.isnan(want)))


@functools.cache
def _graph_parts() -> Any:
    from jax_mpk.capture import capture
    from jax_mpk.graph import fuse, reference
    from jax_mpk.graph.build import build_graph

    return capture, build_graph, fuse.fuse, reference.evaluate


def evaluated(fn: Callable[..., Any], args: Sequence[Any]) -> list[Array]:
    """Results of a function's captured and fused graph, evaluated by NumPy."""
    capture, build_graph, fuse, evaluate = _graph_parts()
    captured = capture(jax.make_jaxpr(fn)(*args))
    graph = fuse(build_graph(captured.jaxpr))
    results: list[Array] = evaluate(graph, [*(np.asarray(c) for c in captured.consts), *args])
    return results


#: OS threads of the runs of one plan: alone, and more than this machine may have cores.
THREADS = (1, 5)
#: Worker counts that plans are made for; each program gets two of them.
WORKERS = (1, 2, 3, 8, 64)


def workers_of(program: Program) -> tuple[int, int]:
    """Two different worker counts."""
    pairs = [(a, b) for a in WORKERS for b in WORKERS if a < b]
    return pairs[program.seed % len(pairs)]


def planned(program: Program, args: Sequence[Any], target: str) -> list[Array]:
    """Results of a program planned for a target and run in chaos mode, on different numbers of OS threads.

    Raises:
      NotReproducible: two runs differ.
    """
    import jax_mpk
    from jax_mpk import config

    fn = jax_mpk.megakernelize(program.function(), target=target)
    first: list[Array] = []
    for run in range(len(THREADS)):
        with config.override(chaos=(program.seed * 31 + run) % 2**63, threads=THREADS[run]):
            got = [np.asarray(r) for r in fn(*args)]
        first = first or got
        for k, (a, b) in enumerate(zip(first, got, strict=True)):
            if a.tobytes() != b.tobytes():
                raise NotReproducible(f"result {k} ({program.outputs[k]}) differs between two runs of one plan")
    return first


class NotReproducible(AssertionError):
    """One plan, two runs, different bits."""


class Refused(Exception):
    """``jax.jit`` itself cannot compile or run a program, or gives other results than operation by operation."""


def verdict(program: Program) -> str | None:
    """What is wrong with a program as a megakernel, for either worker count, or None.

    The plan for the larger one hands values over by tagged words where it can.

    Raises:
      Refused: there is nothing to compare with.
    """
    try:
        expected = reference(program)
    except jax.errors.JaxRuntimeError as error:
        raise Refused(str(error)) from error
    few, many = workers_of(program)
    for target in (f"cpu-{few}", f"cpu-{many}+tagged"):
        try:
            wrong = disagreement(program, expected, planned(program, expected.args, target))
        except Exception as error:  # whatever it is, it is the finding
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            if _disagrees_with_itself(program, expected):
                raise Refused("JAX gives other results without jax.jit")
            return f"{target}: {wrong}"
    return None


def _disagrees_with_itself(program: Program, expected: Reference) -> bool:
    plain = program.function()(*expected.args)
    return disagreement(program, expected, [np.asarray(r) for r in plain]) is not None


def kind(message: str) -> str:
    """What stays the same about a failure while its program shrinks."""
    found = re.search(r"\w+(Error|Reproducible)\b", message)
    return found[0] if found else "wrong"


def report(program: Program, message: str, attempts: int = 80) -> str:
    """A failure with a small program that shows it."""
    wanted = kind(message)

    def fails(smaller: Program) -> bool:
        found = verdict(smaller)
        return found is not None and kind(found) == wanted

    small = shrink(program, fails, attempts=attempts)
    return f"{program.family} {program.seed}: {message}\n\nSmaller: {verdict(small)}\n\n{small.report()}\n"
