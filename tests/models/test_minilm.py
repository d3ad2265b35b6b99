"""MiniLM against embeddings computed once with its reference implementation."""

import jax
import numpy as np
import pytest

from models import similarity
from models.similarity import embed_sentences, pad_batch

pytestmark = pytest.mark.weights


def test_tokenizer(minilm, minilm_truth) -> None:
    tokens, mask = pad_batch(minilm.tokenizer, minilm_truth["sentences"])
    assert tokens.shape == mask.shape == (4, 16)
    for row, keep, ids in zip(tokens, mask, minilm_truth["ids"], strict=True):
        assert row[keep].tolist() == ids


def test_embeddings(engine, minilm, minilm_truth) -> None:
    found = embed_sentences(minilm, minilm_truth["sentences"], engine)
    np.testing.assert_allclose(found, minilm_truth["emb"], atol=1e-4)
    np.testing.assert_allclose(found @ found.T, minilm_truth["cos"], atol=1e-4)
    expected = embed_sentences(minilm, minilm_truth["sentences"], jax.jit)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_sentence_alone(engine, minilm, minilm_truth) -> None:
    """Neither the batch nor the padding changes an embedding."""
    sentence = minilm_truth["sentences"][2]
    found = embed_sentences(minilm, [sentence], engine)
    np.testing.assert_allclose(found[0], minilm_truth["emb"][2], atol=1e-4)


@pytest.mark.usefixtures("minilm")  # skips where the weights cannot be had
def test_command_line(capsys) -> None:
    similarity.main(["--engine", "jit", "He eats.", "He has a meal.", "It rains."])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    cosines = np.array([[float(x) for x in row[-3:]] for row in rows])
    assert cosines[0, 1] > 0.5 > cosines[0, 2]
