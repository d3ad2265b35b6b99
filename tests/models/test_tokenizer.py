"""Tokenizers built from GGUF metadata and from Hugging Face directories."""

import json

import pytest

from models import tokenizer
from tests.models.support import tokenizer_metadata

TEXTS = [
    "hello world",
    "  two  spaces\n\n\tand tabs ",
    "I'LL say it's 1234567 o'clock!?",
    "naïve Zürich — 東京 🦙👩‍🚀",
    "",
]

PRE_TOKENIZERS = ["gpt-2", "smollm", "llama-bpe", "qwen2"]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(pre, text) -> None:
    tok = tokenizer.from_gguf(tokenizer_metadata(pre))
    assert tok.decode(tok.encode(text), skip_special=True) == text


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_the_same_text(text) -> None:
    tok = tokenizer.from_gguf(tokenizer_metadata())
    push = tok.stream()
    pieces = [push(token) for token in tok.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        # The rule of GPT-2 and SmolLM knows contractions in lower case only.
        ("gpt-2", ["I", "'", "LL", "Ġsay", "Ġ1234", ",", "ĠĊ", "Ċ", "ok"]),
        ("smollm", ["I", "'", "LL", "Ġsay", "Ġ", "1", "2", "3", "4", ",", "ĠĊ", "Ċ", "ok"]),
        ("llama-bpe", ["I", "'LL", "Ġsay", "Ġ", "123", "4", ",", "ĠĊĊ", "ok"]),
        ("qwen2", ["I", "'LL", "Ġsay", "Ġ", "1", "2", "3", "4", ",", "ĠĊĊ", "ok"]),
    ],
)
def test_words(pre, words) -> None:
    split = tokenizer.from_gguf(tokenizer_metadata(pre)).backend.pre_tokenizer
    found = split.pre_tokenize_str("I'LL say 1234, \n\nok")
    assert [word for word, _ in found] == words


def test_merges_and_special_tokens() -> None:
    metadata = tokenizer_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tok = tokenizer.from_gguf(metadata)
    ids = tok.encode("hello<|end|> w<tool>")
    assert [tokens[i] for i in ids] == ["hello", "<|end|>", "Ġw", "<tool>"]
    assert tok.decode(ids) == "hello<|end|> w<tool>"
    # User-defined tokens are text, control tokens are not.
    assert tok.decode(ids, skip_special=True) == "hello w<tool>"
    assert tok.eos_ids == {tokens.index("<|end|>"), tokens.index("<|eot|>")}
    assert tok.pad_id == tokens.index("<|end|>")


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("smollm", False)])
def test_whole_words_without_merges(pre, whole) -> None:
    """Llama 3 takes "123" from the vocabulary although no merge makes it."""
    metadata = tokenizer_metadata(pre, add_bos_token=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = tokenizer.from_gguf(metadata).encode("123")
    assert [tokens[i] for i in ids] == (["123"] if whole else ["1", "2", "3"])


@pytest.mark.parametrize(
    ("pre", "changes", "starts"),
    [
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("smollm", {}, False),
        ("smollm", {"add_bos_token": True}, True),
    ],
)
def test_beginning_of_text(pre, changes, starts) -> None:
    tok = tokenizer.from_gguf(tokenizer_metadata(pre, **changes))
    bos = tok.backend.token_to_id("<|start|>")
    assert (tok.encode("hello")[0] == bos) == starts
    assert tok.encode("hello", add_special=False)[0] != bos


def test_normal_form() -> None:
    """Qwen's tokenizer composes accents, the others leave the text alone."""
    for pre, text in (("qwen2", "\u00e9"), ("llama-bpe", "e\u0301")):
        tok = tokenizer.from_gguf(tokenizer_metadata(pre))
        assert tok.decode(tok.encode("e\u0301"), skip_special=True) == text


TEMPLATE = """\
{%- if messages[0].role == 'assistant' %}{{ raise_exception('who asked?') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- bos_token + message.role + ':' + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ bos_token }}assistant:{% endif %}"""


def test_chat() -> None:
    metadata = tokenizer_metadata("llama-bpe") | {"tokenizer.chat_template": TEMPLATE}
    tok = tokenizer.from_gguf(metadata)
    ids = tok.encode_chat([{"role": "skip", "content": ""}, {"role": "user", "content": "hello"}])
    # The beginning-of-text token comes from the template, not a second time from the tokenizer.
    assert tok.decode(ids) == "<|start|>user:hello<|end|><|start|>assistant:"
    with pytest.raises(ValueError, match="who asked"):
        tok.encode_chat([{"role": "assistant", "content": ""}])


def test_chat_without_template() -> None:
    tok = tokenizer.from_gguf(tokenizer_metadata())
    with pytest.raises(ValueError, match="no chat template"):
        tok.encode_chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": "llama"}, "model 'llama'"), ({"pre": "tekken"}, "pre-tokenizer 'tekken'")],
)
def test_unsupported(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.from_gguf(tokenizer_metadata(**changes))


@pytest.mark.parametrize(("eos", "expected"), [(None, {263}), (264, {264}), ([263, 264], {263, 264})], ids=str)
def test_directory(tmp_path, eos, expected) -> None:
    """Padding and truncation in the file are switched off; the ids come from the other files."""
    made = tokenizer.from_gguf(tokenizer_metadata())
    text = "hello w hello w hello"
    ids = made.encode(text)
    made.backend.enable_padding(length=32)
    made.backend.enable_truncation(4)
    made.backend.save(str(tmp_path / "tokenizer.json"))
    options = {
        "bos_token": "<|start|>",
        "eos_token": {"content": "<|end|>", "special": True},
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))

    tok = tokenizer.from_directory(tmp_path)
    assert tok.encode(text) == ids
    assert tok.eos_ids == expected
    assert tok.decode(tok.encode_chat([{"role": "user", "content": "he"}])) == "<|start|>he"

    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    tok = tokenizer.from_directory(tmp_path)
    assert tok.decode(tok.encode_chat([])) == "<|end|>"


def test_directory_without_tokenizer(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        tokenizer.from_directory(tmp_path)
