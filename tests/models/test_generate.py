"""The generation loop and its command line, on tiny random models."""

import dataclasses

import jax
import numpy as np
import pytest

from models import generate
from models.decoder import init_cache, step_functions
from models.generate import Generator
from models.loading import Loaded
from models.sampling import Sampling
from models.tokenizer import Tokenizer, from_gguf
from tests.models.support import TINY_DECODER, random_decoder, tokenizer_metadata

CONFIG = dataclasses.replace(TINY_DECODER, vocab_size=266)
PROMPT = [5, 9, 200]


@pytest.fixture(scope="module")
def model() -> Loaded:
    # No token ends a text, so that lengths are known.
    tokenizer = Tokenizer(from_gguf(tokenizer_metadata()).backend)
    return Loaded(CONFIG, *random_decoder(CONFIG), tokenizer)


@pytest.fixture(scope="module")
def greedy_answer(model) -> list[int]:
    """Sixteen tokens, each from a forward pass over everything before it."""
    prefill = jax.jit(step_functions(model.graphdef).prefill)
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(PROMPT)] = PROMPT
    answer: list[int] = []
    for length in range(len(PROMPT), len(PROMPT) + 16):
        logits, _ = prefill(model.params, init_cache(CONFIG, 1, 32), tokens, np.int32(length))
        answer.append(int(np.argmax(logits)))
        tokens[0, length] = answer[-1]
    return answer


def test_greedy(engine, model, greedy_answer) -> None:
    """Twice: the second text must not see what the first one left in the cache."""
    generator = Generator(model, engine, cache_len=32)
    assert list(generator.stream(PROMPT, 16)) == greedy_answer
    assert list(generator.stream(PROMPT, 16)) == greedy_answer


def test_fills_the_cache_to_the_end(engine, model, greedy_answer) -> None:
    generator = Generator(model, engine, cache_len=len(PROMPT) + 15)
    assert list(generator.stream(PROMPT, 16)) == greedy_answer
    with pytest.raises(ValueError, match="3 prompt tokens and 17 new ones need 19 positions"):
        next(generator.stream(PROMPT, 17))


def test_stops_at_the_end_of_text(model, greedy_answer) -> None:
    stop = greedy_answer[6]
    tokenizer = Tokenizer(model.tokenizer.backend, eos_ids=[stop])
    generator = Generator(dataclasses.replace(model, tokenizer=tokenizer), cache_len=32)
    expected = greedy_answer[: greedy_answer.index(stop)]
    assert list(generator.stream(PROMPT, 16)) == expected
    # The cache survives a text that ended early.
    assert list(generator.stream(PROMPT, 16)) == expected


@pytest.mark.slow
def test_warm_up_changes_nothing(engine, model, greedy_answer) -> None:
    generator = Generator(model, engine, cache_len=32)
    assert generator.warm_up(len(PROMPT)) > 0
    assert list(generator.stream(PROMPT, 16)) == greedy_answer


@pytest.mark.slow
def test_seed(engine, model) -> None:
    sampling = Sampling(temperature=2.0, top_k=50, top_p=0.95)

    def answer(seed: int) -> list[int]:
        generator = Generator(model, engine, sampling=sampling, cache_len=32, seed=seed)
        return list(generator.stream(PROMPT, 12))

    first, again, other = answer(1), answer(1), answer(2)
    assert first == again != other
    assert len(set(first)) > 1


@pytest.mark.slow
def test_engines_sample_alike(engine, model) -> None:
    sampling = Sampling(temperature=1.0)
    answers = [
        list(Generator(model, compile_, sampling=sampling, cache_len=32).stream(PROMPT, 12))
        for compile_ in (engine, jax.jit)
    ]
    assert answers[0] == answers[1]


def test_nothing_to_generate(model) -> None:
    generator = Generator(model, cache_len=32)
    assert list(generator.stream(PROMPT, 0)) == []
    with pytest.raises(ValueError, match="no tokens"):
        next(generator.stream([], 4))


@pytest.mark.parametrize("cache_len", [0, 65])
def test_bad_cache_length(model, cache_len) -> None:
    with pytest.raises(ValueError, match="takes 1 to 64 positions"):
        Generator(model, cache_len=cache_len)


def test_command_line(model, monkeypatch, capsys) -> None:
    loaded = []

    def load(source, **options) -> Loaded:
        loaded.append((source, options))
        return model

    monkeypatch.setattr(generate, "load_decoder", load)
    command = ["hello", "--engine", "jit", "--model", "x.gguf", "--cache-len", "48"]
    generate.main([*command, "--max-tokens", "4", "--dtype", "bf16"])
    out, err = capsys.readouterr()
    prompt = model.tokenizer.encode("hello")
    answer = list(Generator(model, cache_len=48).stream(prompt, 4))
    assert out == "hello" + model.tokenizer.decode(answer, skip_special=True) + "\n"
    assert f"prompt {len(prompt)} tokens, answer 4 tokens, first token after" in err
    assert loaded == [("x.gguf", {"dtype": jax.numpy.bfloat16})]


@pytest.mark.weights
def test_demo(capsys) -> None:
    """What a new user runs first."""
    generate.main(["--max-tokens", "8", "--cache-len", "64"])
    assert capsys.readouterr().out.startswith("The capital of France is Paris.")
