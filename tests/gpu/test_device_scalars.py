"""Every scalar operation on a GPU against ``jax.jit`` there: as a kernel of its own and as a program of one op."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import scipy.special
from jax import lax

import jax_mpk
from jax_mpk.graph import dtypes, semantics
from jax_mpk.graph.scalar import Node
from tests.codegen.device_functions import FUNCTIONS, Array, Function, cubin, source
from tests.codegen.test_device_scalars import BITWISE, arguments, bits_of
from tests.codegen.test_scalar_ops import ELSEWHERE
from tests.test_edge_values import distance

pytestmark = pytest.mark.gpu

#: Names in jax.lax, where they differ from the operation's.
LAX = {
    "and": "bitwise_and",
    "not": "bitwise_not",
    "or": "bitwise_or",
    "popcount": "population_count",
    "shl": "shift_left",
    "shr_arith": "shift_right_arithmetic",
    "shr_logical": "shift_right_logical",
    "xor": "bitwise_xor",
}
#: Allowed distance from ``jax.jit``, or from the definition, for f32 and for f64.
ULPS = {
    "rsqrt": (2, 2),
    "cbrt": (2, 4),
    "exp": (2, 2),
    "exp2": (2, 4),
    "expm1": (4, 4),
    "log": (2, 2),
    "log1p": (4, 4),
    "sin": (2, 2),
    "cos": (2, 2),
    "tan": (4, 4),
    "asin": (4, 4),
    "acos": (4, 4),
    "atan": (2, 2),
    "sinh": (4, 4),
    "cosh": (4, 4),
    "tanh": (4, 4),
    "asinh": (4, 4),
    "acosh": (4, 4),
    "atanh": (4, 4),
    "logistic": (4, 4),
    "erf": (4, 4),
    "erfc": (8, 8),
    "erf_inv": (8, 8),
    "lgamma": (16, 16),
    "digamma": (16, 32),
    "bessel_i0e": (8, 8),
    "bessel_i1e": (8, 8),
    "log2": (4, 4),
    "atan2": (4, 4),
    "pow": (4, 4),
}
FAR = (64, 1 << 20)
#: Of finite arguments, those of ``semantics`` are some 15 units in the last place of f64 off in their tails.
CLOSER = {"erfc": np.vectorize(math.erfc), "erf_inv": scipy.special.erfinv}
ROUNDED = ("div", "sqrt")
OPS = sorted({f.op for f in FUNCTIONS} - {"move", "rotate_left"})


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Kernels:
    """The functions of the device headers, loaded with the driver's interface into JAX's own context."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        device, context, self.module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        major, minor = (ctypes.c_int() for _ in range(2))
        self.call("cuDeviceGetAttribute", ctypes.byref(major), 75, device)
        self.call("cuDeviceGetAttribute", ctypes.byref(minor), 76, device)
        version = 10 * major.value + minor.value
        image = cubin(source(), f"sm_{version}{'a' if version >= 90 else ''}")
        self.call("cuModuleLoadData", ctypes.byref(self.module), image)

    def call(self, name: str, *args: Any) -> None:
        code = getattr(self.driver, name)(*args)
        assert code == 0, f"{name}: CUDA error {code}"

    def run(self, function: Function, args: list[Array]) -> Array:
        out = np.empty(args[0].shape, dtypes.to_numpy(function.result))
        kernel = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(kernel), self.module, function.name.encode())
        buffers = [ctypes.c_uint64(0) for _ in range(4)]
        for buffer, array in zip(buffers, [out, *args], strict=False):
            self.call("cuMemAlloc_v2", ctypes.byref(buffer), ctypes.c_size_t(array.nbytes))
            self.call("cuMemcpyHtoD_v2", buffer, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        values = [*buffers, ctypes.c_longlong(out.size)]
        pointers = (ctypes.c_void_p * 5)(*[ctypes.addressof(v) for v in values])
        blocks = -(-out.size // 256)
        self.call("cuLaunchKernel", kernel, blocks, 1, 1, 256, 1, 1, 0, None, pointers, None)
        self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(out.ctypes.data), buffers[0], ctypes.c_size_t(out.nbytes))
        for buffer in buffers[: len(args) + 1]:
            self.call("cuMemFree_v2", buffer)
        return out


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    jax.devices("cuda")
    return Kernels()


def program(function: Function) -> Callable[..., Any]:
    """The operation as a function of JAX arrays."""
    result = dtypes.to_numpy(function.result)
    if function.op == "convert":
        return lambda x: lax.convert_element_type(x, result)
    if function.op == "bitcast":
        return lambda x: lax.bitcast_convert_type(x, result)
    if function.op == "reduce_precision":
        return lambda x: lax.reduce_precision(x, *function.attr)
    if function.op in ("round_even", "round_away"):
        method = {"round_even": lax.RoundingMethod.TO_NEAREST_EVEN, "round_away": lax.RoundingMethod.AWAY_FROM_ZERO}
        return lambda x: lax.round(x, method[function.op])
    if function.op == "abs" and function.result.startswith("u"):
        return lambda x: x
    return getattr(lax, LAX.get(function.op, function.op))


def fault(function: Function, args: list[Array], got: Array, want: Array) -> str | None:
    """What is wrong with a result, or None: results that are rounded once have the bits of ``jax.jit``.

    Not those of divisions and roots: XLA rounds them less than correctly on a GPU, so the right bits are right too.
    """
    wrong = bits_of(got) != bits_of(want)
    if function.op in ROUNDED and wrong.any():
        wrong &= bits_of(got) != bits_of(accurate(function, args))
    elif function.op not in BITWISE and wrong.any():
        kind = function.result
        limit = ULPS.get(function.op, FAR)[kind == "f64"]
        exact = accurate(function, args)
        wrong &= (distance(got, want) > limit) & (distance(got, exact) > limit)
    if not wrong.any():
        return None
    at = int(np.flatnonzero(wrong)[0])
    return (
        f"{function.name}: {int(wrong.sum())} of {wrong.size} wrong, the first for {[a[at] for a in args]}: "
        f"got {got[at]!r}, jax.jit has {want[at]!r}"
    )


def accurate(function: Function, args: list[Array]) -> Array:
    """The operation in f64 by NumPy and SciPy, or what is closer than these, rounded once."""
    if function.op in CLOSER:
        return CLOSER[function.op](args[0].astype(np.float64)).astype(dtypes.to_numpy(function.result))
    node = Node(function.op, tuple(range(len(args))), "f64", function.attr)
    with np.errstate(all="ignore"):
        return semantics.apply(node, [a.astype(np.float64) for a in args]).astype(dtypes.to_numpy(function.result))


def cases(op: str) -> Iterator[tuple[Function, list[Array], Array]]:
    for function in FUNCTIONS:
        if function.op == op:
            args = arguments(function)
            yield function, args, np.asarray(jax.jit(program(function))(*args))


@pytest.mark.parametrize("op", OPS)
def test_kernel(op: str, kernels: Kernels) -> None:
    faults = [fault(function, args, kernels.run(function, args), want) for function, args, want in cases(op)]
    faults = [f for f in faults if f]
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.parametrize("op", sorted(set(OPS) - ELSEWHERE))
def test_program_of_one_operation(op: str) -> None:
    faults = []
    for function, args, want in cases(op):
        got = np.asarray(jax_mpk.megakernelize(program(function))(*args))
        faults.append(fault(function, args, got, want))
    faults = [f for f in faults if f]
    assert not faults, "\n".join(map(str, faults))
