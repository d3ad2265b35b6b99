"""Runs generated kernels without a GPU: compiled for the CPU, every CUDA thread a fiber, in a random order.

What differs from the device: memory is never stale, whatever the order of plain stores and tags; and f32 arithmetic is
the CPU's where ``csrc/device/scalar.cuh`` says so.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_mpk.codegen.cuda.generate import generate
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.graph import dtypes
from jax_mpk.plan.ir import Plan
from jax_mpk.runtime.nvrtc import device_headers

Array = np.ndarray[Any, Any]
COMPILER = shutil.which("g++") or shutil.which("clang++")
_HERE = Path(__file__).parent / "emulation"
_OPTIONS = ("-std=c++20", "-O1", "-w", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off")
#: Seconds after which a wait gives up.
_DEADLINE = 60


class Fault(AssertionError):
    """A kernel that did not end, or gave up."""


@functools.cache
def _folder() -> Path:
    """Headers as the CPU sees them, and the machine."""
    folder = tempfile.TemporaryDirectory(prefix="jax_mpk_emulation")
    _kept.append(folder)
    root = Path(folder.name)
    shutil.copytree(device_headers(), root / "device")
    shutil.copy(_HERE / "memory.cuh", root / "device" / "memory.cuh")
    assert COMPILER is not None
    machine = [COMPILER, *_OPTIONS, "-c", str(_HERE / "machine.cc"), "-o", str(root / "machine.o")]
    subprocess.run(machine, check=True, capture_output=True)
    # Compiled once for all kernels, which takes half of the time of each.
    (root / "all.h").write_text(f'#include "{_HERE / "machine.h"}"\n#include "jax_mpk.cuh"\n')
    headers = [COMPILER, *_OPTIONS, f"-I{root / 'device'}", "-x", "c++-header", str(root / "all.h")]
    subprocess.run([*headers, "-o", str(root / "all.h.gch")], check=True, capture_output=True)
    return root


_kept: list[tempfile.TemporaryDirectory[str]] = []


def compiled(program: CudaProgram) -> ctypes.CDLL:
    """A kernel as a shared library."""
    root = _folder()
    with tempfile.TemporaryDirectory(dir=root) as folder:
        source, library = Path(folder) / "kernel.cc", Path(folder) / "kernel.so"
        text = f'{program.source}\nextern "C" void emulated(const void* launch) {{\n'
        text += f"  {program.entry}(*static_cast<const mpk::Shape::Launch*>(launch));\n}}\n"
        source.write_text(text)
        assert COMPILER is not None
        command = [COMPILER, *_OPTIONS, "-shared", "-include", str(root / "all.h"), f"-I{root / 'device'}"]
        done = subprocess.run(
            [*command, str(source), str(root / "machine.o"), "-o", str(library)], capture_output=True, text=True
        )
        if done.returncode:
            raise Fault(f"{done.stderr[:4000]}\n{program.source}")
        return ctypes.CDLL(str(library))


def run(plan: Plan, args: Sequence[Any], *, launches: int = 1, seed: int = 0) -> list[Array]:
    """Results of the last of some launches of a plan's kernel, each with the same arguments.

    Raises:
      Fault: the kernel did not end.
    """
    program = generate(plan)
    library = compiled(program)
    state = _aligned(program.state_bytes)
    tables = _aligned(len(program.tables))
    tables[:] = np.frombuffer(program.tables, np.uint8)
    record = _aligned(40)
    results: list[Array] = []
    for launch in range(launches):
        values = [plan.graph.values[v] for v in plan.graph.results]
        results = [np.full(v.shape, 0, dtypes.to_numpy(v.dtype)) for v in values]
        buffers = [_aligned(np.asarray(a).nbytes) for a in args]
        for buffer, a in zip(buffers, args):
            buffer[:] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        outputs = []
        for k, result in enumerate(results):
            argument = plan.aliases.get(k, -1)
            outputs.append(buffers[argument] if argument >= 0 else _aligned(result.nbytes))
        raw = [*buffers, *outputs]
        if plan.workspace_bytes:
            raw.append(_aligned(plan.workspace_bytes))
        words = [tables.ctypes.data, state.ctypes.data, record.ctypes.data, _DEADLINE * 10**9]
        parameter = np.array([*words, *(b.ctypes.data for b in raw), 0], np.uint64)
        kernel = ctypes.cast(library.emulated, ctypes.c_void_p)
        hung = library.emulate(
            kernel,
            ctypes.c_void_p(parameter.ctypes.data),
            program.workers,
            program.threads,
            program.shared_bytes,
            ctypes.c_uint64(seed + launch),
        )
        set_, worker, task, kind, what, expected, seen, _ = record[:32].view(np.uint32).tolist()
        if hung or set_:
            raise Fault(
                f"launch {launch}: worker {worker}, task {task}, kind {kind}, {what}: expected {expected}, seen {seen}"
                if set_
                else f"launch {launch}: threads wait for each other"
            )
        for result, output in zip(results, outputs):
            result.reshape(-1).view(np.uint8)[:] = output[: result.nbytes]
    return results


def _aligned(size: int) -> Array:
    """Zeroed bytes (an argument's, a result's) at an address that is a multiple of 256."""
    raw = np.zeros(size + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + size]
