"""Transcendental and special functions.

In the exact family they are applied where their value is exact, and XLA's is too: each is given one of a few points,
chosen by a mask. In the smooth family they are applied well inside their domains.
"""

from __future__ import annotations

from jax import lax

from tests.random_programs import values
from tests.random_programs.generator import Gen
from tests.random_programs.ops_elementwise import masked
from tests.random_programs.registry import op
from tests.random_programs.values import DEFINED, FLOATS, ROUGH

#: Name: (points with exact values, lowest and highest argument, lowest and highest result).
_FUNCTIONS: dict[str, tuple[dict[float, float], float, float, float, float]] = {
    "acos": ({1: 0}, -0.75, 0.75, 0.7, 2.5),
    "acosh": ({1: 0}, 1.25, 16, 0.6, 3.5),
    "asin": ({0: 0}, -0.75, 0.75, -0.9, 0.9),
    "asinh": ({0: 0}, -16, 16, -3.5, 3.5),
    "atan": ({0: 0}, -16, 16, -1.6, 1.6),
    "atanh": ({0: 0}, -0.75, 0.75, -1, 1),
    "bessel_i0e": ({}, -16, 16, 0, 1),
    "bessel_i1e": ({0: 0}, -16, 16, -1, 1),
    "cbrt": ({0: 0, 1: 1, 8: 2, -1: -1}, 0.25, 8, 0.6, 2),
    "cos": ({0: 1}, -16, 16, -1, 1),
    "cosh": ({0: 1}, -3, 3, 1, 10.1),
    "digamma": ({}, 0.5, 8, -2, 2.1),
    "erf": ({0: 0, 8: 1}, -4, 4, -1, 1),
    "erf_inv": ({0: 0}, -0.75, 0.75, -0.82, 0.82),
    "erfc": ({0: 1}, -4, 4, 0, 2),
    "exp": ({0: 1}, -4, 3, 0, 20.1),
    "exp2": ({0: 1, 1: 2, -1: 0.5}, -4, 4, 0, 16),
    "expm1": ({0: 0}, -4, 3, -1, 20),
    "lgamma": ({}, 0.5, 8, -0.13, 8.6),
    "log": ({1: 0}, 0.25, 16, -1.4, 2.8),
    "log1p": ({0: 0}, -0.5, 8, -0.7, 2.2),
    "logistic": ({0: 0.5}, -8, 8, 0, 1),
    "rsqrt": ({1: 1, 4: 0.5, 0.25: 2}, 0.25, 16, 0.25, 2),
    "sin": ({0: 0}, -16, 16, -1, 1),
    "sinh": ({0: 0}, -3, 3, -10.1, 10.1),
    "sqrt": ({0: 0, 1: 1, 4: 2, 9: 3, 0.25: 0.5}, 0.25, 16, 0.5, 4),
    "tan": ({0: 0}, -1, 1, -1.6, 1.6),
    "tanh": ({0: 0}, -8, 8, -1, 1),
    "log2": ({1: 0, 2: 1, 4: 2}, 0.25, 16, -2, 4),
}
#: Functions that JAX composes or gives derivatives of their own; smooth family only.
_COMPOSED: dict[str, tuple[str, float, float, float, float]] = {
    "silu": ("jax.nn.silu({0})", -8, 8, -0.3, 8),
    "gelu": ("jax.nn.gelu({0})", -8, 8, -0.2, 8),
    "gelu_erf": ("jax.nn.gelu({0}, approximate=False)", -8, 8, -0.2, 8),
    "softplus": ("jax.nn.softplus({0})", -8, 8, 0, 8.1),
    "elu": ("jax.nn.elu({0})", -4, 8, -1, 8),
    "leaky_relu": ("jax.nn.leaky_relu({0}, 0.25)", -8, 8, -2, 8),
    "log_sigmoid": ("jax.nn.log_sigmoid({0})", -8, 8, -8.1, 0),
    "logaddexp": ("jnp.logaddexp({0}, {0} + {0})", -4, 4, -8, 8.8),
    "tanh_grad": ("jax.grad(lambda x: jnp.sum(jnp.tanh(x)))({0})", -4, 4, 0, 1),
    "sinc": ("jnp.sin({0}) / ({0} + {0})", 0.25, 4, -0.2, 0.5),
}


def _point(g: Gen, dtype: str, points: list[float], values_: list[float], code: str) -> None:
    """``code`` of a value that is one of two points."""
    x = masked(g, g.take("b1"), points, dtype)
    frac = max(_digits(v) for v in values_)
    zeros = DEFINED if 0 in values_ else values.POSITIVE
    g.emit(code, [x], values.number(x.info.shape, dtype, min(values_), max(values_), frac, zeros))


def _digits(x: float) -> int:
    return next(k for k in range(8) if float(x * 2**k).is_integer())


def _register(
    name: str, code: str, points: dict[float, float], bounds: tuple[float, float, float, float], weight: float
) -> None:
    low, high, least, most = bounds

    def place(g: Gen, dtype: str) -> None:
        if g.exact:
            chosen = g.rng.sample(sorted(points), min(len(points), 2))
            _point(g, dtype, chosen, [points[p] for p in chosen], code)
            return
        x = g.take(dtype)
        x = g.tame(x, high, ROUGH, low)
        g.emit(code, [x], values.rough(x.info.shape, dtype, least, most))

    # At a single point a function is a constant.
    op(name, exact=FLOATS if points else (), smooth=FLOATS, weight=weight, exact_weight=0.05 * len(points))(place)


for _name, (_points, *_bounds) in _FUNCTIONS.items():
    if hasattr(lax, _name):
        _register(_name, f"lax.{_name}({{0}})", _points, tuple(_bounds), 0.6)  # type: ignore[arg-type]
for _name, (_code, *_limits) in _COMPOSED.items():
    _register(_name, _code, {}, tuple(_limits), 0.6)  # type: ignore[arg-type]


@op("atan2", exact=FLOATS, smooth=FLOATS)
def _atan2(g: Gen, dtype: str) -> None:
    if g.exact:
        mask = g.take("b1")
        x = masked(g, mask, [1, 2], dtype)
        zero = g.emit("{0} - {0}", [x], values.number(x.info.shape, dtype, 0, 0))
        g.emit("lax.atan2({0}, {1})", [zero, x], values.number(x.info.shape, dtype, 0, 0))
        return
    y, x = g.pair(dtype)
    x = g.tame(x, 8, ROUGH, 0.25)
    y = g.tame(y, 8, ROUGH)
    g.emit("lax.atan2({0}, {1})", [y, x], values.rough(x.info.shape, dtype, -1.6, 1.6))


@op("float_pow", exact=FLOATS)
def _float_pow(g: Gen, dtype: str) -> None:
    mask = g.take("b1")
    bases = g.rng.choice([[1, 2], [2, 4], [0.5, 1], [4]])
    powers = g.rng.choice([[0, 1], [1, 2], [2], [-1, 1]])
    x, y = masked(g, mask, bases, dtype), masked(g, g.make(mask.info.shape, "b1"), powers, dtype)
    results = [b**p for b in bases for p in powers]
    info = values.number(x.info.shape, dtype, min(results), max(results), max(map(_digits, results)))
    g.emit("lax.pow({0}, {1})", [x, y], info)


@op("igamma_at_zero", exact=FLOATS, weight=0.2)
def _igamma_at_zero(g: Gen, dtype: str) -> None:
    a = masked(g, g.take("b1"), [1, 2], dtype)
    x = g.emit("{0} - {0}", [a], values.number(a.info.shape, dtype, 0, 0))
    name, value = g.rng.choice([("igamma", 0), ("igammac", 1)])
    g.emit(f"lax.{name}({{0}}, {{1}})", [a, x], values.number(a.info.shape, dtype, value, value))


#: Functions of two and three arguments: ranges of the arguments, then of the result. Compiled slowly, so drawn seldom.
_SPECIAL: dict[str, tuple[list[tuple[float, float]], float, float]] = {
    "igamma": ([(0.5, 4), (0.25, 8)], 0, 1),
    "igammac": ([(0.5, 4), (0.25, 8)], 0, 1),
    "igamma_grad_a": ([(0.5, 4), (0.25, 8)], -1, 1),
    "random_gamma_grad": ([(0.5, 4), (0.25, 8)], 0, 8),
    "zeta": ([(1.5, 4), (0.5, 4)], 0, 18),
    "betainc": ([(0.5, 4), (0.5, 4), (0.125, 0.875)], 0, 1),
}


def _register_special(name: str, ranges: list[tuple[float, float]], least: float, most: float) -> None:
    def place(g: Gen, dtype: str) -> None:
        first = g.take(dtype, limit=64)
        args = [first, *(g.make(first.info.shape, dtype) for _ in ranges[1:])]
        args = [g.tame(a, high, ROUGH, low) for a, (low, high) in zip(args, ranges, strict=True)]
        places = ", ".join(f"{{{k}}}" for k in range(len(args)))
        g.emit(f"lax.{name}({places})", args, values.rough(first.info.shape, dtype, least, most))

    op(name, smooth=FLOATS, weight=0.05)(place)


for _name, (_ranges, _least, _most) in _SPECIAL.items():
    _register_special(_name, _ranges, _least, _most)


@op("polygamma", smooth=FLOATS, weight=0.05)
def _polygamma(g: Gen, dtype: str) -> None:
    x = g.take(dtype, limit=64)
    x = g.tame(x, 4, ROUGH, 1)
    n = g.rng.choice([0, 1, 2])
    g.emit(f"lax.polygamma(lax.full_like({{0}}, {n}), {{0}})", [x], values.rough(x.info.shape, dtype, -2.5, 2))
