"""Layouts of arguments: what is preferred, and that graphs of permuted arguments compute the same."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Graph
from jax_mpk.graph.layouts import SMALL, Layout, movable, permute_inputs, preferred
from jax_mpk.graph.printer import format_graph
from jax_mpk.graph.reference import evaluate
from jax_mpk.graph.verify import verify_graph
from tests.graph.harness import storage


def array(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    values = np.random.default_rng(len(shape)).integers(-4, 5, shape)
    return values.astype(dtype)


def built(fn: Callable[..., Any], *args: Any, donated: tuple[int, ...] = ()) -> Graph:
    captured = capture(jax.make_jaxpr(fn)(*args))
    assert not captured.consts
    return build_graph(captured.jaxpr, donated=frozenset(donated))


def wish(fn: Callable[..., Any], *args: Any, donated: tuple[int, ...] = ()) -> list[Layout | None]:
    """Preferred layouts; None also for row-major."""
    found = preferred(fuse(built(fn, *args, donated=donated)))
    return [None if layout == tuple(range(len(layout or ()))) else layout for layout in found]


X, W = array(2, 64), array(64, 96)
HEADS, BACK = array(64, 4, 16), array(4, 16, 64)


def test_contracted_axes_come_last() -> None:
    assert wish(lambda x, w: x @ w, X, W) == [None, (1, 0)]
    assert wish(lambda x, w: x @ w.T, X, array(96, 64)) == [None, None]
    assert wish(lambda x, w: jnp.einsum("td,dhk->thk", x, w), X, HEADS) == [None, (1, 2, 0)]
    assert wish(lambda x, w: jnp.einsum("thk,hkd->td", x, w), array(2, 4, 16), BACK) == [None, (2, 0, 1)]
    # One contracted axis last is not enough, and among each other their order is kept.
    assert wish(lambda x, w: jnp.einsum("tab,anb->tn", x, w), array(2, 8, 8), array(8, 32, 8)) == [None, (1, 0, 2)]


def test_batch_axes_come_first() -> None:
    assert wish(lambda x, w: jnp.einsum("etk,ekn->etn", x, w), array(3, 2, 32), array(3, 32, 48)) == [None, (0, 2, 1)]
    assert wish(lambda x, w: jnp.einsum("etk,nek->etn", x, w), array(3, 2, 32), array(48, 3, 32)) == [None, None]


def test_views_are_seen_through() -> None:
    assert wish(lambda x, w: x @ w.reshape(64, 128), X, array(64, 8, 16)) == [None, (1, 2, 0)]
    assert wish(lambda x, w: x @ w[1], X, array(3, 64, 64)) == [None, (0, 2, 1)]
    assert wish(lambda x, w: x @ w.astype(jnp.float32), X, array(64, 96, dtype=jnp.bfloat16)) == [None, (1, 0)]


def test_every_read_votes_with_what_it_touches() -> None:
    def rows(x, w, i):
        return x @ w, w[i]

    assert wish(rows, X, W, np.int32(3)) == [None, (1, 0), None]
    assert wish(lambda x, w: (x @ w, w * 2), X, W) == [None, None]
    # Both ways: row-major stays.
    assert wish(lambda x, y, w: (x @ w, y @ w.T), X, array(2, 96), W) == [None, None, None]


def test_tied_embeddings_stay() -> None:
    def step(x, ids, table):
        return (x + table[ids]) @ table.T

    assert wish(step, X, np.arange(2, dtype=np.int32), array(100, 64)) == [None, None, None]


def test_of_two_arguments_the_larger_one_is_the_weight() -> None:
    assert wish(lambda x, w: x.T @ w, array(64, 32), W) == [None, (1, 0)]


def test_what_is_small_stays() -> None:
    side = int((SMALL // 4) ** 0.5)
    assert wish(lambda x, w: x @ w, array(2, side), array(side, side)) == [None, (1, 0)]
    assert wish(lambda x, w: x @ w, array(2, side), array(side, side - 1)) == [None, None]


IMMOVABLE = {
    "returned": lambda x, w: (x @ w, w),
    "updated": lambda x, w: x @ lax.dynamic_update_slice(w, x[:, :64], (0, 0)),
    "sorted": lambda x, w: (x @ w, lax.sort(w)),
    "carried": lambda x, w: lax.fori_loop(0, 3, lambda i, s: s + s @ s, w),
    "returned by a branch": lambda x, w: lax.cond(x[0, 0] > 0, lambda: w, lambda: w + x[:1] @ w),
}


@pytest.mark.parametrize("how", IMMOVABLE)
def test_arguments_read_whole_stay(how: str) -> None:
    graph = built(IMMOVABLE[how], X, array(64, 64))
    assert movable(graph) == {0}
    with pytest.raises(ValueError, match="can be moved"):
        permute_inputs(graph, [None, (1, 0)])


def test_donated_arguments_stay() -> None:
    assert wish(lambda x, w: x @ w, X, W, donated=(1,)) == [None, None]
    assert movable(built(lambda x, w: x @ w, X, W, donated=(1,))) == {0}


def test_constants_of_loops_move() -> None:
    def step(x, w):
        return lax.fori_loop(0, 3, lambda i, s: jnp.tanh(s @ w), x)

    assert wish(step, X, array(64, 64)) == [None, (1, 0)]


def check(fn: Callable[..., Any], *args: Any, layouts: list[Layout | None]) -> Graph:
    """Asserts that the permuted graph computes the same, before and after fusion."""
    graph = built(fn, *args)
    inputs = [storage(x) for x in args]
    want = evaluate(graph, inputs)
    moved = permute_inputs(graph, layouts)
    there = [x if layout is None else x.transpose(layout) for x, layout in zip(inputs, layouts, strict=True)]
    for candidate in (moved, fuse(moved)):
        verify_graph(candidate)
        assert candidate.layouts == tuple(layouts)
        for a, b in zip(evaluate(candidate, there), want, strict=True):
            np.testing.assert_array_equal(a, b)
    return fuse(moved)


def test_everything_that_loads_follows() -> None:
    def fn(x, w, i):
        table = w * 2
        run = jnp.cumsum(w, 0)
        picked = w[i], lax.dynamic_slice(w, (i, i), (5, 7))
        written = table.at[i].add(w[0])
        windows = lax.reduce_window(w, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID")
        chosen = lax.cond(i > 2, lambda: w.sum(0), lambda: w[3])
        looped = lax.fori_loop(0, i, lambda k, s: s + w[k], w[0])
        return x @ w, run, picked, written, windows, chosen, looped, jnp.sort(w * 1, 1), jnp.argmax(w, 1)

    check(fn, X, W, np.int32(3), layouts=[(1, 0), (1, 0), None])


def test_new_rows_of_a_cache_may_lie_anyhow() -> None:
    def attend(q, cache, rows, pos):
        cache = lax.dynamic_update_slice(cache, rows, (0, pos, 0))
        return jnp.einsum("hd,hsd->hs", q, cache)

    args = array(4, 8), array(4, 32, 8), array(4, 2, 8), np.int32(5)
    for layout in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
        check(attend, *args, layouts=[None, None, layout, None])


def test_printer_shows_layouts() -> None:
    text = format_graph(check(lambda x, w: x @ w, X, W, layouts=[None, (1, 0)]))
    assert re.search(r"%1: f32\[96,64\] axes 1,0 of the argument\n", text)
    assert "%1[i1, r0]" in text


def random_contraction(rng: np.random.Generator) -> tuple[Callable[..., Any], list[np.ndarray]]:
    """A dot_general of whole numbers with random dimension numbers."""
    batch, contracted, *free = rng.integers(0, 3, 4)
    sizes = rng.integers(1, 7, 8)
    names = [[], []]
    for side in (0, 1):
        own = [*range(batch), *range(2, 2 + contracted), *range(4 + 2 * side, 4 + 2 * side + free[side])]
        names[side] = list(rng.permutation(own)) if own else []
    batch_dims = tuple([n.index(d) for d in range(batch)] for n in names)
    contracted_dims = tuple([n.index(d) for d in range(2, 2 + contracted)] for n in names)
    operands = [rng.integers(-4, 5, [sizes[d] for d in n]).astype(np.float32) for n in names]
    return lambda x, y: lax.dot_general(x, y, (contracted_dims, batch_dims)), operands


@pytest.mark.parametrize("seed", range(40))
def test_random_contractions(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_mpk.graph.layouts.SMALL", 0)
    rng = np.random.default_rng(seed)
    fn, operands = random_contraction(rng)
    best = list(preferred(fuse(built(fn, *operands))))
    moved = check(fn, *operands, layouts=best)
    # Nothing is left to wish for.
    assert all(layout is None or layout == tuple(range(len(layout))) for layout in preferred(moved))
    check(fn, *operands, layouts=[tuple(map(int, rng.permutation(x.ndim))) for x in operands])
