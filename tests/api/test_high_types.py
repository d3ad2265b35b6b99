"""Types and primitives of JAX's "hijax" layer: lowered where they occur inside, refused as arguments and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import hijax

import jax_mpk
from jax_mpk import megakernelize

if not hasattr(hijax, "HiPrim"):
    pytest.skip("not public in this version of JAX", allow_module_level=True)

X = np.arange(1.0, 5.0, dtype=np.float32)


@dataclass(frozen=True)
class Scaled:
    whole: Any
    scale: Any


@dataclass(frozen=True)
class ScaledType(hijax.HiType):
    shape: tuple[int, ...]

    def lo_ty(self):
        return [hijax.ShapedArray(self.shape, np.dtype("int8")), hijax.ShapedArray((), np.dtype("float32"))]

    def lower_val(self, value):
        return [value.whole, value.scale]

    def raise_val(self, whole, scale):
        return Scaled(whole, scale)

    def str_short(self, *_, **__):
        return "scaled"


hijax.register_hitype(Scaled, lambda value: ScaledType(value.whole.shape))


class Pack(hijax.HiPrim):
    def __init__(self, aval):
        self.in_avals, self.out_aval, self.params = (aval,), ScaledType(aval.shape), {}
        super().__init__()

    def expand(self, x):
        scale = jnp.max(jnp.abs(x)) / 64
        return Scaled(jnp.round(x / scale).astype("int8"), scale)


class Unpack(hijax.HiPrim):
    def __init__(self, aval):
        self.in_avals, self.out_aval = (aval,), hijax.ShapedArray(aval.shape, np.dtype("float32"))
        self.params = {}
        super().__init__()

    def expand(self, value):
        return value.whole * value.scale


def pack(x):
    return Pack(jax.typeof(x))(x)


def unpack(value):
    return Unpack(jax.typeof(value))(value)


def inside(x):
    start = pack(x * 2)
    looped, _ = lax.scan(lambda c, _: (pack(unpack(c) + unpack(start)), None), start, None, length=3)
    return unpack(looped) + x


@pytest.mark.parametrize("on_unsupported", ["error", "split"])
@pytest.mark.parametrize("around", [lambda f: f, jax.jit])
def test_inside(around, on_unsupported) -> None:
    got = around(megakernelize(inside, on_unsupported=on_unsupported))(X)
    np.testing.assert_allclose(got, jax.jit(inside)(X), rtol=1e-6)


CLOSED_OVER = Scaled(jnp.ones(4, jnp.int8), jnp.float32(0.5))
REFUSED = {
    "argument": (lambda value, x: unpack(value) + x, (CLOSED_OVER, X)),
    "closed over": (lambda x: unpack(CLOSED_OVER) + x, (X,)),
    "result": (lambda x: pack(x + 1), (X,)),
}


@pytest.mark.parametrize("around", [lambda f: f, jax.jit])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_or_left_to_xla(case, around) -> None:
    f, args = REFUSED[case]
    with pytest.raises(jax_mpk.UnsupportedPrimitiveError, match=r"ScaledType(.|\n)*test_high_types\.py:\d+"):
        around(megakernelize(f))(*args)
    got = around(megakernelize(f, on_unsupported="split"))(*args)
    want = jax.jit(f)(*args)
    if case == "result":
        got, want = got.whole, want.whole
    np.testing.assert_array_equal(got, want)


def test_passed_through() -> None:
    with pytest.raises(jax_mpk.UnsupportedError, match="one of its results is a scaled"):
        megakernelize(lambda value, x: (value, x + 1))(CLOSED_OVER, X)
