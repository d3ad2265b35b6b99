"""What the custom call of a function needs."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Artifact:
    """What the custom call needs.

    Attributes:
      program: the words of the Program, or the compiled kernel with its tables, as bytes.
      workspace_bytes: size of the extra result; 0: there is none.
      aliases: pairs of result number and the donated argument whose buffer it takes over.
    """

    program: bytes
    workspace_bytes: int
    aliases: tuple[tuple[int, int], ...]

    def to_bytes(self) -> bytes:
        """For a file."""
        head = json.dumps({"workspace_bytes": self.workspace_bytes, "aliases": self.aliases}).encode()
        return struct.pack("<I", len(head)) + head + self.program

    @classmethod
    def from_bytes(cls, data: bytes) -> Artifact:
        """What :meth:`to_bytes` wrote."""
        (size,) = struct.unpack_from("<I", data)
        head = json.loads(data[4 : 4 + size])
        aliases = tuple((int(result), int(argument)) for result, argument in head["aliases"])
        return cls(data[4 + size :], int(head["workspace_bytes"]), aliases)
