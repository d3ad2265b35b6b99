"""Sampling: which tokens can be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.sampling import Sampling, greedy, sample

PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.25, 0.15, 0.03, 0.1])
DRAWS = 4096


def draw(engine, sampling: Sampling, seed: int = 0) -> np.ndarray:
    """Draws `DRAWS` tokens from `PROBABILITIES`, one per row of a batch."""
    logits = np.tile(np.log(PROBABILITIES).astype(np.float32), (DRAWS, 1))

    def step(logits: jax.Array, seed: jax.Array) -> jax.Array:
        return sample(logits, jax.random.key(seed), sampling)

    tokens = engine(step)(logits, np.uint32(seed))
    assert (tokens.shape, tokens.dtype) == ((DRAWS,), jnp.int32)
    return np.asarray(tokens)


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(1.0), {0, 1, 2, 3, 4, 5, 6}),
        (Sampling(1.0, top_k=1), {1}),
        (Sampling(1.0, top_k=3), {1, 3, 4}),
        (Sampling(1.0, top_k=100), {0, 1, 2, 3, 4, 5, 6}),
        (Sampling(1.0, top_p=0.3), {1}),
        (Sampling(1.0, top_p=0.41), {1, 3}),
        (Sampling(1.0, top_p=0.85), {1, 3, 4, 6}),
        (Sampling(1.0, top_p=1e-9), {1}),
        # Of the three most likely, renormalised to 0.5, 0.3125 and 0.1875.
        (Sampling(1.0, top_k=3, top_p=0.6), {1, 3}),
        # Squared: 0.60, 0.23, 0.085 ...
        (Sampling(0.5, top_p=0.7), {1, 3}),
    ],
    ids=str,
)
def test_support_and_frequencies(engine, sampling, support) -> None:
    counts = np.bincount(draw(engine, sampling), minlength=PROBABILITIES.size)
    assert set(np.flatnonzero(counts)) == support
    kept = [p if i in support else 0.0 for i, p in enumerate(PROBABILITIES)]
    expected = np.power(kept, 1 / sampling.temperature)
    # Four standard deviations of the most uncertain frequency.
    np.testing.assert_allclose(counts / DRAWS, expected / expected.sum(), atol=2 / DRAWS**0.5)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, top_k=4, top_p=0.9)], ids=str)
def test_seed_decides(engine, sampling) -> None:
    first, again, other = (draw(engine, sampling, seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_greedy(engine) -> None:
    logits = np.array([[0.0, 3.0, 3.0, 1.0], [2.0, -1.0, 0.0, 2.0]], np.float32)
    tokens = engine(greedy)(logits)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, [1, 0])


def test_no_temperature_is_greedy() -> None:
    logits = np.array([[0.0, 3.0, 1.0]], np.float32)
    sampling = Sampling(0.0, top_k=2, top_p=0.5)
    np.testing.assert_array_equal(sample(logits, jax.random.key(0), sampling), [1])


@pytest.mark.parametrize("fields", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_bad_settings(fields) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)
