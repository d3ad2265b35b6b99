"""The Graph: tensor values and the closed set of operators that compute them.

A :class:`Graph` is what capture hands to the planner: a table of values (never two names for one tensor) and a
:class:`Block` of operators in an order that respects data flow. Loops and branches hold nested blocks, which may read
any value of the blocks around them. Nothing here knows about tasks, SMs or GPUs.

Every operator writes whole outputs, element by element, each exactly once; the index space of a :class:`Nest` *is*
the shape of its outputs, so the region a task writes is simply its box. What it reads follows from the index nodes of
its loads (:mod:`jax_mpk.graph.regions`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

from jax_mpk.graph.scalar import Expr


@dataclass(frozen=True)
class Source:
    """Where an operator comes from.

    Attributes:
      primitive: jax.lax primitive(s) it was built from, e.g. ``"dot_general"``.
      line: ``file:line`` in the user's code, or "".
      scope: the user's name stack, e.g. ``"decode/layer_3"``, or "".
    """

    primitive: str
    line: str = ""
    scope: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.line, self.scope, self.primitive) if part)

    @property
    def short(self) -> str:
        """File name, line and primitive."""
        return f"{PurePath(self.line).name} {self.primitive}".strip()


@dataclass(frozen=True)
class Value:
    """A tensor.

    Attributes:
      id: its position in ``Graph.values``.
      shape: sizes of its axes; storage is row-major.
      dtype: short element type name (:mod:`jax_mpk.graph.dtypes`).
    """

    id: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Combine:
    """How a reduction or scan joins two partial results.

    Attributes:
      kind: ``sum prod max min and or xor`` (one accumulator), ``argmax argmin`` (accumulators: value, position
        along the single reduced axis as s64; the first of equals wins, NaN beats everything), ``dot`` (one
        accumulator, two body results that are multiplied), or ``generic``.
      expr: for ``generic``: new accumulators from nodes ``acc k`` (left part) and ``arg k`` (right part); the
        user promises associativity. None otherwise.
    """

    kind: str
    expr: Expr | None = None


@dataclass(frozen=True)
class Nest:
    """A perfect loop nest: ``map``, ``reduce`` or ``contract``.

    ``outputs[j][p] = epilogue_j(p, acc)`` where ``acc`` is the combination of ``body(p, r)`` over all ``r``; a map has
    no reduced axes and no accumulators, and its body is its epilogue.

    Attributes:
      kind: "map", "reduce" or "contract".
      space: extents of the parallel axes; every output has this shape.
      rspace: extents of the reduced axes, none of them 0; () for a map.
      operands: values read; slot k of a load names operands[k].
      outputs: values written.
      body: scalar program over coordinates ``space + rspace``. map: one result per output. reduce: one result per
        combined element (``argmax``: the value). contract: two results, the factors, each a load whose index is
        affine in the coordinates, maybe windowed or bounded (:mod:`jax_mpk.graph.windows`), maybe converted; neither
        depends on the other's free axes.
      combine: how partial results join; None for a map.
      acc: element types of the accumulators; () for a map.
      epilogue: program over coordinates ``space`` with ``acc`` nodes; one result per output. None for a map.
      source: origin.
    """

    kind: str
    space: tuple[int, ...]
    rspace: tuple[int, ...]
    operands: tuple[int, ...]
    outputs: tuple[int, ...]
    body: Expr
    combine: Combine | None = None
    acc: tuple[str, ...] = ()
    epilogue: Expr | None = None
    source: Source = Source("")


@dataclass(frozen=True)
class Update:
    """``output = base`` with elements overwritten or combined at computed positions.

    Covers dynamic_update_slice and every scatter. Updates apply in row-major order of ``space``, so duplicates are
    deterministic: for "set" the last one wins.

    Attributes:
      base: value updated; same shape and type as the output.
      space: extents of the update space (any of them may be 0).
      operands: values read by the two programs (``base`` is not among them).
      output: value written. The plan may give it the storage of ``base``.
      index: program over ``space``; one s64 result per axis of ``base``, then a b1 "is in bounds" result. Where
        that is false the update is dropped.
      value: program over ``space``: the update, in the compute type of the output (storage type for "set").
      combine: "set", or how old and new join: ``sum prod max min``, or ``generic`` (acc 0: old, arg 0: new).
    """

    base: int
    space: tuple[int, ...]
    operands: tuple[int, ...]
    output: int
    index: Expr
    value: Expr
    combine: Combine
    source: Source = Source("")

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.output,)


@dataclass(frozen=True)
class Cumulative:
    """``outputs[j][p]`` = combination of ``body_j`` over all positions up to p along one axis.

    Attributes:
      space: extents; every output has this shape.
      axis: the scanned axis.
      reverse: scan from the end.
      operands, outputs, body, combine, acc, source: as in :class:`Nest` (body over ``space``).
      epilogue: program over ``space`` with ``acc`` nodes, one result per output.
    """

    space: tuple[int, ...]
    axis: int
    reverse: bool
    operands: tuple[int, ...]
    outputs: tuple[int, ...]
    body: Expr
    combine: Combine
    acc: tuple[str, ...]
    epilogue: Expr
    source: Source = Source("")


@dataclass(frozen=True)
class Sort:
    """Sorts (or takes the top k of) rows along one axis.

    Attributes:
      space: shape of the operands.
      axis: the sorted axis.
      operands: values, all of shape ``space``; the first ``num_keys`` are compared lexicographically in JAX's order
        (−0 equals +0, NaNs equal and last), the others move along.
      outputs: one per operand; for top-k two: values and s32 positions.
      num_keys: number of keys.
      stable: equal elements keep their order (always honoured; kept for the record).
      top_k: None, or k: only the k largest, descending in XLA's total order (NaN, inf, …, +0, −0, …, −inf, −NaN),
        ties to the smaller position; ``space`` is then the operand's shape and the outputs have extent k along
        ``axis``.
    """

    space: tuple[int, ...]
    axis: int
    operands: tuple[int, ...]
    outputs: tuple[int, ...]
    num_keys: int
    stable: bool = True
    top_k: int | None = None
    source: Source = Source("")


@dataclass(frozen=True)
class Loop:
    """``while cond(carry): carry = body(carry)``, or a known number of trips.

    scan becomes a Loop whose carry holds a counter and the stacked outputs.

    Attributes:
      params: values that stand for the carry inside ``cond`` and ``body``.
      inits: values the carry starts as (one per param, same shape and type).
      body: one round; its results are the next carry.
      cond: its one result, a b1 scalar, says whether another round runs; None where ``trips`` is known.
      trips: number of rounds, or None.
      outputs: the final carry.
    """

    params: tuple[int, ...]
    inits: tuple[int, ...]
    body: Block
    cond: Block | None
    trips: int | None
    outputs: tuple[int, ...]
    source: Source = Source("")

    @property
    def operands(self) -> tuple[int, ...]:
        return self.inits


@dataclass(frozen=True)
class Branch:
    """Runs one of several blocks.

    Attributes:
      index: s32 scalar value, clamped to [0, len(arms)).
      arms: blocks; their results have the shapes and types of ``outputs``.
      outputs: the chosen arm's results.
    """

    index: int
    arms: tuple[Block, ...]
    outputs: tuple[int, ...]
    source: Source = Source("")

    @property
    def operands(self) -> tuple[int, ...]:
        return (self.index,)


Op = Nest | Update | Cumulative | Sort | Loop | Branch


@dataclass(frozen=True)
class Block:
    """A straight list of operators and the values they leave behind.

    Attributes:
      ops: in an order that respects data flow.
      results: value ids; a result may be an outer value, a parameter, or appear twice.
    """

    ops: tuple[Op, ...]
    results: tuple[int, ...]


@dataclass(frozen=True)
class Note:
    """Something that was looked at and not done, for ``explain``.

    Attributes:
      about: what would have been done, e.g. ``"epilogue"``; a pass that runs again replaces its own notes.
      text: what and why, with the user's lines; equal ones are counted, so it names no value.
      between: the values of two operators that were not fused: once one routine computes both, or one of them is gone,
        there is nothing to tell. None: it concerns no pair.
    """

    about: str
    text: str
    between: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Graph:
    """A captured function.

    Attributes:
      values: every tensor of the graph and its nested blocks, by id.
      inputs: ids of the arguments (closed-over arrays first among them where there are any).
      block: the operators; ``block.results`` are the function's results.
      donated: positions in ``inputs`` whose storage may be overwritten.
      notes: what passes have not fused, and why.
      layouts: per input, the axes of the argument in the order in which its value has them; None: the same order. ():
        so for every input. See :mod:`jax_mpk.graph.layouts`.
    """

    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    block: Block
    donated: frozenset[int] = frozenset()
    notes: tuple[Note, ...] = field(default=())
    layouts: tuple[tuple[int, ...] | None, ...] = ()

    @property
    def results(self) -> tuple[int, ...]:
        return self.block.results


def blocks(op: Op) -> tuple[Block, ...]:
    """The blocks nested directly in an operator."""
    if isinstance(op, Loop):
        return (op.body,) if op.cond is None else (op.cond, op.body)
    return op.arms if isinstance(op, Branch) else ()


def walk(block: Block) -> Iterator[Op]:
    """Every operator of a block and its nested blocks, outer before inner."""
    for op in block.ops:
        yield op
        for inner in blocks(op):
            yield from walk(inner)


def reads(op: Op) -> tuple[int, ...]:
    """Values an operator reads, nested blocks included (parameters of inner loops are not outer reads)."""
    seen: dict[int, None] = dict.fromkeys(op.operands)
    if isinstance(op, Update):
        seen[op.base] = None
    for inner in blocks(op) if isinstance(op, Loop | Branch) else ():
        own: set[int] = set(op.params) if isinstance(op, Loop) else set()
        for inner_op in inner.ops:
            seen.update((v, None) for v in reads(inner_op) if v not in own)
            own.update(inner_op.outputs)
        seen.update((v, None) for v in inner.results if v not in own)
    return tuple(seen)
