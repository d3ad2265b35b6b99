"""Every setting that comes from the environment: the variables named ``JAX_MPK_…``.

They are read once, when jax_mpk is imported, and checked there; nothing else in the package reads the
environment. :func:`override` changes settings for a while, for tests and for experiments in one process.

==================  ===========================================================================
JAX_MPK_THREADS     OS threads that run megakernels on the CPU, the caller's included; default:
                    one for each core this process may use
JAX_MPK_CHAOS       seed (an integer from 0 to 2**63 - 1): run the CPU executor in chaos mode;
                    default: off
JAX_MPK_DUMP_TO     folder for numbered dumps of every stage; default: none
JAX_MPK_SYNC        1: every launch on a GPU is waited for, so that its failure is raised by the
                    same call; default: 0
JAX_MPK_DEADLINE_MS milliseconds that a kernel on a GPU waits for one thing before it gives up; 0:
                    for ever; default: 10000
JAX_MPK_CACHE_DIR   folder in which compiled kernels are kept; "0" or "off": none; default:
                    $XDG_CACHE_HOME/jax_mpk/kernels, or ~/.cache/jax_mpk/kernels
JAX_MPK_MODELS      folder the example models' weights are kept in; read by ``models``, not by the
                    package
==================  ===========================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_mpk.errors import ConfigError

_PREFIX = "JAX_MPK_"
_DEADLINE_MS = 10_000


@dataclass(frozen=True)
class Config:
    """Settings of the process.

    Attributes:
      threads: OS threads that run megakernels on the CPU, the caller's included.
      chaos: seed of the CPU executor's chaos mode, or None: off.
      dump_to: folder for stage dumps, or None.
      sync: wait for every launch on a GPU.
      deadline_ms: how long a kernel on a GPU waits for one thing; 0: for ever.
      cache_dir: folder of the cache of compiled kernels, or None: there is none.
    """

    threads: int
    chaos: int | None
    dump_to: Path | None
    sync: bool
    deadline_ms: int
    cache_dir: Path | None


def from_environment(environ: Mapping[str, str]) -> Config:
    """Reads and checks every variable.

    Raises:
      ConfigError: a variable has a value that cannot be used, or is not one of ours.
    """
    known = {_PREFIX + name for name in ("THREADS", "CHAOS", "DUMP_TO", "SYNC", "DEADLINE_MS", "CACHE_DIR", "MODELS")}
    for name in environ:
        if name.startswith(_PREFIX) and name not in known:
            raise ConfigError(f"{name} is not a variable of jax_mpk; it knows {', '.join(sorted(known))}")
    threads = _integer(environ, "THREADS", 1, 1024)
    deadline = _integer(environ, "DEADLINE_MS", 0, 10**9)
    dump_to = environ.get(_PREFIX + "DUMP_TO", "")
    if dump_to and Path(dump_to).exists() and not Path(dump_to).is_dir():
        raise ConfigError(f"{_PREFIX}DUMP_TO={dump_to!r} is not a folder")
    return Config(
        threads=_cores() if threads is None else threads,
        chaos=_integer(environ, "CHAOS", 0, 2**63 - 1),
        dump_to=Path(dump_to) if dump_to else None,
        sync=bool(_integer(environ, "SYNC", 0, 1)),
        deadline_ms=_DEADLINE_MS if deadline is None else deadline,
        cache_dir=_cache_dir(environ),
    )


def _integer(environ: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    text = environ.get(_PREFIX + name, "")
    if not text:
        return None
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise ConfigError(f"{_PREFIX}{name}={text!r} is not an integer from {low} to {high}")
    return value


def _cache_dir(environ: Mapping[str, str]) -> Path | None:
    text = environ.get(_PREFIX + "CACHE_DIR", "")
    if text in ("0", "off"):
        return None
    if text:
        if Path(text).exists() and not Path(text).is_dir():
            raise ConfigError(f"{_PREFIX}CACHE_DIR={text!r} is not a folder")
        return Path(text).absolute()
    home = environ.get("XDG_CACHE_HOME", "")
    # What is not absolute is to be ignored, says the standard of these variables.
    base = Path(home) if home.startswith("/") else Path(os.path.expanduser("~"), ".cache")
    return base / "jax_mpk" / "kernels"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


_current = from_environment(os.environ)
_listeners: list[Callable[[Config], None]] = []


def current() -> Config:
    """The settings in force."""
    return _current


def on_change(listener: Callable[[Config], None]) -> None:
    """Calls ``listener`` with the settings now and whenever they change."""
    _listeners.append(listener)
    listener(_current)


@contextlib.contextmanager
def override(**changes: Any) -> Iterator[Config]:
    """Changes settings of the whole process within a ``with`` block.

    What is already running keeps the settings it was started with; launches are asynchronous, so wait for
    results (``jax.block_until_ready``) before leaving the block.
    """
    previous = _current
    _set(dataclasses.replace(previous, **changes))
    try:
        yield _current
    finally:
        _set(previous)


def _set(config: Config) -> None:
    global _current
    _current = config
    for listener in _listeners:
        listener(config)
