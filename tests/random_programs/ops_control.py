"""Loops, branches and other instructions that hold nested functions.

Whatever a loop carries is brought back into the range it started in, so that bounds hold for any number of trips.
"""

from __future__ import annotations

import dataclasses

from tests.random_programs import values
from tests.random_programs.generator import Frame, Gen, Skip, Value
from tests.random_programs.program import Block
from tests.random_programs.registry import op
from tests.random_programs.values import ALL, FLOATS, INTS, KEY, LOOSE, Info

_MOST_TRIPS = 5


def _carried(g: Gen, dtype: str) -> list[Value]:
    """Initial values of what a loop carries, the first of type ``dtype``, within the bounds kept throughout."""
    found = [g.take(dtype, limit=128)]
    for _ in range(g.rng.choice([0, 0, 1, 2])):
        other = g.take_any(ALL if g.exact else (*FLOATS, *INTS))
        if other.info.size <= 128:
            found.append(other)
    return [g.tame(v, *_kept(g, v.info)) for v in found]


def _kept(g: Gen, info: Info) -> tuple[float, int]:
    """Bound and frac of a carried value."""
    if values.is_float(info.dtype):
        return g.small(info.dtype)
    return values.int_range(info.dtype)[1] if info.dtype in values.UNSIGNED else 2.0**70, 0


def _invariant(g: Gen, info: Info) -> Info:
    """What holds of a carried value in every round."""
    if info.dtype == KEY:
        return info
    if not values.is_float(info.dtype):
        return values.full(info.shape, info.dtype)
    bound, frac = g.small(info.dtype)
    if not g.exact:
        return values.rough(info.shape, info.dtype, -bound, bound)
    return Info(info.shape, info.dtype, -bound, bound, frac, LOOSE)


def _next(g: Gen, frame: Frame, param: Value) -> Value:
    """A value made inside a function that can take a parameter's place in the next round."""
    info = param.info
    own = [v for v in frame.values if (v.info.shape, v.info.dtype) == (info.shape, info.dtype) and v != param]
    if own and g.chance(0.85):
        v = own[-1 - min(len(own) - 1, int(g.rng.expovariate(0.7)))]
    elif info.dtype == KEY or g.chance(0.3):
        v = param
    else:
        made = g.make(info.shape, info.dtype)
        if info.dtype == "b1":
            v = g.emit("lax.bitwise_xor({0}, {1})", [param, made], values.full(info.shape, "b1"))
        else:
            low, high = g.tame(param, 2, 0), g.tame(made, 2, 0)
            v = _plus(g, low, high)
    return g.tame(v, *_kept(g, info))


def _plus(g: Gen, a: Value, b: Value) -> Value:
    lo, hi = a.info.lo + b.info.lo, a.info.hi + b.info.hi
    info = values.number(a.info.shape, a.info.dtype, lo, hi, values.frac_of(a.info, b.info), LOOSE)
    if not values.is_float(info.dtype):
        info = dataclasses.replace(info, zeros=0)
    return g.emit("{0} + {1}", [a, b], info)


def _tuple(count: int, first: int = 0) -> str:
    return "(" + "".join(f"{{{first + k}}}, " for k in range(count)) + ")"


@op("fori_loop", exact=ALL, smooth=FLOATS, weight=1.2)
def _fori(g: Gen, dtype: str) -> None:
    carry = _carried(g, dtype)
    if g.chance(0.4):
        trips = None
        code_trips = str(g.rng.choice([0, 1, 2, 3, _MOST_TRIPS]))
    else:
        trips = g.scalar_int(-1, _MOST_TRIPS, "s32")
        code_trips = f"{{{len(carry)}}}"
    with g.nested() as frame:
        # A loop of a known number of trips may count in another type.
        i = Value(g.name(), values.integer((), "s32", 0, _MOST_TRIPS))
        g.emit("lax.convert_element_type({0}, s32)", [i], i.info)
        params = [g.param(_invariant(g, v.info)) for v in carry]
        g.fill(6)
        results = [_next(g, frame, p) for p in params]
        block = Block(
            (i.name, tuple(p.name for p in params)),
            tuple(frame.instrs),
            tuple(r.name for r in results),
            _tuple(len(results)),
        )
    args = [*carry, *([] if trips is None else [trips])]
    code = f"lax.fori_loop(0, {code_trips}, {{f0}}, {_tuple(len(carry))})"
    g.emit_many(code, args, [p.info for p in params], [block])


@op("while_loop", exact=ALL, smooth=FLOATS, weight=1.2)
def _while(g: Gen, dtype: str) -> None:
    """Runs until a counter passes a limit or, in the exact family, the data say so."""
    carry = _carried(g, dtype)
    limit = g.scalar_int(0, _MOST_TRIPS, "s32")
    count = Info((), "s32", 0, _MOST_TRIPS)
    with g.nested() as frame:
        i, params = g.param(count), [g.param(_invariant(g, v.info)) for v in carry]
        goes_on = g.emit("{0} < {1}", [i, limit], values.full((), "b1"))
        if g.exact and g.chance(0.5):
            flag = g.make((), "b1")
            enough = g.emit("{0} < s32(2)", [i], values.full((), "b1"))
            either = g.emit("{0} | {1}", [flag, enough], values.full((), "b1"))
            goes_on = g.emit("{0} & {1}", [goes_on, either], values.full((), "b1"))
        names = ((i.name, *(p.name for p in params)),)
        cond = Block(names, tuple(frame.instrs), (goes_on.name,), "{0}")
    with g.nested() as frame:
        i, params = g.param(count), [g.param(_invariant(g, v.info)) for v in carry]
        g.fill(6)
        results = [_next(g, frame, p) for p in params]
        following = g.emit("{0} + s32(1)", [i], dataclasses.replace(count, hi=_MOST_TRIPS + 1))
        results = [following, *results]
        names = ((i.name, *(p.name for p in params)),)
        body = Block(names, tuple(frame.instrs), tuple(r.name for r in results), _tuple(len(results)))
    code = f"lax.while_loop({{f0}}, {{f1}}, (s32(0), {_tuple(len(carry))[1:]})"
    infos = [dataclasses.replace(count, hi=_MOST_TRIPS + 1), *(p.info for p in params)]
    g.emit_many(code, carry, infos, [cond, body])


@op("scan", exact=ALL, smooth=FLOATS, weight=1.5)
def _scan(g: Gen, dtype: str) -> None:
    carry = _carried(g, dtype)
    found = g.find(lambda i: i.dtype != KEY and i.rank >= 1 and i.shape[0] <= 8 and i.size <= 256)
    trips = g.rng.choice([0, 1, 2, 3, 5]) if found is None else found.info.shape[0]
    xs = [found] if found is not None else []
    while len(xs) < 2 and g.chance(0.4):
        xs.append(g.make((trips, *g.shape(0, 1)), g.rng.choice(ALL if g.exact else FLOATS)))
    with g.nested() as frame:
        params = [g.param(_invariant(g, v.info)) for v in carry]
        rows = [g.param(x.info.of_shape(*x.info.shape[1:])) for x in xs]
        g.fill(6)
        results = [_next(g, frame, p) for p in params]
        own = [v for v in frame.values if v.info.dtype != KEY and v.info.size * max(trips, 1) <= g.limit]
        ys = g.rng.sample(own, min(len(own), g.rng.randint(0, 2)))
        head: tuple[str | tuple[str, ...], ...] = (tuple(p.name for p in params), tuple(r.name for r in rows))
        returns = f"({_tuple(len(results))}, {_tuple(len(ys), len(results))})"
        block = Block(head, tuple(frame.instrs), tuple(v.name for v in [*results, *ys]), returns)
    infos = [p.info for p in params] + [y.info.of_shape(trips, *y.info.shape) for y in ys]
    given = _tuple(len(xs), len(carry)) if xs else "None"
    if not xs:
        block = dataclasses.replace(block, params=(block.params[0], "unused"))
    extra = f", length={trips}, reverse={g.chance(0.3)}"
    if g.chance(0.15):
        extra += ", unroll=2"
    code = f"helpers.flat(lax.scan({{f0}}, {_tuple(len(carry))}, {given}{extra}))"
    g.emit_many(code, [*carry, *xs], infos, [block])


def _arms(g: Gen, dtype: str, count: int) -> tuple[list[Block], list[Info], list[Value]]:
    """Functions of the same operands with results of the same types."""
    models = [g.take(dtype, limit=256)]
    if g.chance(0.4):
        models.append(g.take_any(ALL if g.exact else (*FLOATS, *INTS)))
    operands = [g.take_any() for _ in range(g.rng.randint(0, 2))]
    blocks, all_results = [], []
    for _ in range(count):
        with g.nested() as frame:
            params = [g.param(v.info) for v in operands]
            if g.chance(0.85):
                g.fill(4)
            results = []
            for model in models:
                own = [v for v in frame.values if (v.info.shape, v.info.dtype) == (model.info.shape, model.info.dtype)]
                results.append(own[-1] if own and g.chance(0.9) else model)
            names = tuple(p.name for p in params)
            blocks.append(Block(names, tuple(frame.instrs), tuple(r.name for r in results), _tuple(len(results))))
            all_results.append(results)
    infos = [values.union(*(r[k].info for r in all_results)) for k in range(len(models))]
    return blocks, infos, operands


@op("cond", exact=ALL, smooth=FLOATS, weight=1.5)
def _cond(g: Gen, dtype: str) -> None:
    pred = g.make((), "b1")
    blocks, infos, operands = _arms(g, dtype, 2)
    given = "".join(f", {{{k + 1}}}" for k in range(len(operands)))
    g.emit_many(f"lax.cond({{0}}, {{f0}}, {{f1}}{given})", [pred, *operands], infos, blocks)


@op("switch", exact=ALL, smooth=FLOATS)
def _switch(g: Gen, dtype: str) -> None:
    """The index may lie outside: it is clamped."""
    index = g.make((), g.rng.choice(["s32", "s32", "u8", "s64", "u32"]))
    count = g.rng.randint(1, 4)
    blocks, infos, operands = _arms(g, dtype, count)
    given = "".join(f", {{{k + 1}}}" for k in range(len(operands)))
    arms = ", ".join(f"{{f{k}}}" for k in range(count))
    g.emit_many(f"lax.switch({{0}}, [{arms}]{given})", [index, *operands], infos, blocks)


def _called(g: Gen, dtype: str, call: str) -> None:
    """A nested function that is called once."""
    operands = [g.take(dtype), *(g.take_any() for _ in range(g.rng.randint(0, 1)))]
    with g.nested() as frame:
        params = [g.param(v.info) for v in operands]
        g.fill(5)
        own = [v for v in frame.values if v.info.dtype != KEY]
        results = g.rng.sample(own, min(len(own), g.rng.randint(1, 3)))
        names = tuple(p.name for p in params)
        block = Block(names, tuple(frame.instrs), tuple(r.name for r in results), _tuple(len(results)))
    given = ", ".join(f"{{{k}}}" for k in range(len(operands)))
    g.emit_many(f"{call}({{f0}})({given})", operands, [r.info for r in results], [block])


@op("jit_call", exact=ALL, smooth=FLOATS)
def _jit(g: Gen, dtype: str) -> None:
    _called(g, dtype, "jax.jit")


@op("remat_call", exact=ALL, smooth=FLOATS, weight=0.4)
def _remat(g: Gen, dtype: str) -> None:
    _called(g, dtype, "jax.checkpoint")


@op("vmap", exact=ALL, smooth=FLOATS, weight=1.2)
def _vmap(g: Gen, dtype: str) -> None:
    """A nested function over rows: whatever is inside is batched, branches and loops included."""
    x = g.take(dtype, 1)
    axis = g.rng.randrange(x.info.rank)
    n = x.info.shape[axis]
    if n == 0 or n > 9:
        raise Skip("rows")
    with g.nested() as frame:
        row = g.param(x.info.of_shape(*x.info.shape[:axis], *x.info.shape[axis + 1 :]))
        g.fill(4)
        own = [v for v in frame.values if v.info.dtype != KEY and v.info.size * n <= g.limit and v.info.rank < 4]
        results = g.rng.sample(own, min(len(own), g.rng.randint(1, 2)))
        if not results:
            raise Skip("too large")
        outs = tuple(g.rng.randint(0, r.info.rank) for r in results)
        block = Block((row.name,), tuple(frame.instrs), tuple(r.name for r in results), _tuple(len(results)))
    infos = [r.info.of_shape(*r.info.shape[:k], n, *r.info.shape[k:]) for r, k in zip(results, outs)]
    g.emit_many(f"jax.vmap({{f0}}, in_axes={axis}, out_axes={outs})({{0}})", [x], infos, [block])


@op("associative_scan", exact=INTS, weight=0.3)
def _associative_scan(g: Gen, dtype: str) -> None:
    x = g.take(dtype, 1)
    name = g.rng.choice(["lax.add", "lax.bitwise_xor", "lax.max", "lax.mul"])
    info = x.info if name == "lax.max" else values.full(x.info.shape, dtype)
    g.emit(f"lax.associative_scan({name}, {{0}})", [x], info)
