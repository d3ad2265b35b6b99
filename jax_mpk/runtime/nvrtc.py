"""CUDA C++ to a cubin: NVRTC from its wheel or from the system, else nvcc from the PATH. No GPU is needed."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_mpk.errors import CompileError, CompilerNotFoundError

#: Options of every compilation beside the architecture and the headers: C++17, ptxas says what a kernel uses, and a
#: variable that is read before it has a value is an error.
OPTIONS = ("-std=c++17", "--ptxas-options=-v", "--diag-error=549")
#: Majors whose NVRTC knows sm_90a, newest first.
_MAJORS = (13, 12)


@dataclass(frozen=True)
class Resources:
    """What ptxas says a kernel uses.

    Attributes:
      registers: of a thread, the most of all functions.
      spill_bytes: written to and read from memory for want of registers, per thread, all functions together.
      stack_bytes: of a thread.
      shared_bytes: static shared memory.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
      cubin: the machine code, an ELF file.
      log: what the compiler said: warnings, and ptxas's account.
    """

    cubin: bytes
    log: str

    @property
    def resources(self) -> Resources:
        """What the kernel uses, as the log says."""
        return parse_resources(self.log)


@dataclass(frozen=True)
class Compiler:
    """A compiler that was found.

    Attributes:
      version: its name and version, such as "NVRTC 13.0".
      run: from the source, its name in messages, and options to a cubin (None: refused) and a log.
    """

    version: str
    run: Callable[[str, str, Sequence[str]], tuple[bytes | None, str]]


def device_headers() -> Path:
    """The folder of the headers that kernels include."""
    package = Path(__file__).resolve().parents[1]
    # A wheel has them in the package; a checkout beside it.
    for folder in (package / "csrc" / "device", package.parent / "csrc" / "device"):
        if folder.is_dir():
            return folder
    raise CompilerNotFoundError(f"the device headers of jax_mpk are missing from {package}; reinstall jax_mpk")


def options(arch: str) -> tuple[str, ...]:
    """What a compilation depends on besides source, headers and compiler."""
    return (f"--gpu-architecture={arch}", *OPTIONS)


def compile_source(source: str, arch: str, *, name: str = "kernel.cu") -> Compiled:
    """Compiles CUDA C++ to a cubin.

    Args:
      source: the text; it finds the device headers.
      arch: such as "sm_90a".
      name: of the source in messages.

    Raises:
      CompileError: the compiler refused it; has the log.
      CompilerNotFoundError: there is no compiler.
    """
    compiler = find()
    cubin, log = compiler.run(source, name, (*options(arch), f"-I{device_headers()}"))
    if cubin is None:
        raise CompileError(f"{compiler.version} refused a kernel for {arch}:\n{log}", log=log)
    return Compiled(cubin, log)


def parse_resources(log: str) -> Resources:
    """What ptxas's account of a kernel and of the functions it calls says in all."""

    def numbers(pattern: str) -> list[int]:
        return [int(n) for n in re.findall(pattern, log)]

    return Resources(
        registers=max(numbers(r"Used (\d+) registers"), default=0),
        spill_bytes=sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
        stack_bytes=max(numbers(r"(\d+) bytes (?:cumulative stack size|stack frame)"), default=0),
        shared_bytes=max(numbers(r"(\d+) bytes smem"), default=0),
    )


@functools.cache
def find() -> Compiler:
    """The compiler of this process.

    Raises:
      CompilerNotFoundError: there is none.
    """
    faults = []
    for library in _libraries():
        try:
            return _nvrtc(library)
        except (OSError, AttributeError) as error:
            faults.append(str(error))
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        return _nvcc(nvcc)
    tried = "".join(f"\n  {fault}" for fault in faults)
    raise CompilerNotFoundError(
        "Kernels for GPUs are compiled on this machine, and it has no CUDA compiler: neither NVRTC nor nvcc. "
        f'Install it with `pip install "jax_mpk[cuda13]"`.{tried}'
    )


# --- NVRTC -------------------------------------------------------------------------------------------------------


def _libraries() -> Iterator[str]:
    """Where NVRTC may be: in its wheels, newest first, then wherever the loader finds it."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    for major in _MAJORS:
        for folder in (f"cu{major}/lib", "cuda_nvrtc/lib"):
            for root in roots:
                yield from map(str, sorted((root / folder).glob(f"libnvrtc.so.{major}")))
        yield f"libnvrtc.so.{major}"


def _nvrtc(path: str) -> Compiler:
    # NVRTC opens its builtins by bare name, which the loader knows only if they are loaded already.
    for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if "/" in path else ():
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(path)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return Compiler(f"NVRTC {major.value}.{minor.value}", functools.partial(_run_nvrtc, library))


def _run_nvrtc(library: Any, source: str, name: str, options: Sequence[str]) -> tuple[bytes | None, str]:
    program = ctypes.c_void_p()
    made = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    if made != 0:
        return None, library.nvrtcGetErrorString(made).decode()
    try:
        arguments = [option.encode() for option in options]
        result = library.nvrtcCompileProgram(program, len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
        text = _fetch(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).rstrip(b"\0")
        log = text.decode(errors="replace")
        if result != 0:
            return None, log or library.nvrtcGetErrorString(result).decode()
        return _fetch(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(get_size: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    get_size(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


# --- nvcc --------------------------------------------------------------------------------------------------------


def _nvcc(path: str) -> Compiler:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release [\d.]+, (V[\d.]+)", text)
    return Compiler(f"nvcc {release[1] if release else 'of unknown version'}", functools.partial(_run_nvcc, path))


def _run_nvcc(path: str, source: str, name: str, options: Sequence[str]) -> tuple[bytes | None, str]:
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder, name), Path(folder, "out.cubin")
        text.write_text(source, encoding="utf-8")
        command = [path, "-cubin", *options, "-o", str(cubin), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return cubin.read_bytes() if done.returncode == 0 else None, done.stdout + done.stderr
