"""Builds executor_check.cc with the executor's sources and runs it, plain and under a thread sanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *(ROOT / "csrc/host" / name for name in ("executor.cc", "launch.cc", "launch_tags.cc", "thread_pool.cc")),
    Path(__file__).with_name("executor_check.cc"),
]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.parametrize("flags", [("-O2",), ("-O1", "-g", "-fsanitize=thread")])
def test_scheduling(flags, tmp_path) -> None:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "check"
    command = [COMPILER, "-std=c++20", "-Wall", "-Wextra", *flags, f"-I{ROOT / 'csrc'}", *map(str, SOURCES)]
    built = subprocess.run([*command, "-pthread", "-o", str(program)], capture_output=True, text=True)
    if built.returncode != 0 and "cannot find" in built.stderr:
        pytest.skip("this compiler has no such sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "ok\n"
