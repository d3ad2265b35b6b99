"""Random keys, bits and samples against ``jax.jit``; what consists of bits, against one that compiles quickly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from jax_mpk import errors
from tests.graph.harness import check, graph_of, run
from tests.graph.samples import FLOATS
from tests.references import quick_jit

IMPLEMENTATIONS = ("threefry2x32", "threefry4x32", "philox2x32", "philox4x32")


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request: pytest.FixtureRequest) -> Any:
    with jax.enable_x64(request.param):
        yield request.param


@pytest.fixture(params=[True, False], ids=["partitionable", "original"])
def partitionable(request: pytest.FixtureRequest) -> Any:
    with jax.threefry_partitionable(request.param):
        yield request.param


def data(keys: Any) -> Any:
    return jax.random.key_data(keys)


@pytest.mark.parametrize("width", ["uint8", "uint16", "uint32", "uint64"])
def test_bits(x64: bool, partitionable: bool, width: str) -> None:
    if width == "uint64" and not x64:
        pytest.skip("no 64-bit types")
    keys = random.split(random.key(5), 3)

    def fn(keys: Any) -> Any:
        shapes = [(), (7,), (2, 3, 4), (0, 3)]
        own = [random.bits(keys[0], shape, width) for shape in shapes]
        return [*own, jax.vmap(lambda k: random.bits(k, (5,), width))(keys)]

    check(fn, keys, jit=quick_jit)


def test_keys(x64: bool, partitionable: bool) -> None:
    def fn(key: Any, seed: Any) -> Any:
        keys = random.split(key, (3, 2))
        return [
            key,
            keys,
            random.split(key),
            random.fold_in(key, 7),
            random.fold_in(key, seed),
            jax.vmap(random.fold_in, (None, 0))(key, jnp.arange(4)),
            jax.vmap(jax.vmap(random.fold_in, (0, None)), (0, 0))(keys, jnp.arange(3)),
            random.clone(key),
            random.key(seed),
            jax.vmap(random.key)(jnp.arange(3) + seed),
            random.wrap_key_data(random.key_data(keys)),
            random.PRNGKey(seed),
            random.split(random.PRNGKey(3), 5),
            keys.reshape(6)[1:4],
            keys.T,
        ]

    def as_data(*args: Any) -> Any:
        out = fn(*args)
        return [data(k) if jnp.issubdtype(k.dtype, jax.dtypes.prng_key) else k for k in out]

    for seed in (0, 42, -1, 2**31 - 1, *((2**40 + 3,) if x64 else ())):
        check(as_data, random.key(1), np.asarray(seed, "int64" if x64 else "int32"), jit=quick_jit)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_other_hashes(impl: str) -> None:
    try:
        key = random.key(9, impl=impl)
    except ValueError:
        pytest.skip(f"this JAX has no {impl}")

    def fn(key: Any, seed: Any) -> Any:
        keys = [random.split(key, 5), random.fold_in(key, seed), random.key(seed, impl=impl)]
        return [*map(data, keys), random.bits(key, (5, 3)), random.uniform(key, (9,))]

    check(fn, key, np.int32(77), jit=quick_jit)


EXACT: dict[str, Callable[[Any], Any]] = {
    "bernoulli": lambda k: random.bernoulli(k, 0.3, (40,)),
    "categorical": lambda k: random.categorical(k, jnp.linspace(-2, 2, 60).reshape(5, 12)),
    "choice": lambda k: random.choice(k, 50, (20,)),
    "choice without replacement": lambda k: random.choice(k, jnp.arange(30.0), (20,), replace=False),
    "choice weighted": lambda k: random.choice(k, 8, (20,), p=jnp.arange(8) / 28),
    "choice weighted without replacement": lambda k: random.choice(k, 8, (5,), replace=False, p=jnp.arange(1, 9) / 36),
    "permutation": lambda k: random.permutation(k, 33),
    "permutation of rows": lambda k: random.permutation(k, jnp.arange(24).reshape(8, 3)),
    "permutation independent": lambda k: random.permutation(k, jnp.arange(24).reshape(8, 3), independent=True),
    "rademacher": lambda k: random.rademacher(k, (40,)),
    "randint": lambda k: random.randint(k, (40,), -5, 1000),
    "randint u8": lambda k: random.randint(k, (40,), 3, 200, "uint8"),
    "randint wide": lambda k: random.randint(k, (40,), -(2**31), 2**31 - 1),
    "uniform": lambda k: random.uniform(k, (50,)),
    "uniform range": lambda k: random.uniform(k, (50,), minval=-1.0, maxval=1.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_samples(x64: bool, name: str) -> None:
    check(EXACT[name], random.key(17), jit=quick_jit)


def test_samples_of_old_threefry(partitionable: bool) -> None:
    key = random.key(3)
    check(
        lambda k: [random.uniform(k, (7, 3)), random.permutation(k, 20), random.randint(k, (9,), 0, 9)],
        key,
        jit=quick_jit,
    )
    check(lambda k: random.normal(k, (41,)), key, ulps=2)


#: Samplers and how far XLA's logarithms may take them from those of NumPy: in units of the last place of f16 and bf16,
#: of f32, and of f64, in which XLA's log1p is off by a hundred. On processors with arithmetic in f16, XLA uses it.
ROUNDED: dict[str, tuple[Callable[[Any, str], Any], float, float, float]] = {
    "cauchy": (lambda k, t: random.cauchy(k, (300,), t), 8, 8, 300),
    "exponential": (lambda k, t: random.exponential(k, (300,), t), 1, 1, 300),
    "gumbel": (lambda k, t: random.gumbel(k, (300,), t), 12, 2, 300),
    "laplace": (lambda k, t: random.laplace(k, (300,), t), 1, 1, 300),
    "logistic": (lambda k, t: random.logistic(k, (300,), t), 12, 2, 300),
    "normal": (lambda k, t: random.normal(k, (300,), t), 1, 2, 30),
    "truncated_normal": (lambda k, t: random.truncated_normal(k, -1.5, 2.0, (300,), t), 32, 4, 300),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_samples(name: str) -> None:
    fn, half, single, double = ROUNDED[name]
    ulps = {"float16": half, "bfloat16": half, "float32": single, "float64": double}
    atol = {"float32": 1.2e-6, "float64": 4e-15}
    with jax.enable_x64(True):
        for dtype in FLOATS:
            check(lambda k, t=dtype: fn(k, t), random.key(23), ulps=ulps[dtype], atol=atol.get(dtype, 0.0))


def test_normal_is_mostly_within_one_ulp() -> None:
    def fn(k: Any) -> Any:
        return random.normal(k, (20000,))

    (got,) = run(fn, random.key(2))
    want = np.asarray(jax.jit(fn)(random.key(2)))
    apart = np.abs(got.view(np.int32).astype(np.int64) - want.view(np.int32))
    assert apart.max() <= 3
    # How XLA contracts the polynomial of erf_inv depends on its version and on the processor.
    assert np.mean(apart > 1) < 0.05


@pytest.mark.slow
def test_loops() -> None:
    """Samplers that reject until they accept."""

    def fn(k: Any) -> Any:
        return [random.gamma(k, jnp.array([0.3, 1.0, 7.5])), random.beta(k, 2.0, 3.0, (4,)), random.t(k, 4.0, (3,))]

    check(fn, random.key(4), ulps=64, atol=1e-5, jit=quick_jit)
    check(lambda k: [random.poisson(k, 3.0, (6,)), random.poisson(k, 40.0, (6,))], random.key(4), jit=quick_jit)


def test_mask_and_dropout() -> None:
    def fn(k: Any, x: Any) -> Any:
        keep = random.bernoulli(k, 0.8, x.shape)
        return jnp.where(keep, x / 0.5, 0)

    check(fn, random.key(6), np.arange(60, dtype=np.float32).reshape(6, 10))


def test_threefry_in_a_loop() -> None:
    def fn(key: Any) -> Any:
        def step(key: Any, _: Any) -> Any:
            key, sub = random.split(key)
            return key, random.randint(sub, (3,), 0, 100)

        key, out = lax.scan(step, key, None, length=5)
        return data(key), out

    check(fn, random.key(0))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_platform_generators_are_refused(impl: str) -> None:
    with pytest.raises(errors.UnsupportedPrimitiveError, match="threefry2x32"):
        graph_of(lambda k: random.bits(k, (4,)), random.key(0, impl=impl))


def test_hidden_state_is_refused() -> None:
    with pytest.raises(errors.UnsupportedPrimitiveError, match=r"jax\.random"):
        graph_of(lambda a, b: lax.rng_uniform(a, b, (3,)), np.float32(0), np.float32(1))
