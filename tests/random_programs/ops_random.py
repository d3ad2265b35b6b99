"""Random keys and bits."""

from __future__ import annotations

from tests.random_programs import values
from tests.random_programs.generator import Gen, Value
from tests.random_programs.registry import op
from tests.random_programs.values import FLOATS, INTS, KEY, Info

_BITS = ("u8", "u16", "u32", "u64")


def key(g: Gen) -> Value:
    """A scalar key."""
    found = g.find(lambda i: i.dtype == KEY and not i.shape)
    if found is not None and g.chance(0.6):
        return found
    if g.chance(0.5):
        return g.emit("jax.random.wrap_key_data({0})", [g.make((2,), "u32")], Info((), KEY))
    return g.emit("jax.random.key({0})", [g.make((), g.rng.choice(["s32", "u32", "u8", "s64"]))], Info((), KEY))


@op("random_bits", exact=_BITS, smooth=_BITS, weight=0.3)
def _bits(g: Gen, dtype: str) -> None:
    shape = g.shape()
    g.emit(f"jax.random.bits({{0}}, {shape}, {dtype})", [key(g)], values.full(shape, dtype))


@op("random_seed", exact=INTS, weight=0.2)
def _seed(g: Gen, dtype: str) -> None:
    k = g.emit("jax.random.key({0})", [g.make((), dtype)], Info((), KEY))
    g.emit("jax.random.key_data({0})", [k], values.full((2,), "u32"))


@op("random_split", exact=("u32",), smooth=("u32",), weight=0.2)
def _split(g: Gen, dtype: str) -> None:
    count = g.rng.randint(1, 3)
    keys = g.emit_many(f"jax.random.split({{0}}, {count})", [key(g)], [Info((), KEY)] * count)
    g.emit("jax.random.key_data({0})", keys[-1:], values.full((2,), dtype))


@op("random_fold_in", exact=("u32", "s32", "u8"), weight=0.2)
def _fold_in(g: Gen, dtype: str) -> None:
    k = g.emit("jax.random.fold_in({0}, {1})", [key(g), g.make((), dtype)], Info((), KEY))
    g.emit("jax.random.key_data({0})", [k], values.full((2,), "u32"))


@op("random_clone", exact=("u32",), weight=0.2)
def _clone(g: Gen, dtype: str) -> None:
    k = g.emit("jax.random.clone({0})", [key(g)], Info((), KEY))
    g.emit("jax.random.key_data({0})", [k], values.full((2,), dtype))


@op("threefry2x32", exact=("u32",), weight=0.2)
def _threefry(g: Gen, dtype: str) -> None:
    x = g.take(dtype)
    g.emit("helpers.hashed({0})", [x], values.full(x.info.shape, dtype))


@op("key_batch", exact=("u32",), weight=0.2)
def _key_batch(g: Gen, dtype: str) -> None:
    """Arrays of keys go through what moves elements."""
    count = g.rng.randint(1, 4)
    keys = g.emit(f"jax.random.split({{0}}, {count})", [key(g)], Info((count,), KEY))
    kind = g.rng.randrange(4)
    if kind == 0:
        keys = g.emit("lax.rev({0}, (0,))", [keys], keys.info)
    elif kind == 1:
        keys = g.emit("lax.concatenate([{0}, {0}], 0)", [keys], keys.info.of_shape(2 * count))
    elif kind == 2:
        at = g.make((), "s32")
        g.emit("lax.dynamic_index_in_dim({0}, {1}, keepdims=False)", [keys, at], keys.info.of_shape())
    n = keys.info.shape[0]
    if g.chance(0.5):
        g.emit(f"jax.vmap(lambda k: jax.random.bits(k, (3,), {dtype}))({{0}})", [keys], values.full((n, 3), dtype))
    else:
        g.emit("jax.random.key_data({0})", [keys], values.full((n, 2), dtype))


@op("uniform", exact=FLOATS, smooth=("f64",), weight=0.2)
def _uniform(g: Gen, dtype: str) -> None:
    """Only as many digits as the type has; the smooth family's f64 evaluation must draw the same numbers."""
    shape = g.shape()
    digits = values.PRECISION[dtype] - 1
    if not g.exact:
        g.emit(f"jax.random.uniform({{0}}, {shape}, {dtype})", [key(g)], values.rough(shape, dtype, 0, 1))
        return
    kept = min(digits, 5)
    info = values.number(shape, dtype, 0, 1, kept)
    scale = 2**kept
    code = f"lax.floor(jax.random.uniform({{0}}, {shape}, {dtype}) * {dtype}({scale})) * {dtype}({1 / scale})"
    g.emit(code, [key(g)], info)


@op("normal", smooth=("f64",), weight=0.2)
def _normal(g: Gen, dtype: str) -> None:
    shape = g.shape()
    g.emit(f"jax.random.normal({{0}}, {shape}, {dtype})", [key(g)], values.rough(shape, dtype, -9, 9))


@op("randint", exact=("s32", "s64", "u32", "u8", "s8", "s16"), weight=0.2)
def _randint(g: Gen, dtype: str) -> None:
    shape = g.shape(0, 3)
    low, high = g.rng.choice([(0, 2), (0, 10), (3, 100)])
    code = f"jax.random.randint({{0}}, {shape}, {low}, {high}, {dtype})"
    g.emit(code, [key(g)], values.integer(shape, dtype, low, high - 1))


@op("permutation", exact=("s32",), weight=0.3)
def _permutation(g: Gen, dtype: str) -> None:
    n = g.rng.randint(1, 40)
    g.emit(f"jax.random.permutation({{0}}, {n})", [key(g)], values.integer((n,), "s64", 0, n - 1))


@op("bernoulli", exact=("b1",), weight=0.2)
def _bernoulli(g: Gen, dtype: str) -> None:
    shape = g.shape(0, 3)
    code = f"jax.random.bernoulli({{0}}, np.float32({g.rng.choice([0.25, 0.5])}), {shape})"
    g.emit(code, [key(g)], values.full(shape, dtype))
