"""Local maps computed where they are read: on a GPU a barrier costs more than a few operations that idle threads do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jax_mpk.codegen.cuda.arrays import local_bytes
from jax_mpk.codegen.cuda.meetings import overlap
from jax_mpk.graph.fuse_maps import VIEW, has_factors, programs, too_large, work
from jax_mpk.graph.ir import Nest, Op, Update
from jax_mpk.graph.rewrite import Slots, inline_map, rewrite_loads
from jax_mpk.graph.scalar import Builder
from jax_mpk.plan.ir import Plan, Routine

#: Most often a task may compute an inlined map in one reader: about once per thread.
_EVALUATIONS = 512


def inline_members(plan: Plan, routine: Routine, boxes: np.ndarray) -> list[Op | None]:
    """The routine's operators with cheap local maps written out in their readers; None where nothing is left to do.

    Args:
      plan: the plan.
      routine: one of its routines.
      boxes: int64 [members, tasks, 2, rank].
    """
    ops: list[Op | None] = [plan.ops[m.op] for m in routine.members]
    local = set(routine.local_values)
    spans = local_bytes(plan, routine)
    written = {int(plan.value_storage[v]) for op in ops if op is not None for v in op.outputs if v not in local}
    for m in range(len(ops) - 1, -1, -1):
        op = ops[m]
        if not isinstance(op, Nest) or op.kind != "map" or not local.issuperset(op.outputs):
            continue
        sources = {int(plan.value_storage[v]) for v in op.operands if v not in local}
        if sources & written:
            continue
        readers = [k for k in range(m + 1, len(ops)) if _reads(ops[k], op.outputs)]
        # What it reads may not be there any more where its last reader is, or be overwritten by that one meanwhile.
        between = [later for later in ops[m + 1 : max(readers, default=m) + 1] if later is not None]
        overwritten = [spans[v] for later in between for v in later.outputs if v in local]
        if any(overlap(spans[v], place) for v in op.operands if v in local for place in overwritten):
            continue
        rewritten = {k: _inlined(op, ops[k], boxes[k]) for k in readers}
        if all(new is not None for new in rewritten.values()):
            for k, new in rewritten.items():
                ops[k] = new
            ops[m] = None
    return ops


def _reads(op: Op | None, values: Sequence[int]) -> bool:
    return op is not None and not set(values).isdisjoint(op.operands)


def _inlined(producer: Nest, reader: Op | None, box: np.ndarray) -> Op | None:
    """The reader with the producer's values computed in place, or None where that is too much work."""
    if not isinstance(reader, Nest | Update) or (isinstance(reader, Update) and reader.base in producer.outputs):
        return None
    cost = work(producer.body)
    for expr in programs(reader):
        loads = [i for i in expr.loads() if reader.operands[expr.nodes[i].attr] in producer.outputs]
        if not loads:
            continue
        is_body = isinstance(reader, Nest) and expr is reader.body
        if isinstance(reader, Nest) and reader.kind == "contract" and is_body:
            # Where a window lies is computed once; factors are not.
            if cost >= VIEW and not set(loads).issubset(expr.index_nodes):
                return None
            continue
        sizes = np.maximum(box[:, 1] - box[:, 0], 0)
        if isinstance(reader, Update):
            times = math.prod(reader.space)
        else:
            times = int(sizes[:, : len(reader.space)].prod(axis=1).max(initial=0))
            times *= math.prod(reader.rspace) if is_body else 1
        if times * len(loads) > _EVALUATIONS and cost >= VIEW:
            return None
    slots = Slots()

    def rule(builder: Builder, value: int, indices: list[int], dtype: str, pred: int | None) -> int | None:
        if value not in producer.outputs:
            return None
        return inline_map(builder, producer, value, indices, pred, slots, lambda *_: None)

    new = rewrite_loads(reader, rule, slots)
    if too_large(new, reader) or (isinstance(new, Nest) and new.kind == "contract" and not has_factors(new)):
        return None
    return new
