"""Building blocks of operators: the tool that every lowering rule works with.

A :class:`BlockBuilder` collects the operators of one block. Its methods take scalar programs as functions that
receive a scalar :class:`~jax_mpk.graph.scalar.Builder`, the coordinate nodes of the index space and ``load``, and
return result nodes; what a program computes is rounded to the element type it is stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from jax_mpk.graph import dtypes, semantics
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.ir import (
    Block,
    Branch,
    Combine,
    Cumulative,
    Loop,
    Nest,
    Op,
    Source,
    Update,
    Value,
)
from jax_mpk.graph.scalar import LEAVES, Builder, Expr, inline
from jax_mpk.graph.windows import factor

#: Largest constant array that is written out as a chain of selects.
MAX_INLINE_ARRAY = 64


class Load(Protocol):
    """Reads an operand's element inside a scalar program."""

    def __call__(self, slot: int, indices: Sequence[int], pred: int | None = None) -> int: ...


#: (builder, coordinate nodes, load) → result node(s).
Body = Callable[[Builder, list[int], Load], int | Sequence[int]]
#: (builder, coordinate nodes, accumulator nodes, load) → result node(s).
Epilogue = Callable[[Builder, list[int], list[int], Load], int | Sequence[int]]


class _Shared:
    """What the builders of nested blocks have in common."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.constants: dict[int, int] = {}
        self.platform: str | None = None
        self.source = Source("")
        self.pinned = False


class BlockBuilder:
    """Builds one block; nested blocks share the value table.

    Attributes:
      values: the value table so far.
      platform: JAX's name of the platform that the graph is built for, or None where it must suit all.
      source: origin given to the operators built now.
    """

    def __init__(self, parent: BlockBuilder | None = None, *, platform: str | None = None):
        self._parent = parent
        self._shared: _Shared = parent._shared if parent is not None else _Shared()
        if parent is None:
            self._shared.platform = platform
        self._ops: list[Op] = []
        self._literals: dict[tuple[str, int, tuple[int, ...]], Value] = {}

    @property
    def values(self) -> list[Value]:
        return self._shared.values

    @property
    def platform(self) -> str | None:
        return self._shared.platform

    @property
    def source(self) -> Source:
        return self._shared.source

    @contextmanager
    def built_from(self, source: Source, *, pin: bool = False) -> Iterator[None]:
        """Operators built inside come from ``source``; ``pin``: whatever nested uses of this say."""
        shared = self._shared
        before = shared.source, shared.pinned
        if not shared.pinned:
            shared.source, shared.pinned = source, pin
        try:
            yield
        finally:
            shared.source, shared.pinned = before

    # -- values and raw operators ------------------------------------------------------------------------------

    def value(self, shape: Sequence[int], dtype: str) -> Value:
        """A new value, not yet defined by any operator."""
        new = Value(len(self.values), tuple(int(size) for size in shape), dtype)
        self.values.append(new)
        return new

    def emit(self, op: Op) -> None:
        self._ops.append(op)

    def nested(self) -> BlockBuilder:
        """A builder for a loop's or branch's block, which may read all values defined so far."""
        return BlockBuilder(self)

    def block(self, results: Sequence[Value]) -> Block:
        """The finished block."""
        return Block(tuple(self._ops), tuple(v.id for v in results))

    def constant(self, value: object, dtype: str, shape: Sequence[int] = ()) -> Value:
        """A value all of whose elements are the same constant."""
        return self._constant(dtypes.to_bits(value, dtype), dtype, tuple(shape))

    def constant_bits(self, value: Value) -> int | None:
        """Bit pattern of the elements of a value known to be constant and uniform, else None."""
        return self._shared.constants.get(value.id)

    def constant_array(self, array: np.ndarray) -> Value:
        """A small constant array, written out element by element."""
        dtype = dtypes.from_numpy(array.dtype)
        if dtype is None or array.size > MAX_INLINE_ARRAY:
            raise ValueError(f"{array.dtype}{list(array.shape)} is not a small constant array")
        if array.size == 0 or len({dtypes.to_bits(x, dtype) for x in array.flat}) == 1:
            return self.constant(array.flat[0] if array.size else 0, dtype, array.shape)
        kind = dtypes.compute_type(dtype)

        def body(b: Builder, at: list[int], load: Load) -> int:
            position = b.linearize(at, array.shape)
            flat = [b.convert(b.const(x, dtype), kind, implicit=True) for x in array.flat]
            out = flat[-1]
            for k in range(len(flat) - 2, -1, -1):
                out = b.op("select", b.op("eq", position, b.index(k)), flat[k], out)
            return out

        return self.map(array.shape, [], body, [dtype])[0]

    # -- operators from scalar programs ------------------------------------------------------------------------

    def map(
        self, space: Sequence[int], operands: Sequence[Value], body: Body, out_dtypes: Sequence[str]
    ) -> tuple[Value, ...]:
        """``outputs[j][p] = body_j(p)``, rounded to the outputs' element types.

        Results that are known constants, or an operand unchanged, cost nothing.
        """
        space = tuple(space)
        if 0 in space:
            return tuple(self._constant(0, dtype, space) for dtype in out_dtypes)
        b = Builder(space)
        results = _round(b, body(b, b.coords(), self._load(b, operands)), out_dtypes)
        out: list[Value | None] = [self._known(b, r, operands, space) for r in results]
        rest = [j for j, value in enumerate(out) if value is None]
        if rest:
            (expr,), read = _drop_unused([b.build(*(results[j] for j in rest))], operands)
            outputs = [self.value(space, out_dtypes[j]) for j in rest]
            self.emit(Nest("map", space, (), read, _ids(outputs), expr, source=self.source))
            for j, value in zip(rest, outputs, strict=True):
                out[j] = value
        return tuple(value for value in out if value is not None)

    def reduce(
        self,
        space: Sequence[int],
        rspace: Sequence[int],
        operands: Sequence[Value],
        body: Body,
        combine: Combine,
        acc: Sequence[str],
        out_dtypes: Sequence[str],
        epilogue: Epilogue | None = None,
    ) -> tuple[Value, ...]:
        """Combines ``body(p, r)`` over all ``r``; the coordinates passed to ``body`` are ``space + rspace``.

        A reduction over nothing gives the combination's identity, so ``generic`` must not be reduced over an empty
        ``rspace``. Reduced axes of extent 1 vanish; without any other the result is a map.

        Args:
          space: extents of the outputs.
          rspace: extents of the reduced axes.
          operands: values read by body and epilogue.
          body: one result per combined element (see :class:`~jax_mpk.graph.ir.Nest`), converted to ``acc``.
          combine: how partial results join.
          acc: element types of the accumulators.
          out_dtypes: element types of the outputs.
          epilogue: computes the outputs from the accumulators; by default the accumulators themselves.
        """
        return self._nest("reduce", space, rspace, operands, body, combine, tuple(acc), out_dtypes, epilogue)

    def contract(
        self,
        space: Sequence[int],
        rspace: Sequence[int],
        operands: Sequence[Value],
        body: Body,
        acc: str,
        out_dtypes: Sequence[str],
        epilogue: Epilogue | None = None,
    ) -> tuple[Value, ...]:
        """Sum over ``rspace`` of the product of ``body``'s two results, each converted to ``acc``.

        Where a result is no load with affine index, the operator is a ``reduce``.
        """
        return self._nest("contract", space, rspace, operands, body, Combine("dot"), (acc,), out_dtypes, epilogue)

    def cumulative(
        self,
        space: Sequence[int],
        axis: int,
        reverse: bool,
        operands: Sequence[Value],
        body: Body,
        combine: Combine,
        acc: Sequence[str],
        out_dtypes: Sequence[str],
        epilogue: Epilogue | None = None,
    ) -> tuple[Value, ...]:
        """Running combination of ``body`` along ``axis``; arguments as for :meth:`reduce`."""
        space = tuple(space)
        if 0 in space:
            return tuple(self._constant(0, dtype, space) for dtype in out_dtypes)
        b = Builder(space)
        first = b.build(*_round(b, body(b, b.coords(), self._load(b, operands)), acc))
        last = self._epilogue(space, operands, acc, out_dtypes, epilogue)
        (first, last), read = _drop_unused([first, last], operands)
        outputs = [self.value(space, dtype) for dtype in out_dtypes]
        self.emit(
            Cumulative(
                space,
                axis,
                reverse,
                read,
                _ids(outputs),
                first,
                combine,
                tuple(acc),
                last,
                source=self.source,
            )
        )
        return tuple(outputs)

    def update(
        self,
        base: Value,
        space: Sequence[int],
        operands: Sequence[Value],
        index: Body,
        value: Body,
        combine: Combine,
    ) -> Value:
        """``base`` with elements overwritten or combined; see :class:`~jax_mpk.graph.ir.Update`.

        Args:
          base: value to update.
          space: extents of the update space.
          operands: values read by the two programs.
          index: position nodes, one per axis of ``base``, then the "in bounds" predicate.
          value: the update, converted to the output's compute type ("set": storage type).
          combine: how old and new join.
        """
        space = tuple(space)
        if 0 in space or 0 in base.shape:
            return base
        b = Builder(space)
        where = b.build(*_round(b, index(b, b.coords(), self._load(b, operands)), [INDEX] * len(base.shape) + ["b1"]))
        b = Builder(space)
        kind = base.dtype if combine.kind == "set" else dtypes.compute_type(base.dtype)
        what = b.build(*_round(b, value(b, b.coords(), self._load(b, operands)), [kind]))
        (where, what), read = _drop_unused([where, what], operands)
        output = self.value(base.shape, base.dtype)
        self.emit(Update(base.id, space, read, output.id, where, what, combine, source=self.source))
        return output

    def loop(
        self,
        inits: Sequence[Value],
        params: Sequence[Value],
        body: Block,
        *,
        cond: Block | None = None,
        trips: int | None = None,
    ) -> list[Value]:
        """A loop with a condition or a number of trips; returns the final carry."""
        outputs = [self.value(v.shape, v.dtype) for v in inits]
        self.emit(Loop(_ids(params), _ids(inits), body, cond, trips, _ids(outputs), source=self.source))
        return outputs

    def branch(self, index: Value, arms: Sequence[Block]) -> list[Value]:
        """Runs arm ``index`` (s32, clamped); returns its results."""
        outputs = [self.value(self.values[v].shape, self.values[v].dtype) for v in arms[0].results]
        self.emit(Branch(index.id, tuple(arms), _ids(outputs), source=self.source))
        return outputs

    # -- internals ---------------------------------------------------------------------------------------------

    def _constant(self, bits: int, dtype: str, shape: tuple[int, ...]) -> Value:
        key = (dtype, bits, shape)
        scope: BlockBuilder | None = self
        while scope is not None:
            if key in scope._literals:
                return scope._literals[key]
            scope = scope._parent
        b = Builder(shape)
        expr = b.build(b.const_bits(bits, dtype))
        out = self._literals[key] = self.value(shape, dtype)
        self._shared.constants[out.id] = bits
        self.emit(Nest("map", shape, (), (), (out.id,), expr, source=self.source))
        return out

    def _load(self, b: Builder, operands: Sequence[Value]) -> Load:
        slots: dict[int, int] = {}
        for slot, value in enumerate(operands):
            slots.setdefault(value.id, slot)

        def load(slot: int, indices: Sequence[int], pred: int | None = None) -> int:
            value = operands[slot]
            if len(indices) != len(value.shape):
                raise ValueError(f"{len(indices)} indices for an operand of shape {value.shape}")
            bits = self._shared.constants.get(value.id)
            if bits is None:
                return b.load(slots[value.id], indices, value.dtype, pred)
            known = b.const_bits(bits, value.dtype)
            if pred is None or bits == 0:
                return known
            kind = dtypes.compute_type(value.dtype)
            chosen = b.op("select", pred, b.compute(known), b.const(0, kind))
            return b.convert(chosen, value.dtype, implicit=True)

        return load

    def _known(self, b: Builder, result: int, operands: Sequence[Value], space: tuple[int, ...]) -> Value | None:
        """An existing value that equals a map's result: a constant, or an operand read in place."""
        node = b.nodes[result]
        if node.op == "load" and operands[node.attr].shape == space:  # type: ignore[call-overload]
            if node.args == tuple(b.coords()):
                return operands[node.attr]  # type: ignore[call-overload]
        expr = b.build(result)
        if any(n.op in LEAVES and n.op != "const" for n in expr.nodes):
            return None
        return self._constant(_fold(expr), node.dtype, space)

    def _epilogue(
        self,
        space: tuple[int, ...],
        operands: Sequence[Value],
        acc: Sequence[str],
        out_dtypes: Sequence[str],
        epilogue: Epilogue | None,
    ) -> Expr:
        b = Builder(space)
        accs = [b.acc(k, dtype) for k, dtype in enumerate(acc)]
        results = epilogue(b, b.coords(), accs, self._load(b, operands)) if epilogue is not None else accs
        return b.build(*_round(b, results, out_dtypes))

    def _nest(
        self,
        kind: str,
        space: Sequence[int],
        rspace: Sequence[int],
        operands: Sequence[Value],
        body: Body,
        combine: Combine,
        acc: tuple[str, ...],
        out_dtypes: Sequence[str],
        epilogue: Epilogue | None,
    ) -> tuple[Value, ...]:
        space, rspace = tuple(space), tuple(rspace)
        if 0 in space or 0 in rspace or all(size == 1 for size in rspace):
            return self._without_reduction(space, rspace, operands, body, combine, acc, out_dtypes, epilogue)
        kept = [size for size in rspace if size != 1]
        b = Builder((*space, *kept))
        reduced = iter(b.coords()[len(space) :])
        coords = [
            *b.coords()[: len(space)],
            *(b.index(0) if size == 1 else next(reduced) for size in rspace),
        ]
        results = _as_list(body(b, coords, self._load(b, operands)))
        if kind == "contract" and any(factor(Expr(tuple(b.nodes), (), b.extents), r) is None for r in results):
            # A constant factor, say: nothing to stream.
            kind, combine = "reduce", Combine("sum")
            results = [b.mul(*(b.convert(b.compute(r), acc[0]) for r in results))]
        if kind == "reduce":
            results = _round(b, results, acc[: len(results)])
        first = b.build(*results)
        last = self._epilogue(space, operands, acc, out_dtypes, epilogue)
        (first, last), read = _drop_unused([first, last], operands)
        outputs = [self.value(space, dtype) for dtype in out_dtypes]
        self.emit(
            Nest(
                kind,
                space,
                tuple(kept),
                read,
                _ids(outputs),
                first,
                combine,
                acc,
                last,
                source=self.source,
            )
        )
        return tuple(outputs)

    def _without_reduction(
        self,
        space: tuple[int, ...],
        rspace: tuple[int, ...],
        operands: Sequence[Value],
        body: Body,
        combine: Combine,
        acc: tuple[str, ...],
        out_dtypes: Sequence[str],
        epilogue: Epilogue | None,
    ) -> tuple[Value, ...]:
        """A reduction over no element, or over one."""

        def program(b: Builder, at: list[int], load: Load) -> list[int]:
            if 0 in rspace:
                accs = [b.const(identity(combine.kind, dtype), dtype) for dtype in acc]
            else:
                accs = _as_list(body(b, [*at, *(b.index(0) for _ in rspace)], load))
                if combine.kind == "dot":
                    accs = [b.op("mul", *(b.convert(b.compute(x), acc[0]) for x in accs))]
                elif combine.kind in ("argmax", "argmin"):
                    accs.append(b.index(0))
                accs = _round(b, accs, acc)
            return _as_list(epilogue(b, at, accs, load)) if epilogue is not None else accs

        return self.map(space, operands, program, out_dtypes)


def identity(kind: str, dtype: str) -> object:
    """What a combination of no elements gives: ``x`` combined with it is ``x``."""
    if kind in ("sum", "or", "xor", "dot"):
        return 0
    if kind == "prod":
        return 1
    low: object
    high: object
    if dtypes.is_float(dtype):
        low, high = -np.inf, np.inf
    else:
        low, high = dtypes.int_range(dtype)
    if kind == "and":
        return 1 if dtype == "b1" else -1 if dtypes.is_signed(dtype) else high
    if kind in ("max", "argmax"):
        return low
    if kind in ("min", "argmin"):
        return high
    raise ValueError(f"a {kind} combination has no identity")


def _fold(expr: Expr) -> int:
    """Bit pattern of the result of a program that reads nothing."""
    done: list[np.ndarray] = []
    for node in expr.nodes:
        if node.op == "const":
            done.append(np.asarray(dtypes.from_bits(node.attr, node.dtype)))  # type: ignore[arg-type]
        else:
            done.append(semantics.apply(node, [done[a] for a in node.args]))
    return dtypes.to_bits(done[expr.results[0]], expr.result().dtype)


def _as_list(results: int | Sequence[int]) -> list[int]:
    return [results] if isinstance(results, int) else list(results)


def _ids(values: Sequence[Value]) -> tuple[int, ...]:
    return tuple(v.id for v in values)


def _round(b: Builder, results: int | Sequence[int], out_dtypes: Sequence[str]) -> list[int]:
    """Results in their storage types: only the implicit roundings are inserted, the rest must fit already."""
    out = []
    for node, dtype in zip(_as_list(results), out_dtypes, strict=True):
        have = b.nodes[node].dtype
        if have != dtype and dtypes.compute_type(have) != dtypes.compute_type(dtype):
            raise ValueError(f"a scalar program computes {have} where {dtype} is stored")
        out.append(b.convert(node, dtype, implicit=True))
    return out


def _drop_unused(exprs: Sequence[Expr], operands: Sequence[Value]) -> tuple[list[Expr], tuple[int, ...]]:
    """The programs with slots renumbered to the operands that are read, and those operands' ids."""
    used = sorted({expr.nodes[i].attr for expr in exprs for i in expr.loads()})  # type: ignore[type-var]
    slot = {old: new for new, old in enumerate(used)}
    out = []
    for expr in exprs:
        b = Builder(expr.extents)

        def load(old: int, indices: list[int], dtype: str, pred: int | None, b: Builder = b) -> int:
            return b.load(slot[old], indices, dtype, pred)

        coords = b.coords()
        out.append(b.build(*inline(b, expr, coords, load)) if list(slot) != list(slot.values()) else expr)
    return out, tuple(operands[old].id for old in used)  # type: ignore[call-overload]
