"""Tiny random models and hand-made files for the tests of the models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.decoder import Decoder, DecoderConfig
from models.encoder import Encoder, EncoderConfig

TINY_DECODER = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
)
TINY_ENCODER = EncoderConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=3,
    max_positions=16,
)


def random_decoder(config: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    return graphdef, _perturb(params)


def random_encoder(config: EncoderConfig) -> tuple[nnx.GraphDef[Encoder], nnx.State]:
    graphdef, params = nnx.split(Encoder(config, rngs=nnx.Rngs(0)))
    return graphdef, _perturb(params)


def _perturb(params: nnx.State) -> nnx.State:
    # Fresh norms are all ones and fresh biases all zeros, which would hide mistakes.
    generator = np.random.default_rng(1)

    def add_noise(leaf: jax.Array) -> jax.Array:
        return leaf + jnp.asarray(0.1 * generator.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(add_noise, params)


def flat_arrays(params: nnx.State) -> dict[str, np.ndarray]:
    """The parameters by dotted path, in f64."""
    return {
        ".".join(map(str, path)): np.asarray(variable[...], np.float64) for path, variable in nnx.to_flat_state(params)
    }


def byte_alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level BPE, in byte order."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b) if b in visible else chr(256 + hidden.index(b)) for b in range(256)]


def tokenizer_metadata(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    """GGUF metadata of a tokenizer with the 256 bytes, six words and four marked tokens."""
    words = ["he", "ll", "hell", "hello", "Ġw", "123"]
    marked = ["<|start|>", "<|end|>", "<|eot|>", "<tool>"]
    tokens = byte_alphabet() + words + marked
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * (256 + len(words)) + [3, 3, 3, 4],
        "merges": ["h e", "l l", "he ll", "hell o", "Ġ w"],
        "bos_token_id": tokens.index("<|start|>"),
        "eos_token_id": tokens.index("<|end|>"),
        "eot_token_id": tokens.index("<|eot|>"),
        "padding_token_id": tokens.index("<|end|>"),
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Writes a GGUF file; `types` names the tensors to quantise, the others are f32."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, array in tensors.items():
        kind = (types or {}).get(name, gguf.GGMLQuantizationType.F32)
        data = np.ascontiguousarray(array, np.float32)
        if kind != gguf.GGMLQuantizationType.F32:
            data = gguf.quantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
