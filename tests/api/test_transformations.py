"""Megakernels under JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk import megakernelize
from tests.api.support import assert_same, integers, operations


def layer(x, w):
    return jnp.maximum(x @ w, 0) - 1


compiled = megakernelize(layer)


@pytest.fixture
def x() -> jax.Array:
    return integers(0, 5, 4)


@pytest.fixture
def w() -> jax.Array:
    return integers(1, 4, 4)


def test_jit(x, w) -> None:
    assert_same(jax.jit(compiled)(x, w), layer(x, w))
    assert_same(jax.jit(lambda x, w: compiled(x + 1, w) * 2)(x, w), layer(x + 1, w) * 2)
    assert operations(jax.jit(compiled).lower(x, w).compile()) == ["custom-call"]


def test_scan_while_cond(x, w) -> None:
    def scanned(f):
        return jax.lax.scan(lambda c, s: (f(c, w) * s, c[0]), x, jnp.arange(-1.0, 2.0))

    def looped(f):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1], w)), (0, x))

    def branched(f):
        return [jax.lax.cond(p, lambda x: f(x, w), lambda x: x, x) for p in (True, False)]

    for use in (scanned, looped, branched):
        assert_same(use(compiled), use(layer))
        assert_same(jax.jit(use, static_argnums=0)(compiled), use(layer))


def test_inside_what_xla_joins_scalars_with(x) -> None:
    """There may be no custom call in there, so XLA gets the function itself."""

    def join(a, b):
        return a + b + a * b

    def join_two(a, b):
        return a[0] + b[0], join(a[1], b[1])

    def uses(join, join_two, double):
        return (
            jax.lax.reduce(x, 0.0, join, (0,)),
            jax.lax.reduce((x, x), (0.0, 0.0), join_two, (1,)),
            jax.lax.reduce_window(x, 0.0, join, (2, 2), (1, 1), "VALID"),
            x.at[1].apply(double),
        )

    expected = uses(join, join_two, lambda v: v * 2)
    compiled = [megakernelize(f) for f in (join, join_two, lambda v: v * 2)]
    assert_same(uses(*compiled), expected)
    assert_same(jax.jit(lambda: uses(*compiled))(), expected)
    assert_same(megakernelize(lambda: uses(*compiled))(), expected)


def test_fori_loop_with_a_predicate_inside() -> None:
    f = megakernelize(lambda x: x + 1 < 10)
    assert_same(jax.lax.while_loop(lambda x: f(x), lambda x: x + 1, 0), jnp.asarray(9))


@pytest.mark.parametrize("axes", [(0, None), (1, None), (None, 0), (0, 0), (1, 2)])
def test_vmap(axes, x, w) -> None:
    def batched(a, axis):
        return a if axis is None else jnp.stack([a, a + 1, a * 2], axis)

    args = [batched(a, axis) for a, axis in zip((x, w), axes, strict=True)]
    expected = jax.vmap(layer, axes)(*args)
    assert_same(jax.vmap(compiled, axes)(*args), expected)
    assert_same(jax.jit(jax.vmap(compiled, axes))(*args), expected)
    assert_same(megakernelize(jax.vmap(layer, axes))(*args), expected)
    assert_same(jax.vmap(compiled, axes, out_axes=1)(*args), jnp.moveaxis(expected, 0, 1))
    # The batched function is one kernel, not a loop of calls.
    found = operations(jax.jit(jax.vmap(compiled, axes)).lower(*args).compile())
    assert found.count("custom-call") == 1 and "while" not in found


def test_vmap_with_a_named_axis(x) -> None:
    def f(x):
        return x - jax.lax.pmax(x, "i") + jax.lax.psum(x, "i") * jax.lax.axis_index("i")

    expected = jax.vmap(f, axis_name="i")(x)
    assert_same(jax.vmap(megakernelize(f), axis_name="i")(x), expected)
    assert_same(jax.jit(jax.vmap(megakernelize(f), axis_name="i"))(x), expected)
    assert_same(megakernelize(jax.vmap(f, axis_name="i"))(x), expected)


def test_keys() -> None:
    def f(key, n):
        key, sub = jax.random.split(jax.random.fold_in(key, n))
        return key, jax.random.bits(sub, (2,))

    compiled = megakernelize(f)
    key, keys, counts = jax.random.key(0), jax.random.split(jax.random.key(1), 3), jnp.arange(3)

    def uses(f):
        return (
            jax.jit(f)(key, 1),
            jax.vmap(f)(keys, counts),
            jax.vmap(f, (None, 0))(key, counts),
            jax.lax.scan(f, key, counts),
            jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (f(*c)[0], c[1] + 1), (key, 0)),
            jax.lax.cond(counts[0] == 0, f, lambda k, n: (k, jnp.zeros(2, jnp.uint32)), key, 1),
        )

    assert_same(uses(compiled), jax.jit(uses, static_argnums=0)(f))
    donated = jax.random.split(key, 3)
    result = megakernelize(lambda k: k.at[0].set(k[1]), donate_argnums=0)(donated)
    assert donated.is_deleted()
    assert_same(result, jax.random.split(key, 3).at[0].set(jax.random.split(key, 3)[1]))
    assert jax.eval_shape(compiled, key, 1)[0].dtype == key.dtype


def test_vmap_of_vmap_and_scan_inside(w) -> None:
    def f(x):
        return jax.lax.scan(lambda c, _: (jnp.minimum(layer(c, w), 50), c[0]), x, None, length=3)

    x = integers(2, 2, 3, 5, 4)
    assert_same(jax.vmap(jax.vmap(megakernelize(f)))(x), jax.vmap(jax.vmap(f))(x))


@jax.custom_batching.custom_vmap
def _alone(x):
    return x + 1


@_alone.def_vmap
def _together(size, batched, x):
    return x + 100, True


@pytest.mark.parametrize("options", [{}, {"on_unsupported": "split"}])
def test_vmap_keeps_rules_of_its_own(options) -> None:
    def fn(x):
        return jax.lax.fori_loop(0, 2, lambda _, y: _alone(y) * 2, x) + _alone(x)

    x = jnp.arange(3.0)
    assert_same(jax.vmap(megakernelize(fn, **options))(x), jax.vmap(fn)(x))
    assert_same(megakernelize(fn, **options)(x), fn(x))


def test_vmap_with_results_that_are_not_batched(x) -> None:
    f = megakernelize(lambda x, y: (x + 1, y + 1))
    assert_same(jax.vmap(f, (0, None), (0, None))(x, 3.0), (x + 1, jnp.asarray(3.0) + 1))


def test_closing_over_tracers(x, w) -> None:
    def outer(x, w):
        return megakernelize(lambda y: layer(y, w) + x)(x * 2)

    expected = layer(x * 2, w) + x
    assert_same(jax.jit(outer)(x, w), expected)
    assert_same(jax.vmap(outer, (0, None))(x, w), jax.vmap(lambda x, w: layer(x * 2, w) + x, (0, None))(x, w))


def test_differentiation_is_refused_clearly(x, w) -> None:
    def loss(f, x):
        return f(x, w).sum()

    for attempt in (
        lambda: jax.grad(lambda x: loss(compiled, x))(x),
        lambda: jax.jit(jax.grad(lambda x: loss(compiled, x)))(x),
        lambda: jax.jvp(lambda x: loss(compiled, x), (x,), (x,)),
        lambda: jax.linearize(lambda x: loss(compiled, x), x),
        lambda: jax.vjp(lambda x: loss(compiled, x), x),
        lambda: jax.jacfwd(lambda x: compiled(x, w))(x),
        lambda: jax.hessian(lambda x: loss(compiled, x))(x),
        lambda: jax.linear_transpose(lambda x: compiled(x, w), x)(x),
        lambda: jax.grad(lambda x: jax.checkpoint(loss, static_argnums=0)(compiled, x))(x),
        lambda: jax.grad(lambda x: jax.lax.scan(lambda c, _: (compiled(c, w), None), x, None, length=2)[0].sum())(x),
        lambda: jax.vmap(jax.grad(lambda row: loss(compiled, row)))(x),
    ):
        with pytest.raises(jax_mpk.DifferentiationError, match=r"megakernelize\(jax\.grad\(f\)\)") as error:
            attempt()
        assert "layer" in str(error.value)
    gradient = megakernelize(jax.grad(lambda x: loss(layer, x)))
    assert_same(gradient(x), jax.grad(lambda x: loss(layer, x))(x))


def test_derivatives_that_are_megakernels_themselves(x, w) -> None:
    @jax.custom_vjp
    def f(x, w):
        return compiled(x, w)

    def backward(saved, g):
        return jax.vjp(layer, *saved)[1](g)

    f.defvjp(lambda x, w: (compiled(x, w), (x, w)), megakernelize(backward))

    def gradient(f):
        return jax.grad(lambda x, w: (f(x, w) * x).sum(), argnums=(0, 1))

    for around in (lambda g: g, jax.jit, megakernelize):
        assert_same(around(gradient(f))(x, w), gradient(layer)(x, w))
    rows = jnp.stack([x, x + 1])
    assert_same(jax.vmap(gradient(f), (0, None))(rows, w), jax.vmap(gradient(layer), (0, None))(rows, w))


def test_differentiation_around_what_has_no_gradient(x, w) -> None:
    tokens = megakernelize(lambda x: jnp.argmax(x, -1))

    def loss(x, pick, f):
        return jnp.take_along_axis(x * x, pick(x)[:, None], 1).sum() + f(jax.lax.stop_gradient(x), w).sum()

    expected = jax.grad(lambda x: loss(x, lambda x: jnp.argmax(x, -1), layer))(x)
    assert_same(jax.grad(lambda x: loss(x, tokens, compiled))(x), expected)


def test_nested_megakernels_are_one(x, w) -> None:
    @megakernelize
    def outer(x, w):
        def body(c, _):
            return jnp.minimum(compiled(c, w), 50), None

        return jax.lax.scan(body, jax.jit(compiled)(compiled(x, w), w), None, length=2)[0]

    expected = layer(jnp.minimum(layer(layer(layer(x, w), w), w), 50), w)
    assert_same(outer(x, w), jnp.minimum(expected, 50))
    assert operations(outer.lower(x, w).compile()) == ["custom-call"]
    assert "megakernel" not in str(outer.lower(x, w).jaxpr)


def test_eval_shape_and_make_jaxpr(x, w) -> None:
    for f in (compiled, jax.jit(compiled)):
        shape = jax.eval_shape(f, x, w)
        assert (shape.shape, shape.dtype) == ((5, 4), jnp.float32)
    assert compiled.eval_shape(x, w).shape == (5, 4)
    jaxpr = jax.make_jaxpr(compiled)(x, w)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["megakernel"]
    assert_same(jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x, w)[0], layer(x, w))
    # Only traced, never compiled.
    assert megakernelize(jnp.linalg.qr).eval_shape(x)[0].shape == (5, 4)


def test_remat_and_custom_derivatives_inside(x, w) -> None:
    @jax.custom_jvp
    def clip(x):
        return jnp.clip(x, -3, 3)

    clip.defjvp(lambda p, t: (clip(*p), t[0]))

    def f(x, w):
        return clip(jax.checkpoint(layer)(x, w)) + jax.nn.relu(x)

    assert_same(megakernelize(f)(x, w), jax.jit(f)(x, w))
    assert_same(jax.checkpoint(compiled)(x, w), layer(x, w))


def test_unused_results_are_not_computed(x, w) -> None:
    both = megakernelize(lambda x, w: (layer(x, w), jnp.sort(x.sum(0))))
    lowered = jax.jit(lambda x, w: both(x, w)[1]).lower(x, w)
    assert lowered.compile().as_text().count(" parameter(") == 1
    assert_same(lowered.compile()(x, w), jnp.sort(x.sum(0)))


def test_disable_jit(x, w) -> None:
    seen = []

    @megakernelize
    def f(x):
        seen.append(x)
        return compiled(x, w)

    with jax.disable_jit():
        assert_same(f(x), layer(x, w))
        assert_same(jax.vmap(compiled, (0, None))(x, w), layer(x, w))
    assert isinstance(seen[0], jax.Array) and not isinstance(seen[0], jax.core.Tracer)


def test_debug_nans() -> None:
    f = megakernelize(lambda x: jnp.log(x))
    with jax.debug_nans(True):
        np.testing.assert_array_equal(f(jnp.ones(3)), np.zeros(3))
        with pytest.raises(FloatingPointError):
            f(-jnp.ones(3))
