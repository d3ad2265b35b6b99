"""The encoder against an independent NumPy implementation in f64."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from models.encoder import embed_function
from tests.models.support import TINY_ENCODER, flat_arrays, random_encoder


def reference_norm(weights, name, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + TINY_ENCODER.layer_norm_eps)
    return scaled * weights[f"{name}.scale"] + weights[f"{name}.bias"]


def reference_embedding(weights, tokens: list[int]) -> np.ndarray:
    """f64[hidden_size] of one sentence without padding."""

    def linear(name, x):
        return x @ weights[f"{name}.kernel"] + weights[f"{name}.bias"]

    x = weights["word_embeddings.embedding"][tokens]
    x = x + weights["position_embeddings.embedding"][: len(tokens)]
    x = x + weights["token_type_embeddings.embedding"][0]
    x = reference_norm(weights, "embedding_norm", x)
    size = TINY_ENCODER.hidden_size // TINY_ENCODER.num_heads
    for i in range(TINY_ENCODER.num_layers):
        layer = f"layers.{i}."
        q, k, v = (linear(f"{layer}attention.{name}", x) for name in ("query", "key", "value"))
        heads = []
        for h in range(TINY_ENCODER.num_heads):
            part = slice(h * size, (h + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        attended = linear(f"{layer}attention.output", np.concatenate(heads, -1))
        x = reference_norm(weights, f"{layer}attention_norm", x + attended)
        inner = linear(f"{layer}intermediate", x)
        inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
        x = reference_norm(weights, f"{layer}output_norm", x + linear(f"{layer}output", inner))
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def batch() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(3).integers(TINY_ENCODER.vocab_size, size=(3, 10), dtype=np.int32)
    mask = np.arange(10) < np.array([[10], [4], [1]])
    return tokens, mask


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_matches_numpy(engine, dtype, tolerance) -> None:
    config = dataclasses.replace(TINY_ENCODER, dtype=dtype, param_dtype=dtype)
    graphdef, params = random_encoder(config)
    tokens, mask = batch()
    result = engine(embed_function(graphdef))(params, tokens, mask)
    assert result.dtype == jnp.float32
    weights = flat_arrays(params)
    for row, keep, embedding in zip(tokens, mask, result, strict=True):
        expected = reference_embedding(weights, row[keep])
        np.testing.assert_allclose(embedding, expected, atol=tolerance)


def test_padding_is_never_seen(engine) -> None:
    graphdef, params = random_encoder(TINY_ENCODER)
    tokens, mask = batch()
    embed = engine(embed_function(graphdef))
    np.testing.assert_array_equal(
        embed(params, np.where(mask, tokens, 0), mask),
        embed(params, np.where(mask, tokens, 9), mask),
    )


def test_empty_row_is_zero(engine) -> None:
    graphdef, params = random_encoder(TINY_ENCODER)
    tokens, mask = batch()
    mask[1] = False
    result = np.asarray(engine(embed_function(graphdef))(params, tokens, mask))
    np.testing.assert_array_equal(result[1], 0.0)
    np.testing.assert_allclose(np.linalg.norm(result[[0, 2]], axis=-1), 1.0, rtol=1e-6)


def test_too_long() -> None:
    graphdef, params = random_encoder(TINY_ENCODER)
    tokens = np.zeros((1, 17), np.int32)
    with pytest.raises(ValueError, match="17 tokens, but the encoder has 16 positions"):
        embed_function(graphdef)(params, tokens, tokens == 0)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        dataclasses.replace(TINY_ENCODER, num_heads=5)
