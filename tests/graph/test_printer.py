"""Graphs as text."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mpk.graph.printer import format_expr, format_graph, format_op
from jax_mpk.graph.scalar import Builder
from tests.graph.harness import graph_of

X = np.ones((4, 6), np.float32)


def without_comments(text: str) -> str:
    return "\n".join(line.split("  # ")[0] for line in text.splitlines())


def test_expressions() -> None:
    b = Builder((4, 6))
    i, j = b.coords()
    h = b.load(0, [i, j], "f32")
    mean = b.op("div", b.load(1, [i], "f32"), b.const(576, "f32"))
    norm = b.mul(h, b.op("rsqrt", b.add(mean, b.const(1e-5, "f32"))))
    assert format_expr(b.build(norm), ["h", "s"]) == "h[i0, i1] * rsqrt(s[i0] / 576.0 + 1e-05)"
    assert str(b.build(norm)) == "x0[i0, i1] * rsqrt(x1[i0] / 576.0 + 1e-05)"


def test_precedence() -> None:
    b = Builder((4,))
    x, y, z = (b.load(k, [b.coord(0)], "f32") for k in range(3))
    assert str(b.build(b.sub(x, b.sub(y, z)))) == "x0[i0] - (x1[i0] - x2[i0])"
    assert str(b.build(b.mul(b.add(x, y), z))) == "(x0[i0] + x1[i0]) * x2[i0]"
    assert str(b.build(b.op("div", x, b.mul(y, z)))) == "x0[i0] / (x1[i0] * x2[i0])"
    assert str(b.build(b.op("neg", b.add(x, y)))) == "-(x0[i0] + x1[i0])"
    assert str(b.build(b.op("select", b.op("lt", x, y), y, z))) == "where(x0[i0] < x1[i0], x1[i0], x2[i0])"


def test_shared_parts_are_named() -> None:
    b = Builder((4,))
    e = b.op("exp", b.load(0, [b.coord(0)], "f32"))
    assert str(b.build(b.mul(e, e))) == "t0 = exp(x0[i0])\nt0 * t0"


def test_implicit_roundings_are_hidden_and_written_ones_shown() -> None:
    graph, _ = graph_of(lambda x: (x * 2, (x.astype(jnp.float32) * 3).astype(jnp.bfloat16)), X.astype(jnp.bfloat16))
    text = without_comments(format_graph(graph))
    assert "%0[i0, i1] * 2.0" in text and "bf16(%" in text


def test_graphs() -> None:
    def fn(x, i):
        y = jnp.concatenate([x, x], 1)[:, 3:]
        z = lax.scan(lambda c, a: (c + a, None), x[0], x)[0]
        w = lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, z)
        v = lax.cond(i > 0, lambda: w, lambda: w * 2)
        return x @ y, jnp.argmax(x, 1), lax.dynamic_update_slice(x, x[:1], (i, 0)), jnp.sort(x), jnp.cumsum(x, 0), v

    graph, _ = graph_of(fn, X[:, :4], np.int32(1))
    text = format_graph(graph)
    assert text == format_graph(graph_of(fn, X[:, :4], np.int32(1))[0])
    for part in (
        "graph(\n  %0: f32[4,4]\n  %1: s32[]\n):\n",
        "contract dot in f32 over [r0<4] of %0[i0, r0], %",
        "reduce argmax in f32,s64 over [r0<4] of %0[i0, r0] then s32(acc1)",
        "update %0 by set over [i0<1, i1<4] at min(max(s64(%",
        "sort by 1 along axis 1, stable of %0",
        "cumulative sum along axis 0 of %0[i0, i1]",
        "loop 4 times",
        "loop while",
        "    cond:\n",
        "    arm 1:\n",
        "      yield %",
        "test_printer.py:",
    ):
        assert part in text, part
    assert all(len(line) < 240 for line in text.splitlines())


def test_operators_alone_and_donations() -> None:
    graph, _ = graph_of(lambda x: x + 1, X)
    assert without_comments(format_op(graph, graph.block.ops[0])) == "%1: f32[4,6] = map %0[i0, i1] + 1.0"
    from dataclasses import replace

    assert "%0: f32[4,6] donated" in format_graph(replace(graph, donated=frozenset({0}), notes=("so it is",)))


def test_long_expressions_are_broken_up() -> None:
    def fn(x):
        for k in range(12):
            x = jnp.where(x > k, x * k, jnp.sin(x))
        return x

    b = Builder((4,))
    value = b.load(0, [b.coord(0)], "f32")
    for k in range(12):
        value = b.op("atan2", b.op("exp", value), b.load(k + 1, [b.coord(0)], "f32"))
    lines = str(b.build(value)).splitlines()
    assert len(lines) > 1 and all(len(line) < 140 for line in lines)
    assert jax.tree.leaves(fn(X)) is not None
