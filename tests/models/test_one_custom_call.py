"""A whole model step is one custom call and nothing else in the compiled module."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from models.decoder import init_cache
from models.encoder import embed_function
from models.generate import sampling_steps
from models.sampling import Sampling

pytestmark = pytest.mark.weights

#: What XLA may put around the call: none of it computes or copies anything.
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(", re.MULTILINE)


def work(compiled: jax.stages.Compiled) -> list[str]:
    """Instructions of the entry computation that do something."""
    found = INSTRUCTION.findall(compiled.as_text() or "")
    assert "parameter" in found
    return [name for name in found if name not in FREE]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_decode_step_with_sampling(smollm2: Any, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=20 if temperature else None)
    _, following = sampling_steps(smollm2.graphdef, sampling)
    step = jax.jit(jax_mpk.megakernelize(following, donate_argnums=1), donate_argnums=1)
    cache = init_cache(smollm2.config, 1, 64)
    args = (smollm2.params, cache, jnp.zeros(1, jnp.int32), jnp.int32(3), jnp.uint32(0))
    assert work(step.lower(*args).compile()) == ["custom-call"]


def test_encoder(minilm: Any) -> None:
    embed = jax.jit(jax_mpk.megakernelize(embed_function(minilm.graphdef)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30000, (2, 7)), jnp.int32)
    assert work(embed.lower(minilm.params, tokens, jnp.ones((2, 7), bool)).compile()) == ["custom-call"]
