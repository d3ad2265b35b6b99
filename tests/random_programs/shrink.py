"""Makes a failing program small.

Steps, each kept if the smaller program still fails: only one result; instructions replaced by inputs that hold what
they compute; an instruction inside a loop or branch replaced by zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from tests.random_programs.program import Input, Instr, Program
from tests.random_programs.values import KEY, NUMPY, Info

#: Whether a program fails (in the way of interest).
Fails = Callable[[Program], bool]


def shrink(program: Program, fails: Fails, *, attempts: int = 150) -> Program:
    """A small program that fails; the given one if nothing helps."""
    left = attempts
    progress = True
    while progress and left > 0:
        progress = False
        for smaller in _candidates(program):
            left -= 1
            if _fails(smaller, fails):
                program, progress = smaller, True
                break
            if left <= 0:
                break
    return program


def _fails(program: Program, fails: Fails) -> bool:
    """Shrinking may make programs that JAX refuses: those are no failures."""
    try:
        jax.make_jaxpr(program.function())(*program.arrays())
    except Exception:
        return False
    return fails(program)


def _candidates(program: Program) -> Iterator[Program]:
    if len(program.outputs) > 1:
        for name in dict.fromkeys(program.outputs):
            yield dataclasses.replace(program, outputs=(name,)).pruned()
    pruned = program.pruned()
    if len(pruned.instrs) < len(program.instrs) or len(pruned.inputs) < len(program.inputs):
        yield pruned
    count = len(program.instrs)
    # First large cuts, then single instructions.
    for keep in (count // 2, 3 * count // 4):
        if 0 < keep < count:
            yield from _cut(program, program.instrs[:keep])
    for instr in reversed(program.instrs):
        yield from _cut(program, (instr,))
    for k, instr in enumerate(program.instrs):
        for inner in _simpler(program, instr):
            instrs = (*program.instrs[:k], inner, *program.instrs[k + 1 :])
            yield dataclasses.replace(program, instrs=instrs)


def _cut(program: Program, instrs: tuple[Instr, ...]) -> Iterator[Program]:
    """The program with the results of some instructions as inputs."""
    gone = {name for instr in instrs for name in instr.names}
    infos = {name: program.infos[name] for name in gone if name in program.infos}
    if len(infos) < len(gone) or any(i.dtype == KEY for i in infos.values()) or gone.intersection(program.outputs):
        return
    traced = dataclasses.replace(program, outputs=tuple(sorted(gone)))
    try:
        found = jax.jit(traced.function())(*program.arrays())
    except Exception:
        return
    inputs = [Input(name, infos[name], literal=np.asarray(a)) for name, a in zip(sorted(gone), found, strict=True)]
    rest = tuple(i for i in program.instrs if not gone.intersection(i.names))
    yield dataclasses.replace(program, inputs=(*program.inputs, *inputs), instrs=rest).pruned()


def _simpler(program: Program, instr: Instr) -> Iterator[Instr]:
    """An instruction with less inside its nested functions."""
    for k, block in enumerate(instr.blocks):
        for j, inner in enumerate(block.instrs):
            for new in (*_zeroed(program, inner), *_simpler(program, inner)):
                instrs = (*block.instrs[:j], new, *block.instrs[j + 1 :])
                changed = dataclasses.replace(block, instrs=instrs)
                yield dataclasses.replace(instr, blocks=(*instr.blocks[:k], changed, *instr.blocks[k + 1 :]))
        if len(block.live()) < len(block.instrs):
            changed = dataclasses.replace(block, instrs=block.live())
            yield dataclasses.replace(instr, blocks=(*instr.blocks[:k], changed, *instr.blocks[k + 1 :]))


def _zeroed(program: Program, instr: Instr) -> Iterator[Instr]:
    if len(instr.names) != 1 or instr.code.startswith("lax.full("):
        return
    info: Info | None = program.infos.get(instr.names[0])
    if info is None or info.dtype == KEY:
        return
    code = f"lax.full({info.shape}, {info.dtype}({NUMPY[info.dtype](0).item()!r}))"
    yield Instr(instr.names, code)
