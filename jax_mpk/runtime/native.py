"""The extension module: FFI registration, the executor's settings, and running Programs without XLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxlib import xla_client

from jax_mpk import config
from jax_mpk.codegen.encode import VERSION
from jax_mpk.errors import DeadlineError, DeadlockError, LaunchError, NativeModuleError

try:
    from jax_mpk import _native  # type: ignore[attr-defined, unused-ignore]
except ImportError as error:
    raise NativeModuleError(
        "The compiled part of jax_mpk cannot be loaded; reinstall it (`make build` in a checkout). "
        f"The loader says: {error}"
    ) from error

#: Version of the programs for GPUs that :func:`jax_mpk.runtime.cuda.pack` writes.
CUDA_VERSION = 2

for _name, _version in (("program_version", VERSION), ("cuda_program_version", CUDA_VERSION)):
    if getattr(_native, _name, None) != _version:
        raise NativeModuleError(
            "The compiled part of jax_mpk does not fit its Python sources: it reads programs of version "
            f"{getattr(_native, _name, 'unknown')}, they write version {_version}. Reinstall jax_mpk "
            "(`make build` in a checkout)."
        )

#: Names of the custom calls of the CPU executor and of kernels on GPUs.
CPU_TARGET = "jax_mpk_cpu"
CUDA_TARGET = "jax_mpk_cuda"


def register() -> None:
    """Makes the custom calls known to XLA. Must not start a backend, and works before and after one started."""
    # Registrations made before the backend exists are queued, and jaxlib flushes targets before types, which then
    # fails. Installing the types' handler first registers ours at once instead of queueing it.
    xla_client.register_custom_type_handler("cpu", xla_client._xla.register_custom_type)  # type: ignore[attr-defined]
    jax.ffi.register_ffi_type("jax_mpk.CpuState", _native.cpu_state_type(), platform="cpu")
    jax.ffi.register_ffi_target(CPU_TARGET, _native.cpu_handlers(), platform="cpu")
    # These wait until there is a backend for GPUs, which registers types first.
    jax.ffi.register_ffi_type("jax_mpk.CudaState", _native.cuda_state_type(), platform="CUDA")
    jax.ffi.register_ffi_target(CUDA_TARGET, _native.cuda_handlers(), platform="CUDA")


def _apply(settings: config.Config) -> None:
    _native.set_threads(settings.threads)
    _native.set_chaos_seed(settings.chaos)
    _native.cuda_configure(settings.sync, settings.deadline_ms * 1_000_000)


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


def check() -> None:
    """Waits for the megakernels launched on GPUs so far, and raises what went wrong in them and no call has raised.

    Launches are asynchronous: a failure is raised by the next call of any megakernel on the device, or here, whichever
    comes first.

    Raises:
      DeadlineError: a wait in a kernel passed its deadline. The text names every such launch: SM, task, what it waited
        for, the expected and the seen value.
      LaunchError: the device is in a state that the driver cannot go on from.
    """
    try:
        failures = _native.cuda_check()
    except RuntimeError as error:
        raise LaunchError(str(error)) from error
    if failures:
        raise DeadlineError("\n".join(failures))


def cuda_device(ordinal: int = 0) -> dict[str, Any] | None:
    """What the driver says about a GPU, or None: there is no such GPU."""
    return _native.cuda_device(ordinal)


def load_seconds() -> float:
    """Seconds spent so far on loading kernels and tables onto GPUs."""
    return _native.cuda_load_seconds()


def parse_program(program: bytes) -> Any:
    """Parses the words of a Program, for several runs of :func:`run_program`."""
    return _native.parse_program(program)


def _bytes(array: np.ndarray) -> np.ndarray:
    if not array.flags.c_contiguous:
        raise ValueError("run_program needs contiguous arrays")
    return array.reshape(-1).view(np.uint8)
