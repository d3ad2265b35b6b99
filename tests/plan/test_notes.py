"""What explain says about fusions that were considered and refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Graph
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Target
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.report import explain

Array = jax.Array


def graph_of(fn: Callable[..., Any], *shapes: tuple[int, ...] | jax.ShapeDtypeStruct) -> Graph:
    """The fused graph of a function of f32 arrays."""
    avals = [jax.ShapeDtypeStruct(s, jnp.float32) if isinstance(s, tuple) else s for s in shapes]
    return fuse(build_graph(capture(jax.make_jaxpr(fn)(*avals)).jaxpr))


def notes(graph: Graph, target: Target = targets.H100) -> list[str]:
    """Notes of the plan, lines left out."""
    return [re.sub(r"test_notes\.py:\d+ ", "", note) for note in make_plan(graph, target).notes]


def _reversed(x: Array, w: Array) -> Array:
    y = x @ w
    return jnp.tanh(y + y[:, ::-1])


def _twice(x: Array, w: Array) -> tuple[Array, Array]:
    y = x @ w
    return y, jnp.tanh(y)


def _norm(x: Array, w: Array) -> Array:
    return (x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)) @ w


def _scatter(cache: Array, rows: Array, x: Array) -> tuple[Array, Array]:
    cache = cache.at[jnp.array([5, 900])].set(rows)
    return x @ cache, x @ cache.T


def _window(cache: Array, rows: Array, x: Array, at: Array) -> tuple[Array, Array]:
    cache = lax.dynamic_update_slice(cache, rows, (at, 0))
    return x @ cache, x @ cache.T


@pytest.mark.parametrize("target", [targets.cpu(2), targets.H100], ids=lambda t: t.name)
def test_an_epilogue_that_reads_other_elements(target: Target) -> None:
    assert notes(graph_of(_reversed, (1, 2048), (2048, 2048)), target) == [
        "not fused: tanh into the end of dot_general: more than one element of its result is read for one"
    ]


def test_what_a_routine_joined_after_all_is_not_noted() -> None:
    """The graph keeps both operators, as both results are asked for; the same task computes them."""
    graph = graph_of(_twice, (1, 2048), (2048, 2048))
    assert [str(note) for note in graph.notes if "other readers" in str(note)]
    assert notes(graph) == []


def test_a_norm_that_costs_too_much_to_repeat() -> None:
    assert notes(graph_of(_norm, (1, 2048), (2048, 2048))) == []
    assert notes(graph_of(_norm, (2048, 2048), (2048, 2048))) == [
        "not fused: mul into dot_general: a hand-off is faster than computing so much of it in every task that reads it"
    ]


def _conv(x: Array, w: Array) -> Array:
    return lax.conv_general_dilated(jnp.tanh(x), w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def _causal(q: Array, k: Array, v: Array) -> Array:
    seen = jnp.arange(len(q))[:, None] >= jnp.arange(len(k))
    return jax.nn.softmax(jnp.where(seen, q @ k.T, -jnp.inf), -1) @ v


@pytest.mark.parametrize(
    ("fn", "shapes", "target", "handed"),
    [
        pytest.param(_norm, ((16, 2048), (2048, 2048)), targets.H100, True, id="sixteen norms"),
        pytest.param(_norm, ((4, 2048), (2048, 2048)), targets.H100, False, id="four norms"),
        pytest.param(_norm, ((16, 2048), (2048, 2048)), targets.cpu(8), False, id="a CPU"),
        pytest.param(_conv, ((8, 16384, 32), (3, 32, 32)), targets.H100, False, id="parts that barely overlap"),
        pytest.param(_causal, ((512, 64),) * 3, targets.H100, False, id="a mask made of indices"),
    ],
)
def test_large_maps_that_many_tasks_would_repeat_are_handed_over(
    fn: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], target: Target, handed: bool
) -> None:
    found = notes(graph_of(fn, *shapes), target)
    assert any("computing so much of it in every task" in note for note in found) == handed


def _softmax(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.softmax(q @ k.T, -1) @ v


def _softmax_returned(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    weights = jax.nn.softmax(q @ k.T, -1)
    return weights @ v, weights


def _softmax_off_by_one(q: Array, k: Array, v: Array) -> Array:
    scores = q @ k.T
    powers = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    return (powers / (jnp.sum(powers, -1, keepdims=True) + 1)) @ v


def _softmax_of_another_max(q: Array, k: Array, v: Array) -> Array:
    scores = q @ k.T
    powers = jnp.exp(scores - jnp.max(2 * scores, -1, keepdims=True))
    return (powers / jnp.sum(powers, -1, keepdims=True)) @ v


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (_softmax, "attention reads all keys: dot_general: no mask of positions up to a scalar"),
        (_softmax_returned, "not recognised as attention: dot_general: its weights have other readers"),
        (
            _softmax_off_by_one,
            "not recognised as attention: dot_general: no sum over its keys is that of its weights",
        ),
        (
            _softmax_of_another_max,
            "not recognised as attention: dot_general: no max over its keys is that of its weights",
        ),
    ],
)
def test_attention(fn: Callable[..., Any], expected: str) -> None:
    found = notes(graph_of(fn, (8, 64), (1024, 64), (1024, 64)))
    assert [note for note in found if "attention" in note] == [expected]


def test_contractions_that_look_like_no_attention_are_not_noted() -> None:
    assert notes(graph_of(lambda x, w, v: jnp.tanh(x @ w) @ v, (1, 256), (256, 256), (256, 256))) == []


@pytest.mark.parametrize(
    ("fn", "rows", "expected"),
    [
        (_scatter, 2, "scatter by dot_general, which waits for it: it overwrites no window of consecutive rows"),
        (_window, 128, "dynamic_update_slice by dot_general, which waits for it: it overwrites more than 6% of"),
        (_window, 8, None),
    ],
)
def test_updates_that_contractions_wait_for(fn: Callable[..., Any], rows: int, expected: str | None) -> None:
    index = (jax.ShapeDtypeStruct((), jnp.int32),) if fn is _window else ()
    graph = graph_of(fn, (1024, 1024), (rows, 1024), (64, 1024), *index)
    # Contracted over rows and over columns, it cannot be computed by the tasks of both.
    found = [note for note in notes(graph) if "waits for it" in note]
    assert bool(found) == (expected is not None)
    assert all(note.startswith(f"not read around: {expected}") for note in found)


def test_passes_that_run_twice_leave_their_notes_once() -> None:
    graph = graph_of(_reversed, (1, 2048), (2048, 2048))
    assert len(graph.notes) == len(set(graph.notes)) == 1


@pytest.mark.parametrize("layers", [6, 12])
def test_a_deep_model_has_few_lines(layers: int) -> None:
    """Layers say the same; the report counts them."""

    def deep(x: Array, w: Array) -> list[Array]:
        return [_reversed(x + k, w) for k in range(layers)]

    text = explain(make_plan(graph_of(deep, (1, 2048), (2048, 2048)), targets.H100), name="deep", equations=1)
    (line,) = (line for line in text.splitlines() if line.startswith("  note: "))
    assert re.match(r"  note: not fused: test_notes\.py:\d+ tanh into .*: more than one .*\(" + f"{layers} ×", line)
