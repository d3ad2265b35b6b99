"""What the benchmarks share: one timer, the description of the machine, rows and their JSON file.

Systems are compared within one process and interleaved round by round, in an order that changes, so that a machine
that is slower for a while is slower for all of them; the median over rounds is reported.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
#: The commit of a checkout of which git knows nothing.
UNKNOWN = "unknown"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one system, one sample per round.

    Attributes:
        samples: in the order of the rounds, each per repetition.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a fraction of the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    repetitions: Mapping[str, int] | int = 1,
    warm_up: int = 1,
) -> dict[str, Timing]:
    """Times several functions in turn.

    Args:
        runs: by name; each does its work and returns arrays, which are waited for.
        rounds: samples of each.
        repetitions: how often `runs[name]` does its work in one call, by which its time is divided.
        warm_up: rounds before the first one that counts.

    Returns:
        Seconds per repetition, by name.
    """
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        # Each system comes first, and after each other one, about equally often.
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order if turn // len(names) % 2 == 0 else reversed(order):
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            seconds = time.perf_counter() - start
            if turn >= warm_up:
                count = repetitions if isinstance(repetitions, int) else repetitions[name]
                samples[name].append(seconds / count)
    return {name: Timing(tuple(found)) for name, found in samples.items()}


class StreamingRead:
    """Reads a large array once, on all cores: the most bandwidth that a program can have here.

    Args:
        nbytes: size of the array; must be far beyond the last-level cache.
    """

    def __init__(self, nbytes: int = 1 << 29) -> None:
        threads = cores()
        self.nbytes = nbytes
        whole = np.ones(nbytes // 8, np.uint64)
        self._pieces = np.array_split(whole, threads)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)

    def __call__(self) -> None:
        """Reads every element; this reduction releases Python's lock and costs less than the bytes."""
        list(self._pool.map(np.bitwise_or.reduce, self._pieces))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> Row:
    """What every row says about where it comes from."""
    devices = jax.devices()
    return {
        "device": _cpu_name() if devices[0].platform == "cpu" else devices[0].device_kind,
        "num_devices": len(devices),
        "cores": cores(),
        "python_version": platform.python_version(),
        "jax_version": jax.__version__,
        "jaxlib_version": importlib.metadata.version("jaxlib"),
        "commit": commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The checkout's commit; `+` behind it means that files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def write(rows: Sequence[Row], path: Path, *, commit: str | None = None, **about: Any) -> None:
    """Writes rows with the environment merged into each, and what else there is to say about the run.

    Args:
        rows: the measurements.
        path: JSON file. Rows whose commit nobody knows are no record: they go to ``<name>.unknown.json`` beside it.
        commit: the checkout's commit, where git cannot say.
        about: further fields beside the rows, such as the command's options.
    """
    here = environment() | ({"commit": commit} if commit else {})
    document = {**about, "command": _command(sys.orig_argv[1:]), "rows": [{**row, **here} for row in rows]}
    if here["commit"] == UNKNOWN:
        path = path.with_suffix(f".{UNKNOWN}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def _command(arguments: Sequence[str]) -> str:
    """The command line without where its output goes, which says nothing about the run."""
    kept = list(arguments)
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return " ".join(kept)


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as aligned text."""

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(columns), *([shown(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in cells)
