"""Handwritten kernels through XLA on a GPU: what the custom call promises, whatever the kernel."""

import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk import config
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.runtime import cuda, targets
from jax_mpk.runtime.native import CUDA_TARGET
from tests.cuda_programs import COUNTING, kernel

pytestmark = pytest.mark.gpu

N = 1 << 16
TABLES = np.array([N], np.uint32).tobytes()
#: Counts launches, unless the first element is negative: then gives up as a kernel does whose wait passed its deadline.
FAILING = """\
const auto* in = static_cast<const float*>(launch.buffers[0]);
auto* out = static_cast<float*>(launch.buffers[1]);
if (me == 0 && in[0] < 0 && atomicExch(&header->abort, 1u) == 0) {
  *launch.record = Record{0, 17, 120, kWaitEvent, 5, 132, 131, 0, 0};
  __threadfence_system();
  *static_cast<volatile u32*>(&launch.record->set) = 1;
}
__syncthreads();
for (u32 i = me; i < launch.tables[0]; i += all) out[i] = header->abort ? __int_as_float(0x7fffffff) : in[i] + 1;
"""


def counting(**fields: object) -> CudaProgram:
    return kernel(COUNTING, arguments=1, results=1, tables=TABLES, workers=8, threads=256, **fields)


def failing() -> CudaProgram:
    # One worker: others might look at the flag before it is set.
    return kernel(FAILING, arguments=1, results=1, tables=TABLES, workers=1, threads=32)


def call(program: CudaProgram, **options: object):
    """A function of one array that runs a program."""
    blob = cuda.build(program)

    def run(x: jax.Array) -> jax.Array:
        made = jax.ffi.ffi_call(CUDA_TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype), **options)
        return made(x, program=blob)

    return run


def test_launches_share_a_state() -> None:
    step = jax.jit(call(counting()))
    x = jnp.arange(N, dtype=jnp.float32)
    for count in range(5):
        np.testing.assert_array_equal(step(x), x + count)


def test_call_sites_have_states_of_their_own() -> None:
    step = call(counting())
    twice = jax.jit(lambda x: (step(x), step(x + 1)))
    x = jnp.zeros(N)
    for count in range(3):
        a, b = twice(x)
        assert (float(a[0]), float(b[-1])) == (count, count + 1)


def test_loops_inside_a_program() -> None:
    step = call(counting())
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda i, x: step(x), x))
    assert float(loop(jnp.zeros(N))[0]) == sum(range(10))
    assert float(loop(jnp.zeros(N))[0]) == sum(range(10, 20))


def test_donated_arguments() -> None:
    step = jax.jit(call(counting(), input_output_aliases={0: 0}), donate_argnums=0)
    x = jnp.zeros(N)
    before = x.unsafe_buffer_pointer()
    y = step(x)
    assert x.is_deleted() and y.unsafe_buffer_pointer() == before
    kept = jnp.ones(N)
    np.testing.assert_array_equal(jax.jit(call(counting(), input_output_aliases={0: 0}))(kept), kept)


def test_command_buffers() -> None:
    """Replays see the addresses of their own call, and one state."""
    step = call(counting())

    # Small enough graphs are not captured by default.
    options = {"xla_gpu_graph_min_graph_size": 1, "xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL"}

    def several(x: jax.Array) -> jax.Array:
        for _ in range(6):
            x = step(x * 2)
        return x

    x = jnp.arange(N, dtype=jnp.float32)
    compiled = jax.jit(several).lower(x).compile(compiler_options=options)
    arguments = [x, x + 1]
    for count in range(10):
        expected = np.asarray(arguments[count % 2])
        for _ in range(6):
            expected = expected * 2 + count
        np.testing.assert_array_equal(compiled(arguments[count % 2]), expected)
        if count % 3 == 2:  # other addresses
            holes = [jnp.zeros(N) for _ in range(count)]
            arguments = [a + 0 for a in arguments]
            del holes


def test_threads_share_an_executable() -> None:
    step = jax.jit(call(counting()))
    x = jnp.zeros(N)
    seen: list[float] = []

    def work() -> None:
        seen.extend(float(step(x)[0]) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(200))


def test_failure_is_raised_by_the_next_call() -> None:
    bad = jax.jit(call(failing()))
    good = jax.jit(call(counting()))
    x = jnp.zeros(N)
    assert float(bad(x)[0]) == 1
    assert np.isnan(np.asarray(bad(x - 1))).all()  # waits: the record is there
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"DeadlineError: .*SM 17 at task 120, event 5"):
        jax.block_until_ready(good(x))
    np.testing.assert_array_equal(bad(x), x + 1)
    np.testing.assert_array_equal(good(x), x)
    jax_mpk.check()


def test_failure_is_raised_by_check() -> None:
    bad = jax.jit(call(failing()))
    x = jnp.zeros(N)
    bad(x - 1)
    with pytest.raises(jax_mpk.DeadlineError, match="expected 132, seen 131"):
        jax_mpk.check()
    jax_mpk.check()
    np.testing.assert_array_equal(bad(x), x + 1)


def test_failure_is_raised_at_once() -> None:
    bad = jax.jit(call(failing()))
    x = jnp.zeros(N)
    bad(x).block_until_ready()
    with config.override(sync=True):
        with pytest.raises(jax.errors.JaxRuntimeError, match="DeadlineError"):
            jax.block_until_ready(bad(x - 1))
        np.testing.assert_array_equal(bad(x), x + 1)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"workers": 1 << 16}, r"TargetError: .*planned for 65536 SMs"),
        ({"shared_bytes": 1 << 20}, r"TargetError: .*1048576 bytes of shared memory"),
        ({"state_bytes": 1 << 42}, r"RESOURCE_EXHAUSTED: .*allocating a kernel's state"),
    ],
)
def test_refusals(fields, text) -> None:
    known = {"tables": TABLES, "workers": 8}
    program = kernel(COUNTING, arguments=1, results=1, **(known | fields))
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.compile(text, re.DOTALL)):
        jax.block_until_ready(jax.jit(call(program))(jnp.zeros(N)))


def test_device_is_described() -> None:
    target = targets.resolve("cuda")
    device = jax.devices("cuda")[0]
    assert target.workers == device.core_count
    assert 1e11 < target.bandwidth < 1e14
