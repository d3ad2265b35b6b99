"""The decoder against an independent NumPy implementation in f64, and against itself."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import DecoderConfig, init_cache, step_functions
from models.rope import DivisorRope, LinearRope, Llama3Rope
from tests.models.support import TINY_DECODER, flat_arrays, random_decoder

LLAMA3 = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16)

VARIANTS = {
    "llama": {},
    "untied": {"tie_embeddings": False},
    "qwen2": {"qkv_bias": True, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "head_dim": 12, "rms_eps": 1e-6},
    "biases": {"qkv_bias": True, "output_bias": True, "tie_embeddings": False},
    "one_kv_head": {"num_kv_heads": 1},
    "no_groups": {"num_kv_heads": 4},
    "linear_rope": {"rope_scaling": LinearRope(4.0)},
    "llama3_rope": {"rope_scaling": LLAMA3},
    "divisor_rope": {"rope_scaling": DivisorRope((1.0, 1.5, 4.0, 8.0))},
}


@pytest.fixture(params=VARIANTS)
def config(request) -> DecoderConfig:
    return dataclasses.replace(TINY_DECODER, **VARIANTS[request.param])


# --- The reference: whole sequence at once, no cache, heads and positions in plain loops ----------


def reference_frequency(config: DecoderConfig, i: int) -> float:
    frequency = config.rope_theta ** (-2 * i / config.head_dim)
    match config.rope_scaling:
        case LinearRope(factor):
            return frequency / factor
        case DivisorRope(divisors):
            return frequency / divisors[i]
        case Llama3Rope(factor, low, high, trained):
            wavelength = 2 * math.pi / frequency
            if wavelength < trained / high:
                return frequency
            if wavelength > trained / low:
                return frequency / factor
            smooth = (trained / wavelength - low) / (high - low)
            return (1 - smooth) * frequency / factor + smooth * frequency
    return frequency


def reference_rotate(config: DecoderConfig, head: np.ndarray, pos: int) -> np.ndarray:
    half = config.head_dim // 2
    pairs = head[:half] + 1j * head[half:]
    angles = [pos * reference_frequency(config, i) for i in range(half)]
    turned = pairs * np.exp(1j * np.array(angles))
    return np.concatenate([turned.real, turned.imag])


def reference_norm(config: DecoderConfig, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_eps) * scale


def reference_attention(config, weights, prefix, x):
    def project(name):
        return x @ weights[f"{prefix}{name}.kernel"] + weights.get(f"{prefix}{name}.bias", 0.0)

    length, size = len(x), config.head_dim
    q, k, v = (project(name).reshape(length, -1, size) for name in ("q_proj", "k_proj", "v_proj"))
    if config.qk_norm:
        q = reference_norm(config, q, weights[f"{prefix}q_norm.scale"])
        k = reference_norm(config, k, weights[f"{prefix}k_norm.scale"])
    mixed = np.zeros((length, config.num_heads, size))
    for h in range(config.num_heads):
        group = h // (config.num_heads // config.num_kv_heads)
        for t in range(length):
            query = reference_rotate(config, q[t, h], t)
            keys = np.array([reference_rotate(config, k[s, group], s) for s in range(t + 1)])
            scores = np.exp(keys @ query / math.sqrt(size))
            mixed[t, h] = scores / scores.sum() @ v[: t + 1, group]
    x = mixed.reshape(length, -1)
    return project_out(weights, prefix, x)


def project_out(weights, prefix, x):
    return x @ weights[f"{prefix}o_proj.kernel"] + weights.get(f"{prefix}o_proj.bias", 0.0)


def reference_logits(config, weights, tokens: np.ndarray) -> np.ndarray:
    """Logits f64[T, vocab] of one sequence int[T]."""
    x = weights["embed_tokens.embedding"][tokens]
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        normed = reference_norm(config, x, weights[f"{layer}input_layernorm.scale"])
        x = x + reference_attention(config, weights, f"{layer}self_attn.", normed)
        normed = reference_norm(config, x, weights[f"{layer}post_attention_layernorm.scale"])
        gate = normed @ weights[f"{layer}mlp.gate_proj.kernel"]
        up = normed @ weights[f"{layer}mlp.up_proj.kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{layer}mlp.down_proj.kernel"]
    x = reference_norm(config, x, weights["norm.scale"])
    head = weights.get("lm_head.kernel", weights["embed_tokens.embedding"].T)
    return x @ head


# --- Tests ----------------------------------------------------------------------------------------


def random_tokens(config: DecoderConfig, batch: int, length: int) -> np.ndarray:
    shape = (batch, length)
    return np.random.default_rng(2).integers(config.vocab_size, size=shape, dtype=np.int32)


@pytest.mark.slow
def test_matches_numpy(config, engine) -> None:
    """A padded prompt, then single tokens, for two sequences."""
    graphdef, params = random_decoder(config)
    tokens = random_tokens(config, batch=2, length=12)
    weights = flat_arrays(params)
    expected = np.stack([reference_logits(config, weights, row) for row in tokens])

    prefill, decode_step = step_functions(graphdef)
    prefill = engine(prefill, donate_argnums=1)
    decode_step = engine(decode_step, donate_argnums=1)
    cache = init_cache(config, batch=2, cache_len=16)
    padded = np.full((2, 8), 3, np.int32)
    padded[:, :5] = tokens[:, :5]
    logits, cache = prefill(params, cache, padded, np.int32(5))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected[:, 4], rtol=1e-4, atol=1e-4)
    for pos in range(5, 12):
        logits, cache = decode_step(params, cache, tokens[:, pos], np.int32(pos))
        np.testing.assert_allclose(logits, expected[:, pos], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_prefill_equals_decode(config, engine) -> None:
    """The same positions in one call and one by one: same logits, same cache."""
    graphdef, params = random_decoder(config)
    tokens = random_tokens(config, batch=2, length=9)
    prefill, decode_step = step_functions(graphdef)
    whole, whole_cache = engine(prefill)(params, init_cache(config, 2, 16), tokens, np.int32(9))

    step, cache = engine(decode_step), init_cache(config, 2, 16)
    for pos in range(9):
        logits, cache = step(params, cache, tokens[:, pos], np.int32(pos))
    np.testing.assert_allclose(logits, whole, rtol=1e-5, atol=1e-5)
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(whole_cache), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert not np.any(one[:, 9:])


def test_padding_is_never_seen(engine) -> None:
    graphdef, params = random_decoder(TINY_DECODER)
    prefill, decode_step = map(engine, step_functions(graphdef))
    tokens = random_tokens(TINY_DECODER, batch=1, length=6)
    results = []
    for filler in (0, 60):
        padded = np.full((1, 12), filler, np.int32)
        padded[:, :6] = tokens
        cache = init_cache(TINY_DECODER, 1, 12)
        first, cache = prefill(params, cache, padded, np.int32(6))
        second, _ = decode_step(params, cache, np.array([7], np.int32), np.int32(6))
        results.append((first, second))
    np.testing.assert_array_equal(results[0], results[1])


def test_decode_writes_one_position(engine) -> None:
    graphdef, params = random_decoder(TINY_DECODER)
    cache = jax.tree.map(lambda x: x + 5.0, init_cache(TINY_DECODER, 2, 8))
    step = engine(step_functions(graphdef).decode_step)
    _, written = step(params, cache, np.array([1, 2], np.int32), np.int32(3))
    for array in jax.tree.leaves(written):
        changed = np.any(np.asarray(array) != 5.0, axis=(0, 2, 3))
        np.testing.assert_array_equal(np.flatnonzero(changed), [3])


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_bf16(variant, engine) -> None:
    """bf16 weights and activations stay near the f64 result of the same weights."""
    config = dataclasses.replace(TINY_DECODER, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, **VARIANTS[variant])
    graphdef, params = random_decoder(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    tokens = random_tokens(config, batch=1, length=10)
    cache = init_cache(config, 1, 16)
    prefill = engine(step_functions(graphdef).prefill)
    logits, cache = prefill(params, cache, tokens, np.int32(10))
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    expected = reference_logits(config, flat_arrays(params), tokens[0])[-1]
    np.testing.assert_allclose(logits[0], expected, atol=0.03 * np.abs(expected).max())


def test_f32_weights_with_bf16_arithmetic() -> None:
    config = dataclasses.replace(TINY_DECODER, dtype=jnp.bfloat16)
    graphdef, params = random_decoder(config)
    cache = init_cache(config, 1, 4)
    decode_step = jax.jit(step_functions(graphdef).decode_step)
    logits, cache = decode_step(params, cache, jnp.array([3]), 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert (logits.dtype, cache[0][0].dtype) == (jnp.float32, jnp.bfloat16)


def test_cache_shares_no_buffer() -> None:
    cache = init_cache(TINY_DECODER, batch=3, cache_len=7)
    leaves = jax.tree.leaves(cache)
    assert {leaf.shape for leaf in leaves} == {(3, 7, 2, 8)}
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == 2 * TINY_DECODER.num_layers


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_kv_heads": 3}, "not a multiple"), ({"head_dim": 7}, "odd")],
)
def test_bad_config(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY_DECODER, **change)


def test_wrong_number_of_divisors() -> None:
    config = dataclasses.replace(TINY_DECODER, rope_scaling=DivisorRope((1.0, 2.0)))
    graphdef, params = random_decoder(config)
    with pytest.raises(ValueError, match="2 RoPE divisors for 4 frequencies"):
        step_functions(graphdef).decode_step(params, init_cache(config, 1, 4), jnp.array([0]), 0)
