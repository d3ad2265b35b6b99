"""What a loop's kernel has in common with that of its body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from jax import lax

from jax_mpk.codegen.cuda import generate
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.runtime import nvrtc
from tests.codegen.cuda.support import planned
from tests.codegen.golden.functions import SAMPLES
from tests.codegen.sass import instructions, loops_around

STEP = SAMPLES["streamed"]


def rounds(x: jax.Array, *others: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 8, lambda _, x: STEP.function(x, *others), x)


@pytest.fixture(scope="module")
def programs() -> tuple[CudaProgram, CudaProgram]:
    """Of a step in a call, and of steps in a loop."""
    call, loop = (generate(planned(function, *STEP.avals)) for function in (STEP.function, rounds))
    return call, loop


def test_the_ring_is_the_same(programs: tuple[CudaProgram, CudaProgram]) -> None:
    def ring(program: CudaProgram) -> list[str]:
        names = ("kStages", "kReaders", "kFlight", "kStageBytes", "kTiles")
        return [line for line in program.source.splitlines() if line.strip().startswith(names)]

    call, loop = map(ring, programs)
    assert len(call) == 5 and call == loop


def test_the_code_of_a_step_is_the_same(programs: tuple[CudaProgram, CudaProgram], tmp_path: Path) -> None:
    """Segments share their code without a call: a call keeps what is known of the launch, and addresses, from it.

    The producer sends a chunk about as often as memory delivers one, so that a few cycles more for each are lost.
    """
    call, loop = (nvrtc.compile_source(program.source, program.arch) for program in programs)
    assert loop.resources.stack_bytes == loop.resources.spill_bytes == 0
    found = [instructions(made.cubin, tmp_path) for made in (call, loop)]
    generic = [sum(n for name, n in one.items() if name.startswith(("LD.", "ST."))) for one in found]
    assert generic[0] == generic[1]

    def read_by_chunk(made: nvrtc.Compiled) -> list[Any]:
        chunk, *_ = loops_around(made.cubin, "UBLKCP.", tmp_path)
        assert "ELECT" not in chunk  # as in a loop over lanes that may have something to load
        assert sum(name.startswith("UBLKCP.") for name in chunk) == 2  # all that there are: two chunks at a time
        return sorted(name for name in chunk if name.startswith(("S2", "LD", "ST", "UBLKCP")))

    assert read_by_chunk(call) == read_by_chunk(loop)
