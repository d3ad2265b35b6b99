"""Rules of loops and branches.

Blocks may read values of the blocks around them, so operands that do not change from one round to the next are never
carried: neither the constants of a loop nor carries that the body passes on unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import Jaxpr, JaxprEqn

from jax_mpk.capture import jaxprs
from jax_mpk.graph import dtypes
from jax_mpk.graph.build import BlockBuilder, Load, element_type, rule, run
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.ir import Combine, Value
from jax_mpk.graph.scalar import Builder


@rule("cond")
def _cond(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    which, *operands = xs
    branches = [jaxprs.open_jaxpr(branch)[0] for branch in eqn.params["branches"]]
    bits = bb.constant_bits(which)
    if bits is not None or len(branches) == 1:
        chosen = 0 if bits is None else int(dtypes.from_bits(bits, which.dtype))
        return run(bb, branches[min(max(chosen, 0), len(branches) - 1)], operands)
    if not eqn.outvars:
        return []
    if which.dtype != "s32":
        (which,) = bb.map((), [which], lambda b, at, load: b.convert(load(0, []), "s32"), ["s32"])
    arms = []
    for branch in branches:
        inner = bb.nested()
        arms.append(inner.block(run(inner, branch, operands)))
    return bb.branch(which, arms)


@rule("while")
def _while(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    split_cond, split_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond = jaxprs.open_jaxpr(eqn.params["cond_jaxpr"])[0]
    body = jaxprs.open_jaxpr(eqn.params["body_jaxpr"])[0]
    cond_consts, xs = xs[:split_cond], xs[split_cond:]
    body_consts, inits = xs[:split_body], xs[split_body:]
    fixed = _unchanged(body, split_body, len(inits))
    changing = [k for k in range(len(inits)) if k not in fixed]
    params = [bb.value(v.shape, v.dtype) if k not in fixed else v for k, v in enumerate(inits)]
    test = bb.nested()
    (go_on,) = run(test, cond, [*cond_consts, *params])
    inner = bb.nested()
    results = run(inner, body, [*body_consts, *params])
    if go_on.shape:
        # One loop for a batch: it goes on while any member does, and members that are done keep their values.
        (active,) = run(inner, cond, [*cond_consts, *params])
        results = [_where(inner, active, new, old) for new, old in zip(results, params, strict=True)]
        go_on = _any(test, go_on)
    outputs = bb.loop(
        [inits[k] for k in changing],
        [params[k] for k in changing],
        inner.block([results[k] for k in changing]),
        cond=test.block([go_on]),
    )
    out = list(inits)
    for k, value in zip(changing, outputs, strict=True):
        out[k] = value
    return out


@rule("scan")
def _scan(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """A loop whose carry holds a counter, the user's carry and the stacked outputs."""
    length: int = eqn.params["length"]
    reverse: bool = eqn.params["reverse"]
    body = jaxprs.open_jaxpr(eqn.params["jaxpr"])[0]
    num_consts, num_carry = jaxprs.scan_sizes(eqn.params)
    consts, inits, sliced = xs[:num_consts], xs[num_consts : num_consts + num_carry], xs[num_consts + num_carry :]
    stacked = [jaxprs.physical(v.aval)[0] for v in eqn.outvars[num_carry:]]
    if length == 0:
        empty = [bb.constant(0, _type(v), shape) for v, shape in zip(body.outvars[num_carry:], stacked)]
        return [*inits, *empty]
    if length == 1:
        rows = [_row(bb, x, None, length, reverse) for x in sliced]
        results = run(bb, body, [*consts, *inits, *rows])
        return [*results[:num_carry], *(_as_stack(bb, y) for y in results[num_carry:])]

    fixed = _unchanged(body, num_consts, num_carry)
    changing = [k for k in range(num_carry) if k not in fixed]
    params = [bb.value(v.shape, v.dtype) if k not in fixed else v for k, v in enumerate(inits)]
    counted = bool(sliced or stacked)
    counter = bb.value((), "s32")
    stacks = [bb.value(shape, _type(v)) for v, shape in zip(body.outvars[num_carry:], stacked, strict=True)]

    inner = bb.nested()
    rows = [_row(inner, x, counter, length, reverse) for x in sliced]
    results = run(inner, body, [*consts, *params, *rows])
    next_stacks = [
        _put_row(inner, stack, row, counter, reverse) for stack, row in zip(stacks, results[num_carry:], strict=True)
    ]
    carried = [params[k] for k in changing]
    starts = [inits[k] for k in changing]
    ends = [results[k] for k in changing]
    if counted:
        carried, starts = [counter, *carried], [bb.constant(0, "s32"), *starts]
        ends = [_next(inner, counter), *ends]
    starts += [bb.constant(0, stack.dtype, stack.shape) for stack in stacks]
    outputs = bb.loop(starts, [*carried, *stacks], inner.block([*ends, *next_stacks]), trips=length)
    out = list(inits)
    for k, value in zip(changing, outputs[int(counted) :], strict=False):
        out[k] = value
    return [*out, *outputs[len(carried) :]]


def _where(bb: BlockBuilder, pred: Value, new: Value, old: Value) -> Value:
    """``new`` where ``pred``, whose axes are the first ones of the others, else ``old``."""
    if new.id == old.id:
        return new

    def body(b: Builder, at: list[int], load: Load) -> int:
        chosen = load(0, at[: len(pred.shape)])
        return b.op("select", chosen, b.compute(load(1, at)), b.compute(load(2, at)))

    return bb.map(new.shape, [pred, new, old], body, [new.dtype])[0]


def _any(bb: BlockBuilder, pred: Value) -> Value:
    return bb.reduce((), pred.shape, [pred], lambda b, at, load: load(0, at), Combine("or"), ["b1"], ["b1"])[0]


def _unchanged(body: Jaxpr, consts: int, carries: int) -> set[int]:
    """Carries that the body returns as it got them."""
    return {k for k in range(carries) if body.outvars[k] is body.invars[consts + k]}


def _type(atom: jaxprs.Atom) -> str:
    name = element_type(atom.aval)
    assert name is not None
    return name


def _position(b: Builder, counter: int, length: int, reverse: bool) -> int:
    """The row that belongs to a round; the clamp says what the counter's range is."""
    i = b.clamp(b.index(0), b.convert(counter, INDEX), b.index(length - 1))
    return b.sub(b.index(length - 1), i) if reverse else i


def _row(bb: BlockBuilder, x: Value, counter: Value | None, length: int, reverse: bool) -> Value:
    """``x[counter]``, or ``x[0]``."""

    def body(b: Builder, at: list[int], load: Load) -> int:
        row = b.index(0) if counter is None else _position(b, load(1, []), length, reverse)
        return load(0, [row, *at])

    operands = [x] if counter is None else [x, counter]
    return bb.map(x.shape[1:], operands, body, [x.dtype])[0]


def _put_row(bb: BlockBuilder, stack: Value, row: Value, counter: Value, reverse: bool) -> Value:
    def index(b: Builder, at: list[int], load: Load) -> list[int]:
        return [_position(b, load(1, []), stack.shape[0], reverse), *at, b.const(True, "b1")]

    def value(b: Builder, at: list[int], load: Load) -> int:
        return load(0, at)

    return bb.update(stack, row.shape, [row, counter], index, value, Combine("set"))


def _as_stack(bb: BlockBuilder, row: Value) -> Value:
    return bb.map((1, *row.shape), [row], lambda b, at, load: load(0, at[1:]), [row.dtype])[0]


def _next(bb: BlockBuilder, counter: Value) -> Value:
    return bb.map((), [counter], lambda b, at, load: b.add(load(0, []), b.const(1, "s32")), ["s32"])[0]
