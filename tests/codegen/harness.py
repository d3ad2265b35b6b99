"""Runs plans on the CPU executor without XLA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr

from jax_mpk import _native
from jax_mpk.capture import capture
from jax_mpk.codegen.encode import encode
from jax_mpk.graph import dtypes
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Graph
from jax_mpk.plan.ir import Plan, Target
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.targets import cpu
from tests.references import quick_jit

Array = np.ndarray[Any, Any]


def graph_of(fn: Callable[..., Any], *args: Any, donated: frozenset[int] = frozenset(), fused: bool = True) -> Graph:
    """The graph of a function of flat arrays."""
    captured = capture(jax.make_jaxpr(fn)(*args))
    jaxpr: Jaxpr = captured.jaxpr
    assert not captured.consts, "pass constants as arguments"
    graph = build_graph(jaxpr, donated=donated)
    return fuse(graph) if fused else graph


def plan_of(
    fn: Callable[..., Any], *args: Any, workers: int = 1, tagged: bool = False, fused: bool = True, **options: Any
) -> Plan:
    return make_plan(graph_of(fn, *args, fused=fused, **options), cpu(workers, tagged))


def run_plan(plan: Plan, args: Sequence[Any], *, chaos: int | None = None, threads: int | None = 1) -> list[Array]:
    """Results of a plan; raises what the executor reports."""
    executable = _native.parse_program(encode(plan).words.tobytes())
    return run_executable(executable, plan, args, chaos=chaos, threads=threads)


def run_executable(
    executable: Any, plan: Plan, args: Sequence[Any], *, chaos: int | None = None, threads: int | None = 1
) -> list[Array]:
    arguments = [np.array(a, order="C").reshape(-1).view(np.uint8) for a in args]
    values = [plan.graph.values[v] for v in plan.graph.results]
    results = [np.empty(v.shape, dtypes.to_numpy(v.dtype)) for v in values]
    raw = [r.reshape(-1).view(np.uint8) for r in results]
    if plan.workspace_bytes:
        raw.append(np.full(plan.workspace_bytes, 0xFF, np.uint8))
    outcome = executable.run(arguments, raw, threads=threads, chaos_seed=chaos)
    assert outcome.kind == "ok", outcome.message
    return results


def run(fn: Callable[..., Any], *args: Any, workers: int = 1, tagged: bool = False, fused: bool = True) -> list[Array]:
    """Results of a function of flat arrays, planned for a number of workers."""
    return run_plan(plan_of(fn, *args, workers=workers, tagged=tagged, fused=fused), args)


def expected(fn: Callable[..., Any], *args: Any) -> list[Array]:
    """Results of ``jax.jit``."""
    return [np.asarray(x) for x in jax.tree.leaves(quick_jit(fn)(*args))]


__all__ = ["Target", "expected", "graph_of", "plan_of", "run", "run_executable", "run_plan"]
