"""SmolLM2-135M against ids and logits computed once in NumPy, JAX and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.decoder import init_cache, step_functions
from models.generate import Generator

pytestmark = [pytest.mark.weights, pytest.mark.slow]

CACHE_LEN = 96
#: Under jax.jit, which takes long to compile so many layers, the other tests say the same of the model.
MPK = pytest.mark.parametrize("engine", ["mpk"], indirect=True)


def test_tokenizer(smollm2, smollm2_truth) -> None:
    for case in smollm2_truth["cases"]:
        assert smollm2.tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        assert smollm2.tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]
        push = smollm2.tokenizer.stream()
        assert "".join(map(push, case["greedy_ids"])) == case["greedy_text"]


def test_chat_template(smollm2, smollm2_truth) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert smollm2.tokenizer.encode_chat(messages) == smollm2_truth["cases"][1]["prompt_ids"]


def test_config(smollm2, smollm2_truth) -> None:
    expected, config = smollm2_truth["config"], smollm2.config
    assert config.rms_eps == pytest.approx(expected["rms_norm_eps"])
    assert [config.vocab_size, config.hidden_size, config.num_layers, config.head_dim] == [
        expected[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")
    ]
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == 134_515_008


def test_greedy_ids(engine, smollm2, smollm2_truth) -> None:
    """All four texts through one compiled prefill and one compiled step, end of text ignored."""
    prefill, decode_step = step_functions(smollm2.graphdef)
    prefill = engine(prefill, donate_argnums=1)
    decode_step = engine(decode_step, donate_argnums=1)
    cache = init_cache(smollm2.config, 1, CACHE_LEN)
    for case in smollm2_truth["cases"]:
        length = len(case["prompt_ids"])
        tokens = np.zeros((1, 40), np.int32)
        tokens[0, :length] = case["prompt_ids"]
        logits, cache = prefill(smollm2.params, cache, tokens, np.int32(length))
        np.testing.assert_allclose(np.asarray(logits)[0, case["first_top5_ids"]], case["first_top5_logits"], atol=1e-4)
        found = []
        for pos in range(length, length + len(case["greedy_ids"])):
            found.append(int(np.argmax(logits)))
            token = np.array(found[-1:], np.int32)
            logits, cache = decode_step(smollm2.params, cache, token, np.int32(pos))
        assert found == case["greedy_ids"]


@MPK
def test_generator(engine, smollm2, smollm2_truth) -> None:
    """Sampling inside the step, stopping at the end of text."""
    generator = Generator(smollm2, engine, cache_len=CACHE_LEN)
    for case in smollm2_truth["cases"][:2]:
        expected = case["greedy_ids"][: case["greedy_ids"].index(2)]
        assert list(generator.stream(case["prompt_ids"], 32)) == expected


def test_bf16_where_the_margin_is_clear(engine, smollm2_bf16, smollm2_truth) -> None:
    """Teacher-forced: bf16 may flip close decisions, but none with a margin above 0.5."""
    model, cases = smollm2_bf16, smollm2_truth["cases"]
    sequences = [case["prompt_ids"] + case["greedy_ids"] for case in cases]
    tokens = np.zeros((len(cases), max(map(len, sequences))), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence

    def predict(params: nnx.State, tokens: jax.Array) -> jax.Array:
        decoder = nnx.merge(model.graphdef, params)
        hidden, _ = decoder(tokens, init_cache(model.config, *tokens.shape), 0)
        return jnp.argmax(decoder.logits(hidden), axis=-1)

    predicted = np.asarray(engine(predict)(model.params, tokens))
    checked = 0
    for row, case in zip(predicted, cases, strict=True):
        start = len(case["prompt_ids"]) - 1
        found = row[start : start + len(case["greedy_ids"])]
        clear = np.array(case["margins"]) > 0.5
        np.testing.assert_array_equal(found[clear], np.array(case["greedy_ids"])[clear])
        checked += int(clear.sum())
    assert checked == 90


@MPK
def test_bf16_decode_step(engine, smollm2_bf16, smollm2_truth) -> None:
    """The bf16 step itself, over the first text."""
    case = smollm2_truth["cases"][0]
    decode_step = engine(step_functions(smollm2_bf16.graphdef).decode_step, donate_argnums=1)
    cache = init_cache(smollm2_bf16.config, 1, CACHE_LEN)
    sequence = case["prompt_ids"] + case["greedy_ids"]
    predicted = []
    for pos, token in enumerate(sequence[:-1]):
        logits, cache = decode_step(smollm2_bf16.params, cache, np.array([token], np.int32), np.int32(pos))
        predicted.append(int(np.argmax(logits)))
    clear = np.array(case["margins"]) > 0.5
    found = np.array(predicted[len(case["prompt_ids"]) - 1 :])
    np.testing.assert_array_equal(found[clear], np.array(case["greedy_ids"])[clear])
