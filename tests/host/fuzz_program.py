"""Damages programs word by word: every damaged one must be refused or run within its buffers.

Run as a script, so that a crash is seen from outside: ``python tests/host/fuzz_program.py SEED COUNT``. Prints how many
were refused and how many ran.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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


def main(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    refused = ran = failed = 0
    everything = [(plan, encode(plan).words) for plan in plans()]
    for k in range(count):
        plan, words = everything[k % len(everything)]
        if k % 50 == 49:
            damaged = words[: int(rng.integers(len(words)))]
        else:
            damaged = damage(words, rng)
        try:
            executable = _native.parse_program(damaged.tobytes())
        except (RuntimeError, ValueError) as error:
            assert str(error), "a refusal says why"
            refused += 1
            continue
        if executable.workspace_bytes > 1 << 24 or executable.scratch_bytes > 1 << 24:
            continue
        sizes = {s.index: s.nbytes for s in plan.storages if s.kind == "input"}
        inputs = [np.zeros(sizes.get(i, 0), np.uint8) for i in range(len(plan.graph.inputs))]
        outputs = [np.zeros(s.nbytes, np.uint8) for s in plan.storages if s.kind == "output"]
        workspace = [np.zeros(executable.workspace_bytes, np.uint8)] if executable.workspace_bytes else []
        try:
            outcome = executable.run(inputs, outputs + workspace, threads=1)
        except (RuntimeError, ValueError):
            refused += 1
            continue
        ran += 1
        failed += outcome.kind != "ok"
    print(f"{count} damaged programs: {refused} refused, {ran} ran, {failed} of them reported a failure")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
