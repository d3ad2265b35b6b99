"""Checkpoints in Hugging Face directories: config.json beside *.safetensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from models import tokenizer
from models.decoder import DecoderConfig
from models.encoder import EncoderConfig
from models.rope import LinearRope, Llama3Rope, RopeScaling
from models.tokenizer import read_json

_DECODERS = ("llama", "qwen2", "qwen3")
_ENCODERS = ("bert",)


class HfDirectory:
    """One checkpoint directory.

    Attributes:
        config: the decoder or encoder it holds, with f32 as both dtypes.
        names: names of all tensors, in file order.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the configuration and lists the tensors; their data stays on disk.

        Raises:
            FileNotFoundError: there is no `config.json` or no *.safetensors file.
            ValueError: a model type or an option that is not supported.
        """
        self._directory = directory
        self._files = sorted(directory.glob("*.safetensors"))
        if not self._files:
            raise FileNotFoundError(f"no .safetensors file in {directory}")
        self.config = read_config(directory)
        names: list[str] = []
        for file in self._files:
            with safe_open(file, framework="np") as reader:
                names.extend(reader.offset_keys())
        self.names = tuple(names)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields every tensor as (name, array in its stored dtype), one at a time."""
        for file in self._files:
            with safe_open(file, framework="np") as reader:
                for name in reader.offset_keys():
                    yield name, reader.get_tensor(name)

    def tokenizer(self) -> tokenizer.Tokenizer:
        """Reads the tokenizer of the directory.

        Raises:
            FileNotFoundError: there is no `tokenizer.json`.
        """
        return tokenizer.from_directory(self._directory)


def read_config(directory: Path) -> DecoderConfig | EncoderConfig:
    """Translates `config.json`, with f32 as both dtypes.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: a model type or an option that is not supported.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {directory}")
    options = read_json(path)
    kind = options.get("model_type")
    if kind in _DECODERS:
        return _decoder_config(options)
    if kind in _ENCODERS:
        return _encoder_config(options)
    known = ", ".join(_DECODERS + _ENCODERS)
    raise ValueError(f"model type {kind!r}; supported are: {known}")


def _require(options: dict[str, Any], key: str, supported: Any) -> None:
    # An absent option means the default, which is the supported value for every key we check.
    value = options.get(key, supported)
    if value != supported:
        raise ValueError(f"config.json has {key}={value!r}; only {supported!r} is supported")


def _decoder_config(options: dict[str, Any]) -> DecoderConfig:
    kind = options["model_type"]
    _require(options, "hidden_act", "silu")
    _require(options, "mlp_bias", False)
    _require(options, "use_sliding_window", False)
    _require(options, "partial_rotary_factor", 1.0)
    num_heads, hidden_size = options["num_attention_heads"], options["hidden_size"]
    # Newer files put all of RoPE in one object.
    rope = options.get("rope_parameters") or options.get("rope_scaling") or {}
    biased = options.get("attention_bias", False)
    return DecoderConfig(
        vocab_size=options["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=options["intermediate_size"],
        num_layers=options["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=options.get("num_key_value_heads") or num_heads,
        head_dim=options.get("head_dim") or hidden_size // num_heads,
        rope_theta=float(rope.get("rope_theta") or options.get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(rope),
        rms_eps=options["rms_norm_eps"],
        max_positions=options["max_position_embeddings"],
        qk_norm=kind == "qwen3",
        # Qwen2 always has these three biases and has no option for them.
        qkv_bias=kind == "qwen2" or biased,
        output_bias=biased,
        tie_embeddings=options.get("tie_word_embeddings", False),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(float(rope["factor"]))
    if kind == "llama3":
        return Llama3Rope(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_position=rope["original_max_position_embeddings"],
        )
    raise ValueError(f"RoPE scaling {kind!r} is not supported")


def _encoder_config(options: dict[str, Any]) -> EncoderConfig:
    _require(options, "hidden_act", "gelu")
    _require(options, "position_embedding_type", "absolute")
    return EncoderConfig(
        vocab_size=options["vocab_size"],
        hidden_size=options["hidden_size"],
        intermediate_size=options["intermediate_size"],
        num_layers=options["num_hidden_layers"],
        num_heads=options["num_attention_heads"],
        max_positions=options["max_position_embeddings"],
        type_vocab_size=options["type_vocab_size"],
        layer_norm_eps=options["layer_norm_eps"],
    )
