"""gather and the scatter family against ``jax.jit``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk import errors
from tests.graph.harness import check, run
from tests.graph.samples import ALL, FLOATS, NUMBERS, exact, wild

pytestmark = pytest.mark.usefixtures("x64")

CLIP = lax.GatherScatterMode.CLIP
FILL = lax.GatherScatterMode.FILL_OR_DROP
PROMISE = lax.GatherScatterMode.PROMISE_IN_BOUNDS
MODES = (CLIP, FILL, PROMISE)

EXTREME_INDICES = {
    "int8": [-128, -1, 0, 5, 6, 127],
    "int16": [-(2**15), -1, 3, 2**15 - 1],
    "int32": [-(2**31), -1, 0, 5, 6, 7, 8, 2**31 - 1],
    "int64": [-(2**63), -(2**32), -1, 2, 6, 2**31 + 1, 2**32, 2**32 + 3, 2**63 - 1],
    "uint8": [0, 5, 6, 255],
    "uint16": [1, 2**16 - 1],
    "uint32": [0, 7, 2**31, 2**32 - 1],
    "uint64": [0, 4, 2**32 + 2, 2**63, 2**64 - 1],
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# -- gather ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["clip", "fill", "wrap"])
def test_take_of_all_types(rng: np.random.Generator, mode: str) -> None:
    index = np.array([[0, 3], [-1, 9], [5, -7]], np.int32)
    arrays = [wild(rng, dtype, (6, 3)) for dtype in ALL]
    check(lambda xs, i: [jnp.take(x, i, axis=0, mode=mode) for x in xs], arrays, index)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gather_index_types(mode: lax.GatherScatterMode) -> None:
    numbers = lax.GatherDimensionNumbers((1,), (), (0,))
    x = np.arange(1, 9, dtype=np.float32)
    indices = [np.array(v, dtype)[:, None] for dtype, v in EXTREME_INDICES.items()]
    check(
        lambda x, several: [lax.gather(x, i, numbers, (3,), mode=mode, fill_value=-9) for i in several],
        x,
        indices,
    )


def _random_gather(rng: np.random.Generator) -> tuple[Any, ...]:
    """An operand, indices and dimension numbers with batching axes, collapsed axes and windows in any place."""
    rank = int(rng.integers(1, 5))
    shape = rng.integers(1, 5, rank)
    roles = rng.choice(["batching", "collapsed", "window"], rank, p=[0.25, 0.35, 0.4])
    batching = [d for d in range(rank) if roles[d] == "batching"]
    collapsed = [d for d in range(rank) if roles[d] == "collapsed"]
    windows = [d for d in range(rank) if roles[d] == "window"]
    sizes = [1 if roles[d] != "window" else int(rng.integers(0, shape[d] + 1)) for d in range(rank)]
    starts = [int(d) for d in rng.permutation(collapsed + [d for d in windows if rng.random() < 0.6])]
    batch_shape = [int(shape[d]) for d in batching] + [int(n) for n in rng.integers(1, 4, rng.integers(0, 3))]
    places = rng.permutation(len(batch_shape))
    batch_shape = [batch_shape[p] for p in np.argsort(places)]
    out_rank = len(batch_shape) + len(windows)
    offset = sorted(int(axis) for axis in rng.choice(out_rank, len(windows), replace=False))
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(offset),
        collapsed_slice_dims=tuple(collapsed),
        start_index_map=tuple(starts),
        operand_batching_dims=tuple(batching),
        start_indices_batching_dims=tuple(int(places[k]) for k in range(len(batching))),
    )
    x = exact(rng, "int32", shape, -99, 99)
    indices = rng.integers(-2, 6, (*batch_shape, len(starts))).astype(np.int32)
    return x, indices, numbers, tuple(sizes)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_random_gathers(rng: np.random.Generator, mode: lax.GatherScatterMode) -> None:
    cases = [_random_gather(rng) for _ in range(40)]

    def fn(arrays: Any) -> Any:
        return [
            lax.gather(x, i, numbers, sizes, mode=mode)
            for (x, i), (_, _, numbers, sizes) in zip(arrays, cases, strict=True)
        ]

    check(fn, [(x, i) for x, i, _, _ in cases])


def test_fill_values(rng: np.random.Generator) -> None:
    index = np.array([1, 99, -1, -99])
    fills = {
        "float32": [0.0, 1.5, np.nan, np.inf],
        "float64": [-0.0],
        "int8": [0, -3],
        "bool": [False, True],
        "bfloat16": [1 / 3],
    }
    arrays = {dtype: wild(rng, dtype, (4,)) for dtype in fills}
    check(
        lambda xs, i: [
            xs[dtype].at[i].get(mode="fill", fill_value=fill) for dtype, values in fills.items() for fill in values
        ],
        jax.tree.map(jnp.asarray, arrays),
        index,
    )


def test_indexing_syntax(rng: np.random.Generator) -> None:
    x = exact(rng, "float32", (5, 4, 3))
    i, j = np.array([[0, 4], [-1, 2]]), np.array([3, -4])

    def fn(x: Any, i: Any, j: Any) -> Any:
        return [
            x[i],
            x[:, j],
            x[i[0], j],
            x[i[0], 1:, j % 3],
            x[:, None, j[0]],
            x[..., j % 3],
            jnp.take_along_axis(x, i[:1, :, None] % 4, axis=1),
            jnp.take_along_axis(x, jnp.argsort(x, axis=2), axis=2),
            jax.vmap(lambda row, k: row[k])(x, i.reshape(-1)[:1].repeat(5) % 4),
        ]

    check(fn, x, i, j)


def test_gather_keys() -> None:
    keys = jax.random.split(jax.random.key(3), (4, 2))

    def fn(keys: Any, i: Any) -> Any:
        picked = [keys[i], keys[1, i % 2], jnp.take(keys, i, axis=0, mode="clip")]
        return [jax.random.key_data(k) for k in picked]

    check(fn, keys, np.array([3, 0, -1, 2]))


def test_empty_gather() -> None:
    check(lambda x, i: [x[i], x[:, i[:0]]], np.ones((3, 2), np.float32), np.zeros((0,), np.int32))


def test_refused_mode() -> None:
    numbers = lax.GatherDimensionNumbers((), (0,), (0,))
    with pytest.raises((errors.UnsupportedPrimitiveError, AssertionError)):
        run(lambda x, i: lax.gather(x, i, numbers, (1,), mode="one_hot"), np.ones(3), np.zeros((2, 1), np.int32))


# -- scatter ---------------------------------------------------------------------------------------------------

SCATTERS = {
    "set": (lax.scatter, ALL),
    "add": (lax.scatter_add, NUMBERS),
    "sub": (lax.scatter_sub, NUMBERS),
    "mul": (lax.scatter_mul, NUMBERS),
    "min": (lax.scatter_min, ALL),
    "max": (lax.scatter_max, ALL),
}


@pytest.mark.parametrize("name", SCATTERS)
def test_scatter_types_and_duplicates(rng: np.random.Generator, name: str) -> None:
    fn, types = SCATTERS[name]
    numbers = lax.ScatterDimensionNumbers((1,), (0,), (0,))
    index = np.array([[2], [0], [2], [-1], [2], [5], [4], [0]], np.int32)
    operands = [(exact(rng, t, (5, 3)), exact(rng, t, (8, 3), -2, 3)) for t in types]
    check(
        lambda pairs, i: [fn(x, i, u, numbers, mode=mode) for x, u in pairs for mode in MODES],
        operands,
        index,
    )


@pytest.mark.parametrize("name", ["min", "max"])
def test_scatter_extremes_of_special_floats(rng: np.random.Generator, name: str) -> None:
    numbers = lax.ScatterDimensionNumbers((), (0,), (0,))
    index = rng.permutation(40)[:, None]
    # Adding 0 turns −0 into +0: which of the two is larger is left open.
    operands = [(wild(rng, t, (40,)) + np.zeros(1, t), wild(rng, t, (40,)) + np.zeros(1, t)) for t in FLOATS]
    check(lambda pairs, i: [SCATTERS[name][0](x, i, u, numbers) for x, u in pairs], operands, index)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_scatter_index_types(mode: lax.GatherScatterMode) -> None:
    numbers = lax.ScatterDimensionNumbers((1,), (), (0,))
    x = np.arange(8, dtype=np.float32)
    indices = [np.array(v, dtype)[:, None] for dtype, v in EXTREME_INDICES.items()]

    def fn(x: Any, several: Any) -> Any:
        updates = [np.arange(100.0, 100 + 3 * len(i), dtype=np.float32).reshape(-1, 3) for i in indices]
        updates = [jnp.asarray(i, jnp.float32) * 0 + u for i, u in zip(several, updates, strict=True)]
        return [lax.scatter(x, i, u, numbers, mode=mode) for i, u in zip(several, updates, strict=True)]

    check(fn, x, indices)


def _random_scatter(rng: np.random.Generator) -> tuple[Any, ...]:
    """A gather's transpose: windows that overlap, in updates of any layout."""
    x, indices, numbers, sizes = _random_gather(rng)
    batch_shape = list(indices.shape[:-1])
    without_window = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [size for d, size in enumerate(sizes) if d not in without_window]
    shape: list[int] = []
    for axis in range(len(batch_shape) + len(window)):
        shape.append(window.pop(0) if axis in numbers.offset_dims else batch_shape.pop(0))
    transposed = lax.ScatterDimensionNumbers(
        update_window_dims=numbers.offset_dims,
        inserted_window_dims=numbers.collapsed_slice_dims,
        scatter_dims_to_operand_dims=numbers.start_index_map,
        operand_batching_dims=numbers.operand_batching_dims,
        scatter_indices_batching_dims=numbers.start_indices_batching_dims,
    )
    return x, indices, exact(rng, "int32", shape, -99, 99), transposed


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", ["set", "add"])
def test_random_scatters(rng: np.random.Generator, name: str, mode: lax.GatherScatterMode) -> None:
    cases = [_random_scatter(rng) for _ in range(30)]
    scatter = SCATTERS[name][0]

    def fn(arrays: Any) -> Any:
        return [scatter(x, i, u, numbers, mode=mode) for (x, i, u), (*_, numbers) in zip(arrays, cases, strict=True)]

    check(fn, [(x, i, u) for x, i, u, _ in cases])


def test_update_syntax(rng: np.random.Generator) -> None:
    x = exact(rng, "float32", (5, 4), 1, 5)
    i, v = np.array([1, 1, -1, 9]), exact(rng, "float32", (4, 4), 1, 3)

    def fn(x: Any, i: Any, v: Any) -> Any:
        at = x.at[i]
        return [
            at.set(v),
            at.add(v),
            at.subtract(v),
            at.multiply(v),
            at.min(v),
            at.max(v),
            at.set(v, mode="clip"),
            at.add(v, unique_indices=False, indices_are_sorted=False),
            x.at[:, i % 4].set(v[:1].T[:1]),
            x.at[1:4, 2].add(1.0),
            x.at[i[:3] % 4].apply(jnp.exp2),
            x.at[i[:1] % 4].power(2),
            x.at[i[:1] % 4].divide(2),
            jax.vmap(lambda row, k, u: row.at[k].add(u))(x[:4], i % 4, v[:, 0]),
        ]

    check(fn, jnp.asarray(x), i, v)


def test_scatter_apply(rng: np.random.Generator) -> None:
    numbers = lax.ScatterDimensionNumbers((), (0,), (0,))
    index = np.array([[0], [3], [3], [9]])
    arrays = [exact(rng, t, (6,)) for t in ("float32", "bfloat16", "int32")]

    def twice_plus_one(x: Any) -> Any:
        return jnp.where(x > 100, x, x * 2 + 1)

    check(
        lambda xs, i: [lax.scatter_apply(x, i, twice_plus_one, numbers, update_shape=(4,), mode=FILL) for x in xs],
        arrays,
        index,
    )


def test_scatter_keys() -> None:
    keys = jax.random.split(jax.random.key(3), 4)
    check(
        lambda keys, i: jax.random.key_data(keys.at[i].set(jax.random.split(keys[0], 2))),
        keys,
        np.array([3, 1]),
    )


def test_empty_scatter() -> None:
    check(
        lambda x, i: [x.at[i].set(1.0), x[:0].at[i].add(1.0), x[:0].at[jnp.array([0, 1])].set(2.0)],
        jnp.ones((3, 2), jnp.float32),
        np.zeros((0,), np.int32),
    )


def test_gradient_of_gather(rng: np.random.Generator) -> None:
    x, i = exact(rng, "float32", (6, 3)), np.array([0, 5, 5, 2, 5, 11])

    def loss(x: Any, i: Any) -> Any:
        return (jnp.take(x, i, axis=0, fill_value=0) ** 2).sum()

    check(lambda x, i: jax.grad(loss)(x, i), x, i)
