"""Compares graphs, run by the NumPy reference, with ``jax.jit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_mpk.capture import capture
from jax_mpk.capture.jaxprs import physical
from jax_mpk.graph import dtypes
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.ir import Graph
from jax_mpk.graph.reference import evaluate
from jax_mpk.graph.verify import verify_graph


def graph_of(fn: Callable[..., Any], *args: Any) -> tuple[Graph, list[Any]]:
    """The verified graph of a function and its closed-over arrays."""
    captured = capture(jax.make_jaxpr(fn)(*args))
    graph = build_graph(captured.jaxpr)
    verify_graph(graph)
    return graph, [storage(const) for const in captured.consts]


def storage(x: Any) -> np.ndarray:
    """An array as it is stored: PRNG keys as their words."""
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x, dtype=physical(jax.typeof(x))[1])


def run(fn: Callable[..., Any], *args: Any) -> list[np.ndarray]:
    """Results of a function by way of its graph."""
    graph, consts = graph_of(fn, *args)
    return evaluate(graph, [*consts, *map(storage, jax.tree.leaves(args))])


def check(
    fn: Callable[..., Any], *args: Any, ulps: float = 0.0, atol: float = 0.0, jit: Callable[..., Any] = jax.jit
) -> None:
    """Asserts that graph and ``jax.jit`` agree.

    Args:
      fn: the function.
      *args: its arguments.
      ulps: difference allowed, in units of the last place of the larger of the two (0: bit for bit, NaNs equal).
      atol: absolute difference allowed beside that.
      jit: what compiles instead of ``jax.jit``.
    """
    want = [storage(x) for x in jax.tree.leaves(jit(fn)(*args))]
    got = run(fn, *args)
    assert len(got) == len(want)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"result {k}"
        _compare(a, b, ulps, atol, f"result {k}")


def _compare(got: np.ndarray, want: np.ndarray, ulps: float, atol: float, what: str) -> None:
    name = dtypes.from_numpy(want.dtype)
    assert name is not None
    if not dtypes.is_float(name):
        np.testing.assert_array_equal(got, want, err_msg=what)
        return
    a, b = got.astype(np.float64), want.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=what)
    a, b = (np.where(np.isnan(x), 0.0, x) for x in (a, b))
    if ulps == 0 and atol == 0:
        np.testing.assert_array_equal(a, b, err_msg=what)
        np.testing.assert_array_equal(np.signbit(a), np.signbit(b), err_msg=what + ", sign of zero")
        return
    bits = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}[name]
    finite = np.isfinite(a) & np.isfinite(b)
    np.testing.assert_array_equal(np.where(finite, 0, a), np.where(finite, 0, b), err_msg=what)
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    size = np.maximum(np.abs(a), np.abs(b))
    allowed = ulps * size * 2.0**-bits + atol
    worst = np.max(np.abs(a - b) - allowed, initial=-1.0)
    assert worst <= 0, f"{what}: differs by up to {np.max(np.abs(a - b))}\ngot  {got}\nwant {want}"
