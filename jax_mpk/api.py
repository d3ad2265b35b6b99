"""The public interface: :func:`megakernelize`."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.export

from jax_mpk import debug
from jax_mpk.errors import ConfigError
from jax_mpk.plan.ir import Target
from jax_mpk.runtime import layouts, pipeline, targets
from jax_mpk.runtime.call import Options, plan_target
from jax_mpk.runtime.dispatch import CallSite, KernelCall, Traced
from jax_mpk.runtime.jax_internals import eager
from jax_mpk.runtime.native import CPU_TARGET, CUDA_TARGET
from jax_mpk.runtime.place import place as place_arguments
from jax_mpk.runtime.sharded import WHOLE_TARGET
from jax_mpk.stages import MegakernelLowered

_BACKENDS = (None, "cpu", "cuda", "gpu")
_ON_UNSUPPORTED = ("error", "split")


class Megakernelized:
    """A function compiled into one custom call; made by :func:`megakernelize`.

    It is called like the function it wraps, and can be used under any JAX transformation except differentiation.
    """

    __name__: str
    __wrapped__: Callable[..., Any]

    def __init__(self, function: Callable[..., Any], options: Options, may_split: bool, **jit_options: Any):
        functools.update_wrapper(self, function)
        self._made_from = {"options": options, "may_split": may_split, **jit_options}
        self.__name__ = _name(function)
        self._site = CallSite(function, self.__name__, options, may_split, **jit_options)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if not eager():
            return self._site.bind(args, kwargs)
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return self.__wrapped__(*args, **kwargs)
        return self._site.call(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __reduce__(self) -> Any:
        # Like jax.jit's: copies compile anew, and a pickle holds the function and the options.
        return functools.partial(Megakernelized, **self._made_from), (self.__wrapped__,)

    def __repr__(self) -> str:
        return f"<megakernelized {self.__wrapped__!r}>"

    def lower(self, /, *args: Any, **kwargs: Any) -> MegakernelLowered:
        """Compiles for arguments of these types (arrays or ``jax.ShapeDtypeStruct``), up to the custom call.

        Returns:
          An object like that of ``jax.jit(f).lower(…)``, which besides has every stage of the compilation:
          ``.jaxpr``, ``.graph``, ``.plan``, ``.program``, and ``.as_text(…)`` of each.
        """
        traced, entry, leaves, args_info = self._site.lower(args, kwargs)
        return MegakernelLowered(traced, entry, leaves, args_info, self._kernels(traced, leaves))

    def trace(self, /, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """Traces the function like ``jax.jit(f).trace(…)``: for ``jax.export.export``."""
        return self._site.jitted.trace(*args, **kwargs)

    def eval_shape(self, /, *args: Any, **kwargs: Any) -> Any:
        """Shapes and types of the results; see ``jax.eval_shape``."""
        return self._site.tracer.eval_shape(*args, **kwargs)

    def explain(self, /, *args: Any, **kwargs: Any) -> str:
        """Describes what the function is compiled to for arguments of these types.

        Operators and what was fused into them, tasks, dependent phases, bytes moved, memory, the predicted time,
        and why anything was not captured or fused.
        """
        traced, leaves = self._site.trace(args, kwargs)
        notes = traced.parts.notes if traced.parts is not None else ()
        return debug.explain([make() for make in self._kernels(traced, leaves)], notes)

    def clear_cache(self) -> None:
        """Forgets everything compiled so far."""
        self._site.clear_cache()

    def _kernels(self, traced: Traced, leaves: Sequence[Any]) -> list[Callable[[], pipeline.Stages]]:
        target = plan_target(self._site.options)
        lies = traced.lies([layouts.of_array(leaf) for leaf in leaves])

        def stages(call: KernelCall[layouts.Lies]) -> pipeline.Stages:
            declared = pipeline.operand_layouts(call.jaxpr, call.donated, target, call.operands)
            return pipeline.stages(call.jaxpr, call.donated, call.name, target, declared)

        calls = traced.calls(self._site.name, lies, layouts.ROW_MAJOR)
        return [functools.partial(stages, call) for call in calls]


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def megakernelize(
    function: Callable[..., Any] | None = None,
    /,
    *,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Iterable[str] | None = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    backend: str | None = None,
    on_unsupported: str = "error",
    target: Target | str | None = None,
) -> Any:
    """Compiles a function into one custom call: a megakernel.

    Use it like ``jax.jit``, directly or as a decorator, with or without arguments::

        @jax_mpk.megakernelize(donate_argnums=1)
        def step(params, cache, token, pos): ...

    The result works eagerly and under ``jax.jit``, ``jax.vmap``, ``jax.lax.scan``, ``while_loop`` and ``cond``,
    ``jax.shard_map`` and ``jax.export``. It cannot be differentiated; compile the gradient instead:
    ``megakernelize(jax.grad(f))``.

    Args:
      function: any function that ``jax.jit`` takes. Arrays it closes over are passed to the kernel as arguments,
        with the values they have at the first call: NumPy arrays are copied, those of JAX are not; NumPy arrays of at
        most 4 KiB stay constants of the program. Donating an array that is also closed over copies it.
      donate_argnums: positions of arguments whose buffers may be reused for results, such as a KV cache that is
        updated in place. Under an outer ``jax.jit`` the caller must donate them too, or XLA copies them first.
      donate_argnames: the same, by name.
      static_argnums: positions of arguments that are compile-time constants.
      static_argnames: the same, by name.
      backend: where the kernel may run: "cpu", "cuda" (or "gpu"), or None: wherever the call runs. It is an error to
        call it elsewhere.
      on_unsupported: what happens when part of the function cannot be compiled. "error" raises
        :class:`~jax_mpk.UnsupportedPrimitiveError`; "split" leaves that part to XLA and compiles the largest
        possible parts between. The whole cannot be differentiated either way.
      target: the device to plan for: a :class:`~jax_mpk.Target` or a name, such as "cpu-8" (eight virtual SMs), "cuda"
        (this machine's GPU) or "h100-sxm". None: the device of the call. Plans for devices that are not there can be
        looked at (:meth:`Megakernelized.lower`, :meth:`Megakernelized.explain`) but not run.

    Returns:
      A callable like ``function``; see :class:`Megakernelized`.

    Raises:
      ConfigError: an option has a value that is not known.
    """
    if on_unsupported not in _ON_UNSUPPORTED:
        raise ConfigError(f"on_unsupported={on_unsupported!r}: expected one of {_ON_UNSUPPORTED}")
    if backend not in _BACKENDS:
        raise ConfigError(f"backend={backend!r}: expected one of {_BACKENDS}")
    options = Options(
        target=None if target is None else targets.resolve(target),
        backend="cuda" if backend == "gpu" else backend,
    )

    def wrap(function: Callable[..., Any]) -> Megakernelized:
        return Megakernelized(
            function,
            options,
            on_unsupported == "split",
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
        )

    return wrap if function is None else wrap(function)


def place(step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Stores the arguments of a megakernelized function as it reads them best.

    A GPU streams the weight of a contraction best along the contracted axes, and most models' weights have these
    first. The CPU takes them as they are, and nothing is moved for it::

        params, cache, token, pos = jax_mpk.place(step, params, cache, token, pos)

    What comes back are the same arrays to everyone who looks, with the same shapes, values and shardings; only the
    order of their axes in memory differs (``x.format``), and they are committed to where they lie. Weights are moved
    that are large, are not donated and are read by contractions above all; other arguments come back as they are, and
    so does what lies well already. Both copies exist until the first is dropped. Nothing is planned, compiled or run.

    A call takes arrays as they lie, placed or not, without copying them; each combination is compiled once. The same
    holds under ``jax.jit``, and the formats can then be asked for: ``jax.jit(step,
    in_shardings=Format(Layout.AUTO)).lower(…).compile().input_formats``.

    Args:
      step: what :func:`megakernelize` returned.
      *args: arguments of a call, or ``jax.ShapeDtypeStruct`` instead of arrays, which get a format.
      **kwargs: the same.

    Returns:
      The positional arguments, as a tuple; where there are keyword arguments, that tuple and a dictionary of them.

    Raises:
      ConfigError: ``step`` is something else, or the call is being traced: arrays cannot be moved then.
    """
    if isinstance(step, types.MethodType) and isinstance(step.__func__, Megakernelized):
        placed = place(step.__func__, step.__self__, *args, **kwargs)
        return (placed[0][1:], placed[1]) if kwargs else placed[1:]
    if not isinstance(step, Megakernelized):
        raise ConfigError(f"place: {step!r} is not a megakernelized function")
    if not eager():
        raise ConfigError("place moves arrays, so it has to be called outside jax.jit and other transformations")
    new_args, new_kwargs = place_arguments(step._site, args, kwargs)
    return (new_args, new_kwargs) if kwargs else new_args


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What to pass to ``jax.export.export`` as ``disabled_checks``, so that it accepts megakernels.

    A megakernel is stored whole in the exported function. The process that runs it has to import jax_mpk.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(call) for call in (CPU_TARGET, CUDA_TARGET, WHOLE_TARGET)]
