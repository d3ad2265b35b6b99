"""Primitives that move elements, reductions and contractions, against ``jax.jit``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_mpk.errors import UnsupportedPrimitiveError
from jax_mpk.graph.build import refusal
from jax_mpk.graph.ir import Nest, Update
from tests.graph.harness import check, graph_of

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 6)).astype(np.float32)
CUBE = RNG.standard_normal((2, 3, 4)).astype(np.float32)
EMPTY = np.zeros((0, 6), np.float32)


MOVES = {
    "broadcast": lambda x: lax.broadcast_in_dim(x, (2, 4, 3, 6), (1, 3)),
    "broadcast_ones": lambda x: lax.broadcast_in_dim(x[:, :1], (5, 4, 6), (1, 2)),
    "reshape": lambda x: x.reshape(2, 2, 3, 2),
    "reshape_merge": lambda x: x.reshape(24),
    "reshape_ones": lambda x: x.reshape(1, 4, 1, 6, 1),
    "reshape_odd": lambda x: x.reshape(3, 8),
    "reshape_scalar": lambda x: x[:1, :1].reshape(()),
    "reshape_from_scalar": lambda x: x[0, 0].reshape(1, 1),
    "squeeze": lambda x: lax.squeeze(x[:1, :, None], (0, 2)),
    "transpose": lambda x: x.reshape(2, 2, 3, 2).transpose(3, 1, 0, 2),
    "rev": lambda x: lax.rev(x, (1,)),
    "rev_both": lambda x: x[::-1, ::-1],
    "slice": lambda x: lax.slice(x, (1, 0), (4, 5), (2, 3)),
    "slice_empty": lambda x: x[2:2],
    "pad": lambda x: jnp.pad(x, ((1, 2), (0, 3)), constant_values=2.5),
    "pad_zero": lambda x: jnp.pad(x, ((1, 2), (0, 3))),
    "pad_negative": lambda x: lax.pad(x, jnp.float32(1), [(-1, -2, 0), (-2, 1, 0)]),
    "pad_interior": lambda x: lax.pad(x, jnp.float32(1), [(1, -1, 2), (-2, 1, 1)]),
    "pad_value": lambda x: lax.pad(x, x[0, 0], [(1, 0, 0), (0, 1, 1)]),
    "pad_empty": lambda x: lax.pad(x[:0], jnp.float32(3), [(1, 1, 0), (0, 0, 0)]),
    "concatenate": lambda x: jnp.concatenate([x, -x[:1], x[:0], x[1:3]], 0),
    "concatenate_inner": lambda x: jnp.concatenate([x, x[:, :1], x[:, 2:4]], 1),
    "concatenate_bf16": lambda x: jnp.concatenate([x, -x], 1).astype(jnp.bfloat16)[:, 3:],
    "concatenate_bool": lambda x: jnp.concatenate([x > 0, x < 0], 1),
    "stack": lambda x: jnp.stack([x, x * 2, x * 3], 1),
    "split": lambda x: jnp.split(x, 3, 1),
    "split_uneven": lambda x: jnp.split(x, [1, 1, 3], 0),
    "unstack": lambda x: jnp.unstack(x, axis=1),
    "tile": lambda x: jnp.tile(x, (2, 3)),
    "tile_deeper": lambda x: jnp.tile(x, (2, 1, 2)),
    "roll": lambda x: jnp.roll(x, 2, 1),
    "repeat": lambda x: jnp.repeat(x, 3, 0),
    "nothing": lambda x: x,
    "twice": lambda x: (x, x),
    "constant": lambda x: jnp.full((2, 3), 7.0),
    "array_constant": lambda x: x[0, :3] + np.array([1.0, 2.0, 3.0], np.float32),
    "big_array_constant": lambda x: x[0, 0] + np.arange(100.0, dtype=np.float32),
    "ellipsis_index": lambda x: x[1, ..., 2],
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    check(MOVES[name], X)
    check(lambda x: jax.tree.map(lambda y: y, MOVES[name](x.astype(jnp.float32))), X.astype(np.int32))


@pytest.mark.parametrize("start", [-7, -1, 0, 2, 3, 100])
def test_dynamic_slices(start: int) -> None:
    i = np.int32(start)
    check(lambda x, i: lax.dynamic_slice(x, (i, i + 1), (2, 3)), X, i)
    check(lambda x, i: lax.dynamic_update_slice(x, x[:2, :3] * 2, (i, i + 1)), X, i)
    check(lambda x, i: lax.dynamic_slice(x, (i, i * 0), (0, 3)), X, i)
    check(lambda x, i: lax.dynamic_update_slice(x, x[:0], (i, i)), X, i)
    check(lambda x, i: lax.dynamic_index_in_dim(x, i, 1), X, i)
    for t in (np.uint8, np.uint32, np.uint64, np.int8, np.int64):
        i = np.array(start).astype(t)
        check(lambda x, i: lax.dynamic_slice(x, (i, i), (2, 3)), X, i)
        check(lambda x, i: lax.dynamic_update_slice(x, x[:2, :3] * 2, (i, i)), X, i)


def test_update_of_everything_is_the_update() -> None:
    graph, _ = graph_of(lambda x, i: lax.dynamic_update_slice(x, x * 2, (i, i)), X, np.int32(1))
    assert not any(isinstance(op, Update) for op in graph.block.ops)


REDUCED_TYPES = ("float32", "float64", "bfloat16", "float16", "int8", "int32", "uint16", "int64")


@pytest.mark.parametrize("kind", ["sum", "prod", "max", "min"])
@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_reductions(kind: str, axes: tuple[int, ...]) -> None:
    fn = getattr(lax, f"reduce_{kind}_p")
    xs = [RNG.integers(-3, 4, (2, 3, 4)).astype(jnp.dtype(t)) for t in REDUCED_TYPES]

    def reduced(xs):
        return [fn.bind(x, axes=axes, **({"out_sharding": None} if _has_sharding(fn, x, axes) else {})) for x in xs]

    check(reduced, xs)


@pytest.mark.parametrize("fn", [lax.psum, lax.pmax, lax.pmin, lax.pmean])
def test_collectives_over_mapped_axes(fn) -> None:
    """Over an axis of ``jax.vmap`` they are plain reductions."""
    check(jax.vmap(lambda r: fn(r, "b"), axis_name="b"), X, ulps=2)
    check(jax.vmap(lambda r: r - fn(r, "b"), in_axes=1, axis_name="b"), RNG.integers(-3, 4, (3, 4)).astype(np.float32))
    both = jax.vmap(jax.vmap(lambda r: fn((r, r.sum()), ("a", "b")), axis_name="a"), axis_name="b")
    check(both, RNG.integers(-3, 4, (2, 3, 4)).astype(np.float64), ulps=2)
    if fn is not lax.pmean:
        check(jax.vmap(lambda r: fn(r, "b"), axis_name="b"), RNG.integers(-3, 4, (3, 5)).astype(np.int8))


@pytest.mark.parametrize("fn", [lax.psum, lax.pmax, lax.pmin])
def test_collectives_over_devices_are_refused(fn) -> None:
    eqns = jax.make_jaxpr(lambda x: fn(x, "d"), axis_env=[("d", 2)])(X).jaxpr.eqns
    (eqn,) = (eqn for eqn in eqns if eqn.primitive.name.startswith("p"))
    error = refusal(eqn)
    assert isinstance(error, UnsupportedPrimitiveError) and "mesh axes d" in str(error)


def meshes(kind: AxisType) -> list[jax.sharding.Mesh]:
    return [jax.make_mesh((n,), ("d",), axis_types=(kind,), devices=jax.devices()[:n]) for n in (1, 2)]


def test_sharding_constraints() -> None:
    """What would spread an array over devices is refused: one kernel cannot do it, and must not drop it."""
    one, two = meshes(AxisType.Auto)
    devices = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kept = [NamedSharding(one, P("d")), NamedSharding(two, P()), NamedSharding(two, P(None, P.UNCONSTRAINED)), devices]
    for put in (lax.with_sharding_constraint, jax.device_put):
        for sharding in kept:
            if put is lax.with_sharding_constraint or P.UNCONSTRAINED not in getattr(sharding, "spec", ()):
                graph_of(lambda x, s=sharding, put=put: put(x * 2, s), X)
        for spec in (P("d"), P(None, "d"), P(("d",), None)):
            with pytest.raises(UnsupportedPrimitiveError, match="shard_map"):
                graph_of(lambda x, spec=spec, put=put: put(x * 2, NamedSharding(two, spec)), X)
    graph_of(lambda x: jax.device_put(x), X)


def test_resharding() -> None:
    one, two = meshes(AxisType.Explicit)
    with jax.set_mesh(one):
        graph_of(lambda x: jax.sharding.reshard(x, P("d")), X)
    with jax.set_mesh(two):
        graph_of(lambda x: jax.sharding.reshard(x, P()), X)
        with pytest.raises(UnsupportedPrimitiveError, match="shard_map"):
            graph_of(lambda x: jax.sharding.reshard(x, P("d")), X)


def _has_sharding(primitive, x, axes) -> bool:
    """Whether this version's reduction takes ``out_sharding``."""
    name = primitive.name.removeprefix("reduce_")
    eqns = jax.make_jaxpr(lambda x: getattr(lax, f"reduce_{name}")(x, (0,)))(x).jaxpr.eqns
    return "out_sharding" in eqns[0].params


def test_logical_reductions() -> None:
    x = X > 0
    check(lambda x: (x.all(), x.any(0), jnp.max(x, 1), jnp.min(x, 0)), x)
    n = RNG.integers(-100, 100, (4, 6)).astype(np.int32)
    for p in (lax.reduce_and_p, lax.reduce_or_p, lax.reduce_xor_p):
        name = p.name
        check(lambda x, name=name: getattr(lax, name)(x, (1,)), n)
        check(lambda x, name=name: getattr(lax, name)(x, (1,)), x)


def test_reductions_of_nothing() -> None:
    check(lambda x: (x.sum(0), x.prod(0), x.sum(), (x > 0).all(0), (x > 0).any(0), x.sum(1)), EMPTY)
    check(lambda x: (lax.reduce_max(x, (0,)), lax.reduce_min(x, (0,))), EMPTY)
    check(lambda x: (lax.reduce_max(x, (0,)), lax.reduce_min(x, (0,))), EMPTY.astype(np.int16))
    check(lambda x: lax.reduce(x, np.float32(3), lambda a, b: a * b + a, (0,)), EMPTY)


def test_reductions_with_nan() -> None:
    x = X.copy()
    x[1, 2] = x[3, 4] = np.nan
    check(lambda x: (x.max(0), x.min(1), x.max(), jnp.argmax(x, 0), jnp.argmin(x, 1), jnp.argmax(x)), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
def test_arg_reductions(dtype: str) -> None:
    x = RNG.integers(0, 3, (5, 7)).astype(jnp.dtype(dtype))
    check(lambda x: (jnp.argmax(x, 0), jnp.argmin(x, 1), jnp.argmax(x)), x)
    check(lambda x: (lax.argmax(x, 1, jnp.uint8), lax.argmin(x[:, :1], 1, jnp.int64)), x)


def test_sums_of_sixteen_bits_accumulate_in_f32() -> None:
    x = np.full((1000,), 1.0, jnp.bfloat16)
    graph, _ = graph_of(lambda x: lax.reduce_sum(x, (0,)), x)
    assert graph.block.ops[0].acc == ("f32",)
    check(lambda x: jnp.sum(x), x)


def test_generic_reductions() -> None:
    def logaddexp(a, b):
        return jnp.logaddexp(a, b)

    check(lambda x: lax.reduce(x, np.float32(-np.inf), logaddexp, (1,)), X, ulps=8)
    check(lambda x: lax.reduce(x, np.float32(2), lambda a, b: a + b, (0, 1)), np.round(X))
    check(lambda x: lax.reduce(x, np.int32(5), lambda a, b: a ^ b, (0,)), X.astype(np.int32))

    def best(a, b):
        take = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
        return jnp.where(take, b[0], a[0]), jnp.where(take, b[1], a[1])

    position = lax.broadcasted_iota(np.int32, X.shape, 1)
    check(lambda x, i: lax.reduce((x, i), (np.float32(-np.inf), np.int32(99)), best, (1,)), np.round(X), position)


def test_softmax_and_norms() -> None:
    check(lambda x: jax.nn.softmax(x, -1), X, ulps=8)
    check(lambda x: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5), X, ulps=32, atol=1e-6)
    check(lambda x: jax.nn.logsumexp(x, 0), X, ulps=8, atol=1e-6)


DOTS = {
    "matmul": ((4, 5), (5, 3), (((1,), (0,)), ((), ()))),
    "left_transposed": ((5, 4), (5, 3), (((0,), (0,)), ((), ()))),
    "batched": ((2, 4, 5), (2, 5, 3), (((2,), (1,)), ((0,), (0,)))),
    "batch_inside": ((4, 2, 5), (5, 3, 2), (((2,), (0,)), ((1,), (2,)))),
    "two_contracted": ((4, 5, 6), (6, 3, 5), (((1, 2), (2, 0)), ((), ()))),
    "two_batches": ((2, 3, 4, 5), (3, 2, 5, 1), (((3,), (2,)), ((0, 1), (1, 0)))),
    "outer": ((4,), (3,), (((), ()), ((), ()))),
    "inner": ((5,), (5,), (((0,), (0,)), ((), ()))),
    "matvec": ((4, 5), (5,), (((1,), (0,)), ((), ()))),
    "nothing_contracted": ((4, 0), (0, 3), (((1,), (0,)), ((), ()))),
    "no_rows": ((0, 5), (5, 3), (((1,), (0,)), ((), ()))),
    "one_contracted": ((4, 1), (1, 3), (((1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("name", DOTS)
def test_dots(name: str) -> None:
    left, right, dims = DOTS[name]
    for t in ("float32", "bfloat16", "float16", "int8", "int32", "uint8"):
        a, b = (RNG.integers(0, 4, shape).astype(jnp.dtype(t)) for shape in (left, right))
        check(lambda a, b: lax.dot_general(a, b, dims), a, b)


def test_dot_types() -> None:
    a, b = RNG.integers(-3, 4, (4, 5)), RNG.integers(-3, 4, (5, 3))
    dims = (((1,), (0,)), ((), ()))
    for left, right, out in [
        ("bfloat16", "bfloat16", "float32"),
        ("float16", "float16", "float32"),
        ("float32", "float32", "float64"),
        ("int8", "int8", "int32"),
        ("int8", "int8", "int64"),
        ("bfloat16", "float32", None),
        ("int8", "float32", None),
        ("int16", "int32", None),
        ("float64", "float64", None),
    ]:
        x, y = a.astype(jnp.dtype(left)), b.astype(jnp.dtype(right))
        check(lambda x, y, out=out: lax.dot_general(x, y, dims, preferred_element_type=out), x, y)
    check(lambda x, y: lax.dot_general(x, y, dims), a > 0, b > 0)
    check(
        lambda x, y: lax.dot_general(x, y, dims, precision=lax.Precision.HIGHEST),
        *(v.astype(np.float32) for v in (a, b)),
    )


def test_int8_dot_wraps() -> None:
    a = np.full((2, 300), 100, np.int8)
    check(lambda a: lax.dot_general(a, a, (((1,), (1,)), ((), ()))), a)


def test_dot_is_a_contraction_of_plain_loads() -> None:
    graph, _ = graph_of(lambda a, b: a @ b, X.astype(jnp.bfloat16), X.T.astype(jnp.bfloat16))
    (op,) = graph.block.ops
    assert isinstance(op, Nest) and op.kind == "contract" and op.acc == ("f32",)
    assert [op.body.nodes[r].op for r in op.body.results] == ["load", "load"]


def test_attention() -> None:
    q, k, v = (RNG.standard_normal((1, 8, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    check(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), q, k, v, ulps=64, atol=1e-6)


def test_ragged_dot() -> None:
    w = RNG.integers(-2, 3, (3, 6, 5)).astype(np.float32)
    check(lambda x, w, n: lax.ragged_dot(x, w, n), np.round(X), w, np.array([1, 0, 3], np.int32))


def test_reshape_divides_only_where_axes_really_split() -> None:
    x = np.zeros((8, 4, 6, 10), np.float32)
    graph, _ = graph_of(lambda x: x.reshape(8, 24, 2, 5) + 1, x)
    reshape = graph.block.ops[0]
    assert sum(node.op in ("div", "rem") for node in reshape.body.nodes) == 2
    graph, _ = graph_of(lambda x: x.reshape(2, 4, 4, 6, 10) + 1, x)
    assert not any(node.op in ("div", "rem") for node in graph.block.ops[0].body.nodes)
