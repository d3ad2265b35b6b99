"""From a CudaProgram to the bytes that the custom call carries."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.runtime import cuda_cache, nvrtc
from jax_mpk.runtime.native import CUDA_VERSION
from jax_mpk.runtime.timing import timed


def build(program: CudaProgram) -> bytes:
    """Compiles a kernel, or finds it in the cache, and packs it with all that a launch needs."""
    return pack(program, compile_program(program))


def compile_program(program: CudaProgram) -> bytes:
    """The cubin of a kernel, from the cache if it is there.

    Raises:
      CompileError: the compiler refused the source.
      CompilerNotFoundError: there is no compiler.
    """
    cache = cuda_cache.current()
    with timed("cache"):
        key = cuda_cache.cubin_key(program.source, program.arch) if cache is not None else ""
        found = cache.get(key) if cache is not None else None
    if found is not None:
        return found
    with timed("nvrtc"):
        cubin = nvrtc.compile_source(program.source, program.arch, name=f"{program.entry}.cu").cubin
    if cache is not None:
        with timed("cache"):
            cache.put(key, cubin)
    return cubin


def pack(program: CudaProgram, cubin: bytes) -> bytes:
    """The program as csrc/cuda/program.cc reads it."""
    sections = (program.entry.encode(), program.arch.encode(), cubin, program.tables)
    numbers = (CUDA_VERSION, program.workers, program.threads, program.shared_bytes, program.arguments, program.results)
    return b"".join(
        (
            b"JMPKCUDA",
            struct.pack("<6I2Q", *numbers, program.state_bytes, program.workspace_bytes),
            *(_sized(section) for section in sections),
            _names(program.labels),
            _names(program.values),
        )
    )


def _names(names: Sequence[tuple[int, str]]) -> bytes:
    packed = (struct.pack("<I", key) + _sized(text.encode()) for key, text in names)
    return struct.pack("<I", len(names)) + b"".join(packed)


def _sized(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data
