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
from typing import Any, Protocol

import jax

from benchmarks import harness

SOURCE = Path(__file__).with_suffix(".cu")
_RING_BYTES = 12 * 16_384
# CUdevice_attribute and CUfunction_attribute.
_PROCESSORS, _MAJOR, _MINOR = 16, 75, 76
_MAX_DYNAMIC_SHARED = 8


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
        self._cuda = _Library("libcuda.so.1")
        self._cuda.cuInit(0)
        device = ctypes.c_int()
        self._cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        self._context = ctypes.c_void_p()
        self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device)
        self._cuda.cuCtxPushCurrent_v2(self._context)
        processors, major, minor = (self._attribute(device, which) for which in (_PROCESSORS, _MAJOR, _MINOR))
        # The features of one architecture only, such as bulk copies, go by a name with an "a".
        image = compile_cuda(f"sm_{major}{minor}" + ("a" if major >= 9 else ""))
        module = ctypes.c_void_p()
        self._cuda.cuModuleLoadData(ctypes.byref(module), image)
        self._data, self._out = self._allocate(nbytes), self._allocate(4)
        self._start, self._end = self._event(), self._event()
        self._launch(self._function(module, "fill"), processors * 16, 256, 0)
        # By name: the kernel, blocks, threads and bytes of shared memory.
        self._ways = {
            f"vector loads, {blocks} blocks per SM": (
                self._function(module, "read_vectors"),
                processors * blocks,
                256,
                0,
            )
            for blocks in (4, 8)
        }
        if major >= 9:
            for flight in (3, 8):
                function = self._function(module, f"read_bulk_{flight}")
                self._cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, _RING_BYTES)
                self._ways[f"bulk copies, {flight} under way"] = (function, processors, 32, _RING_BYTES)
        self._cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        self._samples: dict[str, list[float]] = {name: [] for name in self._ways}

    def __call__(self) -> None:
        """Reads the array once in every way."""
        self._cuda.cuCtxPushCurrent_v2(self._context)
        for name, way in self._ways.items():
            self._samples[name].append(self._launch(*way))
        self._cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    @property
    def rates(self) -> dict[str, float]:
        return {name: self.nbytes / statistics.median(found) for name, found in self._samples.items()}

    def _launch(self, function: ctypes.c_void_p, blocks: int, threads: int, shared: int) -> float:
        """Runs one kernel over the array; returns seconds."""
        arguments = (self._data, ctypes.c_ulonglong(self.nbytes), self._out)
        pointers = (ctypes.c_void_p * 3)(*(ctypes.addressof(a) for a in arguments))
        self._cuda.cuEventRecord(self._start, None)
        self._cuda.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, None, pointers, None)
        self._cuda.cuEventRecord(self._end, None)
        self._cuda.cuEventSynchronize(self._end)
        milliseconds = ctypes.c_float()
        self._cuda.cuEventElapsedTime(ctypes.byref(milliseconds), self._start, self._end)
        return milliseconds.value / 1e3

    def _attribute(self, device: ctypes.c_int, which: int) -> int:
        value = ctypes.c_int()
        self._cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    def _allocate(self, nbytes: int) -> ctypes.c_uint64:
        pointer = ctypes.c_uint64()
        self._cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        return pointer

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._cuda.cuEventCreate(ctypes.byref(event), 0)
        return event

    def _function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        return function


class _Library:
    """A C library whose functions return 0 or an error."""

    def __init__(self, name: str) -> None:
        self._library = ctypes.CDLL(name)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> None:
            if error := function(*arguments):
                raise RuntimeError(f"{name}: error {error}")

        return call


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
