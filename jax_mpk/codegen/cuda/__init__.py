"""From a Plan to a CudaProgram."""

from __future__ import annotations

from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.errors import UnsupportedError
from jax_mpk.plan.ir import Plan

__all__ = ["CudaProgram", "generate"]


def generate(plan: Plan) -> CudaProgram:
    """The kernel that runs a plan."""
    raise UnsupportedError(f"jax_mpk writes no kernels for {plan.target.arch} yet")
