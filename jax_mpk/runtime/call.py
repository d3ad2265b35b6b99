"""The primitive ``megakernel``: how a compiled function behaves under JAX's transformations, and its lowering.

``megakernel_p.bind(*operands, jaxpr=…, donated=…, name=…, options=…)`` stands for ``jaxpr`` applied to the operands:

* jaxpr: a closed jaxpr without constants, already captured; closed-over arrays are operands like any other.
* donated: one flag for each operand: its buffer may be reused for a result.
* name: the user's function.
* options: :class:`Options`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import mlir

from jax_mpk.capture import capture, jaxprs
from jax_mpk.errors import DifferentiationError, TargetError, UnsupportedError
from jax_mpk.plan.ir import Target
from jax_mpk.runtime import layouts, pipeline, targets
from jax_mpk.runtime.jax_internals import (
    ad,
    batching,
    core,
    default_platform,
    ffi_lowering,
    ir,
    lower_per_platform,
    partial_eval,
    weakref_lru_cache,
)
from jax_mpk.runtime.native import CPU_TARGET, CUDA_TARGET
from jax_mpk.runtime.sharded import refuse_sharded


@dataclass(frozen=True)
class Options:
    """What a call site asks for.

    Attributes:
      target: the device to plan for, or None: the one the call is lowered for.
      backend: the only platform the call may be lowered for, "cpu" or "cuda", or None: either.
      site: refers to the CallSite, which keeps what is compiled for eager calls. Weakly: JAX caches jaxprs, and
        with them these options, for as long as the function they were traced from lives, which is the CallSite's.
    """

    target: Target | None = None
    backend: str | None = None
    site: weakref.ref[Any] | None = field(default=None, compare=False, repr=False)


megakernel_p: Any = Primitive("megakernel")
megakernel_p.multiple_results = True


@megakernel_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _abstract_eval(*avals: Any, jaxpr: Any, donated: Any, name: str, options: Options) -> Sequence[Any]:
    # The jaxpr was traced with these very avals, weak types, shardings and varying manual axes included.
    del avals, donated, name, options
    return jaxpr.out_avals


def plan_target(options: Options, platform: str | None = None) -> Target:
    """The target a call site is planned for on a platform, or None: wherever it would run by default."""
    if options.target is not None:
        return options.target
    platform = platform or options.backend or default_platform()
    return targets.resolve("cuda" if platform == "cuda" else None)


# --- Transformations -------------------------------------------------------------------------------------------


def _batch(
    axis_data: Any,
    operands: Sequence[Any],
    dims: Sequence[Any],
    *,
    jaxpr: Any,
    donated: tuple[bool, ...],
    **params: Any,
) -> tuple[list[Any], Sequence[Any]]:
    # The batched function is captured as a whole. A donated operand that is not batched stays donated; its
    # buffer is taken over if a result still has its shape.
    batched, out_dims = batching.batch_jaxpr2(jaxpr, axis_data, tuple(dims))
    closed, consts = lift(batched)
    donated = (False,) * len(consts) + donated
    return megakernel_p.bind(*consts, *operands, jaxpr=closed, donated=donated, **params), out_dims


batching.fancy_primitive_batchers[megakernel_p] = _batch


@weakref_lru_cache
def lift(closed: Any) -> tuple[Any, tuple[Any, ...]]:
    """Captures a closed jaxpr that may yet be batched; its constants, returned too, become leading arguments."""
    for aval in closed.in_avals:
        if not core.is_constant_shape(getattr(aval, "shape", ())):
            raise UnsupportedError(
                f"A megakernel is planned for fixed sizes, and an argument has the symbolic shape {aval.str_short()}. "
                "Export the function once for each size."
            )
    captured = capture(closed, batchable=True)
    return jaxprs.close_jaxpr(captured.jaxpr), captured.consts


_GRADIENT_HINT = (
    "{name} is a megakernel, which is compiled and cannot be differentiated. Differentiate the function first "
    "and compile the result: instead of jax.grad(jax_mpk.megakernelize(f)), write "
    "jax_mpk.megakernelize(jax.grad(f)); for jax.vjp, jax.jvp and jax.linearize likewise. If no gradient is "
    "wanted, pass the arguments through jax.lax.stop_gradient."
)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: Any, name: str, **params: Any) -> Any:
    if not any(map(has_derivatives, jaxpr.out_avals)):
        # Token ids and the like: nothing flows back through them.
        results = megakernel_p.bind(*primals, jaxpr=jaxpr, name=name, **params)
        return results, [ad.Zero(aval.to_tangent_aval()) for aval in jaxpr.out_avals]
    raise DifferentiationError(_GRADIENT_HINT.format(name=name))


def _transpose(*_: Any, name: str, **__: Any) -> Any:
    raise DifferentiationError(_GRADIENT_HINT.format(name=name))


_FLOAT0 = core.dtypes.float0


def has_derivatives(aval: Any) -> bool:
    """Whether values of this type can have a tangent other than zero."""
    return getattr(aval.to_tangent_aval(), "dtype", None) != _FLOAT0


ad.primitive_jvps[megakernel_p] = _jvp
ad.primitive_transposes[megakernel_p] = _transpose


#: The identity, but not differentiable: stands before what a split function leaves to XLA. Capture has inlined calls
#: with derivatives of their own there, and those of what is inside would be others.
undifferentiable_p: Any = Primitive("undifferentiable")
undifferentiable_p.def_impl(lambda x, **_: x)
undifferentiable_p.def_abstract_eval(lambda aval, **_: aval)
batching.defvectorized(undifferentiable_p)
mlir.register_lowering(undifferentiable_p, lambda ctx, x, **_: [x], cacheable=False)


def _undifferentiable_jvp(primals: Any, tangents: Any, *, name: str, differentiable_results: bool) -> Any:
    if differentiable_results:
        raise DifferentiationError(_GRADIENT_HINT.format(name=name))
    (x,) = primals
    result = undifferentiable_p.bind(x, name=name, differentiable_results=False)
    return result, ad.Zero(core.typeof(x).to_tangent_aval())


ad.primitive_jvps[undifferentiable_p] = _undifferentiable_jvp
ad.primitive_transposes[undifferentiable_p] = _transpose


@weakref_lru_cache
def _prune(jaxpr: Any, used_outputs: tuple[bool, ...]) -> tuple[Any, tuple[bool, ...]]:
    inner, _ = jaxprs.open_jaxpr(jaxpr)
    pruned, used_inputs = partial_eval.dce_jaxpr(inner, list(used_outputs))
    return jaxprs.close_jaxpr(pruned), tuple(used_inputs)


def _dead_code(used_outputs: Sequence[bool], *rest: Any) -> tuple[list[bool], JaxprEqn | None]:
    eqn: JaxprEqn = rest[-1]  # from JAX 0.12 on, which arguments are live comes before it
    if not any(used_outputs):
        return [False] * len(eqn.invars), None
    if all(used_outputs):
        # Arguments that nothing uses are left out before the primitive is bound.
        return [True] * len(eqn.invars), eqn
    jaxpr, used_inputs = _prune(eqn.params["jaxpr"], tuple(used_outputs))
    donated = tuple(d for d, used in zip(eqn.params["donated"], used_inputs, strict=True) if used)
    return list(used_inputs), eqn.replace(
        invars=[v for v, used in zip(eqn.invars, used_inputs, strict=True) if used],
        outvars=[v for v, used in zip(eqn.outvars, used_outputs, strict=True) if used],
        params=dict(eqn.params, jaxpr=jaxpr, donated=donated),
    )


partial_eval.dce_rules[megakernel_p] = _dead_code


# --- Lowering --------------------------------------------------------------------------------------------------


_CALLS = {"cpu": CPU_TARGET, "cuda": CUDA_TARGET}


def _lower(
    platform: str,
    ctx: Any,
    *operands: Any,
    jaxpr: Any,
    donated: tuple[bool, ...],
    name: str,
    options: Options,
) -> Sequence[Any]:
    call = _CALLS[platform]
    checked = refuse_sharded(ctx, operands, name)
    target = plan_target(options, platform)
    if options.backend not in (None, platform):
        raise TargetError(f"{name} is for backend={options.backend!r}, and the call is compiled for {platform}.")
    if targets.platform(target) != platform:
        raise TargetError(
            f"{name} was planned for {target.name} (target=…), which cannot run on {_NAMES[platform]}. Planning for "
            "another device is for looking at plans: .lower(…).plan, .explain(…)."
        )
    declared = pipeline.operand_layouts(jaxpr, donated, target, layouts.of_operands(ctx, operands))
    made = pipeline.artifact(jaxpr, donated, name, target, declared)
    avals_in = [_physical(aval) for aval in ctx.avals_in]
    avals_out = [_physical(aval) for aval in ctx.avals_out]
    if made.workspace_bytes:
        avals_out.append(core.ShapedArray((made.workspace_bytes,), core.dtypes.dtype("uint8")))
    rule = ffi_lowering(
        call,
        operand_layouts=[layout and layout[::-1] for layout in declared] or None,
        operand_output_aliases={argument: result for result, argument in made.aliases},
    )
    inner = ctx.replace(avals_in=avals_in, avals_out=avals_out)
    return rule(inner, *checked, program=made.program)[: len(ctx.avals_out)]


_NAMES = {"cpu": "the CPU", "cuda": "a GPU"}


def _lower_elsewhere(ctx: Any, *_: Any, name: str, **__: Any) -> Any:
    platforms = ", ".join(ctx.module_context.platforms)
    raise TargetError(f"{name} is a megakernel, and jax_mpk has no executor for {platforms}, only for cpu and cuda.")


#: Operations of XLA whose regions say how to join two scalars: nothing but scalar operations may be in there.
_JOINS = {f"stablehlo.{name}" for name in ("reduce", "reduce_window", "scatter", "select_and_scatter", "sort")}


def _lower_each(ctx: Any, *operands: Any, **params: Any) -> Any:
    """For all platforms of a module; JAX's own choice among rules fails where several are kept and none is cached."""
    if ir.InsertionPoint.current.block.owner.operation.name in _JOINS:
        jaxpr, _ = jaxprs.open_jaxpr(params["jaxpr"])
        inline = mlir.lower_fun(functools.partial(jax.core.eval_jaxpr, jaxpr, ()), multiple_results=True)
        return inline(ctx, *operands)
    rules: dict[str, Any] = {platform: functools.partial(_lower, platform) for platform in _CALLS}
    listed = ctx.replace(avals_out=list(ctx.avals_out))
    return lower_per_platform(listed, str(megakernel_p), rules, _lower_elsewhere, core.no_effects, *operands, **params)


# Not cached: JAX would lower the equation as a function of its own, whose arguments do not show how arrays lie.
mlir.register_lowering(megakernel_p, _lower_each, cacheable=False)


def _physical(aval: Any) -> Any:
    shape, dtype = jaxprs.physical(aval)
    return core.ShapedArray(shape, dtype)
