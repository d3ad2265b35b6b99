"""CudaPrograms through XLA, and a decoder small enough to compile in a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.plan.ir import Plan
from jax_mpk.runtime import cuda, targets
from jax_mpk.runtime.native import CUDA_TARGET
from models.decoder import Cache, DecoderConfig, init_cache, step_functions
from tests.codegen.test_cuda_compiles import plan_of
from tests.models.support import random_decoder

DECODER = DecoderConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    max_positions=1024,
)


def call(program: CudaProgram, results: Sequence[jax.ShapeDtypeStruct], **options: Any) -> Callable[..., Any]:
    """A function of arrays that runs a program."""
    blob = cuda.build(program)

    workspace = [jax.ShapeDtypeStruct((program.workspace_bytes,), np.uint8)] if program.workspace_bytes else []

    def run(*args: jax.Array) -> list[jax.Array]:
        return jax.ffi.ffi_call(CUDA_TARGET, [*results, *workspace], **options)(*args, program=blob)[: len(results)]

    return run


def planned(fn: Callable[..., Any], *args: Any) -> tuple[Plan, list[jax.ShapeDtypeStruct]]:
    """The plan of a function for the GPU that is there, unused arguments included, and what it returns."""
    plan, inputs = plan_of(fn, list(args), **dataclasses.asdict(targets.resolve("cuda")))
    assert len(inputs) == len(args)
    results = jax.tree.leaves(jax.eval_shape(fn, *args))
    return plan, [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results]


def decoder() -> tuple[Callable[..., Any], nnx.State]:
    """``step(params, cache, token int32[1], pos) -> token, logits, cache``, greedy, and its random weights."""
    graphdef, params = random_decoder(DECODER)
    decode_step = step_functions(graphdef).decode_step

    def step(params: nnx.State, cache: Cache, token: jax.Array, pos: jax.Array) -> tuple[jax.Array, jax.Array, Cache]:
        logits, cache = decode_step(params, cache, token, pos)
        return jnp.argmax(logits, -1).astype(jnp.int32), logits, cache

    return step, params


def decode_loop(step: Callable[..., Any]) -> Callable[..., Any]:
    """``loop(params, cache, token, pos, steps) -> tokens int32[MOST_STEPS], logits of the last step, cache``."""

    def loop(params: nnx.State, cache: Cache, token: jax.Array, pos: jax.Array, steps: jax.Array) -> Any:
        def body(i: jax.Array, carry: Any) -> Any:
            tokens, token, _, cache = carry
            token, logits, cache = step(params, cache, token, pos + i)
            return tokens.at[i].set(token[0]), token, logits, cache

        empty = jnp.zeros(MOST_STEPS, jnp.int32), token, jnp.zeros((1, DECODER.vocab_size)), cache
        tokens, _, logits, cache = lax.fori_loop(0, steps, body, empty)
        return tokens, logits, cache

    return loop


MOST_STEPS = 256


def filled_cache(length: int, live: int) -> Cache:
    """A cache of random keys and values, zero from position ``live`` on."""
    rng = np.random.default_rng(3)

    def fill(zeros: jax.Array) -> jax.Array:
        values = rng.standard_normal(zeros.shape).astype(zeros.dtype)
        values[:, live:] = 0
        return jnp.asarray(values)

    return jax.tree.map(fill, init_cache(DECODER, 1, length))
