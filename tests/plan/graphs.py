"""Small functions whose plans use every feature of the IR, with arguments on which arithmetic is exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Graph
from jax_mpk.graph.layouts import permute_inputs, preferred
from jax_mpk.graph.reference import evaluate
from jax_mpk.graph.rewrite import map_blocks, prune


def placed(graph: Graph) -> Graph:
    """The graph, not fused yet, for weights as ``jax_mpk.place`` stores them."""
    return permute_inputs(graph, preferred(fuse(graph)))


@dataclass(frozen=True)
class Case:
    """A function to plan.

    Attributes:
      name: for messages.
      graph: its graph, as a rule not fused: many small operators are what tests of order need.
      samples: arguments (small integers in whatever type) and results by the graph's reference, several times.
    """

    name: str
    graph: Graph
    samples: tuple[tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]], ...]

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        return self.samples[0][0]

    @property
    def expected(self) -> tuple[np.ndarray, ...]:
        return self.samples[0][1]


_FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], tuple[int, ...], bool]] = {}


def _case(*shapes: tuple[int, ...], donated: tuple[int, ...] = (), fused: bool = False) -> Callable[..., Any]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _FUNCTIONS[fn.__name__.strip("_")] = fn, shapes, donated, fused
        return fn

    return register


def names() -> list[str]:
    return sorted(_FUNCTIONS)


@functools.cache
def case(name: str) -> Case:
    fn, shapes, donated, fused = _FUNCTIONS[name]
    args = _arguments(shapes, 0)
    captured = capture(jax.make_jaxpr(fn)(*args))
    assert not captured.consts
    graph = build_graph(captured.jaxpr, donated=frozenset(donated))
    if fused:  # without what nobody reads then
        graph = map_blocks(fuse(graph), lambda block: prune(block, set()))
    samples = [(args, tuple(evaluate(graph, args))) for args in (_arguments(shapes, k) for k in range(SAMPLES))]
    return Case(name, graph, tuple(samples))


SAMPLES = 3


def _arguments(shapes: tuple[tuple[int, ...], ...], sample: int) -> tuple[np.ndarray, ...]:
    """Scalars count the samples, so that every arm of a branch on one is taken."""
    rng = np.random.default_rng(sample)
    return tuple(
        rng.integers(-4, 5, shape).astype(np.float32) if shape else np.array(sample, np.int32) for shape in shapes
    )


@_case((12, 6))
def _chain(x):
    y = x * 2 + 1
    z = y[::-1] - 3
    return z + jnp.roll(y, 5, 0)


@_case((10, 4), (10, 4))
def _diamond(x, y):
    a = x + y
    b = a[::-1] * 2
    c = a.T + 1
    return b + c.T, c


@_case((9, 8))
def _reduction(x):
    top = x.max(axis=1, keepdims=True)
    shifted = x - top
    total = shifted.sum(axis=0)
    return shifted + total, jnp.argmax(x, axis=0), total


@_case((6, 9), (9, 8), (8, 5), (5,))
def _contraction(x, a, b, bias):
    h = jnp.maximum(x @ a, 0)
    return (h @ b) + bias, h.sum()


@_case((8, 6), (3, 6), (), donated=(0,))
def _in_place(cache, rows, at):
    old = cache.sum(axis=0)
    new = lax.dynamic_update_slice(cache, rows + 1, (at, 0))
    return new, new @ rows.T, old


@_case((9, 4), (5, 4), donated=(0,))
def _scatter(x, u):
    i = jnp.arange(5) * 3 % 7
    y = x.at[i].add(u)
    z = (y * 1).at[i[::-1]].multiply(u + 1)
    return z, y[::-1].sum(0)


@_case((12, 5))
def _temporaries(x):
    for k in range(5):
        x = (x[::-1] + k).at[k].set(0) - jnp.roll(x, k, 0)
    return x


@_case((7, 3), (7, 3))
def _carries(a, b):
    def body(_, carry):
        a, b, n = carry
        return b[::-1], a + b, n + 1

    a, b, n = lax.fori_loop(0, 3, body, (a, b, 0))
    return a + n, b


@_case((6, 4), ())
def _while_(x, n):
    def cond(carry):
        x, k = carry
        return (k < 4) & (x.sum() < 1000)

    def body(carry):
        x, k = carry
        return x[::-1] + x.T[k][:, None], k + 1

    return lax.while_loop(cond, body, (x, n - n))


@_case((8, 5), ())
def _choice(x, n):
    y = x + 1
    return lax.switch(n * 0 + 1, [lambda y: y[::-1], lambda y: jnp.cumsum(y, 0) + x, lambda y: y * 0], y) + y


@_case((5, 8), (8,), (8, 6))
def _norm(x, scale, w):
    mean = x.sum(axis=1, keepdims=True)
    y = (x - mean) * scale
    return y @ w, x + y


@_case((6, 7))
def _sorting(x):
    s = jnp.sort(x, axis=1)
    v, i = lax.top_k(x, 3)
    return s[::-1] + jnp.cumsum(x, axis=0), v, i


@_case((5, 6), (3,), donated=(0,))
def _nested(table, steps):
    def outer(i, table):
        def inner(j, table):
            row = table[j] + steps[i]
            picked = lax.cond(row.sum() > 0, lambda r: r[::-1], lambda r: -r, row)
            return table.at[j].set(picked)

        return lax.fori_loop(0, 2, inner, table)[::-1]

    return lax.fori_loop(0, 3, outer, table)


@_case((4, 6), (4, 6))
def _pairs(x, y):
    def join(a, b):
        return a[0] * b[0] % 5, (a[1] + b[1]) % 7

    p, q = lax.reduce((x, y), (np.float32(1), np.float32(0)), join, (1,))
    return p[:, None] + x, q, (x * y).prod(1)


@_case((32, 3), (2, 3), (3, 4), (), donated=(0,), fused=True)
def _window(cache, rows, w, at):
    """The product reads the old rows around the window, and the new ones in it."""
    new = lax.dynamic_update_slice(cache, rows * 2, (at * 13, 0))
    return new, new @ w, new[::-1] @ w[:, :2]


@_case((10, 3), (3,), (), donated=(0,), fused=True)
def _prefix(cache, row, at):
    """One sum ends where the update begins; the other one reads what it overwrites."""
    at = jnp.clip(at * 4, 0, 9)
    i = jnp.arange(10)[:, None]
    below, through = jnp.where(i < at, cache, 0).sum(0), jnp.where(i <= at, cache, 0).sum(0)
    new = cache.at[at].set(row + 1, mode="promise_in_bounds", wrap_negative_indices=False)
    return new, below, through


@_case((9, 3), (4, 3), (), donated=(0,), fused=True)
def _rounds(cache, rows, at):
    """The same in a loop: each round overwrites the row behind those that it reads."""

    def body(i, carry):
        cache, total = carry
        at = jnp.clip(i * 2 + 1, 0, 8)
        before = jnp.where(jnp.arange(9)[:, None] < at, cache, 0)
        new = lax.dynamic_update_slice(cache, rows[i][None] + total, (at, 0))
        return new, total + before.sum(0)

    return lax.fori_loop(at, 4, body, (cache, rows[0]))
