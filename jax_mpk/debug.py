"""Looking inside: numbered dumps of every stage, and the text of ``explain``. Reads IRs, never edits them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_mpk import config
from jax_mpk.errors import ConfigError
from jax_mpk.graph.printer import format_graph
from jax_mpk.plan import report
from jax_mpk.plan.printer import format_plan
from jax_mpk.runtime import pipeline
from jax_mpk.runtime.jax_internals import core

#: File name of each stage and its text, in the order of the pipeline.
_DUMPS: tuple[tuple[str, Callable[[pipeline.Stages], str]], ...] = (
    ("1_jaxpr", lambda made: str(made.jaxpr)),
    ("2_graph", lambda made: format_graph(made.built)),
    ("3_fused_graph", lambda made: format_graph(made.graph)),
    ("4_plan", lambda made: format_plan(made.plan)),
    ("5_program", lambda made: str(made.program)),
    ("6_explain", lambda made: explain([made])),
)


def explain(kernels: Sequence[pipeline.Stages], notes: Sequence[str] = ()) -> str:
    """What a function was compiled to: operators, fusions, tasks, phases, bytes, memory, and what could not be done.

    Args:
      kernels: the stages of its megakernels.
      notes: what else the reader should know, one sentence each.
    """
    texts = [report.explain(made.plan, name=made.name, equations=count_equations(made.jaxpr)) for made in kernels]
    if len(kernels) != 1:
        texts.insert(0, f"{len(kernels)} custom calls, the rest in XLA")
    return "\n".join([*(text.rstrip("\n") for text in texts), *(f"  {note}" for note in notes)])


def count_equations(jaxpr: Any) -> int:
    """Equations of a jaxpr, those of loop bodies and branches included, each once."""
    return sum(1 + sum(map(count_equations, core.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns)


def dump(made: pipeline.Stages) -> None:
    """Writes every stage to a file of its own if JAX_MPK_DUMP_TO is set."""
    folder = config.current().dump_to
    if folder is None:
        return
    name = re.sub(r"\W+", "_", made.name) or "_"
    texts = [(stage, text(made).rstrip("\n") + "\n") for stage, text in _DUMPS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stem = _claim(folder, name)
        for stage, text in texts:
            (folder / f"{stem}.{stage}.txt").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"JAX_MPK_DUMP_TO={folder}: nothing can be written there ({error})") from error


def _claim(folder: Path, name: str) -> str:
    """A free number for a function; several processes may write to one folder."""
    first = f"{_DUMPS[0][0]}.txt"
    for number in _numbers(folder):
        stem = f"{number:04d}_{name}"
        try:
            (folder / f"{stem}.{first}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return stem
    raise AssertionError("unreachable")


def _numbers(folder: Path) -> Iterator[int]:
    taken = [int(m[1]) for path in folder.iterdir() if (m := re.match(r"(\d{4,})_", path.name))]
    number = max(taken, default=0)
    while True:
        number += 1
        yield number


pipeline.on_compiled(dump)
