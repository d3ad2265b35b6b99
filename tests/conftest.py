"""Settings of the whole test process: eight CPU devices, unless GPU tests are asked for."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CPU_DEVICES = 8
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


def pytest_configure(config: pytest.Config) -> None:
    """Choose JAX's platform and devices; both are read when a backend starts, never after."""
    if "jax" in sys.modules:
        raise pytest.UsageError("jax was imported before tests/conftest.py could configure it")
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={CPU_DEVICES}".strip()
    if not _asks_for_gpu(config.option.markexpr):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the quick tests leave out."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(VERSIONLESS):
            item.add_marker(pytest.mark.slow)


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
