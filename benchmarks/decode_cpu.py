"""One decode step of SmolLM2-135M on the CPU: jax_mpk against jax.jit, called per token and in a loop inside.

    python -m benchmarks.decode_cpu
    python -m benchmarks.decode_cpu --dtypes f32 --systems jit,mpk --rounds 3

Every system continues the same prompt greedily from the same cache. A row is only written if the system's text is what
jax.jit would have written: under jax.jit's logits for that text, each token must be the best one, or as good as the
best one up to rounding.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import harness
from benchmarks.decode_systems import JaxSystem, Setting
from models.decoder import Decoder, DecoderConfig, init_cache, step_functions
from models.engines import DTYPES, compiler
from models.fetch import fetch_smollm2
from models.loading import Loaded, load_decoder

SYSTEMS = ("jit", "jit_loop", "mpk", "mpk_loop")
PROMPT = "The history of the printing press begins in the city of Mainz, where a goldsmith"
# How far below the best logit a token may be that rounding made the winner.
TOLERANCE = {"f32": 1e-3, "bf16": 0.5}
COLUMNS = (
    "system",
    "dtype",
    "ms_per_step",
    "spread",
    "bytes_per_step",
    "tb_per_s",
    "read_tb_per_s",
    "fraction_of_roofline",
)


def make_system(
    name: str, model: Loaded[DecoderConfig, Decoder], cache_len: int, prompt: list[int], steps: int
) -> JaxSystem:
    """Compiles one system and fills its cache with the prompt.

    Args:
        name: one of `SYSTEMS`.
        model: the language model.
        cache_len: positions in the cache.
        prompt: token ids; the last one is the first step's input.
        steps: tokens to choose in one run.
    """
    tokens = jnp.asarray([prompt], jnp.int32)
    prefill = jax.jit(step_functions(model.graphdef).prefill, donate_argnums=1)
    _, cache = prefill(model.params, init_cache(model.config, 1, cache_len), tokens, np.int32(len(prompt)))
    start = len(prompt) - 1
    setting = Setting("", model.config, model.graphdef, model.params, cache, tokens[:, -1], start, steps)
    return JaxSystem(setting, compiler(name.partition("_")[0]), loop=name.endswith("_loop"))


def faults(model: Loaded[DecoderConfig, Decoder], prompt: list[int], chosen: np.ndarray, tolerance: float) -> str:
    """What is wrong with a system's text, in words, or ""."""

    def every_logit(params: nnx.State, tokens: jax.Array) -> jax.Array:
        decoder = nnx.merge(model.graphdef, params)
        hidden, _ = decoder(tokens, init_cache(model.config, 1, tokens.shape[1]), 0)
        return decoder.logits(hidden)

    text = np.asarray([[*prompt, *chosen[:-1]]], np.int32)
    logits = np.asarray(jax.jit(every_logit)(model.params, text))[0, len(prompt) - 1 :]
    behind = logits.max(axis=-1) - np.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
    if (wrong := np.flatnonzero(~(behind <= tolerance))).size:
        at = int(wrong[0])
        return f"token {at} is {chosen[at]}, {behind[at]:.3g} below the best logit"
    return ""


def step_bytes(model: Loaded[DecoderConfig, Decoder], live: float) -> int:
    """Bytes a step must read: every weight once, of the embedding table the head's use, and the live cache."""
    config = model.config
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    return round(weights + row * live)


def measure(
    options: argparse.Namespace, dtype: str, read: harness.StreamingRead
) -> tuple[list[harness.Row], list[str]]:
    """Rows of all systems in one dtype, and what was wrong with the others."""
    model = load_decoder(options.model or fetch_smollm2(), dtype=DTYPES[dtype])
    prompt = model.tokenizer.encode(PROMPT)
    # A longer prompt, of the same words over and over, for a fuller cache.
    prompt = (prompt * options.cache_len)[: options.prompt_len]
    systems = {
        name: make_system(name, model, options.cache_len, prompt, options.steps) for name in options.systems.split(",")
    }
    wrong = []
    for name, system in list(systems.items()):
        if fault := faults(model, prompt, system.tokens()[:, 0], TOLERANCE[dtype]):
            wrong.append(f"{name} {dtype}: {fault}")
            del systems[name]
    runs: dict[str, Callable[[], Any]] = {name: system.run for name, system in systems.items()}
    timings = harness.interleave(
        {**runs, "read": read}, rounds=options.rounds, repetitions={**dict.fromkeys(runs, options.steps), "read": 1}
    )
    # The machine at its best: a neighbour that slows the reading down must not flatter the systems.
    read_rate = read.nbytes / min(timings["read"].samples)
    live = len(prompt) + (options.steps - 1) / 2
    nbytes = step_bytes(model, live)
    rows = []
    for name, system in systems.items():
        rate = nbytes / timings[name].median
        rows.append(
            {
                "system": name,
                "model": "SmolLM2-135M" if options.model is None else Path(options.model).name,
                "batch": 1,
                "kv_len": round(live),
                "cache_len": options.cache_len,
                "dtype": dtype,
                "ms_per_step": 1e3 * timings[name].median,
                "spread": timings[name].spread,
                "bytes_per_step": nbytes,
                "tb_per_s": rate / 1e12,
                "read_tb_per_s": read_rate / 1e12,
                "fraction_of_roofline": rate / read_rate,
                "compile_s": system.compile_s,
            }
        )
    return rows, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 if a system's output was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_cpu", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", help="GGUF file or checkpoint directory (default: SmolLM2-135M)")
    add("--systems", default=",".join(SYSTEMS), help=f"some of {', '.join(SYSTEMS)}")
    add("--dtypes", default="f32,bf16")
    add("--cache-len", type=int, default=256)
    add("--prompt-len", type=int, default=120, help="positions in use before the first step")
    add("--steps", type=int, default=16, help="steps per sample")
    add("--rounds", type=int, default=7, help="samples of each system")
    add("--out", type=Path, default=harness.RESULTS / "decode_cpu.json")
    options = parser.parse_args(argv)
    read = harness.StreamingRead()
    rows: list[harness.Row] = []
    wrong: list[str] = []
    for dtype in options.dtypes.split(","):
        found, faulty = measure(options, dtype, read)
        rows += found
        wrong += faulty
        print(harness.table(found, COLUMNS), flush=True)
    harness.write(rows, options.out, left_out=wrong)
    for fault in wrong:
        print(f"left out: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
