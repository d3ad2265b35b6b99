"""Many launches at once, with fewer threads than launches."""

import textwrap
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk import config, megakernelize
from tests.api.support import run_python


def work(x, n):
    return jax.lax.fori_loop(0, n, lambda _, x: jnp.clip(x @ x.T, -3, 3), x)


def integers(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_executables_run_side_by_side(threads) -> None:
    sizes = [3, 8, 17, 33]
    inputs = [integers(s, s, s) for s in sizes]
    expected = [np.asarray(jax.jit(work)(x, 30)) for x in inputs]
    compiled = [megakernelize(work, target=f"cpu-{w}") for w in (1, 2, 5, 16)]
    with config.override(threads=threads), ThreadPoolExecutor(8) as pool:

        def run(i: int) -> None:
            np.testing.assert_array_equal(compiled[i % 4](inputs[i % 4], 30), expected[i % 4])

        list(pool.map(run, range(80)))


@pytest.mark.parametrize("threads", [1, 2])
def test_all_devices_at_once(threads) -> None:
    f = megakernelize(work, target="cpu-3")
    inputs = [jax.device_put(integers(i, 9, 9), d) for i, d in enumerate(jax.devices())]
    with config.override(threads=threads):
        results = [f(x, 50) for x in inputs for _ in range(3)]
        jax.block_until_ready(results)
    for i, x in enumerate(inputs):
        np.testing.assert_array_equal(results[3 * i], jax.jit(work)(x, 50))


def test_same_bits_whatever_runs_beside_and_however_interleaved() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((40, 40)), jnp.float32)

    def f(x):
        x = jax.lax.fori_loop(0, 10, lambda _, x: jax.nn.softmax(x @ x.T) + jnp.tanh(x), x)
        half = x.astype(jnp.bfloat16)
        return x, half @ half, jnp.cumsum(x, 1), jax.lax.top_k(x, 3), x.mean(), jnp.argsort(x.sum(0))

    def bits(results) -> list[bytes]:
        return [np.asarray(r).tobytes() for r in jax.tree.leaves(results)]

    g, other = megakernelize(f, target="cpu-5"), megakernelize(work, target="cpu-16")
    expected, beside = bits(g(x)), integers(1, 33, 33)
    with ThreadPoolExecutor(4) as pool:
        for seed in range(10):
            for threads in (1, 2, 3):
                with config.override(threads=threads, chaos=seed):
                    neighbours = [pool.submit(lambda: jax.block_until_ready(other(beside, 20))) for _ in range(2)]
                    same = [pool.submit(lambda: bits(g(x))) for _ in range(2)]
                    assert all(result.result() == expected for result in same)
                    assert all(bits(n.result()) == bits(neighbours[0].result()) for n in neighbours)


def test_denormals_are_flushed_on_every_thread_and_the_caller_is_left_alone() -> None:
    tiny = jnp.full((64, 64), 1e-39, jnp.float32)
    f = megakernelize(lambda x: x * 1.0 + 0.0, target="cpu-8")
    assert not np.asarray(f(tiny)).any()
    assert np.float32(1e-39) * np.float32(1.0) != 0


def test_thread_count_stays_put() -> None:
    import os

    def count() -> int:
        return len(os.listdir("/proc/self/task"))

    x = integers(0, 5, 5)
    jax.block_until_ready(megakernelize(work)(x, 3))
    before = count()
    for i in range(20):
        jax.block_until_ready(megakernelize(lambda x, i=i: x + i)(x))
    assert count() <= before + 1


SCARCE = """
    import os, resource
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np
    from jax_mpk import config, megakernelize
    from jax_mpk.codegen.encode import encode
    from jax_mpk.runtime.native import run_program

    x = np.arange(33 * 33, dtype=np.float32).reshape(33, 33) % 7
    plan = megakernelize(lambda x: jnp.clip(x.T @ x, -3, 3).T @ x, target="cpu-8").lower(x).plan
    words, result = encode(plan).words.tobytes(), np.zeros_like(x)
    with config.override(threads=2):
        # No room for the stack of another thread.
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20), resource.RLIM_INFINITY))
        threads = len(os.listdir("/proc/self/task"))
        for launch in range(3):
            run_program(words, [x], [result])
        assert len(os.listdir("/proc/self/task")) == threads
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run_program(words, [x], [result])
        assert len(os.listdir("/proc/self/task")) == threads + 1
    np.testing.assert_array_equal(result, np.clip(x.T @ x, -3, 3).T @ x)
    print("ran")
"""


def test_a_system_without_another_thread() -> None:
    """The caller does all the work itself, and nothing is left behind that a later launch trips over."""
    assert run_python(textwrap.dedent(SCARCE)) == "ran\n"
