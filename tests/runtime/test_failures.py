"""What goes wrong inside a custom call reaches Python as an exception that says what it was."""

import importlib
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk import _native, errors, megakernelize
from jax_mpk.codegen.encode import encode
from jax_mpk.codegen.ir import Program
from jax_mpk.plan.ir import Plan
from jax_mpk.runtime import native, pipeline


def never_starts(plan: Plan) -> Program:
    """The first task waits for its own signal."""
    tasks = plan.tasks
    first = int(np.flatnonzero(np.diff(tasks.signal_start))[0])
    event = tasks.signal_event[tasks.signal_start[first]]
    start = tasks.wait_start.copy()
    wait_event = np.insert(tasks.wait_event, start[first], event)
    start[first + 1 :] += 1
    return encode(replace(plan, tasks=replace(tasks, wait_start=start, wait_event=wait_event)))


def layers(x, ws):
    for w in ws:
        x = jnp.clip(x @ w - x.sum(0), -9, 9)
    return x


X, WS = jnp.ones((6, 128)), [jnp.ones((128, 128))] * 3


def test_deadlock(monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "encode", never_starts)
        broken = megakernelize(lambda x, ws: layers(x, ws), target="cpu-3").lower(X, WS).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"DeadlockError: .*no worker can go on") as error:
        jax.block_until_ready(broken(X, WS))
    assert "expected" in str(error.value) and "test_failures.py" in str(error.value)
    # The next call is not affected.
    fine = megakernelize(lambda x, ws: layers(x, ws), target="cpu-3")
    np.testing.assert_array_equal(fine(X, WS), jax.jit(layers)(X, WS))


def test_program_that_cannot_be_parsed(monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "encode", lambda plan: replace(encode(plan), words=encode(plan).words[1:]))
        lowered = megakernelize(lambda x, ws: layers(x, ws)).lower(X, WS)
        with pytest.raises(jax.errors.JaxRuntimeError, match="jax_mpk_cpu"):
            lowered.compile()


def test_plan_that_fails_its_checks_is_never_run(monkeypatch) -> None:
    from jax_mpk import PlanVerificationError

    def shrink(graph, target):
        plan = make_plan(graph, target)
        return replace(plan, aliases={0: 0})

    make_plan = pipeline.make_plan
    monkeypatch.setattr(pipeline, "make_plan", shrink)
    with pytest.raises(PlanVerificationError):
        megakernelize(lambda x: x + 1)(X)


@pytest.mark.parametrize("version", [1, None])
def test_extension_older_than_the_sources(monkeypatch, version) -> None:
    if version is None:
        monkeypatch.delattr(_native, "program_version")
    else:
        monkeypatch.setattr(_native, "program_version", version)
    with pytest.raises(jax_mpk.NativeModuleError, match="make build"):
        importlib.reload(native)


def test_every_error_is_raised_somewhere() -> None:
    """Classes that exist only on paper would promise what does not happen."""
    package = Path(jax_mpk.__file__).parent
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, jax_mpk.JaxMpkError) and error is not jax_mpk.JaxMpkError:
            assert re.search(rf"(raise|return) (errors\.)?{name}\(", source), name
            assert getattr(jax_mpk, name) is error
