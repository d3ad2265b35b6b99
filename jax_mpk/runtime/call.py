"""The primitive ``megakernel``: how a compiled function behaves under JAX's transformations, and its lowering.

``megakernel_p.bind(*operands, jaxpr=…, donated=…, name=…, options=…)`` stands for ``jaxpr`` applied to the operands:

* jaxpr: a closed jaxpr without constants, already captured; closed-over arrays are operands like any other.
* donated: one flag for each operand: its buffer may be reused for a result.
* name: the user's function.
* options: :class:`Options`.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import mlir

from jax_mpk.capture import capture, jaxprs
from jax_mpk.errors import DifferentiationError, ShardedInputError, TargetError, UnsupportedError
from jax_mpk.plan.ir import Target
from jax_mpk.runtime import layouts, pipeline, targets
from jax_mpk.runtime.jax_internals import (
    ad,
    batching,
    core,
    default_platform,
    ffi_lowering,
    lower_per_platform,
    partial_eval,
    sharding_impls,
    weakref_lru_cache,
)
from jax_mpk.runtime.native import CPU_TARGET, CUDA_TARGET


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
    tangent_avals = [aval.to_tangent_aval() for aval in jaxpr.out_avals]
    if all(aval.dtype == _FLOAT0 for aval in tangent_avals):
        # Token ids and the like: nothing flows back through them.
        results = megakernel_p.bind(*primals, jaxpr=jaxpr, name=name, **params)
        return results, [ad.Zero(aval) for aval in tangent_avals]
    raise DifferentiationError(_GRADIENT_HINT.format(name=name))


def _transpose(*_: Any, name: str, **__: Any) -> Any:
    raise DifferentiationError(_GRADIENT_HINT.format(name=name))


_FLOAT0 = core.dtypes.float0
ad.primitive_jvps[megakernel_p] = _jvp
ad.primitive_transposes[megakernel_p] = _transpose


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
    _check_devices(ctx, name)
    call = _CALLS[platform]
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
    return rule(inner, *operands, program=made.program)[: len(ctx.avals_out)]


_NAMES = {"cpu": "the CPU", "cuda": "a GPU"}


def _lower_elsewhere(ctx: Any, *_: Any, name: str, **__: Any) -> Any:
    platforms = ", ".join(ctx.module_context.platforms)
    raise TargetError(f"{name} is a megakernel, and jax_mpk has no executor for {platforms}, only for cpu and cuda.")


def _lower_each(ctx: Any, *operands: Any, **params: Any) -> Any:
    """For all platforms of a module; JAX's own choice among rules fails where several are kept and none is cached."""
    rules: dict[str, Any] = {platform: functools.partial(_lower, platform) for platform in _CALLS}
    listed = ctx.replace(avals_out=list(ctx.avals_out))
    return lower_per_platform(listed, str(megakernel_p), rules, _lower_elsewhere, core.no_effects, *operands, **params)


# Not cached: JAX would lower the equation as a function of its own, whose arguments do not show how arrays lie.
mlir.register_lowering(megakernel_p, _lower_each, cacheable=False)


def _physical(aval: Any) -> Any:
    shape, dtype = jaxprs.physical(aval)
    return core.ShapedArray(shape, dtype)


def _check_devices(ctx: Any, name: str) -> None:
    """Refuses calls whose operands XLA would have to gather from several devices."""
    context = ctx.module_context.axis_context
    if isinstance(context, sharding_impls.SPMDAxisContext):
        automatic = [a for a in context.mesh.axis_names if a not in context.manual_axes and context.mesh.shape[a] > 1]
        if automatic:
            raise ShardedInputError(
                f"{name}: the mesh axes {', '.join(map(str, automatic))} are not manual in the surrounding "
                "jax.shard_map. A megakernel runs once per device on what that device holds; make all axes manual."
            )
        return
    if not isinstance(context, sharding_impls.ShardingContext) or context.num_devices == 1:
        return
    sharded = [aval for aval in ctx.avals_in if _is_sharded_type(aval)]
    explicit = all(getattr(aval.sharding.mesh, "are_all_axes_explicit", False) for aval in ctx.avals_in)
    if sharded or (not explicit and _has_sharded_arguments(ctx.module_context)):
        raise ShardedInputError(
            f"{name} is called with arrays that are sharded over {context.num_devices} devices. A megakernel runs "
            "on one device; call it inside jax.shard_map, where it runs once per device on the local shards, or "
            "replicate its arguments first."
        )


def _is_sharded_type(aval: Any) -> bool:
    """Whether the type itself says that an array is sharded (meshes with explicit axes)."""
    sharding = aval.sharding
    axes = [a for entry in sharding.spec if isinstance(entry, str | tuple) for a in _axes(entry)]
    return any(sharding.mesh.shape[a] > 1 for a in axes)


def _axes(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry


def _has_sharded_arguments(module: Any) -> bool:
    """Whether any argument of the program being lowered is sharded; what reaches the call is not known yet."""
    main = module.symbol_table["main"]
    return any(_is_sharded_attribute(attributes) for attributes in main.arg_attrs)


def _is_sharded_attribute(attributes: Any) -> bool:
    if "sdy.sharding" in attributes:
        # #sdy.sharding<mesh, [{"x"}, {}, …], …>: one pair of braces for each dimension.
        dimensions = re.search(r", \[(\{.*\})\]", str(attributes["sdy.sharding"]))
        return dimensions is not None and '"' in dimensions[1]
    if "mhlo.sharding" in attributes:
        return "devices=" in str(attributes["mhlo.sharding"])
    return False
