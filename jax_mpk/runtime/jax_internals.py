"""The parts of JAX beyond its public interface that the runtime uses, for all supported versions.

Nothing else in ``runtime``, ``debug`` and ``api`` imports ``jax._src``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import api_util, core, sharding_impls, stages, tree_util
from jax._src import config as jax_config
from jax._src.compiler import register_xla_runtime_error_handler as register_compile_error_handler
from jax._src.ffi import ffi_lowering
from jax._src.interpreters import ad, batching, partial_eval
from jax._src.interpreters.mlir import custom_call, lower_per_platform
from jax._src.lib import jax_jit
from jax._src.lib.mlir import ir
from jax._src.util import weakref_lru_cache
from jax._src.xla_bridge import register_plugin_callbacks
from jaxlib.xla_client import HloSharding, register_custom_call_partitioner

__all__ = [
    "HloSharding",
    "ad",
    "batching",
    "core",
    "custom_call",
    "default_platform",
    "eager",
    "ffi_lowering",
    "ir",
    "jax_config",
    "lower_per_platform",
    "name_arguments",
    "parse_arguments",
    "partial_eval",
    "register_compile_error_handler",
    "register_custom_call_partitioner",
    "register_plugin_callbacks",
    "sharding_impls",
    "stages",
    "tree_util",
    "weakref_lru_cache",
]

eager = core.trace_state_clean
"""Whether no transformation is at work: what is called now runs now."""


def default_platform() -> str:
    """Where calls run whose arguments do not say: "cpu", "cuda", or another of JAX's platforms."""
    device = jax_config.default_device.value
    platform = jax.default_backend() if device is None else getattr(device, "platform", device)
    return "cuda" if platform == "gpu" else str(platform)


def parse_arguments(jitted: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The signature under which ``jax.jit`` looks a call up (static values included), and the dynamic leaves."""
    info = jitted._jit_info
    return jax_jit.parse_arguments(
        args,
        tuple(kwargs.values()),
        tuple(kwargs.keys()),
        info.static_argnums,
        info.static_argnames,
        tree_util.tracing_registry,
    )


def name_arguments(
    flat: Callable[..., Any], consts: int, jitted: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Has JAX's messages about a function of flat arrays speak of the arguments of the function that was called.

    Args:
      flat: takes closed-over arrays, then the leaves of a call.
      consts: number of closed-over arrays.
      jitted: ``jax.jit`` of the function that is called.
      args: of the call.
      kwargs: of the call.
    """
    info, function = jitted._jit_info, jitted.__wrapped__
    named: Any = api_util.debug_info(
        "jit", function, args, kwargs, static_argnums=info.static_argnums, static_argnames=info.static_argnames
    )
    closed_over = tuple(f"closed_over[{i}]" for i in range(consts))
    api_util.save_wrapped_fun_debug_info(flat, named._replace(arg_names=(*closed_over, *named.arg_names)))
