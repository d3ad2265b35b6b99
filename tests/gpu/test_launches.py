"""Many launches of generated kernels on a GPU: loops inside one, repetition, threads, streams, graphs."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk import _native
from jax_mpk.codegen.cuda.generate import generate
from jax_mpk.runtime import cuda
from tests.api.support import operations
from tests.gpu.programs import decode_loop, decoder, filled_cache, planned

pytestmark = pytest.mark.gpu

CACHE, LIVE = 512, 200
#: Decode steps, which reach into several parts that the keys are split into.
STEPS = 250


@pytest.fixture(autouse=True)
def _precise() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield
        jax_mpk.check()


def close(actual: Any, expected: Any) -> None:
    for have, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(have), np.asarray(want), rtol=1e-3, atol=1e-3)


def test_decode_across_blocks_of_the_cache() -> None:
    """Steps of one launch read what earlier ones wrote; tokens, caches and logits are those of ``jax.jit``."""
    step, params = decoder()
    loop = decode_loop(step)
    args = (params, filled_cache(CACHE, LIVE), jnp.array([7], jnp.int32), jnp.int32(LIVE))
    fused = jax.jit(jax_mpk.megakernelize(loop))
    assert operations(fused.lower(*args, jnp.int32(STEPS)).compile()) == ["custom-call"]
    for steps in (STEPS, 0, 1, 57):
        tokens, logits, cache = fused(*args, jnp.int32(steps))
        expected_tokens, expected_logits, expected_cache = jax.jit(loop)(*args, jnp.int32(steps))
        np.testing.assert_array_equal(tokens, expected_tokens)
        close((logits, cache), (expected_logits, expected_cache))
        if steps == STEPS:
            assert len(set(np.asarray(tokens)[:steps].tolist())) > 20


def test_decode_step_by_step() -> None:
    """The same, a launch for each step, the cache in place."""
    step, params = decoder()
    fused = jax_mpk.megakernelize(step, donate_argnums=1)
    reference = jax.jit(step)
    mine, other = filled_cache(CACHE, LIVE), filled_cache(CACHE, LIVE)
    where = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(mine)]
    token = expected = jnp.array([7], jnp.int32)
    for pos in range(LIVE, LIVE + 40):
        token, logits, mine = fused(params, mine, token, jnp.int32(pos))
        expected, expected_logits, other = reference(params, other, expected, jnp.int32(pos))
        assert int(token[0]) == int(expected[0])
        close(logits, expected_logits)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(mine)] == where
    close(mine, other)


def test_ten_thousand_launches_are_bit_identical() -> None:
    step, params = decoder()
    fused = jax.jit(jax_mpk.megakernelize(step))
    args = (params, filled_cache(CACHE, LIVE), jnp.array([7], jnp.int32), jnp.int32(LIVE))

    @jax.jit
    def differing(count: jax.Array, first: Any, now: Any) -> jax.Array:
        def bits(x: jax.Array) -> jax.Array:
            return jax.lax.bitcast_convert_type(x, jnp.uint32)

        same = jax.tree.map(lambda a, b: (bits(a) == bits(b)).all(), first, now)
        return count + ~jnp.stack(jax.tree.leaves(same)).all()

    first = fused(*args)
    close(first, jax.jit(step)(*args))
    count = jnp.int32(0)
    for _ in range(10_000):
        count = differing(count, first, fused(*args))
    assert int(count) == 0


def test_two_executables_in_two_threads() -> None:
    step, params = decoder()

    def affine(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w.T / 16) @ w

    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((512,), (700, 512)))
    calls = [
        (jax.jit(jax_mpk.megakernelize(affine)), (x, w)),
        (
            jax.jit(jax_mpk.megakernelize(step)),
            (params, filled_cache(CACHE, LIVE), jnp.array([7], jnp.int32), jnp.int32(LIVE)),
        ),
    ]
    expected = [jax.tree.map(np.asarray, f(*args)) for f, args in calls]
    close(expected[0], affine(x, w))
    faults: list[str] = []

    def work(turn: int) -> None:
        for k in range(200):
            f, args = calls[(turn + k) % 2]
            got = jax.tree.map(np.asarray, f(*args))
            if not all(jax.tree.leaves(jax.tree.map(np.array_equal, got, expected[(turn + k) % 2]))):
                faults.append(f"thread {turn}, call {k}")

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_two_streams() -> None:
    """One executable on two streams, launches of both under way at a time, without XLA."""

    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w.T / 16) @ w

    w = np.random.default_rng(0).standard_normal((700, 512)).astype(np.float32)
    xs = np.random.default_rng(1).standard_normal((2, 512)).astype(np.float32)
    plan, results = planned(fn, xs[0], w)
    program = generate(plan)
    native = _native.CudaExecutable(cuda.build(program))
    driver = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    streams = [ctypes.c_void_p() for _ in range(2)]
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert driver.cuCtxPushCurrent_v2(context) == 0
    for stream in streams:
        assert driver.cuStreamCreate(ctypes.byref(stream), 1) == 0
    weights = jnp.asarray(w)
    arguments = [jnp.asarray(x) for x in xs]
    outputs = [jnp.full(results[0].shape, np.nan, results[0].dtype) for _ in xs]
    workspaces = [[jnp.zeros(program.workspace_bytes, jnp.uint8)] if program.workspace_bytes else [] for _ in xs]
    jax.block_until_ready([weights, arguments, outputs, workspaces])
    for stream in streams:
        native.initialize(0, stream.value)
    for _ in range(50):
        for stream, *arrays, workspace in zip(streams, arguments, [weights] * 2, outputs, workspaces, strict=True):
            native.launch(0, stream.value, [a.unsafe_buffer_pointer() for a in (*arrays, *workspace)])
    assert native.check() == []
    for x, output in zip(xs, outputs, strict=True):
        np.testing.assert_allclose(np.asarray(output), np.asarray(jax.jit(fn)(x, w)), rtol=1e-4, atol=1e-4)
    for stream in streams:
        driver.cuStreamDestroy_v2(stream)
    driver.cuCtxPopCurrent_v2(ctypes.byref(context))


def test_command_buffers() -> None:
    """Two argument sets by turns, allocated anew between replays of one graph."""
    step, params = decoder()
    fused = jax_mpk.megakernelize(step)

    def several(f: Any) -> Any:
        def run(params: Any, cache: Any, token: jax.Array, pos: jax.Array) -> Any:
            for k in range(3):
                token, logits, cache = f(params, cache, token, pos + k)
                cache = jax.tree.map(lambda c: c * 1.0009765625, cache)  # XLA's own kernels in between
            return token, logits, cache

        return jax.jit(run)

    options = {"xla_gpu_graph_min_graph_size": 1, "xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL"}
    sets = [
        (params, filled_cache(CACHE, live), jnp.array([token], jnp.int32), jnp.int32(live))
        for live, token in ((LIVE, 7), (40, 300))
    ]
    compiled = several(fused).lower(*sets[0]).compile(compiler_options=options)
    expected = [jax.tree.map(np.asarray, several(step)(*args)) for args in sets]
    for count in range(12):
        close(compiled(*sets[count % 2]), expected[count % 2])
        if count % 3 == 2:  # other addresses
            holes = [jnp.zeros(1 << 16) for _ in range(count)]
            sets = [jax.tree.map(lambda a: a + 0, args) for args in sets]
            del holes
