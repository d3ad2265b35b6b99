"""The CudaProgram: one persistent kernel as CUDA C++ and the tables it reads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from jax_mpk._version import __version__


@dataclass(frozen=True)
class CudaProgram:
    """A kernel before it is compiled.

    Attributes:
      source: CUDA C++. It includes headers of csrc/device by name and defines ``extern "C" __global__ void entry(const
        __grid_constant__ mpk::Launch<N> launch)``, where N counts arguments, results and, if there is one, the
        workspace (csrc/device/launch.cuh).
      entry: name of the kernel.
      arch: architecture to compile for, such as "sm_90a".
      workers: CTAs of a launch, all of which must be able to run at a time.
      threads: of a CTA.
      shared_bytes: dynamic shared memory of a CTA.
      tables: constants the kernel reads, 256-byte aligned on the device and never written.
      state_bytes: device memory that lives as long as the executable, zero at first; a StateHeader, then what the
        kernel keeps from launch to launch.
      workspace_bytes: device memory of one launch; 0: none.
      arguments: buffers that come first.
      results: buffers behind them, without the workspace.
      labels: names of tasks for error texts, sorted: (first task, text), which holds up to the next one's task.
      values: names of tagged values for error texts, sorted: (where its words begin in the state, in 16 bytes; text).
    """

    source: str
    entry: str
    arch: str
    workers: int
    threads: int
    shared_bytes: int
    tables: bytes
    state_bytes: int
    workspace_bytes: int
    arguments: int
    results: int
    labels: tuple[tuple[int, str], ...] = ()
    values: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        """The source under a stamp that says what made it and how it is launched."""
        digest = hashlib.sha256(self.source.encode()).hexdigest()[:16]
        stamp = (
            f"// jax_mpk {__version__}, {self.arch}, source {digest}\n"
            f"// {self.entry}: {self.workers} workers × {self.threads} threads, {self.shared_bytes:,} bytes of shared "
            f"memory each;\n"
            f"// {self.arguments} arguments, {self.results} results; tables {len(self.tables):,} bytes, state "
            f"{self.state_bytes:,}, workspace {self.workspace_bytes:,}\n"
        )
        return stamp + self.source
