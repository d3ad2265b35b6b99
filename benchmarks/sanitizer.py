"""What compute-sanitizer says about the kernel of a small decode step: memory errors, races, misuse of barriers.

    python -m benchmarks.sanitizer
    python -m benchmarks.sanitizer --tools memcheck --steps 2

The step runs in a process of its own under each tool, once per call and in a loop inside one call, and its tokens are
compared with those of jax.jit on the CPU. Only kernels of jax_mpk are watched.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.shapes import SHAPES, first_tokens, random_cache, random_params
from models.decoder import step_functions

TOOLS = ("memcheck", "racecheck", "synccheck")
CONFIG = dataclasses.replace(
    SHAPES["tiny"], hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=4, dtype=jnp.float32
)
CACHE_LEN, START = 256, 100
COLUMNS = ("tool", "clean", "errors", "tokens_right", "seconds")
#: What the watched process prints last.
RIGHT = "tokens are those of jax.jit"


def decode(steps: int) -> None:
    """Runs the steps both ways and compares their tokens.

    Raises:
        SystemExit: they differ from those of jax.jit.
    """
    import jax_mpk

    graphdef, params = random_params(CONFIG)
    decode_step = step_functions(graphdef).decode_step

    def step(params: Any, cache: Any, token: jax.Array, pos: jax.Array) -> tuple[jax.Array, Any]:
        logits, cache = decode_step(params, cache, token, pos)
        return jnp.argmax(logits, -1).astype(jnp.int32), cache

    def loop(params: Any, cache: Any, token: jax.Array, pos: jax.Array) -> jax.Array:
        def body(i: jax.Array, carry: Any) -> Any:
            tokens, token, cache = carry
            token, cache = step(params, cache, token, pos + i)
            return tokens.at[i].set(token[0]), token, cache

        return jax.lax.fori_loop(0, steps, body, (jnp.zeros(steps, jnp.int32), token, cache))[0]

    def one_by_one(compiled: Any, params: Any, cache: Any, token: jax.Array) -> list[int]:
        tokens = []
        for k in range(steps):
            token, cache = compiled(params, cache, token, jnp.int32(START + k))
            tokens.append(int(token[0]))
        return tokens

    cache = jax.tree.map(lambda a: a.astype(CONFIG.dtype), random_cache(CONFIG, 1, CACHE_LEN))
    token = jnp.asarray(first_tokens(CONFIG, 1))
    host = jax.devices("cpu")[0]
    expected = one_by_one(jax.jit(step), *jax.device_put((params, cache, token), host))
    placed = jax_mpk.place(jax_mpk.megakernelize(step), params, cache, token, jnp.int32(START))[0]
    found = one_by_one(jax_mpk.megakernelize(step), placed, cache, token)
    looped = np.asarray(jax_mpk.megakernelize(loop)(placed, cache, token, jnp.int32(START))).tolist()
    jax_mpk.check()
    if not expected == found == looped:
        raise SystemExit(f"tokens differ: jax.jit {expected}, step by step {found}, in one launch {looped}")
    print(RIGHT)


def watch(sanitizer: str, tool: str, steps: int, limit: float) -> harness.Row:
    """Runs the steps under a tool."""
    command = [sanitizer, "--tool", tool, "--kernel-name", "kernel_substring=jax_mpk_kernel", "--print-limit", "20"]
    command += [sys.executable, "-m", "benchmarks.sanitizer", "--decode", "--steps", str(steps)]
    # Watched kernels are slow: no wait of theirs is too long.
    settings = dict(os.environ, JAX_MPK_DEADLINE_MS="0", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=settings, cwd=harness.ROOT, check=False
        )
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        text = f"{(error.stdout or b'').decode()}\nstopped after {limit:.0f} s"
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    errors = int(summary[1]) if summary else None
    right = RIGHT in text
    row = {"tool": tool, "clean": errors == 0 and right, "errors": errors, "tokens_right": right}
    if not row["clean"]:
        row["output"] = text[-4000:]
        print(text[-6000:])
    return {**row, "seconds": time.perf_counter() - begin}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 if a tool found something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitizer", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tools", default=",".join(TOOLS), help="separated by commas")
    add("--steps", type=int, default=3)
    add("--limit", type=float, default=120.0, help="seconds for each tool")
    add("--decode", action="store_true", help="only run the steps, as the tools do")
    add("--commit", help="where git cannot say")
    add("--out", type=Path, default=harness.RESULTS / "sanitizer.json")
    options = parser.parse_args(argv)
    if options.decode:
        decode(options.steps)
        return 0
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        print("there is no compute-sanitizer on this machine", file=sys.stderr)
        return 2
    rows = [watch(sanitizer, tool, options.steps, options.limit) for tool in options.tools.split(",")]
    print(harness.table(rows, COLUMNS))
    said = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"Version (\S+)", said)
    harness.write(
        rows,
        options.out,
        commit=options.commit,
        sanitizer_version=version[1] if version else None,
    )
    return 0 if all(row["clean"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
