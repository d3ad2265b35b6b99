"""The CUDA program of a plan. (interface; see the runtime's version)"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CudaProgram:
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
    labels: tuple[str, ...] = ()
    task_labels: bytes = b""
