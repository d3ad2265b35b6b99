"""Whether the decode steps that were timed are right.

A system's tokens are read again, as given ones, by the same decoder under jax.jit: once in the model's dtype, once in
f32 with full products. How far jax.jit itself is from f32 is the yardstick of both demands:

- The keys and values that a system wrote, which say what reached every layer in every step, are no more than twice as
  far from f32 (relative, per layer) as those of jax.jit.
- By f32's logits, each chosen token is the best one, or behind it by no more than errors of that size can explain: if
  no logit is off by more than e, the best of the inexact ones is at most 2 e behind. e is jax.jit's largest error of a
  logit, and half a step of bf16, since a system may round its logits to the model's dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.decode_systems import Rows, Setting, System
from benchmarks.shapes import with_dtype
from models.decoder import Decoder
from models.rope import rotation

# How much farther from f32 than jax.jit's keys and values those of a system may be.
FACTOR = 2.0


class Check:
    """Reads the systems' tokens again."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._precise, self._usual = (_decoder(setting, dtype) for dtype in (jnp.float32, setting.config.dtype))

    def __call__(self, system: System) -> tuple[dict[str, float], str]:
        """Figures of a system's last run for its row, and what is wrong with it, in words, or ""."""
        tokens, rows = system.tokens(), system.rows()
        if tokens.shape != (self._setting.steps, self._setting.batch):
            return {}, f"the tokens have shape {tokens.shape}"
        if ((tokens < 0) | (tokens >= self._setting.config.vocab_size)).any():
            return {}, f"there is no token {tokens.min()}, or none {tokens.max()}"
        with jax.default_matmul_precision("highest"):
            precise, true = _read(self._precise, self._setting, tokens)
        usual, known = _read(self._usual, self._setting, tokens)
        off, usually_off = (np.asarray([_distance(r, t) for r, t in zip(given, true)]) for given in (rows, known))
        best = precise.max(axis=-1)
        behind = best - jnp.take_along_axis(precise, tokens.T[..., None], axis=-1)[..., 0]
        rounding = float(jnp.finfo(self._setting.config.dtype).eps) / 2 * float(jnp.abs(best).max())
        allowed = 2 * (float(jnp.abs(usual - precise).max()) + rounding)
        figures = {
            "cache_error": float(off.max()),
            "jit_cache_error": float(usually_off.max()),
            "token_behind": float(behind.max()),
            "token_behind_allowed": allowed,
        }
        # Negated, so that NaN is wrong.
        if (wrong := np.argwhere(~(off <= FACTOR * usually_off))).size:
            layer, which = wrong[0]
            error, usual_error = off[layer, which], usually_off[layer, which]
            name = ("keys", "values")[which]
            return figures, f"{name} of layer {layer} are {error:.3g} from f32, those of jax.jit {usual_error:.3g}"
        if (wrong := np.argwhere(~np.asarray(behind <= allowed))).size:
            sequence, step = wrong[0]
            distance = f"{float(behind[sequence, step]):.3g} behind the best one, {allowed:.3g} allowed"
            return figures, f"token {tokens[step, sequence]} of step {step} is {distance}"
        return figures, ""


def _decoder(setting: Setting, dtype: jax.typing.DTypeLike) -> Decoder:
    config = with_dtype(setting.config, dtype)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, setting.params)


def _read(decoder: Decoder, setting: Setting, tokens: np.ndarray) -> tuple[jax.Array, Rows]:
    """Logits f32[batch, steps, vocab] after each token, and the new keys and values.

    Layer by layer: they all share one compilation, and only one is in f32 at a time.
    """
    config, start = decoder.config, setting.start
    text = jnp.concatenate([setting.token[None], tokens[:-1]]).T
    positions = jnp.arange(start, start + setting.steps, dtype=jnp.int32)
    cos, sin = rotation(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    x, rows = decoder.embed_tokens(text), []
    for layer, cache in zip(decoder.layers, setting.cache, strict=True):
        x, new = _layer(*nnx.split(layer), x, cos, sin, cache, start)
        rows.append(tuple(np.asarray(array[:, start : start + setting.steps].astype(jnp.float32)) for array in new))
    head = nnx.state(decoder), nnx.graphdef(decoder)
    return _logits(head[1], head[0], x), rows


@functools.partial(jax.jit, static_argnums=0)
def _layer(
    graphdef: nnx.GraphDef[Any],
    params: nnx.State,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: Any,
    start: int,
) -> tuple[jax.Array, Any]:
    cache = jax.tree.map(lambda array: array.astype(x.dtype), cache)
    return nnx.merge(graphdef, params)(x, cos, sin, cache, start)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef[Decoder], params: nnx.State, x: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params).logits(x)


def _distance(given: tuple[np.ndarray, np.ndarray], true: tuple[np.ndarray, np.ndarray]) -> list[float]:
    """Relative distance of a layer's keys and of its values."""
    return [float(np.linalg.norm(g - t) / np.linalg.norm(t)) for g, t in zip(given, true)]
