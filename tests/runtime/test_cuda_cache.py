"""The disk cache of kernels: many processes, broken entries, entries of others."""

import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk import ConfigError, config
from jax_mpk.capture import capture
from jax_mpk.capture.canonical import canonical
from jax_mpk.runtime import cuda, cuda_cache, nvrtc, pipeline
from jax_mpk.runtime.artifact import Artifact
from jax_mpk.runtime.cuda_cache import Cache
from tests.cuda_programs import COUNTING, kernel

PROGRAM = kernel(COUNTING, arguments=1, results=1)


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "kernels")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_entries_are_kept(cache) -> None:
    assert cache.get("key") is None
    cache.put("key", b"contents")
    assert Cache(cache.folder).get("key") == b"contents"
    cache.put("key", b"")
    assert cache.get("key") == b""
    assert [path.name for path in cache.folder.iterdir()] == ["key"]


def test_nobody_else_may_read_them(cache) -> None:
    previous = os.umask(0)
    try:
        cache.put("key", b"contents")
    finally:
        os.umask(previous)
    assert (mode(cache.folder), mode(cache.folder / "key")) == (0o700, 0o600)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
        lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    ],
)
def test_damaged_entries_are_made_anew(cache, damage) -> None:
    cache.put("key", b"contents")
    path = cache.folder / "key"
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("key") is None
    assert not path.exists()
    cache.put("key", b"contents")
    assert cache.get("key") == b"contents"


def test_entry_under_another_key(cache) -> None:
    cache.put("key", b"contents")
    (cache.folder / "key").rename(cache.folder / "other")
    assert cache.get("other") is None


@pytest.mark.parametrize("where", ["key", "."])
def test_what_others_may_write_is_not_trusted(cache, where) -> None:
    cache.put("key", b"contents")
    (cache.folder / where).chmod(0o777)
    assert cache.get("key") is None


def test_what_belongs_to_others_is_not_trusted(cache, monkeypatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    cache.folder.mkdir(mode=0o700)
    if cache.folder.stat().st_uid == 0:
        os.chown(cache.folder, 54321, -1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        cache.put("key", b"contents")
    assert cache.get("key") is None


def test_links_are_not_followed(cache, tmp_path) -> None:
    cache.put("key", b"contents")
    (cache.folder / "key").rename(tmp_path / "elsewhere")
    (cache.folder / "key").symlink_to(tmp_path / "elsewhere")
    assert cache.get("key") is None


def test_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="JAX_MPK_CACHE_DIR"):
        Cache(tmp_path / "file").put("key", b"contents")


def _hammer(folder: Path, number: int) -> int:
    """Reads and writes entries that others read and write; how many were there."""
    cache = Cache(folder)
    found = 0
    for i in range(200):
        key = f"key{i % 7}"
        contents = cache.get(key)
        if contents is not None:
            assert contents == key.encode() * 5000
            found += 1
        if contents is None or (i + number) % 5 == 0:
            cache.put(key, key.encode() * 5000)
        if (i + number) % 50 == 0:  # somebody damages one
            (folder / key).write_bytes(b"broken")
    return found


def test_many_processes(cache) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.starmap(_hammer, [(cache.folder, number) for number in range(8)])
    assert all(n > 100 for n in found)
    assert sorted(path.name for path in cache.folder.iterdir()) == [f"key{i}" for i in range(7)]


# --- Kernels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """A cache of its own, and what is compiled."""
    made: list[str] = []
    original = nvrtc.compile_source

    def compile_source(source: str, arch: str, **options: str) -> nvrtc.Compiled:
        made.append(source)
        return original(source, arch, **options)

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    with config.override(cache_dir=tmp_path / "kernels"):
        yield made


def test_kernels_are_compiled_once(compilations) -> None:
    first = cuda.build(PROGRAM)
    assert cuda.build(PROGRAM) == first
    assert len(compilations) == 1
    (entry,) = (config.current().cache_dir or Path()).iterdir()
    entry.write_bytes(entry.read_bytes()[:-7])
    assert cuda.build(PROGRAM) == first
    assert len(compilations) == 2


def test_no_cache(compilations) -> None:
    with config.override(cache_dir=None):
        assert cuda.build(PROGRAM) == cuda.build(PROGRAM)
    assert len(compilations) == 2


def test_keys_follow_what_they_stand_for(monkeypatch, tmp_path) -> None:
    keys = [cuda_cache.cubin_key("source", "sm_90a")]
    keys.append(cuda_cache.cubin_key("source", "sm_90"))
    keys.append(cuda_cache.cubin_key("other", "sm_90a"))
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "-lineinfo"))
        keys.append(cuda_cache.cubin_key("source", "sm_90a"))
    with monkeypatch.context() as patch:
        (tmp_path / "launch.cuh").write_text("// another header")
        patch.setattr(nvrtc, "device_headers", lambda: tmp_path)
        keys.append(cuda_cache.cubin_key("source", "sm_90a"))
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "find", lambda: nvrtc.Compiler("NVRTC 99.0", lambda *_: (None, "")))
        keys.append(cuda_cache.cubin_key("source", "sm_90a"))
    for jaxpr, *about in [
        ("jaxpr", "program", "(True,)", "f", "h100"),
        ("other", "program", "(True,)", "f", "h100"),
        ("jaxpr", "program", "(False,)", "f", "h100"),
        ("jaxpr", "program", "(True,)", "g", "h100"),
        ("jaxpr", "program", "(True,)", "f", "h200"),
        ("jaxpr", "placement", "(True,)", "f", "h100"),
        ("jaxpr", "placement", "(True,)f", "h100"),
    ]:
        keys.append(cuda_cache.function_key(jaxpr, *about))
    assert len(set(keys)) == len(keys)
    assert keys[0] == cuda_cache.cubin_key("source", "sm_90a")


@pytest.mark.usefixtures("compilations")
def test_what_is_read_best_is_found_without_a_graph(monkeypatch) -> None:
    """A second process has a function's placement from the cache; it needs neither a graph nor a compiler."""
    x, w = jnp.ones((1, 128), jnp.bfloat16), jnp.ones((128, 2048), jnp.bfloat16)

    def placed() -> list[Any]:
        # A new function each time: what this process remembers of the others does not count.
        step = jax_mpk.megakernelize(lambda x, w: jnp.tanh(x @ w), target="h100-sxm")
        return [array.format.layout.major_to_minor for array in jax_mpk.place(step, x, w)]

    first = placed()
    assert first == [(0, 1), (1, 0)]
    (entry,) = (config.current().cache_dir or Path()).glob("*.placement")

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(pipeline, "build_graph", refuse)
    monkeypatch.setattr(nvrtc, "find", refuse)
    assert placed() == first
    entry.write_bytes(entry.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="made again"):
        placed()


def test_artifacts_survive() -> None:
    artifact = Artifact(b"\0program\xff", 512, ((0, 3), (2, 1)))
    assert Artifact.from_bytes(artifact.to_bytes()) == artifact


# --- The text of a function --------------------------------------------------------------------------------------


def text_of(function, *args) -> str | None:
    return canonical(capture(jax.make_jaxpr(function)(*args)).jaxpr)


def functions(constant: float):
    """Functions that are equal but for a constant, on the same lines."""

    def looped(x):
        def body(carry, row):
            return jax.nn.silu(carry @ row) * constant, carry[0]

        return jax.lax.scan(body, x, jnp.ones((3, 4, 4), x.dtype))

    def branched(x):
        return jax.lax.cond(x[0] > constant, jnp.sort, lambda y: y[::-1] + jnp.take(y, jnp.array([1, 2, 3, 0])), x)

    def random(x):
        return jax.random.normal(jax.random.key(3), x.shape) * constant

    return looped, branched, random


@pytest.mark.parametrize("which", [0, 1, 2])
def test_text_says_everything(which) -> None:
    x = jnp.ones(4)
    text = text_of(functions(0.1)[which], x)
    assert text is not None and " at 0x" not in text
    assert "test_cuda_cache.py" in text  # lines become part of programs
    jax.clear_caches()
    assert text == text_of(functions(0.1)[which], x)
    different = [
        text_of(functions(float(np.nextafter(np.float32(0.1), 1)))[which], x),
        text_of(functions(0.1)[which], x.astype(jnp.bfloat16)),
        text_of(functions(0.1)[(which + 1) % 3], x),
    ]
    assert text not in different


def test_config() -> None:
    def cache_dir(**environ: str) -> Path | None:
        return config.from_environment(environ).cache_dir

    assert cache_dir(XDG_CACHE_HOME="/cache") == Path("/cache/jax_mpk/kernels")
    assert cache_dir(XDG_CACHE_HOME="relative") == Path("~/.cache/jax_mpk/kernels").expanduser()
    assert cache_dir(JAX_MPK_CACHE_DIR="/mine", XDG_CACHE_HOME="/cache") == Path("/mine")
    assert cache_dir(JAX_MPK_CACHE_DIR="off") is cache_dir(JAX_MPK_CACHE_DIR="0") is None
    with pytest.raises(ConfigError, match="not a folder"):
        cache_dir(JAX_MPK_CACHE_DIR=__file__)
