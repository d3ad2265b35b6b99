"""The generated CUDA of the samples, as the golden files hold it."""

from __future__ import annotations

import functools
from pathlib import Path

from jax_mpk._version import __version__
from jax_mpk.codegen.cuda import generate
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.plan.ir import Plan
from tests.codegen.cuda.support import planned
from tests.codegen.golden.functions import SAMPLES


@functools.cache
def plan(name: str) -> Plan:
    sample = SAMPLES[name]
    return planned(sample.function, *sample.avals, donated=sample.donated)


@functools.cache
def program(name: str) -> CudaProgram:
    return generate(plan(name))


def text(name: str) -> str:
    """The source; versions come and go without a change to it."""
    return program(name).source.replace(f"jax_mpk {__version__} ", "jax_mpk ", 1)


def path(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cu")
