"""Loops and branches, nested, against ``jax.jit``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mpk
from jax_mpk.capture import capture
from jax_mpk.errors import UnsupportedPrimitiveError
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.ir import Branch, Loop, walk
from jax_mpk.graph.reference import evaluate
from tests.graph.harness import check, graph_of

X = np.random.default_rng(0).integers(-3, 4, (4, 6)).astype(np.float32)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_scan(length: int, reverse: bool) -> None:
    def fn(x):
        return lax.scan(lambda c, a: (c + a, (c * 2, a.sum())), jnp.ones(6), x, reverse=reverse)

    check(fn, X[:length])


def test_scan_without_slices_or_stacks() -> None:
    check(lambda x: lax.scan(lambda c, _: (c * 2, None), x, None, length=5), X)
    check(lambda x: lax.scan(lambda c, a: (c, a * c), x[0], x), X)
    check(lambda x: lax.scan(lambda _, a: (None, a * 2), None, x), X)
    check(lambda x: lax.scan(lambda c, _: (c, jnp.arange(3)), x, None, length=2), X)


def test_scan_over_several_types() -> None:
    xs = {"f": X, "b": X > 0, "h": X.astype(jnp.bfloat16), "n": X.astype(np.int8)}

    def body(c, a):
        return c + a["f"].sum(), {"all": jnp.where(a["b"], a["f"], c), "h": a["h"] * 2, "n": a["n"][::2]}

    check(lambda xs: lax.scan(body, 0.0, xs), xs)


def test_fori_loop() -> None:
    check(lambda x: lax.fori_loop(0, 5, lambda i, c: c + i, x), X)
    check(lambda x, n: lax.fori_loop(n, 5, lambda i, c: c + i, x), X, np.int32(1))
    check(lambda x, n: lax.fori_loop(7, n, lambda i, c: c + i, x), X, np.int32(1))
    graph, _ = graph_of(lambda x: lax.fori_loop(0, 5, lambda i, c: c + 1, x), X)
    (loop,) = (op for op in graph.block.ops if isinstance(op, Loop))
    assert loop.trips == 5 and len(loop.params) == 1, "an unused counter is not carried"


def test_while() -> None:
    def collatz(n):
        return lax.while_loop(
            lambda c: c[0] != 1,
            lambda c: (jnp.where(c[0] % 2 == 0, c[0] // 2, 3 * c[0] + 1), c[1] + 1),
            (n, 0),
        )

    check(collatz, np.int32(27))
    check(lambda x: lax.while_loop(lambda c: c[0] < x.sum(), lambda c: (c[0] + x.max(), c[1]), (0.0, x)), abs(X))


def test_unchanged_carries_are_not_carried() -> None:
    graph, _ = graph_of(lambda x, y: lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1]), (0, y)), X, X)
    (loop,) = (op for op in graph.block.ops if isinstance(op, Loop))
    assert len(loop.params) == 1 and graph.results[1] == graph.inputs[1]
    check(lambda x, y: lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1]), (0, y)), X, X)


@pytest.mark.parametrize("index", [-1, 0, 1, 2, 3, 100])
def test_switch(index: int) -> None:
    def fn(i, x):
        return lax.switch(i, [lambda x: (x, 1), lambda x: (x * 2, 2), lambda x: (jnp.zeros_like(x), 3)], x)

    check(fn, np.int32(index), X)


def test_cond() -> None:
    for flag in (False, True):
        check(lambda p, x: lax.cond(p, lambda x: x + 1, lambda x: x[::-1], x), flag, X)
        check(lambda p, x: lax.cond(p, lambda: x.sum(), lambda: 0.0), flag, X)
    # A predicate known now leaves no branch behind.
    graph, _ = graph_of(lambda x: lax.switch(1, [lambda x: x, lambda x: x * 2], x), X)
    assert not any(isinstance(op, Branch) for op in graph.block.ops)


def test_nests() -> None:
    def fn(x, n):
        def outer(c, row):
            def inner(i, acc):
                return lax.cond(acc[i] > 0, lambda a: a * 2 + row, lambda a: a - i, acc)

            c = lax.fori_loop(0, n, inner, c)
            _, ys = lax.scan(lambda s, a: (s + a, lax.while_loop(lambda t: t < 3, lambda t: t + 1, s)), 0.0, row)
            return c, (ys, c.sum())

        return lax.scan(outer, jnp.zeros(6), x)

    check(fn, X, np.int32(3))
    graph, _ = graph_of(fn, X, np.int32(3))
    assert sum(isinstance(op, Loop) for op in walk(graph.block)) == 4


def test_loop_over_captured_arrays() -> None:
    table = np.arange(200, dtype=np.float32).reshape(100, 2)

    def fn(x):
        y, _ = lax.scan(lambda c, a: (c + table[3] + jnp.asarray(table).sum(0), None), x, None, length=3)
        z = lax.while_loop(lambda c: (c < table.sum()).all(), lambda c: c + table.sum(0), y)
        return lax.cond(z[0] > 0, lambda v: v + table[0], lambda v: v * jnp.asarray(table)[1], z)

    check(fn, np.ones(2, np.float32))


def test_loops_that_do_nothing() -> None:
    check(lambda x: lax.scan(lambda c, _: (c, None), x, None, length=3), X)
    check(lambda x: lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x, x), X)
    check(lambda x: lax.scan(lambda c, a: (c, c), x, jnp.zeros((3, 0))), X)


def test_vmapped_and_differentiated_loops() -> None:
    check(jax.vmap(lambda x: lax.while_loop(lambda c: c < 3, lambda c: c + 1, x.sum())), X)
    check(jax.vmap(lambda x: lax.cond(x[0] > 0, lambda x: x, lambda x: -x, x)), X)
    check(jax.grad(lambda x: lax.scan(lambda c, a: (c * 2 + a, c.sum()), x[0], x)[1].sum()), X)


def by_platform(x):
    return lax.platform_dependent(x, cpu=jnp.negative, cuda=jnp.square, default=jnp.exp)


def test_branches_by_platform() -> None:
    """The graph is built for one platform, or refused where that is not known and matters."""
    jaxpr = capture(jax.make_jaxpr(by_platform)(X)).jaxpr
    for platform, expected in (("cpu", -X), ("cuda", X * X)):
        np.testing.assert_array_equal(evaluate(build_graph(jaxpr, platform=platform), [X])[0], expected)
    with pytest.raises(UnsupportedPrimitiveError, match="different branches"):
        build_graph(jaxpr)
    check(lambda x: lax.platform_dependent(x, tpu=jnp.sin, default=jnp.negative), X)


def test_megakernels_take_the_branch_of_their_target() -> None:
    np.testing.assert_array_equal(jax_mpk.megakernelize(by_platform)(X), -X)
    np.testing.assert_array_equal(jax_mpk.megakernelize(by_platform, on_unsupported="split")(X), -X)
    np.testing.assert_array_equal(jax.jit(jax_mpk.megakernelize(lambda x: by_platform(x) + 1))(X), 1 - X)
    with pytest.raises(UnsupportedPrimitiveError, match="no branch for cpu"):
        build_graph(
            capture(jax.make_jaxpr(lambda x: lax.platform_dependent(x, cuda=jnp.sin, tpu=jnp.cos))(X)).jaxpr,
            platform="cpu",
        )
