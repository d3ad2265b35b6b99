"""Computes cheap element-wise producers where they are used instead of storing them.

Views (slices, transposes, broadcasts, gathers, conversions, iotas) are always computed in place; other maps where
that repeats no work, or so little that a round trip through memory costs more. A contraction takes only views whose
index stays affine: its bodies stream memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Block, Cumulative, Graph, Nest, Op, Update, Value
from jax_mpk.graph.rewrite import LoadRule, Slots, inline_map, map_blocks, prune, rewrite_loads, use_counts
from jax_mpk.graph.scalar import Builder, Expr
from jax_mpk.graph.windows import factor

#: Relative cost of one scalar operation; everything not listed costs 1.
_WEIGHT = {"convert": 0.0, "bitcast": 0.0, "neg": 0.25, "not": 0.25, "select": 0.5, "div": 2.0, "rem": 2.0, "sqrt": 2.0}
_WEIGHT |= dict.fromkeys(
    "exp exp2 expm1 log log1p rsqrt cbrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh logistic erf "
    "erfc pow atan2".split(),
    8.0,
)
_WEIGHT |= dict.fromkeys(
    "erf_inv lgamma digamma bessel_i0e bessel_i1e igamma igammac igamma_grad_a random_gamma_grad zeta polygamma "
    "betainc nextafter".split(),
    64.0,
)
#: A map below this work per element is a view.
VIEW = 1.0
#: Work per element a map may cost and still be repeated by its readers.
CHEAP = 3.0
#: Programs are not grown beyond this many nodes; those that have more already hardly grow.
MAX_NODES = 400
_GROWTH = 1.1


def work(expr: Expr) -> float:
    """Cost of evaluating one element, in additions; index arithmetic counts little."""
    index_only = _index_only(expr)
    total = 0.0
    for i, node in enumerate(expr.nodes):
        if node.args and node.op not in ("load", "load_if"):
            weight = _WEIGHT.get(node.op, 1.0)
            total += weight * 0.1 if i in index_only or node.dtype == dtypes.INDEX else weight
    return total


def _index_only(expr: Expr) -> set[int]:
    """Nodes that only serve indices and predicates of loads."""
    value: set[int] = set(expr.results)
    for i in range(len(expr.nodes) - 1, -1, -1):
        node = expr.nodes[i]
        if i in value and node.op not in ("load", "load_if"):
            value.update(node.args)
    return set(range(len(expr.nodes))) - value


def fuse_views(graph: Graph) -> Graph:
    """Inlines maps that only move data; maps nobody reads any more disappear."""
    return map_blocks(graph, lambda block: _fuse_block(block, graph.values, views_only=True))


def fuse_maps(graph: Graph) -> Graph:
    """Inlines views and whatever else is cheap to repeat; maps nobody reads any more disappear."""
    return map_blocks(graph, lambda block: _fuse_block(block, graph.values, views_only=False))


def _fuse_block(block: Block, values: Sequence[Value], *, views_only: bool) -> Block:
    uses = use_counts(block)
    maps: dict[int, Nest] = {}
    ops: list[Op] = []
    for op in block.ops:
        fused = _fuse_op(op, values, maps, uses, views_only) if isinstance(op, Nest | Update | Cumulative) else op
        if isinstance(fused, Nest) and fused.kind == "map":
            maps.update(dict.fromkeys(fused.outputs, fused))
        ops.append(fused)
    return prune(Block(tuple(ops), block.results), set())


def _fuse_op(
    op: Nest | Update | Cumulative, values: Sequence[Value], maps: dict[int, Nest], uses: Counter[int], views_only: bool
) -> Op:
    chosen = {v: maps[v] for v in op.operands if v in maps and _worth(op, v, values, maps[v], uses, views_only)}
    while chosen:
        fused = _inlined(op, chosen)
        if fused is not None:
            return fused
        # The program grew too large, or a factor is no longer affine: try with fewer maps.
        chosen = dict(list(chosen.items())[: len(chosen) // 2])
    return op


def _inlined(op: Op, chosen: dict[int, Nest]) -> Op | None:
    slots = Slots()

    def rule(builder: Builder, value: int, indices: list[int], dtype: str, pred: int | None) -> int | None:
        producer = chosen.get(value)
        if producer is None:
            return None
        return inline_map(builder, producer, value, indices, pred, slots, lambda *_: None)

    return _rewrite(op, rule, slots)


def _rewrite(op: Op, rule: LoadRule, slots: Slots) -> Op | None:
    fused = rewrite_loads(op, rule, slots)
    if too_large(fused, op) or (isinstance(fused, Nest) and fused.kind == "contract" and not has_factors(fused)):
        return None
    return fused


def too_large(new: Op, old: Op) -> bool:
    """Whether a rewrite made programs of an operator larger than they should be."""
    pairs = zip(programs(new), programs(old), strict=True)
    return any(len(n.nodes) > max(MAX_NODES, _GROWTH * len(o.nodes)) for n, o in pairs)


def programs(op: Op) -> list[Expr]:
    """The scalar programs of an operator."""
    found = [getattr(op, name, None) for name in ("body", "epilogue", "index", "value")]
    return [expr for expr in found if isinstance(expr, Expr)]


def _worth(op: Op, value: int, values: Sequence[Value], producer: Nest, uses: Counter[int], views_only: bool) -> bool:
    cost = work(producer.body)
    if isinstance(op, Nest) and op.kind == "contract" and _narrows(producer):
        return False  # rounded once by the producer, not by every task that streams it
    if cost < VIEW or views_only:
        return cost < VIEW
    if isinstance(op, Nest) and op.kind == "contract":
        # Its epilogue could take the map, its factors could not: leave it to the planner's local values.
        return False
    loads, evaluations = 0, 0
    for expr in programs(op):
        found = [i for i in expr.loads() if op.operands[expr.nodes[i].attr] == value]  # type: ignore[union-attr, index]
        loads += len(found)
        evaluations += len(found) * math.prod(expr.extents)
    volume = math.prod(producer.space)
    if uses[value] == 1 and loads == 1 and evaluations <= volume:
        return True
    # What is made of positions and single elements, such as a mask, is computed as fast as it is loaded.
    single = all(math.prod(values[v].shape) == 1 for v in producer.operands)
    return cost <= CHEAP and (single or evaluations <= 4 * volume)


def _narrows(producer: Nest) -> bool:
    node = producer.body.result()
    if node.op != "convert":
        return False
    return dtypes.itemsize(node.dtype) < dtypes.itemsize(producer.body.nodes[node.args[0]].dtype)


def is_view_of_factor(producer: Nest) -> bool:
    """Whether a contraction may read a map's operands in place of its result."""
    return work(producer.body) < VIEW and not _narrows(producer)


def has_factors(op: Nest) -> bool:
    """Whether both results of a contraction's body are factors its body can stream."""
    return all(factor(op.body, result) is not None for result in op.body.results)
