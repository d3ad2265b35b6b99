"""Reductions over windows and convolutions against ``jax.jit``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.graph.ir import Nest, walk
from tests.graph.harness import check, graph_of
from tests.graph.samples import ALL, FLOATS, INTS, NUMBERS, exact

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def _random_windows(rng: np.random.Generator, rank: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """An operand's shape and windows with any stride, padding (also cut-offs) and dilation."""
    while True:
        shape = tuple(int(n) for n in rng.integers(1, 8, rank))
        window = {
            "window_dimensions": tuple(int(n) for n in rng.integers(1, 4, rank)),
            "window_strides": tuple(int(n) for n in rng.integers(1, 4, rank)),
            "padding": tuple((int(a), int(b)) for a, b in rng.integers(-1, 4, (rank, 2))),
            "base_dilation": tuple(int(n) for n in rng.choice([1, 1, 2, 3], rank)),
            "window_dilation": tuple(int(n) for n in rng.choice([1, 1, 2], rank)),
        }
        padded = [
            (n - 1) * d + 1 + sum(p) for n, d, p in zip(shape, window["base_dilation"], window["padding"], strict=True)
        ]
        if min(padded, default=0) >= 0:
            return shape, window


MONOIDS = {
    "sum": (lax.add, 0, NUMBERS),
    "max": (lax.max, -np.inf, ALL),
    "min": (lax.min, np.inf, ALL),
    "product": (lax.mul, 1, NUMBERS),
}


def _init(value: float, dtype: str) -> Any:
    if np.isinf(value) and dtype not in FLOATS:
        info = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        value = info[int(value > 0)]
    return np.asarray(value).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("name", MONOIDS)
def test_types(rng: np.random.Generator, name: str) -> None:
    op, init, types = MONOIDS[name]
    arrays = [exact(rng, dtype, (5, 6), -2, 3) for dtype in types]
    check(
        lambda xs: [lax.reduce_window(x, _init(init, t), op, (2, 3), (2, 1), "SAME") for t, x in zip(types, xs)],
        arrays,
    )


@pytest.mark.parametrize("name", MONOIDS)
def test_random_windows(rng: np.random.Generator, name: str) -> None:
    op, init, _ = MONOIDS[name]
    cases = [_random_windows(rng, int(rng.integers(1, 4))) for _ in range(25)]
    arrays = [exact(rng, "float32", shape, -2, 3) for shape, _ in cases]
    check(
        lambda xs: [
            lax.reduce_window(x, np.float32(init), op, **window) for x, (_, window) in zip(xs, cases, strict=True)
        ],
        arrays,
    )


def test_initial_value_counts_once(rng: np.random.Generator) -> None:
    """Also where it is no identity: padding does not take part."""
    x, start = exact(rng, "float32", (7,)), np.float32(10)

    def squares(a: Any, b: Any) -> Any:
        return jnp.sqrt(a * a + b * b)

    def fn(x: Any, start: Any) -> Any:
        pads = [(3, 3)]
        return [
            lax.reduce_window(x, start, lax.add, (3,), (1,), "SAME"),
            lax.reduce_window(x, start, lax.add, (3,), (2,), pads, base_dilation=(2,)),
            lax.reduce_window(x, start, lax.mul, (2,), (1,), pads),
            lax.reduce_window(x, start, lambda a, b: jnp.maximum(b, a), (2,), (1,), pads),
            lax.reduce_window(x, np.float32(-3), lax.max, (2,), (1,), pads),
        ]

    check(fn, x, start)
    check(
        lambda x, start: [lax.reduce_window(x, start, squares, (2,), (1,), p) for p in ("SAME", "VALID", [(3, 2)])],
        x,
        start,
        ulps=2,
    )


def test_several_operands(rng: np.random.Generator) -> None:
    """The largest element of a window and where it is."""
    x = rng.permutation(42).reshape(6, 7).astype(np.float32)

    def larger(a: Any, b: Any) -> Any:
        first = a[0] >= b[0]
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])

    def fn(x: Any) -> Any:
        position = lax.iota(jnp.int32, 42).reshape(6, 7)
        init = (np.float32(-np.inf), np.int32(-1))
        return [lax.reduce_window((x, position), init, larger, (3, 2), (2, 2), p) for p in ("SAME", "VALID")]

    check(fn, x)


@pytest.mark.parametrize("op", [lax.max, lax.min], ids=["max", "min"])
def test_pooling_gradient(rng: np.random.Generator, op: Any) -> None:
    """select_and_scatter_add and, for the derivative of that, select_and_gather_add; windows tie and overlap."""
    x = exact(rng, "float32", (2, 7, 6), -2, 3)
    init = np.float32(-np.inf if op is lax.max else np.inf)

    def pool(x: Any, padding: Any, strides: Any) -> Any:
        return lax.reduce_window(x, init, op, (1, 3, 2), strides, padding)

    def fn(x: Any) -> Any:
        out = []
        for padding in ("VALID", "SAME", [(0, 0), (2, 1), (1, 0)]):
            for strides in ((1, 2, 2), (1, 1, 1)):
                y, pull = jax.vjp(lambda x, p=padding, s=strides: pool(x, p, s), x)
                out += pull(jnp.arange(1.0, 1 + y.size, dtype=y.dtype).reshape(y.shape))
                out.append(jax.jvp(lambda x, p=padding, s=strides: pool(x, p, s), (x,), (x * x,))[1])
        return out

    check(fn, x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_pooling_gradient_types(rng: np.random.Generator, dtype: str) -> None:
    x = exact(rng, dtype, (4, 6))
    init = np.asarray(-np.inf).astype(x.dtype)

    def loss(x: Any) -> Any:
        return lax.reduce_window(x, init, lax.max, (2, 3), (2, 3), "VALID").sum()

    check(jax.grad(loss), x)


def _random_conv(rng: np.random.Generator, grouped: str) -> tuple[Any, ...]:
    spatial = int(rng.integers(0, 4))
    groups = int(rng.integers(2, 4)) if grouped else 1
    features, batch = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    size, window = _random_windows(rng, spatial)
    lhs = [batch * (groups if grouped == "batch" else 1), features * (groups if grouped == "feature" else 1), *size]
    rhs = [int(rng.integers(1, 3)) * groups, features, *window["window_dimensions"]]
    specs = [tuple(int(p) for p in rng.permutation(spatial + 2)) for _ in range(3)]
    place = [
        tuple(extents[spec.index(axis)] for axis in range(spatial + 2)) for extents, spec in zip((lhs, rhs), specs)
    ]
    params = {
        "window_strides": window["window_strides"],
        "padding": window["padding"],
        "lhs_dilation": window["base_dilation"],
        "rhs_dilation": window["window_dilation"],
        "dimension_numbers": lax.ConvDimensionNumbers(*specs),
        "feature_group_count": groups if grouped == "feature" else 1,
        "batch_group_count": groups if grouped == "batch" else 1,
    }
    return exact(rng, "float32", place[0]), exact(rng, "float32", place[1]), params


@pytest.mark.parametrize("grouped", ["", "feature", "batch"])
def test_random_convolutions(rng: np.random.Generator, grouped: str) -> None:
    cases = [_random_conv(rng, grouped) for _ in range(25)]
    check(
        lambda pairs: [
            lax.conv_general_dilated(x, w, **params) for (x, w), (_, _, params) in zip(pairs, cases, strict=True)
        ],
        [(x, w) for x, w, _ in cases],
    )


def test_convolution_types(rng: np.random.Generator) -> None:
    pairs = [(exact(rng, t, (2, 3, 6), -2, 3), exact(rng, t, (4, 3, 3), -2, 3)) for t in NUMBERS]
    pairs.append((rng.random((2, 3, 6)) < 0.3, rng.random((4, 3, 3)) < 0.3))
    check(lambda pairs: [lax.conv(x, w, (1,), padding) for x, w in pairs for padding in ("SAME", "VALID")], pairs)


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [("int8", "int32"), ("uint8", "uint32"), ("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64")],
)
def test_preferred_type(rng: np.random.Generator, dtype: str, wider: str) -> None:
    high = 127 if dtype in INTS else 3
    x, w = exact(rng, dtype, (1, 8, 9), -high, high), exact(rng, dtype, (2, 8, 3), -high, high)
    check(lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME", preferred_element_type=jnp.dtype(wider)), x, w)


def test_rounded_convolution(rng: np.random.Generator) -> None:
    x, w = rng.normal(size=(2, 5, 8, 8)), rng.normal(size=(6, 5, 3, 3))
    for dtype, atol in (("float64", 1e-13), ("float32", 2e-5), ("bfloat16", 0.13), ("float16", 2e-2)):
        a, b = x.astype(jnp.dtype(dtype)), w.astype(jnp.dtype(dtype))
        check(lambda x, w: lax.conv(x, w, (2, 1), "SAME"), a, b, ulps=4, atol=atol)


def test_convolution_gradients(rng: np.random.Generator) -> None:
    x, w = exact(rng, "float32", (2, 9, 8, 4)), exact(rng, "float32", (3, 2, 2, 6))
    numbers = ("NHWC", "HWIO", "NHWC")

    def conv(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x, w, (2, 1), "SAME", dimension_numbers=numbers, rhs_dilation=(1, 2), feature_group_count=2
        )

    def fn(x: Any, w: Any) -> Any:
        y, pull = jax.vjp(conv, x, w)
        return [y, *pull(y)]

    check(fn, x, w)


def test_numpy_functions(rng: np.random.Generator) -> None:
    x, y = exact(rng, "float32", (12,)), exact(rng, "float32", (4,))
    image, kernel = exact(rng, "float32", (1, 5, 6, 3)), exact(rng, "float32", (3, 3, 3, 2))

    def fn(x: Any, y: Any, image: Any, kernel: Any) -> Any:
        return [
            jnp.convolve(x, y),
            jnp.correlate(x, y, mode="same"),
            lax.conv_transpose(image, kernel, (2, 2), "SAME"),
            jax.vmap(lambda x: jnp.convolve(x, y, mode="valid"))(x.reshape(2, 6)),
        ]

    check(fn, x, y, image, kernel)


def test_plain_convolution_is_a_contraction() -> None:
    def patches(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(x, w, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    graph, _ = graph_of(patches, np.zeros((2, 16, 16, 3), np.float32), np.zeros((4, 4, 3, 8), np.float32))
    (op,) = walk(graph.block)
    assert isinstance(op, Nest)
    assert (op.kind, op.rspace) == ("contract", (3, 4, 4))


def test_inside_windows_read_without_conditions() -> None:
    graph, _ = graph_of(lambda x: lax.reduce_window(x, 0.0, lax.add, (3,), (2,), "VALID"), np.zeros((9,), np.float32))
    (op,) = walk(graph.block)
    assert isinstance(op, Nest)
    assert [op.body.nodes[i].op for i in op.body.loads()] == ["load"]
