"""Which contractions stream, and what they then stream."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_mpk.codegen.cuda import generate
from jax_mpk.codegen.cuda.code import WARPS
from jax_mpk.codegen.cuda.pieces import STAGE_BYTES, TILE_STAGES, pieces
from jax_mpk.codegen.cuda.stream import Rows, cut_rows, match
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Nest
from jax_mpk.plan.ir import Plan
from jax_mpk.runtime import nvrtc
from tests.codegen.cuda.support import boxes_of, planned


def matches(plan: Plan) -> list[tuple[Nest, np.ndarray, Rows | None]]:
    """The contractions of a plan, their boxes, and how they stream."""
    found = []
    for number, routine in enumerate(plan.routines):
        _, boxes = boxes_of(plan, number)
        for m, member in enumerate(routine.members):
            op = plan.ops[member.op]
            if isinstance(op, Nest) and op.kind == "contract":
                found.append((op, boxes[m], match(plan, op, boxes[m])))
    return found


def one(function: Callable[..., Any], *shapes: tuple[int, ...], dtype: Any = jnp.bfloat16, **options: Any):
    plan = planned(function, *(jax.ShapeDtypeStruct(s, dtype) for s in shapes), **options)
    (found,) = matches(plan)
    return plan, *found


def rows_of(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("bk,nk->bn", x, w)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("columns", [1, 3, 8])
@pytest.mark.parametrize(("n", "k"), [(4096, 2048), (264, 4096), (1000, 24_576)])
def test_every_row_is_streamed_once_for_each_group_of_columns(dtype, columns: int, n: int, k: int) -> None:
    plan, op, boxes, rows = one(rows_of, (columns, k), (n, k), dtype=dtype)
    assert rows is not None
    assert plan.graph.values[op.operands[rows.weight]].shape == (n, k)
    rank = len(op.space)
    sizes = boxes[:, 1, :rank] - boxes[:, 0, :rank]
    assert (sizes.prod(axis=1) == rows.rows * rows.count).all()
    # Consecutive rows, in the order in which the code numbers them.
    read = np.zeros(n, int)
    for first, count in zip(rows.first, rows.rows, strict=True):
        assert first % k == 0
        read[first // k : first // k + count] += 1
    assert (read == columns / rows.count).all()
    item = dtypes.itemsize(plan.graph.values[op.operands[rows.weight]].dtype)
    assert (rows.first * item % 16 == 0).all()
    if rows.height:
        assert columns == 8 and dtype != jnp.float32
        assert pieces(k, columns, item, "kPassing").width * item * rows.height <= STAGE_BYTES
    else:
        assert k // rows.parts * item * rows.chunk_rows <= STAGE_BYTES


def test_batched_weights_and_several_axes() -> None:
    """Heads: rows of several axes, as long as a task's rows lie behind each other."""
    plan, op, _, rows = one(lambda x, w: jnp.einsum("td,hkd->thk", x, w), (1, 2048), (16, 64, 2048))
    assert rows is not None and math.prod(plan.graph.values[op.operands[rows.weight]].shape) == rows.rows.sum() * 2048


def computed(x: jax.Array, w: jax.Array) -> jax.Array:
    w = w[::-1].cumsum(0)
    return rows_of(x, w)


@pytest.mark.parametrize(
    ("function", "shapes", "dtype"),
    [
        pytest.param(lambda x, w: x @ w, ((1, 1024), (1024, 4096)), jnp.bfloat16, id="strided along the sum"),
        pytest.param(rows_of, ((16, 1024), (4096, 1024)), jnp.float32, id="many columns"),
        pytest.param(rows_of, ((65, 1024), (4096, 1024)), jnp.bfloat16, id="too many columns"),
        pytest.param(rows_of, ((16, 1016), (4096, 1016)), jnp.bfloat16, id="many columns, an odd depth"),
        pytest.param(rows_of, ((8, 256), (4096, 256)), jnp.float32, id="more sums in a chunk than lanes"),
        pytest.param(rows_of, ((1, 1024), (4096, 1024)), jnp.int32, id="integers"),
        pytest.param(rows_of, ((1, 8), (264, 8)), jnp.bfloat16, id="few bytes"),
        pytest.param(rows_of, ((1, 1020), (4096, 1020)), jnp.bfloat16, id="rows of an odd length"),
        pytest.param(computed, ((1, 1024), (4096, 1024)), jnp.bfloat16, id="not an argument"),
        pytest.param(
            lambda x, w: jnp.einsum("bk,nk->bn", x, w[:, 1:1025]), ((1, 1024), (4096, 1032)), jnp.bfloat16, id="a slice"
        ),
    ],
)
def test_does_not_stream(function, shapes, dtype) -> None:
    plan = planned(function, *(jax.ShapeDtypeStruct(s, dtype) for s in shapes))
    assert [rows for _, _, rows in matches(plan)] == [None]


def test_what_the_launch_overwrites_is_not_streamed() -> None:
    """The producer waits for nobody: a buffer that any task writes must not reach the ring."""

    def step(w: jax.Array, x: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = rows_of(x, w)
        return lax.dynamic_update_slice(w, y[:, :1024] * 2, (at, 0)), y

    bf16 = jnp.bfloat16
    avals = (
        jax.ShapeDtypeStruct((4096, 1024), bf16),
        jax.ShapeDtypeStruct((1, 1024), bf16),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    ((_, _, kept),) = matches(planned(step, *avals))
    ((_, _, donated),) = matches(planned(step, *avals, donated=frozenset({0})))
    assert kept is not None and donated is None


@given(st.integers(1, 1 << 15), st.sampled_from([2, 4]))
@settings(deadline=None)
def test_chunks(depth: int, item: int) -> None:
    found = cut_rows(depth, item)
    if found is None:
        assert depth * item % 16 or depth * item > STAGE_BYTES
        return
    rows, parts = found
    assert depth % parts == 0 and depth // parts * item % 16 == 0
    assert 1 <= rows <= 16 and (rows == 1 or parts == 1)
    assert rows * (depth // parts) * item <= STAGE_BYTES
    assert parts == 1 or depth * item > STAGE_BYTES  # no more parts than needed
    if parts == 1 and rows < 16:
        assert (rows + 1) * depth * item > STAGE_BYTES


@pytest.mark.parametrize("reach", ["kScratch", "kHeld", "kPassing"])
def test_the_kernel_cuts_tiles_alike(reach: str) -> None:
    lines = ['#include "jax_mpk.cuh"']
    for depth in (32, 96, 512, 1024, 1056, 1120, 2048, 4096, 12_288, 50_016):
        for columns in (5, 8, 16, 24, 32, 40, 64):
            cut = pieces(depth, columns, 2, reach)
            count = -(-depth // cut.width)
            assert cut.width % 32 == 0 and cut.width * 2 * cut.rows <= STAGE_BYTES and 16 % cut.rows == 0
            assert cut.block in (cut.width, cut.width * count)  # a piece, or all of them
            assert cut.group == 1 or cut.block == cut.width
            tiles = -(-columns // 8)
            assert cut.group * WARPS * tiles * 512 <= cut.sums
            # What a thread does not hold in registers, it has on the shelf.
            lots = -(-cut.width // 32 // WARPS) * tiles
            held = f"{cut.shelf} == (P::kStays ? (P::kCount - P::kKept) * {lots * WARPS * 512} : 0)"
            lines.append(f"namespace n{len(lines)} {{")
            lines.append(f"using P = mpk::Pieces<mpk::bf16, {columns}, {depth}, mpk::{reach}, {STAGE_BYTES}, {WARPS}>;")
            lines.append(
                f"static_assert(P::kColumns == {cut.width} && P::kRows == {cut.rows} && P::kCount == {count});"
            )
            lines.append(f"static_assert(P::kGroup == {cut.group} && P::kLots == {lots} && P::kLots * P::kKept <= 18);")
            lines.append(f"static_assert(P::kStays == {str(cut.block >= depth).lower()});")
            lines.append(f"static_assert(P::kBuffers * {WARPS * tiles * 512} == {cut.sums});")
            if reach == "kHeld":
                lines.append(f"static_assert({held});")
            lines.append("}")
    nvrtc.compile_source("\n".join(lines) + '\nextern "C" __global__ void nothing() {}', "sm_90a")


@pytest.mark.parametrize(("columns", "dtype"), [(5, jnp.bfloat16), (16, jnp.float16), (64, jnp.bfloat16)])
def test_many_columns_go_to_tensor_cores(columns: int, dtype: Any) -> None:
    """Their kernel streams tiles, and nothing spills."""
    plan, _, _, rows = one(rows_of, (columns, 1024), (4096, 1024), dtype=dtype)
    assert rows is not None and rows.height == 4 and rows.count == columns
    assert rows.rows.sum() == 4096
    program = generate(plan)
    assert "stream_tiles(" in program.source
    compiled = nvrtc.compile_source(program.source, program.arch)
    assert compiled.resources.spill_bytes == 0


def test_registers_suffice_for_three_tiles_of_columns() -> None:
    """A piece that is held, the next one and two sets of sums."""

    def gated(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        return (g := rows_of(x, w)) * jax.nn.sigmoid(g) * rows_of(x, v)

    avals = [jax.ShapeDtypeStruct((n, 3584), jnp.bfloat16) for n in (24, 5280, 5280)]
    program = generate(planned(gated, *avals))
    assert program.source.count("factor<bf16, 24, 3584, kPassing>") == 1  # both contractions have the same one
    assert nvrtc.compile_source(program.source, program.arch).resources.spill_bytes == 0


def _beside_large_scratch(x: jax.Array, w: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rows_of(x, w), jax.nn.softmax(jnp.tanh(z.astype(jnp.float32)), -1)


def _beside_parts_of_rows(x: jax.Array, w: jax.Array, v: jax.Array, y: jax.Array, u: jax.Array) -> Any:
    return rows_of(x, w) * rows_of(x, v), jnp.dot(y, u.T, preferred_element_type=jnp.float32)


@pytest.mark.parametrize(
    ("function", "avals"),
    [
        pytest.param(_beside_large_scratch, ["32x1024", "8192x1024", "128x32000"], id="softmax of long rows"),
        pytest.param(
            _beside_parts_of_rows,
            ["32x2048", *["12672x2048"] * 2, "8x2304", "198000x2304 float32"],
            id="sums of parts of rows",
        ),
    ],
)
def test_what_is_held_leaves_room_for_a_ring(function: Callable[..., Any], avals: list[str]) -> None:
    shapes = [aval.split() for aval in avals]
    types = [s[1] if len(s) > 1 else "bfloat16" for s in shapes]
    plan = planned(
        function,
        *(jax.ShapeDtypeStruct(tuple(map(int, s[0].split("x"))), t) for s, t in zip(shapes, types, strict=True)),
    )
    (stages,) = re.findall(r"kStages = (\d+),", generate(plan).source)
    assert int(stages) >= TILE_STAGES


@pytest.mark.parametrize(("columns", "depth", "flight"), [(16, 4096, 6), (64, 1024, 12), (64, 2048, 9)])
def test_as_many_bytes_are_in_flight_whatever_pieces_leave_of_a_stage(columns: int, depth: int, flight: int) -> None:
    plan, *_ = one(rows_of, (columns, depth), (8448, depth))
    assert f"kFlight = {flight}," in generate(plan).source


@pytest.mark.parametrize(
    ("depths", "columns", "stage"),
    [
        pytest.param([2048], 1, 8, id="two rows"),
        pytest.param([4096], 1, 8, id="one row"),
        pytest.param([2560], 1, 10, id="two rows, of a larger one"),
        pytest.param([5120], 1, 10, id="a row"),
        pytest.param([3072], 2, 12, id="two rows of 6 KB"),
        pytest.param([2560, 4096], 1, 8, id="as many rows that do not need it"),
        pytest.param([2560], 8, 8, id="tiles are cut to fit"),
    ],
)
def test_a_stage_is_as_large_as_rows_fill_it(depths: list[int], columns: int, stage: int) -> None:
    def products(*args: jax.Array) -> list[jax.Array]:
        return [rows_of(x, w) for x, w in zip(args[::2], args[1::2], strict=True)]

    shapes = [shape for depth in depths for shape in ((columns, depth), (12672, depth))]
    plan = planned(products, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    assert f"kStageBytes = {stage << 10}," in generate(plan).source


@pytest.mark.parametrize(("columns", "flight"), [(2048, 6), (4096, 6), (2560, 5), (3584, 7)])
def test_as_many_bytes_are_in_flight_whatever_rows_leave_of_a_stage(columns: int, flight: int) -> None:
    avals = [jax.ShapeDtypeStruct((n, columns), jnp.bfloat16) for n in (1, 12672)]
    plan = planned(lambda x, w: jnp.einsum("bk,nk->bn", x, w), *avals)
    assert f"kFlight = {flight}," in generate(plan).source


def test_the_kernel_cuts_rows_alike() -> None:
    lines = ['#include "jax_mpk.cuh"']
    for item, name in ((2, "mpk::bf16"), (4, "mpk::f32")):
        for depth in (*range(16, 20_000, 368), 1024, 4096, 8192, 12_288, 24_576):
            found = cut_rows(depth, item)
            if found is not None:
                chunks = f"mpk::Chunks<{name}, {depth}, {STAGE_BYTES}>"
                lines.append(f"static_assert({chunks}::kRows == {found[0]} && {chunks}::kParts == {found[1]});")
    assert len(lines) > 50
    nvrtc.compile_source("\n".join([*lines, 'extern "C" __global__ void nothing() {}']), "sm_90a")
