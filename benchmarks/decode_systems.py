"""The ways to run N greedy decode steps that the decode benchmarks compare.

Every system starts from the same weights, the same cache and the same token, and keeps what its last run gave: the
tokens it chose and the cache it wrote, so that what is checked is what was timed.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks import harness
from models.decoder import Cache, Decoder, DecoderConfig, step_functions
from models.rope import frequencies
from models.sampling import greedy


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every system starts from.

    Attributes:
        model: its name.
        config: its shape.
        graphdef: the static half of `nnx.split`.
        params: the weights.
        cache: keys and values up to `start`; not donated to anyone.
        token: int32[batch], what the first step reads.
        start: position of `token`.
        steps: how many steps a run takes.
        random: whether weights, cache and token are those of `benchmarks.shapes`.
    """

    model: str
    config: DecoderConfig
    graphdef: nnx.GraphDef[Decoder]
    params: nnx.State
    cache: Cache
    token: jax.Array
    start: int
    steps: int
    random: bool = False

    @property
    def batch(self) -> int:
        return self.token.shape[0]

    @property
    def positions(self) -> range:
        """Of the tokens that the steps read."""
        return range(self.start, self.start + self.steps)


Rows = list[tuple[np.ndarray, np.ndarray]]
"""Keys and values of the new positions for every layer, each [batch, steps, num_kv_heads, head_dim]."""


class System(Protocol):
    """One way to run the steps.

    Attributes:
        method: how, in words.
        compile_s: seconds until the first result.
    """

    method: str
    compile_s: float

    def run(self) -> Any:
        """Runs all steps; returns arrays to wait for, or nothing if there is nothing to wait for."""

    def tokens(self) -> np.ndarray:
        """The tokens that the last run chose, int32[steps, batch]."""

    def rows(self) -> Rows:
        """What the last run wrote into the cache.

        Raises:
            RuntimeError: it also wrote elsewhere.
        """


class JaxSystem:
    """Steps compiled by jax.jit or something called like it."""

    def __init__(
        self,
        setting: Setting,
        compile_: Callable[..., Callable[..., Any]],
        *,
        loop: bool,
        place: Callable[..., Any] | None = None,
    ) -> None:
        """Compiles and runs once.

        Args:
            setting: where to start.
            compile_: `jax.jit` or `jax_mpk.megakernelize`.
            loop: whether one call takes all steps, or one.
            place: `jax_mpk.place`: (compiled, arguments) to the arguments as the compiled function likes them best.
        """
        self.method = "fori_loop over all steps in one call" if loop else "one call per step"
        self._setting, self._loop = setting, loop
        # A flat tuple: what Python spends on a model's tree of weights is not the question here.
        leaves, tree = jax.tree.flatten(setting.params)
        # Not the setting: a compiled function may be kept, and must not keep the weights.
        _, decode_step = step_functions(setting.graphdef)
        count = setting.steps

        def step(
            leaves: tuple[jax.Array, ...], cache: Cache, token: jax.Array, pos: jax.Array
        ) -> tuple[jax.Array, Cache, jax.Array]:
            logits, cache = decode_step(jax.tree.unflatten(tree, leaves), cache, token, pos)
            return greedy(logits), cache, pos + 1

        def steps(
            leaves: tuple[jax.Array, ...], cache: Cache, token: jax.Array, pos: jax.Array
        ) -> tuple[jax.Array, Cache, jax.Array]:
            def body(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
                chosen, token, cache, pos = carry
                token, cache, pos = step(leaves, cache, token, pos)
                return chosen.at[i].set(token), token, cache, pos

            chosen = jnp.zeros((count, *token.shape), token.dtype)
            chosen, _, cache, pos = lax.fori_loop(0, count, body, (chosen, token, cache, pos))
            return chosen, cache, pos

        self._compiled = compile_(steps if loop else step, donate_argnums=1)
        self._cache = jax.tree.map(jnp.copy, setting.cache)
        self._token, self._start = jnp.asarray(setting.token), jnp.int32(setting.start)
        self._leaves = tuple(leaves)
        begin = time.perf_counter()
        if place is not None:
            self._leaves, *_ = place(self._compiled, self._leaves, self._cache, self._token, self._start)
            self.method += ", placed weights"
        jax.block_until_ready(self.run())
        self.compile_s = time.perf_counter() - begin

    def run(self) -> Any:
        if self._loop:
            self._chosen, self._cache, _ = self._compiled(self._leaves, self._cache, self._token, self._start)
            return self._chosen
        token, pos, self._chosen = self._token, self._start, []
        for _ in range(self._setting.steps):
            token, self._cache, pos = self._compiled(self._leaves, self._cache, token, pos)
            self._chosen.append(token)
        return self._chosen

    def tokens(self) -> np.ndarray:
        return np.asarray(self._chosen) if self._loop else np.stack([np.asarray(t) for t in self._chosen])

    def rows(self) -> Rows:
        new = slice(self._setting.start, self._setting.start + self._setting.steps)

        def split(was: jax.Array, now: jax.Array) -> np.ndarray:
            kept = jnp.arange(was.shape[1])[:, None, None]
            kept = (kept < new.start) | (kept >= new.stop)
            if bool(jnp.any(kept & ~((now == was) | (jnp.isnan(now) & jnp.isnan(was))))):
                raise RuntimeError("the cache changed at other positions than those of the steps")
            return np.asarray(now[:, new].astype(jnp.float32))

        return [tuple(map(split, was, now)) for was, now in zip(self._setting.cache, self._cache, strict=True)]


class TorchSystem:
    """The same decoder in PyTorch, compiled and captured as a CUDA graph, in a process of its own.

    Args:
        setting: where to start.
        mode: of `torch.compile`; "eager" for none.

    Raises:
        RuntimeError: the process ended early; what it says is on stderr.
    """

    def __init__(self, setting: Setting, mode: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="torch_decoder_")
        folder = Path(self._folder.name)
        (folder / "setting.json").write_text(json.dumps(_described(setting, mode)))
        if not setting.random:
            np.savez(folder / "given.npz", **_given(setting))
        command = [sys.executable, "-m", "benchmarks.torch_decoder", str(folder)]
        self._process = subprocess.Popen(
            command, cwd=harness.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.compile_s, self.method = 0.0, ""

    def start(self) -> "TorchSystem":
        """Compiles and runs once. Before that, the process only imports what it needs."""
        reply = self._ask("prepare")
        self.method, self.compile_s = reply["method"], reply["compile_s"]
        return self

    def run(self) -> None:
        self._ask("run")

    def tokens(self) -> np.ndarray:
        return self._result()["tokens"]

    def rows(self) -> Rows:
        found = self._result()
        if found["strayed"]:
            raise RuntimeError("the cache changed at other positions than those of the steps")
        return list(zip(found["keys"], found["values"], strict=True))

    def close(self) -> None:
        """Ends the process and gives its memory back."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def _result(self) -> dict[str, np.ndarray]:
        with np.load(self._ask("result")["path"]) as found:
            return dict(found)

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            if line := self._process.stdout.readline():
                return json.loads(line)
        except BrokenPipeError:
            pass
        raise RuntimeError(f"torch_decoder ended with {self._process.wait()} at {command!r}")


def _described(setting: Setting, mode: str) -> dict[str, Any]:
    """What `torch_decoder` needs to know of a model, as JSON."""
    config = setting.config
    if config.qkv_bias or config.output_bias or config.dtype != jnp.bfloat16:
        raise ValueError("torch_decoder knows bf16 models without biases only")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    return {
        **{name: getattr(config, name) for name in (*sizes, "rms_eps", "qk_norm", "tie_embeddings")},
        "frequencies": frequencies(config.head_dim, config.rope_theta, config.rope_scaling).tolist(),
        "cache_len": setting.cache[0][0].shape[1],
        "token": np.asarray(setting.token).tolist(),
        "start": setting.start,
        "steps": setting.steps,
        "device": "cpu" if jax.devices()[0].platform == "cpu" else "cuda",
        "mode": mode,
    }


def _given(setting: Setting) -> dict[str, np.ndarray]:
    """Weights and cache by path; bf16 as the integers of the same bits, since NumPy's files have no bf16."""
    named = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(setting.params)}
    for layer, (keys, values) in enumerate(setting.cache):
        named |= {f"cache.{layer}.keys": keys, f"cache.{layer}.values": values}
    return {name: np.asarray(array).view(np.uint16) for name, array in named.items()}
