"""The generated CUDA of the samples, as the golden files hold it."""

from __future__ import annotations

import functools
from pathlib import Path

import jax

from jax_mpk._version import __version__
from jax_mpk.capture import capture
from jax_mpk.codegen.cuda import generate
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.plan import targets
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.verify import verify_plan
from tests.codegen.golden.functions import SAMPLES


@functools.cache
def program(name: str) -> CudaProgram:
    sample = SAMPLES[name]
    captured = capture(jax.make_jaxpr(sample.function)(*sample.avals))
    assert not captured.consts
    plan = make_plan(fuse(build_graph(captured.jaxpr, donated=sample.donated)), targets.H100)
    verify_plan(plan)
    return generate(plan)


def text(name: str) -> str:
    """The source; versions come and go without a change to it."""
    return program(name).source.replace(f"jax_mpk {__version__} ", "jax_mpk ", 1)


def path(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cu")
