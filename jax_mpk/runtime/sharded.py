"""Refuses megakernels whose operands are sharded over several devices, where each of them would run the whole.

Outside ``jax.shard_map`` XLA decides which arrays of a program are sharded, long after the call is lowered. The types
of arrays say so on meshes with explicit axes only. Therefore an identity is put before operands that may be sharded: a
custom call that XLA's partitioner asks :func:`_partition` about. That raises for sharded operands; otherwise nothing is
left of the call. What the user passes replicated or on one device is not asked about: should XLA choose to shard it
for another of its uses, that is no reason to refuse the call.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from jax_mpk.errors import ShardedInputError
from jax_mpk.runtime.jax_internals import (
    HloSharding,
    custom_call,
    ir,
    register_compile_error_handler,
    register_custom_call_partitioner,
    register_plugin_callbacks,
    sharding_impls,
)

#: Name of the custom call.
WHOLE_TARGET = "jax_mpk_whole"


def refuse_sharded(ctx: Any, operands: Sequence[Any], name: str) -> Sequence[Any]:
    """The operands of a megakernel that is being lowered, such that compiling it fails if they turn out sharded.

    Raises:
      ShardedInputError: some are known to be, or not all mesh axes of a surrounding ``jax.shard_map`` are manual.
    """
    context = ctx.module_context.axis_context
    if isinstance(context, sharding_impls.SPMDAxisContext):
        automatic = [a for a in context.mesh.axis_names if a not in context.manual_axes and context.mesh.shape[a] > 1]
        if automatic:
            raise ShardedInputError(
                f"{name}: the mesh axes {', '.join(map(str, automatic))} are not manual in the surrounding "
                "jax.shard_map. A megakernel runs once per device on what that device holds; make all axes manual."
            )
        return operands
    if not isinstance(context, sharding_impls.ShardingContext) or context.num_devices == 1:
        return operands
    message = (
        f"{name} is called with arrays that are sharded over {context.num_devices} devices. A megakernel runs on one "
        "device; call it inside jax.shard_map, where it runs once per device on the local shards, or replicate its "
        "arguments first, within jax.jit with jax.lax.with_sharding_constraint."
    )
    if any(map(_is_sharded_type, ctx.avals_in)):
        raise ShardedInputError(message)
    main = ctx.module_context.symbol_table["main"]
    asked = [i for i, operand in enumerate(operands) if not _is_whole_argument(operand, main)]
    if not asked:
        return operands
    types = [operands[i].type for i in asked]
    marked = custom_call(
        WHOLE_TARGET,
        result_types=types,
        operands=[operands[i] for i in asked],
        backend_config=json.dumps({"message": message, "types": [str(t) for t in types]}),
        api_version=2,
    )
    known = dict(zip(asked, marked.results, strict=True))
    return [known.get(i, operand) for i, operand in enumerate(operands)]


def _is_sharded_type(aval: Any) -> bool:
    """Whether the type itself says that an array is sharded (meshes with explicit axes)."""
    sharding = aval.sharding
    axes = [a for entry in sharding.spec if isinstance(entry, str | tuple) for a in _axes(entry)]
    return any(sharding.mesh.shape[a] > 1 for a in axes)


def _axes(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry


def _is_whole_argument(operand: Any, main: Any) -> bool:
    """Whether an operand is an argument of the program, and was not passed sharded."""
    block = operand.owner
    if not isinstance(block, ir.Block) or block.owner.operation != main.operation:
        return False
    return not _is_sharded_attribute(main.arg_attrs[ir.BlockArgument(operand).arg_number])


def _is_sharded_attribute(attributes: Any) -> bool:
    if "sdy.sharding" in attributes:
        # #sdy.sharding<mesh, [{"x"}, {}, …], …>: one pair of braces for each dimension.
        dimensions = re.search(r", \[(\{.*\})\]", str(attributes["sdy.sharding"]))
        return dimensions is not None and '"' in dimensions[1]
    if "mhlo.sharding" in attributes:
        return "devices=" in str(attributes["mhlo.sharding"])
    return False


# --- What XLA asks ----------------------------------------------------------------------------------------------


def _propagate(user_sharding: Any, shape: Any, config: bytes) -> Any:
    del shape, config
    return user_sharding


def _infer(arg_shapes: Any, arg_shardings: Any, shape: Any, config: bytes) -> Any:
    del arg_shapes, arg_shardings, config
    return _replicated(shape)


def _partition(arg_shapes: Any, arg_shardings: Any, shape: Any, sharding: Any, config: bytes) -> Any:
    del arg_shapes, sharding
    call = json.loads(config)
    if not all(s.is_replicated() for s in arg_shardings):
        raise ShardedInputError(call["message"])
    types = ", ".join(call["types"])
    names = ", ".join(f"%arg{i}" for i in range(len(call["types"])))
    arguments = ", ".join(f"%arg{i}: {t}" for i, t in enumerate(call["types"]))
    identity = f"module {{ func.func public @main({arguments}) -> ({types}) {{ return {names} : {types} }} }}"
    return identity.encode(), [HloSharding.replicate() for _ in arg_shardings], _replicated(shape)


def _replicated(shape: Any) -> Any:
    whole = HloSharding.replicate()
    return HloSharding.tuple_sharding(shape, [whole] * len(shape.tuple_shapes())) if shape.is_tuple() else whole


def _typed(error: Exception) -> Exception | None:
    """XLA passes on the text of what :func:`_partition` raised."""
    found = re.search(r"^([\w.]+\.)?ShardedInputError: (?P<message>.*)$", str(error), re.MULTILINE)
    return ShardedInputError(found["message"]) if found else None


_register = functools.partial(
    register_custom_call_partitioner,
    name=WHOLE_TARGET,
    prop_user_sharding=_propagate,
    partition=_partition,
    infer_sharding_from_operands=_infer,
)
_register()
register_plugin_callbacks(_register)
register_compile_error_handler(_typed)
