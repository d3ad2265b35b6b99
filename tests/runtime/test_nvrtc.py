"""Compiling kernels without a GPU."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jax_mpk import CompileError, CompilerNotFoundError
from jax_mpk.runtime import nvrtc
from tests.cuda_programs import COUNTING, kernel

SOURCE = kernel(COUNTING, arguments=1, results=1).source
#: Keeps more values than there are registers.
SPILLING = """\
float kept[250];
auto* memory = static_cast<float*>(launch.buffers[0]);
#pragma unroll
for (int i = 0; i < 250; ++i) kept[i] = memory[i * me];
__syncthreads();
#pragma unroll
for (int i = 0; i < 250; ++i) memory[i + me] = kept[249 - i];
"""


@pytest.fixture
def compilers():
    """Whatever a test finds is forgotten."""
    nvrtc.find.cache_clear()
    yield
    nvrtc.find.cache_clear()


def test_cubin() -> None:
    compiled = nvrtc.compile_source(SOURCE, "sm_90a")
    assert compiled.cubin.startswith(b"\x7fELF") and b".text.entry" in compiled.cubin
    used = compiled.resources
    assert 0 < used.registers <= 64
    assert (used.spill_bytes, used.stack_bytes, used.shared_bytes) == (0, 0, 0)


def test_same_source_same_cubin() -> None:
    assert nvrtc.compile_source(SOURCE, "sm_90a").cubin == nvrtc.compile_source(SOURCE, "sm_90a").cubin


def test_spills_are_seen() -> None:
    source = kernel("__shared__ float row[64];\nrow[threadIdx.x] = 0;\n" + SPILLING, arguments=1, results=0).source
    used = nvrtc.compile_source(source.replace("void entry", "void __launch_bounds__(1024) entry"), "sm_90a").resources
    assert used.registers <= 64 and used.spill_bytes > 0 and used.stack_bytes > 0


def test_account_of_several_functions() -> None:
    log = (
        "ptxas info    : Function properties for helper\n"
        "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers, 48 bytes cumulative stack size, 640 bytes smem\n"
    )
    assert nvrtc.parse_resources(log) == nvrtc.Resources(168, 12, 48, 640)
    assert nvrtc.parse_resources("") == nvrtc.Resources(0, 0, 0, 0)


def test_refused_source() -> None:
    with pytest.raises(CompileError, match=r"refused a kernel for sm_90a") as error:
        nvrtc.compile_source("__global__ void entry() { undeclared(); }", "sm_90a", name="step.cu")
    assert "step.cu(1)" in error.value.log and "undeclared" in error.value.log
    assert error.value.log in str(error.value)


def test_unknown_architecture() -> None:
    with pytest.raises(CompileError, match="sm_1"):
        nvrtc.compile_source(SOURCE, "sm_1")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_where_there_is_no_nvrtc(compilers, monkeypatch) -> None:
    monkeypatch.setattr(nvrtc, "_libraries", lambda: iter(()))
    assert nvrtc.find().version.startswith("nvcc V")
    compiled = nvrtc.compile_source(SOURCE, "sm_90a")
    assert compiled.cubin.startswith(b"\x7fELF") and compiled.resources.registers > 0
    with pytest.raises(CompileError, match="undeclared"):
        nvrtc.compile_source("__global__ void entry() { undeclared(); }", "sm_90a")


def test_stand_in_for_nvcc(compilers, monkeypatch, tmp_path) -> None:
    """What nvcc is asked for, on machines that have none."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi\n'
        'while [ "$1" != -o ]; do echo "$1"; shift; done; cp "$3" "$2"\n'
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(nvrtc, "_libraries", lambda: iter(()))
    compiled = nvrtc.compile_source("text", "sm_90a")
    assert nvrtc.find().version == "nvcc V13.0.88"
    assert compiled.cubin == b"text"
    asked = compiled.log.split()
    assert asked[0] == "-cubin" and "--gpu-architecture=sm_90a" in asked and f"-I{nvrtc.device_headers()}" in asked


def test_no_compiler(compilers, monkeypatch) -> None:
    monkeypatch.setattr(nvrtc, "_libraries", lambda: iter(["/nowhere/libnvrtc.so.13"]))
    monkeypatch.setattr(nvrtc.shutil, "which", lambda name: None)
    with pytest.raises(CompilerNotFoundError, match=r'pip install "jax_mpk\[cuda13\]"') as error:
        nvrtc.compile_source(SOURCE, "sm_90a")
    assert "/nowhere/libnvrtc.so.13" in str(error.value)


def test_headers_are_there() -> None:
    assert (nvrtc.device_headers() / "launch.cuh").is_file()


def test_host_and_device_agree_on_headers(tmp_path) -> None:
    """The shared header is C++17 for a host compiler too, without warnings."""
    source = tmp_path / "host.cc"
    source.write_text('#include "launch.cuh"\nint main() { return sizeof(mpk::Launch<2>) != 48; }\n')
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{nvrtc.device_headers()}", source, "-o"]
    subprocess.run([*command, tmp_path / "host"], check=True)
    subprocess.run([tmp_path / "host"], check=True)


def test_import_needs_no_compiler(tmp_path) -> None:
    """Neither NVRTC nor a driver is opened by importing the package and running on the CPU."""
    code = (
        "import jax_mpk, jax.numpy as jnp; jax_mpk.megakernelize(lambda x: x + 1)(jnp.ones(3));"
        "maps = open('/proc/self/maps').read(); assert 'libnvrtc' not in maps and 'libcuda.so' not in maps"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)
