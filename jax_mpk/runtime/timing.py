"""Where the time to a first result goes, by stage."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from jax_mpk.runtime.native import load_seconds

_spent: dict[str, float] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def timed(stage: str) -> Iterator[None]:
    """Counts the time of a ``with`` block."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - begin
        with _lock:
            _spent[stage] = _spent.get(stage, 0.0) + seconds


def compile_seconds() -> dict[str, float]:
    """Seconds this process has spent so far on each stage of compilation, all functions together.

    The stages are "trace" (JAX's), "graph", "plan", "verify", "codegen", "nvrtc", "cache" (reading and writing it) and
    "load" (of kernels and tables onto devices). To know those of one function, take the difference.
    """
    with _lock:
        spent = dict(_spent)
    if loading := load_seconds():
        spent["load"] = loading
    return spent
