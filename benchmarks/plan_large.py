"""How long it takes to plan and verify a large decode step for a GPU, with no GPU present, and what the plan is worth.

    python -m benchmarks.plan_large
    python -m benchmarks.plan_large --explain --layers 2

The model has the shape of one of eight billion parameters; it has no weights. Seconds are counted from the jaxpr; the
median of several runs in one process is reported beside the first one. A second row has the plan with the fewest
phases, which the planner makes where a hand-off costs more, at the prices of the first.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from benchmarks import harness
from benchmarks.kernel import decode_step
from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.layouts import permute_inputs, preferred
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan, Target
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.report import PlanStats, explain, plan_stats
from jax_mpk.plan.verify import verify_plan
from models.decoder import DecoderConfig

STAGES = ("capture", "graph", "layouts", "fuse", "plan", "verify")
#: At this price parts of attention are merged by their readers, and a layer has one phase less.
DEAR_HANDOFF = 2e-6
Result = TypeVar("Result")


def config(layers: int) -> DecoderConfig:
    """An 8B-shaped decoder with separate head and normalised queries and keys, in bf16."""
    return DecoderConfig(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        rms_eps=1e-6,
        qk_norm=True,
        tie_embeddings=False,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )


def trace(shape: DecoderConfig, cache_len: int) -> tuple[Any, frozenset[int], int]:
    """The jaxpr of a greedy decode step, the positions of the donated cache, and the bytes of the weights."""
    step, params, cache, *scalars = decode_step(shape, 1, cache_len)
    jaxpr = jax.make_jaxpr(step)(params, cache, *scalars)
    leaves = jax.tree.leaves(params)
    first, count = len(leaves), len(jax.tree.leaves(cache))
    return jaxpr, frozenset(range(first, first + count)), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def stages(jaxpr: Any, donated: frozenset[int], target: Target) -> tuple[Plan, int, dict[str, float]]:
    """Runs every stage once; returns the plan, the number of captured equations and the seconds of each stage.

    "cpu" among the seconds is the processor time of all stages together: what they would take on an idle machine.
    """
    seconds: dict[str, float] = {}
    before = time.process_time()

    def timed(name: str, run: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        result = run()
        seconds[name] = time.perf_counter() - start
        return result

    captured = timed("capture", lambda: capture(jaxpr))
    # Closed-over arrays come before the arguments.
    shifted = frozenset(position + len(captured.consts) for position in donated)
    graph = timed("graph", lambda: build_graph(captured.jaxpr, donated=shifted))
    # Weights as jax_mpk.place stores them.
    placed = timed("layouts", lambda: permute_inputs(graph, preferred(fuse(graph))))
    fused = timed("fuse", lambda: fuse(placed))
    plan = timed("plan", lambda: make_plan(fused, target))
    timed("verify", lambda: verify_plan(plan))
    seconds["cpu"] = time.process_time() - before
    return plan, len(captured.jaxpr.eqns), seconds


def total(seconds: dict[str, float]) -> float:
    """Seconds of all stages."""
    return sum(seconds[name] for name in STAGES)


def row(stats: PlanStats, layers: int) -> harness.Row:
    """What the plan is worth."""
    return {
        "operators": stats.operators,
        "routines": len(stats.routines),
        "tasks": stats.tasks,
        "events": stats.events,
        "phases": stats.phases,
        "phases_per_layer": stats.phases / layers,
        "weight_bytes": stats.weight_bytes,
        "cache_bytes": stats.cache_bytes,
        "activation_bytes": stats.activation_bytes,
        "workspace_bytes": stats.workspace_bytes,
        "scratch_bytes": stats.scratch_bytes,
        "predicted_ms": 1e3 * stats.predicted_s,
        "bytes_ms": 1e3 * stats.roofline_s,
        "predicted_over_bytes": stats.predicted_s / stats.roofline_s,
        "least_busy": min(r.busy for r in stats.large_contractions),
        "most_uneven": max(r.imbalance for r in stats.large_contractions),
    }


def contractions(stats: PlanStats) -> list[harness.Row]:
    """SM use and balance of every kind of contraction over 1 MB."""
    kinds: dict[tuple[str, str, int], list[Any]] = {}
    for routine in stats.large_contractions:
        kinds.setdefault((Path(routine.line).name, routine.text, routine.tasks), []).append(routine)
    return [
        {
            "line": line,
            "contraction": text,
            "count": len(found),
            "tasks": tasks,
            "least_busy": min(r.busy for r in found),
            "most_uneven": max(r.imbalance for r in found),
            "streamed_mb": max(r.streamed_bytes for r in found) / 1e6,
            "predicted_us": 1e6 * max(r.seconds for r in found),
        }
        for (line, text, tasks), found in kinds.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_large", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=36)
    add("--cache-len", type=int, default=1024)
    add("--rounds", type=int, default=3)
    add("--explain", action="store_true", help="print what explain() says about the plan")
    add("--out", type=Path, default=harness.RESULTS / "plan_large.json")
    options = parser.parse_args(argv)
    jaxpr, donated, weights = trace(config(options.layers), options.cache_len)
    # The cost of one row of the embedding is nothing; that of the table would be felt.
    table = config(options.layers).vocab_size * config(options.layers).hidden_size * 2
    rows, kinds = [], []
    for handoff in (targets.H100.handoff, DEAR_HANDOFF):
        rounds: list[dict[str, float]] = []
        for _ in range(options.rounds):
            plan, equations, seconds = stages(jaxpr, donated, dataclasses.replace(targets.H100, handoff=handoff))
            rounds.append(seconds)
            shown = {**seconds, "total": total(seconds)}
            print("  ".join(f"{name} {value:.2f} s" for name, value in shown.items()))
        plan = dataclasses.replace(plan, target=targets.H100)
        stats = plan_stats(plan)
        if options.explain:
            print(explain(plan, name="step", equations=equations))
        if not abs(stats.weight_bytes - (weights - table)) < 0.001 * weights:
            print(f"the plan reads {stats.weight_bytes} bytes of {weights - table} of weights", file=sys.stderr)
            return 1
        rows.append(
            {
                "system": "mpk",
                "model": f"8B-shaped, {options.layers} layers",
                "target": targets.H100.name,
                "planned_handoff_us": 1e6 * handoff,
                "batch": 1,
                "kv_len": options.cache_len,
                "dtype": "bf16",
                "equations": equations,
                **{f"{name}_s": statistics.median(r[name] for r in rounds) for name in STAGES},
                "total_s": statistics.median(total(r) for r in rounds),
                "first_total_s": total(rounds[0]),
                "cpu_s": statistics.median(r["cpu"] for r in rounds),
                **row(stats, options.layers),
            }
        )
        for key, value in rows[-1].items():
            print(f"{key:>22}  {value:.5g}" if isinstance(value, float) else f"{key:>22}  {value}")
        found = contractions(stats)
        print(harness.table(found, tuple(found[0])))
        kinds += [{"planned_handoff_us": 1e6 * handoff, **kind} for kind in found]
    harness.write(rows, options.out, contractions=kinds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
