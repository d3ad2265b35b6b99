"""Damages programs word by word: every damaged one must be refused or run within its buffers.

Run as a script, so that a crash is seen from outside: ``python tests/host/fuzz_program.py SEED COUNT``. Prints how many
were refused, how many ran, and how many ran for so long that they were stopped.
"""

from __future__ import annotations

import collections
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mpk import _native
from jax_mpk.codegen.encode import encode
from jax_mpk.plan.ir import Plan
from tests.codegen.harness import plan_of

F32 = np.ones
#: Seconds of CPU after which a program is stopped: a damaged count of updates or rounds can be any number.
PATIENCE = 3.0


def _step(x: Any, w: Any, cache: Any, new: Any, at: Any) -> Any:
    h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    cache = lax.dynamic_update_slice(cache, new, (at, np.int32(0)))
    scores = (h @ w) @ cache.T
    return jax.nn.softmax(scores, -1) @ cache, cache, jnp.argmax(scores, -1), lax.top_k(scores, 3)


def _moves(x: Any, i: Any) -> Any:
    y = jnp.concatenate([x[i], jnp.pad(x, ((1, 2), (0, 0)))])
    return jnp.cumsum(y, 0), jnp.sort(y, 1), y.at[i].add(x[: i.shape[0]]), lax.cumlogsumexp(x, axis=0)


def plans() -> Iterator[Plan]:
    f = F32
    args = (f((2, 8), np.float32), f((8, 16), np.float32), f((9, 16), np.float32), f((1, 16), np.float32), np.int32(3))
    large = (
        f((2, 256), np.float32),
        f((256, 256), np.float32),
        f((9, 256), np.float32),
        f((1, 256), np.float32),
        args[4],
    )
    for fn, given, workers, tagged in (
        (_step, args, 1, False),
        (_step, args, 3, False),
        (_moves, (f((12, 20), np.float32), np.array([3, -1, 40], np.int32)), 2, False),
        (lambda x: (x.T.astype(jnp.bfloat16) * 2).sum(0), (f((5, 300), np.float32),), 2, False),
        (_step, large, 8, True),
    ):
        yield plan_of(fn, *given, workers=workers, tagged=tagged)


def damage(words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One or a few words changed."""
    words = words.copy()
    changes: list[Callable[[int], int]] = [
        lambda w: w + 1,
        lambda w: w - 1,
        lambda w: -1,
        lambda w: 0,
        lambda w: int(rng.integers(0, 64)),
        lambda w: w ^ (1 << int(rng.integers(0, 63))),
        lambda w: int(rng.integers(-(1 << 62), 1 << 62)),
        lambda w: w * 2,
    ]
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        at = int(rng.integers(3, len(words)))
        changed = changes[int(rng.integers(len(changes)))](int(words[at]))
        words[at] = (changed + (1 << 63)) % (1 << 64) - (1 << 63)
    return words


def tried(plan: Plan, damaged: np.ndarray) -> str:
    """What becomes of a program: "refused", "large" (not run), "ok" or "failed"."""
    try:
        executable = _native.parse_program(damaged.tobytes())
    except (RuntimeError, ValueError) as error:
        assert str(error), "a refusal says why"
        return "refused"
    if executable.workspace_bytes > 1 << 24 or executable.scratch_bytes > 1 << 24:
        return "large"
    sizes = {s.index: s.nbytes for s in plan.storages if s.kind == "input"}
    inputs = [np.zeros(sizes.get(i, 0), np.uint8) for i in range(len(plan.graph.inputs))]
    outputs = [np.zeros(s.nbytes, np.uint8) for s in plan.storages if s.kind == "output"]
    workspace = [np.zeros(executable.workspace_bytes, np.uint8)] if executable.workspace_bytes else []
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
    try:
        return "ok" if executable.run(inputs, outputs + workspace, threads=1).kind == "ok" else "failed"
    except (RuntimeError, ValueError):
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def tried_elsewhere(programs: Sequence[tuple[Plan, np.ndarray]]) -> list[str]:
    """What becomes of programs in a process of their own, up to the first that does not end ("endless")."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for program in programs:
            os.write(writer, f"{tried(*program)}\n".encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as lines:
        found = lines.read().split()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGVTALRM:
        return [*found, "endless"]
    if status != 0:
        raise SystemExit(f"program {len(found)} of {len(programs)} ended its process with status {status}")
    return found


def main(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    everything = [(plan, encode(plan).words) for plan in plans()]
    programs = []
    for k in range(count):
        plan, words = everything[k % len(everything)]
        damaged = words[: int(rng.integers(len(words)))] if k % 50 == 49 else damage(words, rng)
        programs.append((plan, damaged))
    found: list[str] = []
    while len(found) < count:
        found += tried_elsewhere(programs[len(found) :])
    n = collections.Counter(found)
    print(
        f"{count} damaged programs: {n['refused']} refused, {n['ok'] + n['failed']} ran, "
        f"{n['failed']} of them reported a failure, {n['endless']} were stopped"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
