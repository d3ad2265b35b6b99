"""Kernels packed for a GPU, and what is made of their traces; the GPU itself is a stand-in."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from benchmarks import kernel
from benchmarks.shapes import SHAPES


class Memory:
    """What a Gpu has, in host memory; a launch keeps its parameters."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.launched: list[tuple[Any, ...]] = []

    def module(self, image: bytes) -> bytes:
        assert image.startswith(b"\x7fELF")
        return image

    def function(self, module: bytes, name: str, shared: int) -> str:
        assert name.encode() in module and shared > 0
        return name

    def allocate(self, nbytes: int) -> ctypes.c_uint64:
        block = (ctypes.c_ubyte * max(nbytes, 1))()
        address = ctypes.addressof(block)
        self.blocks[address] = block
        return ctypes.c_uint64(address)

    def free(self, *pointers: ctypes.c_uint64) -> None:
        for pointer in pointers:
            del self.blocks[pointer.value]

    def zero(self, pointer: ctypes.c_uint64, nbytes: int) -> None:
        ctypes.memset(pointer.value, 0, nbytes)

    def upload(self, to: ctypes.c_uint64, data: bytes) -> None:
        assert len(data) <= len(self.blocks[to.value])
        ctypes.memmove(to.value, data, len(data))

    def repeat(self, to: ctypes.c_uint64, nbytes: int, block: ctypes.c_uint64, size: int) -> None:
        assert nbytes <= min(size, len(self.blocks[to.value]))
        ctypes.memmove(to.value, block.value, nbytes)

    def download(self, start: ctypes.c_uint64, nbytes: int, offset: int = 0) -> bytes:
        return bytes(self.blocks[start.value])[offset : offset + nbytes]

    def launch(self, function: str, grid: tuple[int, int, int], arguments: list[Any], **how: Any) -> float:
        self.launched.append((function, grid, list(arguments[0]), how))
        return 1e-3


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return kernel.pack("tiny", 1, 64, 32, "h200-sxm", "now", tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("traced", [False, True])
def test_launches_as_the_program_says(packed: Any, traced: bool) -> None:
    gpu = Memory()
    loaded = kernel.Loaded(gpu, packed, traced=traced)
    about = loaded.kernel
    assert packed.name == "tiny-1-now.npz" and about.name == "tiny-1-now"
    loaded.run(2)
    ((entry, grid, words, how),) = gpu.launched
    assert (entry, grid, how) == (about.entry, about.grid(), {"cooperative": True, "times": 2})
    tables, state, _, deadline, *buffers = words
    assert len(gpu.blocks[state]) == about.state_bytes + (about.trace_bytes if traced else 0)
    assert any(gpu.blocks[tables]) and not any(gpu.blocks[state]) and deadline > 0
    arguments, results = buffers[: len(about.arguments)], buffers[len(about.arguments) :]
    assert [len(gpu.blocks[a]) for a in arguments] == [nbytes for nbytes, _ in about.arguments]
    # Caches are taken over; the token and the position that follow are results of their own, then the workspace.
    taken = [r for r, address in zip(about.results, results) if address in arguments]
    leaves = 2 * SHAPES["tiny"].num_layers
    assert len(taken) == leaves == sum(size < 0 for size in about.results)
    assert len(results) == len(about.results) + (about.workspace > 0)
    loaded.free()
    assert not gpu.blocks


def test_a_launch_that_gave_up_is_an_error(packed: Any) -> None:
    gpu = Memory()
    loaded = kernel.Loaded(gpu, packed)
    record = list(loaded._launch)[2]
    gpu.blocks[record][0] = 1
    with pytest.raises(RuntimeError, match="tiny-1-now gave up"):
        loaded.run()


def test_steps_of_a_loop_beside_a_step(packed: Any) -> None:
    looped = kernel.pack("tiny", 1, 64, 32, "h200-sxm", "loop", packed.parent, loop=8)
    gpu = Memory()
    about = kernel.Loaded(gpu, looped).kernel
    assert (about.name, about.steps, about.position) == ("tiny-1-loop", 8, 28)
    gpu.launched.clear()
    call, loop = kernel.compare(gpu, [packed, looped], 1, 20)
    # A launch takes a millisecond, whatever it is of.
    assert call["us"] == pytest.approx(1000) and loop["us"] == pytest.approx(125)
    assert {how["times"] for *_, how in gpu.launched} == {20, 3}


def test_trace_by_routine() -> None:
    labels = [(0, "first"), (2, "second"), (4, "first")]
    about = kernel.Kernel("n", "e", 2, 32, 1, 0, 0, [], [], 0, labels, 0, 1.0)
    # Of two workers, three tasks each; the last ones wait for nothing.
    one = [[0, 1, 4], [0, 2, 3], [4, 6, 7], [3, 5, 9], [7, 0, 9], [9, 0, 10]]
    first, second = kernel.summarize(about, np.array([one, one], float))
    assert (first["routine"], first["times"], second["routine"], second["times"]) == ("first", 2, "second", 1)
    assert second["waits_us"] == 2 and second["works_us"] == 2.5 and second["longest_us"] == 4
    assert second["ready_spread_us"] == 1 and second["last_ready_to_done_us"] == 3
    assert first["waits_us"] == pytest.approx((1.5 + 0) / 2) and first["works_us"] == pytest.approx((2 + 1.5) / 2)
