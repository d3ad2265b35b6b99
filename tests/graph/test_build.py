"""The graph builder: errors, sources, constants, dead code, decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk import errors
from jax_mpk.capture import capture
from jax_mpk.graph.build import RULES, BlockBuilder, build_graph, decompose, load_rules, refusal, rule
from jax_mpk.graph.ir import Combine, Graph, Nest, Update
from jax_mpk.graph.reference import evaluate
from jax_mpk.graph.scalar import Builder
from jax_mpk.graph.verify import verify_graph
from tests.graph.harness import check, graph_of

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def build(fn, *args):
    return build_graph(capture(jax.make_jaxpr(fn)(*args)).jaxpr)


def test_a_primitive_without_a_rule() -> None:
    def fn(x):
        return jnp.linalg.eigh(x[:3, :3])[0]

    with pytest.raises(errors.UnsupportedPrimitiveError) as caught:
        build(fn, X)
    assert caught.value.primitive == "eigh"
    line = fn.__code__.co_firstlineno + 1
    text = str(caught.value)
    assert f"test_build.py:{line}" in text and "`eigh`" in text and "float32[3,3]" in text
    assert 'on_unsupported="split"' in text
    assert isinstance(caught.value, NotImplementedError | errors.JaxMpkError)


def test_unsupported_types() -> None:
    with pytest.raises(errors.UnsupportedDtypeError, match="complex64"):
        build(lambda x: x * 2, np.zeros(3, np.complex64))
    with pytest.raises(errors.UnsupportedDtypeError, match="complex64"):
        build(lambda x: (x * 1j).real, X)
    with pytest.raises(errors.UnsupportedDtypeError, match="float8_e4m3fn"):
        build(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32), X)
    with pytest.raises(errors.UnsupportedDtypeError, match="int4"):
        build(lambda x: x.astype(jnp.int4).astype(jnp.float32), X)


def test_effects_are_refused() -> None:
    def fn(x):
        jax.debug.print("{}", x)
        return x

    with pytest.raises(errors.UnsupportedPrimitiveError, match="debug"):
        build(fn, X)

    def with_ref(x):
        ref = jax.new_ref(x)
        ref[0, 0] = 1.0
        return ref[...]

    with pytest.raises(errors.UnsupportedPrimitiveError):
        build(with_ref, X)


def test_sources() -> None:
    def fn(x):
        with jax.named_scope("layer"):
            return jnp.sin(x)

    graph = build(fn, X)
    source = graph.block.ops[0].source
    assert source.primitive == "sin" and source.scope == "layer"
    assert source.line.endswith(f"test_build.py:{fn.__code__.co_firstlineno + 2}")


def test_constants_are_folded_into_their_users() -> None:
    graph, _ = graph_of(lambda x: x * 2 + jnp.float32(1) / 4, X)
    assert all(op.operands for op in graph.block.ops)
    graph, _ = graph_of(lambda x: x + jnp.full((3, 4), 2.0), X)
    assert len(graph.block.ops) == 1


def test_values_have_one_name() -> None:
    graph, _ = graph_of(lambda x: (x.reshape(3, 4), x.astype(jnp.float32), jnp.copy(x), x.T.T), X)
    assert len(graph.block.ops) == 2 and graph.results[:3] == graph.inputs * 3


def test_dead_operators_are_dropped() -> None:
    graph, _ = graph_of(lambda x: jnp.split(x, 2, 1)[1], X)
    assert len(graph.block.ops) == 1 and len(graph.values) == 2


def test_donated_positions() -> None:
    jaxpr = capture(jax.make_jaxpr(lambda x, y: x + y)(X, X)).jaxpr
    assert build_graph(jaxpr, donated=frozenset({1})).donated == {1}


def test_zero_size_values_need_no_loads() -> None:
    graph, _ = graph_of(lambda x: (x[:0] * 2, x[:0] @ x.T, jnp.concatenate([x[:0], x])), X)
    for op in graph.block.ops:
        assert not any(0 in graph.values[v].shape for v in op.operands)
    check(lambda x: (x[:0] * 2, x[:0] @ x.T, jnp.concatenate([x[:0], x]), x[:, :0].sum(1)), X)


def test_every_rule_is_registered_once() -> None:
    load_rules()
    with pytest.raises(ValueError, match="already have rules"):
        rule("add")(RULES["add"])


def test_results_are_checked_against_jax(monkeypatch) -> None:
    load_rules()
    monkeypatch.setitem(RULES, "sin", lambda bb, eqn, xs: [bb.constant(0, "f32", (7,))])
    with pytest.raises(errors.GraphVerificationError, match=r"f32\[7\] where JAX says f32\[3, 4\]"):
        build(jnp.sin, X)


def test_errors_in_rules_name_the_equation(monkeypatch) -> None:
    load_rules()
    monkeypatch.setitem(RULES, "sin", lambda bb, eqn, xs: 1 // 0)
    with pytest.raises(ZeroDivisionError) as caught:
        build(lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c), x), X)
    (note,) = caught.value.__notes__
    assert "while lowering sin at" in note and "test_build.py" in note


def test_refusals() -> None:
    jaxpr = capture(
        jax.make_jaxpr(
            lambda x: (jnp.linalg.eigh(x[:3, :3])[0], lax.cond(x[0, 0] > 0, jnp.fft.fft, lambda x: x + 0j, x))
        )(X)
    ).jaxpr
    refused = {eqn.primitive.name: error for eqn in jaxpr.eqns if (error := refusal(eqn))}
    assert {"eigh", "cond"} <= set(refused) and "slice" not in refused


# -- the block builder -----------------------------------------------------------------------------------------


def finish(bb: BlockBuilder, inputs, results) -> Graph:
    graph = Graph(tuple(bb.values), tuple(v.id for v in inputs), bb.block(results))
    verify_graph(graph)
    return graph


def test_decompose_builds_inline_under_one_source() -> None:
    bb = BlockBuilder()
    x = bb.value((3, 4), "f32")
    load_rules()
    (eqn,) = jax.make_jaxpr(jnp.sin)(X).eqns
    (y,) = decompose(bb, eqn, lambda x: jax.nn.relu(x) + np.array([1.0, 2, 3, 4], np.float32), x)
    graph = finish(bb, [x], [y])
    (got,) = evaluate(graph, [X])
    np.testing.assert_array_equal(got, X + [1, 2, 3, 4])
    assert {op.source.line for op in graph.block.ops} == {""}


def test_constant_arrays() -> None:
    bb = BlockBuilder()
    for array in (np.arange(6).reshape(2, 3) - 3, np.array([1.5, np.nan, -0.0], jnp.bfloat16), np.array([True, False])):
        value = bb.constant_array(array)
        (got,) = evaluate(finish(bb, [], [value]), [])
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got.astype(np.float64), array.astype(np.float64))
    assert bb.constant_bits(bb.constant_array(np.full((2, 2), 7, np.int32))) == 7
    with pytest.raises(ValueError, match="not a small constant"):
        bb.constant_array(np.arange(1000))


def test_implicit_rounding() -> None:
    bb = BlockBuilder()
    x = bb.value((4,), "bf16")
    (y,) = bb.map((4,), [x], lambda b, at, load: b.mul(b.compute(load(0, at)), b.const(1.01, "f32")), ["bf16"])
    graph = finish(bb, [x], [y])
    node = graph.block.ops[0].body.result()
    assert (node.op, node.dtype, node.attr) == ("convert", "bf16", "round")
    with pytest.raises(ValueError, match="computes f32 where s32"):
        bb.map((4,), [x], lambda b, at, load: b.compute(load(0, at)), ["s32"])


def test_unused_operands_are_not_read() -> None:
    bb = BlockBuilder()
    x, y, z = (bb.value((4,), "f32") for _ in range(3))
    (out,) = bb.map((4,), [x, y, z, y], lambda b, at, load: b.add(load(3, at), load(2, at)), ["f32"])
    graph = finish(bb, [x, y, z], [out])
    assert graph.block.ops[0].operands == (y.id, z.id)


def test_reductions_over_axes_of_one_are_maps() -> None:
    bb = BlockBuilder()
    x = bb.value((4, 1, 3), "f32")

    def total(rspace, body):
        return bb.reduce((4,), rspace, [x], body, Combine("sum"), ["f32"], ["f32"])[0]

    map_ = total((1,), lambda b, at, load: load(0, [at[0], at[1], b.index(0)]))
    reduce = total((1, 3), lambda b, at, load: load(0, at))
    graph = finish(bb, [x], [map_, reduce])
    assert [op.kind for op in graph.block.ops] == ["map", "reduce"]
    assert graph.block.ops[1].rspace == (3,)


def test_updates_of_nothing() -> None:
    bb = BlockBuilder()
    x = bb.value((4,), "f32")

    def index(b, at, load):
        return [at[0], b.const(True, "b1")]

    out = bb.update(x, (0,), [], index, lambda b, at, load: b.const(0, "f32"), Combine("set"))
    assert out is x
    out = bb.update(x, (2,), [], index, lambda b, at, load: b.const(0, "f32"), Combine("set"))
    assert isinstance(finish(bb, [x], [out]).block.ops[0], Update)


def test_identical_programs_are_simplified() -> None:
    """The arithmetic of reshapes disappears where axes are only regrouped."""
    b = Builder((6, 4))
    row, col = b.coords()
    flat = b.linearize([row, col], (6, 4))
    assert b.delinearize(flat, (6, 4)) == [row, col]
    (i,) = (b := Builder((24,))).coords()
    assert b.floordiv(b.floordiv(i, 2), 3) == b.floordiv(i, 6)
    assert isinstance(build(lambda x: x.reshape(12) + 1, X).block.ops[0], Nest)


def test_index_arithmetic_in_loops() -> None:
    check(lambda x: lax.fori_loop(0, 3, lambda i, c: c.at[i].set(c[i] * i), x), X)
