"""Checks that a graph keeps the rules of :mod:`jax_mpk.graph.ir`.

A broken graph is a bug of jax_mpk. It is reported with the operator, printed, and the chain of loops and branches it is
in; everything after the graph may then rely on what is checked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jax_mpk.errors import GraphVerificationError
from jax_mpk.graph import dtypes
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.ir import Block, Branch, Combine, Cumulative, Graph, Loop, Nest, Op, Sort, Update, Value
from jax_mpk.graph.printer import format_op, type_name
from jax_mpk.graph.verify_expr import Broken, Leaves, check_expr, ranges
from jax_mpk.graph.windows import factor

__all__ = ["ranges", "verify_graph"]

_SIMPLE = ("sum", "prod", "max", "min", "and", "or", "xor")
_ARG = ("argmax", "argmin")


def verify_graph(graph: Graph) -> None:
    """Raises :class:`~jax_mpk.errors.GraphVerificationError` unless the graph is sound."""
    try:
        _check_values(graph)
    except Broken as error:
        raise GraphVerificationError(f"broken graph: {error}") from None
    checker = _Checker(graph)
    scope = set(graph.inputs)
    checker.defined.update(graph.inputs)
    checker.block(graph.block, scope, "the function")


def _check_values(graph: Graph) -> None:
    for position, value in enumerate(graph.values):
        if value.id != position:
            raise Broken(f"value {position} calls itself %{value.id}")
        if value.dtype not in dtypes.ALL or any(size < 0 for size in value.shape):
            raise Broken(f"%{position} is {type_name(value)}")
    if any(not 0 <= v < len(graph.values) for v in graph.inputs):
        raise Broken(f"inputs {graph.inputs} of {len(graph.values)} values")
    if len(set(graph.inputs)) != len(graph.inputs):
        raise Broken(f"an input is listed twice: {graph.inputs}")
    outside = [d for d in graph.donated if not 0 <= d < len(graph.inputs)]
    if outside:
        raise Broken(f"donated positions {sorted(outside)} of {len(graph.inputs)} inputs")
    if graph.layouts and len(graph.layouts) != len(graph.inputs):
        raise Broken(f"{len(graph.layouts)} layouts of {len(graph.inputs)} inputs")
    for position, (v, layout) in enumerate(zip(graph.inputs, graph.layouts)):
        if layout is None:
            continue
        if sorted(layout) != list(range(len(graph.values[v].shape))):
            raise Broken(f"the layout {layout} of %{v}, which is {type_name(graph.values[v])}")
        if position in graph.donated:
            raise Broken(f"%{v} is donated and has the layout {layout}")


class _Checker:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.defined: set[int] = set()

    # -- blocks and scopes -------------------------------------------------------------------------------------

    def block(self, block: Block, scope: set[int], where: str) -> None:
        """Checks a block; ``scope`` holds the values it may read and is not changed."""
        scope = set(scope)
        for op in block.ops:
            try:
                self._op(op, scope, where)
            except Broken as error:
                raise GraphVerificationError(
                    f"broken graph: {error}\n  in {where}, operator:\n{_quoted(self.graph, op)}"
                ) from None
            scope.update(op.outputs)
        missing = [v for v in block.results if v not in scope]
        if missing:
            raise GraphVerificationError(f"broken graph: {where} returns {_names(missing)}, not defined in it")

    def _op(self, op: Op, scope: set[int], where: str) -> None:
        base = (op.base,) if isinstance(op, Update) else ()
        for v in (*base, *op.operands):
            if not 0 <= v < len(self.graph.values):
                raise Broken(f"it reads %{v}, which is not in the value table")
            if v not in scope:
                known = "is not defined here" if v in self.defined else "has not been defined yet"
                raise Broken(f"it reads %{v}, which {known}")
        if isinstance(op, Loop):
            self._loop(op, scope, where)
        elif isinstance(op, Branch):
            self._branch(op, scope, where)
        self._define(op.outputs)
        if isinstance(op, Nest):
            self._nest(op)
        elif isinstance(op, Update):
            self._update(op)
        elif isinstance(op, Cumulative):
            self._cumulative(op)
        elif isinstance(op, Sort):
            self._sort(op)

    def _define(self, ids: Sequence[int]) -> None:
        for v in ids:
            if not 0 <= v < len(self.graph.values):
                raise Broken(f"it defines %{v}, which is not in the value table")
            if v in self.defined:
                raise Broken(f"it defines %{v} a second time")
            self.defined.add(v)

    def _loop(self, op: Loop, scope: set[int], where: str) -> None:
        here = f"the loop of {_names(op.outputs)} in {where}"
        self._same_types("parameters", op.params, "initial values", op.inits)
        self._same_types("parameters", op.params, "outputs", op.outputs)
        self._define(op.params)
        inner = scope | set(op.params)
        if (op.cond is None) == (op.trips is None):
            raise Broken("a loop has either a condition or a number of trips")
        if op.trips is not None and op.trips < 0:
            raise Broken(f"{op.trips} trips")
        if op.cond is not None:
            self.block(op.cond, inner, f"the condition of {here}")
            self._is_scalar(op.cond.results, "b1", "the condition's result")
        self.block(op.body, inner, f"the body of {here}")
        self._same_types("the body's results", op.body.results, "parameters", op.params)

    def _branch(self, op: Branch, scope: set[int], where: str) -> None:
        self._is_scalar((op.index,), "s32", "the index")
        if not op.arms:
            raise Broken("a branch without arms")
        for k, arm in enumerate(op.arms):
            self.block(arm, scope, f"arm {k} of the branch of {_names(op.outputs)} in {where}")
            self._same_types(f"arm {k}'s results", arm.results, "outputs", op.outputs)

    def _is_scalar(self, ids: Sequence[int], dtype: str, what: str) -> None:
        have = [type_name(self._value(v)) for v in ids]
        if have != [f"{dtype}[]"]:
            raise Broken(f"{what} is ({', '.join(have)}), not {dtype}[]")

    def _same_types(self, what: str, left: Sequence[int], other: str, right: Sequence[int]) -> None:
        a, b = ([type_name(self._value(v)) for v in side] for side in (left, right))
        if a != b:
            raise Broken(f"{what} ({', '.join(a)}) and {other} ({', '.join(b)}) differ")

    def _value(self, v: int) -> Value:
        if not 0 <= v < len(self.graph.values):
            raise Broken(f"%{v} is not in the value table")
        return self.graph.values[v]

    # -- operators ---------------------------------------------------------------------------------------------

    def _leaves(self, op: Op, space: Iterable[int], acc: Sequence[str] = ()) -> Leaves:
        return Leaves([self._value(v) for v in op.operands], acc, empty=0 in tuple(space))

    def _out_types(self, op: Nest | Cumulative) -> list[str]:
        for v in op.outputs:
            if self._value(v).shape != op.space:
                raise Broken(f"output %{v} is {type_name(self._value(v))}, the space is {op.space}")
        if not op.outputs:
            raise Broken("no outputs")
        return [self._value(v).dtype for v in op.outputs]

    def _nest(self, op: Nest) -> None:
        out = self._out_types(op)
        if op.kind == "map":
            if op.rspace or op.acc or op.combine is not None or op.epilogue is not None:
                raise Broken("a map has no reduced axes, accumulators, combination or epilogue")
            check_expr(op.body, op.space, out, self._leaves(op, op.space))
            return
        if op.kind not in ("reduce", "contract"):
            raise Broken(f"unknown kind {op.kind}")
        if op.combine is None or op.epilogue is None:
            raise Broken(f"a {op.kind} needs a combination and an epilogue")
        if not op.rspace or any(size < 1 for size in op.rspace):
            raise Broken(f"reduced axes {op.rspace}")
        if (op.combine.kind == "dot") != (op.kind == "contract"):
            raise Broken(f"a {op.kind} by {op.combine.kind}")
        if op.combine.kind in _ARG and len(op.rspace) != 1:
            raise Broken(f"{op.combine.kind} over {len(op.rspace)} axes")
        _check_accumulators(op.combine, op.acc)
        leaves = self._leaves(op, op.space)
        if op.kind == "contract":
            kinds = [op.body.nodes[r].dtype for r in op.body.results if 0 <= r < len(op.body.nodes)]
            if len(op.body.results) != 2:
                raise Broken(f"a contraction of {len(op.body.results)} factors")
            check_expr(op.body, (*op.space, *op.rspace), kinds, leaves)
            for result in op.body.results:
                _check_factor(op, result)
        else:
            kinds = list(op.acc[:1]) if op.combine.kind in _ARG else list(op.acc)
            check_expr(op.body, (*op.space, *op.rspace), kinds, leaves)
        check_expr(op.epilogue, op.space, out, self._leaves(op, op.space, op.acc))

    def _cumulative(self, op: Cumulative) -> None:
        out = self._out_types(op)
        if not 0 <= op.axis < len(op.space):
            raise Broken(f"axis {op.axis} of {len(op.space)}")
        if op.combine.kind == "dot":
            raise Broken("a cumulative dot")
        _check_accumulators(op.combine, op.acc)
        kinds = list(op.acc[:1]) if op.combine.kind in _ARG else list(op.acc)
        check_expr(op.body, op.space, kinds, self._leaves(op, op.space))
        check_expr(op.epilogue, op.space, out, self._leaves(op, op.space, op.acc))

    def _update(self, op: Update) -> None:
        base, out = self._value(op.base), self._value(op.output)
        if (base.shape, base.dtype) != (out.shape, out.dtype):
            raise Broken(f"the base is {type_name(base)}, the output {type_name(out)}")
        wide = dtypes.compute_type(base.dtype)
        leaves = self._leaves(op, op.space)
        check_expr(op.index, op.space, [INDEX] * len(base.shape) + ["b1"], leaves)
        check_expr(op.value, op.space, [base.dtype if op.combine.kind == "set" else wide], leaves)
        if op.combine.kind not in ("set", "generic", *_SIMPLE):
            raise Broken(f"an update by {op.combine.kind}")
        if op.combine.kind != "set":
            _check_accumulators(op.combine, (wide,))
        known = ranges(op.index)
        *where, inside = op.index.results
        if leaves.empty or known[inside] != (1, 1):
            return
        for axis, (r, size) in enumerate(zip(where, base.shape, strict=True)):
            bounds = known[r]
            if bounds is None or bounds[0] < 0 or bounds[1] >= size:
                raise Broken(f"it writes at {bounds} of axis {axis}, which has {size}, and says it is in bounds")

    def _sort(self, op: Sort) -> None:
        values, outputs = ([self._value(v) for v in ids] for ids in (op.operands, op.outputs))
        if not values or any(v.shape != op.space for v in values) or not 0 <= op.axis < len(op.space):
            raise Broken(f"operands ({', '.join(map(type_name, values))}) sorted along axis {op.axis} of {op.space}")
        if not 1 <= op.num_keys <= len(values):
            raise Broken(f"{op.num_keys} keys of {len(values)} operands")
        shape, kinds = op.space, [v.dtype for v in values]
        if op.top_k is not None:
            if len(values) != 1 or not 0 <= op.top_k <= op.space[op.axis]:
                raise Broken(f"top {op.top_k} of {len(values)} operands of {op.space}")
            shape = tuple(op.top_k if d == op.axis else size for d, size in enumerate(shape))
            kinds = [values[0].dtype, "s32"]
        if [(v.shape, v.dtype) for v in outputs] != [(shape, kind) for kind in kinds]:
            raise Broken(f"outputs ({', '.join(map(type_name, outputs))}), expected {', '.join(kinds)} of {shape}")


def _check_accumulators(combine: Combine, acc: Sequence[str]) -> None:
    if any(kind not in dtypes.ALL or kind in ("f16", "bf16") for kind in acc):
        raise Broken(f"accumulators ({', '.join(acc)}); f16 and bf16 accumulate in f32")
    if (combine.expr is not None) != (combine.kind == "generic"):
        raise Broken(f"a combination {combine.kind} {'with' if combine.expr else 'without'} a program")
    if combine.expr is not None:
        check_expr(combine.expr, (), list(acc), Leaves((), acc, acc))
        return
    if combine.kind in _ARG:
        if len(acc) != 2 or acc[1] != INDEX:
            raise Broken(f"{combine.kind} with accumulators ({', '.join(acc)})")
        return
    if combine.kind not in (*_SIMPLE, "dot"):
        raise Broken(f"unknown combination {combine.kind}")
    if len(acc) != 1:
        raise Broken(f"{combine.kind} with {len(acc)} accumulators")
    logical = combine.kind in ("and", "or", "xor")
    if (dtypes.is_float(acc[0]) and logical) or (acc[0] == "b1" and not logical):
        raise Broken(f"{combine.kind} of {acc[0]}")


def _check_factor(op: Nest, result: int) -> None:
    """A factor is a load at affine indices, perhaps windowed, perhaps converted."""
    if factor(op.body, result) is None:
        raise Broken("a factor of a contraction is not a plain load at affine indices")
    if dtypes.is_float(op.body.nodes[result].dtype) and not dtypes.is_float(op.acc[0]):
        raise Broken(f"{op.body.nodes[result].dtype} factors accumulate in {op.acc[0]}")


def _names(ids: Sequence[int]) -> str:
    return ", ".join(f"%{v}" for v in ids)


def _quoted(graph: Graph, op: Op) -> str:
    try:
        text = format_op(graph, op)
    except Exception:  # the printer may trip over what is broken
        text = repr(op)
    lines = text.splitlines()
    shown = lines if len(lines) <= 12 else [*lines[:12], "…"]
    return "\n".join(f"    {line}" for line in shown)
