"""Text generation from the command line.

    python -m models.generate "The capital of France is"
    python -m models.generate --chat --temperature 0.8 --top-p 0.95 "Write a haiku about kernels."

Each token is one call of one compiled function: the forward pass, the cache write and the choice
of the next token. Text goes to stdout as it comes, everything else to stderr.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from models.decoder import Cache, Decoder, DecoderConfig, init_cache, step_functions
from models.engines import DTYPES, ENGINES, Compile, compiler
from models.fetch import fetch_smollm2
from models.loading import Loaded, load_decoder
from models.sampling import Sampling, sample

Step = Callable[..., tuple[jax.Array, Cache, jax.Array]]


def sampling_steps(graphdef: nnx.GraphDef[Decoder], sampling: Sampling) -> tuple[Step, Step]:
    """Makes the two functions that a generation loop calls.

    Args:
        graphdef: from `nnx.split` of the decoder.
        sampling: how tokens are chosen.

    Returns:
        first(params, cache, tokens int32[batch, T], length int32, seed uint32), which reads a
        prompt, and following(params, cache, tokens int32[batch], pos int32, seed uint32), which
        reads one token. Both return the chosen tokens int32[batch], the cache and the position of
        the chosen tokens int32, so that a loop feeds results back without touching them.
    """
    prefill, decode_step = step_functions(graphdef)

    def choose(logits: jax.Array, pos: jax.Array, seed: jax.Array) -> jax.Array:
        # Folding in the position gives every step its own numbers with no key to carry along.
        return sample(logits, jax.random.fold_in(jax.random.key(seed), pos), sampling)

    def first(
        params: nnx.State, cache: Cache, tokens: jax.Array, length: jax.Array, seed: jax.Array
    ) -> tuple[jax.Array, Cache, jax.Array]:
        logits, cache = prefill(params, cache, tokens, length)
        return choose(logits, length, seed), cache, length

    def following(
        params: nnx.State, cache: Cache, tokens: jax.Array, pos: jax.Array, seed: jax.Array
    ) -> tuple[jax.Array, Cache, jax.Array]:
        logits, cache = decode_step(params, cache, tokens, pos)
        return choose(logits, pos + 1, seed), cache, pos + 1

    return first, following


class Generator:
    """A model, its compiled steps and one cache, reused from text to text."""

    def __init__(
        self,
        model: Loaded[DecoderConfig, Decoder],
        compile_: Compile = jax.jit,
        *,
        sampling: Sampling | None = None,
        cache_len: int = 512,
        seed: int = 0,
    ) -> None:
        """Prepares both steps; they compile when first called.

        Args:
            model: the language model.
            compile_: `jax.jit` or `jax_mpk.megakernelize`.
            sampling: how tokens are chosen; greedily if not given.
            cache_len: positions in the cache, prompt and answer together.
            seed: of the random choices; the same seed gives the same text.

        Raises:
            ValueError: the cache is longer than the context the model was trained for.
        """
        limit = model.config.max_positions
        if not 0 < cache_len <= limit:
            raise ValueError(f"cache_len={cache_len}, but the model takes 1 to {limit} positions")
        first, following = sampling_steps(model.graphdef, sampling or Sampling())
        # The cache is donated: it is updated in place and never copied.
        self._first = compile_(first, donate_argnums=1)
        self._following = compile_(following, donate_argnums=1)
        self._params = model.params
        self._cache = init_cache(model.config, 1, cache_len)
        self._cache_len = cache_len
        self._eos_ids = model.tokenizer.eos_ids
        self._pad_id = model.tokenizer.pad_id
        self._seed = np.uint32(seed)

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Yields the ids that follow the prompt, each as soon as it is known.

        Ends after `max_tokens` or before an end-of-text token. One stream at a time.

        Args:
            prompt: ids, at least one.
            max_tokens: how many ids to yield at most.

        Raises:
            ValueError: the prompt is empty, or prompt and answer do not fit into the cache.
        """
        if not prompt:
            raise ValueError("the prompt has no tokens")
        # The last token is only yielded, never fed back.
        needed = len(prompt) + max_tokens - 1
        if needed > self._cache_len:
            raise ValueError(
                f"{len(prompt)} prompt tokens and {max_tokens} new ones need {needed} positions, "
                f"but the cache has {self._cache_len}"
            )
        token, pos = self._prefill(prompt)
        for left in range(max_tokens, 0, -1):
            current = token
            if left > 1:
                # Dispatched before the current id is read, so the device does not wait for us.
                token, self._cache, pos = self._following(self._params, self._cache, token, pos, self._seed)
            # A copy, not an index operation: that would queue up behind the step just dispatched.
            if (value := int(np.asarray(current)[0])) in self._eos_ids:
                return
            yield value

    def warm_up(self, prompt_len: int) -> float:
        """Compiles both steps for prompts of this many tokens; returns the seconds it took."""
        start = time.perf_counter()
        token, pos = self._prefill([self._pad_id] * prompt_len)
        if prompt_len < self._cache_len:
            token, self._cache, _ = self._following(self._params, self._cache, token, pos, self._seed)
        token.block_until_ready()
        return time.perf_counter() - start

    def _prefill(self, prompt: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        # Powers of two, so that prompts of similar length share one compilation.
        length = min(max(16, 1 << (len(prompt) - 1).bit_length()), self._cache_len)
        tokens = np.full((1, length), self._pad_id, np.int32)
        tokens[0, : len(prompt)] = prompt
        token, self._cache, pos = self._first(
            self._params, self._cache, jnp.asarray(tokens), np.int32(len(prompt)), self._seed
        )
        return token, pos


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.generate", description="Generate text, one kernel per token."
    )
    add = parser.add_argument
    add("prompt", nargs="?", default="The capital of France is")
    add("--model", help="GGUF file, checkpoint directory or Hub id (default: SmolLM2-135M)")
    add("--chat", action="store_true", help="put the prompt into the model's chat template")
    add("--max-tokens", type=int, default=64)
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    add("--top-k", type=int, help="sample among the k most likely tokens")
    add("--top-p", type=float, default=1.0, help="sample among tokens of this total probability")
    add("--seed", type=int, default=0)
    add("--dtype", choices=DTYPES, default="f32", help="of weights, activations and cache")
    add("--cache-len", type=int, default=512, help="positions for prompt and answer together")
    add("--engine", choices=ENGINES, default="mpk", help="one persistent kernel, or plain jax.jit")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; `argv` as for `argparse`."""
    options = _parse(argv)
    console = Console(stderr=True, highlight=False)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    model = load_decoder(options.model or fetch_smollm2(), dtype=DTYPES[options.dtype])

    tokenizer = model.tokenizer
    if options.chat:
        prompt = tokenizer.encode_chat([{"role": "user", "content": options.prompt}])
    else:
        prompt = tokenizer.encode(options.prompt)
    generator = Generator(
        model,
        compiler(options.engine),
        sampling=sampling,
        cache_len=options.cache_len,
        seed=options.seed,
    )
    with console.status("Compiling"):
        compile_s = generator.warm_up(len(prompt))

    if not options.chat:
        print(options.prompt, end="", flush=True)
    detokenize = tokenizer.stream(skip_special=True)
    arrivals = [time.perf_counter()]
    for token in generator.stream(prompt, options.max_tokens):
        arrivals.append(time.perf_counter())
        print(detokenize(token), end="", flush=True)
    print()
    console.print(_report(len(prompt), arrivals, compile_s), style="dim", soft_wrap=True)


def _report(prompt_len: int, arrivals: Sequence[float], compile_s: float) -> str:
    """One line of figures; `arrivals` are the start and the time of each token, in seconds."""
    count = len(arrivals) - 1
    parts = [f"prompt {prompt_len} tokens", f"answer {count} tokens"]
    if count:
        parts.append(f"first token after {1e3 * (arrivals[1] - arrivals[0]):.1f} ms")
    if count > 1:
        parts.append(f"then {(count - 1) / (arrivals[-1] - arrivals[1]):.1f} tokens/s")
    return ", ".join([*parts, f"compiled in {compile_s:.1f} s"])


if __name__ == "__main__":
    main()
