"""The extension module: FFI registration, the executor's settings, and running Programs without XLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxlib import xla_client

from jax_mpk import config
from jax_mpk.codegen.encode import VERSION
from jax_mpk.errors import DeadlockError, LaunchError, NativeModuleError

try:
    from jax_mpk import _native  # type: ignore[attr-defined, unused-ignore]
except ImportError as error:
    raise NativeModuleError(
        "The compiled part of jax_mpk cannot be loaded; reinstall it (`make build` in a checkout). "
        f"The loader says: {error}"
    ) from error

if getattr(_native, "program_version", None) != VERSION:
    raise NativeModuleError(
        "The compiled part of jax_mpk does not fit its Python sources: it reads programs of version "
        f"{getattr(_native, 'program_version', 'unknown')}, they write version {VERSION}. Reinstall jax_mpk "
        "(`make build` in a checkout)."
    )

#: Name of the custom call of the CPU executor.
CPU_TARGET = "jax_mpk_cpu"


def register() -> None:
    """Makes the custom call known to XLA. Must not start a backend, and works before and after one started."""
    # Registrations made before the backend exists are queued, and jaxlib flushes targets before types, which then
    # fails. Installing the types' handler first registers ours at once instead of queueing it.
    xla_client.register_custom_type_handler("cpu", xla_client._xla.register_custom_type)  # type: ignore[attr-defined]
    jax.ffi.register_ffi_type("jax_mpk.CpuState", _native.cpu_state_type(), platform="cpu")
    jax.ffi.register_ffi_target(CPU_TARGET, _native.cpu_handlers(), platform="cpu")


def _apply(settings: config.Config) -> None:
    _native.set_threads(settings.threads)
    _native.set_chaos_seed(settings.chaos)


register()
config.on_change(_apply)


def run_program(
    program: bytes | Any,
    arguments: Sequence[np.ndarray],
    results: Sequence[np.ndarray],
    *,
    threads: int | None = None,
    chaos_seed: int | None = None,
    held_task: int = -1,
    held_stores: int = -1,
) -> None:
    """Runs a Program once on NumPy arrays.

    Args:
      program: its words as bytes, or what :func:`parse_program` made of them.
      arguments: contiguous arrays, one per argument of the call.
      results: contiguous arrays that receive the results. The workspace, if the program has any, is added.
      threads: most OS threads to use, this one included.
      chaos_seed: run in chaos mode with this seed.
      held_task: a task to put off for as long as anything else can run, or -1.
      held_stores: a task whose stores other workers do not see for as long as anything else can run, tagged values
        excepted, or -1. Only in programs with tagged values.

    Raises:
      DeadlockError: no worker could go on; the error names worker, task, event or tagged element, expected and seen
        value.
      LaunchError: a task found something it cannot work with, or the arrays do not fit the program.
    """
    executable = parse_program(program) if isinstance(program, bytes) else program
    buffers = [_bytes(array) for array in results]
    if executable.workspace_bytes:
        buffers.append(np.empty(executable.workspace_bytes + 64, np.uint8))
        skip = -buffers[-1].ctypes.data % 64
        buffers[-1] = buffers[-1][skip : skip + executable.workspace_bytes]
    outcome = executable.run(
        [_bytes(array) for array in arguments],
        buffers,
        threads=threads,
        chaos_seed=chaos_seed,
        held_task=held_task,
        held_stores=held_stores,
    )
    if outcome.kind == "deadlock":
        raise DeadlockError(outcome.message)
    if outcome.kind != "ok":
        raise LaunchError(outcome.message)


def parse_program(program: bytes) -> Any:
    """Parses the words of a Program, for several runs of :func:`run_program`."""
    return _native.parse_program(program)


def _bytes(array: np.ndarray) -> np.ndarray:
    if not array.flags.c_contiguous:
        raise ValueError("run_program needs contiguous arrays")
    return array.reshape(-1).view(np.uint8)
