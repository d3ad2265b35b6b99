"""Groups the operators of a straight-line stretch into routines.

Joining a producer into the routine of its readers trades repeated work for a hand-off: a norm that every contraction
task recomputes from the raw vector is no phase of its own; scores, softmax and weighted sum of one attention head run
in one task. Each join is decided by the cost model on the best cut with and without it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from jax_mpk.graph.fuse_maps import VIEW, work
from jax_mpk.graph.ir import Cumulative, Graph, Nest, Op, Sort, Update, reads
from jax_mpk.graph.moves import moved
from jax_mpk.plan import costs
from jax_mpk.plan.ir import Target
from jax_mpk.plan.tile import Cut, Tiler

#: A value read by more routines than this is stored, not recomputed.
_MOST_COPIES = 16
#: A routine of more operators takes no others in: each would cost the tiler a look at all of them.
_MOST_MEMBERS = 64
#: So many elements take a task longer than a hand-off if computed one by one, as reductions of no more elements are;
#: so many, if computed eight at a time.
_LABORIOUS, _FEW, _MANY = 8192, 32, 16384
#: Tasks repeat elements if they read each of them so often.
_REPEATED = 4


@dataclass
class _Group:
    """A routine being built.

    Attributes:
      members: positions of its operators, ascending.
      anchors: positions of those it exists for; their outputs are stored.
      stored: outputs of other members that are stored as well.
      first: position of the first member that others wait for; -1: not looked for yet.
    """

    members: list[int]
    anchors: list[int]
    stored: set[int] = field(default_factory=set)
    first: int = -1


@dataclass(frozen=True)
class Routine:
    """Operators computed together, with the best cut found.

    Attributes:
      ops: members in data-flow order.
      local: values that live in scratch; all other outputs are written to memory.
      cut: boxes and costs.
    """

    ops: tuple[Op, ...]
    local: tuple[int, ...]
    cut: Cut


class Clusterer:
    """Clusters one straight-line list of operators.

    Args:
      graph: the prepared graph.
      target: the device.
      tiler: finds cuts.
      pinned: values that need bytes of their own: results, values read by nested blocks or other stretches, values
        that share storage.
      share: per value, a name for the storage it lives in.

    Attributes:
      notes: why results of maps and reductions are handed over in memory, one sentence for each.
    """

    def __init__(self, graph: Graph, target: Target, tiler: Tiler, pinned: set[int], share: tuple[int, ...]):
        self.graph = graph
        self.target = target
        self.tiler = tiler
        self.pinned = pinned
        self.share = share
        self.notes: list[str] = []

    def run(self, ops: list[Op], after: list[set[int]]) -> list[Routine]:
        """Routines in an order that respects data flow.

        Args:
          ops: the stretch.
          after: per operator, positions that must come after it (readers, and writers of the same storage).
        """
        self.ops = ops
        read = [set(reads(op)) for op in ops]
        self.users = [{i for i in after[p] if not read[i].isdisjoint(op.outputs)} for p, op in enumerate(ops)]
        # Later operators that have to wait, whoever has computed what they read: they overwrite what this one reads, or
        # its bytes.
        shared_reads = [{self.share[v] for v in values} for values in read]
        shared_writes = [{self.share[v] for v in op.outputs} for op in ops]
        self.waiters = [
            {i for i in after[p] if i not in self.users[p] or not shared_writes[i].isdisjoint(shared_reads[p])}
            for p in range(len(ops))
        ]
        groups: dict[int, _Group] = {}  # by last anchor
        homes: dict[int, set[int]] = {}  # op → last anchors of the groups that hold it
        refused: dict[int, str] = {}  # last anchor → why it is in no reader's group
        for siblings in _siblings(ops, after):
            groups[siblings[-1]] = _Group(siblings, siblings)
            homes.update((i, {siblings[-1]}) for i in siblings)
        for position in range(len(ops) - 1, -1, -1):
            refused[position] = self._join(position, groups, homes)
        self._note(groups, homes, refused)
        order = _topological(self._edges(groups, homes))
        out = []
        for anchor in order:
            group = groups[anchor]
            cut = self.tiler.best(*_pick(ops, group))
            assert cut is not None, "a routine was joined without a cut"
            inner = [ops[i] for i in group.members if i not in group.anchors]
            local = tuple(v for op in inner for v in op.outputs if v not in group.stored)
            out.append(Routine(tuple(ops[i] for i in group.members), local, cut))
        return out

    def _note(self, groups: dict[int, _Group], homes: dict[int, set[int]], refused: dict[int, str]) -> None:
        """Notes on the routines that compute nothing heavy, and so might have been part of another."""
        for anchor, group in sorted(groups.items()):
            members = [self.ops[m] for m in group.members]
            if not all(isinstance(op, Nest | Cumulative) and not _is_contraction(op) for op in members):
                continue
            for member in group.anchors:
                users = sorted(user for user in self.users[member] if anchor not in homes[user])
                if users:
                    others = f" and {len(users) - 1} more" if len(users) > 1 else ""
                    self.notes.append(
                        f"not fused: {self.ops[member].source.short} into {self.ops[users[0]].source.short}{others}: "
                        f"{refused[anchor]}"
                    )

    def _join(self, position: int, groups: dict[int, _Group], homes: dict[int, set[int]]) -> str:
        """Moves an operator into the routines of its readers; "" or why none of them takes it."""
        op = self.ops[position]
        users = self.users[position]
        anchors = {a for user in users for a in homes[user]}
        own = groups.get(position)
        if not users or own is None:
            return ""
        if len(own.anchors) > 1:
            return "a task reduces the same value in several ways at once"
        if isinstance(op, Sort) and op.top_k is not None:
            return "a row has fewer results than elements"
        if self._is_laborious(op, anchors, groups):
            return "a hand-off is faster than computing so much of it in every task that reads it"
        private = not self.pinned.intersection(op.outputs) and not isinstance(op, Update)
        reasons: list[str] = []
        if len(anchors) > _MOST_COPIES:
            reasons.append(f"more than {_MOST_COPIES} routines read it")
        elif private:
            # Where the others wait for one of the readers anyway, it may as well hand this over, too.
            first = next((a for a in sorted(anchors) if anchors - {a} <= self._successors(a, groups, homes)), None)
            outputs = set(op.outputs)
            if first is not None and len(anchors) > 1:
                copied = self._gain(position, anchors, set(), groups)[0]
                handed = self._gain(position, {first}, outputs, groups)[0]
                if handed > copied and not self._try(position, {first}, outputs, groups, homes):
                    return ""
            reasons.append(self._try(position, anchors, set(), groups, homes))
            if not reasons[-1]:
                return ""
        # Computed by one routine of its readers, in memory for the others.
        for anchor in sorted(anchors):
            reasons.append(self._try(position, {anchor}, set(op.outputs), groups, homes))
            if not reasons[-1]:
                return ""
        return reasons[0]

    def _is_laborious(self, op: Op, anchors: set[int], groups: dict[int, _Group]) -> bool:
        """Whether tasks would repeat more of an operator than a hand-off takes: of a reduction of few elements or a map
        that moves some, which threads compute element by element, finding each of its operands' by itself; or, on a
        GPU, of any other map, whose arithmetic is not hidden behind what the task streams, though costs have it so.
        """
        if not isinstance(op, Nest) or op.kind == "contract" or len(op.outputs) != 1 or not op.operands:
            return False
        if math.prod(op.space) < _LABORIOUS or (op.kind != "map" and math.prod(op.rspace) > _FEW):
            return False
        repeated = self._most_repeated(op.outputs[0], anchors, groups)
        if repeated < _LABORIOUS:
            return False
        if op.kind != "map" or (repeated >= _MANY and self.target.arch != "cpu"):
            return True
        if len(op.operands) != 1 or op.body.result().op != "load":
            return False
        # Looks at every element, which most maps are spared.
        place = moved(op, self.graph.values[op.operands[0]].shape)
        return place is not None and bool(np.any(np.diff(place) < 0))

    def _most_repeated(self, v: int, anchors: set[int], groups: dict[int, _Group]) -> float:
        """Elements of a value that a task of its readers reads, where many read the same ones."""
        size = math.prod(self.graph.values[v].shape)
        most = 0.0
        for anchor in anchors:
            cut = self.tiler.best(*_pick(self.ops, groups[anchor]))
            assert cut is not None
            for touch in (touch for touches in cut.touches for touch in touches if touch.value == v):
                read = costs.volume(touch.lo, touch.hi)
                if read.sum() >= _REPEATED * size:
                    most = max(most, float(read.max(initial=0)))
        return most

    def _try(
        self,
        position: int,
        anchors: set[int],
        stored: set[int],
        groups: dict[int, _Group],
        homes: dict[int, set[int]],
    ) -> str:
        """Moves a routine into those of its readers named by ``anchors`` if that saves time; "" or why it did not."""
        own = groups[position]
        gain, trial = self._gain(position, anchors, stored, groups)
        if gain == -math.inf:
            return "no cut of its reader stores each element once" if stored else "no cut with it fits scratch memory"
        if gain < 0:
            return "a hand-off is faster than computing it in every task that reads it"
        before = {anchor: groups[anchor] for anchor in trial}, {m: homes[m] for m in own.members}
        del groups[position]
        groups.update(trial)
        for member in own.members:
            homes[member] = (homes[member] - {position}) | trial.keys()
        # Moving plain data flow into its readers cannot close a cycle; stored outputs and anti-dependences can.
        risky = any(group.stored for group in trial.values()) or any(self.waiters[m] for m in own.members)
        if risky and not self._acyclic(groups, homes, trial):
            groups.update(before[0])
            groups[position] = own
            homes.update(before[1])
            return "what reads it would wait for itself"
        return ""

    def _gain(
        self, position: int, anchors: set[int], stored: set[int], groups: dict[int, _Group]
    ) -> tuple[float, dict[int, _Group]]:
        """Seconds that moving a routine into others saves, negative where it must not be moved; the others with it."""
        own = groups[position]
        trial: dict[int, _Group] = {}
        if own.stored and len(anchors) > 1:
            return -math.inf, trial  # what it stores must be stored once
        gain = self.tiler.seconds(*_pick(self.ops, own)) + costs.handoff_seconds(self.target)
        for anchor in anchors:
            group = groups[anchor]
            members = sorted({*group.members, *own.members})
            if len(members) > _MOST_MEMBERS:
                return -math.inf, trial
            merged = _Group(members, group.anchors, group.stored | own.stored | stored)
            gain -= self.tiler.seconds(*_pick(self.ops, merged)) - self.tiler.seconds(*_pick(self.ops, group))
            if gain < 0:
                return gain, trial
            trial[anchor] = merged
        return gain, trial

    def _provides(self, group: _Group, member: int) -> bool:
        """Whether a routine writes what a member computes to memory."""
        return member in group.anchors or not group.stored.isdisjoint(self.ops[member].outputs)

    def _successors(self, anchor: int, groups: dict[int, _Group], homes: dict[int, set[int]]) -> set[int]:
        """Anchors of the routines that must come after a routine."""
        group = groups[anchor]
        out: set[int] = set()
        for member in group.members:
            for later in self.waiters[member]:
                out |= homes[later]
            if self._provides(group, member):
                # A routine with a copy of its own of the producer needs nothing from this one.
                for later in self.users[member]:
                    out |= homes[later] - homes[member]
        return out - {anchor}

    def _edges(self, groups: dict[int, _Group], homes: dict[int, set[int]]) -> dict[int, set[int]]:
        """Per routine, those it must come after."""
        waits: dict[int, set[int]] = {anchor: set() for anchor in groups}
        for anchor in groups:
            for later in self._successors(anchor, groups, homes):
                waits[later].add(anchor)
        return waits

    def _acyclic(self, groups: dict[int, _Group], homes: dict[int, set[int]], starts: Iterable[int]) -> bool:
        """Whether no routine of ``starts`` comes after itself."""
        for start in starts:
            # Dependences lead to later operators: a routine whose first one lies behind all that can lead back to
            # ``start`` is not on a cycle.
            limit = max(groups[start].members)
            near = {start}
            while True:
                more = {a for a, g in groups.items() if a not in near and self._first(g) < limit}
                if not more:
                    break
                near |= more
                limit = max(limit, *(max(groups[a].members) for a in more))
            seen: set[int] = set()
            stack = [start]
            while stack:
                for later in self._successors(stack.pop(), groups, homes):
                    if later == start:
                        return False
                    if later in near and later not in seen:
                        seen.add(later)
                        stack.append(later)
        return True

    def _first(self, group: _Group) -> int:
        """Position of a routine's first operator that others wait for."""
        if group.first < 0:
            leads = (m for m in group.members if self.waiters[m] or self._provides(group, m))
            group.first = next(leads, group.members[-1])
        return group.first


def _is_contraction(op: Op) -> bool:
    return isinstance(op, Nest) and op.kind == "contract"


def _pick(ops: list[Op], group: _Group) -> tuple[tuple[Op, ...], tuple[int, ...], frozenset[int]]:
    """A group as the tiler wants it."""
    anchors = tuple(group.members.index(a) for a in group.anchors)
    return tuple(ops[i] for i in group.members), anchors, frozenset(group.stored)


def _siblings(ops: list[Op], after: list[set[int]]) -> list[list[int]]:
    """Reductions of one value over the same axes that do not depend on each other; all others alone.

    Q, K and V of one normalised row share a routine, and so do the sum and the weighted sum of one softmax: its tasks
    then compute what precedes them once, not once each.
    """
    families: dict[object, list[list[int]]] = {}
    out: list[list[int]] = []
    reach: dict[int, set[int]] = {}
    made = {v: op for op in ops for v in op.outputs}
    for position, op in enumerate(ops):
        keys = _common_values(op, made)
        candidates = (family for key in keys for family in families.get(key, []))
        family = next((f for f in candidates if all(position not in _reach(after, i, reach) for i in f)), None)
        if family is None:
            family = []
            out.append(family)
        family.append(position)
        for key in keys:
            known = families.setdefault(key, [])
            if family not in known:
                known.append(family)
    return out


def _common_values(op: Op, made: dict[int, Op]) -> list[object]:
    """What siblings have in common: an operand computed in this stretch, and the axes it is reduced over."""
    if not isinstance(op, Nest) or op.kind == "map":
        return []
    found: dict[int, None] = {}
    for i in op.body.loads():
        v = op.operands[op.body.nodes[i].attr]
        if v in made:
            found[v] = None
            maker = made[v]
            if isinstance(maker, Nest) and maker.kind == "map" and work(maker.body) < VIEW:  # a rounded copy, say
                found.update((source, None) for source in maker.operands if source in made)
    return [(v, op.rspace) for v in found]


def _reach(after: list[set[int]], start: int, memo: dict[int, set[int]]) -> set[int]:
    """Positions after ``start`` in the stretch, directly or not."""
    if start not in memo:
        seen: set[int] = set()
        stack = [start]
        while stack:
            for later in after[stack.pop()] - seen:
                seen.add(later)
                stack.append(later)
        memo[start] = seen
    return memo[start]


def _topological(waits: dict[int, set[int]]) -> list[int]:
    """Anchors, every routine after those it waits for; otherwise in program order."""
    users: dict[int, list[int]] = {anchor: [] for anchor in waits}
    for other, needs in waits.items():
        for need in needs:
            users[need].append(other)
    missing = {anchor: len(needs) for anchor, needs in waits.items()}
    ready = [anchor for anchor, count in missing.items() if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        anchor = heapq.heappop(ready)
        order.append(anchor)
        for other in users[anchor]:
            missing[other] -= 1
            if missing[other] == 0:
                heapq.heappush(ready, other)
    assert len(order) == len(waits), "routines depend on each other in a cycle"
    return order
