"""``jax.jit`` for expected results: in half the time or less, and equal up to rounding to what it gives by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

#: Code as XLA emits it, by the older emitters for the CPU where XLA still has them: they are quicker.
QUICK: dict[str, str | bool | int | float] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False


def quick_jit(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Called as ``jax.jit`` is. GPUs have nothing to gain."""
    on_cpu = jax.default_backend() == "cpu"
    compiled: Callable[..., Any] = jax.jit(fn, compiler_options=QUICK if on_cpu else None, **options)
    return compiled
