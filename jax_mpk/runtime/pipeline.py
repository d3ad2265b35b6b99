"""From a jaxpr to what runs: the stages in order, once for each function, target and donation."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import Jaxpr

from jax_mpk import config
from jax_mpk.capture import capture, jaxprs
from jax_mpk.capture.canonical import canonical
from jax_mpk.codegen import cuda as cuda_codegen
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.codegen.encode import encode
from jax_mpk.codegen.ir import Program
from jax_mpk.errors import JaxMpkError, TaskTooLargeError
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.ir import Graph
from jax_mpk.graph.layouts import Layout, movable, permute_inputs
from jax_mpk.graph.layouts import preferred as preferred_layouts
from jax_mpk.graph.verify import verify_graph
from jax_mpk.plan.ir import Plan, Target
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.verify import verify_plan
from jax_mpk.runtime import cuda, cuda_cache, targets
from jax_mpk.runtime.artifact import Artifact
from jax_mpk.runtime.jax_internals import weakref_lru_cache
from jax_mpk.runtime.layouts import AUTO, ROW_MAJOR, Lies
from jax_mpk.runtime.timing import timed

#: Whether tasks that compute more bytes than this in scratch memory fit an SM with what they bring there is looked at.
_SURE_SCRATCH = 64 << 10
#: One layout per operand, None: row-major. (): all operands are.
Layouts = tuple[Layout | None, ...]


@dataclass(frozen=True)
class Stages:
    """Everything between a traced function and its custom call.

    Attributes:
      name: the function's name.
      jaxpr: the captured jaxpr: no calls, no constants.
      built: the Graph before fusion.
      graph: the fused Graph.
      plan: the Plan, verified.
    """

    name: str
    jaxpr: Jaxpr
    built: Graph
    graph: Graph
    plan: Plan

    @functools.cached_property
    def program(self) -> Program | CudaProgram:
        """What runs: a Program of the CPU executor, or a kernel. Made when it is first asked for."""
        generate = encode if targets.platform(self.plan.target) == "cpu" else cuda_codegen.generate
        with timed("codegen"):
            return generate(self.plan)


# JAX's settings decided what the jaxpr is. In the key they would only tell calls from their lowering, where the mesh
# is set, and each function would be planned twice.
_cache = functools.partial(weakref_lru_cache, trace_context_in_key=False)

_observers: list[Callable[[Stages], None]] = []


def on_compiled(observer: Callable[[Stages], None]) -> None:
    """Calls ``observer`` with the stages of every function that is compiled from now on."""
    _observers.append(observer)


# The stages of a large model are big, and only explain() and lower() ask for them again.
@_cache(maxsize=8)
def stages(jaxpr: Any, donated: tuple[bool, ...], name: str, target: Target, layouts: Layouts = ()) -> Stages:
    """All stages of a closed jaxpr without constants.

    Args:
      jaxpr: the function.
      donated: one flag per operand.
      name: of the function.
      target: the device.
      layouts: what :func:`operand_layouts` says.
    """
    captured, built = _built(jaxpr, donated, target)
    if layouts:
        with timed("graph"):
            built = permute_inputs(built, layouts)
        with timed("verify"):
            verify_graph(built)
    with timed("graph"):
        graph = fuse(built)
    with timed("verify"):
        verify_graph(graph)
    made = _fitting(Stages(name, captured, built, graph, _planned(graph, target)))
    for observer in _observers:
        observer(made)
    return made


def _planned(graph: Graph, target: Target) -> Plan:
    with timed("plan"):
        plan = make_plan(graph, target)
    with timed("verify"):
        verify_plan(plan)
    return plan


def _fitting(made: Stages) -> Stages:
    """The same with a plan of smaller tasks where a GPU's SM cannot hold them.

    A plan knows what tasks compute in scratch memory; what they bring there besides, only their code does.
    """
    smaller, target = made, made.plan.target
    while targets.platform(target) != "cpu" and smaller.plan.scratch_bytes > _SURE_SCRATCH:
        try:
            _ = smaller.program
            return smaller
        except TaskTooLargeError:
            target = replace(target, scratch_bytes=min(target.scratch_bytes, smaller.plan.scratch_bytes) // 2)
            smaller = replace(made, plan=_planned(made.graph, target))
        except JaxMpkError:
            break  # who asks for the kernel will hear it
    return smaller


@_cache(maxsize=None)
def artifact(jaxpr: Any, donated: tuple[bool, ...], name: str, target: Target, layouts: Layouts = ()) -> Artifact:
    """What the custom call of a closed jaxpr needs. It lives as long as the jaxpr."""

    def build() -> Artifact:
        return _build(stages(jaxpr, donated, name, target, layouts))

    if targets.platform(target) == "cpu":
        return build()
    about = ("program", repr(donated), name, repr((target, layouts)))
    return Artifact.from_bytes(_through_cache(jaxpr, about, lambda: build().to_bytes()))


def _through_cache(jaxpr: Any, about: tuple[str, ...], make: Callable[[], bytes]) -> bytes:
    """What some process made of a jaxpr before, or what ``make`` makes of it now."""
    cache = cuda_cache.current()
    # Whoever asked for dumps wants every stage to happen.
    text = _text(jaxpr) if cache is not None and config.current().dump_to is None else None
    if cache is None or text is None:
        return make()
    with timed("cache"):
        key = cuda_cache.function_key(text, *about)
        found = cache.get(key)
    if found is None:
        found = make()
        with timed("cache"):
            cache.put(key, found)
    return found


@_cache(maxsize=8)
def _text(jaxpr: Any) -> str | None:
    with timed("cache"):
        return canonical(jaxprs.open_jaxpr(jaxpr)[0])


def _build(made: Stages) -> Artifact:
    aliases = tuple(sorted(made.plan.aliases.items()))
    program = made.program
    if isinstance(program, Program):
        return Artifact(program.words.tobytes(), made.plan.workspace_bytes, aliases)
    return Artifact(cuda.build(program), program.workspace_bytes, aliases)


def preferred(jaxpr: Any, donated: tuple[bool, ...], target: Target) -> Layouts:
    """The layout each operand is read best in; None where that does not matter or cannot be chosen."""
    if not target.contracted_last:
        return (None,) * len(donated)
    return _placement(jaxpr, donated, target).preferred


@dataclass(frozen=True)
class _Placement:
    """How the operands of a jaxpr may lie.

    Attributes:
      movable: positions of those that may have any layout.
      preferred: the layout each is read best in.
    """

    movable: frozenset[int]
    preferred: Layouts


@_cache(maxsize=None)
def _placement(jaxpr: Any, donated: tuple[bool, ...], target: Target) -> _Placement:
    def find() -> bytes:
        built = _built(jaxpr, donated, target)[1]
        return json.dumps([sorted(movable(built)), preferred_layouts(fuse(built))]).encode()

    # The graph is half of what a process would have to do for a kernel that is in the cache.
    can, best = json.loads(_through_cache(jaxpr, ("placement", repr(donated), repr(target)), find))
    return _Placement(frozenset(can), tuple(None if layout is None else tuple(layout) for layout in best))


def operand_layouts(jaxpr: Any, donated: tuple[bool, ...], target: Target, lies: Sequence[Lies]) -> Layouts:
    """The layouts to declare operands in, given how their arrays may lie; (): all of them row-major."""
    if all(lie == ROW_MAJOR for lie in lies):
        return ()
    return _operand_layouts(jaxpr, donated, target, tuple(lies))


@_cache(maxsize=None)
def _operand_layouts(jaxpr: Any, donated: tuple[bool, ...], target: Target, lies: tuple[Lies, ...]) -> Layouts:
    if target.contracted_last:
        found = _placement(jaxpr, donated, target)
        can, best = found.movable, found.preferred
    else:
        can, best = movable(_built(jaxpr, donated, target)[1]), (None,) * len(donated)
    chosen = tuple(_declared(lie, best[i]) if i in can else None for i, lie in enumerate(lies))
    return chosen if any(chosen) else ()


def _declared(lie: Lies, best: Layout | None) -> Layout | None:
    if len(lie) == 1 and lie != AUTO:
        (layout,) = lie
    else:
        layout = best if best in lie or "auto" in lie else None
    assert layout != "auto"
    return None if layout is None or layout == tuple(range(len(layout))) else layout


@_cache(maxsize=8)
def _built(jaxpr: Any, donated: tuple[bool, ...], target: Target) -> tuple[Jaxpr, Graph]:
    """The captured jaxpr and its Graph, arguments row-major."""
    with timed("graph"):
        captured = capture(jaxpr)
        if captured.consts:
            raise AssertionError("a megakernel's jaxpr has constants; they should be operands")
        flags = frozenset(i for i, d in enumerate(donated) if d)
        built = build_graph(captured.jaxpr, donated=flags, platform=targets.platform(target))
    with timed("verify"):
        verify_graph(built)
    return captured.jaxpr, built
