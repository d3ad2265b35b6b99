"""The CPU executor's matrix kernels, against memory where few rows meet a large matrix, and against jax.jit's dot.

    python -m benchmarks.contract_cpu
    taskset -c 0 python -m benchmarks.contract_cpu --dtypes bf16 --rows 1,8

Threads share a matrix as tasks do, by columns of the result. Matrices take turns until they exceed every cache, so what
is read comes from memory. `read_gb_per_s` is a plain reading loop over the same matrices with as many threads. jax.jit
uses all cores of the process, so its column is filled for as many threads only: pin the process for a single one.
"""

import argparse
import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import harness
from jax_mpk import _native

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# Reduced size and columns of the matrix: layers of a small decoder, its head, and a layer of a larger one.
MATRICES = ((576, 1536), (1536, 576), (576, 49152), (2048, 8192))
ROWS = (1, 2, 8, 64, 512)
# Largest rows times matrix elements: beyond that a case takes seconds and says nothing new.
MOST_WORK = 2**31
COLUMNS = (
    "dtype",
    "layout",
    "m",
    "k",
    "n",
    "threads",
    "gb_per_s",
    "read_gb_per_s",
    "gflop_per_s",
    "jit_gflop_per_s",
    "speedup",
    "spread",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product of a [m, k] array with matrices of k times n elements.

    Attributes:
        layout: "kn" or "nk", the order of the matrix's axes in memory.
        x: array[m, k].
        matrices: of equal shape, more than fit into a cache.
    """

    dtype: str
    layout: str
    x: jax.Array
    matrices: list[jax.Array]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """m, k and n."""
        (m, k), shape = self.x.shape, self.matrices[0].shape
        return m, k, shape[self.layout.index("n")]


def make_case(dtype: str, layout: str, m: int, k: int, n: int, cold_bytes: int) -> Case:
    """A case with random values, with as many matrices as make up `cold_bytes`, at least one."""
    rng = np.random.default_rng(0)
    shape = (k, n) if layout == "kn" else (n, k)
    first = jnp.asarray(rng.standard_normal(shape, np.float32), DTYPES[dtype])
    copies = max(1, -(-cold_bytes // first.nbytes))
    x = jnp.asarray(rng.standard_normal((m, k), np.float32), DTYPES[dtype])
    return Case(dtype, layout, x, [first, *(jnp.copy(first) for _ in range(copies - 1))])


def kernel(case: Case, threads: int, pool: concurrent.futures.Executor) -> Callable[[], np.ndarray]:
    """A function that multiplies with every matrix and returns the last result, float32[m, n]."""
    m, k, n = case.sizes
    x, matrices = np.asarray(case.x), [np.asarray(w) for w in case.matrices]
    out = np.empty((m, n), np.float32)
    rhs_strides = [0, 1, n] if case.layout == "kn" else [0, k, 1]
    cuts = [n * t // threads // 32 * 32 for t in range(threads)] + [n]

    def work(thread: int) -> None:
        low, high = cuts[thread : thread + 2]
        for w in matrices:
            done = _native.contract_tile(
                [case.dtype, case.dtype, "f32"],
                [x.ctypes.data, w.ctypes.data + low * rhs_strides[1] * w.itemsize, out.ctypes.data + low * 4],
                [1, m, high - low, k],
                [0, k, 1],
                rhs_strides,
                [0, n, 1],
            )
            assert done

    def run() -> np.ndarray:
        if threads == 1:
            work(0)
        else:
            list(pool.map(work, range(threads)))
        return out

    return run


def jit(case: Case) -> Callable[[], jax.Array]:
    """Like `kernel`, by jax.jit."""
    axis = case.layout.index("k")
    dot = jax.jit(lambda x, w: lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32))

    def run() -> jax.Array:
        return [dot(case.x, w) for w in case.matrices][-1]

    return run


def read(case: Case, threads: int, pool: concurrent.futures.Executor) -> Callable[[], None]:
    """A function that reads every matrix once."""
    words = [np.array_split(np.asarray(w).reshape(-1).view(np.uint32).view(np.uint64), threads) for w in case.matrices]

    def work(thread: int) -> None:
        for pieces in words:
            np.bitwise_or.reduce(pieces[thread])

    def run() -> None:
        if threads == 1:
            work(0)
        else:
            list(pool.map(work, range(threads)))

    return run


def measure(case: Case, threads: int, rounds: int, pool: concurrent.futures.Executor) -> harness.Row:
    """Times one case; the kernel's result must be jax.jit's up to rounding."""
    m, k, n = case.sizes
    runs: dict[str, Callable[[], object]] = {
        "kernel": kernel(case, threads, pool),
        "read": read(case, threads, pool),
    }
    reference = jit(case)
    np.testing.assert_allclose(np.asarray(runs["kernel"]()), np.asarray(reference()), rtol=0, atol=1e-4 * math.sqrt(k))
    if threads == harness.cores():
        runs["jit"] = reference
    timings = harness.interleave(runs, rounds=rounds, repetitions=len(case.matrices))
    flops, nbytes = 2 * m * k * n, case.matrices[0].nbytes
    seconds = timings["kernel"].median
    row: harness.Row = {
        "dtype": case.dtype,
        "layout": case.layout,
        "m": m,
        "k": k,
        "n": n,
        "threads": threads,
        "seconds": seconds,
        "spread": timings["kernel"].spread,
        "gb_per_s": nbytes / seconds / 1e9,
        "read_gb_per_s": nbytes / timings["read"].median / 1e9,
        "gflop_per_s": flops / seconds / 1e9,
    }
    if "jit" in timings:
        row["jit_gflop_per_s"] = flops / timings["jit"].median / 1e9
        row["speedup"] = timings["jit"].median / seconds
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="f32, bf16")
    parser.add_argument("--layouts", default="kn,nk", help="order of the matrix's axes in memory")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="values of m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold-bytes", type=int, default=1 << 28, help="bytes of matrices that take turns")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "contract_cpu.json")
    options = parser.parse_args(arguments)

    rows: list[harness.Row] = []
    with concurrent.futures.ThreadPoolExecutor(harness.cores()) as pool:
        for dtype in options.dtypes.split(","):
            for layout in options.layouts.split(","):
                for k, n in MATRICES:
                    for m in map(int, options.rows.split(",")):
                        if m * k * n > MOST_WORK:
                            continue
                        # With many rows, arithmetic decides and a matrix or two are enough.
                        case = make_case(dtype, layout, m, k, n, options.cold_bytes // max(1, m // 8) ** 2)
                        for threads in sorted({1, harness.cores()}):
                            rows.append(measure(case, threads, options.rounds, pool))
                            print(harness.table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    print(harness.table(rows, COLUMNS))
    harness.write(rows, options.out, rounds=options.rounds)


if __name__ == "__main__":
    main()
