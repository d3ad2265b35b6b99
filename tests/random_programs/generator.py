"""The state of a program under construction, and what instructions are made with.

An instruction's generating function asks for operands (:meth:`Gen.take`, :meth:`Gen.make`), brings them into range
(:meth:`Gen.tame`), and appends code with the bounds of its results (:meth:`Gen.emit`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.random_programs import values
from tests.random_programs.program import Block, Input, Instr
from tests.random_programs.values import ALL, FLOATS, KEY, LOOSE, ROUGH, ROUGH_BOUND, SMALL, Info, is_float

#: Most elements of one value, at the top level and inside loops.
LIMIT, INNER_LIMIT = 1024, 256
MAX_INPUTS = 10
MAX_DEPTH = 3
_SIZES = (1, 1, 2, 2, 3, 3, 4, 5, 5, 7, 8, 8, 9, 13, 16, 17, 31, 32, 33, 64)


class Skip(Exception):
    """An instruction cannot be placed here; another one is tried."""


class Value(NamedTuple):
    name: str
    info: Info


@dataclass
class Frame:
    """One function under construction: what its code can see beside outer values, and its code so far."""

    values: list[Value] = field(default_factory=list)
    instrs: list[Instr] = field(default_factory=list)


class Gen:
    """Builds one program.

    Args:
      seed: the program's seed.
      family: "exact" or "smooth".
      budget: about how many primitives to place.
    """

    def __init__(self, seed: int, family: str, budget: int):
        self.rng = random.Random(f"{family} {seed}")
        self.exact = family == "exact"
        self.left = budget
        self.inputs: list[Input] = []
        self.frames = [Frame()]
        #: What is known of every value, nested ones included.
        self.infos: dict[str, Info] = {}
        #: Places a random instruction; set by the module that knows all of them.
        self.place: Callable[[Gen], None] = lambda g: None
        self._names = 0

    # -- drawing -----------------------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def shape(self, min_rank: int = 0, max_rank: int = 4, *, nonempty: bool = False) -> tuple[int, ...]:
        ranks = [r for r in (0, 1, 1, 1, 2, 2, 2, 3, 3, 4) if min_rank <= r <= max_rank]
        shape = [self.rng.choice(_SIZES) for _ in range(self.rng.choice(ranks or [min_rank]))]
        while math.prod(shape) > self.limit // 2:
            axis = shape.index(max(shape))
            shape[axis] = max(1, shape[axis] // 3)
        if shape and not nonempty and self.chance(0.04):
            shape[self.rng.randrange(len(shape))] = 0
        return tuple(shape)

    @property
    def limit(self) -> int:
        return LIMIT if self.depth == 0 else INNER_LIMIT

    @property
    def depth(self) -> int:
        return len(self.frames) - 1

    def small(self, dtype: str) -> tuple[int, int]:
        """Bound and frac that leave room for some arithmetic."""
        if not is_float(dtype):
            return 8, 0
        return SMALL[dtype] if self.exact else (4, ROUGH)

    # -- emitting ----------------------------------------------------------------------------------------------

    def name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    def emit(self, code: str, args: Sequence[Value], info: Info, blocks: Sequence[Block] = ()) -> Value:
        """Appends an instruction with one result."""
        return self._append(code, args, [info], blocks, packed=False)[0]

    def emit_many(
        self, code: str, args: Sequence[Value], infos: Sequence[Info], blocks: Sequence[Block] = ()
    ) -> list[Value]:
        """Appends an instruction whose results come in a tuple or list."""
        return self._append(code, args, infos, blocks, packed=True)

    def _append(
        self, code: str, args: Sequence[Value], infos: Sequence[Info], blocks: Sequence[Block], *, packed: bool
    ) -> list[Value]:
        for info in infos:
            if info.size > 2 * LIMIT or (self.exact and (info.rough or not info.exact())):
                raise Skip(f"{code}: {info}")
        results = [Value(self.name(), info) for info in infos]
        names = tuple(v.name for v in results)
        self.frames[-1].instrs.append(Instr(names, code, tuple(a.name for a in args), tuple(blocks), packed))
        self.frames[-1].values += results
        self.infos.update((v.name, v.info) for v in results)
        self.left -= 1
        return results

    @contextmanager
    def nested(self) -> Iterator[Frame]:
        """A nested function: what is emitted inside belongs to it."""
        if self.depth >= MAX_DEPTH:
            raise Skip("too deep")
        self.frames.append(Frame())
        try:
            yield self.frames[-1]
        finally:
            self.frames.pop()

    def param(self, info: Info) -> Value:
        """A parameter of the innermost function."""
        value = Value(self.name(), info)
        self.frames[-1].values.append(value)
        self.infos[value.name] = info
        return value

    def fill(self, most: int) -> None:
        """Places a few random instructions in the innermost function."""
        for _ in range(self.rng.randint(1, max(1, min(most, self.left)))):
            self.place(self)

    # -- operands ----------------------------------------------------------------------------------------------

    def visible(self) -> list[Value]:
        return [v for frame in self.frames for v in frame.values]

    def find(self, test: Callable[[Info], bool]) -> Value | None:
        """A value that passes the test, likely a recent one."""
        found = [v for v in self.visible() if test(v.info)]
        if not found:
            return None
        if self.chance(0.3):
            return self.rng.choice(found)
        return found[-1 - min(len(found) - 1, int(self.rng.expovariate(0.3)))]

    def take(
        self,
        dtype: str,
        min_rank: int = 0,
        max_rank: int = 4,
        *,
        nonempty: bool = False,
        limit: int | None = None,
    ) -> Value:
        """Some value of a type."""
        limit = self.limit if limit is None else limit

        def fits(info: Info) -> bool:
            return (
                info.dtype == dtype
                and min_rank <= info.rank <= max_rank
                and info.size <= limit
                and (info.size > 0 or not nonempty)
            )

        found = self.find(fits) if self.chance(0.9) else None
        if found is not None:
            return found
        shape = self.shape(min_rank, max_rank, nonempty=nonempty)
        while math.prod(shape) > limit:
            shape = tuple((n + 1) // 2 for n in shape)
        return self.make(shape, dtype)

    def take_any(self, dtypes: Sequence[str] = ALL, min_rank: int = 0, max_rank: int = 4) -> Value:
        """Some value of one of the types."""
        found = self.find(lambda i: i.dtype in dtypes and min_rank <= i.rank <= max_rank and i.size <= self.limit)
        return found if found is not None else self.take(self.rng.choice(list(dtypes)), min_rank, max_rank)

    def make(self, shape: tuple[int, ...], dtype: str) -> Value:
        """A value of this shape and type, made of others if that is easy."""
        ways = [self._same, self._same, self._same, self._reshaped, self._broadcast, self._converted, self._sliced]
        self.rng.shuffle(ways)
        for way in ways[: self.rng.randint(3, 7)]:
            found = way(shape, dtype)
            if found is not None:
                return found
        return self.fresh(shape, dtype)

    def fresh(self, shape: tuple[int, ...], dtype: str) -> Value:
        """A new input, constant or iota."""
        if dtype == KEY:
            raise Skip("no key")
        if len(self.inputs) < MAX_INPUTS and self.chance(0.8):
            return self.input(shape, dtype)
        bound, _ = self.small(dtype)
        if dtype == "b1":
            if self.chance(0.5):
                return self.emit(f"lax.full({shape}, b1({self.chance(0.5)}))", [], values.full(shape, dtype))
            source = self.make(shape, "s32")
            return self.emit("lax.gt({0}, jnp.zeros_like({0}))", [source], values.full(shape, dtype))
        if shape and self.chance(0.5):
            axis = self.rng.randrange(len(shape))
            top = max(shape[axis] - 1, 0)
            if not is_float(dtype) or top <= bound:
                info = values.number(shape, dtype, 0, top, 0 if self.exact else self._frac(dtype))
                return self.emit(f"lax.broadcasted_iota({dtype}, {shape}, {axis})", [], info)
        if math.prod(shape) <= 24 and self.chance(0.5):
            low, info = self._range(shape, dtype)
            scale = 2 ** max(info.frac, 0)
            data = [self.rng.randint(int(low), int(bound)) / scale for _ in range(math.prod(shape))]
            if not is_float(dtype):
                data = [int(x) for x in data]
            return self.emit(f"jnp.array(np.array({data}, {dtype}).reshape({shape}))", [], info)
        c = self.constant(dtype)
        info = values.number(shape, dtype, c, c, self._frac(dtype) if is_float(dtype) else 0)
        return self.emit(f"lax.full({shape}, {dtype}({c}))", [], info)

    def _frac(self, dtype: str) -> int:
        return self.small(dtype)[1]

    def constant(self, dtype: str) -> float:
        """A small number that is no zero of a float type (XLA drops additions of those)."""
        bound, frac = self.small(dtype)
        low = 0 if dtype in values.UNSIGNED else -bound
        if not is_float(dtype):
            return self.rng.randint(low, bound)
        scale = 2 ** (2 if frac == ROUGH else frac)
        return self.rng.choice([-1, 1]) * self.rng.randint(1, bound * scale) / scale

    def _range(self, shape: tuple[int, ...], dtype: str) -> tuple[float, Info]:
        bound, frac = self.small(dtype)
        low = 0 if dtype in values.UNSIGNED else -bound
        return low, values.number(shape, dtype, low, bound, frac)

    def input(self, shape: tuple[int, ...], dtype: str, style: str | None = None) -> Value:
        """A new argument of the program."""
        name = f"a{len(self.inputs)}"
        style = style or self.rng.choice(["bits", "small"])
        if dtype == "b1" or (not is_float(dtype) and style == "bits"):
            info = values.full(shape, dtype)
        else:
            _, info = self._range(shape, dtype)
            if not is_float(dtype):
                info = values.integer(shape, dtype, max(-9, values.int_range(dtype)[0]), 9)
        same = [i for i in self.inputs if i.info == info and i.style == style]
        shared = same[0].name if same and self.chance(0.3) else None
        self.inputs.append(Input(name, info, style, shared))
        value = Value(name, info)
        self.infos[name] = info
        self.frames[0].values.append(value)
        return value

    def _same(self, shape: tuple[int, ...], dtype: str) -> Value | None:
        return self.find(lambda i: i.shape == shape and i.dtype == dtype)

    def _reshaped(self, shape: tuple[int, ...], dtype: str) -> Value | None:
        found = self.find(lambda i: i.size == math.prod(shape) and i.dtype == dtype and i.shape != shape)
        return found and self.emit(f"lax.reshape({{0}}, {shape})", [found], found.info.of_shape(*shape))

    def _broadcast(self, shape: tuple[int, ...], dtype: str) -> Value | None:
        found = self.find(lambda i: i.dtype == dtype and i.shape != shape and _spread(i.shape, shape) is not None)
        if found is None:
            return None
        axes = _spread(found.info.shape, shape)
        code = f"lax.broadcast_in_dim({{0}}, {shape}, {axes})"
        return self.emit(code, [found], found.info.of_shape(*shape))

    def _converted(self, shape: tuple[int, ...], dtype: str) -> Value | None:
        if dtype == KEY:
            return None
        found = self.find(lambda i: i.shape == shape and i.dtype not in (dtype, KEY) and self.may_convert(i, dtype))
        return found and self.convert(found, dtype)

    def _sliced(self, shape: tuple[int, ...], dtype: str) -> Value | None:
        found = self.find(
            lambda i: i.dtype == dtype and i.rank == len(shape) and all(m >= n for m, n in zip(i.shape, shape))
        )
        if found is None or found.info.shape == shape:
            return found
        starts = [self.rng.randint(0, m - n) for m, n in zip(found.info.shape, shape)]
        limits = [a + n for a, n in zip(starts, shape)]
        return self.emit(f"lax.slice({{0}}, {starts}, {limits})", [found], found.info.of_shape(*shape))

    # -- bringing into range -----------------------------------------------------------------------------------

    def may_convert(self, info: Info, dtype: str) -> bool:
        return not (info.rough and not is_float(dtype))

    def convert(self, v: Value, dtype: str) -> Value:
        """``v`` as another type, its value unchanged (integers may wrap)."""
        if v.info.dtype == dtype:
            return v
        bound, frac = self.small(dtype)
        info = v.info
        if is_float(dtype):
            if is_float(info.dtype):
                v = self.tame(v, min(bound, self.small(info.dtype)[0]), max(frac, 0))
            elif info.dtype != "b1" and info.bound > bound:
                v = self.tame(v, bound)
            frac = v.info.frac if self.exact else ROUGH
            new = values.number(info.shape, dtype, v.info.lo, v.info.hi, frac, v.info.zeros)
        elif info.rough:
            raise Skip("a rounded value as an integer")
        elif dtype == "b1":
            new = values.full(info.shape, dtype)
        else:
            if is_float(info.dtype):
                low = 0 if dtype in values.UNSIGNED else None
                v = self.tame(v, min(100, info.bound), info.frac, low)
            new = values.integer(info.shape, dtype, math.floor(v.info.lo), math.ceil(v.info.hi))
        return self.emit(f"lax.convert_element_type({{0}}, {dtype})", [v], new)

    def tame(self, v: Value, bound: float, frac: int = 0, lo: float | None = None) -> Value:
        """``v`` moved into [-bound, bound], or [lo, bound], with at most ``frac`` bits after the point."""
        info = v.info
        if info.dtype in ("b1", KEY):
            return v
        low = -bound if lo is None else lo
        if info.dtype in values.UNSIGNED:
            low = max(low, 0)
        if is_float(info.dtype) and not info.rough and info.frac > max(frac, 0):
            which = self.rng.choice(["lax.floor({0})", "lax.ceil({0})", "lax.round({0})"])
            new = values.number(
                info.shape, info.dtype, math.floor(info.lo), math.ceil(info.hi), 0, max(info.zeros, values.DEFINED)
            )
            v = self.emit(which, [v], new)
            info = v.info
        if low <= info.lo and info.hi <= bound:
            return v
        return self._confined(v, low, bound)

    def _confined(self, v: Value, low: float, high: float) -> Value:
        info, dtype = v.info, v.info.dtype
        if not is_float(dtype):
            least, most = values.int_range(dtype)
            low, high = max(math.ceil(low), least), min(math.floor(high), most)
        frac, zeros = info.frac, info.zeros
        symmetric = low == -high
        if info.rough and symmetric and self.chance(0.5):
            if self.chance(0.5) or not math.isfinite(info.bound):
                new = values.rough(info.shape, dtype, low, high)
                return self.emit(f"lax.tanh({{0}}) * {dtype}({high})", [v], new)
            factor = 2.0 ** math.floor(math.log2(high / info.bound))
            if factor >= 2.0**-8:
                new = values.rough(info.shape, dtype, info.lo * factor, info.hi * factor)
                return self.emit(f"{{0}} * {dtype}({factor})", [v], new)
        if not info.rough and symmetric and float(high).is_integer() and high >= 1 and self.chance(0.3):
            # The remainder has the dividend's sign and a smaller size than the divisor.
            new = values.number(info.shape, dtype, low, high, frac, max(zeros, values.DEFINED))
            return self.emit(f"lax.rem({{0}}, lax.full_like({{0}}, {high}))", [v], new)
        if zeros != values.POSITIVE and low <= 0 <= high and (low == 0 or high == 0):
            zeros = LOOSE
        if is_float(dtype):
            low, high = float(low), float(high)
        new = values.number(info.shape, dtype, max(low, min(info.lo, high)), min(high, max(info.hi, low)), frac, zeros)
        return self.emit(f"lax.clamp({dtype}({low}), {{0}}, {dtype}({high}))", [v], new)

    def fit(self, transfer: Callable[..., Info], *args: Value) -> tuple[Info, list[Value]]:
        """Operands, tamed if they must be, and the result's info, so that the result is exact (or of moderate size)."""
        info = transfer(*(a.info for a in args))
        if self._good(info):
            return info, list(args)
        tamed = []
        for a in args:
            bound, frac = self.small(a.info.dtype)
            tamed.append(self.tame(a, bound, frac))
        info = transfer(*(a.info for a in tamed))
        if not self._good(info):
            tamed = [self.tame(a, 1 if is_float(a.info.dtype) else 8, 0) for a in tamed]
            info = transfer(*(a.info for a in tamed))
            if not self._good(info):
                raise Skip("does not fit")
        return info, tamed

    def _good(self, info: Info) -> bool:
        if info.rough:
            return info.bound <= ROUGH_BOUND
        return info.exact()

    def pair(self, dtype: str, **limits: int) -> tuple[Value, Value]:
        """Two values of one type and shape."""
        a = self.take(dtype, **limits)
        b = a if self.chance(0.05) else self.make(a.info.shape, dtype)
        if b.name == a.name and self.chance(0.8):
            b = self.fresh(a.info.shape, dtype)
        return (a, b) if self.chance(0.5) else (b, a)

    def scalar_int(self, low: int, high: int, dtype: str | None = None) -> Value:
        """A scalar integer in a range, known at run time only."""
        dtype = dtype or self.rng.choice(["s32", "s32", "s64", "u8", "s16", "u32"])
        v = self.make((), dtype)
        if v.info.lo < low or v.info.hi > high:
            v = self._confined(v, low, high)
        return v


def _spread(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """Axes of ``new`` that the axes of ``old`` become in a broadcast, or None."""
    if len(old) > len(new):
        return None
    axes = []
    start = 0
    for size in old:
        while start < len(new) and size not in (1, new[start]):
            start += 1
        if start == len(new):
            return None
        axes.append(start)
        start += 1
    return tuple(axes)


__all__ = ["FLOATS", "Block", "Frame", "Gen", "Skip", "Value"]
