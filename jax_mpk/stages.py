"""What ``megakernelize(f).lower(*args)`` returns: JAX's Lowered, with every stage of jax_mpk besides."""

from __future__ import annotations

from typing import Any

from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.graph.ir import Graph
from jax_mpk.graph.printer import format_graph
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.printer import format_plan
from jax_mpk.runtime import pipeline
from jax_mpk.runtime.dispatch import Donations, Entry, Traced, restored
from jax_mpk.runtime.jax_internals import stages, tree_util


class MegakernelLowered(stages.Lowered):
    """A megakernelized function, lowered for some argument types.

    It is a :class:`jax.stages.Lowered`, and has the stages in between as attributes. They exist for any target,
    present or not; only ``compile()`` and the dialects of JAX's own Lowered need a device that can run the plan.
    """

    __slots__ = ("_entry", "_kernels", "_leaves", "_lowered")

    def __init__(self, traced: Traced, entry: Entry, leaves: list[Any], args_info: Any, kernels: Any):
        self.args_info = args_info
        self.out_tree = traced.out_tree
        self._no_kwargs = False
        self._in_types = self._out_types = None
        self._entry = entry
        self._leaves = leaves
        self._kernels = kernels
        self._lowered: Any = None

    # -- what jax_mpk adds -------------------------------------------------------------------------------------

    @property
    def kernels(self) -> tuple[pipeline.Stages, ...]:
        """The stages of every megakernel: one, or several where ``on_unsupported="split"`` made parts."""
        return tuple(make() for make in self._kernels)

    def _kernel(self) -> pipeline.Stages:
        if len(self._kernels) != 1:
            raise ValueError(f"the function was split into {len(self._kernels)} megakernels: look at .kernels")
        return self._kernels[0]()

    @property
    def jaxpr(self) -> Any:
        """The captured jaxpr: calls written out, closed-over arrays among the arguments."""
        return self._kernel().jaxpr

    @property
    def graph(self) -> Graph:
        """The fused Graph."""
        return self._kernel().graph

    @property
    def plan(self) -> Plan:
        """The Plan."""
        return self._kernel().plan

    @property
    def program(self) -> Any:
        """What the executor runs."""
        return self._kernel().program

    def as_text(self, dialect: str | None = None, *, debug_info: bool = False) -> str:
        """The text of one stage.

        Args:
          dialect: "jaxpr", "graph", "plan", "program" or, for a GPU, "cuda" (the source of the kernel); or one of
            JAX's: "stablehlo" (the default), "hlo".
          debug_info: with JAX's dialects: include source locations.
        """
        texts = {
            "jaxpr": lambda k: str(k.jaxpr),
            "graph": lambda k: format_graph(k.graph),
            "plan": lambda k: format_plan(k.plan),
            "program": lambda k: str(k.program),
            "cuda": _source,
        }
        if dialect in texts:
            return "\n".join(texts[dialect](kernel) for kernel in self.kernels)
        return super().as_text(dialect, debug_info=debug_info)

    # -- what jax.stages.Lowered has ---------------------------------------------------------------------------

    @property
    def _lowering(self) -> Any:  # type: ignore[override]
        if self._lowered is None:
            self._lowered = self._entry.jitted.trace(*self._entry.consts, *self._leaves).lower()
        return self._lowered._lowering

    @property
    def in_avals(self) -> Any:
        return tree_util.tree_map(lambda info: info._aval, self.args_info)

    @property
    def out_info(self) -> Any:
        """Shapes and types of the results."""
        _ = self._lowering
        return restored(self._lowered.out_info)

    def compile(self, compiler_options: Any = None, *, device_assignment: Any = None) -> stages.Compiled:
        """Compiles, and returns a :class:`jax.stages.Compiled`."""
        options = {"compiler_options": compiler_options, "device_assignment": device_assignment}
        executable = self._lowering.compile(**options)
        compiled = _Compiled(executable, list(self._entry.consts), self.args_info, self._lowered.out_tree)
        compiled.donations = self._entry.donations
        return compiled


class _Compiled(stages.Compiled):
    """A Compiled that returns what the function does, and deletes all donated arguments that ``jax.jit`` would.

    Attributes:
      donations: what becomes of donated leaves.
    """

    donations: Donations

    @property
    def out_info(self) -> Any:
        """Shapes and types of the results."""
        return restored(super().out_info)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        results = restored(super().__call__(*args, **kwargs))
        if self.donations.deleted:
            self.donations.delete(tree_util.tree_leaves((args, kwargs)), results)
        return results


def _source(kernel: pipeline.Stages) -> str:
    if not isinstance(kernel.program, CudaProgram):
        raise ValueError(f"{kernel.name} was planned for {kernel.plan.target.name}: there is no CUDA source")
    return kernel.program.source
