"""Kernels that lose something: a signal, a tagged word, a bulk load, a decision, an arrival at a barrier.

The fault is written into the text of a generated program and of the device headers, and strikes in those launches whose
last argument says so: one executable can be right, fail, and be right again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mpk.codegen.cuda.generate import generate
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.plan.ir import Plan
from jax_mpk.runtime.nvrtc import device_headers

#: What each kind of hand-off is called in a report, and its number: `WaitKind` in csrc/device/launch.cuh.
EVENT, TAG, BULK_LOAD, BARRIER, PREDICATE = range(5)
#: The element whose tagged word is lost: not the first one of the 16 bytes that are read at a time.
ELEMENT = 5
#: The worker that loses something, and which chunk of its ring or which decision it is.
WORKER, CHUNK = 1, 1
#: Where the tests' tag sequence starts; tags go up to 65,535.
FIRST_SEQUENCE = 65530


def _relay(x: jax.Array, w: jax.Array, fault: jax.Array) -> jax.Array:
    """Elements too large for tags."""
    return jnp.tanh(x @ w) @ w


def _mlp(x: jax.Array, w: jax.Array, v: jax.Array, fault: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w.T) @ v.T + x


def _by_default(x: jax.Array, w: jax.Array, v: jax.Array, fault: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w) @ v + x


def _steps(x: jax.Array, w: jax.Array, n: jax.Array, fault: jax.Array) -> jax.Array:
    return lax.fori_loop(0, n, lambda i, x: jnp.tanh(w @ x / 64), x)


@dataclass(frozen=True)
class Faulty:
    """A function, what its kernel loses, and what is said about it.

    Attributes:
      name: of the test.
      kind: of the hand-off.
      fn: the function; its last argument is the switch, an int32 that it does not use.
      shapes: of the arguments before the switch: ``"3x4 float32"``, ``"int32=3"``.
      text, instead: of the headers; what stands in their place, with FAULT for the switch.
      report: what the error says, as a regular expression.
    """

    name: str
    kind: int
    fn: Callable[..., Any]
    shapes: tuple[str, ...]
    text: str
    instead: str
    report: str


_SIGNAL = "add_release(events() + "
_STORE = "store_relaxed(words + i, Word("
_LOAD = "bulk_load(to, start, nbytes"
_TILE_LOAD = "bulk_load(to + k * pitch, from"
_COPIES = "if (lane == 0) barrier_arrive(filled);"
_DECIDED = "barrier_arrive(shared_base() + decided());"
_DALLY = (
    "for (const u64 begin = nanoseconds(); nanoseconds() - begin < c.launch.deadline_ns / 100;) "
    "if (c.watch().aborted()) break;"
)
_ARRIVAL = "add_release(&watch().header()->arrivals, 1);"
_MLP = ("1x512 bfloat16", "1024x512 bfloat16", "512x1024 bfloat16")
# Every worker of a GPU begins with several chunks of these, pieces of rows.
_TILES = ("8x4096 bfloat16", "1056x4096 bfloat16", "4096x1056 bfloat16")
_STEPS = ("256 float32", "256x256 float32", "int32=4")
_TASK = r"at task \d+ \(cuda_faults\.py:\d+ [^)]*\)"

FAULTY = (
    Faulty(
        "signal",
        EVENT,
        _relay,
        ("1x96 float64", "96x96 float64"),
        _SIGNAL,
        f"if (!(FAULT && worker() == {WORKER})) {_SIGNAL}",
        rf"SM \d+ {_TASK}, " r"event \d+: expected (\d+), seen (?!\1;)\d+;",
    ),
    Faulty(
        "tagged word",
        TAG,
        _mlp,
        _MLP,
        _STORE,
        f"if (!(FAULT && i == {ELEMENT})) {_STORE}",
        rf"SM \d+ {_TASK}, tag of value %\d+\[{ELEMENT}\]: expected \d+, seen \d+;",
    ),
    Faulty(
        "bulk load",
        BULK_LOAD,
        _mlp,
        _MLP,
        _LOAD,
        f"if (!(FAULT && blockIdx.x == {WORKER} && next.stage == {CHUNK})) {_LOAD}",
        rf"SM {WORKER} {_TASK}, " r"bulk load \d+: expected (\d+), seen (?!\1;)\d+;",
    ),
    Faulty(
        "bulk load of a tile",
        BULK_LOAD,
        _mlp,
        _TILES,
        _TILE_LOAD,
        f"if (!(FAULT && blockIdx.x == {WORKER} && next.stage == {CHUNK})) {_TILE_LOAD}",
        rf"SM {WORKER} {_TASK}, " r"bulk load \d+: expected (\d+), seen (?!\1;)\d+;",
    ),
    Faulty(
        "copies of columns",
        BULK_LOAD,
        _by_default,
        ("2x512 bfloat16", "512x1024 bfloat16", "1024x512 bfloat16"),
        _COPIES,
        f"if (!(FAULT && blockIdx.x == {WORKER} && next.stage == {CHUNK})) {_COPIES}",
        rf"SM {WORKER} {_TASK}, " r"bulk load \d+: expected (\d+), seen (?!\1;)\d+;",
    ),
    *(
        Faulty(
            name,
            PREDICATE,
            _steps,
            _STEPS,
            _DECIDED,
            # Those who wait for this worker do so first, and still are not the ones to report.
            f"if (!(FAULT && c.worker() == {WORKER} && n == {n})) {_DECIDED} else {_DALLY}",
            rf"SM {WORKER} {where}, predicate or branch index {n}: expected {n + 1}, seen {n};",
        )
        # The one that ends the loop is the fifth.
        for name, n, where in (("predicate", 1, _TASK), ("last predicate", 4, "between tasks"))
    ),
    Faulty(
        "arrival",
        BARRIER,
        _steps,
        _STEPS,
        _ARRIVAL,
        f"if (!(FAULT && worker() == {WORKER} && barriers == 3)) {_ARRIVAL}",
        r"SM \d+ between tasks, barrier 2: expected (\d+), seen (?!\1;)\d+;",
    ),
)


def flat(program: CudaProgram, headers: Path | None = None) -> CudaProgram:
    """The program with the text of all headers in its own."""
    seen: set[str] = set()

    def expand(text: str) -> str:
        return re.sub(r'^#include "(.*)"$', lambda m: include(m[1]), text, flags=re.MULTILINE)

    def include(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        return expand(((headers or device_headers()) / name).read_text(encoding="utf-8").replace("#pragma once", ""))

    return dataclasses.replace(program, source=expand(program.source))


def edited(program: CudaProgram, *edits: tuple[str, str]) -> CudaProgram:
    """A program with other text in some places, each of which must be there."""
    text = program.source
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} times in the program: {old}"
        text = text.replace(old, new)
    return dataclasses.replace(program, source=text)


def faulty(plan: Plan, text: str, instead: str, headers: Path | None = None) -> CudaProgram:
    """The plan's program, losing what ``instead`` says in launches whose last argument is not 0."""
    switch = f"(*static_cast<const volatile u32*>(%s.buffers[{len(plan.graph.inputs) - 1}]) != 0)"
    # Stores of tagged words do not see the launch; here they do.
    program = flat(generate(plan), headers)
    source = re.sub(r"(\bg\d+)\.put\(", r"\1.put(c, ", program.source)
    program = edited(
        dataclasses.replace(program, source=source),
        ("__device__ void put(u64 i, T v)", "template <class C> __device__ void put(const C& c, u64 i, T v)"),
    )
    # Members of Context and Producer see it as theirs.
    launch = "c.launch" if text in (_STORE, _DECIDED) else "launch"
    return edited(program, (text, instead.replace("FAULT", switch % launch)))


def late(program: CudaProgram) -> CudaProgram:
    """The program with tags of runs as if each segment had run 65,530 times before its first launch."""
    return edited(program, ("tag = tag_of(sequence);", f"tag = tag_of(sequence + {FIRST_SEQUENCE});"))


def branches_and_loops(
    x: jax.Array, w: jax.Array, arm: jax.Array, trips: jax.Array, fault: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tagged hand-offs in front of, inside and behind a branch and a loop; exact in f32."""

    def twice(x: jax.Array) -> jax.Array:
        return w @ ((w @ x) % 5 - 2) % 7 - 3

    y = twice(x)
    z = lax.switch(arm, [twice, lambda y: y + 1, lambda y: twice(y) * 2], y)
    z = lax.fori_loop(0, trips, lambda i, z: twice(z) + i.astype(z.dtype), z)
    return twice(z) + y, z


def exact_arguments(size: int) -> list[np.ndarray[Any, Any]]:
    """``x`` and ``w`` of :func:`branches_and_loops`."""
    rng = np.random.default_rng(7)
    return [rng.integers(-3, 4, shape).astype(np.float32) for shape in ((size,), (size, size))]
