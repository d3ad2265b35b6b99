"""Which contractions stream columns of a weight that lies as JAX lays it out by default, and what they then stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.codegen.cuda import generate
from jax_mpk.codegen.cuda.code import COLUMNS
from jax_mpk.codegen.cuda.columns import _SUM_TILES, Columns, match_columns
from jax_mpk.codegen.cuda.pieces import STAGE_BYTES
from jax_mpk.graph.ir import Nest
from jax_mpk.plan import columns
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.targets import H100
from jax_mpk.runtime import nvrtc
from tests.codegen import cuda_emulation
from tests.codegen.cuda.support import boxes_of, planned
from tests.codegen.test_cuda_compiles import plan_of
from tests.plan.large_step import Shape
from tests.references import quick_jit


def matches(plan: Plan) -> list[tuple[Nest, Columns | None]]:
    """The contractions of a plan, and how they stream; what the planner cuts for streaming must do so."""
    found = []
    constant = columns.constants(plan.graph)
    for number, routine in enumerate(plan.routines):
        _, boxes = boxes_of(plan, number)
        for m, member in enumerate(routine.members):
            op = plan.ops[member.op]
            if isinstance(op, Nest) and op.kind == "contract":
                streams = match_columns(plan, op, boxes[m])
                assert (columns.find(plan.graph.values, constant, plan.target, op) is None) == (streams is None)
                found.append((op, streams))
    return found


def avals(*shapes: tuple[int, ...], dtype: Any = jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(s, dtype) for s in shapes]


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 7, 32, 48])
@pytest.mark.parametrize(("k", "n"), [(2048, 2048), (4096, 12_288), (2560, 9728), (4096, 64), (1120, 1088)])
def test_every_element_is_streamed_in_long_runs_and_by_most_workers(dtype, rows: int, k: int, n: int) -> None:
    plan = planned(product, *avals((rows, k), (k, n), dtype=dtype))
    ((op, found),) = matches(plan)
    readers = 1 if rows <= 32 else 2
    assert found is not None and found.count == rows // readers
    assert (found.stride, found.width in (64, 128)) == (n, True)
    depth = op.rspace[0]
    read = np.zeros((k, n), np.int8)
    for first, width in zip(found.first, found.widths, strict=True):
        assert width % found.width == 0 and first % 8 == 0
        read[first // n : first // n + depth, first % n : first % n + width] += 1
    assert (read == readers).all()
    workers = len(found.first)
    assert workers <= H100.workers
    assert k * n * readers / (H100.workers * depth * found.widths.max()) > (0.9 if n > 64 else 0.4)


def test_a_decode_step_streams_all_its_weights() -> None:
    shape = Shape(layers=1, width=1024, heads=16, kv_heads=8, head_dim=64, ffn=3072, vocab=32_000, cache=512)
    leaves, tree = jax.tree.flatten(shape.avals())
    plan = planned(lambda *args: shape.step()(*jax.tree.unflatten(tree, args)), *leaves)
    assert sum(streams is not None for _, streams in matches(plan)) == 8
    source = generate(plan).source
    assert source.count("stream_columns<") == 8 and nvrtc.compile_source(source, "sm_90a").resources.spill_bytes == 0


def heads(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("btd,dhk->bthk", x, w)


def test_several_free_axes() -> None:
    for shape in ((1024, 16, 64), (1024, 64, 32), (1024, 4, 256)):
        ((op, found),) = matches(planned(heads, *avals((1, 3, 1024), shape)))
        assert found is not None
        assert (found.widths * op.rspace[0]).sum() == math.prod(shape) and (found.widths % 64 == 0).all()


def test_more_weights_than_workers() -> None:
    fn = lambda x, w: jnp.einsum("ebk,ekn->ebn", x, w)  # noqa: E731
    plan = planned(fn, *avals((160, 4, 256), (160, 256, 256)))
    ((_, found),) = matches(plan)
    assert found is not None and len(found.first) >= 160


def test_parts_of_siblings_are_tasks_together() -> None:
    """What several contractions read is prepared once for all of them."""

    def fn(x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        x = x * lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)).astype(x.dtype)
        return x @ q, x @ k, x @ v

    plan = planned(fn, *avals((1, 2048), (2048, 2048), (2048, 512), (2048, 512)))
    found = matches(plan)
    assert len(found) == 3 and all(streams is not None for _, streams in found)
    assert len({op.space[0] for op, _ in found}) == 1 and found[0][0].space[0] > 1
    (together,) = (r for r in plan.routines if any(plan.ops[m.op].outputs == found[0][0].outputs for m in r.members))
    assert sum(getattr(plan.ops[m.op], "kind", "") == "contract" for m in together.members) == 3


@pytest.mark.parametrize(
    ("function", "shapes", "dtype"),
    [
        pytest.param(product, ((65, 1024), (1024, 4096)), jnp.bfloat16, id="too many rows"),
        pytest.param(product, ((37, 1024), (1024, 4096)), jnp.bfloat16, id="rows that cannot be halved"),
        pytest.param(product, ((1, 1024), (1024, 4096)), jnp.float32, id="f32"),
        pytest.param(product, ((1, 1024), (1024, 4096)), jnp.int16, id="integers"),
        pytest.param(product, ((1, 1024), (1024, 4000)), jnp.bfloat16, id="no multiple of a granule"),
        pytest.param(product, ((1, 1000), (1000, 4096)), jnp.bfloat16, id="an odd depth"),
        pytest.param(product, ((1, 128), (128, 128)), jnp.bfloat16, id="few bytes"),
        pytest.param(lambda x, w: x @ w[:, 64:1088], ((1, 1024), (1024, 2048)), jnp.bfloat16, id="a slice"),
        pytest.param(lambda x, w: x @ w.cumsum(0), ((1, 1024), (1024, 2048)), jnp.bfloat16, id="not an argument"),
        pytest.param(lambda x, w: w @ x, ((1024, 1), (2048, 1024)), jnp.bfloat16, id="contiguous along the sum"),
    ],
)
def test_does_not_stream(function: Callable[..., Any], shapes: Any, dtype: Any) -> None:
    plan = planned(function, *avals(*shapes, dtype=dtype))
    assert [found for _, found in matches(plan)] == [None]
    assert "stream_columns" not in generate(plan).source


def test_what_the_launch_overwrites_is_not_streamed() -> None:
    def step(w: jax.Array, x: jax.Array, at: jax.Array) -> Any:
        y = x @ w
        return lax.dynamic_update_slice(w, y, (at, 0)), y

    arguments = [*avals((1024, 1024), (1, 1024)), jax.ShapeDtypeStruct((), jnp.int32)]
    ((_, kept),) = matches(planned(step, *arguments))
    ((_, donated),) = matches(planned(step, *arguments, donated=frozenset({0})))
    assert kept is not None and donated is None


@pytest.mark.skipif(cuda_emulation.COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("seed", range(6))
def test_parts_of_sums_give_the_results_of_jit(seed: int) -> None:
    """Random shapes, on a device whose plans rather split sums than read one row more; sums are exact."""
    rng = np.random.default_rng(seed)
    m, k, n = (int(rng.integers(low, high)) for low, high in ((1, 33), (8, 40), (1, 8)))
    m += m * (seed == 5)
    dtype = (jnp.bfloat16, jnp.float16)[seed % 2]
    x, w = ((rng.integers(-4, 5, s) / 4).astype(dtype) for s in ((m, 64 * k), (64 * k, 64 * n)))
    plan, inputs = plan_of(product, [x, w], workers=int(rng.integers(5, 9)), handoff=1e-9, bandwidth=1e10)
    ((op, found),) = matches(plan)
    assert found is not None
    if seed == 0:
        assert len(op.space) == 3  # at least here: parts, rows, columns
    (got,) = cuda_emulation.run(plan, inputs, launches=2, seed=seed)
    np.testing.assert_array_equal(np.float32(got), np.float32(quick_jit(product)(x, w)))


@pytest.mark.parametrize(("rows", "n"), [(1, 2048), (8, 2048), (16, 12_288), (24, 2048), (32, 12_288)])
def test_nothing_spills(rows: int, n: int) -> None:
    program = generate(planned(product, *avals((rows, 2048), (2048, n))))
    assert f", {rows}, " in program.source and "stream_columns<bf16, " in program.source
    assert nvrtc.compile_source(program.source, program.arch).resources.spill_bytes == 0


def test_the_kernel_knows_the_same_numbers() -> None:
    text = [
        '#include "jax_mpk.cuh"',
        f"static_assert(mpk::kColumns == {COLUMNS} && mpk::kSumTiles == {_SUM_TILES});",
        f"static_assert({STAGE_BYTES} % (mpk::kWideBlock * mpk::kTileStep) == 0);",
        "static_assert(mpk::kNarrowBlock == 64 * 2 && mpk::kWideBlock == 128 * 2);",
        'extern "C" __global__ void nothing() {}',
    ]
    # Rows that ldmatrix reads together lie in different banks, 16 bytes of each.
    for first in (0, 2, 4, 6):
        rows = [8 * group + first + odd for group in range(4) for odd in range(2)]
        text += [f"static_assert(mpk::block_swizzle({row}) == {place});" for place, row in enumerate(rows)]
    nvrtc.compile_source("\n".join(text), "sm_90a")
