"""Members that run over live positions only.

Plans say with predicates which part of an axis counts: ``load_if(c < n, …)``, ``select(c < n, x, nothing)``, where n is
known at run time and is the same for all of a task. Here these predicates become bounds of loops: a reduction ends at
n, and so does every local value that is read only in front of n. What a task reads of a buffer may begin at a position
known at run time, too; then it is copied to scratch from there on, and indices count from that position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.fuse_maps import programs
from jax_mpk.graph.ir import Nest, Op, reads
from jax_mpk.graph.scalar import Builder, Expr, Node, inline
from jax_mpk.graph.windows import factor, limit
from jax_mpk.plan.ir import Plan, Routine

#: What a reduction may give up: a bound loop starts from there.
_NOTHING = {"sum": 0.0, "max": -math.inf}


@dataclass(frozen=True)
class Shift:
    """Where a task's part of a buffer begins along one axis, and how much of it there is.

    Attributes:
      axis: the axis.
      first, count: results of ``Live.scalars``.
    """

    axis: int
    first: int
    count: int


@dataclass
class Live:
    """The live positions of a routine.

    Attributes:
      ops: the members, rewritten; None where nothing is left to do.
      limits: per member, by coordinate (reduced ones behind the others): result of ``scalars`` that bounds it.
      shifts: values whose loads count from a position known at run time.
      scalars: what a task computes before anything else: a program over ``columns``.
      columns: int64 [tasks] each.
      operands: values that ``scalars`` loads.
    """

    ops: list[Op | None]
    limits: list[dict[int, int]]
    shifts: dict[int, Shift]
    scalars: Expr
    columns: list[np.ndarray]
    operands: list[int]


def live_members(
    plan: Plan, routine: Routine, ops: Sequence[Op | None], boxes: np.ndarray, barred: set[int] | frozenset[int]
) -> Live:
    """A routine's members over what is live.

    Args:
      plan: the plan.
      routine: one of its routines.
      ops: its members.
      boxes: int64 [members, tasks, 2, rank].
      barred: values that keep their indices.
    """
    found = _Search(plan, routine, ops, boxes)
    found.bound()
    shifts = {v: shift for v, shift in found.shifted().items() if v not in barred}
    return found.live(shifts)


@dataclass
class _Scalars:
    """One program of what is the same for all of a task, whichever member says it."""

    builder: Builder = field(default_factory=lambda: Builder(()))
    columns: list[np.ndarray] = field(default_factory=list)
    operands: list[int] = field(default_factory=list)

    def column(self, values: np.ndarray) -> int:
        if len(values) == 0 or (values == values[0]).all():
            return self.builder.index(int(values[0]) if len(values) else 0)
        for k, known in enumerate(self.columns):
            if np.array_equal(known, values):
                return self.builder.coord(k)
        self.columns.append(values)
        self.builder.extents = (*self.builder.extents, int(values.max()) + 1)
        return self.builder.coord(len(self.columns) - 1)

    def load(self, value: int, at: list[int], dtype: str, pred: int | None) -> int:
        if value not in self.operands:
            self.operands.append(value)
        return self.builder.load(self.operands.index(value), at, dtype, pred)


class _Search:
    def __init__(self, plan: Plan, routine: Routine, ops: Sequence[Op | None], boxes: np.ndarray):
        self.plan = plan
        self.ops = ops
        self.boxes = boxes
        self.scalars = _Scalars()
        self.limits: list[dict[int, int]] = [{} for _ in ops]  # nodes of the scalars
        self.local = set(routine.local_values)
        stored = [v for op in ops if op is not None for v in op.outputs if v not in self.local]
        self.written = {int(plan.value_storage[v]) for v in stored}

    # -- bounds ------------------------------------------------------------------------------------------------

    def bound(self) -> None:
        """Fills in ``limits``, readers before what they read."""
        for m in range(len(self.ops) - 1, -1, -1):
            op = self.ops[m]
            if not isinstance(op, Nest):
                continue
            if self.local.issuperset(op.outputs):
                for d, extent in enumerate(op.space):
                    box = self.boxes[m][:, :, d]
                    if extent == 1 or np.any(box != [0, extent]):
                        continue
                    found = {self._read_up_to(v, d, m) for v in op.outputs}
                    if len(found) == 1 and (bound := found.pop()) is not None:
                        self.limits[m][d] = bound
            if len(op.rspace) == 1:
                self._bound_reduction(m, op)

    def _bound_reduction(self, m: int, op: Nest) -> None:
        coord, preds = len(op.space), []
        if op.kind == "contract":
            preds = [f.bound for r in op.body.results if (f := factor(op.body, r)) is not None and f.bound >= 0]
        elif op.combine is not None and op.combine.kind in _NOTHING and len(op.acc) == 1:
            node = op.body.result()
            bits = dtypes.to_bits(_NOTHING[op.combine.kind], op.acc[0]) if dtypes.is_float(op.acc[0]) else None
            if node.op == "select" and op.body.nodes[node.args[2]] == Node("const", (), op.acc[0], bits):
                preds = [node.args[0]]
        for pred in preds:
            found = limit(op.body, pred)
            if found is not None and found[0] == coord:
                scalar = self._uniform(m, op, op.body, found[1])
                if scalar is not None:
                    self.limits[m][coord] = scalar
                    return

    def _read_up_to(self, v: int, axis: int, m: int) -> int | None:
        """The bound of what later members read of a local value along an axis."""
        found: set[int | None] = set()
        for k in range(m + 1, len(self.ops)):
            op = self.ops[k]
            if op is None or v not in reads(op):
                continue
            if not isinstance(op, Nest):
                return None
            for expr in programs(op):
                for i in expr.loads():
                    node = expr.nodes[i]
                    if op.operands[node.attr] == v:
                        at = expr.nodes[_indices(node)[axis]]
                        found.add(self.limits[k].get(at.attr) if at.op == "coord" else None)
        return found.pop() if len(found) == 1 else None

    # -- scalars -----------------------------------------------------------------------------------------------

    def _uniform(self, m: int, op: Nest, expr: Expr, i: int) -> int | None:
        """A node of the scalars that is node ``i`` in every task; None where it differs within a task, or changes."""
        only, s = expr.only(i), self.scalars
        coords: dict[int, int] = {}
        for node in only.nodes:
            if node.op == "coord":
                axis: int = node.attr
                if axis >= len(op.space) or np.any(self.boxes[m][:, 1, axis] - self.boxes[m][:, 0, axis] > 1):
                    return None
                coords[axis] = s.column(np.ascontiguousarray(self.boxes[m][:, 0, axis]))
            if node.op in ("load", "load_if"):
                storage = int(self.plan.value_storage[op.operands[node.attr]])
                if storage < 0 or storage in self.written or self.plan.storages[storage].tagged:
                    return None
            if node.op == "acc":
                return None
        at = [coords.get(axis, -1) for axis in range(len(expr.extents))]
        operands = op.operands
        return inline(s.builder, only, at, lambda slot, at, dtype, pred: s.load(operands[slot], at, dtype, pred))[0]

    # -- shifts ------------------------------------------------------------------------------------------------

    def shifted(self) -> dict[int, Shift]:
        """Values of which every load begins at the same position known at run time."""
        found: dict[int, set[Shift | None]] = {}
        for m, op in enumerate(self.ops):
            if not isinstance(op, Nest):
                for v in () if op is None else reads(op):
                    found.setdefault(v, set()).add(None)
                continue
            for expr in programs(op):
                for load in (expr.nodes[i] for i in expr.loads()):
                    found.setdefault(op.operands[load.attr], set()).add(self._shift(m, op, expr, load))
        same = {v: next(iter(shifts)) for v, shifts in found.items() if len(shifts) == 1 and v not in self.local}
        return {v: shift for v, shift in same.items() if shift is not None}

    def _shift(self, m: int, op: Nest, expr: Expr, load: Node) -> Shift | None:
        """Where a load begins, in nodes of the scalars."""
        out = None
        for axis, i in enumerate(_indices(load)):
            found = self._begin(m, op, expr, i)
            if found is not None:
                coord, first = found
                if out is not None or coord not in self.limits[m]:
                    return None
                out = Shift(axis, first, self.limits[m][coord])
        return out

    def _begin(self, m: int, op: Nest, expr: Expr, i: int) -> tuple[int, int] | None:
        """An index as (coordinate, node of the scalars that is added to it); None where it is something else."""
        b = Builder(expr.extents)
        only = expr.only(i)
        root = inline(b, only, b.coords(), b.load)[0]
        coord = _coordinate(b, root)
        if coord is None or b.linear(root)[0].keys() == {coord}:
            return None
        rest = b.build(b.sub(root, coord))
        first = self._uniform(m, op, rest, rest.results[0])
        return None if first is None else (b.nodes[coord].attr, first)  # type: ignore[return-value]

    # -- the result --------------------------------------------------------------------------------------------

    def live(self, shifts: dict[int, Shift]) -> Live:
        """The members rewritten, with results of the scalars in place of their nodes."""
        ops: list[Op | None] = []
        for m, op in enumerate(self.ops):
            if not isinstance(op, Nest) or not (self.limits[m] or not shifts.keys().isdisjoint(op.operands)):
                ops.append(op)
                continue
            epilogue = None if op.epilogue is None else self._rewritten(m, op, op.epilogue, shifts)
            ops.append(replace(op, body=self._rewritten(m, op, op.body, shifts), epilogue=epilogue))
        used = {n for limits in self.limits for n in limits.values()}
        nodes = sorted(used.union(*({shift.first, shift.count} for shift in shifts.values())))
        number = {n: k for k, n in enumerate(nodes)}
        return Live(
            ops=ops,
            limits=[{d: number[n] for d, n in limits.items()} for limits in self.limits],
            shifts={v: Shift(s.axis, number[s.first], number[s.count]) for v, s in shifts.items()},
            scalars=self.scalars.builder.build(*nodes),
            columns=self.scalars.columns,
            operands=self.scalars.operands,
        )

    def _rewritten(self, m: int, op: Nest, expr: Expr, shifts: dict[int, Shift]) -> Expr:
        """A program that runs over live positions only, in which shifted values are indexed from where they begin.

        So are the comparisons that say where new rows lie among old ones.
        """
        b = Builder(expr.extents)
        firsts = {shift.first for shift in shifts.values()}
        at: list[int] = []
        for node in expr.nodes:
            args = [at[a] for a in node.args]
            if node.op == "coord":
                at.append(b.coord(node.attr))  # type: ignore[arg-type]
            elif node.op == "const":
                at.append(b.const_bits(node.attr, node.dtype))  # type: ignore[arg-type]
            elif node.op == "acc":
                at.append(b.acc(node.attr, node.dtype))  # type: ignore[arg-type]
            elif node.op in ("load", "load_if"):
                pred = args.pop(0) if node.op == "load_if" else None
                shift = shifts.get(op.operands[node.attr])  # type: ignore[index]
                if shift is not None:
                    coord = _coordinate(b, args[shift.axis])
                    assert coord is not None
                    args[shift.axis] = coord
                at.append(b.load(node.attr, args, node.dtype, pred))  # type: ignore[arg-type]
            elif node.op == "lt" and self._holds(m, op, expr, node):
                at.append(b.const(True, "b1"))
            else:
                if node.op in ("ge", "lt") and firsts and expr.nodes[node.args[0]].dtype == INDEX:
                    begin = self._begin(m, op, expr, node.args[0])
                    coord = _coordinate(b, args[0])
                    if begin is not None and begin[1] in firsts and coord is not None:
                        args = [coord, b.sub(args[1], b.sub(args[0], coord))]
                at.append(b.op(node.op, *args, dtype=node.dtype, attr=node.attr))
        return b.build(*(at[r] for r in expr.results))

    def _holds(self, m: int, op: Nest, expr: Expr, node: Node) -> bool:
        """Whether a comparison is true wherever the member runs."""
        coord = expr.nodes[node.args[0]]
        bound = self.limits[m].get(coord.attr) if coord.op == "coord" else None  # type: ignore[arg-type]
        return bound is not None and self._uniform(m, op, expr, node.args[1]) == bound


def _indices(load: Node) -> tuple[int, ...]:
    return load.args[1:] if load.op == "load_if" else load.args


def _coordinate(b: Builder, i: int) -> int | None:
    """The one coordinate that an index steps with, by ones."""
    terms, _ = b.linear(i)
    coords = [a for a, k in terms.items() if b.nodes[a].op == "coord" and k == 1]
    return coords[0] if len(coords) == 1 else None
