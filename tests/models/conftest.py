"""Fixtures of the tests of the models: the engines, and trained weights with their expectations.

JAX is imported inside the fixtures only: tests/conftest.py configures it first.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from models.loading import Loaded

DATA = Path(__file__).parent / "data"


@pytest.fixture(params=[pytest.param("jit", marks=pytest.mark.slow), "mpk"])
def engine(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Compiles a function; called as `jax.jit` is, which stands for any compiler but ours."""
    if request.param == "jit":
        from tests.references import quick_jit

        return quick_jit
    pytest.importorskip("jax_mpk", exc_type=ImportError)
    from models.engines import compiler

    return compiler(request.param)


def _load_smollm2(dtype: str) -> "Loaded":
    from models.fetch import fetch_smollm2
    from models.loading import load_decoder

    return load_decoder(_fetched(fetch_smollm2), dtype=dtype, progress=False)


def _fetched(fetch: Callable[[], Path]) -> Path:
    """Weights; machines with a GPU may have no network, and no copy."""
    import jax

    try:
        return fetch()
    except RuntimeError as error:
        if jax.default_backend() != "gpu":
            raise
        pytest.skip(f"no copy of the weights, and none to be fetched: {str(error).splitlines()[0]}")


@pytest.fixture(scope="session")
def smollm2() -> "Loaded":
    return _load_smollm2("float32")


@pytest.fixture(scope="session")
def smollm2_bf16() -> "Loaded":
    return _load_smollm2("bfloat16")


@pytest.fixture(scope="session")
def minilm() -> "Loaded":
    from models.fetch import fetch_minilm
    from models.loading import load_encoder

    return load_encoder(_fetched(fetch_minilm), progress=False)


@pytest.fixture(scope="session")
def smollm2_truth() -> dict[str, Any]:
    return json.loads((DATA / "smollm2_ground_truth.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def minilm_truth() -> dict[str, Any]:
    return json.loads((DATA / "minilm_ground_truth.json").read_text(encoding="utf-8"))
