"""The bare kernel of a decode step: compiled here, timed on a GPU beside others of its kind, and traced task by task.

    python -m benchmarks.kernel pack --model qwen3-1.7b --name before --out kernels    # no GPU needed
    python -m benchmarks.kernel pack --model qwen3-1.7b --name loop --loop 128         # 128 steps in one launch
    python -m benchmarks.kernel time kernels/*.npz                                     # in turns, on one
    python -m benchmarks.kernel trace kernels/qwen3-1.7b-1-before.npz

For the question whether a change makes the kernel faster, which is answered by one run of both. Kernels are packed in
checkouts with and without the change, so a GPU is needed for no longer than it takes to run them. They run outside JAX
on random numbers, and nobody looks at their results: no figure from here is a record.
"""

import argparse
import ctypes
import dataclasses
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks import harness
from benchmarks.driver import Gpu
from benchmarks.shapes import SHAPES, step_bytes
from models.decoder import Cache, Decoder, DecoderConfig, init_cache

_BLOCK = 1 << 26  # bytes of random numbers
_RECORD_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A packed kernel.

    Attributes:
        name: model, batch and what was changed.
        entry, workers, threads, shared: how it is launched.
        state_bytes, trace_bytes: of its state, and of what it writes behind it when it is traced.
        arguments: bytes and type of every argument.
        results: bytes of every result, or the argument whose buffer it takes over (then as -1 - number).
        workspace: bytes of one launch.
        labels: first task of each routine's, and the routine's text.
        position: of the first step.
        step_bytes: what the step must read.
        steps: in a launch.
    """

    name: str
    entry: str
    workers: int
    threads: int
    shared: int
    state_bytes: int
    trace_bytes: int
    arguments: list[tuple[int, str]]
    results: list[int]
    workspace: int
    labels: list[tuple[int, str]]
    position: int
    step_bytes: float
    steps: int = 1

    def grid(self) -> tuple[int, int, int]:
        return self.workers, self.threads, self.shared


def decode_step(config: DecoderConfig, batch: int, cache_len: int) -> tuple[Any, ...]:
    """The greedy decode step of a shape, and its arguments: shapes of weights and cache, tokens, position and seed."""
    from models.generate import sampling_steps
    from models.sampling import Sampling

    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    cache = jax.eval_shape(lambda: init_cache(config, batch, cache_len))
    _, following = sampling_steps(graphdef, Sampling())
    return following, params, cache, jnp.zeros(batch, jnp.int32), jnp.int32(0), jnp.uint32(0)


def pack(
    model: str, batch: int, cache_len: int, position: int, target: str, name: str, folder: Path, loop: int = 0
) -> Path:
    """Compiles the decode step of a model for a GPU, or a loop of so many around a position, to a file."""
    # Here, so that kernels can be run without the native library and the packages that checkpoints need.
    import jax_mpk
    from jax_mpk.codegen.cuda import generate
    from jax_mpk.graph import dtypes
    from jax_mpk.runtime.cuda import compile_program

    config = SHAPES[model]
    following, params, cache, *scalars = decode_step(config, batch, cache_len)

    def steps(params: nnx.State, cache: Cache, tokens: jax.Array, pos: jax.Array, seed: jax.Array) -> Any:
        def body(_: jax.Array, carry: tuple[jax.Array, Cache, jax.Array]) -> tuple[jax.Array, Cache, jax.Array]:
            tokens, cache, pos = carry
            return following(params, cache, tokens, pos, seed)

        return lax.fori_loop(0, loop, body, (tokens, cache, pos))

    step = jax_mpk.megakernelize(steps if loop else following, donate_argnums=1, target=target)
    plan = step.lower(*jax_mpk.place(step, params, cache, *scalars)).plan
    program, traced = generate(plan), generate(plan, trace=True)
    start, values = position - loop // 2, plan.graph.values
    positions = range(start, start + max(loop, 1))
    sizes = [(math.prod(value.shape) * dtypes.itemsize(value.dtype), value.dtype) for value in values]
    kernel = Kernel(
        name=f"{model}-{batch}-{name}",
        entry=program.entry,
        workers=program.workers,
        threads=program.threads,
        shared=program.shared_bytes,
        state_bytes=program.state_bytes,
        trace_bytes=traced.state_bytes - program.state_bytes,
        arguments=[sizes[v] for v in plan.graph.inputs],
        results=[-1 - plan.aliases[r] if r in plan.aliases else sizes[v][0] for r, v in enumerate(plan.graph.results)],
        workspace=program.workspace_bytes,
        labels=list(program.labels),
        position=positions.start,
        step_bytes=step_bytes(config, batch, positions),
        steps=len(positions),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kernel.name}.npz"
    images = {
        name: np.frombuffer(data, np.uint8)
        for name, data in (
            ("cubin", compile_program(program)),
            ("traced", compile_program(traced)),
            ("tables", program.tables),
            ("about", json.dumps(dataclasses.asdict(kernel)).encode()),
        )
    }
    np.savez_compressed(path, **images)
    return path


class Loaded:
    """A kernel on a GPU, with buffers of its own.

    Args:
        gpu: where.
        path: what :func:`pack` wrote.
        traced: load the one that writes when tasks begin and end.
    """

    def __init__(self, gpu: Gpu, path: Path, *, traced: bool = False) -> None:
        packed = np.load(path)
        about = json.loads(packed["about"].tobytes())
        self.kernel = kernel = Kernel(**about)
        self._gpu = gpu
        self._module = gpu.module(packed["traced" if traced else "cubin"].tobytes())
        self._function = gpu.function(self._module, kernel.entry, kernel.shared)
        self._pointers: list[ctypes.c_uint64] = []
        self.state_bytes = kernel.state_bytes + (kernel.trace_bytes if traced else 0)
        tables = packed["tables"].tobytes()
        self._tables, self.state, self._record = map(self._allocate, (len(tables), self.state_bytes, _RECORD_BYTES))
        gpu.upload(self._tables, tables)
        gpu.zero(self.state, self.state_bytes)
        gpu.zero(self._record, _RECORD_BYTES)
        buffers = self._arguments()
        buffers += [buffers[-1 - size] if size < 0 else self._allocate(size) for size in kernel.results]
        if kernel.workspace:
            buffers.append(self._allocate(kernel.workspace))
        words = [self._tables, self.state, self._record, ctypes.c_uint64(10_000_000_000), *buffers]
        self._launch = (ctypes.c_uint64 * len(words))(*(word.value for word in words))

    def _arguments(self) -> list[ctypes.c_uint64]:
        """Numbers of the size that activations have, as bf16; every integer is the step's position."""
        rng = np.random.default_rng(0)
        numbers = rng.normal(0, 0.02, _BLOCK // 2).astype(jnp.bfloat16)
        block = self._gpu.allocate(_BLOCK)
        self._gpu.upload(block, numbers.tobytes())
        out = []
        for nbytes, dtype in self.kernel.arguments:
            buffer = self._allocate(nbytes)
            if dtype in ("s32", "u32"):
                self._gpu.upload(buffer, np.full(nbytes // 4, self.kernel.position, np.int32).tobytes())
            else:
                self._gpu.repeat(buffer, nbytes, block, _BLOCK)
            out.append(buffer)
        self._gpu.free(block)
        return out

    def _allocate(self, nbytes: int) -> ctypes.c_uint64:
        self._pointers.append(self._gpu.allocate(nbytes))
        return self._pointers[-1]

    def run(self, times: int = 1) -> float:
        """Seconds of a launch.

        Raises:
            RuntimeError: a wait in it passed its deadline.
        """
        seconds = self._gpu.launch(self._function, self.kernel.grid(), [self._launch], cooperative=True, times=times)
        record = np.frombuffer(self._gpu.download(self._record, _RECORD_BYTES), np.uint32)
        if record[0]:
            raise RuntimeError(f"{self.kernel.name} gave up: {record.tolist()}")
        return seconds

    def stamps(self) -> np.ndarray:
        """When each task of the last launch began, had what it reads, and was done: float64 [tasks, 3], in us."""
        raw = self._gpu.download(self.state, self.kernel.trace_bytes, self.kernel.state_bytes)
        times = np.frombuffer(raw, np.uint64).reshape(-1, 4)[:, :3].astype(np.int64)
        return (times - times[times[:, 0] > 0, 0].min()) / 1e3

    def free(self) -> None:
        """Gives its memory back."""
        self._gpu.free(*self._pointers)


def compare(gpu: Gpu, paths: Sequence[Path], rounds: int, times: int) -> list[harness.Row]:
    """Times steps of kernels in turns; those of one model beside each other.

    Args:
        gpu: where.
        paths: what :func:`pack` wrote.
        rounds: samples of each.
        times: steps of a sample, at least.
    """
    rows = []
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[path.name.rsplit("-", 1)[0]].append(path)
    for group in groups.values():
        loaded = [Loaded(gpu, path) for path in group]
        samples: dict[Loaded, list[float]] = defaultdict(list)
        for turn in range(rounds + 1):
            for one in loaded if turn % 2 else reversed(loaded):
                seconds = one.run(-(-times // one.kernel.steps)) / one.kernel.steps
                if turn:
                    samples[one].append(seconds)
        for path, one in zip(group, loaded, strict=True):
            timing = harness.Timing(tuple(samples[one]))
            rows.append(
                {
                    "kernel": str(path),
                    "us": timing.median * 1e6,
                    "best_us": min(timing.samples) * 1e6,
                    "spread": timing.spread,
                    "tb_per_s": one.kernel.step_bytes / timing.median / 1e12,
                }
            )
            one.free()
    return rows


def trace(gpu: Gpu, path: Path, launches: int, save: Path | None = None) -> list[harness.Row]:
    """Where the time of a launch goes, by routine; the means over some launches, behind some that warm up.

    Args:
        gpu: where.
        path: what :func:`pack` wrote.
        launches: how many.
        save: a file for the stamps themselves, float32 [launches, tasks, 3], as ``.npy``.
    """
    loaded = Loaded(gpu, path, traced=True)
    loaded.run(3)
    taken = []
    for _ in range(launches):
        loaded.run()
        taken.append(loaded.stamps())
    loaded.free()
    if save is not None:
        np.save(save, np.stack(taken).astype(np.float32))
    return summarize(loaded.kernel, np.stack(taken))


def summarize(kernel: Kernel, stamps: np.ndarray) -> list[harness.Row]:
    """Rows by routine of float64 [launches, tasks, 3], microseconds; routines with the same text are one."""
    firsts = [first for first, _ in kernel.labels]
    edges = [*firsts[1:], stamps.shape[1]]
    by_text: dict[str, list[list[float]]] = defaultdict(list)
    for (first, text), end in zip(kernel.labels, edges, strict=True):
        begun, ready, done = np.moveaxis(stamps[:, first:end], 2, 0)
        # Tasks that wait for nothing have no stamp in the middle.
        ready = np.where(ready < begun, begun, ready)
        last = ready.max(axis=1)
        by_text[text].append(
            [
                (ready - begun).mean(),
                (done - ready).mean(),
                (done - ready).max(axis=1).mean(),
                (last - ready.min(axis=1)).mean(),
                (done.max(axis=1) - last).mean(),
            ]
        )
    names = ("waits_us", "works_us", "longest_us", "ready_spread_us", "last_ready_to_done_us")
    return [
        {"routine": text, "times": len(found), **dict(zip(names, map(statistics.mean, zip(*found)), strict=True))}
        for text, found in by_text.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parts: dict[str, Any] = {name: commands.add_parser(name) for name in ("pack", "time", "trace")}
    add = parts["pack"].add_argument
    add("--model", choices=SHAPES, required=True)
    add("--batch", type=int, default=1)
    add("--cache-len", type=int, default=1024)
    add("--position", type=int, default=512)
    add("--loop", type=int, default=0, help="so many steps around the position in one launch; 0: a step and no loop")
    add("--target", default="h200-sxm", help="the GPU, as `megakernelize` takes it")
    add("--name", default="now", help="what is special about this checkout; no hyphens")
    add("--out", type=Path, default=Path("kernels"), help="a folder")
    parts["time"].add_argument("paths", type=Path, nargs="+")
    parts["time"].add_argument("--rounds", type=int, default=20)
    parts["time"].add_argument("--steps", type=int, default=20, help="of a sample, at least")
    parts["trace"].add_argument("path", type=Path)
    parts["trace"].add_argument("--launches", type=int, default=10)
    parts["trace"].add_argument("--save", type=Path, help="a file for the stamps themselves, as .npy")
    options = parser.parse_args(argv)
    if options.command == "pack":
        if "-" in options.name:
            parser.error("a hyphen in --name")
        names = "model", "batch", "cache_len", "position", "target", "name", "out", "loop"
        print(pack(*(getattr(options, name) for name in names)))
        return 0
    gpu = Gpu()
    with gpu.current():
        if options.command == "time":
            rows = compare(gpu, options.paths, options.rounds, options.steps)
        else:
            rows = trace(gpu, options.path, options.launches, options.save)
    print(gpu.name)
    print(harness.table(rows, list(rows[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
