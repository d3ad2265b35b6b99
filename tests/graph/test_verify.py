"""The verifier on graphs broken on purpose, one rule at a time."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.errors import GraphVerificationError
from jax_mpk.graph.ir import Block, Branch, Combine, Cumulative, Graph, Loop, Nest, Op, Sort, Update, Value
from jax_mpk.graph.scalar import Builder, Expr, Node
from jax_mpk.graph.verify import ranges, verify_graph
from tests.graph.harness import graph_of

X = np.ones((4, 6), np.float32)


def sample() -> Graph:
    """A graph with every kind of operator."""

    def fn(x, h, i):
        y = x * 2 + 1  # map
        total = x.sum(1)  # reduce
        where = jnp.argmax(x, 1)  # reduce argmax
        product = x @ x.T  # contract
        pick = lax.dynamic_slice(x, (i, i), (2, 2))
        new = lax.dynamic_update_slice(x, y[:1, :2], (i, i))  # update
        added = total.at[i].add(1.0)
        run = jnp.cumsum(x, 1)
        order = jnp.sort(x, 1)
        best = lax.top_k(x, 2)
        carry = lax.fori_loop(0, i, lambda k, c: c + k, total)  # while loop
        rows = lax.scan(lambda c, a: (c + a, c), x[0], x)  # loop
        chosen = lax.switch(i, [lambda t: t + 1, lambda t: t * 2], total)
        half = h * 2
        padded = jnp.pad(x, 1)
        return y, total, where, product, pick, new, added, run, order, best, carry, rows, chosen, half, padded

    return graph_of(fn, X, X.astype(jnp.bfloat16), np.int32(1))[0]


GRAPH = sample()


def find(kind: type, test: Callable[..., bool] = lambda op: True) -> Op:
    return next(op for op in GRAPH.block.ops if isinstance(op, kind) and test(op))


def nest(kind: str, combine: str | None = None) -> Nest:
    op = find(Nest, lambda op: op.kind == kind and (combine is None or op.combine.kind == combine))
    assert isinstance(op, Nest)
    return op


def with_op(old: Op, new: Op | None, graph: Graph = GRAPH) -> Graph:
    ops = tuple(new if op is old else op for op in graph.block.ops)
    return replace(graph, block=Block(tuple(op for op in ops if op is not None), graph.block.results))


def refused(graph: Graph, words: str) -> str:
    with pytest.raises(GraphVerificationError, match=words) as caught:
        verify_graph(graph)
    return str(caught.value)


def program(extents, *results, build: Callable[[Builder], list[int]] | None = None) -> Expr:
    b = Builder(extents)
    return b.build(*build(b)) if build else b.build(*results)


def constant(extents: tuple[int, ...], dtype: str) -> Expr:
    return program(extents, build=lambda b: [b.const(0, dtype)])


def test_the_sample_is_sound() -> None:
    verify_graph(GRAPH)
    kinds = {type(op) for op in GRAPH.block.ops}
    assert kinds == {Nest, Update, Cumulative, Sort, Loop, Branch}


# -- values, scopes, single definitions ------------------------------------------------------------------------


def test_value_table() -> None:
    values = list(GRAPH.values)
    values[3] = replace(values[3], id=4)
    refused(replace(GRAPH, values=tuple(values)), "calls itself %4")
    values[3] = Value(3, (-1,), "f32")
    refused(replace(GRAPH, values=tuple(values)), "%3 is f32")
    values[3] = Value(3, (2,), "f8")
    refused(replace(GRAPH, values=tuple(values)), "%3 is f8")


def test_inputs_and_donations() -> None:
    refused(replace(GRAPH, inputs=(*GRAPH.inputs, 9999)), "inputs")
    refused(replace(GRAPH, inputs=(*GRAPH.inputs, GRAPH.inputs[0])), "listed twice")
    refused(replace(GRAPH, donated=frozenset({3})), r"donated positions \[3\] of 3 inputs")


def test_use_before_definition() -> None:
    ops = GRAPH.block.ops
    reader = next(op for op in ops if not set(op.operands) <= set(GRAPH.inputs))
    refused(
        replace(GRAPH, block=Block((reader, *(op for op in ops if op is not reader)), GRAPH.results)),
        "has not been defined yet",
    )


def test_unknown_values() -> None:
    op = nest("map")
    text = refused(with_op(op, replace(op, operands=(9999,))), "%9999, which is not in the value table")
    assert "in the function, operator" in text and "map" in text
    refused(with_op(op, replace(op, outputs=(9999,))), "defines %9999")


def test_double_definition() -> None:
    first, second = nest("map"), nest("reduce", "sum")
    refused(with_op(second, replace(second, outputs=first.outputs)), "a second time")
    refused(with_op(first, replace(first, outputs=(GRAPH.inputs[0],))), "a second time")


def test_results_must_be_defined() -> None:
    op = next(op for op in GRAPH.block.ops if op.outputs[0] in GRAPH.results)
    refused(with_op(op, None), "the function returns %|has not been defined")
    refused(replace(GRAPH, block=replace(GRAPH.block, results=(9999,))), "returns %9999")


def test_values_of_inner_blocks_are_not_visible_outside() -> None:
    loop = find(Loop)
    inner = loop.body.ops[0].outputs[0]
    refused(replace(GRAPH, block=replace(GRAPH.block, results=(inner,))), "not defined in it")
    op = GRAPH.block.ops[-1]
    shape = GRAPH.values[inner].shape
    leak = Nest("map", shape, (), (inner,), op.outputs, constant(shape, "f32"))
    ops = (*GRAPH.block.ops[:-1], leak)
    refused(replace(GRAPH, block=Block(ops, GRAPH.results)), "is not defined here")


# -- operators -------------------------------------------------------------------------------------------------


def test_shapes_of_maps() -> None:
    op = nest("map")
    refused(with_op(op, replace(op, space=(4, 7))), "the space is")
    refused(with_op(op, replace(op, body=constant((4,), "f32"))), "a program over")
    refused(with_op(op, replace(op, body=constant(op.space, "s32"))), r"computes \(s32\) where \(f32\)")
    refused(with_op(op, replace(op, outputs=())), "no outputs|has not been defined|returns")
    refused(with_op(op, replace(op, kind="scan")), "unknown kind")
    refused(with_op(op, replace(op, rspace=(2,))), "a map has no reduced axes")


def test_reductions() -> None:
    op = nest("reduce", "sum")
    refused(with_op(op, replace(op, epilogue=None)), "needs a combination and an epilogue")
    refused(with_op(op, replace(op, rspace=(0,))), "reduced axes")
    refused(with_op(op, replace(op, acc=("bf16",))), "accumulate in f32")
    refused(with_op(op, replace(op, acc=("f32", "f32"))), "2 accumulators")
    refused(with_op(op, replace(op, combine=Combine("mean"))), "unknown combination")
    refused(with_op(op, replace(op, combine=Combine("dot"))), "a reduce by dot")
    refused(with_op(op, replace(op, combine=Combine("and"))), "and of f32")
    refused(with_op(op, replace(op, combine=Combine("generic"))), "without a program")
    refused(with_op(op, replace(op, combine=Combine("sum", constant((), "f32")))), "with a program")
    refused(with_op(op, replace(op, combine=Combine("generic", constant((), "s32")))), r"computes \(s32\)")
    argmax = nest("reduce", "argmax")
    refused(with_op(argmax, replace(argmax, acc=("f32", "s32"))), "argmax with accumulators")
    wide = replace(argmax, rspace=(2, 3), body=constant((*argmax.space, 2, 3), "f32"))
    refused(with_op(argmax, wide), "argmax over 2 axes")


def test_contractions() -> None:
    op = nest("contract")

    def factors(build: Callable[[Builder], list[int]]) -> Graph:
        return with_op(op, replace(op, body=program((*op.space, *op.rspace), build=build)))

    def load(b: Builder) -> int:
        return b.load(0, [b.coord(0), b.coord(2)], "f32")

    slots = len(op.operands)
    assert slots >= 1
    refused(factors(lambda b: [load(b)]), "1 factors")
    refused(factors(lambda b: [load(b), b.const(0, "f32")]), "not a plain load")
    refused(factors(lambda b: [load(b), b.mul(load(b), load(b))]), "not a plain load")
    bent = [lambda b: b.mod(b.coord(0), 3), lambda b: b.op("min", b.coord(0), b.coord(1))]
    for index in bent:
        refused(
            factors(lambda b, index=index: [load(b), b.load(0, [index(b), b.coord(2)], "f32")]),
            "not a plain load at affine indices",
        )
    refused(
        factors(lambda b: [load(b), b.load(0, [b.coord(1), b.coord(2)], "f32", b.op("eq", b.coord(0), b.coord(1)))]),
        "not a plain load",
    )


def test_updates() -> None:
    op = find(Update, lambda op: op.combine.kind == "set")
    rank = len(GRAPH.values[op.base].shape)
    refused(with_op(op, replace(op, base=9999)), "%9999")
    smaller = next(v.id for v in GRAPH.values if v.shape == (4,) and v.dtype == "f32" and v.id < op.output)
    refused(with_op(op, replace(op, base=smaller)), "the base is|has not been defined|not defined here")
    refused(with_op(op, replace(op, value=constant(op.space, "s32"))), r"computes \(s32\)")
    refused(with_op(op, replace(op, combine=Combine("argmax"))), "an update by argmax")

    def at(b: Builder) -> list[int]:
        return [b.index(99)] * rank + [b.const(True, "b1")]

    refused(with_op(op, replace(op, index=program(op.space, build=at))), "says it is in bounds")
    refused(with_op(op, replace(op, index=constant(op.space, "b1"))), r"computes \(b1\)")


def test_cumulatives_and_sorts() -> None:
    scan = find(Cumulative)
    refused(with_op(scan, replace(scan, axis=2)), "axis 2 of 2")
    refused(with_op(scan, replace(scan, combine=Combine("dot"))), "cumulative dot")
    refused(with_op(scan, replace(scan, body=constant(scan.space, "s32"))), r"computes \(s32\)")
    sort = find(Sort, lambda op: op.top_k is None)
    refused(with_op(sort, replace(sort, axis=5)), "sorted along axis 5")
    refused(with_op(sort, replace(sort, num_keys=2)), "2 keys of 1")
    top = find(Sort, lambda op: op.top_k is not None)
    refused(with_op(top, replace(top, top_k=3)), "outputs")
    refused(with_op(top, replace(top, outputs=top.outputs[:1])), "outputs|returns")


def test_loops() -> None:
    loop = find(Loop, lambda op: op.trips is not None)
    refused(with_op(loop, replace(loop, trips=None)), "either a condition or a number")
    refused(with_op(loop, replace(loop, trips=-1)), "-1 trips")
    refused(with_op(loop, replace(loop, inits=loop.inits[::-1])), "parameters .* and initial values .* differ")
    swapped = replace(loop, body=replace(loop.body, results=loop.body.results[::-1]))
    refused(with_op(loop, swapped), "the body's results .* differ")
    refused(with_op(loop, replace(loop, body=replace(loop.body, results=(9999,)))), "the body of the loop")
    while_ = find(Loop, lambda op: op.cond is not None)
    numeric = replace(while_, cond=replace(while_.cond, results=while_.params[:1]))
    refused(with_op(while_, numeric), "the condition's result is")
    inner = loop.body.ops[0]
    broken = replace(loop, body=replace(loop.body, ops=(replace(inner, operands=(9999,)), *loop.body.ops[1:])))
    assert "in the body of the loop" in refused(with_op(loop, broken), "%9999")


def test_branches() -> None:
    branch = find(Branch)
    refused(with_op(branch, replace(branch, arms=())), "without arms")
    refused(with_op(branch, replace(branch, index=GRAPH.inputs[0])), "the index is")
    short = replace(branch.arms[0], results=())
    refused(with_op(branch, replace(branch, arms=(short, branch.arms[1]))), "arm 0's results")


# -- scalar programs -------------------------------------------------------------------------------------------


def nodes(*listed: Node, results: tuple[int, ...] | None = None, extents: tuple[int, ...] = (4, 6)) -> Expr:
    return Expr(tuple(listed), results or (len(listed) - 1,), extents)


def one_op(expr: Expr, dtype: str = "f32") -> Graph:
    values = (Value(0, (4, 6), "f32"), Value(1, (4, 6), "bf16"), Value(2, (4, 6), dtype))
    op = Nest("map", (4, 6), (), (0, 1), (2,), expr)
    return Graph(values, (0, 1), Block((op,), (2,)))


ROW, COL = Node("coord", (), "s64", 0), Node("coord", (), "s64", 1)
WIDE, NARROW = Node("load", (0, 1), "f32", 0), Node("load", (0, 1), "bf16", 1)

BROKEN_PROGRAMS = {
    "forward reference": (nodes(Node("neg", (1,), "f32"), WIDE), "do not come before"),
    "itself": (nodes(Node("neg", (0,), "f32")), "do not come before"),
    "result": (nodes(ROW, COL, WIDE, results=(9,)), "results"),
    "unknown operation": (nodes(ROW, COL, WIDE, Node("fma", (2, 2), "f32")), "unknown operation"),
    "argument count": (nodes(ROW, COL, WIDE, Node("add", (2,), "f32")), "1 arguments instead of 2"),
    "unknown type": (nodes(ROW, COL, WIDE, Node("neg", (2,), "f8")), "unknown element type"),
    "arithmetic on bf16": (nodes(ROW, COL, NARROW, Node("neg", (2,), "bf16")), "f16 and bf16 are converted"),
    "comparison of bf16": (nodes(ROW, COL, NARROW, Node("lt", (2, 2), "b1")), "f16 and bf16 are converted"),
    "mixed types": (nodes(ROW, COL, WIDE, Node("add", (2, 0), "f32")), "different types"),
    "result type": (nodes(ROW, COL, WIDE, Node("add", (2, 2), "f64")), "f64 from f32"),
    "comparison type": (nodes(ROW, COL, WIDE, Node("lt", (2, 2), "f32")), "f32 from f32"),
    "float function of integers": (nodes(ROW, Node("exp", (0,), "s64")), "not an operation on s64"),
    "bits of floats": (nodes(ROW, COL, WIDE, Node("and", (2, 2), "f32")), "not an operation on f32"),
    "shift of floats": (nodes(ROW, COL, WIDE, Node("shl", (2, 2), "f32")), "not an operation on f32"),
    "arithmetic on b1": (nodes(Node("const", (), "b1", 1), Node("add", (0, 0), "b1")), "not an operation on b1"),
    "select predicate": (nodes(ROW, COL, WIDE, Node("select", (0, 2, 2), "f32")), "from"),
    "select arms": (nodes(ROW, COL, WIDE, Node("lt", (0, 1), "b1"), Node("select", (3, 2, 0), "f32")), "from"),
    "bitcast width": (nodes(ROW, COL, WIDE, Node("bitcast", (2,), "u16")), "differ in width"),
    "rounding of integers": (nodes(ROW, Node("convert", (0,), "s32", "round")), "not a rounding"),
    "conversion attribute": (nodes(ROW, Node("convert", (0,), "f32", "floor")), "attribute"),
    "coordinate axis": (nodes(Node("coord", (), "s64", 2)), "axis 2 of 2"),
    "coordinate type": (nodes(Node("coord", (), "s32", 0)), "axis 0 of 2, as s32"),
    "constant bits": (nodes(Node("const", (), "b1", 2)), "not a bit pattern"),
    "negative bits": (nodes(Node("const", (), "s32", -1)), "not a bit pattern"),
    "accumulator of a map": (nodes(Node("acc", (), "f32", 0)), "number 0 as f32"),
    "argument of a map": (nodes(Node("arg", (), "f32", 0)), "number 0 as f32"),
    "slot": (nodes(ROW, COL, Node("load", (0, 1), "f32", 2)), "slot 2 of 2"),
    "number of indices": (nodes(ROW, Node("load", (0,), "f32", 0)), "for 2 axes"),
    "index type": (nodes(ROW, Node("convert", (0,), "s32"), Node("load", (0, 1), "f32", 0)), r"indices \(s64, s32\)"),
    "loaded type": (nodes(ROW, COL, Node("load", (0, 1), "bf16", 0)), "reads bf16 where"),
    "predicate type": (nodes(ROW, COL, Node("load_if", (0, 0, 1), "f32", 0)), "predicate is not b1"),
    "precision": (nodes(ROW, COL, WIDE, Node("reduce_precision", (2,), "f32", 7)), "precision 7"),
    "extents": (nodes(ROW, COL, WIDE, extents=(4, 7)), "a program over"),
    "swapped axes": (nodes(COL, ROW, WIDE), "at 0 to 5 of axis 0, which has 4"),
}


@pytest.mark.parametrize("name", BROKEN_PROGRAMS)
def test_broken_programs(name: str) -> None:
    expr, words = BROKEN_PROGRAMS[name]
    text = refused(one_op(expr), words)
    assert "operator:" in text


@pytest.mark.parametrize("offset", [-1, 1])
def test_loads_out_of_bounds(offset: int) -> None:
    b = Builder((4, 6))
    row = b.add(b.coord(0), b.index(offset))
    refused(one_op(b.build(b.load(0, [row, b.coord(1)], "f32"))), "of axis 0, which has 4")
    b = Builder((4, 6))
    row = b.clamp(b.index(0), b.add(b.coord(0), b.index(offset)), b.index(3))
    verify_graph(one_op(b.build(b.load(0, [row, b.coord(1)], "f32"))))
    b = Builder((4, 6))
    row = b.add(b.coord(0), b.index(offset))
    verify_graph(one_op(b.build(b.load(0, [row, b.coord(1)], "f32", b.in_bounds(row, 0, 4)))))


def test_loads_at_unknown_positions() -> None:
    b = Builder((4, 6))
    somewhere = b.convert(b.load(0, [b.coord(0), b.coord(1)], "f32"), "s64")
    refused(one_op(b.build(b.load(0, [somewhere, b.coord(1)], "f32"))), "of axis 0, which has 4")


def test_ranges() -> None:
    b = Builder((4, 6))
    i, j = b.coords()
    value = b.add(b.mul(i, b.index(6)), j)
    expr = b.build(i, value, b.op("lt", value, b.index(24)), b.const(1.5, "f32"))
    assert [ranges(expr)[r] for r in expr.results] == [(0, 3), (0, 23), (1, 1), None]


def test_programs_that_never_run_are_not_checked_for_bounds() -> None:
    values = (Value(0, (0,), "f32"), Value(1, (0,), "f32"))
    b = Builder((0,))
    op = Nest("map", (0,), (), (0,), (1,), b.build(b.load(0, [b.coord(0)], "f32")))
    verify_graph(Graph(values, (0,), Block((op,), (1,))))


def test_passes_keep_graphs_sound_under_x64() -> None:
    with jax.enable_x64(True):
        graph_of(lambda x, i: x[i, ::2].astype(np.int64) + i, X, np.int64(2))
