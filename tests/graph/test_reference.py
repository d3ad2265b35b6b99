"""The NumPy reference box by box, in parts, and at its edges."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.graph import reference
from jax_mpk.graph.ir import Branch, Combine, Graph, Loop, Nest
from jax_mpk.graph.reference import eval_epilogue, eval_op, eval_partial, evaluate, merge
from jax_mpk.graph.scalar import Builder
from tests.graph.harness import graph_of

X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def straight(fn, *args) -> tuple[Graph, dict[int, np.ndarray]]:
    """A graph without loops and the contents of all its values."""
    graph, consts = graph_of(fn, *args)
    env = dict(zip(graph.inputs, [*consts, *args], strict=True))
    reference.run_block(graph, graph.block, env)
    return graph, env


def everything(x, i):
    h = x.astype(jnp.bfloat16)
    return (
        x * 2 + x.T.reshape(4, 6),
        x.sum(0),
        (x > 0).any(1),
        jnp.argmax(x, 1),
        lax.reduce(x, np.float32(-np.inf), jnp.logaddexp, (1,)),
        h @ h.T,
        jnp.einsum("ab,cb,cd->acd", x, x, x),
        lax.dynamic_update_slice(x, x[:2, :2], (i, i)),
        x.at[jnp.array([1, 1, 3, 0, 1])].set(x[jnp.array([0, 1, 2, 3, 2])]),
        x.at[jnp.array([1, 1, 3, 0, 1])].add(x[jnp.array([0, 1, 2, 3, 2])]),
        jnp.cumsum(x, 1),
        lax.cumlogsumexp(x, 0),
        lax.cummax(x, 1, reverse=True),
        jnp.sort(x, 0),
        jnp.argsort(x, 1),
        lax.top_k(x, 3),
        jnp.pad(x, 2),
    )


def test_boxes_agree_with_the_whole() -> None:
    graph, env = straight(everything, X, np.int32(1))
    for op in graph.block.ops:
        assert not isinstance(op, Loop | Branch)
        shape = graph.values[op.outputs[0]].shape
        halves = [[(0, size // 2), (size // 2, size)] for size in shape]
        for box in itertools.product(*halves):
            lo, hi = [a for a, _ in box], [b for _, b in box]
            parts = eval_op(op, lo, hi, env.__getitem__)
            for v, part in zip(op.outputs, parts, strict=True):
                whole = env[v][tuple(slice(a, b) for a, b in box)]
                assert part.dtype == whole.dtype and part.shape == whole.shape
                np.testing.assert_array_equal(part, whole, err_msg=str(op.source))


def test_partial_reductions_merge() -> None:
    graph, env = straight(everything, X, np.int32(1))
    nests = [op for op in graph.block.ops if isinstance(op, Nest) and op.kind != "map"]
    assert {op.combine.kind for op in nests} == {"sum", "or", "argmax", "generic", "dot"}
    for op in nests:
        lo, hi = (0,) * len(op.space), op.space
        zero, (size, *rest) = (0,) * len(op.rspace), op.rspace
        cuts = [0, 1, size // 2, size] if size > 2 else [0, 1, size]
        parts = [
            eval_partial(op, lo, hi, (a, *zero[1:]), (b, *rest), env.__getitem__)
            for a, b in itertools.pairwise(cuts)
            if a < b
        ]
        total = parts[0]
        for part in parts[1:]:
            total = merge(op.combine, total, part)
        for v, got in zip(op.outputs, eval_epilogue(op, lo, hi, total, env.__getitem__), strict=True):
            want = env[v].astype(np.float64)
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=1e-6, err_msg=str(op.source))


def test_chunks(monkeypatch) -> None:
    """Small chunks give the same results as large ones."""
    graph, env = straight(everything, X, np.int32(1))
    monkeypatch.setattr(reference, "_CHUNK", 4)
    for op in graph.block.ops:
        shape = graph.values[op.outputs[0]].shape
        for v, got in zip(op.outputs, eval_op(op, (0,) * len(shape), shape, env.__getitem__), strict=True):
            np.testing.assert_allclose(got.astype(np.float64), env[v].astype(np.float64), rtol=1e-6)


def test_large_contractions_are_fast() -> None:
    a = np.ones((256, 2048), jnp.bfloat16)
    graph, _ = graph_of(lambda a, b: a @ b, a, np.ones((2048, 1024), jnp.bfloat16))
    (out,) = evaluate(graph, [a, np.ones((2048, 1024), jnp.bfloat16)])
    assert out.dtype == jnp.bfloat16 and (out == 2048).all()


def test_contractions_over_axes_that_factors_ignore() -> None:
    b = Builder((2, 3))
    body = b.build(b.load(0, [b.coord(0)], "s32"), b.load(0, [b.coord(0)], "s32"))
    b = Builder((2,))
    op = Nest("contract", (2,), (3,), (0,), (1,), body, Combine("dot"), ("s32",), b.build(b.acc(0, "s32")))
    (out,) = eval_op(op, (0,), (2,), lambda v: np.array([2, 5], np.int32))
    np.testing.assert_array_equal(out, [12, 75])


def test_wrong_inputs() -> None:
    graph, _ = graph_of(lambda x: x + 1, X)
    with pytest.raises(ValueError, match=r"input %0 is f32\[4, 6\], got float64\[4, 6\]"):
        evaluate(graph, [X.astype(np.float64)])


def test_loads_are_checked() -> None:
    b = Builder((4,))
    op = Nest("map", (4,), (), (0,), (1,), b.build(b.load(0, [b.add(b.coord(0), b.index(1))], "f32")))
    with pytest.raises(IndexError, match=r"load at 1\.\.4 of an axis of 4"):
        eval_op(op, (0,), (4,), lambda v: np.zeros(4, np.float32))


def test_integer_sums_wrap() -> None:
    graph, _ = graph_of(lambda x: lax.reduce_sum(x, (0,)), np.full(300, 100, np.int8))
    (out,) = evaluate(graph, [np.full(300, 100, np.int8)])
    assert out == np.array(30000).astype(np.int8)


def test_keys_are_their_words() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    graph, _ = graph_of(lambda k: k[1], keys)
    (out,) = evaluate(graph, [jax.random.key_data(keys)])
    np.testing.assert_array_equal(out, jax.random.key_data(keys[1]))
