"""Several devices: eight forced CPU devices, as tests/conftest.py sets them up."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mpk
from jax_mpk import megakernelize
from tests.api.support import assert_same, integers


def layer(x, w):
    return jnp.maximum(x @ w, 0) + x.sum()


compiled = megakernelize(layer)
X, W = integers(0, 16, 4), integers(1, 4, 8)


@pytest.fixture(params=["auto", "explicit"])
def mesh(request) -> jax.sharding.Mesh:
    kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[request.param]
    return jax.make_mesh((8,), ("d",), axis_types=(kind,))


def put(mesh, array, *spec) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def test_shard_map(mesh) -> None:
    def run(f):
        return jax.shard_map(f, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))

    x, w = put(mesh, X, "d"), put(mesh, W)
    expected = np.asarray(jax.jit(run(layer))(x, w))
    np.testing.assert_array_equal(jax.jit(run(compiled))(x, w), expected)
    np.testing.assert_array_equal(run(compiled)(x, w), expected)
    # Each device saw its own two rows.
    np.testing.assert_array_equal(expected[2:4], layer(X[2:4], W))


def test_varying_axes(mesh) -> None:
    @megakernelize
    def f(x, w):
        return x + 1, w * 2, x @ w, jnp.zeros(2)

    def inner(x, w):
        kinds = [jax.typeof(r) for r in f(x, w)]
        for kind, reference in zip(kinds, (x + 1, w * 2, x @ w, jnp.zeros(2)), strict=True):
            assert str(kind) == str(jax.typeof(reference))
        return f(x, w)[:3]

    sharded = jax.shard_map(inner, mesh=mesh, in_specs=(P("d"), P()), out_specs=(P("d"), P(), P("d")))
    results = jax.jit(sharded)(put(mesh, X, "d"), put(mesh, W))
    np.testing.assert_array_equal(results[1], W * 2)


def test_wrong_out_specs_are_refused(mesh) -> None:
    def run(f):
        return jax.shard_map(f, mesh=mesh, in_specs=(P("d"), P()), out_specs=P())

    with pytest.raises(ValueError) as expected:
        jax.jit(run(layer))(put(mesh, X, "d"), put(mesh, W))
    with pytest.raises(ValueError) as actual:
        jax.jit(run(compiled))(put(mesh, X, "d"), put(mesh, W))
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]


def test_keys_and_closed_over_arrays_in_shard_map(mesh) -> None:
    table = integers(2, 4, 700)

    def f(keys, x):
        return jax.random.bits(keys[0], (2,)), x @ table, jax.random.split(keys[0], 2)

    def run(f):
        return jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))

    keys, x = put(mesh, jax.random.split(jax.random.key(3), 8), "d"), put(mesh, X, "d")
    for a, e in zip(run(megakernelize(f))(keys, x), run(f)(keys, x), strict=True):
        assert a.sharding == e.sharding
        read = jax.random.key_data if jax.dtypes.issubdtype(e.dtype, jax.dtypes.prng_key) else np.asarray
        np.testing.assert_array_equal(read(a), read(e))


def test_collectives_are_refused_or_left_to_xla(mesh) -> None:
    def total(x):
        return jax.lax.psum(x * 2, "d") + 1

    def neighbour(x):
        return jax.lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)]) * 2

    def position(x):
        return x + jax.lax.axis_index("d")

    x = put(mesh, X, "d")
    for f, out in ((total, P()), (neighbour, P("d")), (position, P("d"))):

        def run(f, out=out):
            return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=out))

        with pytest.raises(jax_mpk.UnsupportedPrimitiveError, match=r"p(sum|permute)|axis_index") as error:
            run(megakernelize(f))(x)
        assert error.value.line == f"{__file__}:{f.__code__.co_firstlineno + 1}"
        np.testing.assert_array_equal(run(megakernelize(f, on_unsupported="split"))(x), run(f)(x))


def test_shard_map_with_donation_loops_and_vmap(mesh) -> None:
    def step(cache, x):
        return cache.at[0].set(x), cache.sum() + x

    def run(f):
        def body(cache, xs):
            return jax.lax.scan(jax.vmap(f), cache, xs)

        return jax.jit(
            jax.shard_map(body, mesh=mesh, in_specs=(P("d"), P(None, "d")), out_specs=(P("d"), P(None, "d")))
        )

    caches, xs = put(mesh, integers(0, 8, 4), "d"), put(mesh, integers(1, 3, 8), None, "d")
    expected = run(step)(caches, xs)
    actual = run(megakernelize(step, donate_argnums=0))(caches, xs)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def test_many_launches_on_all_devices(mesh) -> None:
    @megakernelize
    def f(x, w):
        return jax.lax.fori_loop(0, 20, lambda _, x: jnp.clip(x @ w, -9, 9), x)

    w = integers(1, 4, 4)
    step = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d")))
    x = put(mesh, X, "d")
    expected = np.asarray(jax.jit(f.__wrapped__)(X, w))
    w = put(mesh, w)
    for _ in range(20):
        result = step(x, w)
    np.testing.assert_array_equal(result, expected)


def test_sharded_arguments_are_refused(mesh) -> None:
    x, w = put(mesh, X, "d"), put(mesh, W)
    for call in (compiled, jax.jit(compiled), jax.jit(lambda x, w: compiled(x * 2, w) + 1)):
        with pytest.raises(jax_mpk.ShardedInputError, match="shard_map"):
            call(x, w)
    with pytest.raises(jax_mpk.ShardedInputError, match="shard_map"):
        compiled.lower(x, w).compile()


def constrained(*spec):
    """Has XLA shard, or gather, an array within a program."""

    def apply(x):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    return apply


shard, gather = constrained("d"), constrained()


def in_shard_map(x):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(lambda x: x + 1, mesh=mesh, in_specs=P("d"), out_specs=P("d"))(x)


def in_a_loop(x, w):
    return jax.lax.fori_loop(0, 2, lambda _, x: compiled(x, w)[:, :4], x)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: compiled(shard(jnp.ones((16, 4))), w),
        lambda x, w: compiled(shard(x * 2), w),
        lambda x, w: jax.jit(compiled)(shard(x), w),
        lambda x, w: in_a_loop(shard(x), w),
        lambda x, w: jax.vmap(compiled, (0, None))(shard(x)[:, None], w),
        lambda x, w: compiled(in_shard_map(x), w),
        lambda x, w: megakernelize(lambda x: x + jnp.linalg.eigvalsh(x.T @ x), on_unsupported="split")(shard(x)),
    ],
)
def test_what_becomes_sharded_is_refused(f, sharded) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x, w = put(mesh, X, "d") if sharded else put(mesh, X), put(mesh, W)
    with pytest.raises(jax_mpk.ShardedInputError, match=r"sharded over 8 devices.*shard_map"):
        jax.jit(f)(x, w)
    with pytest.raises(jax_mpk.ShardedInputError, match=r"sharded over 8 devices.*shard_map"):
        jax.jit(f).lower(x, w).compile()


@pytest.mark.parametrize(
    "f",
    [
        lambda f, s, x, w: f(gather(s), w),
        lambda f, s, x, w: f(gather(s * 2), w) + f(x, w),
        lambda f, s, x, w: f(x, w)[:, :4] + s,
        lambda f, s, x, w: (f(x, w), x + s),
        lambda f, s, x, w: shard(f(x, w)),
        lambda f, s, x, w: f(x * s.sum(), w),
        lambda f, s, x, w: jax.lax.fori_loop(0, 2, lambda _, c: f(gather(c), w)[:, :4], x) + s,
        lambda f, s, x, w: jax.jit(lambda x: f(x, w))(gather(s)),
    ],
)
def test_what_becomes_replicated_works(f) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    s, w = put(mesh, X, "d"), put(mesh, W)
    for x in (X, put(mesh, X)):
        actual = jax.jit(f, static_argnums=0)(compiled, s, x, w)
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(f(layer, X, X, W)), strict=True):
            np.testing.assert_array_equal(a, e)
    program = jax.jit(f, static_argnums=0).lower(compiled, s, x, w).compile().as_text()
    assert "jax_mpk_whole" not in program and "jax_mpk_cpu" in program


def test_exported_for_several_devices(mesh) -> None:
    x, w = put(mesh, X), put(mesh, W)
    f = jax.jit(lambda x, w: compiled(x * 2, w))
    exported = jax.export.export(f, disabled_checks=jax_mpk.export_checks())(x, w)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x, w), layer(X * 2, W))


def test_replicated_and_single_device_arguments_work(mesh) -> None:
    x, w = put(mesh, X), put(mesh, W)
    for call in (compiled, jax.jit(compiled)):
        np.testing.assert_array_equal(call(x, w), layer(X, W))
    there = jax.devices()[5]
    x, w = jax.device_put(X, there), jax.device_put(W, there)
    result = compiled(x, w)
    assert result.devices() == {there}
    assert_same(jax.device_put(result, jax.devices()[0]), jax.jit(layer)(X, W))
    # The same function, back on the first device.
    assert compiled(X, W).devices() == {jax.devices()[0]}


def test_axes_that_are_not_manual_are_refused() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    run = jax.shard_map(compiled, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"})
    with pytest.raises(jax_mpk.ShardedInputError, match="b are not manual"):
        jax.jit(run)(X, W)


def test_different_devices_run_at_the_same_time() -> None:
    f = megakernelize(lambda x: jax.lax.fori_loop(0, 1000, lambda _, x: x * 1.0 + 1.0, x))
    inputs = [jax.device_put(jnp.float32(i), d) for i, d in enumerate(jax.devices())]
    results = [f(x) for x in inputs for _ in range(5)]
    assert [float(r) for r in results[::5]] == [1000.0 + i for i in range(len(inputs))]
