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
from typing import Any, NamedTuple

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
#: Seconds of the machine's time, in which a turn takes 100 ns, after which a wait gives up.
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
    """A kernel as a shared library. Its source may have the headers in it, see :func:`device_folder`."""
    root = _folder()
    with tempfile.TemporaryDirectory(dir=root) as folder:
        source, library = Path(folder) / "kernel.cc", Path(folder) / "kernel.so"
        text = f'{program.source}\nextern "C" void emulated(const void* launch) {{\n'
        text += f"  {program.entry}(*static_cast<const mpk::Shape::Launch*>(launch));\n}}\n"
        source.write_text(text)
        assert COMPILER is not None
        first = root / "all.h" if '#include "jax_mpk.cuh"' in program.source else _HERE / "machine.h"
        command = [COMPILER, *_OPTIONS, "-shared", "-include", str(first), f"-I{root / 'device'}"]
        done = subprocess.run(
            [*command, str(source), str(root / "machine.o"), "-o", str(library)], capture_output=True, text=True
        )
        if done.returncode:
            raise Fault(f"{done.stderr[:4000]}\n{program.source}")
        return ctypes.CDLL(str(library))


def device_folder() -> Path:
    """The headers as kernels on the CPU include them."""
    return _folder() / "device"


class Record(NamedTuple):
    """What a kernel says that gave up: `Record` in csrc/device/launch.cuh."""

    worker: int
    task: int
    kind: int
    what: int
    expected: int
    seen: int
    element: int


class Kernel:
    """A plan's kernel on the CPU.

    Args:
      plan: the plan.
      program: its program, if it is not the one that the plan gives.

    Attributes:
      program: what is run.
      state: bytes that last from launch to launch; the tests' to look at, and to change.
    """

    def __init__(self, plan: Plan, program: CudaProgram | None = None):
        self.plan = plan
        self.program = program or generate(plan)
        self.state = _aligned(self.program.state_bytes)
        self._library = compiled(self.program)
        self._tables = _aligned(len(self.program.tables))
        self._tables[:] = np.frombuffer(self.program.tables, np.uint8)

    def launch(
        self, args: Sequence[Any], *, seed: int = 0, deadline: float = _DEADLINE
    ) -> tuple[list[Array], Record | None]:
        """The results, and what the kernel reports if it gave up.

        Args:
          args: of the plan's graph.
          seed: of the order in which threads take turns.
          deadline: of one wait, in seconds of the machine's own time.

        Raises:
          Fault: the kernel did not end.
        """
        plan, program = self.plan, self.program
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
        record = _aligned(40)
        words = [self._tables.ctypes.data, self.state.ctypes.data, record.ctypes.data, int(deadline * 10**9)]
        parameter = np.array([*words, *(b.ctypes.data for b in raw), 0], np.uint64)
        hung = self._library.emulate(
            ctypes.cast(self._library.emulated, ctypes.c_void_p),
            ctypes.c_void_p(parameter.ctypes.data),
            program.workers,
            program.threads,
            program.shared_bytes,
            ctypes.c_uint64(seed),
        )
        if hung:
            raise Fault("threads wait for each other")
        for result, output in zip(results, outputs):
            result.reshape(-1).view(np.uint8)[:] = output[: result.nbytes]
        words_of_record = record[:32].view(np.uint32).tolist()
        if not words_of_record[0]:
            return results, None
        return results, Record(*words_of_record[1:7], int(record[32:].view(np.uint64)[0]))

    def reset(self) -> None:
        """What the host does to the state after a launch that gave up."""
        self.state[:] = 0


def run(plan: Plan, args: Sequence[Any], *, launches: int = 1, seed: int = 0) -> list[Array]:
    """Results of the last of some launches of a plan's kernel, each with the same arguments.

    Raises:
      Fault: the kernel did not end, or gave up.
    """
    kernel = Kernel(plan)
    results: list[Array] = []
    for launch in range(launches):
        results, record = kernel.launch(args, seed=seed + launch)
        if record is not None:
            raise Fault(f"launch {launch} gave up: {record}")
    return results


def _aligned(size: int) -> Array:
    """Zeroed bytes (an argument's, a result's) at an address that is a multiple of 256."""
    raw = np.zeros(size + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + size]
