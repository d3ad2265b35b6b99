"""What the tests of the public interface share."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def assert_same(actual: Any, expected: Any) -> None:
    """Equal structure, avals (weak types included) and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert a.aval == b.aval
        np.testing.assert_array_equal(bits(a), bits(b))


def bits(x: jax.Array) -> np.ndarray:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    array = np.asarray(x)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def integers(seed: int, *shape: int, dtype: Any = np.float32) -> jax.Array:
    """Small whole numbers: sums and products of them are exact."""
    values = np.random.default_rng(seed).integers(-8, 9, shape)
    return jax.numpy.asarray(values.astype(dtype))


#: Operations that move no data.
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}


def operations(compiled: Any) -> list[str]:
    """HLO operations of a compiled function, free ones left out."""
    text = compiled.as_text()
    found = re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\(", text, re.MULTILINE)
    assert "parameter" in found or "custom-call" in found or "constant" in found
    return [name for name in found if name not in FREE]


def pointer(x: jax.Array) -> int:
    return x.unsafe_buffer_pointer()


def run_python(source: str, **environment: str) -> str:
    """Runs a program in a process of its own and returns what it prints."""
    settings = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    settings.pop("XLA_FLAGS", None)
    settings.update(environment)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        env=settings,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
