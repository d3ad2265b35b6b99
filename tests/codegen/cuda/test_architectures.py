"""Every kind of task compiles for every architecture that there is code for; what does not is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jax_mpk import TargetError
from jax_mpk.codegen.cuda import generate
from jax_mpk.codegen.cuda.architectures import ARCHITECTURES, STREAMING
from jax_mpk.plan.ir import Plan
from jax_mpk.runtime import nvrtc
from tests.codegen.cuda_cases import CASES, named
from tests.codegen.test_cuda_compiles import plan_of

pytestmark = pytest.mark.usefixtures("x64")

#: A case of each kind of task, as the device headers have them, and of each way to hand something over.
KINDS = (
    "casts",
    "gather",
    "reduce_0",
    "reduce_together",
    "reduce_generic",
    "contract_int",
    "update_slice",
    "scatter_add",
    "scan_lines",
    "scan_together",
    "sort_many",
    "sort_keys",
    "sort_large",
    "while_3",
    "switch_1_1",
    "contract_f64",
    "attention_direct_9",
)
#: And those whose weights stream.
STREAMED = (
    "streamed_bfloat16_3",
    "streamed_parts",
    "attention",
    "streamed_loop",
    "matmul_float16_16",
    "matmul_large",
    "columns_and_tiles",
)


def planned_for(arch: str, name: str) -> Plan:
    plan, _ = plan_of(named(name).fn, named(name).arguments(), arch=arch, name=f"some-{arch}")
    return plan


@pytest.mark.parametrize("name", (*KINDS, *STREAMED))
@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "sm_90a"])
def test_compiles(arch: str, name: str) -> None:
    plan = planned_for(arch, name)
    if name in STREAMED and arch not in STREAMING:
        line = r"cuda_cases\.py:\d+ "
        with pytest.raises(TargetError, match=rf"{arch} \(some-{arch}\) has no code for contractions.*: {line}"):
            generate(plan)
        return
    program = generate(plan)
    assert program.arch == arch
    assert nvrtc.compile_source(program.source, arch).resources.spill_bytes == 0


def test_every_template_is_among_the_kinds() -> None:
    """Whatever text the cases ask for somewhere, the kinds above ask for too."""

    def texts(names: Any) -> set[str]:
        return {t.split("<")[0].removeprefix("Spread::") for name in names for t in named(name).text}

    assert texts(c.name for c in CASES) - texts((*KINDS, *STREAMED)) <= {"map(", "at.rounds[0]", "reduce_together"}


@pytest.mark.parametrize("arch", ["sm_75", "sm_89", "sm_120a"])
def test_others_are_refused(arch: str) -> None:
    plan = planned_for("sm_90a", "map")
    target = dataclasses.replace(plan.target, arch=arch, name="gpu")
    with pytest.raises(TargetError, match=f"compiled for sm_80, sm_90a, sm_100a, and gpu is {arch}"):
        generate(dataclasses.replace(plan, target=target))
