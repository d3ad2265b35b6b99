"""Tasks that a GPU's kernel cannot hold are refused with the user's line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_mpk import TaskTooLargeError
from jax_mpk.codegen.cuda import generate
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.plan.ir import Target
from jax_mpk.plan.targets import H100
from jax_mpk.runtime import pipeline
from tests.codegen.cuda.support import planned

#: More scratch for local values than an SM has.
ROOMY = dataclasses.replace(H100, scratch_bytes=1 << 20)


@pytest.mark.parametrize(
    ("fn", "shape", "dtype", "target", "why"),
    [
        (lambda x: x + 1, (1 << 32,), jnp.int8, H100, r"its box reaches beyond 2\^31"),
        (lambda x: x + 1, (1 << 20, 1 << 20), jnp.int8, H100, r"it has more than 2\^31 elements"),
        (lambda x: jax.nn.softmax(x * 2), (132, 100_000), jnp.float32, ROOMY, "its scratch takes [0-9]{6} of the"),
    ],
    ids=["position", "count", "scratch"],
)
def test_refused(fn: Callable[..., Any], shape: tuple[int, ...], dtype: Any, target: Target, why: str) -> None:
    plan = planned(fn, jax.ShapeDtypeStruct(shape, dtype), target=target)
    with pytest.raises(TaskTooLargeError, match=f"too large for the GPU: {why}") as error:
        generate(plan)
    line = f"test_limits.py:{fn.__code__.co_firstlineno}"
    assert error.value.line.endswith(line)
    assert line in str(error.value) and "outside the megakernel" in str(error.value)


def test_tasks_that_an_sm_cannot_hold_are_planned_smaller() -> None:
    jaxpr = jax.make_jaxpr(lambda x: jax.nn.softmax(x * 2))(jax.ShapeDtypeStruct((132, 100_000), jnp.float32))
    made = pipeline.stages(jaxpr, (False,), "softmax", ROOMY)
    assert made.plan.scratch_bytes <= made.plan.target.scratch_bytes < ROOMY.scratch_bytes
    assert isinstance(made.program, CudaProgram) and made.program.shared_bytes <= 227 << 10
