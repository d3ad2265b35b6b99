"""The CUDA driver by ctypes: what benchmarks need to run and time kernels of their own beside JAX's."""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

# CUdevice_attribute and CUfunction_attribute.
PROCESSORS, _MAJOR, _MINOR = 16, 75, 76
_MAX_DYNAMIC_SHARED = 8


class Gpu:
    """One GPU, by its primary context, which JAX uses too.

    Args:
        ordinal: which one.

    Raises:
        OSError: there is no driver.
        RuntimeError: the driver reports an error, here as in every method.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._cuda = _Library("libcuda.so.1")
        self._cuda.cuInit(0)
        self._device = ctypes.c_int()
        self._cuda.cuDeviceGet(ctypes.byref(self._device), ordinal)
        self._context = ctypes.c_void_p()
        self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), self._device)
        with self.current():
            self._start, self._end = self._event(), self._event()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """All that touches memory or kernels happens within."""
        self._cuda.cuCtxPushCurrent_v2(self._context)
        try:
            yield
        finally:
            self._cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def attribute(self, which: int) -> int:
        """A CUdevice_attribute."""
        value = ctypes.c_int()
        self._cuda.cuDeviceGetAttribute(ctypes.byref(value), which, self._device)
        return value.value

    @property
    def name(self) -> str:
        """Such as "NVIDIA H100 80GB HBM3"."""
        text = ctypes.create_string_buffer(256)
        self._cuda.cuDeviceGetName(text, len(text), self._device)
        return text.value.decode()

    @property
    def architecture(self) -> str:
        """Such as "sm_90a": the features of one architecture only, such as bulk copies, go by a name with an "a"."""
        major, minor = self.attribute(_MAJOR), self.attribute(_MINOR)
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")

    def module(self, image: bytes) -> ctypes.c_void_p:
        """Loads machine code."""
        module = ctypes.c_void_p()
        self._cuda.cuModuleLoadData(ctypes.byref(module), image)
        return module

    def function(self, module: ctypes.c_void_p, name: str, shared: int = 0) -> ctypes.c_void_p:
        """A kernel, which may use so many bytes of dynamic shared memory."""
        function = ctypes.c_void_p()
        self._cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        if shared:
            self._cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared)
        return function

    def allocate(self, nbytes: int) -> ctypes.c_uint64:
        """Device memory."""
        pointer = ctypes.c_uint64()
        self._cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1)))
        return pointer

    def zero(self, pointer: ctypes.c_uint64, nbytes: int) -> None:
        """Writes zeros."""
        self._cuda.cuMemsetD8_v2(pointer, ctypes.c_ubyte(0), ctypes.c_size_t(nbytes))

    def free(self, *pointers: ctypes.c_uint64) -> None:
        """Gives memory back."""
        for pointer in pointers:
            self._cuda.cuMemFree_v2(pointer)

    def upload(self, to: ctypes.c_uint64, data: bytes) -> None:
        """Copies to the device."""
        self._cuda.cuMemcpyHtoD_v2(to, data, ctypes.c_size_t(len(data)))

    def repeat(self, to: ctypes.c_uint64, nbytes: int, block: ctypes.c_uint64, size: int) -> None:
        """Fills memory with copies of a block of device memory."""
        for offset in range(0, nbytes, size):
            count = ctypes.c_size_t(min(size, nbytes - offset))
            self._cuda.cuMemcpyDtoD_v2(ctypes.c_uint64(to.value + offset), block, count)

    def download(self, start: ctypes.c_uint64, nbytes: int, offset: int = 0) -> bytes:
        """Copies from the device."""
        data = ctypes.create_string_buffer(nbytes)
        self._cuda.cuMemcpyDtoH_v2(data, ctypes.c_uint64(start.value + offset), ctypes.c_size_t(nbytes))
        return data.raw

    def launch(
        self,
        function: ctypes.c_void_p,
        grid: tuple[int, int, int],
        arguments: Sequence[Any],
        *,
        cooperative: bool = False,
        times: int = 1,
    ) -> float:
        """Runs a kernel.

        Args:
            function: the kernel.
            grid: blocks, threads of each, and bytes of its dynamic shared memory.
            arguments: ctypes values.
            cooperative: all blocks must run at a time.
            times: launches, one behind the other.

        Returns:
            The seconds that one launch took.
        """
        blocks, threads, shared = grid
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        launch = [function, blocks, 1, 1, threads, 1, 1, shared, None, pointers]
        self._cuda.cuEventRecord(self._start, None)
        for _ in range(times):
            if cooperative:
                self._cuda.cuLaunchCooperativeKernel(*launch)
            else:
                self._cuda.cuLaunchKernel(*launch, None)
        self._cuda.cuEventRecord(self._end, None)
        self._cuda.cuEventSynchronize(self._end)
        milliseconds = ctypes.c_float()
        self._cuda.cuEventElapsedTime(ctypes.byref(milliseconds), self._start, self._end)
        return milliseconds.value / 1e3 / times

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._cuda.cuEventCreate(ctypes.byref(event), 0)
        return event


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
