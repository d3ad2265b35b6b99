"""How long a decode step takes to become a kernel, with an empty disk cache and with what that left. Needs no GPU.

    python -m benchmarks.compile --model qwen3-8b
    python -m benchmarks.compile --model llama-3.2-1b --batch 16 --target h100-sxm

Each time in a process of its own, from the function to the machine code: JAX's tracing, the layouts that weights should
have, lowering, planning, verifying, code and NVRTC. No weights: to place them, and to load kernels, is not compiling.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax_mpk
from benchmarks import harness
from benchmarks.kernel import decode_step
from benchmarks.shapes import SHAPES

COLUMNS = ("model", "batch", "disk_cache", "seconds", "trace", "graph", "plan", "verify", "codegen", "nvrtc", "cache")


def compile_step(model: str, batch: int, cache_len: int, target: str) -> harness.Row:
    """Seconds from the function to its kernel, in all and by stage.

    Args:
        model: a shape of ``benchmarks.shapes``.
        batch: sequences.
        cache_len: positions of the cache.
        target: the GPU that the kernel is for.
    """
    step, *arguments = decode_step(SHAPES[model], batch, cache_len)
    begin = time.perf_counter()
    compiled = jax_mpk.megakernelize(step, donate_argnums=1, target=target)
    compiled.lower(*jax_mpk.place(compiled, *arguments))
    return {"seconds": time.perf_counter() - begin, **jax_mpk.compile_seconds()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="qwen3-8b")
    add("--batch", type=int, default=1)
    add("--cache-len", type=int, default=1024)
    add("--target", default="h200-sxm")
    add("--row", action="store_true", help=argparse.SUPPRESS)  # the process that compiles
    add("--commit", help="of the checkout, where git does not tell")
    add("--out", type=Path, default=harness.RESULTS / "compile.json")
    options = parser.parse_args(argv)
    if options.row:
        print(json.dumps(compile_step(options.model, options.batch, options.cache_len, options.target)))
        return 0
    rows: list[harness.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        again = [sys.executable, "-m", "benchmarks.compile", *(sys.argv[1:] if argv is None else argv), "--row"]
        for state in ("empty", "warm"):
            environment = {**os.environ, "JAX_MPK_CACHE_DIR": folder, "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(again, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            about = {"model": options.model, "batch": options.batch, "target": options.target, "disk_cache": state}
            rows.append(about | json.loads(done.stdout))
    print(harness.table(rows, COLUMNS))
    harness.write(rows, options.out, commit=options.commit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
