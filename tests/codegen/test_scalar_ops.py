"""Every operation of the vector VM, for every type it exists for, against graph/semantics.py.

:mod:`tests.graph` compares the semantics themselves with ``jax.jit``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jax_mpk import _native
from jax_mpk.graph import dtypes, semantics
from jax_mpk.graph.ir import Block, Graph, Nest, Value
from jax_mpk.graph.scalar import BINARY, COMPARE, TERNARY, UNARY, Builder, Node
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.targets import cpu
from tests.codegen.harness import run_plan

Array = np.ndarray[Any, Any]

INTS = ("s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64")
#: Operations whose results are rounded once and so have exactly one right answer.
EXACT = (
    COMPARE
    | frozenset("neg abs sign floor ceil round_even round_away is_finite not popcount clz convert bitcast".split())
    | frozenset("reduce_precision add sub mul div rem max min nextafter and or xor shl shr_logical".split())
    | frozenset(["shr_arith", "select", "sqrt"])
)
#: Largest error in units of the last place, where it is not 3.
ULPS = {"rsqrt": 1.5, "tanh": 6, "igamma": 30, "igammac": 30, "betainc": 60, "zeta": 30, "polygamma": 60}
ULPS |= {"lgamma": 8, "digamma": 30, "erf_inv": 8, "bessel_i0e": 8, "bessel_i1e": 8, "erfc": 6, "tan": 6}
#: In NumPy and SciPy, f64 is no more precise than here.
F64_ULPS = {"igamma": 3e4, "igammac": 3e4, "betainc": 3e4, "zeta": 100, "polygamma": 1e3, "digamma": 100, "lgamma": 50}
F64_ULPS |= {"erf_inv": 50, "erfc": 100, "bessel_i0e": 30, "bessel_i1e": 30}
#: Where arguments are drawn from, if not from everywhere.
DOMAIN = {
    "igamma": ((0.1, 30), (0.1, 30)),
    "igammac": ((0.1, 30), (0.1, 30)),
    "zeta": ((1.1, 20), (0.1, 30)),
    "polygamma": ((0, 5), (0.1, 30)),
    "betainc": ((0.1, 20), (0.1, 20), (0, 1)),
    "erf_inv": ((-1, 1),),
    "digamma": ((0.01, 50),),
    "lgamma": ((0.01, 50),),
    "sin": ((-1e4, 1e4),),
    "cos": ((-1e4, 1e4),),
    "tan": ((-100, 100),),
    "erfc": ((-6, 8),),
}
#: Compared in tests of their own, or decomposed before they get here.
ELSEWHERE = {"igamma_grad_a", "random_gamma_grad"}


def test_every_operation_has_its_kernels() -> None:
    assert _native.missing_kernels() == []
    known = {name.split(".")[0] for name in _native.opcodes()}
    assert (UNARY | BINARY | TERNARY) - known == {"convert", "bitcast"}
    assert known - (UNARY | BINARY | TERNARY) == {"move", "rotate_left"}


def specials(dtype: str) -> list[Any]:
    """Values at which something happens."""
    if dtype == "b1":
        return [False, True]
    if dtypes.is_int(dtype):
        low, high = dtypes.int_range(dtype)
        return sorted({low, low + 1, -1 if low else 0, 0, 1, 2, 3, 7, 8, 31, 64, high - 1, high, high // 2})
    tiny = float(np.finfo(np.float32 if dtype in ("f16", "bf16") else dtypes.to_numpy(dtype)).tiny)
    values = [0.0, 0.5, 1.0, 1.5, 2.5, 3.75, 100.0, 127.5, 128.0, 255.5, 32768.0, 65504.0, 2.0**31, 2.0**32, 2.0**63]
    values += [2.0**64, 1e-4, 0.25, 8388607.5, 8388609.0, 2147483520.0, np.inf, np.nan]
    values += [tiny] if dtype in ("f32", "f64") else []
    values += [1e300, 4503599627370495.5] if dtype == "f64" else []
    return values + [-v for v in values]


def arrays(op: str, types: tuple[str, ...], seed: int = 0) -> list[Array]:
    """Arguments: all combinations of special values, then random ones."""
    rng = np.random.default_rng(seed)
    ranges = DOMAIN.get(op)
    every = list(itertools.product(*(specials(t) for t in types))) if ranges is None else []
    if len(every) > 4000:
        every = [every[i] for i in rng.choice(len(every), 4000, replace=False)]
    out = []
    for k, t in enumerate(types):
        dtype = dtypes.to_numpy(t)
        count = 500
        if ranges is not None:
            drawn = rng.uniform(*ranges[k], count)
            if op == "polygamma" and k == 0:
                drawn = np.floor(drawn)
        elif t == "b1":
            drawn = rng.integers(0, 2, count)
        elif dtypes.is_int(t):
            drawn = rng.integers(0, 256, (count, dtype.itemsize), np.uint8).view(dtype)[:, 0]
            drawn = np.where(rng.integers(0, 2, count), drawn, drawn % 50)
        else:
            drawn = rng.standard_normal(count) * 10.0 ** rng.uniform(-3, 2, count)
        with np.errstate(all="ignore"):
            first = np.array([row[k] for row in every]).astype(dtype) if every else np.zeros(0, dtype)
            out.append(np.concatenate([first, drawn.astype(dtype)]))
    return out


def run_op(op: str, dtype: str, args: list[Array], attr: Any = None) -> tuple[Array, Array]:
    """Results of the executor and of the semantics."""
    names = [dtypes.from_numpy(a.dtype) for a in args]
    n = len(args[0])
    b = Builder((n,))
    at = b.coord(0)
    loads = [b.load(k, [at], name) for k, name in enumerate(names)]
    root = b.op(op, *loads, dtype=dtype, attr=attr)
    dtype = b.nodes[root].dtype
    values = [Value(k, (n,), name) for k, name in enumerate([*names, dtype])]
    slots = tuple(range(len(args)))
    nest = Nest("map", (n,), (), slots, (len(args),), b.build(root))
    graph = Graph(tuple(values), slots, Block((nest,), (len(args),)))
    (got,) = run_plan(make_plan(graph, cpu(1)), args)
    want = semantics.apply(Node(op, slots, dtype, attr), args)
    return got, want


def cases() -> Iterator[tuple[str, str]]:
    for name in sorted(_native.opcodes()):
        op, dtype = name.split(".")
        if op not in ELSEWHERE and op not in ("move", "rotate_left", "reduce_precision", "select"):
            yield op, dtype


def check(op: str, got: Array, want: Array, what: str) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.dtype.kind not in "fV" and want.dtype.name != "bfloat16":
        assert np.array_equal(got, want), what
        return
    both = np.isnan(got) & np.isnan(want)
    finfo = np.finfo(np.float32) if want.dtype.name == "bfloat16" else np.finfo(want.dtype)
    with np.errstate(all="ignore"):
        wide_got, wide_want = got.astype(np.float64), want.astype(np.float64)
        flushed = (np.abs(wide_want) <= float(finfo.tiny)) & (np.abs(wide_got) <= float(finfo.tiny))
        if op in EXACT:
            right = both | flushed | ((got == want) & (np.signbit(got) == np.signbit(want)))
        else:
            unit = np.spacing(np.abs(want)).astype(np.float64)
            ulps = (F64_ULPS if want.dtype == np.float64 else ULPS).get(op, 3)
            right = both | flushed | (got == want) | (np.abs(wide_got - wide_want) <= ulps * unit)
    wrong = np.flatnonzero(~right)
    assert not len(wrong), f"{what}: {len(wrong)} wrong, first at {wrong[0]}: {got[wrong[0]]} for {want[wrong[0]]}"


@pytest.fixture(params=_native.vm_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_vm_isa(request.param)
    yield request.param
    _native.set_vm_isa(_native.vm_isas()[-1])


@pytest.mark.parametrize("op", sorted({op for op, _ in cases()}))
def test_operation(op: str, isa: str) -> None:
    arity = 1 if op in UNARY else 2 if op in BINARY else 3
    for name, dtype in cases():
        if name != op:
            continue
        args = arrays(op, (dtype,) * arity)
        got, want = run_op(op, dtype, args)
        shown = f"{op}.{dtype} on {isa}"
        wrong = ~((got == want) | ((got != got) & (want != want)))
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            shown += f" of {[a[i] for a in args]}"
        check(op, got, want, shown)


@pytest.mark.parametrize("op", sorted(op for op in UNARY if op not in EXACT | {"bessel_i0e", "bessel_i1e"}))
def test_all_magnitudes(op: str, isa: str) -> None:
    """Arguments with random bits: every exponent occurs."""
    bits = np.random.default_rng(1).integers(0, 1 << 32, 20000, np.uint32)
    args = [bits.view(np.float32)]
    if op in ("sin", "cos", "tan"):
        args = [np.where(np.abs(args[0]) < 1e30, args[0], np.float32(3))]
    with np.errstate(all="ignore"):
        args = [np.where(np.abs(args[0]) < np.finfo(np.float32).tiny, np.float32(0), args[0])]
        if op == "digamma":  # poles: XLA and SciPy disagree on what is there
            args = [np.where((args[0] < -100) | (args[0] == 0), np.float32(3), args[0])]
    got, want = run_op(op, "f32", args)
    check(op, got, want, f"{op} on {isa}: {args[0][got != want][:3]}")


@pytest.mark.parametrize("source", dtypes.ALL)
def test_convert(source: str, isa: str) -> None:
    for target in dtypes.ALL:
        if target == source:
            continue
        args = arrays("convert", (source,))
        got, want = run_op("convert", target, args)
        check("convert", got, want, f"{source} to {target} on {isa}: {list(zip(args[0], got, want))[:60]}")


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("bits", [(8, 7), (5, 10), (5, 2), (4, 3), (8, 23), (11, 52), (1, 0), (2, 10)])
def test_reduce_precision(dtype: str, bits: tuple[int, int], isa: str) -> None:
    args = arrays("reduce_precision", (dtype,))
    got, want = run_op("reduce_precision", dtype, args, bits)
    check("reduce_precision", got, want, f"{dtype} {bits} on {isa}")


@pytest.mark.parametrize("dtype", dtypes.ALL)
def test_select(dtype: str, isa: str) -> None:
    rng = np.random.default_rng(0)
    for n in (1, 3, 16, 100, 1000):
        size = dtypes.itemsize(dtype)
        pair = [
            rng.integers(0, 2 if dtype == "b1" else 256, (n, size), np.uint8).view(dtypes.to_numpy(dtype))[:, 0]
            for _ in range(2)
        ]
        pred = rng.integers(0, 2, n).astype(bool)
        got, _ = run_op("select", dtype, [pred, *pair])
        assert np.array_equal(got.view(np.uint8), np.where(pred, *pair).view(np.uint8))


@pytest.mark.parametrize(("source", "target"), [("f32", "s32"), ("u32", "f32"), ("f64", "u64"), ("bf16", "u16")])
def test_bitcast(source: str, target: str) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (100, dtypes.itemsize(source)), np.uint8).view(dtypes.to_numpy(source))[:, 0]
    got, want = run_op("bitcast", target, [raw])
    assert np.array_equal(got.view(np.uint8), want.view(np.uint8))


def test_bitcast_is_seen_as_its_type() -> None:
    """A comparison of reinterpreted bits uses the new type."""
    x = np.array([1.0, -1.0, 2.0], np.float32)
    b = Builder((3,))
    bits = b.op("bitcast", b.load(0, [b.coord(0)], "f32"), dtype="s32")
    negative = b.op("lt", bits, b.const(0, "s32"))
    wide = b.convert(bits, "f64")
    values = tuple(Value(k, (3,), t) for k, t in enumerate(["f32", "b1", "f64"]))
    nest = Nest("map", (3,), (), (0,), (1, 2), b.build(negative, wide))
    plan = make_plan(Graph(values, (0,), Block((nest,), (1, 2))), cpu(1))
    below, as_int = run_plan(plan, [x])
    assert below.tolist() == [False, True, False]
    assert np.array_equal(as_int, x.view(np.int32).astype(np.float64))
