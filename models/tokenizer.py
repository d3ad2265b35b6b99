"""Text to token ids and back, from a checkpoint's own metadata."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

# GGUF names the rule that cuts text into words before byte-pair merging, but does not contain it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex(_WORDS.replace("{DIGITS}", digits))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2_words,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()]),
    "llama-bpe": lambda: _split_words("{1,3}"),
    "qwen2": lambda: _split_words(""),
}

# GGUF token types.
_CONTROL, _USER_DEFINED = 3, 4


class Tokenizer:
    """A tokenizer with its special ids and chat template.

    Attributes:
        backend: the `tokenizers` object underneath.
        eos_ids: ids that end a generated text.
        pad_id: id for padding; 0 if the checkpoint names none (padding is masked anyway).
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_ids: Iterable[int] = (),
        pad_id: int | None = None,
        chat_template: str | None = None,
        template_names: Mapping[str, str] | None = None,
    ) -> None:
        """Wraps a tokenizer.

        Args:
            backend: has no padding and no truncation after this call.
            eos_ids: ids that end a generated text.
            pad_id: id for padding, if there is one.
            chat_template: Jinja source that renders `messages`.
            template_names: what the template calls `bos_token`, `eos_token` and the like.
        """
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id or 0
        self._chat_template = chat_template
        self._template_names = dict(template_names or {})

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a text, with the tokens the model expects around it unless told otherwise.

        Special tokens written out in the text are recognised either way.
        """
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of the ids; incomplete UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = False) -> Callable[[int], str]:
        """Returns a function that is fed ids one by one and gives the text each one completes."""
        state = decoders.DecodeStream(skip_special_tokens=skip_special)
        return lambda token: state.step(self.backend, token) or ""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: each with "role" ("system", "user" or "assistant") and "content".

        Raises:
            ValueError: the checkpoint has no chat template, or it refuses the messages.
            ImportError: jinja2 is not installed.
        """
        if self._chat_template is None:
            raise ValueError("this checkpoint has no chat template; give a plain prompt instead")
        text = _render(self._chat_template, messages, self._template_names)
        return self.encode(text, add_special=False)


def _render(template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str]) -> str:
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install jinja2") from error

    def refuse(message: str) -> None:
        raise ValueError(f"the chat template refused the messages: {message}")

    # A template is a program from a downloaded file, hence the sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **names)


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the byte-pair tokenizer described by the metadata of a GGUF file.

    Args:
        metadata: the file's key/value pairs, of which `tokenizer.*` are read.

    Raises:
        ValueError: a tokenizer model or pre-tokenizer that is not supported.
    """

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    kind, words = get("model"), get("pre", "gpt-2")
    if kind != "gpt2":
        raise ValueError(f"GGUF tokenizer model {kind!r} is not supported; only 'gpt2' (BPE) is")
    if words not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ValueError(f"GGUF pre-tokenizer {words!r} is not supported; known are: {known}")

    tokens: list[str] = get("tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
    # Llama 3 takes whole words from its vocabulary even where no merge leads to them.
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        ignore_merges=words == "llama-bpe",
    )
    backend = Backend(bpe)
    if words == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[words]()
    backend.decoder = decoders.ByteLevel()
    for kind_id, add in (
        (_CONTROL, backend.add_special_tokens),
        (_USER_DEFINED, backend.add_tokens),
    ):
        marked = (t for t, k in zip(tokens, get("token_type", ()), strict=False) if k == kind_id)
        add([AddedToken(t, normalized=False, special=kind_id == _CONTROL) for t in marked])

    bos, eos = get("bos_token_id"), get("eos_token_id")
    if get("add_bos_token", words == "llama-bpe") and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    names = {"bos_token": bos, "eos_token": eos}
    return Tokenizer(
        backend,
        eos_ids={i for i in (eos, get("eot_token_id")) if i is not None},
        pad_id=get("padding_token_id"),
        chat_template=metadata.get("tokenizer.chat_template"),
        template_names={name: tokens[i] for name, i in names.items() if i is not None},
    )


def from_directory(directory: Path) -> Tokenizer:
    """Reads `tokenizer.json` and, where present, the JSON files Hugging Face puts beside it.

    Raises:
        FileNotFoundError: there is no `tokenizer.json`.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {directory}")
    backend = Backend.from_file(str(path))

    options = read_json(directory / "tokenizer_config.json")
    names = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = options.get(name)
        # Either the text itself or a serialised AddedToken.
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None:
            names[name] = text

    eos = read_json(directory / "generation_config.json").get("eos_token_id")
    if eos is None:
        eos = backend.token_to_id(names["eos_token"]) if "eos_token" in names else []
    template_file = directory / "chat_template.jinja"
    template = template_file.read_text() if template_file.is_file() else None
    return Tokenizer(
        backend,
        eos_ids=[eos] if isinstance(eos, int) else (eos or []),
        pad_id=backend.token_to_id(names["pad_token"]) if "pad_token" in names else None,
        chat_template=template or options.get("chat_template"),
        template_names=names,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
