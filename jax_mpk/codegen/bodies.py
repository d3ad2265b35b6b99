"""Code of each kind of operator: what a member of a routine computes for a box."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from jax_mpk.codegen.ir import Access, Code
from jax_mpk.codegen.vm import Compiler, Layout, Lowered
from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Combine, Cumulative, Nest, Update
from jax_mpk.graph.scalar import Builder, Expr, Node, inline
from jax_mpk.graph.windows import factor as find_factor
from jax_mpk.graph.windows import is_uniform

#: Combinations that are one operation of the VM.
OPERATION = {
    "sum": "add",
    "prod": "mul",
    "max": "max",
    "min": "min",
    "and": "and",
    "or": "or",
    "xor": "xor",
}


@dataclass(frozen=True)
class Factor:
    """One factor of a contraction: see ``Factor`` in csrc/host/bodies.h."""

    slot: int
    constant: int
    strides: tuple[int, ...]
    axis: int = -1
    shift: int = 0
    length: int = 0
    start_result: int = -1
    fresh_slot: int = 0
    fresh_constant: int = 0
    fresh_result: int = -1
    fresh_strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class Target:
    """Where an update goes along one axis: see ``TargetIndex`` in csrc/host/bodies.h."""

    axis: int = -1
    constant: int = 0
    uniform: int = -1
    general: int = -1
    level: int = 0


@dataclass(frozen=True)
class UpdateCode:
    """Code of an update and where its results go.

    Attributes:
      code: computes indices, the bounds check and the value.
      target: per axis of the output.
      bounds: register of "is in bounds" and its level; (-1, 0) where it always is.
      access: position of the access that steps through the structured part of the target.
    """

    code: Code
    target: tuple[Target, ...]
    bounds: tuple[int, int]
    access: int


@dataclass(frozen=True)
class ContractCode:
    """Factors of a contraction, and the code that finds where their windows lie (None: no windows)."""

    lhs: Factor
    rhs: Factor
    windows: Code | None


@dataclass
class _Uniform:
    """Results of a code without loops, shared by both factors."""

    lowered: Lowered
    results: list[int] = field(default_factory=list)

    def add(self, value: int) -> int:
        self.results.append(value)
        return len(self.results) - 1


@cache
def combiner(combine: Combine, types: tuple[str, ...]) -> Expr:
    """A combination as a program over ``acc k`` (left part) and ``arg k`` (right part)."""
    if combine.expr is not None:
        return combine.expr
    b = Builder(())
    left = [b.acc(k, t) for k, t in enumerate(types)]
    right = [b.arg(k, t) for k, t in enumerate(types)]
    if combine.kind in OPERATION:
        return b.build(b.op(OPERATION[combine.kind], left[0], right[0]))
    if combine.kind not in ("argmax", "argmin"):
        raise ValueError(f"no combination {combine.kind}")
    better = b.op("gt" if combine.kind == "argmax" else "lt", right[0], left[0])
    same = b.op("eq", right[0], left[0])
    if dtypes.is_float(types[0]):
        left_nan, right_nan = b.op("ne", left[0], left[0]), b.op("ne", right[0], right[0])
        better = b.op("or", better, b.op("and", right_nan, b.op("not", left_nan)))
        same = b.op("or", same, b.op("and", right_nan, left_nan))
    # The first of equals: positions decide, so that lanes may be joined in any order.
    better = b.op("or", better, b.op("and", same, b.op("lt", right[1], left[1])))
    pick = [b.op("select", better, r, p) for r, p in zip(right, left, strict=True)]
    return b.build(*pick)


def map_code(body: Expr, operands: Sequence[Layout], outputs: Sequence[Layout], tiles: Sequence[str] = ()) -> Code:
    """Code that stores the results of a program over the axes of a box, in their natural order."""
    rank = len(body.extents)
    c = Compiler(range(rank), operands, outputs, tiles)
    lowered = c.lower(body, (), lambda node: _tile(c, node))
    for k, root in enumerate(body.results):
        c.store(k, _rounded(c, lowered.value(root), outputs[k][0]), outputs[k][1])
    return c.build()


def reduce_code(op: Nest, order: Sequence[int], operands: Sequence[Layout], outputs: int) -> Code:
    """Code of a reduction's body and combination."""
    c = Compiler(order, operands, [("b1", ())] * outputs)
    lowered = c.lower(op.body, ())
    results = [lowered.value(root) for root in op.body.results]
    assert op.combine is not None
    if op.combine.kind in ("argmax", "argmin"):
        results.append(c.coord(len(op.space)))
    _combined(c, results, op.combine, op.acc)
    return c.build()


def cumulative_code(
    op: Cumulative, order: Sequence[int], operands: Sequence[Layout], outputs: Sequence[Layout]
) -> Code:
    """Code of a scan: body, combination and, as the last phase, the epilogue with its stores."""
    c = Compiler(order, operands, outputs)
    lowered = c.lower(op.body, ())
    results = [lowered.value(root) for root in op.body.results]
    if op.combine.kind in ("argmax", "argmin"):
        results.append(c.coord(op.axis))
    _combined(c, results, op.combine, op.acc, shared=True)
    level = c.rank + 2
    after = [c.later(acc, level) for acc in c.accumulators]
    epilogue = c.lower(op.epilogue, (), lambda node: after[node.attr])
    for k, root in enumerate(op.epilogue.results):
        value = _rounded(c, epilogue.value(root), outputs[k][0])
        c.store(k, value, [outputs[k][1][axis] for axis in c.order], level)
    return c.build()


def update_code(op: Update, operands: Sequence[Layout], output: Layout) -> UpdateCode:
    """Code of an update; the base is its last operand."""
    rank = len(op.space)
    c = Compiler(range(rank), operands, [output])
    index = c.lower(op.index, ())
    *axes, bounds = op.index.results
    strides = [0] * rank
    constant = 0
    targets: list[tuple[int, int, int, int]] = []  # axis, constant, uniform value, general value
    for root, stride in zip(axes, output[1], strict=True):
        terms, shift = index.linear(root)
        coords = {a: k for a, k in terms.items() if op.index.nodes[a].op == "coord"}
        rest = {a: k for a, k in terms.items() if a not in coords}
        total = index.total(rest)
        uniform = total < 0 or c.values[total].level == 0
        if not uniform or len(coords) > 1 or any(k != 1 for k in coords.values()):
            targets.append((-1, 0, -1, index.value(root)))
            continue
        axis = op.index.nodes[next(iter(coords))].attr if coords else -1
        targets.append((axis, shift, total, -1))
        constant += shift * stride
        if axis >= 0:
            strides[axis] += stride
    inside = -1
    if not (op.index.nodes[bounds].op == "const" and op.index.nodes[bounds].attr):
        inside = index.value(bounds)
    access = c.access(Access(len(operands), constant, tuple(strides), (-1, 0), (-1, 0), True))
    value = c.lower(op.value, ()).value(op.value.results[0])
    if op.combine.kind == "set":
        c.results = [_rounded(c, value, output[0])]
    else:
        _combined(c, [value], op.combine, (c.values[value].dtype,), shared=True)
    c.kept.update(v for _, _, uniform, general in targets for v in (uniform, general) if v >= 0)
    c.kept.update(() if inside < 0 else (inside,))
    code = c.build()

    def register(v: int) -> int:
        return -1 if v < 0 else c.registers[c._real(v)]

    def level(v: int) -> int:
        return 0 if v < 0 else c.values[v].level

    return UpdateCode(
        code,
        tuple(Target(a, k, register(u), register(g), level(g)) for a, k, u, g in targets),
        (register(inside), level(inside)),
        c.access_position[access],
    )


def contract_code(op: Nest, operands: Sequence[Layout], arrays: int) -> ContractCode | None:
    """Both factors of a contraction, or None where the matrix kernels cannot read them."""
    rank = len(op.body.extents)
    # Strides are taken from a compiler with all loops, windows from one without any.
    loops = Compiler(range(rank), operands).lower(op.body, ())
    c = Compiler((), operands, [("b1", ())] * (arrays - len(operands)))
    uniform = _Uniform(c.lower(op.body, ()))
    factors = [_factor(op, root, loops, uniform, rank) for root in op.body.results]
    lhs, rhs = factors
    if lhs is None or rhs is None:
        return None
    c.results = uniform.results
    return ContractCode(lhs, rhs, c.build() if c.results else None)


def product(op: Nest) -> Expr:
    """The body of a contraction as one program: the product of its factors."""
    b = Builder(op.body.extents)
    results = inline(b, op.body, b.coords(), b.load)
    kind = op.acc[0]
    lhs, rhs = (b.convert(r, kind, implicit=True) for r in results)
    return b.build(b.op("and" if kind == "b1" else "mul", lhs, rhs))


def _factor(op: Nest, root: int, loops: Lowered, uniform: _Uniform, rank: int) -> Factor | None:
    body = op.body
    found = find_factor(body, root)
    if found is None or found.bound >= 0 or not exact_conversions(body, root, op.acc[0]):
        return None

    def linear(load: Node) -> tuple[int, tuple[int, ...], dict[int, int]]:
        indices = load.args[1:] if load.op == "load_if" else load.args
        constant, strides, atoms = loops.offset(load.attr, indices)
        return constant, tuple(strides.get(axis, 0) for axis in range(rank)), atoms

    load = body.nodes[found.load]
    constant, strides, atoms = linear(load)
    if atoms:
        return None
    if found.new < 0:
        return Factor(load.attr, constant, strides)
    if not is_uniform(body, found.start):
        return None
    where, shift = loops.linear(load.args[found.axis])
    if len(where) != 1:
        return None
    ((atom, scale),) = where.items()
    if body.nodes[atom].op != "coord" or scale != 1:
        return None
    fresh = body.nodes[found.new]
    fresh_constant, fresh_strides, fresh_atoms = linear(fresh)
    if not all(is_uniform(body, a) for a in fresh_atoms):
        return None
    extra = uniform.lowered.total(fresh_atoms)
    return Factor(
        slot=load.attr,
        constant=constant,
        strides=strides,
        axis=body.nodes[atom].attr,
        shift=shift,
        length=found.length,
        start_result=uniform.add(uniform.lowered.value(found.start)),
        fresh_slot=fresh.attr,
        fresh_constant=fresh_constant,
        fresh_result=-1 if extra < 0 else uniform.add(extra),
        fresh_strides=fresh_strides,
    )


def exact_conversions(body: Expr, root: int, acc: str) -> bool:
    """Whether a factor's conversions, taken in one step to the accumulator's type, give the same values."""
    chain = []
    node = body.nodes[root]
    if node.dtype != acc:
        chain.append(acc)
    while node.op == "convert":
        chain.append(node.dtype)
        node = body.nodes[node.args[0]]
    # All steps but the one to the accumulator's type must keep every value.
    steps = [node.dtype, *chain[::-1]]
    return all(_keeps(a, b) for a, b in itertools.pairwise(steps[:-1]))


def _keeps(a: str, b: str) -> bool:
    """Whether every value of type ``a`` is one of type ``b``."""
    bits = {"f16": (11, 5), "bf16": (8, 8), "f32": (24, 8), "f64": (53, 11)}
    if a == b:
        return True
    if dtypes.is_float(a):
        return dtypes.is_float(b) and all(x <= y for x, y in zip(bits[a], bits[b], strict=True))
    low, high = dtypes.int_range(a)
    if dtypes.is_float(b):
        return max(-low, high) <= 1 << bits[b][0]
    if b == "b1":
        return False
    return dtypes.int_range(b)[0] <= low and high <= dtypes.int_range(b)[1]


def _tile(c: Compiler, node: Node) -> int:
    """Loads accumulator ``node.attr``; the strides are those of the box."""
    slot = len(c.operands) + len(c.outputs) + node.attr
    strides = (1,) * c.rank  # replaced by those of the tile
    access = c.access(Access(slot, 0, strides, (-1, 0), (-1, 0)))
    return c.emit(f"load.{node.dtype}.{node.dtype}", (), node.dtype, access, level=c.rank)


def _rounded(c: Compiler, value: int, dtype: str) -> int:
    source = c.values[value].dtype
    return value if source == dtype else c.emit(f"convert.{source}.{dtype}", (value,), dtype)


def _combined(c: Compiler, results: list[int], combine: Combine, types: Sequence[str], *, shared: bool = False) -> None:
    """Adds accumulators and the phase that combines ``results`` with them.

    ``shared``: other values of the code that are used after that phase may be the same as a result.
    """
    level = c.rank + 1
    results = [_rounded(c, r, t) for r, t in zip(results, types, strict=True)]
    # Bodies overwrite the lanes of results, so each has a register that every run of the deepest level writes.
    own = [
        r
        if not shared and c.values[r].level == c.rank and results.count(r) == 1 and c.values[r].symbol != "arg"
        else c.move(r, c.rank)
        for r in results
    ]
    c.results = own
    left = [c.accumulator(t) for t in types]
    right = [c.later(r, level) for r in own]
    expr = combiner(combine, tuple(types))
    first = len(c.values)
    lowered = c.lower(expr, (), lambda node: (left if node.op == "acc" else right)[node.attr])
    joined = [_rounded(c, lowered.value(root), t) for root, t in zip(expr.results, types, strict=True)]
    if len(joined) == 1 and joined[0] == len(c.values) - 1 >= first and c.values[joined[0]].level == level:
        # The last operation writes the accumulator itself.
        if c.values[joined[0]].symbol != "arg":
            c.values[joined[0]].into = left[0]
            return
    # An accumulator that others are computed from, or copied from, must not change before they are.
    joined = [c.move(j, level) if j in left and j != left[k] else j for k, j in enumerate(joined)]
    for acc, value in zip(left, joined, strict=True):
        if value != acc:
            copy = c.move(value, level)
            c.values[copy].into = acc
