"""Generated kernels that are compiled, run and dropped leave no memory behind on a GPU."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from tests.gpu.test_cuda_handler import N, call, counting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="the device's memory is everybody's; run it alone"),
]

PROGRAMS, CYCLES = 10, 1000


def used_bytes() -> int:
    """Memory of the first device that somebody has taken."""
    jax.devices("cuda")
    library = ctypes.CDLL("libcuda.so.1")
    free, total, context = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
    assert library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert library.cuCtxPushCurrent_v2(context) == 0
    assert library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    library.cuCtxPopCurrent_v2(ctypes.byref(context))
    library.cuDevicePrimaryCtxRelease_v2(0)
    return total.value - free.value


def settles(cycle: Callable[[int], None], cycles: int, settle: int = 50) -> None:
    for k in range(settle):
        cycle(k)
    gc.collect()
    before = used_bytes()
    for k in range(cycles):
        cycle(k)
    gc.collect()
    assert used_bytes() - before <= 4 << 20


def test_compiled_run_and_dropped() -> None:
    """A thousand times, of ten programs whose kernels the cache on disk has after the first round."""
    x = jnp.arange(512.0)
    w = jnp.asarray(np.random.default_rng(0).standard_normal((512, 512)), jnp.float32)

    def cycle(k: int) -> None:
        factor = float(k % PROGRAMS + 1)
        step = jax_mpk.megakernelize(lambda x, w: jnp.tanh(w @ x) * factor)
        result = np.asarray(step(x, w))
        np.testing.assert_allclose(result, factor * np.tanh(np.asarray(w) @ np.asarray(x)), rtol=1e-3, atol=1e-3)
        step.clear_cache()
        if k % 100 == 0:
            jax.clear_caches()

    settles(cycle, CYCLES)


def test_states_and_modules() -> None:
    """Those of a handwritten kernel, a thousand times; XLA compiles anew for each of the functions."""
    x = jnp.zeros(N)
    program = counting(state_bytes=1 << 20)

    def cycle(k: int) -> None:
        function = call(program)
        assert float(jax.jit(lambda x: function(x))(x)[0]) == 0
        jax.clear_caches()

    settles(cycle, CYCLES, settle=20)
