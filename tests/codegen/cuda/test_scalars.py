"""Scalar programs as C++: compiled for the CPU, they compute what the programs do."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from jax_mpk.codegen.cuda.scalars import Scalars, Term, constant, fixed, offset
from jax_mpk.graph import dtypes
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.reference import eval_expr
from jax_mpk.graph.scalar import Builder, Expr
from tests.codegen.cuda.support import library
from tests.random_programs.edges import edges

EXTENTS = (3, 4)
SLOTS = ("s32", "u32", "s64", "u8", "s8", "f32")
PROGRAMS = 150
_ODD = (0, 1, -1, 2, 3, 7, -5, 64, 2**31 - 1, -(2**31), 2**31, 2**32 + 1, 2**40, -(2**45), 2**62, -(2**63), 2**63 - 1)


def arrays(rng: np.random.Generator) -> list[np.ndarray]:
    """Small numbers and extreme ones."""
    out = []
    for dtype in SLOTS:
        kind, size = dtypes.to_numpy(dtype), 12
        drawn = rng.integers(0, 5, size).astype(kind)
        some = edges(dtype)
        if dtype == "f32":
            some = some[np.isfinite(some)]
        at = rng.random(size) < 0.4
        drawn[at] = rng.choice(some, at.sum())
        out.append(drawn.reshape(EXTENTS))
    return out


def random_program(rng: np.random.Generator) -> Expr:
    """Index arithmetic over coordinates, constants of any width and loads; results of three types."""
    b = Builder(EXTENTS)
    pool = [*b.coords()]
    for slot in rng.choice(len(SLOTS), 3, replace=False):
        loaded = b.load(int(slot), b.coords(), SLOTS[slot])
        pool.append(b.convert(loaded, INDEX))
        if SLOTS[slot] in ("u32", "s32"):  # narrow by its range, not by its type
            pool.append(b.convert(b.op("min", loaded, b.const(9, SLOTS[slot])), INDEX))

    def pick() -> int:
        if rng.random() < 0.3:
            return b.index(int(rng.choice(np.array(_ODD, dtype=object))))
        return int(rng.choice(pool))

    for _ in range(int(rng.integers(3, 14))):
        kind = rng.choice(["linear", "linear", "bound", "divide", "select", "bits", "narrow"])
        if kind == "linear":
            made = b.op(str(rng.choice(["add", "sub", "mul"])), pick(), pick())
        elif kind == "bound":
            made = b.op(str(rng.choice(["max", "min"])), pick(), pick())
        elif kind == "divide":
            by = b.index(int(rng.choice([2, 3, 4, 7, -1, -3, 2**33]))) if rng.random() < 0.7 else pick()
            made = b.op(str(rng.choice(["div", "rem"])), pick(), by)
        elif kind == "select":
            test = b.op(str(rng.choice(["lt", "le", "gt", "ge", "eq", "ne"])), pick(), pick())
            made = b.op("select", test, pick(), pick())
        elif kind == "bits":
            name = str(rng.choice(["and", "or", "xor"]))
            made = b.op(name, pick(), pick()) if rng.random() < 0.6 else b.op(str(rng.choice(["neg", "abs"])), pick())
        else:
            made = b.convert(b.convert(pick(), str(rng.choice(["s32", "u32", "s8", "u8", "f32"]))), INDEX)
        pool.append(made)
    test = b.op("and", b.op("lt", pool[-1], pick()), b.op("ge", pool[-2], pick()))
    return b.build(pool[-1], pool[-2], pool[-3], b.convert(test, INDEX), b.convert(b.convert(pick(), "s32"), INDEX))


def function(name: str, expr: Expr) -> str:
    """A C++ function that computes a program for all coordinates."""
    indices = [Term(f"i{d}") for d in range(len(EXTENTS))]

    def load(slot: int, at: list[Term], dtype: str, pred: str | None) -> str:
        return f"a{slot}[{offset(at, (4, 1))}]"

    s = Scalars(expr, indices, load)
    results = s.results()
    stores = [f"*out++ = {term.text};" for term in results]
    loops = "for (int i0 = 0; i0 < 3; ++i0) for (int i1 = 0; i1 < 4; ++i1)"
    args = ", ".join(f"const {dtype}* a{k}" for k, dtype in enumerate(SLOTS))
    return "\n".join([f'extern "C" void {name}(s64* out, {args}) {{ {loops} {{', *s.lines, *stores, "} }", ""])


def test_index_arithmetic(tmp_path) -> None:
    """Widths are chosen so that nothing is cut off, and what wraps around wraps around at 64 bits."""
    programs = [random_program(np.random.default_rng(seed)) for seed in range(PROGRAMS)]
    compiled = library("".join(function(f"p{n}", expr) for n, expr in enumerate(programs)), tmp_path)
    for n, expr in enumerate(programs):
        rng = np.random.default_rng(1000 + n)
        for _ in range(4):
            inputs = arrays(rng)
            with np.errstate(all="ignore"):
                want = eval_expr(expr, ((0, 0), EXTENTS), inputs.__getitem__)
            got = np.zeros((*EXTENTS, len(want)), np.int64)
            pointers = [ctypes.c_void_p(a.ctypes.data) for a in (got, *inputs)]
            getattr(compiled, f"p{n}")(*pointers)
            for k, array in enumerate(want):
                np.testing.assert_array_equal(got[..., k], np.broadcast_to(array, EXTENTS), f"result {k} of\n{expr}")


def rendered(expr: Expr) -> tuple[list[str], list[Term]]:
    s = Scalars(expr, [Term(f"i{d}") for d in range(len(expr.extents))], lambda slot, at, *_: f"a{slot}")
    results = s.results()
    return s.lines, results


def test_an_index_is_as_wide_as_its_range() -> None:
    b = Builder((1 << 20, 1 << 20))
    i, j = b.coords()
    _, (small, large, back) = rendered(
        b.build(b.add(i, j), b.add(b.mul(i, b.index(1 << 20)), j), b.op("min", b.mul(i, b.index(1 << 20)), j))
    )
    assert not small.wide and "s64" not in small.text
    assert large.wide and "s64" in large.text
    assert not back.wide and back.text.startswith("int(")


def test_what_may_wrap_around_is_no_operator_of_cpp() -> None:
    b = Builder((4,))
    loaded = b.load(0, [], INDEX)
    _, (tame, wild) = rendered(b.build(b.add(b.coord(0), b.index(3)), b.add(loaded, b.index(2**62))))
    assert tame.text == "i0 + 3"
    assert wild.text.startswith("op_add(")


def test_division_by_anything_but_a_plain_constant_is_a_function() -> None:
    b = Builder((100,))
    (i,) = b.coords()
    by = b.add(b.mod(i, 7), b.index(1))
    _, (plain, other) = rendered(b.build(b.op("div", i, b.index(7)), b.op("div", i, by)))
    assert plain.text == "i0 / 7"
    assert "op_div(" in other.text


def test_long_and_repeated_expressions_get_names() -> None:
    b = Builder((4,))
    x = b.load(0, [], "f32")
    y = b.op("mul", x, x)
    for _ in range(20):
        y = b.op("add", b.op("exp", y), b.const(1.5, "f32"))
    lines, (result,) = rendered(b.build(y))
    assert lines[0] == "const f32 t0 = a0;"
    assert max(len(line) for line in lines) < 200 and len(result.text) < 200


@pytest.mark.parametrize("dtype", dtypes.ALL)
def test_constants_are_exact(dtype: str, tmp_path) -> None:
    kind = dtypes.to_numpy(dtype)
    size = dtypes.itemsize(dtype)
    drawn = np.random.default_rng(0).integers(0, 256, (200, size), np.uint8)
    values = np.concatenate([edges(dtype), drawn.view(kind)[:, 0] if dtype != "b1" else np.array([True, False])])
    raw = values.view(f"u{size}")
    text = ", ".join(constant(int(bits), dtype).text for bits in raw)
    compiled = library(f'extern "C" const {dtype} values[] = {{{text}}};\n', tmp_path)
    got = np.frombuffer((ctypes.c_char * values.nbytes).in_dll(compiled, "values"), f"u{size}")
    np.testing.assert_array_equal(got, raw)


def test_negative_constants_keep_their_sign_in_products() -> None:
    assert str(constant(int(np.array(-3).astype(np.uint64)), INDEX)) == "(-3)"
    assert str(fixed(3)) == "3" and fixed(3).known == 3


def test_offsets() -> None:
    i, j = Term("i"), Term("i + 1", atomic=False)
    assert offset([i, j, fixed(2)], (12, 4, 1)) == "i * 12 + (i + 1) * 4 + 2"
    assert offset([fixed(0), fixed(0)], (4, 1)) == "0"
    assert offset([i, j], (0, 1)) == "i + 1"
    assert offset([i, j], (5, 1), wide=True) == "s64(i) * 5 + s64(i + 1)"
