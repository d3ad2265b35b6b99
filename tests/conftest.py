"""Settings of the whole test process: eight CPU devices, unless GPU tests are asked for."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CPU_DEVICES = 8
#: Objects made between two collections of garbage: at Python's 700, a tenth of the time goes into looking for it.
ALLOCATIONS = 50_000
#: Folders and files whose tests depend on no version of Python or JAX, as they begin behind the graph and do not go
#: through XLA: the quick tests, which CI runs on each version, leave them out.
VERSIONLESS = (
    "benchmarks/",
    "codegen/",
    "host/",
    "plan/",
    "runtime/test_cuda_cache.py",
    "runtime/test_cuda_executable.py",
    "runtime/test_executor_native.py",
    "runtime/test_nvrtc.py",
    "runtime/test_run_program.py",
    "runtime/test_tagged.py",
    "test_layers.py",
)
#: Among them, what depends on the version of NVRTC, which differs as well.
COMPILES = ("codegen/test_golden.py",)
#: Tests of the public interface that say nothing about the device: run on a GPU too, where these are asked for.
ANYWHERE = (
    "api/test_calls.py",
    "api/test_donation.py",
    "api/test_effects.py",
    "api/test_high_types.py",
    "api/test_transformations.py",
    "models/test_decoder.py",
    "models/test_encoder.py",
    "models/test_minilm.py",
    "models/test_one_custom_call.py",
    "models/test_sampling.py",
    "models/test_smollm2.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Choose JAX's platform and devices; both are read when a backend starts, never after."""
    if "jax" in sys.modules:
        raise pytest.UsageError("jax was imported before tests/conftest.py could configure it")
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={CPU_DEVICES}".strip()
    if _asks_for_gpu(config.option.markexpr):
        # On a GPU jax.jit multiplies in TF32 unless told otherwise.
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what the quick tests leave out, and what runs on a GPU too."""
    here = Path(__file__).parent
    gpu = _asks_for_gpu(config.option.markexpr)
    for item in items:
        path = item.path.relative_to(here)
        if path.as_posix().startswith(VERSIONLESS) and path.as_posix() not in COMPILES:
            item.add_marker(pytest.mark.slow)
        if gpu and path.as_posix() in ANYWHERE and not item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.gpu)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect garbage seldom, and never look at what has been imported by now."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS, *gc.get_threshold()[1:])


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types, as under JAX_ENABLE_X64."""
    import jax

    with jax.enable_x64(True):
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where JAX sees no GPU."""
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs an NVIDIA GPU")


def _asks_for_gpu(markexpr: str) -> bool:
    return "gpu" in markexpr.replace("not gpu", "")


def _has_gpu() -> bool:
    import jax

    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False
