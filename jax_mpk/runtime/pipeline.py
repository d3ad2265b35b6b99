"""From a jaxpr to a Program: the stages in order, once for each function, target and donation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Jaxpr

from jax_mpk.capture import capture
from jax_mpk.codegen.encode import encode
from jax_mpk.codegen.ir import Program
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Graph
from jax_mpk.graph.verify import verify_graph
from jax_mpk.plan.ir import Plan, Target
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.verify import verify_plan
from jax_mpk.runtime import targets
from jax_mpk.runtime.jax_internals import weakref_lru_cache


@dataclass(frozen=True)
class Stages:
    """Everything between a traced function and its custom call.

    Attributes:
      name: the function's name.
      jaxpr: the captured jaxpr: no calls, no constants.
      built: the Graph before fusion.
      graph: the fused Graph.
      plan: the Plan, verified.
      program: what the executor runs.
    """

    name: str
    jaxpr: Jaxpr
    built: Graph
    graph: Graph
    plan: Plan
    program: Program


@dataclass(frozen=True)
class Artifact:
    """What the custom call needs.

    Attributes:
      program: the words of the Program, as bytes.
      workspace_bytes: size of the extra result; 0: there is none.
      aliases: pairs of result number and the donated argument whose buffer it takes over.
    """

    program: bytes
    workspace_bytes: int
    aliases: tuple[tuple[int, int], ...]


# JAX's settings decided what the jaxpr is. In the key they would only tell calls from their lowering, where the mesh
# is set, and each function would be planned twice.
_cache = functools.partial(weakref_lru_cache, trace_context_in_key=False)

_observers: list[Callable[[Stages], None]] = []


def on_compiled(observer: Callable[[Stages], None]) -> None:
    """Calls ``observer`` with the stages of every function that is compiled from now on."""
    _observers.append(observer)


# The stages of a large model are big, and only explain() and lower() ask for them again.
@_cache(maxsize=8)
def stages(jaxpr: Any, donated: tuple[bool, ...], name: str, target: Target) -> Stages:
    """All stages of a closed jaxpr without constants."""
    captured = capture(jaxpr)
    if captured.consts:
        raise AssertionError("a megakernel's jaxpr has constants; they should be operands")
    return _compile(captured.jaxpr, donated, name, target)


@_cache(maxsize=None)
def artifact(jaxpr: Any, donated: tuple[bool, ...], name: str, target: Target) -> Artifact:
    """What the custom call of a closed jaxpr needs. It lives as long as the jaxpr."""
    made = stages(jaxpr, donated, name, target)
    return Artifact(
        program=made.program.words.tobytes(),
        workspace_bytes=made.plan.workspace_bytes,
        aliases=tuple(sorted(made.plan.aliases.items())),
    )


def _compile(jaxpr: Jaxpr, donated: tuple[bool, ...], name: str, target: Target) -> Stages:
    built = build_graph(
        jaxpr, donated=frozenset(i for i, d in enumerate(donated) if d), platform=targets.platform(target)
    )
    verify_graph(built)
    graph = fuse(built)
    verify_graph(graph)
    plan = make_plan(graph, target)
    verify_plan(plan)
    made = Stages(name, jaxpr, built, graph, plan, encode(plan))
    for observer in _observers:
        observer(made)
    return made
