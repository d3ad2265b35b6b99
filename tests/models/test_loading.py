"""Loaders: files written here from known parameters must come back as those parameters."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.decoder import DecoderConfig
from models.gguf_file import GgufFile, hf_name
from models.loading import load_decoder, load_encoder
from models.rope import DivisorRope, LinearRope, Llama3Rope
from models.safetensors_file import read_config
from models.tokenizer import from_gguf
from tests.models.support import (
    TINY_DECODER,
    TINY_ENCODER,
    flat_arrays,
    random_decoder,
    random_encoder,
    tokenizer_metadata,
    write_gguf,
)

# Sizes that fit the 32-element blocks of quantised types, and a vocabulary for the tokenizer.
DECODER = dataclasses.replace(TINY_DECODER, vocab_size=266, intermediate_size=64)

VARIANTS = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tie_embeddings": False},
    "qwen3": {"qk_norm": True, "head_dim": 16},
}
variants = pytest.mark.parametrize("kind", VARIANTS)

GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def random_params(config) -> dict[str, np.ndarray]:
    make = random_decoder if isinstance(config, DecoderConfig) else random_encoder
    return flat_arrays(make(config)[1])


def hf_tensors(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Decoder parameters as a Hugging Face checkpoint holds them, in f32."""
    tensors = {}
    for path, array in params.items():
        module, leaf = path.rsplit(".", 1)
        array = array.T if leaf == "kernel" else array
        name = f"{module}.{'bias' if leaf == 'bias' else 'weight'}"
        name = name if module == "lm_head" else f"model.{name}"
        tensors[name] = np.ascontiguousarray(array, np.float32)
    return tensors


def gguf_tensors(params: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """The same as GGUF holds them: renamed, and for llama with interleaved Q and K rows."""
    tensors = {}
    for name, array in hf_tensors(params).items():
        module, leaf = name.removeprefix("model.").rsplit(".", 1)
        prefix = ""
        if module.startswith("layers."):
            _, layer, module = module.split(".", 2)
            prefix = f"blk.{layer}."
        if kind == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = DECODER.num_heads if module.endswith("q_proj") else DECODER.num_kv_heads
            halves = array.reshape(heads, 2, -1, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        tensors[f"{prefix}{GGUF_PARTS[module]}.{leaf}"] = array
    return tensors


def gguf_metadata(config, kind: str) -> dict:
    fields = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_eps,
        "rope.freq_base": config.rope_theta,
    }
    return {f"{kind}.{key}": value for key, value in fields.items()} | tokenizer_metadata()


def same_config(loaded, expected) -> bool:
    # GGUF holds the epsilon in f32.
    close = loaded.rms_eps == pytest.approx(expected.rms_eps, rel=1e-6)
    return close and dataclasses.replace(loaded, rms_eps=expected.rms_eps) == expected


def assert_params(loaded, expected: dict[str, np.ndarray], **tolerance: float) -> None:
    found = flat_arrays(loaded.params)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(found[path], array, err_msg=path, **(tolerance or {"rtol": 0}))


# --- GGUF -----------------------------------------------------------------------------------------


@variants
def test_gguf(tmp_path, kind) -> None:
    config = dataclasses.replace(DECODER, **VARIANTS[kind])
    params = random_params(config)
    path = tmp_path / "model.gguf"
    write_gguf(path, kind, gguf_metadata(config, kind), gguf_tensors(params, kind))
    loaded = load_decoder(path, progress=False)
    assert same_config(loaded.config, config)
    assert_params(loaded, params)
    text = "hello 123"
    assert loaded.tokenizer.encode(text) == from_gguf(tokenizer_metadata()).encode(text)


def test_gguf_biases_of_llama_are_interleaved_too(tmp_path) -> None:
    config = dataclasses.replace(DECODER, qkv_bias=True, output_bias=True)
    params = random_params(config)
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", gguf_metadata(config, "llama"), gguf_tensors(params, "llama"))
    loaded = load_decoder(path, progress=False)
    assert same_config(loaded.config, config)
    assert_params(loaded, params)


@pytest.mark.parametrize(("name", "tolerance"), [("F16", 2e-3), ("Q8_0", 5e-3), ("Q4_1", 5e-2)])
def test_gguf_quantised(tmp_path, name, tolerance) -> None:
    params = random_params(DECODER)
    tensors = gguf_tensors(params, "llama")
    kind = gguf.GGMLQuantizationType[name]
    types = {name: kind for name, array in tensors.items() if array.ndim == 2}
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", gguf_metadata(DECODER, "llama"), tensors, types)
    assert_params(load_decoder(path, progress=False), params, atol=tolerance)


def test_gguf_rope_divisors(tmp_path) -> None:
    divisors = (1.0, 1.0, 2.5, 8.0)
    tensors = gguf_tensors(random_params(DECODER), "llama")
    tensors["rope_freqs.weight"] = np.array(divisors)
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", gguf_metadata(DECODER, "llama"), tensors)
    assert load_decoder(path, progress=False).config.rope_scaling == DivisorRope(divisors)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            LinearRope(4.0),
        ),
    ],
)
def test_gguf_rope_scaling(tmp_path, metadata, expected) -> None:
    tensors = gguf_tensors(random_params(DECODER), "llama")
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", gguf_metadata(DECODER, "llama") | metadata, tensors)
    assert GgufFile(path).config.rope_scaling == expected


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("gemma", {}, "architecture 'gemma'"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ("llama", {"llama.rope.dimension_count": 4}, "partial rotary"),
    ],
)
def test_gguf_unsupported(tmp_path, architecture, metadata, message) -> None:
    tensors = gguf_tensors(random_params(DECODER), "llama")
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, gguf_metadata(DECODER, "llama") | metadata, tensors)
    with pytest.raises(ValueError, match=message):
        GgufFile(path)


def test_gguf_lacks_metadata(tmp_path) -> None:
    metadata = gguf_metadata(DECODER, "llama")
    del metadata["llama.block_count"]
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", metadata, gguf_tensors(random_params(DECODER), "llama"))
    with pytest.raises(ValueError, match=r"lacks llama\.block_count"):
        GgufFile(path)


def test_gguf_unknown_tensor() -> None:
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate_exps\.weight"):
        hf_name("blk.0.ffn_gate_exps.weight")


# --- Safetensors ----------------------------------------------------------------------------------


def hf_options(config, kind: str) -> dict:
    return {
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }


def write_directory(path, options: dict, *files: dict[str, np.ndarray]) -> None:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(options))
    for i, tensors in enumerate(files):
        save_file(tensors, path / f"model-{i + 1:05}-of-{len(files):05}.safetensors")
    from_gguf(tokenizer_metadata()).backend.save(str(path / "tokenizer.json"))


@variants
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors(tmp_path, kind, dtype) -> None:
    config = dataclasses.replace(DECODER, **VARIANTS[kind])
    params = random_params(config)
    tensors = {name: array.astype(dtype) for name, array in hf_tensors(params).items()}
    write_directory(tmp_path, hf_options(config, kind), tensors)
    loaded = load_decoder(tmp_path, progress=False)
    assert loaded.config == config
    assert_params(loaded, {path: array.astype(dtype) for path, array in params.items()})
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("hello")) == "hello"


def test_safetensors_in_several_files(tmp_path) -> None:
    params = random_params(DECODER)
    tensors = hf_tensors(params)
    # Tied checkpoints may hold the head all the same, older ones the RoPE frequencies.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    names = sorted(tensors)
    halves = ({n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]})
    write_directory(tmp_path, hf_options(DECODER, "llama"), *halves)
    assert_params(load_decoder(tmp_path, progress=False), params)


def test_load_in_bf16(tmp_path) -> None:
    params = random_params(DECODER)
    write_directory(tmp_path, hf_options(DECODER, "llama"), hf_tensors(params))
    loaded = load_decoder(tmp_path, dtype=jnp.bfloat16, progress=False)
    assert loaded.config.dtype == loaded.config.param_dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    rounded = {path: array.astype(ml_dtypes.bfloat16) for path, array in params.items()}
    assert_params(loaded, rounded)


LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rope_scaling": None}, (10_000.0, None)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, (10_000.0, LinearRope(2.0))),
        (
            {"rope_scaling": {"rope_type": "llama3"} | LLAMA3, "rope_theta": 5e5},
            (5e5, Llama3Rope(32.0, 1.0, 4.0, 8192)),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, (1e6, None)),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
            (5e5, Llama3Rope(32.0, 1.0, 4.0, 8192)),
        ),
    ],
)
def test_rope_options(tmp_path, options, expected) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_options(DECODER, "llama") | options))
    config = read_config(tmp_path)
    assert (config.rope_theta, config.rope_scaling) == expected


def test_defaults_of_absent_options(tmp_path) -> None:
    options = hf_options(DECODER, "llama")
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings"):
        del options[key]
    (tmp_path / "config.json").write_text(json.dumps(options))
    expected = dataclasses.replace(DECODER, num_kv_heads=4, tie_embeddings=False)
    assert read_config(tmp_path) == expected


def test_attention_bias(tmp_path) -> None:
    options = hf_options(DECODER, "llama") | {"attention_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert read_config(tmp_path) == dataclasses.replace(DECODER, qkv_bias=True, output_bias=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "gemma"}, "model type 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
    ],
)
def test_unsupported_options(tmp_path, options, message) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_options(DECODER, "llama") | options))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 parameters, among them: norm\.scale"),
        (lambda t: t.update({"model.extra.weight": np.zeros(3)}), r"'model\.extra\.weight'"),
        (lambda t: t.update({"model.norm.weight": np.zeros(3)}), r"gives \(3,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_wrong_tensors(tmp_path, damage, message) -> None:
    tensors = hf_tensors(random_params(DECODER))
    damage(tensors)
    write_directory(tmp_path, hf_options(DECODER, "llama"), tensors)
    with pytest.raises(ValueError, match=message):
        load_decoder(tmp_path, progress=False)


def test_incomplete_directories(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_decoder(tmp_path, progress=False)
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_decoder(tmp_path, progress=False)


# --- The encoder ----------------------------------------------------------------------------------

BERT_MODULES = {
    "embedding_norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}


def bert_tensors(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {}
    for path, array in params.items():
        module, leaf = path.rsplit(".", 1)
        if leaf == "embedding":
            name = f"embeddings.{module}"
        elif module.startswith("layers."):
            _, layer, module = module.split(".", 2)
            name = f"encoder.layer.{layer}.{BERT_MODULES[module]}"
        else:
            name = BERT_MODULES[module]
        array = array.T if leaf == "kernel" else array
        suffix = "bias" if leaf == "bias" else "weight"
        tensors[f"{name}.{suffix}"] = np.ascontiguousarray(array, np.float32)
    return tensors


BERT_OPTIONS = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": TINY_ENCODER.vocab_size,
    "hidden_size": TINY_ENCODER.hidden_size,
    "intermediate_size": TINY_ENCODER.intermediate_size,
    "num_hidden_layers": TINY_ENCODER.num_layers,
    "num_attention_heads": TINY_ENCODER.num_heads,
    "max_position_embeddings": TINY_ENCODER.max_positions,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_encoder(tmp_path, prefix) -> None:
    params = random_params(TINY_ENCODER)
    tensors = {prefix + name: array for name, array in bert_tensors(params).items()}
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(16)
    tensors[f"{prefix}pooler.dense.weight"] = np.zeros((24, 24))
    write_directory(tmp_path, BERT_OPTIONS, tensors)
    loaded = load_encoder(tmp_path, progress=False)
    assert loaded.config == TINY_ENCODER
    assert_params(loaded, params)


def test_wrong_loader(tmp_path) -> None:
    write_directory(tmp_path / "decoder", hf_options(DECODER, "llama"), {"a": np.zeros(1)})
    write_directory(tmp_path / "encoder", BERT_OPTIONS, {"a": np.zeros(1)})
    with pytest.raises(ValueError, match="DecoderConfig, not of EncoderConfig"):
        load_encoder(tmp_path / "decoder", progress=False)
    with pytest.raises(ValueError, match="EncoderConfig, not of DecoderConfig"):
        load_decoder(tmp_path / "encoder", progress=False)


def test_unknown_encoder_tensor(tmp_path) -> None:
    tensors = bert_tensors(random_params(TINY_ENCODER)) | {"encoder.extra": np.zeros(1)}
    write_directory(tmp_path, BERT_OPTIONS, tensors)
    with pytest.raises(ValueError, match=r"'encoder\.extra' belongs to no BERT encoder"):
        load_encoder(tmp_path, progress=False)
