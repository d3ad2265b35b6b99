"""Plans for a GPU, and C++ compiled for the CPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan, Target
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.verify import verify_plan

DEVICE = Path(__file__).resolve().parents[3] / "csrc" / "device"


def planned(
    function: Callable[..., Any],
    *avals: Any,
    donated: frozenset[int] = frozenset(),
    target: Target = targets.H100,
) -> Plan:
    captured = capture(jax.make_jaxpr(function)(*avals))
    assert not captured.consts
    plan = make_plan(fuse(build_graph(captured.jaxpr, donated=donated)), target)
    verify_plan(plan)
    return plan


def boxes_of(plan: Plan, routine: int) -> tuple[np.ndarray, np.ndarray]:
    """Tasks of a routine, and int64 [members, tasks, 2, rank]."""
    table = plan.tasks.table
    tasks = np.flatnonzero(table["routine"] == routine)
    first = table["box"][tasks].astype(np.int64)
    return tasks, np.stack([plan.tasks.boxes[first + m] for m in range(len(plan.routines[routine].members))])


def library(text: str, folder: Path) -> ctypes.CDLL:
    """C++ for the CPU, with the device's scalar operations in it."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or pytest.skip("needs a C++ compiler")
    source, made = folder / "text.cc", folder / "text.so"
    source.write_text('#include "scalar.cuh"\nusing namespace mpk;\n' + text)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", f"-I{DEVICE}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))
