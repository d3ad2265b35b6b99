"""The disk cache of compiled kernels: what was compiled once is not compiled again, in whatever process.

There are two levels. A *cubin* is found by what the compiler was given: source, headers, compiler, options,
architecture. A whole *program*, or how its arguments are read best (*placement*), is found by what it was made for: the
function's jaxpr, which of its arguments are donated, the target, and the code that made it; that skips planning too.

Entries are files of their own, named by their keys, written under another name and then renamed: readers see whole
entries or none, and any number of processes may work on one folder. An entry counts only if it belongs to this user
(or root), nobody else may write to it, and its contents have the checksum it begins with; any other is made anew.
Everything may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import struct
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import jax

from jax_mpk import config
from jax_mpk._version import __version__
from jax_mpk.runtime import nvrtc
from jax_mpk.runtime.native import CUDA_VERSION

_MAGIC = b"JMPKCACHE1\0"


class Cache:
    """A folder of entries."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: str) -> bytes | None:
        """The contents of an entry, or None: there is none that can be trusted."""
        path = self.folder / key
        try:
            with _open(path) as file:
                data = file.read() if _is_ours(os.fstat(file.fileno())) and _is_ours(self.folder.stat()) else b""
        except OSError:
            return None
        contents = data[len(_MAGIC) + 32 :]
        if data == _MAGIC + _checksum(key, contents) + contents:
            return contents
        # Another process may have replaced it meanwhile: then that one is lost, and made again.
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, key: str, contents: bytes) -> None:
        """Writes an entry; warns where that is not possible."""
        temporary = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(self.folder.stat()):
                raise PermissionError(f"{self.folder} belongs to another user, or others may write to it")
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".new-")  # 0600
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + _checksum(key, contents) + contents)
            os.replace(temporary, self.folder / key)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            warnings.warn(f"jax_mpk cannot keep compiled kernels (JAX_MPK_CACHE_DIR): {error}", stacklevel=2)


def current() -> Cache | None:
    """The cache that is configured, or None."""
    folder = config.current().cache_dir
    return Cache(folder) if folder is not None else None


def cubin_key(source: str, arch: str) -> str:
    """The key of a kernel's machine code."""
    return _digest("cubin", source, arch, *nvrtc.options(arch), nvrtc.find().version, _headers()) + ".cubin"


def function_key(jaxpr: str, kind: str, *about: str) -> str:
    """The key of what was made of a function.

    Args:
      jaxpr: canonical text of the function, source lines included: they become part of programs.
      kind: what it is: "program", which the compiler has a part in, or "placement", which needs none.
      about: what else decided it: which arguments are donated, what is known about the device.
    """
    made_by = [__version__, jax.__version__, _own_code()]
    if kind == "program":
        made_by += [str(CUDA_VERSION), nvrtc.find().version, _headers()]
    return f"{_digest(kind, jaxpr, *about, *made_by)}.{kind}"


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(struct.pack("<Q", len(data)) + data)
    return digest.hexdigest()


def _checksum(key: str, contents: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + contents).digest()


@functools.cache
def _own_code() -> str:
    """Changes whenever any part of the compiler does: versions alone would not do in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return _tree_digest(package, package.rglob("*.py"))


def _headers() -> str:
    # Not cached: they are read anew by every compilation too.
    folder = nvrtc.device_headers()
    return _tree_digest(folder, folder.rglob("*.cuh"))


def _tree_digest(root: Path, files: Iterable[Path]) -> str:
    return _digest(*_texts(root, sorted(files)))


def _texts(root: Path, files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        yield str(file.relative_to(root))
        yield file.read_text(encoding="utf-8")


def _open(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")


def _is_ours(info: os.stat_result) -> bool:
    """Whether nobody but this user and root can have written something."""
    kind = stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)
    return kind and info.st_uid in (os.getuid(), 0) and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
