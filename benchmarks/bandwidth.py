"""How fast one GPU reads its memory: the roofline of everything that must read its weights.

    python -m benchmarks.bandwidth

Vector loads and 16 KB bulk copies over an array far beyond the cache, timed on the device; the better one counts. The
kernels are launched through the driver on the device's primary context, which JAX uses too.
"""

import argparse
import ctypes
import importlib.util
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax

from benchmarks import harness
from benchmarks.driver import PROCESSORS, Gpu

SOURCE = Path(__file__).with_suffix(".cu")
_RING_BYTES = 12 * 16_384


class Read(Protocol):
    """Reads memory whenever it is called, and knows how fast that was."""

    def __call__(self) -> None: ...

    @property
    def rates(self) -> dict[str, float]:
        """Bytes per second of each way to read."""


class HostRead:
    """All cores together, where there is no GPU."""

    def __init__(self, nbytes: int) -> None:
        self._read = harness.StreamingRead(nbytes)
        self._samples: list[float] = []

    def __call__(self) -> None:
        self._samples.append(harness.interleave({"read": self._read}, rounds=1, warm_up=0)["read"].median)

    @property
    def rates(self) -> dict[str, float]:
        return {"reduction": self._read.nbytes / statistics.median(self._samples)}


class DeviceRead:
    """One GPU.

    Args:
        nbytes: size of the array, at least 4 GB for a rate that is worth its name.
        ordinal: which GPU.

    Raises:
        RuntimeError: the driver or the compiler reports an error.
        OSError: there is no driver, or no compiler.
    """

    def __init__(self, nbytes: int = 1 << 32, ordinal: int = 0) -> None:
        self.nbytes = nbytes
        self._gpu = gpu = Gpu(ordinal)
        processors, architecture = gpu.attribute(PROCESSORS), gpu.architecture
        with gpu.current():
            module = gpu.module(compile_cuda(architecture))
            self._arguments = (gpu.allocate(nbytes), ctypes.c_ulonglong(nbytes), gpu.allocate(4))
            gpu.launch(gpu.function(module, "fill"), (processors * 16, 256, 0), self._arguments)
            # By name: the kernel, and its blocks, threads and bytes of shared memory.
            self._ways = {
                f"vector loads, {blocks} blocks per SM": (
                    gpu.function(module, "read_vectors"),
                    (processors * blocks, 256, 0),
                )
                for blocks in (4, 8)
            }
            if architecture.endswith("a"):
                for flight in (3, 8):
                    function = gpu.function(module, f"read_bulk_{flight}", _RING_BYTES)
                    self._ways[f"bulk copies, {flight} under way"] = (function, (processors, 32, _RING_BYTES))
        self._samples: dict[str, list[float]] = {name: [] for name in self._ways}

    def __call__(self) -> None:
        """Reads the array once in every way."""
        with self._gpu.current():
            for name, (function, grid) in self._ways.items():
                self._samples[name].append(self._gpu.launch(function, grid, self._arguments))

    @property
    def rates(self) -> dict[str, float]:
        return {name: self.nbytes / statistics.median(found) for name, found in self._samples.items()}


def compile_cuda(architecture: str) -> bytes:
    """The kernels as machine code, by NVRTC from its wheel, else by nvcc.

    Raises:
        FileNotFoundError: there is no compiler.
        RuntimeError: it reports an error.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    libraries = sorted(path for root in roots for path in root.glob("*/lib/libnvrtc.so*"))
    if libraries:
        return _nvrtc(ctypes.CDLL(str(libraries[-1])), architecture)
    if nvcc := shutil.which("nvcc"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bandwidth.cubin"
            subprocess.run([nvcc, "-cubin", f"-arch={architecture}", "-o", str(out), str(SOURCE)], check=True)
            return out.read_bytes()
    raise FileNotFoundError("neither NVRTC (pip install nvidia-cuda-nvrtc) nor nvcc is there")


def _nvrtc(nvrtc: ctypes.CDLL, architecture: str) -> bytes:
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    kind = "ProgramLog" if failed else "CUBIN"
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"{SOURCE.name} does not compile:\n{text.value.decode()}")
    return text.raw


def make_read(nbytes: int) -> Read:
    """Whatever reads the memory of JAX's first device fastest."""
    return HostRead(nbytes) if jax.devices()[0].platform == "cpu" else DeviceRead(nbytes)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bandwidth", description=__doc__.partition("\n")[0])
    parser.add_argument("--bytes", type=int, default=1 << 32, help="size of the array")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--commit", help="the checkout's commit, where there is no git")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "bandwidth.json")
    options = parser.parse_args(argv)
    read = make_read(options.bytes)
    for _ in range(options.rounds):
        read()
    rows = [{"method": name, "bytes": options.bytes, "read_tb_per_s": rate / 1e12} for name, rate in read.rates.items()]
    print(harness.table(rows, ("method", "read_tb_per_s")))
    harness.write(rows, options.out, commit=options.commit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
