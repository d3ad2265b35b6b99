"""The parts of JAX beyond its public interface that the runtime uses, for all supported versions.

Nothing else in ``runtime``, ``debug`` and ``api`` imports ``jax._src``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import api_util, core, sharding_impls, stages, tree_util
from jax._src import config as jax_config
from jax._src.compiler import register_xla_runtime_error_handler as register_compile_error_handler
from jax._src.ffi import ffi_lowering
from jax._src.interpreters import ad, batching, partial_eval, pxla
from jax._src.interpreters.mlir import custom_call, lower_per_platform
from jax._src.lib import _jax, jax_jit
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
    "fast_calls",
    "ffi_lowering",
    "first_call",
    "ir",
    "jax_config",
    "lower_per_platform",
    "making",
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


def fast_calls(name: str, jitted: Any, miss: Callable[..., tuple[Any, Any, bool]]) -> Callable[..., Any] | None:
    """A function that JAX's C++ calls without Python, as it does those of ``jax.jit``; None if this JAX cannot.

    Args:
      name: of the function, for profiles.
      jitted: ``jax.jit`` of the function, which knows the static arguments.
      miss: called with arguments of types that C++ does not know yet; returns what :func:`first_call` does.
    """
    try:
        info, data = jitted._jit_info, pxla.MeshExecutableFastpathData
        _ = jitted._cache_miss, data.const_args, data.in_device_local_layouts, data.out_pytree_def  # for `first_call`
        keys, registry = pxla.JitGlobalCppCacheKeys(), tree_util.dispatch_registry
        fast: Any = _jax.pjit(
            name, None, miss, info.static_argnums, info.static_argnames, keys, registry, pxla.cc_shard_arg
        )
    except (AttributeError, TypeError):
        return None
    fast._fun = jitted.__wrapped__  # what JAX runs to find the operation that made a NaN
    return fast  # type: ignore[no-any-return]


def first_call(jitted: Any, consts: Sequence[Any], leaves: Sequence[Any]) -> tuple[Any, Any, bool]:
    """Calls a jitted function of ``consts`` and ``leaves``, and finds out how C++ can call it with other leaves.

    Returns:
      The results, what C++ needs to know (None: always call from Python), and whether it should not keep that.
    """
    results, data, forget = jitted._cache_miss(*consts, *leaves)
    if data is not None:
        flat, _ = tree_util.dispatch_registry.flatten(tuple(consts))
        remembered = [_remembered(layout) for layout in data.in_device_local_layouts]
        data = data._replace(const_args=[*data.const_args, *flat], in_device_local_layouts=remembered)
    return results, data, forget


def making(data: Any, results: Any) -> Any:
    """What C++ needs to know to put the leaves of results together like these."""
    return data._replace(out_pytree_def=tree_util.dispatch_registry.flatten(results)[1])


def _remembered(layout: Any) -> Any:
    """A layout that remembers how XLA writes it: C++ asks this of the layout of each placed argument in every call."""
    if not hasattr(layout, "_to_xla_layout"):
        return layout  # None where arrays lie by default
    copied = copy.copy(layout)
    copied._to_xla_layout = functools.cache(layout._to_xla_layout)
    return copied
