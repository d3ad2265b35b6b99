"""What a call costs beyond its work: a function of hundreds of arguments that does next to nothing.

    python -m benchmarks.call_overhead

A language model's step has hundreds of weights, and each call passes all of them, most of them in layouts of their own
after `jax_mpk.place`. Measured are calls from Python (eager), and calls from Python of a jitted function that holds the
call; jax.jit in jax.jit is jax.jit.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from benchmarks import harness
from models.engines import compiler

SYSTEMS = ("jit", "mpk", "jit_of_mpk")
KINDS = ("flat", "nested", "placed")
COLUMNS = ("system", "arguments", "kind", "us_per_call", "spread", "over_jit_us")


def touch_all(args: Sequence[jax.Array]) -> jax.Array:
    """One element of each argument, so that none can be dropped; little else."""
    total = args[0][0, 0]
    for x in args[1:]:
        total = total + x[0, 0]
    return total


def arguments(count: int, kind: str) -> tuple[Any, ...]:
    """Small arrays: as `count` arguments ("flat"), columns first ("placed"), or a dictionary of layers ("nested")."""
    leaves = [jnp.arange(8, dtype=jnp.float32).reshape(4, 2) + i for i in range(count)]
    if kind == "placed":
        return tuple(jax.device_put(x, Format(Layout((1, 0)), x.sharding)) for x in leaves)
    if kind == "flat":
        return tuple(leaves)
    # Eight weights a layer, as models have.
    layers = {f"layer_{i // 8:03d}": dict(zip("abcdefgh", leaves[i : i + 8])) for i in range(0, count, 8)}
    return ({"layers": layers},)


def make_system(name: str) -> Callable[..., Any]:
    """Compiles the function in one of the ways of `SYSTEMS`."""

    def step(*args: Any) -> jax.Array:
        return touch_all(jax.tree.leaves(args))

    compiled = compiler("mpk" if "mpk" in name else "jit")(step)
    return jax.jit(compiled) if name == "jit_of_mpk" else compiled


def measure(systems: Sequence[str], count: int, kind: str, rounds: int, calls: int) -> list[harness.Row]:
    """Rows for one set of arguments.

    Raises:
        RuntimeError: a system's result is not that of NumPy.
    """
    args = arguments(count, kind)
    expected = np.sum([np.asarray(x)[0, 0] for x in jax.tree.leaves(args)])
    compiled = {name: make_system(name) for name in systems}

    def repeat(call: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            out = None
            for _ in range(calls):
                out = call(*args)
            return out

        return run

    for name, call in compiled.items():
        if (found := np.asarray(call(*args))) != expected:
            raise RuntimeError(f"{name} gives {found}, not {expected}")
    timings = harness.interleave(
        {name: repeat(call) for name, call in compiled.items()}, rounds=rounds, repetitions=calls
    )
    return [
        {
            "system": name,
            "arguments": count,
            "kind": kind,
            "us_per_call": 1e6 * timing.median,
            "spread": timing.spread,
            "over_jit_us": 1e6 * (timing.median - timings["jit"].median) if "jit" in timings else None,
        }
        for name, timing in timings.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.call_overhead", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--systems", default=",".join(SYSTEMS), help=f"some of {', '.join(SYSTEMS)}")
    add("--arguments", type=int, nargs="+", default=[1, 300])
    add("--rounds", type=int, default=15)
    add("--calls", type=int, default=200, help="calls per sample")
    add("--out", type=Path, default=harness.RESULTS / "call_overhead.json")
    options = parser.parse_args(argv)
    rows = []
    for count in options.arguments:
        for kind in KINDS:
            rows += measure(options.systems.split(","), count, kind, options.rounds, options.calls)
    print(harness.table(rows, COLUMNS))
    harness.write(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
