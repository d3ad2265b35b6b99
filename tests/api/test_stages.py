"""lower(), the stages it exposes, explain() and stage dumps."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

import jax_mpk
from jax_mpk import config, megakernelize
from tests.api.support import assert_same, integers, operations


def layer(x, w):
    hidden = jax.nn.relu(x @ w)
    return hidden, hidden.sum()


compiled = megakernelize(layer)
X, W = integers(0, 5, 16), integers(1, 16, 8)


def test_behaves_like_lowered() -> None:
    lowered, reference = compiled.lower(X, W), jax.jit(layer).lower(X, W)
    assert isinstance(lowered, jax.stages.Lowered)
    assert lowered.in_tree == reference.in_tree
    assert lowered.out_tree == reference.out_tree
    assert lowered.args_info == reference.args_info
    assert lowered.in_avals == reference.in_avals
    assert lowered.donate_argnums == reference.donate_argnums
    shapes = [(o.shape, o.dtype) for o in jax.tree.leaves(lowered.out_info)]
    assert shapes == [(o.shape, o.dtype) for o in jax.tree.leaves(reference.out_info)]
    assert "jax_mpk_cpu" in lowered.as_text()
    assert "jax_mpk_cpu" in lowered.as_text("hlo")
    assert "jax_mpk_cpu" in str(lowered.compiler_ir())
    assert lowered.cost_analysis() is None or isinstance(lowered.cost_analysis(), dict)


def test_behaves_like_compiled() -> None:
    done, reference = compiled.lower(X, W).compile(), jax.jit(layer).lower(X, W).compile()
    assert isinstance(done, jax.stages.Compiled)
    for _ in range(2):
        assert_same(done(X, W), reference(X, W))
    assert done.in_tree == reference.in_tree and done.out_tree == reference.out_tree
    assert done.in_avals == reference.in_avals
    assert jax.tree.structure(done.input_shardings) == jax.tree.structure(reference.input_shardings)
    assert operations(done) == ["custom-call"]
    assert done.memory_analysis() is not None
    with pytest.raises(TypeError, match="pytree"):
        done(X)
    with pytest.raises(TypeError):
        done(X, W[:, :3])


def test_compiled_and_stored() -> None:
    def f(a, b, x):
        return {"b": b.at[0].set(x[0, 0]), "x": x, "a": a.at[1].set(x[0, 0])}

    compiled = megakernelize(f, donate_argnums=(0, 1)).lower(W, W, X).compile()
    stored = serialize_executable.serialize(compiled)
    again = serialize_executable.deserialize_and_load(*stored, execution_devices=jax.devices()[:1])
    expected = jax.jit(f)(W, W + 1, X)
    assert_same(compiled(W + 0, W + 1, X), expected)
    jax.tree.map(np.testing.assert_array_equal, again(W + 0, W + 1, X), expected)


def test_keywords_static_arguments_and_constants() -> None:
    def f(x, *, w, n):
        return (x @ w + W[0, 0]) * n + W.sum(0)

    lowered = megakernelize(f, static_argnames="n").lower(X, w=W, n=3)
    assert_same(lowered.compile()(X, w=W), jax.jit(f, static_argnames="n")(X, w=W, n=3))
    assert_same(lowered.compile()(X, w=W), f(X, w=W, n=3))


def test_shapes_instead_of_arrays() -> None:
    lowered = compiled.lower(jax.ShapeDtypeStruct((5, 16), jnp.float32), jax.ShapeDtypeStruct((16, 8), jnp.float32))
    assert_same(lowered.compile()(X, W), jax.jit(layer)(X, W))


def test_exposes_every_stage() -> None:
    lowered = compiled.lower(X, W)
    assert "dot_general" in [eqn.primitive.name for eqn in lowered.jaxpr.eqns]
    assert len(lowered.graph.inputs) == 2 and len(lowered.graph.results) == 2
    assert lowered.plan.graph.results and lowered.plan.target.arch == "cpu"
    assert lowered.program.words.size > 0
    assert "dot_general" in lowered.as_text("jaxpr")
    assert "contract" in lowered.as_text("graph")
    for stage in ("graph", "plan", "program"):
        assert len(lowered.as_text(stage)) > 50
    with pytest.raises(ValueError, match="dialect"):
        lowered.as_text("latin")


def test_target_that_is_not_there() -> None:
    lowered = megakernelize(layer, target="h100-sxm").lower(X, W)
    assert lowered.plan.target.workers == 132
    assert "h100" in lowered.as_text("plan")
    with pytest.raises(jax_mpk.TargetError, match="h100-sxm"):
        lowered.compile()


def test_explain() -> None:
    text = compiled.explain(X, W)
    assert text.startswith("layer") and "1 custom call" in text
    for word in ("operator", "task", "phase", "reads", "memory"):
        assert word in text
    assert Path(__file__).name in text
    assert "132 SMs" in megakernelize(layer, target="h100-sxm").explain(X, W)


def test_dumps(tmp_path) -> None:
    folder = tmp_path / "dumps"
    with config.override(dump_to=folder):
        megakernelize(lambda x: x + 1)(X)
        fresh = megakernelize(lambda x, w: layer(x * 2, w))
        fresh.__wrapped__.__name__ = "doubled"
        megakernelize(fresh.__wrapped__).lower(X, W).compile()
        megakernelize(fresh.__wrapped__)(X[:2], W)
    stages = ["1_jaxpr", "2_graph", "3_fused_graph", "4_plan", "5_program", "6_explain"]
    names = [
        f"{number}.{stage}.txt" for number in ("0001__lambda_", "0002_doubled", "0003_doubled") for stage in stages
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert all(path.read_text().strip() for path in folder.iterdir())
    with config.override(dump_to=folder):
        megakernelize(lambda x: x + 2)(X)
    assert len(list(folder.iterdir())) == 24
    assert re.match(r"\d{4}_", min(p.name for p in folder.iterdir()))
    nowhere = next(folder.iterdir()) / "in a file"
    with config.override(dump_to=nowhere), pytest.raises(jax_mpk.ConfigError, match=r"JAX_MPK_DUMP_TO=.*in a file"):
        megakernelize(lambda x: x + 3)(X)


def test_trace() -> None:
    traced = compiled.trace(X, W)
    assert [eqn.primitive.name for eqn in traced.jaxpr.eqns] == ["megakernel"]
    assert_same(traced.lower().compile()(X, W), jax.jit(layer)(X, W))
    # A megakernel of a megakernel has options of its own.
    donating = megakernelize(compiled, donate_argnums=0)
    assert donating.trace(X, W).args_info[0][0].donated and not traced.args_info[0][0].donated
