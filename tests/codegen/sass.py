"""The machine instructions of a cubin, by NVIDIA's disassembler from its wheel or from the PATH."""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

#: An instruction's name behind its address and predicate: ``/*0a10*/  @!P0 UBLKCP.S.G [UR4], ...``.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
#: Where a branch goes: `` @P0 BRA `(.L_x_12) ;``.
_BRANCH = re.compile(r" BRA.* `\((\.L_\w+)\)")


def missing(cubin: bytes, claimed: Sequence[str], folder: Path) -> list[str]:
    """Which of the instructions that a kernel is said to use it does not have, or not so often.

    Args:
      cubin: the kernel.
      claimed: beginnings of names, such as "HMMA.16816", each as often as there must be such an instruction.
      folder: an empty one.
    """
    found = instructions(cubin, folder)
    wanted = collections.Counter(claimed).items()
    return [name for name, often in wanted if sum(n for has, n in found.items() if has.startswith(name)) < often]


def instructions(cubin: bytes, folder: Path) -> collections.Counter[str]:
    """The names of all instructions of a kernel and the functions it calls, and how many there are of each."""
    found = collections.Counter(_INSTRUCTION.findall(_listing(cubin, folder)))
    assert "EXIT" in found  # every kernel has one
    return found


def loops_around(cubin: bytes, name: str, folder: Path) -> list[list[str]]:
    """The instructions of the loops around all those whose names begin so, shortest loop first.

    Among the longer ones are some that are none: code that is kept elsewhere for rare cases branches back, too.
    """
    lines = _listing(cubin, folder).splitlines()
    names = [found[1] if (found := _INSTRUCTION.match(line)) else "" for line in lines]
    wanted = [n for n, found in enumerate(names) if found.startswith(name)]
    labels = {line.removesuffix(":"): n for n, line in enumerate(lines) if line.startswith(".L_")}
    back = [(labels[found[1]], n) for n, line in enumerate(lines) if n > wanted[-1] and (found := _BRANCH.search(line))]
    loops = [[found for found in names[a : b + 1] if found] for a, b in back if a <= wanted[0]]
    return sorted(loops, key=len)


def _listing(cubin: bytes, folder: Path) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    return subprocess.run([_disassembler(), "-c", file], capture_output=True, text=True, check=True).stdout


@functools.cache
def _disassembler() -> Path:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        for tool in sorted(Path(root).glob("*/bin/nvdisasm")):
            return tool
    found = shutil.which("nvdisasm")
    assert found is not None, "nvdisasm is missing; the `test` extra installs it"
    return Path(found)
