"""Exported on a GPU, and run there in a process that has compiled nothing."""

import os

import pytest

from tests.api.support import run_python
from tests.api.test_processes import CACHED, EXPORT, RUN, dedented

pytestmark = pytest.mark.gpu
#: No more than there is: JAX would try what other platforms' libraries it finds.
GPU = {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def test_export_runs_in_a_new_process(tmp_path) -> None:
    files = [str(tmp_path / name) for name in ("direct", "jitted")]
    arguments = "import sys; sys.argv = " + repr(["", *files]) + "\n"
    run_python(arguments + dedented(EXPORT), **GPU)
    for name in files:
        with open(name, "rb") as file:
            assert b"jax_mpk_cuda" in file.read()
    nothing = {"JAX_MPK_CACHE_DIR": str(tmp_path / "empty"), "PATH": os.environ["PATH"]}
    assert run_python(arguments + dedented(RUN), **GPU, **nothing) == "ran 2\n"
    assert not (tmp_path / "empty").exists()  # the kernel came with the file


def test_persistent_compilation_cache(tmp_path) -> None:
    first, second = (run_python(CACHED, JAX_COMPILATION_CACHE_DIR=str(tmp_path), **GPU).split() for _ in range(2))
    assert first == ["0", "1"] and second == ["1", "0"]
