"""One decode step of a language model on one device: jax_mpk, jax.jit and PyTorch, against the device's read bandwidth.

    python -m benchmarks.decode --model llama-3.2-1b --batch 1 --peers jax,torch
    python -m benchmarks.decode --model qwen3-0.6b,qwen3-8b --batch 1,8,16 --peers jax --out FILE

A step is everything from a token to the next one: embedding, layers, head, argmax, cache write. Models have the shape
of the one they are named after and random weights, except SmolLM2. Every system takes the same steps from the same
cache; a row is only written if what it gave in the timed run agrees with jax.jit (`decode_check`).
"""

import argparse
import contextlib
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bandwidth, harness
from benchmarks.decode_check import Check
from benchmarks.decode_systems import JaxSystem, Setting, System, TorchSystem
from benchmarks.shapes import SHAPES, first_tokens, random_cache, random_params, step_bytes
from models.decoder import init_cache, step_functions

SMOLLM2 = "smollm2-135m"
MPK = ("mpk", "mpk_loop")
PEERS = {"jax": ("jit", "jit_loop"), "torch": ("torch",)}
# What the prompt of a model with real weights says, over and over.
PROMPT = "The history of the printing press begins in the city of Mainz, where a goldsmith"
COLUMNS = (
    "model",
    "batch",
    "system",
    "ms_per_step",
    "spread",
    "bytes_per_step",
    "tb_per_s",
    "read_tb_per_s",
    "fraction_of_roofline",
    "compile_s",
)


def make_setting(options: argparse.Namespace, model: str, batch: int) -> Setting:
    """A model and where its steps start: around `options.position`, on average."""
    start = options.position - options.steps // 2
    if not 0 < start <= start + options.steps <= options.cache_len:
        raise SystemExit(f"{options.steps} steps around position {options.position} do not fit into the cache")
    if model != SMOLLM2:
        config = SHAPES[model]
        graphdef, params = random_params(config)
        cache = random_cache(config, batch, options.cache_len)
        token = jnp.asarray(first_tokens(config, batch))
        return Setting(model, config, graphdef, params, cache, token, start, options.steps, random=True)
    # Here, because checkpoints need packages that random weights do not.
    from models.fetch import fetch_smollm2
    from models.loading import load_decoder

    loaded = load_decoder(options.weights or fetch_smollm2(), dtype=jnp.bfloat16)
    text = loaded.tokenizer.encode(PROMPT) * options.cache_len
    # Every sequence of the batch begins at another word.
    prompt = jnp.asarray([text[i : i + start + 1] for i in range(batch)], jnp.int32)
    prefill = jax.jit(step_functions(loaded.graphdef).prefill)
    cache = init_cache(loaded.config, batch, options.cache_len)
    _, cache = prefill(loaded.params, cache, prompt[:, :start], jnp.int32(start))
    return Setting(model, loaded.config, loaded.graphdef, loaded.params, cache, prompt[:, start], start, options.steps)


def make_system(name: str, setting: Setting, options: argparse.Namespace) -> System:
    """Compiles one of JAX's systems and runs it once."""
    loop = name.endswith("_loop")
    if name in PEERS["jax"]:
        return JaxSystem(setting, jax.jit, loop=loop)
    # Here, so that the peers can be measured without the native library.
    import jax_mpk

    place = getattr(jax_mpk, "place", None) if options.place else None
    return JaxSystem(setting, jax_mpk.megakernelize, loop=loop, place=place)


def measure(
    setting: Setting, names: Sequence[str], options: argparse.Namespace, read: bandwidth.Read
) -> tuple[list[harness.Row], list[str]]:
    """Rows of all systems, and what was wrong with those that have none."""
    wrong: list[str] = []
    systems: dict[str, System] = {}

    def attempt(name: str, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except Exception as error:  # One system that fails says nothing about the others.
            traceback.print_exc()
            systems.pop(name, None)
            wrong.append(f"{name}, {setting.model}, batch {setting.batch}: {type(error).__name__}: {error}")
            return None

    with contextlib.ExitStack() as stack:
        if "torch" in names:
            # First, since importing PyTorch takes a while; it waits to be started.
            torch = stack.enter_context(contextlib.closing(TorchSystem(setting, options.torch_mode)))
        for name in names:
            begin = time.perf_counter()
            make = torch.start if name == "torch" else functools.partial(make_system, name, setting, options)
            if system := attempt(name, make):
                systems[name] = system
            print(f"  {name} after {time.perf_counter() - begin:.1f} s", flush=True)
        runs: dict[str, Callable[[], Any]] = {name: system.run for name, system in systems.items()}
        repetitions = {**dict.fromkeys(runs, options.steps), "read": 1}
        timings = harness.interleave({**runs, "read": read}, rounds=options.rounds, repetitions=repetitions)
        check = Check(setting)
        rows = []
        for name, system in list(systems.items()):
            if (checked := attempt(name, functools.partial(check, system))) is None:
                continue
            figures, fault = checked
            if fault:
                wrong.append(f"{name}, {setting.model}, batch {setting.batch}: {fault}")
            else:
                rows.append(row(name, system, setting, timings[name], read) | figures)
    return rows, wrong


def row(name: str, system: System, setting: Setting, timing: harness.Timing, read: bandwidth.Read) -> harness.Row:
    """What is known of one system's speed."""
    nbytes = step_bytes(setting.config, setting.batch, setting.positions)
    way, read_rate = max(read.rates.items(), key=lambda item: item[1])
    rate = nbytes / timing.median
    return {
        "system": name,
        "method": system.method,
        "model": setting.model,
        "weights": "random" if setting.random else "real",
        "batch": setting.batch,
        "kv_len": round(float(np.mean(setting.positions)) + 1, 1),
        "cache_len": setting.cache[0][0].shape[1],
        "steps": setting.steps,
        "rounds": len(timing.samples),
        "dtype": "bf16",
        "ms_per_step": 1e3 * timing.median,
        "best_ms_per_step": 1e3 * min(timing.samples),
        "spread": timing.spread,
        "bytes_per_step": round(nbytes),
        "tb_per_s": rate / 1e12,
        "read_tb_per_s": read_rate / 1e12,
        "read_method": way,
        "fraction_of_roofline": rate / read_rate,
        "compile_s": system.compile_s,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; lists are separated by commas."""

    def names(*known: str) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            found = [name for name in text.split(",") if name]
            if unknown := set(found) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose some of {', '.join(known)}")
            return found

        return split

    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", type=names(*SHAPES, SMOLLM2), default=["llama-3.2-1b"], help=", ".join((*SHAPES, SMOLLM2)))
    add("--batch", type=lambda text: [int(b) for b in text.split(",")], default=[1], help="sequences")
    add("--systems", type=names(*MPK), default=list(MPK), help="ways to use jax_mpk; '' for none")
    add("--peers", type=names(*PEERS), default=["jax"], help=f"some of {', '.join(PEERS)}")
    add("--place", action=argparse.BooleanOptionalAction, default=True, help="give jax_mpk the layouts it likes best")
    add("--torch-mode", default="default", help="of torch.compile: default, max-autotune-no-cudagraphs, or eager")
    add("--weights", help=f"GGUF file or checkpoint directory of {SMOLLM2} (default: fetched)")
    add("--cache-len", type=int, default=1024)
    add("--position", type=int, default=512, help="the steps lie around this one")
    add("--steps", type=int, default=128, help="steps per sample")
    add("--rounds", type=int, default=9, help="samples of each system")
    add("--read-bytes", type=int, default=1 << 32, help="how much is read to measure the read bandwidth")
    add("--commit", help="the checkout's commit, where there is no git")
    add("--out", type=Path, default=harness.RESULTS / "decode.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 if a system failed or was wrong."""
    options = parse(argv)
    # PyTorch's process and the plain reading need room on the device beside JAX.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    systems = [*options.systems, *(name for peer in options.peers for name in PEERS[peer])]
    read = bandwidth.make_read(options.read_bytes)
    rows: list[harness.Row] = []
    wrong: list[str] = []
    for model in options.model:
        for batch in options.batch:
            print(f"{model}, batch {batch}", flush=True)
            found, faults = measure(make_setting(options, model, batch), systems, options, read)
            rows += found
            wrong += faults
            print(harness.table(found, COLUMNS), flush=True)
            # After each one, so that what was measured survives a run that is cut short.
            harness.write(rows, options.out, commit=options.commit, left_out=wrong)
    for fault in wrong:
        print(f"left out: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
