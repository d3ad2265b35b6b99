"""How many kernels a GPU runs for a call: of a decode step, and of a loop of them, as CUPTI records them.

    python -m benchmarks.launches

The calls run under jax.profiler; what its trace has on the GPU's streams is counted by name, once for jax_mpk and once
for jax.jit.
"""

import argparse
import collections
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from benchmarks import harness
from benchmarks.shapes import SHAPES, first_tokens, random_cache, random_params
from models.decoder import step_functions
from models.engines import compiler

CALLS, STEPS = 5, 4
CACHE_LEN, START = 256, 100
COLUMNS = ("system", "call", "calls", "kernels", "kernels_per_call", "copies")


def device_events(folder: Path) -> dict[str, int]:
    """What ran on the GPU's streams, by name."""
    (path,) = folder.rglob("*.xplane.pb")
    names: collections.Counter[str] = collections.Counter()
    for plane in ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            # Other lines of the plane repeat what the streams have, by XLA module and operation.
            if line.name.startswith("Stream"):
                names.update(event.name for event in line.events)
    return dict(names)


def traced(run: Callable[[], Any], calls: int) -> dict[str, int]:
    """What the GPU ran for so many calls, none of which compiles."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(run())
        return device_events(Path(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 if a call of jax_mpk is more than one kernel."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--commit", help="where git cannot say")
    add("--out", type=Path, default=harness.RESULTS / "launches.json")
    options = parser.parse_args(argv)
    config = SHAPES["tiny"]
    graphdef, params = random_params(config)
    decode_step = step_functions(graphdef).decode_step

    def step(params: Any, cache: Any, token: jax.Array, pos: jax.Array) -> Any:
        logits, cache = decode_step(params, cache, token, pos)
        return jnp.argmax(logits, -1).astype(jnp.int32), cache

    def loop(params: Any, cache: Any, token: jax.Array, pos: jax.Array) -> Any:
        def body(i: jax.Array, carry: Any) -> Any:
            return step(params, carry[1], carry[0], pos + i)

        return jax.lax.fori_loop(0, STEPS, body, (token, cache))

    args = (params, random_cache(config, 1, CACHE_LEN), jnp.asarray(first_tokens(config, 1)), jnp.int32(START))
    rows = []
    for system in ("mpk", "jit"):
        for name, fn in (("step", step), (f"loop of {STEPS} steps", loop)):
            # Under jit, so that arguments and results are handled by one executable.
            call = jax.jit(compiler(system)(fn)) if system == "mpk" else jax.jit(fn)
            found = traced(lambda call=call: call(*args), CALLS)
            copies = sum(n for event, n in found.items() if event.lower().startswith(("mem", "d2d", "h2d", "d2h")))
            kernels = sum(found.values()) - copies
            rows.append(
                {
                    "system": system,
                    "call": name,
                    "calls": CALLS,
                    "kernels": kernels,
                    "kernels_per_call": kernels / CALLS,
                    "copies": copies,
                    "names": dict(sorted(found.items(), key=lambda item: -item[1])[:12]),
                }
            )
    print(harness.table(rows, COLUMNS))
    harness.write(rows, options.out, commit=options.commit)
    one = all(r["kernels"] == CALLS and set(r["names"]) >= {"jax_mpk_kernel"} for r in rows if r["system"] == "mpk")
    return 0 if one else 1


if __name__ == "__main__":
    sys.exit(main())
