"""The scalar Builder: simplification changes no value, and ranges hold, on random programs."""

import random

import numpy as np
import pytest

from jax_mpk.graph import dtypes, semantics
from jax_mpk.graph.reference import eval_expr
from jax_mpk.graph.scalar import COMPARE, Builder, Node, inline
from jax_mpk.graph.verify import ranges

EXTENTS = (3, 1, 8, 5)
INTS = ("s64", "s32", "u32", "s8", "u8")
OPS = "add sub mul div rem max min and or xor shl shr_logical shr_arith".split()


class Shadow:
    """Builds a program twice: simplified by the Builder, and plainly as arrays."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.builder = Builder(EXTENTS)
        self.data = np.random.default_rng(seed).integers(-200, 200, EXTENTS)
        self.values: list[tuple[int, np.ndarray]] = []
        grid = np.indices(EXTENTS)
        for axis in range(len(EXTENTS)):
            self.values.append((self.builder.coord(axis), grid[axis].astype(np.int64)))
        for dtype in INTS:
            load = self.builder.load(INTS.index(dtype), self.builder.coords(), dtype)
            self.values.append((load, self.data.astype(dtypes.to_numpy(dtype))))

    def pick(self, dtype: str | None = None) -> tuple[int, np.ndarray]:
        fitting = [v for v in self.values if dtype is None or self.builder.nodes[v[0]].dtype == dtype]
        if not fitting or self.random.random() < 0.3:
            dtype = dtype or self.random.choice(INTS)
            low, high = dtypes.int_range(dtype)
            small = [x for x in (0, 1, 2, 3, 4, 5, 7, 8, 12, 24, -1, -3, low, high) if low <= x <= high]
            value = self.random.choice(small)
            return self.builder.const(value, dtype), np.full(EXTENTS, value, dtypes.to_numpy(dtype))
        return self.random.choice(fitting)

    def apply(self, name: str, *args: tuple[int, np.ndarray], dtype: str | None = None) -> None:
        kind = dtype or ("b1" if name in COMPARE else self.builder.nodes[args[-1][0]].dtype)
        value = semantics.apply(Node(name, (), kind), [a for _, a in args])
        self.values.append((self.builder.op(name, *(n for n, _ in args), dtype=dtype), value))

    def step(self) -> None:
        choice = self.random.random()
        if choice < 0.45:  # index arithmetic, as rules write it
            name = self.random.choice(["add", "sub", "mul", "div", "rem", "max", "min"])
            self.apply(name, self.pick("s64"), self.pick("s64"))
        elif choice < 0.65:
            dtype = self.random.choice(INTS)
            self.apply(self.random.choice(OPS), self.pick(dtype), self.pick(dtype))
        elif choice < 0.75:
            dtype = self.random.choice(INTS)
            self.apply(self.random.choice(sorted(COMPARE)), self.pick(dtype), self.pick(dtype))
        elif choice < 0.85:
            self.apply("convert", self.pick(self.random.choice(INTS)), dtype=self.random.choice(INTS))
        elif choice < 0.92:
            self.apply(self.random.choice(["and", "or", "xor"]), self.predicate(), self.predicate())
        elif choice < 0.94:
            self.apply("not", self.predicate())
        else:
            dtype = self.random.choice(INTS)
            self.apply("select", self.predicate(), self.pick(dtype), self.pick(dtype))

    def predicate(self) -> tuple[int, np.ndarray]:
        known = [v for v in self.values if self.builder.nodes[v[0]].dtype == "b1"]
        if not known:
            self.apply("lt", self.pick("s64"), self.pick("s64"))
            return self.values[-1]
        return self.random.choice(known)


@pytest.mark.parametrize("seed", [*range(100), 596])
def test_random_programs(seed: int) -> None:
    shadow = Shadow(seed)
    for _ in range(40):
        shadow.step()
    expr = shadow.builder.build(*(node for node, _ in shadow.values))
    box = ((0,) * len(EXTENTS), EXTENTS)

    def read(slot: int) -> np.ndarray:
        return shadow.data.astype(dtypes.to_numpy(INTS[slot]))

    results = eval_expr(expr, box, read)
    known = ranges(expr)
    for k, (result, (node, want)) in enumerate(zip(results, shadow.values, strict=True)):
        np.testing.assert_array_equal(np.broadcast_to(result, EXTENTS), want, err_msg=f"value {k}")
        for bounds in (known[expr.results[k]], shadow.builder.ranges[node]):
            assert bounds is not None and bounds[0] <= want.min() and want.max() <= bounds[1]
    # Copying a program through inline changes nothing either.
    other = Builder(EXTENTS)
    copied = other.build(*inline(other, expr, other.coords(), lambda s, i, t, p: other.load(s, i, t, p)))
    for a, b in zip(results, eval_expr(copied, box, read), strict=True):
        np.testing.assert_array_equal(np.broadcast_to(a, EXTENTS), np.broadcast_to(b, EXTENTS))


@pytest.mark.parametrize("seed", range(20))
def test_random_reshapes(seed: int) -> None:
    """delinearize inverts linearize, over any factorisation."""
    rng = random.Random(seed)
    shape = [rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.randint(1, 4))]
    total = int(np.prod(shape))
    other, left = [], total
    while left > 1:
        factor = rng.choice([d for d in range(2, left + 1) if left % d == 0])
        other.append(factor)
        left //= factor
    b = Builder(shape)
    index = b.delinearize(b.linearize(b.coords(), shape), other)
    expr = b.build(*index)
    got = eval_expr(expr, ((0,) * len(shape), shape), lambda slot: np.zeros(0))
    want = np.unravel_index(np.arange(total).reshape(shape), other) if other else ()
    for a, b_ in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(a, shape), b_)
    if other == shape:
        assert index == b.coords()
