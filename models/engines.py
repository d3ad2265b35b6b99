"""The two ways in which the command line tools compile a function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ENGINES = ("mpk", "jit")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}

Compile = Callable[..., Callable[..., Any]]
"""`jax.jit` or something called like it: compile(fn, donate_argnums=...)."""


def compiler(engine: str) -> Compile:
    """Maps an engine's name to the function that compiles.

    Args:
        engine: "mpk" for one persistent kernel, "jit" for XLA's kernels.

    Raises:
        ValueError: there is no such engine.
    """
    if engine == "jit":
        return jax.jit
    if engine == "mpk":
        # Here, so that the models can be used and compared without the native library.
        import jax_mpk

        return jax_mpk.megakernelize
    raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
