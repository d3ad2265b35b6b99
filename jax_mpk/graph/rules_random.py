"""Rules for random keys and bits.

A key array is an array of words: making, unwrapping and cloning keys moves nothing. What splits keys or draws bits is
JAX's own composition around a hash of (key, counter), built inline; only the hashes are written out here, as straight
lines of scalar operations on u32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jax_mpk.graph.build import BlockBuilder, Load, decompose, rule, unsupported
from jax_mpk.graph.ir import Value
from jax_mpk.graph.scalar import Builder

_PARITY = 0x1BD11BDA
_THREEFRY2_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_THREEFRY4_ROTATIONS = (
    (10, 26),
    (11, 21),
    (13, 27),
    (23, 5),
    (6, 20),
    (17, 11),
    (25, 10),
    (18, 20),
)
_PHILOX2_MULTIPLIER = 0xD256D193
_PHILOX4_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_BUMPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10


@rule("random_wrap", "random_unwrap", "random_clone")
def _same_words(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    return xs


# -- JAX's compositions ----------------------------------------------------------------------------------------


def _vectorized(fn: Callable[..., Any], rank: int) -> Callable[..., Any]:
    for _ in range(rank):
        fn = jax.vmap(fn)
    return fn


def _implementation(eqn: JaxprEqn) -> Any:
    """JAX's description of the generator that the equation's keys belong to."""
    aval: Any = eqn.invars[0].aval
    return aval.dtype._impl


@rule("random_seed")
def _random_seed(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    fn = _vectorized(eqn.params["impl"].seed, len(xs[0].shape))
    return decompose(bb, eqn, fn, *xs)


@rule("random_split")
def _random_split(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    impl, aval = _implementation(eqn), _logical(eqn, 0)
    fn = partial(_swapped, impl.split, (eqn.params["shape"],))
    return decompose(bb, eqn, _vectorized(fn, len(aval.shape)), *xs)


@rule("random_bits")
def _random_bits(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    impl, aval = _implementation(eqn), _logical(eqn, 0)
    fn = partial(_swapped, impl.random_bits, (eqn.params["bit_width"], eqn.params["shape"]))
    return decompose(bb, eqn, _vectorized(fn, len(aval.shape)), *xs)


@rule("random_fold_in")
def _random_fold_in(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    impl = _implementation(eqn)
    aval: Any = eqn.outvars[0].aval
    shape = aval.shape

    def fn(keys: Any, data: Any) -> Any:
        keys = jnp.broadcast_to(keys, (*shape, *impl.key_shape))
        return _vectorized(impl.fold_in, len(shape))(keys, jnp.broadcast_to(data, shape))

    return decompose(bb, eqn, fn, *xs)


@rule("random_gamma")
def _random_gamma(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """Rejection sampling, all elements at once: a loop that runs until every element has accepted."""
    fn = partial(eqn.primitive.impl, log_space=eqn.params["log_space"], use_vmap=True)
    return decompose(bb, eqn, fn, *xs, avals=[atom.aval for atom in eqn.invars])


@rule("rng_bit_generator")
def _rng_bit_generator(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    raise unsupported(
        eqn,
        f"the bits of XLA's generator {eqn.params['algorithm']} depend on the platform; use threefry2x32 keys, "
        "JAX's default",
    )


@rule("rng_uniform")
def _rng_uniform(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    raise unsupported(eqn, "it draws from a hidden state; use jax.random.uniform")


def _swapped(fn: Callable[..., Any], static: tuple[Any, ...], key: Any) -> Any:
    return fn(key, *static)


def _logical(eqn: JaxprEqn, operand: int) -> Any:
    return eqn.invars[operand].aval


# -- counters and hashes ---------------------------------------------------------------------------------------


@rule("iota_2x32_shape")
def _iota_2x32_shape(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """Row-major position of each element as two words, the higher one first."""
    shape = eqn.params["shape"]

    def body(b: Builder, at: list[int], load: Load) -> list[int]:
        position = b.linearize(at, shape)
        # Shifts lose ranges, so 0 is written as such where it is known.
        known = b.ranges[position]
        if known is not None and known[1] < 2**32:
            high = b.index(0)
        else:
            high = b.op("shr_logical", position, b.index(32))
        return [b.convert(high, "u32"), b.convert(position, "u32")]

    return bb.map(shape, [], body, ["u32", "u32"])


@rule("threefry2x32", "threefry4x32", "philox2x32", "philox4x32")
def _hash(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    hashed = _HASHES[eqn.primitive.name]
    aval: Any = eqn.outvars[0].aval
    shape = aval.shape

    def body(b: Builder, at: list[int], load: Load) -> list[int]:
        words = []
        for slot, x in enumerate(xs):
            # Operands are scalars or have the rank of the result; axes of extent 1 are repeated.
            own = [b.index(0) if size == 1 else i for size, i in zip(x.shape, at, strict=False)]
            words.append(load(slot, own))
        return hashed(b, words)

    return bb.map(shape, xs, body, ["u32"] * len(eqn.outvars))


def _word(b: Builder, value: int) -> int:
    return b.const(value & 0xFFFFFFFF, "u32")


def _rotated(b: Builder, x: int, by: int) -> int:
    return b.op("or", b.op("shl", x, _word(b, by)), b.op("shr_logical", x, _word(b, 32 - by)))


def _mixed(b: Builder, x: int, y: int, rotation: int) -> tuple[int, int]:
    x = b.add(x, y)
    return x, b.op("xor", x, _rotated(b, y, rotation))


def _key_schedule(b: Builder, key: Sequence[int]) -> list[int]:
    parity = _word(b, _PARITY)
    for word in key:
        parity = b.op("xor", word, parity)
    return [*key, parity]


def _threefry2x32(b: Builder, words: list[int]) -> list[int]:
    keys = _key_schedule(b, words[:2])
    x, y = b.add(words[2], keys[0]), b.add(words[3], keys[1])
    for group in range(5):
        for rotation in _THREEFRY2_ROTATIONS[group % 2]:
            x, y = _mixed(b, x, y, rotation)
        x = b.add(x, keys[(group + 1) % 3])
        y = b.add(b.add(y, keys[(group + 2) % 3]), _word(b, group + 1))
    return [x, y]


def _threefry4x32(b: Builder, words: list[int]) -> list[int]:
    keys = _key_schedule(b, words[:4])
    x = [b.add(word, key) for word, key in zip(words[4:], keys, strict=False)]
    for step in range(20):
        first, second = _THREEFRY4_ROTATIONS[step % 8]
        p, q = (1, 3) if step % 2 == 0 else (3, 1)
        x[0], x[p] = _mixed(b, x[0], x[p], first)
        x[2], x[q] = _mixed(b, x[2], x[q], second)
        if step % 4 == 3:
            group = step // 4 + 1
            x = [b.add(word, keys[(group + k) % 5]) for k, word in enumerate(x)]
            x[3] = b.add(x[3], _word(b, group))
    return x


def _products(b: Builder, x: int, multiplier: int) -> tuple[int, int]:
    """Low and high word of a product."""
    wide = b.mul(b.convert(x, "u64"), b.const(multiplier, "u64"))
    high = b.op("shr_logical", wide, b.const(32, "u64"))
    return b.mul(x, _word(b, multiplier)), b.convert(high, "u32")


def _philox2x32(b: Builder, words: list[int]) -> list[int]:
    key, x, y = words
    for step in range(_PHILOX_ROUNDS):
        bumped = b.add(key, _word(b, step * _PHILOX_BUMPS[0])) if step else key
        low, high = _products(b, x, _PHILOX2_MULTIPLIER)
        x, y = b.op("xor", b.op("xor", high, y), bumped), low
    return [x, y]


def _philox4x32(b: Builder, words: list[int]) -> list[int]:
    keys, x = words[:2], words[2:]
    for step in range(_PHILOX_ROUNDS):
        first, second = (
            b.add(key, _word(b, step * bump)) if step else key for key, bump in zip(keys, _PHILOX_BUMPS, strict=True)
        )
        low0, high0 = _products(b, x[0], _PHILOX4_MULTIPLIERS[0])
        low1, high1 = _products(b, x[2], _PHILOX4_MULTIPLIERS[1])
        x = [
            b.op("xor", b.op("xor", high1, x[1]), first),
            low1,
            b.op("xor", b.op("xor", high0, x[3]), second),
            low0,
        ]
    return x


_HASHES = {
    "threefry2x32": _threefry2x32,
    "threefry4x32": _threefry4x32,
    "philox2x32": _philox2x32,
    "philox4x32": _philox4x32,
}
