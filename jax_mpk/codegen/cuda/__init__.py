"""CUDA C++ for one persistent kernel."""

from jax_mpk.codegen.cuda.generate import generate

__all__ = ["generate"]
