"""Whether functions that are compiled, run and dropped leave anything behind: memory, threads, file handles.

    python -m benchmarks.lifecycle
    python -m benchmarks.lifecycle --engine jit        # what JAX itself keeps

Each cycle compiles a new function (its constant, and so its code, was never seen before), runs it, checks the result
and drops everything.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from models.engines import ENGINES, compiler

COLUMNS = ("cycle", "rss_mb", "threads", "file_handles", "seconds")


def snapshot(cycle: int, start: float) -> harness.Row:
    """Memory, threads and file handles of this process, after a full garbage collection."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return {
        "cycle": cycle,
        "rss_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "threads": len(os.listdir("/proc/self/task")),
        # One of them is the listing's own.
        "file_handles": len(os.listdir("/proc/self/fd")) - 1,
        "seconds": time.perf_counter() - start,
    }


def cycle(compile_: Callable[..., Any], number: int) -> None:
    """Compiles, runs, checks and drops one function.

    Raises:
        RuntimeError: the result is wrong.
    """

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.maximum(x @ w, 0) + float(number)

    x, w = np.ones((1, 16), np.float32), np.full((16, 8), 0.5, np.float32)
    found = np.asarray(compile_(function)(x, w))
    if not np.array_equal(found, np.full((1, 8), 8.0 + number, np.float32)):
        raise RuntimeError(f"cycle {number} gives {found}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 if more is left behind than allowed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--engine", choices=ENGINES, default="mpk")
    add("--cycles", type=int, default=10_000)
    add("--settle", type=int, default=1_000, help="cycles before the first snapshot that counts")
    add("--allow-mb", type=float, default=5.0, help="growth of memory allowed from then on")
    add("--out", type=Path, default=harness.RESULTS / "lifecycle.json")
    options = parser.parse_args(argv)
    compile_ = compiler(options.engine)
    every = max(1, options.cycles // 10)
    start, rows = time.perf_counter(), []
    for number in range(1, options.cycles + 1):
        cycle(compile_, number)
        if number % every == 0 or number == options.settle:
            rows.append(snapshot(number, start))
            print(json.dumps(rows[-1]), flush=True)
    settled = next(row for row in rows if row["cycle"] >= options.settle)
    growth = {key: rows[-1][key] - settled[key] for key in ("rss_mb", "threads", "file_handles")}
    kept = growth["rss_mb"] <= options.allow_mb and growth["threads"] <= 0 and growth["file_handles"] <= 0
    print(f"from cycle {settled['cycle']} to {rows[-1]['cycle']}: {growth}")
    harness.write(
        [{"system": options.engine, **row} for row in rows], options.out, growth=growth, allowed_mb=options.allow_mb
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
