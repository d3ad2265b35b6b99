"""The generated CUDA of small functions: as it was, and what the compiler makes of it.

After a change that is meant, ``python -m tests.codegen.golden`` writes the files anew; their diff is what is reviewed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jax_mpk.codegen.cuda import generate
from jax_mpk.codegen.cuda.code import WARPS
from jax_mpk.runtime import nvrtc
from tests.codegen.cuda_cases import COPIES, CORES, MATRICES, RING, TRANSPOSED
from tests.codegen.golden import functions
from tests.codegen.golden.text import path, plan, program, text
from tests.codegen.sass import missing

NAMES = sorted(functions.SAMPLES)
#: What each sample is there to show.
SHOWS = {
    "streamed": ("stream_rows<bf16, bf16, 1, 1024>", "copy_async<16>", "stage(", ".put(", "dot<8>"),
    "matmul": ("factor<bf16, 16, 1024, kScratch>", "kPassing>(", "Packed<bf16, 8>"),
    "columns": ("stream_columns<bf16, 64, 1, 128, true>", "kTiles = 2,", ".put(", "stage("),
    "attention": (
        *("// new rows", "dot<8>", "reduce_packs<8", "update_each(", "op_exp("),
        *("copy_aside<3, 8, 144, 512>(", "copies_wait();"),
    ),
    "loop": ("role.running()", "role.template decide<s32>", "role.barrier();", "update_each(", "Accumulators<"),
}
#: The instructions that each sample is compiled to.
CLAIMS = {
    "streamed": (*RING, *CORES["bfloat16"], *MATRICES, *COPIES),
    "matmul": (*RING, *CORES["bfloat16"]),
    "attention": (*RING, *COPIES, "LDGDEPBAR"),
    "loop": COPIES,
    "columns": (*TRANSPOSED, *CORES["bfloat16"]),
}


@pytest.mark.parametrize("name", NAMES)
def test_text(name: str) -> None:
    assert text(name) == path(name).read_text(encoding="utf-8"), "meant? then: python -m tests.codegen.golden"


@pytest.mark.parametrize("name", NAMES)
def test_twice_the_same(name: str) -> None:
    again = generate(plan.__wrapped__(name))
    assert again == program(name)
    assert str(again) == str(program(name))


@pytest.mark.parametrize("name", NAMES)
def test_shows(name: str) -> None:
    for part in SHOWS[name]:
        assert part in text(name), part


@pytest.mark.parametrize("name", NAMES)
def test_names_the_source(name: str) -> None:
    """Every operator's comment ends with a file's name and a line of the function, and no path gets in."""
    code = functions.SAMPLES[name].function.__code__
    lines = {line for *_, line in code.co_lines() if line is not None} | set(inner_lines(code))
    mentioned = re.findall(r"functions\.py:(\d+)", text(name))
    assert mentioned and {int(n) for n in mentioned} <= lines
    assert "/" not in "".join(re.findall(r"//(.*)$", text(name), re.MULTILINE))


def inner_lines(code) -> set[int]:
    inner = [c for c in code.co_consts if hasattr(c, "co_lines")]
    found = {line for c in inner for *_, line in c.co_lines() if line is not None}
    return found.union(*(inner_lines(c) for c in inner))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_spills(name: str, tmp_path: Path) -> None:
    made = program(name)
    compiled = nvrtc.compile_source(text(name), made.arch)
    used = compiled.resources
    assert compiled.cubin.startswith(b"\x7fELF") and f".text.{made.entry}".encode() in compiled.cubin
    assert used.spill_bytes == 0
    assert used.stack_bytes == 0  # waits keep nothing in memory
    assert used.registers * made.threads <= 64 << 10  # of an SM
    assert made.threads in (WARPS * 32, WARPS * 32 + 32)
    assert "warning" not in compiled.log
    assert missing(compiled.cubin, (*CLAIMS[name], "HGMMA."), tmp_path) == ["HGMMA."]  # which nothing uses


def test_every_file_has_its_sample() -> None:
    assert {p.stem for p in path("x").parent.glob("*.cu")} == set(NAMES) == set(SHOWS) == set(CLAIMS)
