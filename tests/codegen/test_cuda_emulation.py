"""Kernels give the results of ``jax.jit``: run on a CPU, every thread of every worker a fiber."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk.codegen.cuda import generate
from models.decoder import init_cache, step_functions
from tests.codegen import cuda_emulation
from tests.codegen.cuda_cases import CASES, Case
from tests.codegen.test_cuda_compiles import plan_of
from tests.models.support import TINY_DECODER, random_decoder
from tests.plan.attention_forms import FORMS, Sizes
from tests.random_programs.check import disagreement, reference
from tests.random_programs.generate import generate as random_program
from tests.references import quick_jit

pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.skipif(cuda_emulation.COMPILER is None, reason="needs a C++ compiler"),
]
#: Random programs of each family.
PROGRAMS = 12
#: Workers of a launch, by turns.
WORKERS = (1, 2, 3, 5)


def check_case(case: Case, got: list[Any], args: list[Any]) -> None:
    """Compares a case's results with those of ``jax.jit``."""
    expected = [np.asarray(r) for r in jax.tree.leaves(quick_jit(case.fn)(*args))]
    assert len(got) == len(expected)
    for have, want in zip(got, expected):
        have = np.asarray(have)
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
        if case.rough and want.dtype.kind not in "biu":
            unit = float(np.finfo(want.dtype).eps) if want.dtype.kind == "f" else 2.0**-8
            scale = np.max(np.abs(want.astype(np.float64)), initial=0.0)
            np.testing.assert_allclose(have.astype(np.float64), want.astype(np.float64), 16 * unit, 16 * unit * scale)
        elif want.dtype.kind == "V":  # NumPy does not know NaNs of bfloat16
            np.testing.assert_array_equal(have.astype(np.float32), want.astype(np.float32))
        else:
            np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    args = case.arguments()
    plan, inputs = plan_of(case.fn, args, workers=4)
    check_case(case, cuda_emulation.run(plan, inputs, launches=2), args)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("matmul_far", "factor<bf16, 16, 6144, kPassing>"),
        ("matmul_normalized", "factor<bf16, 16, 1024, kScratch>"),
    ],
)
def test_what_cases_are_for_is_there_for_few_workers_too(name: str, text: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    plan, _ = plan_of(case.fn, case.arguments(), workers=4)
    assert text in generate(plan).source


def _sum_times_what_is_overwritten(x: jax.Array, buffer: jax.Array) -> jax.Array:
    def body(i: jax.Array, buffer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(buffer, x * (jnp.sum(x) * buffer[3] * 0.5), (0,))

    return jax.lax.fori_loop(0, 3, body, buffer)


def _softmax_and_other_rows(x: jax.Array) -> jax.Array:
    def body(i: jax.Array, x: jax.Array) -> jax.Array:
        powers = jnp.exp(x - jnp.max(x, -1, keepdims=True))
        return powers / jnp.sum(powers, -1, keepdims=True) + x[::-1] * 0.5

    return jax.lax.fori_loop(0, 3, body, x)


def _powers_and_other_elements(x: jax.Array) -> jax.Array:
    def body(i: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.exp(x - jnp.max(x, -1, keepdims=True)) + x[:, ::-1] * 0.5

    return jax.lax.fori_loop(0, 3, body, x)


def _query_and_new_row(x: jax.Array, w: jax.Array, keys: jax.Array, position: jax.Array) -> jax.Array:
    made = jnp.einsum("rdk,k->rd", w, x)
    keys = jax.lax.dynamic_update_slice(keys, made[1][None], (position, jnp.int32(0)))
    return jnp.dot(keys, made[0], preferred_element_type=jnp.float32)


def _sum_and_columns(x: jax.Array, p: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    doubled = values * jnp.bfloat16(2)
    return doubled, jnp.dot(p, doubled, preferred_element_type=jnp.float32) * jnp.sum(x)


def _normalized_and_what_was_there(x: jax.Array, w: jax.Array) -> jax.Array:
    y = jnp.tanh(x)
    scale = jnp.tanh(y[:, 3])
    return jnp.einsum("bk,nk->bn", y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True)), w) * scale[:, None]


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (_normalized_and_what_was_there, ("8x512 float32", "16x512 float32")),
        (_sum_times_what_is_overwritten, ("300 float32", "400 float32")),
        (_softmax_and_other_rows, ("16x64 float32",)),
        (_powers_and_other_elements, ("1x100 float32",)),
        (_query_and_new_row, ("16 bfloat16", "2x512x16 bfloat16", "32x512 bfloat16", "int32=5")),
        (_sum_and_columns, ("300 float32", "64 bfloat16", "64x64 bfloat16")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_threads_wait_for(fn: Any, shapes: tuple[str, ...]) -> None:
    """Members that overwrite what slower threads still read, or read what others still write."""
    case = Case(fn.__name__, fn, shapes, rough=True)
    args = case.arguments()
    plan, inputs = plan_of(fn, args, workers=1)
    for seed in range(3):
        check_case(case, cuda_emulation.run(plan, inputs, launches=2, seed=seed), args)


def test_partials_are_not_overwritten_while_threads_read_them() -> None:
    """No order of turns that is tried above shows it."""
    args = Case("", _sum_and_columns, ("300 float32", "64 bfloat16", "64x64 bfloat16")).arguments()
    plan, _ = plan_of(_sum_and_columns, args, workers=1)
    text = generate(plan).source
    between = text[text.index("= reduce_for_all<") : text.index("multiply_columns<")]
    assert "c.sync();" in between


@pytest.mark.parametrize("position", [0, 3, 7])
def test_decode_step_of_few_tasks(position: int) -> None:
    """A cache that is kept, so that its new rows are written by the tasks that attend to them."""
    with jax.enable_x64(False):
        graphdef, params = random_decoder(TINY_DECODER)
    rng = np.random.default_rng(position)
    cache = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), init_cache(TINY_DECODER, 2, 8))
    arguments, tree = jax.tree.flatten((params, cache, np.array([1, 2], np.int32), np.int32(position)))

    def step(*arguments: Any) -> list[jax.Array]:
        return jax.tree.leaves(step_functions(graphdef).decode_step(*jax.tree.unflatten(tree, arguments)))

    with jax.enable_x64(False):
        plan, inputs = plan_of(step, [np.asarray(a) for a in arguments], workers=3)
        want = quick_jit(step)(*arguments)
    assert len(plan.tasks.table) < 10
    for got, expected in zip(cuda_emulation.run(plan, inputs, launches=2), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["exact", "smooth"])
@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_random_program(family: str, seed: int) -> None:
    program = random_program(seed, family)
    try:
        expected = reference(program)
    except jax.errors.JaxRuntimeError:
        pytest.skip("jax.jit refuses it")
    plan, inputs = plan_of(program.function(), expected.args, workers=WORKERS[seed % len(WORKERS)])
    got = cuda_emulation.run(plan, inputs, launches=1 + seed % 2, seed=seed)
    assert disagreement(program, expected, got) is None


def _many_layers(q: jax.Array, k: jax.Array, v: jax.Array, kept: jax.Array, last: jax.Array) -> jax.Array:
    at = jnp.arange(k.shape[1])
    visible = (at <= last) & (jnp.sin(jnp.tanh(kept)) > 0)
    for _ in range(28):  # too many for each to compute its own mask
        scores = jnp.where(visible, jnp.einsum("bhd,bshd->bhs", q, k) / 8, -jnp.inf)
        q = jnp.einsum("bhs,bshd->bhd", jax.nn.softmax(scores), v)
    return q


def test_a_mask_handed_over_is_read_where_live_keys_begin() -> None:
    rng = np.random.default_rng(0)
    shapes = (1, 4, 32), (1, 256, 4, 32), (1, 256, 4, 32), (256,)
    args = [*(rng.standard_normal(s, np.float32) for s in shapes), np.int32(200)]
    plan, inputs = plan_of(_many_layers, args, workers=16)
    text = generate(plan).source
    assert "waits for b1[256]" in text and "reduce_live" in text
    for seed in range(2):  # scratch begins with ones or with zeros
        (got,) = cuda_emulation.run(plan, inputs, seed=seed)
        np.testing.assert_allclose(got, quick_jit(_many_layers)(*args), rtol=1e-5, atol=1e-5)


def _normed(
    x: jax.Array, w: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, at: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.lax.dynamic_update_slice_in_dim(keys, k[None], at, 0)
    values = jax.lax.dynamic_update_slice_in_dim(values, v[None], at, 0)
    q = jnp.einsum("bk,nk->bn", x, w).reshape(4, 2, 64)
    q = q * jax.lax.rsqrt(jnp.mean(q * q, -1, keepdims=True) + 1)
    scores = jnp.einsum("hgd,thd->hgt", q, keys)
    scores = jnp.where(jnp.arange(keys.shape[0]) <= at, scores, -jnp.inf)
    return jnp.einsum("hgt,thd->hgd", jax.nn.softmax(scores), values), keys, values


@pytest.mark.parametrize("at", [0, 37, 255])
def test_keys_are_copied_while_queries_are_waited_for(at: int) -> None:
    rng = np.random.default_rng(at)
    shapes = (1, 512), (512, 512), (4, 64), (4, 64), (256, 4, 64), (256, 4, 64)
    args = [*((rng.standard_normal(s) / 8).astype(np.float32) for s in shapes), np.int32(at)]
    plan, inputs = plan_of(_normed, args, workers=16, handoff=1e-9)
    program = generate(plan)
    # Queries are normed in front of the keys' first reader, which waits for these.
    start = program.source.index("copy_aside<3, 16, 272, 1024>(")
    marked = program.source.index("copies_wait_marked();", start)
    wait = program.source.index("copies_wait();", marked)
    expected = jax.jit(_normed)(*args)
    for seed in range(2):
        for a, b in zip(cuda_emulation.run(plan, inputs, launches=2, seed=seed), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    if at == 255:  # a kernel that does not wait is wrong
        source = program.source[:wait] + program.source[wait:].replace("copies_wait();", "", 1)
        hasty = cuda_emulation.Kernel(plan, dataclasses.replace(program, source=source))
        results, _ = hasty.launch(inputs)
        assert not np.allclose(results[0], expected[0], rtol=1e-4, atol=1e-5)


def test_live_keys_in_a_loop() -> None:
    """The position that bounds them is one that the loop counts up."""
    sizes = Sizes(width=256, head_dim=64, cache=256, dtype=jnp.bfloat16)
    block = sizes.block(FORMS["grouped"])

    def loop(x: jax.Array, *rest: jax.Array) -> Any:
        *weights, keys, values, pos = rest

        def body(_: jax.Array, carry: Any) -> Any:
            x, keys, values, pos = carry
            y, keys, values = block(x, *(w.T for w in weights), keys, values, pos)  # weights that stream
            return x + y, keys, values, pos + 1

        return jax.lax.fori_loop(0, 5, body, (x, keys, values, pos))

    rng = np.random.default_rng(0)
    x, *others, _ = (jnp.asarray(rng.standard_normal(a.shape) / 8, a.dtype) for a in sizes.avals())
    args = [x, *(a.T if a.ndim == 2 else a for a in others), jnp.int64(61)]
    plan, inputs = plan_of(loop, args, workers=16)
    text = generate(plan).source
    assert "live_rows" in text and "at.rounds[0]" in text
    got = cuda_emulation.run(plan, inputs, launches=2, seed=1)
    for a, b in zip(got, quick_jit(loop)(*args), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.02, atol=0.02)
