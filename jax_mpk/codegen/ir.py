"""The Program: what the CPU executor decodes, and how a person reads it.

A Program is one stream of 64-bit words (:mod:`jax_mpk.codegen.encode` defines it) with everything the executor needs:
storages, code of the routines, tasks, events, schedule. It depends on nothing outside of it, so it can be embedded in a
custom call, exported and run in another process.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Access:
    """Elements of an operand, an output or an accumulator tile that one instruction loads or stores.

    Attributes:
      slot: operands first, outputs next, then tiles.
      constant: element offset at coordinate 0.
      strides: elements per step of each loop, outermost first; tiles get theirs when they are laid out.
      offset: register added to the offset (s64), and the level of its value; (-1, 0) for none.
      predicate: register (b1) and level; where it is false the load reads 0. (-1, 0) for none.
      stepped_only: no instruction uses it; an update's body asks for its offsets.
    """

    slot: int
    constant: int
    strides: tuple[int, ...]
    offset: tuple[int, int] = (-1, 0)
    predicate: tuple[int, int] = (-1, 0)
    stepped_only: bool = False


@dataclass(frozen=True)
class Instruction:
    """One operation on lanes.

    Attributes:
      symbol: e.g. "add.f32", "load.bf16.f32" (csrc/host/scalar_ops.def).
      out: register of the result.
      args: registers of the arguments.
      immediate: a constant's bits, a coordinate's loop, an access, or what else the operation needs.
      use_level: deepest level that reads the result lane by lane.
    """

    symbol: str
    out: int
    args: tuple[int, ...]
    immediate: int = 0
    use_level: int = 0


@dataclass(frozen=True)
class Code:
    """Straight-line code over the loops of a box.

    A register is a byte offset within one lane; all lanes of a register lie together. Level l holds what depends on
    the first l loops only. The last two levels are phases: combining results with accumulators, and the epilogue.

    Attributes:
      order: axis of each loop, outermost first.
      lane_bytes: size of all registers for one lane.
      arrays: number of operands and outputs (tiles have the slots behind them).
      accesses: what loads and stores touch.
      instructions: sorted by level.
      begin: first instruction of each level and phase, and the end: ``len(order) + 4`` numbers.
      results: (register, type) of the results.
      accumulators: (register, type) of the accumulators.
    """

    order: tuple[int, ...]
    lane_bytes: int
    arrays: int
    accesses: tuple[Access, ...]
    instructions: tuple[Instruction, ...]
    begin: tuple[int, ...]
    results: tuple[tuple[int, str], ...] = ()
    accumulators: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class MemberText:
    """A member of a routine as the printer shows it.

    Attributes:
      title: kind, extents, operands and outputs in one line.
      codes: (name, code) of the codes it uses.
    """

    title: str
    codes: tuple[tuple[str, Code], ...]


@dataclass(frozen=True)
class RoutineText:
    """A routine as the printer shows it.

    Attributes:
      label: origin of its operators.
      tasks: how many tasks run it.
      members: in order.
    """

    label: str
    tasks: int
    members: tuple[MemberText, ...]


@dataclass(frozen=True)
class Program:
    """An encoded Plan.

    Attributes:
      words: int64, the stream.
      workspace_bytes: size of the workspace result of the custom call.
      routines: for :func:`format_program`; the executor does not see them.
    """

    words: np.ndarray
    workspace_bytes: int
    routines: tuple[RoutineText, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        return format_program(self)


def format_program(program: Program) -> str:
    """The code of every routine as text; routines that share all their code are shown once."""
    lines = [f"program of {len(program.words)} words, workspace {program.workspace_bytes} bytes"]
    first: dict[tuple[tuple[str, ...], tuple[int, ...]], int] = {}
    for number, routine in enumerate(program.routines):
        lines.append(f"\nroutine {number}  {routine.label}  ({routine.tasks} tasks)")
        same = first.setdefault(_shape(routine), number)
        for member in routine.members:
            lines.append(f"  {member.title}")
            if same == number:
                for name, code in member.codes:
                    lines.append(f"    {name}:")
                    lines.extend("      " + line for line in format_code(code))
        if same != number and any(member.codes for member in routine.members):
            lines.append(f"    code: as in routine {same}")
    return "\n".join(lines) + "\n"


def _shape(routine: RoutineText) -> tuple[tuple[str, ...], tuple[int, ...]]:
    codes = [(name, code) for member in routine.members for name, code in member.codes]
    return tuple(name for name, _ in codes), tuple(id(code) for _, code in codes)


def format_code(code: Code) -> list[str]:
    """The instructions of a code, one per line, under the heading of their level."""
    rank = len(code.order)
    lines = [f"loops {list(code.order)}, {code.lane_bytes} bytes a lane"]
    for level in range(rank + 3):
        chosen = code.instructions[code.begin[level] : code.begin[level + 1]]
        if not chosen:
            continue
        name = "combine" if level == rank + 1 else "epilogue" if level == rank + 2 else f"level {level}"
        lines.append(f"{name}:")
        lines.extend("  " + _format(i, code) for i in chosen)
    if code.accumulators:
        lines.append("accumulators " + _registers(code.accumulators))
    if code.results:
        lines.append("results " + _registers(code.results))
    return lines


def _registers(registers: tuple[tuple[int, str], ...]) -> str:
    return ", ".join(f"r{at}:{dtype}" for at, dtype in registers)


def _format(i: Instruction, code: Code) -> str:
    args = ", ".join(f"r{a}" for a in i.args)
    name = i.symbol.split(".")[0]
    if name == "store":
        return f"{i.symbol} {_format_access(code.accesses[i.immediate], code)} = {args}"
    out = f"r{i.out} = {i.symbol}"
    if name == "load":
        return f"{out} {_format_access(code.accesses[i.immediate], code)}"
    if name == "const":
        return f"{out} {i.immediate:#x}"
    if name == "coord":
        return f"{out} {code.order[i.immediate]}"
    return f"{out} {args}" + (f", {i.immediate:#x}" if i.immediate else "")


def _format_access(access: Access, code: Code) -> str:
    tile = access.slot - code.arrays
    if tile >= 0:
        return f"tile {tile}"
    terms = [f"{stride}*i{axis}" for stride, axis in zip(access.strides, code.order, strict=True) if stride]
    if access.constant or not terms:
        terms.append(str(access.constant))
    if access.offset[0] >= 0:
        terms.append(f"r{access.offset[0]}")
    when = f" if r{access.predicate[0]}" if access.predicate[0] >= 0 else ""
    return f"#{access.slot}[{' + '.join(terms)}]{when}"
