"""Capture: calls inlined, constants lifted, structure and sources kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mpk
from jax_mpk.capture import Captured, capture, jaxprs
from jax_mpk.capture.inline import CALLS

X = np.array([1.0, -2.0, 3.0, 0.5], np.float32)
TABLE = np.arange(4.0, dtype=np.float32)
OTHER = np.arange(8.0, dtype=np.float32)


def captured(fn, *args) -> Captured:
    out = capture(jax.make_jaxpr(fn)(*args))
    got = jax.core.eval_jaxpr(out.jaxpr, (), *out.consts, *jax.tree.leaves(args))
    for a, b in zip(got, jax.tree.leaves(fn(*args)), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert not out.jaxpr.constvars
    assert len(out.jaxpr.invars) == len(out.consts) + len(jax.tree.leaves(args))
    for jaxpr in all_jaxprs(out.jaxpr):
        for eqn in jaxpr.eqns:
            assert eqn.primitive.name not in CALLS
    return out


def all_jaxprs(jaxpr):
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    opened, consts = jaxprs.open_jaxpr(inner)
                    assert not consts and not opened.constvars, f"{eqn.primitive} keeps constants"
                    yield from all_jaxprs(opened)


def names(jaxpr) -> list[str]:
    return [eqn.primitive.name for eqn in jaxpr.eqns]


def test_calls_are_inlined() -> None:
    @jax.custom_vjp
    def own(x):
        return x * 3

    own.defvjp(lambda x: (own(x), x), lambda res, g: (g * 3,))

    def fn(x):
        y = jax.jit(jax.jit(lambda x: jnp.sin(x) * 2))(x)
        return own(jax.nn.relu(jax.checkpoint(lambda x: jnp.cos(x))(y)))

    out = captured(fn, X)
    assert names(out.jaxpr) == ["sin", "mul", "cos", "max", "mul"]


def test_gradients_are_inlined() -> None:
    def loss(x):
        return jax.checkpoint(lambda x: (jax.nn.silu(x) ** 3).sum())(x)

    captured(jax.grad(loss), X)
    captured(lambda x: jax.jvp(loss, (x,), (x,)), X)
    captured(lambda x: jax.hessian(loss)(x), X)


def test_composites_are_inlined() -> None:
    @functools.partial(lax.composite, name="my.square")
    def square(x):
        return x * x

    assert names(captured(lambda x: square(x) + 1, X).jaxpr) == ["mul", "add"]


def test_primitives_that_hold_a_function_are_written_out() -> None:
    """Those of JAX's "hijax" layer: from 0.12 on, ``searchsorted`` binds one."""

    def fn(x):
        table = jnp.sort(x)
        y = jax.checkpoint(lambda x: jnp.interp(x, table, table * TABLE))(x)
        y = lax.scan(lambda c, _: (c + jnp.searchsorted(table, c), None), y, None, length=2)[0]
        y = lax.cond(y[0] > 0, lambda y: y + jnp.digitize(y, TABLE), lambda y: y, y)
        y = lax.while_loop(lambda y: jnp.searchsorted(table, y[0]) < 4, lambda y: y + 1, y)
        return jax.vmap(lambda v: jnp.searchsorted(table, v, method="sort"))(y[:, None])

    out = captured(fn, X)
    assert not any("hi_primitive" in name for jaxpr in all_jaxprs(out.jaxpr) for name in names(jaxpr))
    sources = [jaxprs.user_line(eqn) for eqn in out.jaxpr.eqns]
    assert all("test_capture.py" in source for source in sources), sources


def test_a_nested_megakernel_is_inlined() -> None:
    nested = jax.extend.core.Primitive("megakernel")
    nested.multiple_results = True
    inner = jax.make_jaxpr(lambda x: x * TABLE)(X)
    nested.def_abstract_eval(lambda *avals, jaxpr: [v.aval for v in jaxpr.jaxpr.outvars])
    out = capture(jax.make_jaxpr(lambda x: nested.bind(x + 1, jaxpr=inner))(X))
    assert names(out.jaxpr) == ["add", "mul"] and len(out.consts) == 1


def test_constants_become_arguments_once() -> None:
    def fn(x):
        return jax.jit(lambda x: x + TABLE)(x) * jax.jit(lambda x: x - TABLE)(x) + OTHER.sum() + jnp.asarray(OTHER)[:4]

    out = captured(fn, X)
    assert len({id(const) for const in out.consts}) == len(out.consts)
    assert sum(np.shape(const) == (4,) for const in out.consts) == 1


def test_scalar_constants_become_literals() -> None:
    scale, host = jnp.float32(2.5), np.float32(3.5)
    out = captured(lambda x: jax.jit(lambda x: x * scale + host)(x), X)
    assert not out.consts
    key = jax.random.key(0)
    out = captured(lambda x: jax.random.fold_in(key, 3), X)
    assert len(out.consts) == 1, "a key is not a scalar"


def test_constants_of_loops_and_branches() -> None:
    array = jnp.asarray(OTHER)

    def fn(x):
        c, ys = lax.scan(lambda c, a: (c + a + TABLE, (c * array[:4])), x, jnp.ones((3, 4)))
        w = lax.while_loop(lambda c: (c < OTHER.sum() + TABLE.max()).all(), lambda c: c + array[4:] + 1, c)
        z = lax.switch(2, [lambda v: v + TABLE, lambda v: v * array[:4], lambda v: v - TABLE * array[1:5]], w)
        deep = lax.fori_loop(0, 2, lambda i, c: lax.cond(c[0] > 0, lambda c: c + TABLE, lambda c: c, c), z)
        return ys, w, z, deep

    out = captured(fn, X)
    assert sorted(np.shape(const) for const in out.consts) == [(4,), (8,)]


def test_constants_of_shard_map() -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("d")

    def fn(x):
        return jax.shard_map(
            lambda x: jax.jit(lambda x: x * TABLE[:2] + lax.psum(x, "d"))(x), mesh=mesh, in_specs=spec, out_specs=spec
        )(x)

    out = captured(fn, X)
    (eqn,) = (e for e in out.jaxpr.eqns if e.primitive.name == "shard_map")
    assert len(eqn.invars) == len(eqn.params["in_specs"])


def test_tracers_of_an_outer_trace() -> None:
    """A function may close over values of the trace that it is captured in."""
    seen = []

    def outer(y, s):
        out = capture(jax.make_jaxpr(lambda x: x * y + s)(X))
        seen.append(out)
        return jax.core.eval_jaxpr(out.jaxpr, (), *out.consts, X)

    (result,) = jax.jit(outer)(TABLE, 2.0)
    np.testing.assert_allclose(result, X * TABLE + 2)
    assert len(seen[0].consts) == 2


def test_dead_code_is_dropped() -> None:
    def fn(x):
        dead = jnp.exp(x) + TABLE

        def body(carry, a):
            kept, unused = carry
            return (kept + a, unused * dead.sum()), unused

        (kept, _), _ = lax.scan(body, (x[0], x[1]), x)
        return kept

    out = captured(fn, X)
    (scan,) = (eqn for eqn in out.jaxpr.eqns if eqn.primitive.name == "scan")
    assert jaxprs.scan_sizes(scan.params)[1] == 1
    assert "exp" not in names(out.jaxpr) and not out.consts
    assert len(out.jaxpr.invars) == 1


def test_marks_of_live_values_are_dropped() -> None:
    def fn(x):
        lax.dce_sink(jnp.sin(x))
        return x + 1

    assert names(captured(fn, X).jaxpr) == ["add"]
    np.testing.assert_array_equal(jax_mpk.megakernelize(fn)(X), X + 1)


def test_arguments_stay_even_if_unused() -> None:
    out = captured(lambda x, y: x, X, X)
    assert len(out.jaxpr.invars) == 2


def test_sources_and_scopes() -> None:
    def fn(x):
        with jax.named_scope("outer"):
            y = jax.nn.silu(x)  # first use of silu

            @jax.jit
            def helper(v):
                with jax.named_scope("inner"):
                    return jnp.sin(v)

            y = helper(y)
            y = jax.nn.silu(y)  # second use
            return lax.scan(lambda c, a: (jnp.cos(c), None), y, None, length=2)[0]

    out = captured(fn, X)
    first = fn.__code__.co_firstlineno
    lines = {}
    for jaxpr in all_jaxprs(out.jaxpr):
        for eqn in jaxpr.eqns:
            file, _, line = jaxprs.user_line(eqn).rpartition(":")
            assert file == __file__
            lines.setdefault(eqn.primitive.name, []).append((int(line) - first, jaxprs.scope(eqn)))
    assert lines["logistic"] == [(2, "outer"), (10, "outer")]
    assert lines["sin"] == [(7, "outer/inner")]
    assert lines["cos"] == [(11, "outer")]


def test_captured_functions_can_be_captured_again() -> None:
    out = captured(lambda x: lax.scan(lambda c, a: (c + TABLE, None), x, None, length=3)[0], X)
    again = capture(jaxprs.close_jaxpr(out.jaxpr))
    assert names(again.jaxpr) == names(out.jaxpr) and not again.consts
    np.testing.assert_array_equal(
        *(jax.core.eval_jaxpr(c.jaxpr, (), *out.consts, X)[0] for c in (out, again)),
    )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys(impl: str) -> None:
    keys = jax.random.split(jax.random.key(1, impl=impl), 4)
    captured(lambda k: k[::-1], keys)
    captured(lambda x: x * jax.random.uniform(jax.random.key(3, impl=impl), (4,)), X)
