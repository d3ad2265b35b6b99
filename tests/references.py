"""``jax.jit`` for expected results: in a third of the time, and equal up to rounding to what it gives by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

#: XLA's older emitters of loops on the CPU, and their code as it comes.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def quick_jit(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Called as ``jax.jit`` is. GPUs have nothing to gain."""
    on_cpu = jax.default_backend() == "cpu"
    compiled: Callable[..., Any] = jax.jit(fn, compiler_options=QUICK if on_cpu else None, **options)
    return compiled
