"""What indices and predicates say about the elements that an operator reads."""

from __future__ import annotations

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
from jax_mpk.graph.ir import Block, Nest
from jax_mpk.graph.regions import op_touches
from jax_mpk.graph.spans import definitions, op_spans

X = np.zeros((12, 4), np.float32)
#: Positions: of any sign, never negative, and of few bits.
AT, UP, SMALL = np.int32(0), np.uint32(0), np.int8(0)


def reads_of_first(fn: Callable[..., Any], *args: Any, parts: int = 1) -> list[str]:
    """Spans of the reads of the first argument by the last operator that reads it, its first axis cut into parts."""
    graph = fuse(build_graph(capture(jax.make_jaxpr(fn)(*args)).jaxpr))
    known = definitions(graph)
    op = [op for op in graph.block.ops if graph.inputs[0] in op.operands][-1]
    assert isinstance(op, Nest)
    cuts = np.linspace(0, op.space[0], parts + 1).astype(np.int64)
    lo = np.zeros((parts, len(op.space)), np.int64)
    hi = np.tile(np.array(op.space, np.int64), (parts, 1))
    lo[:, 0], hi[:, 0] = cuts[:-1], cuts[1:]
    touches = op_touches(graph, op, lo, hi)
    limits = op_spans(op, lo, hi, known, lambda v: False)
    out = []
    for touch, spans in zip(touches, limits, strict=True):
        if touch.value == graph.inputs[0]:
            which = [()] * parts if spans.which is None else [spans.spans[k] for k in spans.which]
            out += [" and ".join(map(str, some)) for some in which]
    return out


def wide(at: jax.Array) -> jax.Array:
    return at.astype(jnp.int32)


def rows() -> jax.Array:
    return jnp.arange(12)[:, None]


@pytest.mark.parametrize(
    ("fn", "args", "expected"),
    [
        (lambda x, at: lax.dynamic_slice(x, (at, at * 0), (3, 4)) + 1, (UP,), "min(%1, 9) <= i0 < min(%1, 9) + 3"),
        (lambda x, at: jnp.where(rows() < at, x, 0), (AT,), "i0 < %1"),
        (lambda x, at: jnp.where(rows() < at, 0, x), (AT,), "%1 <= i0"),
        (lambda x, at: jnp.where(wide(at) + 2 > rows(), x, 0), (SMALL,), "i0 < %1 + 2"),
        (lambda x, at: jnp.where(rows() == at, x, 0), (AT,), "%1 <= i0 < %1 + 1"),
        (lambda x, at: jnp.where((rows() >= at) & (rows() < 9), x, 0), (AT,), "%1 <= i0"),
        (lambda x, at: jnp.where((rows() < wide(at)) & (rows() < wide(at) * 2), x, 0), (SMALL,), "i0 < min(%1, 2*%1)"),
        (lambda x, at: jnp.where((rows() < at) | (x > 0), x, 0), (AT,), ""),
        (lambda x, at: jnp.where(rows() < at, x, 0) + x, (AT,), ""),
        (
            lambda x, at: jnp.where((rows() >= wide(at)) & (rows() < wide(at) + 3), 0, x),
            (SMALL,),
            "not %1 <= i0 < %1 + 3",
        ),
        (lambda x, at: jnp.where(x[:, :1] < at, x, 0), (np.float32(0),), ""),
        (lambda x, at: jnp.where(rows() % 3 < at, x, 0), (AT,), ""),
        (lambda x, at: jnp.where(rows() * 2 < at, x, 0), (AT,), ""),
    ],
)
def test_reads(fn: Callable[..., Any], args: tuple[Any, ...], expected: str) -> None:
    found = reads_of_first(fn, X, *args)
    if expected:
        assert expected in found
    else:
        assert "" in found


def test_a_box_has_bounds_of_its_own() -> None:
    def fn(x: jax.Array, at: jax.Array) -> jax.Array:
        return lax.dynamic_slice(x, (at, at * 0), (4, 4)) + 1

    found = reads_of_first(fn, X, UP, parts=2)
    assert found == ["min(%1, 8) <= i0 < min(%1, 8) + 2", "min(%1, 8) + 2 <= i0 < min(%1, 8) + 4"]


def test_arithmetic_that_may_wrap_around_is_a_symbol() -> None:
    def fn(x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.where(rows().astype(jnp.int8) < at + jnp.int8(1), x, 0)

    # In s8, 127 + 1 is -128.
    assert reads_of_first(fn, X, SMALL) == ["i0 < add(%1, 1)"]


def test_masks_are_seen_through() -> None:
    def fn(x: jax.Array, y: jax.Array, at: jax.Array) -> tuple[jax.Array, ...]:
        mask = jnp.arange(12) <= at
        return jnp.where(mask[:, None], y, 0), jnp.where(mask[:, None], x, 0), mask

    assert reads_of_first(fn, X, X, UP.astype(np.uint8)) == ["i0 < %2 + 1"]


def test_random_numbers_are_not_followed() -> None:
    def fn(x: jax.Array, key: jax.Array) -> jax.Array:
        at = jax.random.randint(jax.random.wrap_key_data(key), (), 0, 8)
        return lax.dynamic_slice(x, (at, 0), (4, 4)) + 1

    graph = fuse(build_graph(capture(jax.make_jaxpr(fn)(X, np.zeros(2, np.uint32))).jaxpr))
    assert isinstance(graph.block, Block)
    assert all(known.size <= 128 for known in definitions(graph).values())
    assert all(len(text) < 1000 for text in reads_of_first(fn, X, np.zeros(2, np.uint32)))
