"""The example models' kernels for a GPU that is not there compile to the instructions they claim."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jax_mpk
from jax_mpk.runtime import nvrtc
from models.decoder import Decoder, DecoderConfig, init_cache
from models.encoder import embed_function
from models.generate import sampling_steps
from models.sampling import Sampling
from tests.codegen.cuda_cases import COPIES, CORES, RING
from tests.codegen.sass import missing

pytestmark = [pytest.mark.weights, pytest.mark.slow, pytest.mark.cpu]


def compiled(fn: Any, args: tuple[Any, ...], **options: Any) -> nvrtc.Compiled:
    """The kernel of a function for an H100, its weights placed."""
    step = jax_mpk.megakernelize(fn, target="h100-sxm", **options)
    placed = jax_mpk.place(step, *args)
    return nvrtc.compile_source(step.lower(*placed).as_text("cuda"), "sm_90a")


def decode_step(config: DecoderConfig, batch: int, sampling: Sampling) -> nvrtc.Compiled:
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    _, following = sampling_steps(graphdef, sampling)
    cache = jax.eval_shape(lambda: init_cache(config, batch, 256))
    scalars = jnp.zeros(batch, jnp.int32), jnp.int32(3), jnp.uint32(0)
    return compiled(following, (params, cache, *scalars), donate_argnums=1)


def test_decode_step(smollm2_bf16: Any, tmp_path: Path) -> None:
    kernel = decode_step(smollm2_bf16.config, 1, Sampling())
    assert kernel.resources.spill_bytes == 0
    assert not missing(kernel.cubin, (*RING, *CORES["bfloat16"], *COPIES), tmp_path)


def test_decode_step_of_a_batch(smollm2_bf16: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(smollm2_bf16.config, num_layers=2)  # all others share their code
    kernel = decode_step(config, 16, Sampling(temperature=0.8, top_k=20, top_p=0.9))
    assert not missing(kernel.cubin, (*RING, *CORES["bfloat16"], *COPIES), tmp_path)


def test_encoder(minilm: Any, tmp_path: Path) -> None:
    params = jax.eval_shape(lambda: minilm.params)
    kernel = compiled(embed_function(minilm.graphdef), (params, jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16), bool)))
    assert kernel.resources.spill_bytes == 0
    assert not missing(kernel.cubin, CORES["float32"], tmp_path)
