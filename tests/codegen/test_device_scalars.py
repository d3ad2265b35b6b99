"""Scalar operations of generated CUDA code: compiled for the CPU against graph/semantics.py, and compiled for a GPU."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from jax_mpk.graph import dtypes, semantics
from jax_mpk.graph.scalar import BINARY, TERNARY, UNARY, Node
from tests.codegen.device_functions import FUNCTIONS, Array, Function, cubin, host_library, run_on_host, source
from tests.codegen.test_scalar_ops import ELSEWHERE, EXACT, arrays, check
from tests.random_programs.edges import crossed, edges

BITWISE = EXACT | {"move", "rotate_left"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return host_library(tmp_path_factory.mktemp("device"))


def test_every_operation_is_there() -> None:
    assert {f.op for f in FUNCTIONS} == UNARY | BINARY | TERNARY | {"move", "rotate_left"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_compiles_for_a_gpu(arch: str) -> None:
    assert b"add_f32" in cubin(source(), arch)


@pytest.mark.parametrize("op", sorted({f.op for f in FUNCTIONS}))
def test_operation(op: str, library: ctypes.CDLL) -> None:
    for function in FUNCTIONS:
        if function.op == op:
            args = arguments(function)
            got, want = run_on_host(library, function, args), expected(function, args)
            if op in ELSEWHERE:
                np.testing.assert_allclose(got, want, rtol=1e-6 if function.result == "f32" else 1e-9)
                continue
            if op not in BITWISE:
                check(op, got, want, function.name)
                continue
            wrong = np.flatnonzero(bits_of(got) != bits_of(want))
            if len(wrong):
                at = wrong[0]
                given = [a[at] for a in args]
                pytest.fail(f"{function.name} of {given}: {got[at]!r} for {want[at]!r}, {len(wrong)} wrong in all")


def arguments(function: Function) -> list[Array]:
    """All combinations of edge values where results are exact, and random values."""
    rng = np.random.default_rng(0)
    if function.op in ELSEWHERE:
        return [rng.uniform(0.1, 30, 500).astype(dtypes.to_numpy(t)) for t in function.args]
    drawn = arrays(function.op, function.args)
    if function.op not in BITWISE:
        return drawn
    parts = [drawn]
    if len(function.args) < 3:
        parts.append(crossed(*(edges(t) for t in function.args)))
    parts.append([random_bits(rng, t) for t in function.args])
    if function.op == "convert":
        parts.append([near_ties(*function.args)])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def random_bits(rng: np.random.Generator, dtype: str, count: int = 3000) -> Array:
    size = dtypes.itemsize(dtype)
    raw = rng.integers(0, 2 if dtype == "b1" else 256, (count, size), np.uint8)
    return raw.view(dtypes.to_numpy(dtype))[:, 0]


def near_ties(dtype: str) -> Array:
    """Numbers that a rounding to f32 moves onto a tie of f16 or bf16, which then goes the wrong way."""
    kind = dtypes.to_numpy(dtype)
    number, least = (float, 2.0**-40) if dtype == "f64" else (int, 1)
    one = {"f64": 1, "s32": 1 << 25, "u32": 1 << 25, "s64": 1 << 40, "u64": 1 << 40}.get(dtype)
    if one is None:
        return np.zeros(0, kind)
    ties = [one * m + one * (2 * k + 1) / (1 << digits + 1) for digits in (7, 10) for k in (0, 1) for m in (1, 2)]
    signs = (1,) if dtype.startswith("u") else (1, -1)
    return np.array([sign * (number(t) + d) for t in ties for d in (-least, 0, least) for sign in signs], kind)


def expected(function: Function, args: list[Array]) -> Array:
    (x, *_) = args
    if function.op == "move":
        return x
    if function.op == "rotate_left":
        width = x.dtype.type(x.dtype.itemsize * 8)
        left = x.dtype.type(function.attr)
        return (x << left) | (x >> (width - left))
    if function.op == "convert" and function.result in ("f16", "bf16") and x.dtype.itemsize >= 4:
        return np.array([rounded(v, function.result) for v in x], np.float32).astype(dtypes.to_numpy(function.result))
    want = semantics.apply(Node(function.op, tuple(range(len(args))), function.result, function.attr), args)
    if function.op == "nextafter":  # NumPy's f16 and XLA disagree on zeros of unlike signs
        with np.errstate(invalid="ignore"):
            return np.where(x == args[1], args[1], want)
    return want


def rounded(value: Any, dtype: str) -> float:
    """A number as f16 or bf16 holds it, rounded once to nearest even (semantics.py rounds to f32 first)."""
    digits, least, most = {"f16": (10, -14, 15), "bf16": (7, -126, 127)}[dtype]
    exact = value.item()
    if exact == 0 or not math.isfinite(exact):
        return exact
    exact = Fraction(exact)
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    if Fraction(2) ** exponent > abs(exact):
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least) - digits)
    result = round(exact / unit) * unit
    return math.copysign(math.inf if abs(result) >= Fraction(2) ** (most + 1) else float(abs(result)), exact)


def bits_of(a: Array) -> Array:
    """Bits, with one NaN for all."""
    raw = np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")
    if a.dtype.kind in "biu":
        return raw
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return np.where(np.isnan(a), raw.dtype.type(np.iinfo(raw.dtype).max), raw)
