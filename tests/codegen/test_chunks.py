"""The sums of a chunk of rows: every way that they are computed, by one warp on a CPU, and what NVRTC makes of them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk.codegen.cuda.stream import cut_rows
from jax_mpk.runtime import nvrtc
from tests.codegen import cuda_emulation
from tests.codegen.sass import instructions

#: Steps of 128 by pairs and not, no steps of 128, and no multiples of what a warp loads at a time.
DEPTHS = (128, 256, 384, 640, 1024, 1152, 1280, 2048, 3072, 3200, 4096, 8, 96, 576, 776, 1000, 1360, 2056)
#: Rows and columns of one chunk that depths do not lead to, among them a case of more sums by pairs than lanes.
OTHERS = (
    (3, 2, 256),
    (5, 1, 384),
    (1, 4, 128),
    (1, 3, 896),
    (15, 2, 96),
    (5, 6, 776),
    (9, 3, 128),
    (3, 8, 128),
    (2, 1, 2560),
)
SHAPES = [
    *((rows, m, depth) for depth in DEPTHS for m in (1, 2, 3, 4) for rows, _ in [cut_rows(depth, 2)] if rows * m <= 32),
    *OTHERS,
]
TYPES = (("bf16", "bf16"), ("f16", "f16"), ("bf16", "f32"))

SOURCE = """
#include "jax_mpk.cuh"
namespace mpk {
// Columns lie a little apart.
template <class W, class X, int M, int rows, int depth>
__device__ __forceinline__ void chunk(const void* w, const void* x, f32* out, int* count) {
  using S = ChunkShape<W, X, M, rows, depth>;
  constexpr int kStride = depth + 8, kAt = 16 + rows * depth * static_cast<int>(sizeof(W));
  for (int k = threadIdx.x; k < rows * depth; k += kWarp) shared_at<W>(16)[k] = static_cast<const W*>(w)[k];
  for (int k = threadIdx.x; k < M * depth; k += kWarp) {
    shared_at<X>(kAt)[k / depth * kStride + k % depth] = static_cast<const X*>(x)[k];
  }
  __syncwarp();
  const int lane = threadIdx.x;
  const u32 base = shared_address(shared_at<char>(0));
  const u32 w_at = base + 16 + S::weights(lane), x_at = base + kAt + S::columns(lane);
  const f32 sum = chunk_sums<W, X, M, rows, depth>(w_at, x_at, kStride);
  if (S::row(lane) >= rows) return;
  const int n = S::row(lane) * M + S::column(lane);
  out[n] = sum;
  ++count[n];
}
struct Given {
  const void *w, *x;
  f32* out;
  int* count;
};
struct Shape {
  using Launch = Given;
};
}  // namespace mpk
"""


def entry(number: int, w: str, x: str, rows: int, m: int, depth: int) -> str:
    head = f'extern "C" __global__ void __launch_bounds__(384) chunk{number}(const mpk::Given given)'
    call = f"mpk::chunk<mpk::{w}, mpk::{x}, {m}, {rows}, {depth}>(given.w, given.x, given.out, given.count);"
    return f"{head} {{ {call} }}\n"


CASES = [(w, x, *shape) for w, x in TYPES for shape in SHAPES]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if cuda_emulation.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    entries = "".join(
        entry(n, *case).replace("const mpk::Given ", "const mpk::Given& ") for n, case in enumerate(CASES)
    )
    return cuda_emulation.compiled(SimpleNamespace(source=SOURCE + entries, entry="chunk0"))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_every_sum_once(library: ctypes.CDLL, number: int) -> None:
    w_type, x_type, rows, m, depth = CASES[number]
    types: dict[str, Any] = {"bf16": jnp.bfloat16, "f16": np.float16, "f32": np.float32}
    rng = np.random.default_rng(number)
    # Small whole numbers: sums are exact in any order.
    w = rng.integers(-4, 5, (rows, depth)).astype(types[w_type])
    x = rng.integers(-4, 5, (m, depth)).astype(types[x_type])
    out, count = np.full((rows, m), np.nan, np.float32), np.zeros((rows, m), np.int32)
    given = np.array([a.ctypes.data for a in (w, x, out, count)], np.uint64)
    function = ctypes.cast(getattr(library, f"chunk{number}"), ctypes.c_void_p)
    size = 32 + w.nbytes + m * (depth + 8) * x.itemsize
    assert library.emulate(function, ctypes.c_void_p(given.ctypes.data), 1, 32, size, ctypes.c_uint64(number)) == 0
    assert (count == 1).all()
    np.testing.assert_array_equal(out, w.astype(np.float32) @ x.astype(np.float32).T)


@pytest.mark.parametrize(
    ("rows", "depth", "m"),
    [
        (1, 3072, 1),
        (1, 4096, 4),
        (2, 2048, 1),
        (2, 2048, 4),
        (4, 1024, 1),
        (4, 1024, 4),
        (3, 1280, 2),
        (16, 256, 2),
        (16, 128, 1),
        (2, 2560, 1),
    ],
)
def test_matrices_are_loaded_as_they_lie(rows: int, depth: int, m: int, tmp_path: Path) -> None:
    """Into the registers where tensor cores want them, of which there are enough."""
    compiled = nvrtc.compile_source(SOURCE + entry(0, "bf16", "bf16", rows, m, depth), "sm_90a")
    assert compiled.resources.spill_bytes == 0
    found = instructions(compiled.cubin, tmp_path)
    assert found["LDSM.16.M88.4"] > 0 and found["LDS.128"] == 0
    # Which sums a step adds to is known. (Of more than sixteen, some pass through local memory on their way to lanes.)
    assert rows * m > 16 or not any(name.startswith(("LDL", "STL")) for name in found)
