"""Decoder checkpoints in GGUF files: configuration, tensors and tokenizer.

Tensors come out dequantised, in the row order and under the names of the Hugging Face checkpoint
that the file was made from, so everything after this module sees one format.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from models import tokenizer
from models.decoder import DecoderConfig
from models.rope import DivisorRope, LinearRope, RopeScaling

_ARCHITECTURES = ("llama", "qwen2", "qwen3")

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"


class GgufFile:
    """One open GGUF file.

    Attributes:
        config: the decoder it holds, with f32 as both dtypes.
        names: the Hugging Face names of its weights, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file; tensor data stays on disk until it is asked for.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an architecture, RoPE variant or tensor that is not supported.
        """
        self._reader = gguf.GGUFReader(path)
        self._metadata: dict[str, Any] = {key: field.contents() for key, field in self._reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.config = self._read_config()
        # The divisors are a tensor in the file, but belong to the configuration.
        self._hf_names = {name: hf_name(name) for name in self._tensors if name != _ROPE_DIVISORS}
        self.names = tuple(self._hf_names.values())

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields every weight as (Hugging Face name, f32 array), one at a time.

        Matrices are [out, in].
        """
        architecture = self._metadata["general.architecture"]
        heads = {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads}
        for name, renamed in self._hf_names.items():
            tensor = self._tensors[name]
            array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            part = name.split(".")[-2]
            if architecture == "llama" and part in heads:
                array = unpermute(array, heads[part])
            yield renamed, array

    def tokenizer(self) -> tokenizer.Tokenizer:
        """Builds the tokenizer of the file.

        Raises:
            ValueError: see `tokenizer.from_gguf`.
        """
        return tokenizer.from_gguf(self._metadata)

    def _read_config(self) -> DecoderConfig:
        architecture = self._metadata["general.architecture"]
        if architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(f"GGUF architecture {architecture!r}; supported are: {known}")

        def get(key: str, default: Any = None) -> Any:
            value = self._metadata.get(f"{architecture}.{key}", default)
            if value is None:
                raise ValueError(f"GGUF metadata lacks {architecture}.{key}")
            return value

        num_heads, hidden_size = get("attention.head_count"), get("embedding_length")
        head_dim = get("attention.key_length", hidden_size // num_heads)
        rotated = get("rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ValueError(f"partial rotary embedding ({rotated} of {head_dim}) is unsupported")
        return DecoderConfig(
            # The embedding is stored with its rows outermost.
            vocab_size=int(self._tensors["token_embd.weight"].shape[-1]),
            hidden_size=hidden_size,
            intermediate_size=get("feed_forward_length"),
            num_layers=get("block_count"),
            num_heads=num_heads,
            num_kv_heads=get("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rope_theta=get("rope.freq_base", 10_000.0),
            rope_scaling=self._read_rope_scaling(architecture),
            rms_eps=get("attention.layer_norm_rms_epsilon"),
            max_positions=get("context_length"),
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            output_bias="blk.0.attn_output.bias" in self._tensors,
            tie_embeddings="output.weight" not in self._tensors,
        )

    def _read_rope_scaling(self, architecture: str) -> RopeScaling | None:
        if _ROPE_DIVISORS in self._tensors:
            data = self._tensors[_ROPE_DIVISORS].data
            return DivisorRope(tuple(float(x) for x in data))
        prefix = f"{architecture}.rope.scaling"
        kind = self._metadata.get(f"{prefix}.type", "none")
        if kind == "none":
            return None
        if kind == "linear":
            return LinearRope(float(self._metadata[f"{prefix}.factor"]))
        raise ValueError(f"RoPE scaling {kind!r} is not supported")


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor: blk.0.attn_q.weight is layer 0's q_proj.

    Raises:
        ValueError: no decoder of the supported family has such a tensor.
    """
    match name.split("."):
        case ["blk", layer, part, kind] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
        case [part, kind] if part in _NAMES:
            return f"{_NAMES[part]}.{kind}"
    raise ValueError(f"GGUF tensor {name!r} belongs to no supported decoder")


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Restores the row order of a query or key projection.

    GGUF files of the `llama` architecture interleave the two halves of every head, for a RoPE
    that turns neighbouring elements; ours turns elements half a head apart.

    Args:
        array: [heads * head_dim, ...], interleaved.
        heads: number of heads in the rows.

    Returns:
        The same rows in half-rotation order.
    """
    paired = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return paired.swapaxes(1, 2).reshape(array.shape)
