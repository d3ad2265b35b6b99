"""Storages, results and scratch: changes of where values lie."""

from __future__ import annotations

import random
from dataclasses import replace

from jax_mpk.graph.ir import Update
from jax_mpk.plan.ir import READ, LoopNode
from tests.plan.draft import Draft, Queues
from tests.plan.mutations.base import Outcome, Skip, breaking, nested, pick, redeclare, touching


@breaking
def _shrink_buffer(d: Draft, rng: random.Random) -> Outcome:
    used = set(d.value_storage) | {s for split in d.plan.splits for s in split.storages}
    at = pick(rng, [s for s in used if s >= 0 and d.storages[s].nbytes])
    storage = d.storages[at]
    d.storages[at] = replace(storage, nbytes=storage.nbytes - rng.randint(1, min(4, storage.nbytes)))
    return [], [], False


@breaking
def _shrink_workspace(d: Draft, rng: random.Random) -> Outcome:
    end = max([s.offset + s.nbytes for s in d.storages if s.kind == "workspace"], default=0)
    if end == 0:
        raise Skip
    d.changes["workspace_bytes"] = end - rng.randint(1, min(end, 16))
    return [], [], False


@breaking
def _early_reuse(d: Draft, rng: random.Random) -> Outcome:
    space = [i for i, s in enumerate(d.storages) if s.kind == "workspace" and s.nbytes]
    at = pick(rng, space)
    other = d.storages[pick(rng, set(space) - {at})]
    shift = rng.choice([0, 0, 16, -16])
    offset = min(max(other.offset + shift, 0), d.plan.workspace_bytes - d.storages[at].nbytes)
    if offset < 0:
        raise Skip
    d.storages[at] = replace(d.storages[at], offset=offset)
    early = [t for v, s in enumerate(d.value_storage) if s == at for t in touching(d, v)]
    return early, [], False


@breaking
def _share_storage(d: Draft, rng: random.Random) -> Outcome:
    def size(v: int) -> int:
        return d.storages[d.value_storage[v]].nbytes

    values = [v for v, s in enumerate(d.value_storage) if s >= 0 and touching(d, v)]
    v = pick(rng, [v for v in values if d.storages[d.value_storage[v]].kind == "workspace"])
    fits = [u for u in values if d.value_storage[u] != d.value_storage[v] and size(u) >= size(v)]
    d.value_storage[v] = d.value_storage[pick(rng, fits)]
    return touching(d, v), [], False


@breaking
def _late_predicate(d: Draft, rng: random.Random) -> Outcome:
    """The predicate of a loop shares bytes with what its body begins with."""
    loops = [item for item in nested(d.schedule) if isinstance(item.node, LoopNode) and item.node.predicate >= 0]
    item = pick(rng, loops)
    if not item.blocks[1] or not isinstance(item.blocks[1][0], Queues):
        raise Skip
    begin = [t for q in item.blocks[1][0].queues for t in q]
    values = {a[0] for t in begin for a in t.accesses if a[0] >= 0 and a[1] != READ}
    space = [v for v in sorted(values) if d.storages[d.value_storage[v]].kind == "workspace"]
    v = pick(rng, space)
    d.value_storage[item.node.predicate] = d.value_storage[v]
    return [t for t in begin if any(a[0] == v for a in t.accesses)], [], False


@breaking
def _steal_base(d: Draft, rng: random.Random) -> Outcome:
    """An update in place although its base is needed, or is an argument."""
    ops = [op for op in d.plan.ops if isinstance(op, Update)]
    op = pick(rng, [op for op in ops if d.value_storage[op.base] != d.value_storage[op.output]])
    if d.value_storage[op.base] < 0 or d.value_storage[op.output] < 0:
        raise Skip
    d.value_storage[op.output] = d.value_storage[op.base]
    redeclare(d)
    return touching(d, op.output), [], False


@breaking
def _wrong_alias(d: Draft, rng: random.Random) -> Outcome:
    graph = d.plan.graph
    at = pick(rng, [i for i, s in enumerate(d.storages) if s.kind == "output"])
    storage = d.storages[at]
    argument = pick(rng, set(range(-1, len(graph.inputs))) - {storage.argument})
    d.storages[at] = replace(storage, argument=argument)
    aliases = {k: v for k, v in d.plan.aliases.items() if k != storage.index}
    if argument >= 0:
        aliases[storage.index] = argument
        home = graph.inputs[argument]
        if rng.random() < 0.5:
            d.value_storage[home] = at
    d.changes["aliases"] = aliases
    return [], [], argument < 0 or argument not in graph.donated


@breaking
def _swap_results(d: Draft, rng: random.Random) -> Outcome:
    outputs = [i for i, s in enumerate(d.storages) if s.kind == "output"]
    a = pick(rng, outputs)
    b = pick(rng, set(outputs) - {a})
    for x, y in ((a, b), (b, a)):
        d.storages[x] = replace(d.storages[x], index=d.plan.storages[y].index)
    return [], [], True


@breaking
def _write_argument(d: Draft, rng: random.Random) -> Outcome:
    """A value computed by the plan lands in the buffer of an argument."""
    inputs = [i for i, s in enumerate(d.storages) if s.kind == "input"]
    at = pick(rng, inputs)
    values = [
        v
        for v, s in enumerate(d.value_storage)
        if s >= 0 and d.storages[s].kind == "workspace" and d.storages[s].nbytes <= d.storages[at].nbytes
    ]
    v = pick(rng, [v for v in values if touching(d, v)])
    d.value_storage[v] = at
    return touching(d, v), [], False


def _local(d: Draft, rng: random.Random, least: int) -> int:
    return int(pick(rng, [i for i, r in enumerate(d.routines) if len(r.local_values) >= least]))


@breaking
def _scratch_overlap(d: Draft, rng: random.Random) -> Outcome:
    number = _local(d, rng, 2)
    offsets = list(d.routines[number].local_offsets)
    a, b = rng.sample(range(len(offsets)), 2)
    offsets[a] = offsets[b]
    d.routines[number] = replace(d.routines[number], local_offsets=tuple(offsets))
    return [], [], False


@breaking
def _scratch_small(d: Draft, rng: random.Random) -> Outcome:
    number = _local(d, rng, 1)
    extents = [list(e) for e in d.routines[number].local_extents]
    one = pick(rng, [e for e in extents if e])
    axis = rng.randrange(len(one))
    one[axis] -= 1
    d.routines[number] = replace(d.routines[number], local_extents=tuple(map(tuple, extents)))
    return [], [], False
