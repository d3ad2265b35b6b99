"""Sentence similarity from the command line.

python -m models.similarity "A man is eating food." "Someone has lunch."
"""

import argparse
from collections.abc import Sequence

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from models.encoder import Encoder, EncoderConfig, embed_function
from models.engines import DTYPES, ENGINES, Compile, compiler
from models.fetch import fetch_minilm
from models.loading import Loaded, load_encoder
from models.tokenizer import Tokenizer

_EXAMPLES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Compilers lower array programs to GPU kernels.",
)


def pad_batch(tokenizer: Tokenizer, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes sentences into one rectangle.

    Returns:
        Ids int32[batch, T] and mask bool[batch, T], where T is the length of the longest sentence
        rounded up to a multiple of 16, so that similar batches share one compilation.
    """
    rows = [tokenizer.encode(sentence) for sentence in sentences]
    length = -(-max(map(len, rows)) // 16) * 16
    tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(rows), length), np.bool_)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    return tokens, mask


def embed_sentences(
    model: Loaded[EncoderConfig, Encoder], sentences: Sequence[str], compile_: Compile = jax.jit
) -> np.ndarray:
    """Embeds sentences as one batch.

    Args:
        model: the encoder.
        sentences: at least one.
        compile_: `jax.jit` or `jax_mpk.megakernelize`.

    Returns:
        f32[batch, hidden_size], of unit length; their dot products are cosine similarities.
    """
    tokens, mask = pad_batch(model.tokenizer, sentences)
    return np.asarray(compile_(embed_function(model.graphdef))(model.params, tokens, mask))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; `argv` as for `argparse`."""
    parser = argparse.ArgumentParser(prog="python -m models.similarity", description="Cosine similarity of sentences.")
    add = parser.add_argument
    add("sentences", nargs="*", default=_EXAMPLES)
    add("--model", help="checkpoint directory or Hub id (default: all-MiniLM-L6-v2)")
    add("--dtype", choices=DTYPES, default="f32", help="of weights and activations")
    add("--engine", choices=ENGINES, default="mpk", help="one persistent kernel, or plain jax.jit")
    options = parser.parse_args(argv)

    model = load_encoder(options.model or fetch_minilm(), dtype=DTYPES[options.dtype])
    embeddings = embed_sentences(model, options.sentences, compiler(options.engine))
    table = Table("sentence", *(str(i + 1) for i in range(len(options.sentences))), box=None)
    for i, (sentence, row) in enumerate(zip(options.sentences, embeddings @ embeddings.T)):
        table.add_row(f"{i + 1}  {sentence}", *(f"{cosine:.3f}" for cosine in row))
    Console().print(table)


if __name__ == "__main__":
    main()
