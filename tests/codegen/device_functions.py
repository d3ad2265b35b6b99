"""The scalar operations of csrc/device as functions of arrays, compiled for the CPU or to a cubin.

One C++ function stands for one operation and type: ``add_f32(out, x, y, z, n)`` applies ``op_add`` to n elements. The
same text is a kernel for NVRTC and a loop for the host's compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_mpk import _native
from jax_mpk.graph import dtypes
from jax_mpk.graph.scalar import COMPARE, TERNARY, UNARY

Array = np.ndarray[Any, Any]

DEVICE = Path(__file__).resolve().parents[2] / "csrc" / "device"
#: (exponent bits, mantissa bits) that reduce_precision is tried with.
PRECISIONS = ((8, 7), (5, 10), (5, 2), (4, 3), (8, 23), (11, 52), (1, 0), (2, 10))

PRELUDE = """
#include "scalar.cuh"
using namespace mpk;
#ifdef __CUDACC__
#define FUNCTION extern "C" __global__ void
#define EACH const s64 i = s64(blockIdx.x) * blockDim.x + threadIdx.x; if (i < n)
#else
#define FUNCTION extern "C" void
#define EACH for (s64 i = 0; i < n; ++i)
#endif
#define UNARY(name, out, A, result) \\
  FUNCTION name(out* o, const A* a, const void*, const void*, s64 n) { EACH { const A x = a[i]; o[i] = result; } }
#define BINARY(name, out, A, B, result) \\
  FUNCTION name(out* o, const A* a, const B* b, const void*, s64 n) { \\
    EACH { const A x = a[i]; const B y = b[i]; o[i] = result; } \\
  }
#define TERNARY(name, out, A, B, C, result) \\
  FUNCTION name(out* o, const A* a, const B* b, const C* c, s64 n) { \\
    EACH { const A x = a[i]; const B y = b[i]; const C z = c[i]; o[i] = result; } \\
  }
"""


@dataclass(frozen=True)
class Function:
    """One operation for one type.

    Attributes:
      name: the symbol.
      op: name of the operation.
      args: element types of the arguments.
      result: element type of the result.
      call: the operation of x, y and z, as C++.
      attr: as in graph/scalar.py; how far for rotate_left.
    """

    name: str
    op: str
    args: tuple[str, ...]
    result: str
    call: str
    attr: Any = None

    def definition(self) -> str:
        macro = ("UNARY", "BINARY", "TERNARY")[len(self.args) - 1]
        return f"{macro}({', '.join([self.name, self.result, *self.args])}, ({self.call}))\n"


def functions() -> Iterator[Function]:
    """Every operation for every type it exists for."""
    for name in sorted(_native.opcodes()):
        op, dtype = name.split(".")
        symbol = f"{op}_{dtype}"
        if op == "reduce_precision":
            for e, m in PRECISIONS:
                call = f"op_reduce_precision<{e}, {m}>(x)"
                yield Function(f"{symbol}_{e}_{m}", op, (dtype,), dtype, call, (e, m))
        elif op == "rotate_left":
            for left in (1, 13, dtypes.itemsize(dtype) * 8 - 1):
                yield Function(f"{symbol}_{left}", op, (dtype,), dtype, f"op_rotate_left<{left}>(x)", left)
        elif op == "select":
            yield Function(symbol, op, ("b1", dtype, dtype), dtype, "op_select(x, y, z)")
        else:
            arity = 1 if op in UNARY | {"move"} else 3 if op in TERNARY else 2
            result = "b1" if op in COMPARE or op == "is_finite" else dtype
            yield Function(symbol, op, (dtype,) * arity, result, f"op_{op}({', '.join('xyz'[:arity])})")
    for source in dtypes.ALL:
        for target in dtypes.ALL:
            if source != target:
                yield Function(f"convert_{source}_{target}", "convert", (source,), target, f"convert<{target}>(x)")
                if dtypes.itemsize(source) == dtypes.itemsize(target) and "b1" not in (source, target):
                    yield Function(f"bitcast_{source}_{target}", "bitcast", (source,), target, f"bitcast<{target}>(x)")


FUNCTIONS = tuple(functions())


def source(chosen: Sequence[Function] = FUNCTIONS) -> str:
    return PRELUDE + "".join(f.definition() for f in chosen)


def host_library(folder: Path) -> ctypes.CDLL:
    """All functions, compiled for the CPU: without contraction, which the machine at hand might offer."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or pytest.skip("needs a C++ compiler")
    text, library = folder / "functions.cc", folder / "functions.so"
    text.write_text(source())
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{DEVICE}"]
    subprocess.run([compiler, *flags, str(text), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run_on_host(library: ctypes.CDLL, function: Function, args: Sequence[Array]) -> Array:
    out = np.empty(args[0].shape, dtypes.to_numpy(function.result))
    pointers = [a.ctypes.data for a in (out, *args)] + [None] * (3 - len(args))
    getattr(library, function.name)(*map(ctypes.c_void_p, pointers), ctypes.c_longlong(out.size))
    return out


def cubin(text: str, arch: str = "sm_90a") -> bytes:
    """Compiles for a GPU, with warnings as errors; skips where there is no NVRTC."""
    lib = _nvrtc()
    program = ctypes.c_void_p()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"functions.cu", 0, None, None) == 0
    try:
        options = [f"--gpu-architecture={arch}", "-std=c++17", f"-I{DEVICE}"]
        failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * 3)(*map(str.encode, options)))
        log = _read(program, lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog).rstrip(b"\0\n").decode()
        assert not failed and not log, log
        return _read(program, lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, size: Any, get: Any) -> bytes:
    count = ctypes.c_size_t()
    assert size(program, ctypes.byref(count)) == 0
    text = ctypes.create_string_buffer(count.value)
    assert get(program, text) == 0
    return text.raw


def _nvrtc() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        for library in sorted(folder.glob("*/lib/libnvrtc.so.*")):
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):  # NVRTC does not look beside itself
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(library))
    pytest.skip("needs NVRTC")
