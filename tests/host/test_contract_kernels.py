"""The CPU executor's matrix kernels against NumPy, for every instruction set that this CPU has.

Values are small integers wherever sums must agree bit for bit: every order of adding them is then exact.
"""

import ctypes
import itertools
import mmap
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from jax_mpk import _native

ISAS = _native.contract_isas()
DTYPES = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f64": np.dtype(np.float64),
    "s32": np.dtype(np.int32),
    "s8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
COMBINATIONS = [
    *[(lhs, rhs, "f32") for lhs, rhs in itertools.product(("f32", "bf16", "f16"), repeat=2)],
    ("f64", "f64", "f64"),
    *[(lhs, rhs, "s32") for lhs, rhs in itertools.product(("s32", "s8", "u8"), repeat=2)],
]
# b, m, n, k around the sizes where kernels change: vectors, blocks, panels, chains, steps.
SIZES = [
    (1, 1, 1, 1),
    (1, 1, 64, 16),
    (2, 1, 130, 300),
    (1, 1, 1541, 37),
    (1, 2, 288, 256),
    (1, 3, 97, 257),
    (3, 4, 33, 64),
    (1, 5, 520, 19),
    (1, 7, 70, 515),
    (2, 8, 31, 100),
    (1, 9, 9, 9),
    (1, 14, 32, 40),
    (1, 15, 67, 129),
    (2, 16, 48, 31),
    (1, 29, 530, 270),
    (1, 200, 1, 65),
    (1, 97, 3, 300),
    (1, 130, 5, 4),
    (1, 6, 6, 2100),
    (1, 3, 2, 4133),
]
# Positions of (batch, row, k) in memory, outermost first.
ORDERS = ["brk", "bkr", "rbk", "krb"]


def allocate(sizes: dict[str, int], order: str, dtype, pad=(0, 0), gap=1, filler=None) -> np.ndarray:
    """An array whose axes are laid out in `order`, with room between rows and between elements."""
    shape = [sizes[axis] + p for axis, p in zip(order, (0, *pad))]
    shape[-1] *= gap
    base = np.empty(shape, dtype)
    if filler is not None:
        base[...] = filler
    view = base[tuple(slice(0, sizes[axis]) for axis in order[:-1])]
    view = view[..., : sizes[order[-1]] * gap : gap]
    names = "".join(sizes)
    return view.transpose([order.index(axis) for axis in names])


def strides(array: np.ndarray) -> list[int]:
    assert all(stride % array.itemsize == 0 for stride in array.strides)
    return [stride // array.itemsize for stride in array.strides]


def contract(lhs, rhs, acc, accumulate=False, isa="") -> bool:
    b, m, n = acc.shape
    k = lhs.shape[2]
    assert lhs.shape == (b, m, k) and rhs.shape == (b, n, k)
    return _native.contract_tile(
        [NAMES[lhs.dtype], NAMES[rhs.dtype], NAMES[acc.dtype]],
        [lhs.ctypes.data, rhs.ctypes.data, acc.ctypes.data],
        [b, m, n, k],
        strides(lhs),
        strides(rhs),
        strides(acc),
        accumulate,
        isa,
    )


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int64 if array.dtype.kind in "iu" else np.float64)


def reference(lhs, rhs) -> np.ndarray:
    return np.einsum("bmk,bnk->bmn", wide(lhs), wide(rhs))


def fill(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    low = 0 if array.dtype == np.uint8 else -4
    array[...] = rng.integers(low, 5, array.shape)
    return array


def operands(size, types, rng, lhs_order="brk", rhs_order="brk", acc_order="brk", **room):
    b, m, n, k = size
    lhs = fill(allocate({"b": b, "r": m, "k": k}, lhs_order, DTYPES[types[0]], **room), rng)
    rhs = fill(allocate({"b": b, "r": n, "k": k}, rhs_order, DTYPES[types[1]], **room), rng)
    # acc: its rows are m (r) and its columns n (k).
    acc = fill(allocate({"b": b, "r": m, "k": n}, acc_order, DTYPES[types[2]], **room), rng)
    return lhs, rhs, acc


def check(lhs, rhs, acc, accumulate, isa) -> None:
    expected = reference(lhs, rhs) + (wide(acc) if accumulate else 0)
    assert contract(lhs, rhs, acc, accumulate, isa)
    np.testing.assert_array_equal(wide(acc), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_sizes_and_layouts(size, isa) -> None:
    rng = np.random.default_rng(sum(size))
    for types in [("f32",) * 3, ("bf16", "bf16", "f32"), ("f64",) * 3, ("s32",) * 3]:
        for lhs_order, rhs_order in itertools.product(ORDERS[:2], ORDERS):
            for acc_order in ORDERS[:2]:
                arrays = operands(size, types, rng, lhs_order, rhs_order, acc_order)
                check(*arrays, bool(rng.integers(2)), isa)


@pytest.mark.parametrize("types", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("isa", ISAS)
def test_types(types, isa) -> None:
    rng = np.random.default_rng(1)
    for size in [(1, 1, 97, 70), (1, 8, 64, 33), (2, 3, 40, 300), (1, 20, 45, 61), (1, 75, 2, 90)]:
        for lhs_order, rhs_order in itertools.product(ORDERS[:2], repeat=2):
            for accumulate in (False, True):
                check(*operands(size, types, rng, lhs_order, rhs_order), accumulate, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_random_strides(isa) -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        size = tuple(int(s) for s in rng.integers(1, [3, 20, 80, 90]))
        orders = rng.choice(ORDERS, 3)
        pad = tuple(int(p) for p in rng.integers(0, 4, 2))
        gap = int(rng.choice([1, 1, 2, 3]))
        types = COMBINATIONS[rng.integers(len(COMBINATIONS))]
        lhs, rhs, acc = operands(size, types, rng, *orders, pad=pad, gap=gap)
        if rng.integers(2):
            lhs = lhs[:, ::-1]
        if rng.integers(2):
            rhs = rhs[:, :, ::-1] if rng.integers(2) else rhs[:, ::-1]
            lhs = lhs[:, :, ::-1]
        check(lhs, rhs, acc, bool(rng.integers(2)), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_broadcast_operands(isa) -> None:
    rng = np.random.default_rng(3)
    for b, m, n, k in [(3, 2, 50, 40), (2, 18, 40, 20), (2, 30, 1, 33)]:
        lhs, rhs, acc = operands((b, m, n, k), ("f32",) * 3, rng)
        check(np.broadcast_to(lhs[:1], lhs.shape), rhs, acc, False, isa)
        check(lhs, np.broadcast_to(rhs[:1, :1], rhs.shape), acc, False, isa)
        check(lhs, np.broadcast_to(rhs[..., :1], rhs.shape), acc, True, isa)
        check(np.broadcast_to(lhs[..., :1], lhs.shape), rhs, acc, True, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_writes_only_its_elements(isa) -> None:
    rng = np.random.default_rng(4)
    canary = -77
    for b, m, n, k in SIZES:
        for order, gap in itertools.product(ORDERS, (1, 2)):
            sizes = {"b": b, "r": m, "k": n}
            lhs, rhs, _ = operands((b, m, n, k), ("f32",) * 3, rng, "brk", rng.choice(ORDERS))
            shape = [sizes[axis] + 6 for axis in order]
            base = np.full((*shape[:2], shape[2] * gap), canary, np.float32)
            index = [slice(3, 3 + sizes[axis]) for axis in order]
            index[2] = slice(3, 3 + sizes[order[2]] * gap, gap)
            acc = base[tuple(index)].transpose([order.index(axis) for axis in "brk"])
            check(lhs, rhs, acc, False, isa)
            base[tuple(index)] = canary
            assert (base == canary).all()


class Guarded:
    """Memory between two pages that must not be touched."""

    def __init__(self, nbytes: int) -> None:
        page = mmap.PAGESIZE
        self.room = -(-max(nbytes, 1) // page) * page
        self.map = mmap.mmap(-1, self.room + 2 * page)
        self.handle = ctypes.c_char.from_buffer(self.map)
        self.start = ctypes.addressof(self.handle)
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (self.start, self.start + page + self.room):
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0

    def array(self, shape, dtype, at_end: bool) -> np.ndarray:
        nbytes = int(np.prod(shape)) * dtype.itemsize
        offset = mmap.PAGESIZE + (self.room - nbytes if at_end else 0)
        return np.frombuffer(self.map, dtype, int(np.prod(shape)), offset).reshape(shape)


@pytest.mark.parametrize("types", [("f32",) * 3, ("bf16", "bf16", "f32"), ("f16", "f16", "f32")])
@pytest.mark.parametrize("isa", ISAS)
def test_stays_within_its_operands(types, isa) -> None:
    rng = np.random.default_rng(5)
    memory = [Guarded(1 << 20) for _ in range(3)]
    for (b, m, n, k), at_end in itertools.product(SIZES, (True, False)):
        for lhs_order, rhs_order in itertools.product(ORDERS[:2], ORDERS[:2]):
            arrays = []
            for room, order, row, column, name in [
                (memory[0], lhs_order, m, k, types[0]),
                (memory[1], rhs_order, n, k, types[1]),
                (memory[2], "brk", m, n, types[2]),
            ]:
                shape = (b, row, column) if order == "brk" else (b, column, row)
                array = fill(room.array(shape, DTYPES[name], at_end), rng)
                arrays.append(array if order == "brk" else array.transpose(0, 2, 1))
            check(*arrays, True, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_unaligned(isa) -> None:
    rng = np.random.default_rng(6)

    def shifted(array: np.ndarray) -> np.ndarray:
        raw = np.empty(array.nbytes + 1, np.uint8)
        moved = raw[1:].view(array.dtype).reshape(array.shape)
        moved[...] = array
        return moved

    for b, m, n, k in SIZES[:16]:
        for types in [("f32",) * 3, ("bf16", "f16", "f32"), ("f64",) * 3, ("s32",) * 3]:
            lhs, rhs, acc = operands((b, m, n, k), types, rng)
            check(shifted(lhs), shifted(rhs), shifted(acc), True, isa)
            by_k = np.ascontiguousarray(rhs.transpose(0, 2, 1))
            check(shifted(lhs), shifted(by_k).transpose(0, 2, 1), shifted(acc), False, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_to_do(isa) -> None:
    for size in itertools.product((0, 2), (0, 1, 20), (0, 1, 70), (0, 5)):
        for acc_order in ORDERS[:2]:
            for types in [("f32",) * 3, ("s8", "u8", "s32"), ("f64",) * 3]:
                lhs, rhs, acc = operands(size, types, np.random.default_rng(7), acc_order=acc_order)
                check(lhs, rhs, acc, False, isa)
                check(lhs, rhs, acc, True, isa)
                if size[3] == 0:
                    assert contract(lhs, rhs, acc, False, isa)
                    assert not acc.any()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_inf(isa) -> None:
    rng = np.random.default_rng(8)
    for b, m, n, k in SIZES:
        for rhs_order in ORDERS[:2]:
            for name in ("f32", "bf16", "f16"):
                types = (name, name, "f32")
                lhs, rhs, acc = operands((b, m, n, k), types, rng, rhs_order=rhs_order)
                lhs[...] = rng.integers(1, 4, lhs.shape)
                rhs[...] = rng.integers(1, 4, rhs.shape)
                row, column, at = rng.integers(m), rng.integers(n), rng.integers(k)
                lhs[0, row, at] = np.nan
                rhs[0, column, k - 1 - at] = np.inf
                assert contract(lhs, rhs, acc, False, isa)
                np.testing.assert_array_equal(acc, reference(lhs, rhs))
                lhs[0, row, at], lhs[0, row, k - 1 - at] = 1, 0
                assert contract(lhs, rhs, acc, False, isa)
                assert np.isnan(acc[0, row, column])  # 0 * inf is not skipped


@pytest.mark.parametrize("isa", ISAS)
def test_every_half(isa) -> None:
    """All values of f16 and bf16 are converted exactly (f32 denormals apart: they depend on the FPU's mode)."""
    for name, order in itertools.product(("f16", "bf16"), ORDERS[:2]):
        bits = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[name])
        values = bits.astype(np.float32)
        tiny = np.isfinite(values) & (np.abs(values) < np.finfo(np.float32).tiny)
        bits = np.where(tiny, bits.dtype.type(0), bits)
        for m in (1, 16):
            rhs = allocate({"b": 1, "r": len(bits), "k": 1}, order, DTYPES[name], pad=(0, 0))
            rhs[0, :, 0] = bits
            acc = np.empty((1, m, len(bits)), np.float32)
            assert contract(np.ones((1, m, 1), np.float32), rhs, acc, False, isa)
            for row in acc[0]:
                np.testing.assert_array_equal(row, bits.astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_integers_wrap_around(isa) -> None:
    rng = np.random.default_rng(9)
    for (m, n, k), order in itertools.product([(1, 70, 40), (3, 9, 50), (20, 40, 300)], ORDERS[:2]):
        lhs, rhs, acc = operands((1, m, n, k), ("s32",) * 3, rng, rhs_order=order)
        for array in (lhs, rhs, acc):
            array[...] = rng.integers(-(2**31), 2**31, array.shape)
        with np.errstate(over="ignore"):
            expected = acc + np.einsum("bmk,bnk->bmn", lhs, rhs)
        assert contract(lhs, rhs, acc, True, isa)
        np.testing.assert_array_equal(acc, expected)
    lhs = np.full((1, 2, 5000), 255, np.uint8)
    rhs = np.full((1, 40, 5000), -128, np.int8)
    check(lhs, rhs, np.empty((1, 2, 40), np.int32), False, isa)


def normal(size, types, rng, rhs_order):
    lhs, rhs, acc = operands(size, types, rng, rhs_order=rhs_order)
    lhs[...] = rng.standard_normal(lhs.shape)
    rhs[...] = rng.standard_normal(rhs.shape)
    return lhs, rhs, acc


@pytest.mark.parametrize("types", [("f32",) * 3, ("bf16", "bf16", "f32"), ("f64",) * 3], ids="-".join)
@pytest.mark.parametrize("isa", ISAS)
def test_accuracy(types, isa) -> None:
    rng = np.random.default_rng(10)
    for m, n, k in [(1, 100, 64), (1, 64, 5000), (4, 64, 2048), (32, 64, 3000), (64, 3, 3000)]:
        for order in ORDERS[:2]:
            lhs, rhs, acc = normal((1, m, n, k), types, rng, order)
            assert contract(lhs, rhs, acc, False, isa)
            with np.errstate(under="ignore"):
                exact = np.einsum("bmk,bnk->bmn", lhs.astype(np.longdouble), rhs.astype(np.longdouble))
            # Rounding errors of chains of 256 behave like a random walk of as many steps.
            unit = np.finfo(acc.dtype).eps / 2
            error = np.abs(acc - exact) / (unit * np.sqrt(k))
            assert np.sqrt(np.mean(error**2)) < 8
            assert error.max() < 40


@pytest.mark.parametrize("types", [("f32",) * 3, ("f32", "bf16", "f32"), ("f64",) * 3], ids="-".join)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_tiles(types, isa) -> None:
    rng = np.random.default_rng(11)
    for (m, n, k), order in itertools.product([(1, 300, 700), (7, 131, 600), (40, 150, 600)], ORDERS[:2]):
        lhs, rhs, whole = normal((1, m, n, k), types, rng, order)
        assert contract(lhs, rhs, whole, False, isa)
        for step in (16, 37, 64):
            tiled = np.empty_like(whole)
            for j in range(0, n, step):
                if n - j <= 8 < m:
                    j = n - 9  # a tile of few columns is a case of its own
                part = slice(j, j + step)
                assert contract(lhs, rhs[:, part], tiled[:, :, part], False, isa)
            np.testing.assert_array_equal(tiled, whole)
        rows = 1 if m <= 8 else 9 if order == "brk" else 1
        tiled = np.empty_like(whole)
        for i in range(0, m, rows):
            part = slice(min(i, m - rows), min(i, m - rows) + rows)
            assert contract(lhs[:, part], rhs, tiled[:, part], False, isa)
        np.testing.assert_array_equal(tiled, whole)


@pytest.mark.parametrize("isa", ISAS)
def test_bits_of_a_split_over_k(isa) -> None:
    rng = np.random.default_rng(12)
    for m, order in itertools.product((1, 6, 20), ORDERS[:2]):
        lhs, rhs, whole = normal((1, m, 70, 6000), ("f32",) * 3, rng, order)
        assert contract(lhs, rhs, whole, False, isa)
        parts = np.empty_like(whole)
        for k in range(0, 6000, 2048):
            part = slice(k, k + 2048)
            assert contract(lhs[:, :, part], rhs[:, :, part], parts, k > 0, isa)
        np.testing.assert_array_equal(parts, whole)


def test_refuses() -> None:
    rng = np.random.default_rng(13)
    for types in itertools.product(DTYPES, repeat=3):
        if types in COMBINATIONS:
            continue
        for size in [(1, 2, 3, 4), (1, 0, 3, 4)]:
            lhs, rhs, acc = operands(size, types, rng)
            before = acc.copy()
            assert not contract(lhs, rhs, acc)
            np.testing.assert_array_equal(wide(acc), wide(before))
    for axis in range(3):
        lhs, rhs, acc = operands((2, 2, 2, 2), ("f32",) * 3, rng)
        acc = np.lib.stride_tricks.as_strided(
            acc, acc.shape, [0 if i == axis else s for i, s in enumerate(acc.strides)]
        )
        assert not contract(lhs, rhs, acc)


def test_threads_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(14)
    cases = []
    for size, order in itertools.product([(1, 1, 600, 500), (1, 40, 90, 300)], ORDERS[:2]):
        lhs, rhs, acc = operands(size, ("f32", "bf16", "f32"), rng, rhs_order=order)
        cases.append((lhs, rhs, acc, reference(lhs, rhs)))

    def work(i: int) -> None:
        for _ in range(20):
            lhs, rhs, acc, expected = cases[i % len(cases)]
            acc = np.empty_like(acc)
            assert contract(lhs, rhs, acc)
            np.testing.assert_array_equal(acc, expected)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
