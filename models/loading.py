"""From a checkpoint on disk to parameters on the device.

`load_decoder` and `load_encoder` take a GGUF file, a Hugging Face directory or a Hub id and return
everything a program needs. No weight is ever initialised to be thrown away: the module is built
abstractly, and each tensor is read, converted and placed before the next one is touched.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import track

from models.decoder import Decoder, DecoderConfig
from models.encoder import Encoder, EncoderConfig
from models.fetch import fetch_hub
from models.gguf_file import GgufFile
from models.safetensors_file import HfDirectory
from models.tokenizer import Tokenizer

ParamPath = tuple[str | int, ...]
"""Where a weight sits in the module: attribute names and list indices."""

ConfigT = TypeVar("ConfigT", DecoderConfig, EncoderConfig)
ModuleT = TypeVar("ModuleT", bound=nnx.Module)


class Checkpoint(Protocol):
    """What a checkpoint format has to offer; tensor names are those of Hugging Face."""

    @property
    def config(self) -> DecoderConfig | EncoderConfig:
        """Shape of the model."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, array); matrices of linear layers are [out, in]."""

    def tokenizer(self) -> Tokenizer:
        """Builds the tokenizer."""


@dataclasses.dataclass(frozen=True)
class Loaded(Generic[ConfigT, ModuleT]):
    """A model ready to run.

    Attributes:
        config: its shape and dtypes.
        graphdef: the static half of `nnx.split`.
        params: the weights, on the default device.
        tokenizer: from the same checkpoint.
    """

    config: ConfigT
    graphdef: nnx.GraphDef[ModuleT]
    params: nnx.State
    tokenizer: Tokenizer


def load_decoder(
    source: str | Path, *, dtype: DTypeLike = jnp.float32, progress: bool = True
) -> Loaded[DecoderConfig, Decoder]:
    """Loads a language model.

    Args:
        source: a .gguf file, a directory with config.json and safetensors, or a Hub id
            ("owner/name" or "owner/name/file.gguf").
        dtype: of weights, activations and cache.
        progress: whether to draw a progress bar on stderr.

    Raises:
        ValueError: another kind of model, an option that is not supported, or a checkpoint whose
            tensors do not match its configuration.
        ImportError: the source is a Hub id and huggingface_hub is not installed.
    """
    return _load(source, DecoderConfig, Decoder, decoder_path, dtype, progress)


def load_encoder(
    source: str | Path, *, dtype: DTypeLike = jnp.float32, progress: bool = True
) -> Loaded[EncoderConfig, Encoder]:
    """Loads a sentence encoder.

    Args:
        source: a directory with config.json and safetensors, or a Hub id "owner/name".
        dtype: of weights and activations.
        progress: whether to draw a progress bar on stderr.

    Raises:
        ValueError: as for `load_decoder`.
        ImportError: as for `load_decoder`.
    """
    return _load(source, EncoderConfig, Encoder, encoder_path, dtype, progress)


def _load(
    source: str | Path,
    config_type: type[ConfigT],
    module_type: Callable[..., ModuleT],
    locate: Callable[[str, ConfigT], ParamPath | None],
    dtype: DTypeLike,
    progress: bool,
) -> Loaded[ConfigT, ModuleT]:
    path = Path(source) if Path(source).exists() else fetch_hub(str(source))
    checkpoint: Checkpoint = GgufFile(path) if path.is_file() else HfDirectory(path)
    if not isinstance(checkpoint.config, config_type):
        held = type(checkpoint.config).__name__
        raise ValueError(f"{source} holds a model of {held}, not of {config_type.__name__}")
    config = dataclasses.replace(checkpoint.config, dtype=dtype, param_dtype=dtype)
    located = (
        (name, locate(name, config), array)
        for name, array in track(
            checkpoint.tensors(),
            description=f"Loading {path.name}",
            total=len(checkpoint.names),
            console=Console(stderr=True),
            transient=True,
            disable=not progress,
        )
    )
    graphdef, params = assemble(lambda: module_type(config, rngs=nnx.Rngs(0)), located)
    return Loaded(config, graphdef, params, checkpoint.tokenizer())


def assemble(
    build: Callable[[], ModuleT],
    tensors: Iterable[tuple[str, ParamPath | None, np.ndarray]],
) -> tuple[nnx.GraphDef[ModuleT], nnx.State]:
    """Fills the parameters of a module that is never materialised.

    Args:
        build: makes the module; called under `nnx.eval_shape`, so it allocates nothing.
        tensors: (name, path, array) of each weight, `name` for messages. A path of None skips the
            tensor; kernels arrive as [out, in] and are stored as [in, out].

    Returns:
        The module as `nnx.split` would give it, with every weight in its parameter's dtype.

    Raises:
        ValueError: a tensor that the module has no place for or whose shape is wrong, or a
            parameter for which no tensor came.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    missing = dict(nnx.to_flat_state(abstract))
    filled = []
    for name, path, array in tensors:
        if path is None:
            continue
        if path not in missing:
            raise ValueError(f"the model has no parameter for tensor {name!r}, or it came twice")
        slot = missing.pop(path)
        value = array.T if path[-1] == "kernel" else array
        if value.shape != slot.shape:
            raise ValueError(f"tensor {name!r} gives {value.shape}, but {path} is {slot.shape}")
        filled.append((path, slot.replace(_place(value, slot.dtype))))
    if missing:
        listed = ", ".join(".".join(map(str, path)) for path in list(missing)[:5])
        raise ValueError(f"the checkpoint lacks {len(missing)} parameters, among them: {listed}")
    return graphdef, nnx.from_flat_state(filled)


def _place(array: np.ndarray, dtype: DTypeLike) -> jax.Array:
    # Converted on the host, so the device never holds a wider copy. Contiguous and copied: on the
    # CPU, JAX may otherwise keep pointing into the memory-mapped file.
    return jnp.array(np.ascontiguousarray(array, dtype=dtype))


def decoder_path(name: str, config: DecoderConfig) -> ParamPath | None:
    """Path in `Decoder` of a Hugging Face tensor; None for one that is not a weight of its own."""
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
        return None
    *module, kind = name.removeprefix("model.").split(".")
    return (*(int(part) if part.isdigit() else part for part in module), _leaf(module[-1], kind))


_ENCODER_MODULES: dict[str, str] = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}


def encoder_path(name: str, config: EncoderConfig) -> ParamPath | None:
    """Path in `Encoder` of a Hugging Face BERT tensor; None for one that embedding does not use."""
    del config  # every BERT has the same tensors
    match name.removeprefix("bert.").split("."):
        case ["embeddings", "position_ids"] | ["pooler" | "cls", *_]:
            return None
        case ["embeddings", "LayerNorm", kind]:
            return ("embedding_norm", _leaf("embedding_norm", kind))
        case ["embeddings", table, "weight"]:
            return (table, "embedding")
        case ["encoder", "layer", layer, *module, kind] if ".".join(module) in _ENCODER_MODULES:
            path = _ENCODER_MODULES[".".join(module)].split(".")
            return ("layers", int(layer), *path, _leaf(path[-1], kind))
    raise ValueError(f"tensor {name!r} belongs to no BERT encoder")


def _leaf(module: str, kind: str) -> str:
    """Flax's name for the `weight` or `bias` of a module."""
    if kind != "weight":
        return kind
    if module == "embed_tokens":
        return "embedding"
    return "scale" if module.endswith("norm") else "kernel"
