"""Decides which values share storage and makes every copy that sharing needs an explicit operator.

Sharing is what makes a KV cache update in place: an Update writes into its base, a loop's next carry into the
carry, a result into the donated argument it came from. Two values may share only if every reader of the old one can
run before the writer of the new one; the anti-dependences this creates are found later like any other, from regions
of the shared storage. Where sharing is impossible a copy is inserted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from heapq import heappop, heappush

from jax_mpk.graph.ir import Block, Branch, Graph, Loop, Nest, Op, Source, Update, Value, reads, walk
from jax_mpk.graph.rewrite import use_counts
from jax_mpk.graph.scalar import Builder
from jax_mpk.graph.windows import own_index


@dataclass(frozen=True)
class Prepared:
    """A graph ready for placing.

    Attributes:
      graph: the graph, copies included, operators in an order that respects data flow and the anti-dependences of
        sharing.
      share: for every value, the representative of the storage it lives in.
      aliases: result number → donated argument number that shares its storage.
    """

    graph: Graph
    share: tuple[int, ...]
    aliases: dict[int, int]


class _Sharing:
    """Union-find over values."""

    def __init__(self, count: int):
        self.parent = list(range(count))

    def grow(self) -> None:
        self.parent.append(len(self.parent))

    def find(self, v: int) -> int:
        while self.parent[v] != v:
            self.parent[v] = self.parent[self.parent[v]]
            v = self.parent[v]
        return v

    def join(self, a: int, b: int) -> None:
        self.parent[self.find(b)] = self.find(a)


def prepare(graph: Graph) -> Prepared:
    """Makes copies explicit and decides storage sharing."""
    while True:
        prepared = _Preparer(graph).run()
        wasted = _overwritten_donors(prepared) - set(prepared.aliases.values())
        if not wasted:
            return prepared
        # Such an argument would be overwritten although no result takes its buffer: leave it alone.
        graph = replace(graph, donated=graph.donated - wasted)


def _overwritten_donors(prepared: Prepared) -> set[int]:
    """Donated arguments whose storage some operator writes."""
    written = {prepared.share[v] for op in walk(prepared.graph.block) for v in op.outputs}
    inputs = prepared.graph.inputs
    return {i for i in prepared.graph.donated if prepared.share[inputs[i]] in written}


class _Preparer:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.values: list[Value] = list(graph.values)
        self.sharing = _Sharing(len(self.values))
        self.inputs = set(graph.inputs)
        self.donated = {graph.inputs[i] for i in graph.donated}
        # Values whose storage an operator of some block may overwrite once its other readers are done.
        self.overwritten: set[int] = set()

    def run(self) -> Prepared:
        block = self._block(self.graph.block, params=self.donated)
        block, aliases = self._results(block)
        graph = replace(self.graph, values=tuple(self.values), block=block)
        share = tuple(self.sharing.find(v) for v in range(len(self.values)))
        return Prepared(graph, share, aliases)

    # -- copies ------------------------------------------------------------------------------------------------

    def _copy(self, value: int, why: str) -> Nest:
        old = self.values[value]
        new = replace(old, id=len(self.values))
        self.values.append(new)
        self.sharing.grow()
        builder = Builder(old.shape)
        body = builder.build(builder.load(0, builder.coords(), old.dtype))
        return Nest("map", old.shape, (), (value,), (new.id,), body, source=Source(why))

    def _results(self, block: Block) -> tuple[Block, dict[int, int]]:
        """Gives every result of the function bytes of its own, or those of a donated argument."""
        ops = list(block.ops)
        results: list[int] = []
        aliases: dict[int, int] = {}
        donors = {self.sharing.find(v): self.graph.inputs.index(v) for v in self.donated}
        written = {self.sharing.find(v) for op in ops for v in op.outputs}
        taken: set[int] = set()
        for number, value in enumerate(block.results):
            home = self.sharing.find(value)
            donor = donors.get(home)
            mine = donor is not None or value not in self.inputs
            if home in taken or not mine or (value in self.inputs and home in written):
                copy = self._copy(value, "copy of a result")
                ops.append(copy)
                value = copy.outputs[0]
            elif donor is not None:
                aliases[number] = donor
            taken.add(self.sharing.find(value))
            results.append(value)
        return Block(tuple(ops), tuple(results)), aliases

    # -- blocks ------------------------------------------------------------------------------------------------

    def _block(self, block: Block, params: set[int]) -> Block:
        """Prepares a block. ``params``: values from outside whose storage this block may overwrite."""
        uses = use_counts(block)
        own = set(params)
        for op in block.ops:
            own.update(op.outputs)
        before: dict[int, set[int]] = {}  # op position → positions that must come first
        users, readers = _users(block), _readers(block)
        keep = set(block.results)  # must still hold their contents when the block ends
        homes = {self.sharing.find(p) for p in params}
        ops: list[Op] = list(block.ops)
        extra: dict[int, list[Nest]] = {}
        for position, op in enumerate(block.ops):
            if isinstance(op, Loop):
                copies, ops[position] = self._loop(op, uses, own, keep)
                extra[position] = copies
            elif isinstance(op, Branch):
                ops[position] = self._branch(op)
            else:
                base = self._overwrites(block, position, op, own - keep, homes, users, readers)
                if base is not None:
                    before[position] = set(readers.get(base, ())) - {position}
                    for reader in before[position]:
                        users[reader].add(position)
                    self.sharing.join(base, op.outputs[0])
                    self.overwritten.add(base)
        return _ordered(Block(tuple(ops), block.results), before, extra)

    def _overwrites(
        self,
        block: Block,
        position: int,
        op: Op,
        own: set[int],
        homes: set[int],
        users: list[set[int]],
        readers: dict[int, list[int]],
    ) -> int | None:
        """The value whose storage ``op`` can take over for its output, or None."""
        for base in _candidates(op):
            old, new = self.values[base], self.values[op.outputs[0]]
            if (old.shape, old.dtype) != (new.shape, new.dtype) or base not in own or base in self.overwritten:
                continue
            if not isinstance(op, Update) and self.sharing.find(base) not in homes:
                continue  # sharing saves a map nothing but memory unless it avoids a copy later
            if base in self.donated and not self._reaches_result(block, op.outputs[0], readers):
                continue
            others = [i for i in readers.get(base, ()) if i != position]
            later = _reachable(users, position)
            if any(i in later or (isinstance(block.ops[i], Loop | Branch) and i > position) for i in others):
                continue
            return base
        return None

    def _reaches_result(self, block: Block, value: int, readers: dict[int, list[int]]) -> bool:
        """Whether a chain of in-place operators leads from ``value`` to a result of the function."""
        if value in block.results:
            return True
        shape = self.values[value].shape
        for op in (block.ops[i] for i in readers.get(value, ())):
            if value in _candidates(op) and self.values[op.outputs[0]].shape == shape:
                return self._reaches_result(block, op.outputs[0], readers)
            if isinstance(op, Loop) and value in op.inits:
                return op.outputs[op.inits.index(value)] in block.results
        return False

    def _loop(self, op: Loop, uses: Counter[int], own: set[int], keep: set[int]) -> tuple[list[Nest], Loop]:
        copies: list[Nest] = []
        inits = list(op.inits)
        captured = set(reads(replace(op, inits=())))
        for k, init in enumerate(inits):
            fresh = init in own - keep - captured - self.overwritten and uses[init] == 1
            if init in self.donated and op.outputs[k] not in self.graph.results:
                fresh = False
            if not fresh or inits.count(init) > 1:
                copy = self._copy(init, "copy into a loop's carry")
                copies.append(copy)
                inits[k] = init = copy.outputs[0]
            else:
                self.overwritten.add(init)
            for value in (op.params[k], op.outputs[k]):
                self.sharing.join(init, value)
        body = self._block(op.body, set(op.params))
        ops = list(body.ops)
        results = list(body.results)
        moved = self._parallel_copies(op, ops, results)
        cond = None if op.cond is None else self._cond(op.cond)
        body = Block((*ops, *moved), tuple(results))
        return copies, replace(op, inits=tuple(inits), body=body, cond=cond)

    def _cond(self, block: Block) -> Block:
        """A condition whose result no round overwrites while some worker has yet to read it."""
        block = self._block(block, set())
        (predicate,) = block.results
        if any(predicate in op.outputs for op in block.ops):
            return block
        copy = self._copy(predicate, "copy of a loop's condition")
        return Block((*block.ops, copy), copy.outputs)

    def _parallel_copies(self, op: Loop, ops: list[Op], results: list[int]) -> list[Nest]:
        """Copies that bring a round's results into the carry's storage, safe for permuted carries."""
        early: list[Nest] = []
        late: list[Nest] = []
        params = {self.sharing.find(p) for p in op.params}
        inside = {v for inner in ops for v in inner.outputs}
        for k, value in enumerate(results):
            param = op.params[k]
            if value == param or self.sharing.find(value) == self.sharing.find(param):
                continue
            producer_only = value in inside and self.sharing.find(value) not in params
            if not producer_only and self.sharing.find(value) in params:
                copy = self._copy(value, "copy of a loop's carry")
                early.append(copy)
                value = copy.outputs[0]
            copy = self._copy(value, "copy into a loop's carry")
            late.append(copy)
            results[k] = copy.outputs[0]
            self.sharing.join(param, results[k])
        return early + late

    def _branch(self, op: Branch) -> Branch:
        arms = []
        for arm in op.arms:
            block = self._block(arm, set())
            ops = list(block.ops)
            results = list(block.results)
            inside = {v for inner in ops for v in inner.outputs}
            seen: set[int] = set()
            for k, value in enumerate(results):
                home = self.sharing.find(value)
                if value not in inside or home in seen or home in map(self.sharing.find, op.outputs):
                    copy = self._copy(value, "copy of a branch's result")
                    ops.append(copy)
                    results[k] = value = copy.outputs[0]
                seen.add(self.sharing.find(value))
            for k, value in enumerate(results):
                self.sharing.join(op.outputs[k], value)
            arms.append(Block(tuple(ops), tuple(results)))
        return replace(op, arms=tuple(arms))


def _candidates(op: Op) -> list[int]:
    """Values whose storage an operator could overwrite: its base, or maps' operands read only at their own index."""
    if isinstance(op, Update):
        return [] if op.base in op.operands else [op.base]
    if not isinstance(op, Nest) or op.kind != "map" or len(op.outputs) != 1:
        return []
    return own_index(op)


def _readers(block: Block) -> dict[int, list[int]]:
    """Per value, the positions of the operators of a block that read it."""
    out: dict[int, list[int]] = {}
    for position, op in enumerate(block.ops):
        for value in reads(op):
            out.setdefault(value, []).append(position)
    return out


def _users(block: Block) -> list[set[int]]:
    """For every operator of a block, the positions of the operators that read its outputs."""
    producers: dict[int, int] = {}
    users: list[set[int]] = [set() for _ in block.ops]
    for position, op in enumerate(block.ops):
        for value in reads(op):
            if value in producers:
                users[producers[value]].add(position)
        producers.update(dict.fromkeys(op.outputs, position))
    return users


def _reachable(users: list[set[int]], start: int) -> set[int]:
    """Positions that come after ``start``, by data flow or by an anti-dependence already decided."""
    seen: set[int] = set()
    stack = [start]
    while stack:
        for user in users[stack.pop()] - seen:
            seen.add(user)
            stack.append(user)
    return seen


def _ordered(block: Block, before: dict[int, set[int]], extra: dict[int, list[Nest]]) -> Block:
    """Operators in data-flow order, readers of a value before the operator that overwrites it."""
    producers = {v: position for position, op in enumerate(block.ops) for v in op.outputs}
    waits: list[set[int]] = []
    for position, op in enumerate(block.ops):
        needs = {producers[v] for v in reads(op) if v in producers}
        needs |= {producers[c.operands[0]] for c in extra.get(position, ()) if c.operands[0] in producers}
        waits.append((needs | before.get(position, set())) - {position})
    order = TopologicalSorter(dict(enumerate(waits)))
    order.prepare()
    ready: list[int] = []
    ops: list[Op] = []
    while order.is_active():
        for position in order.get_ready():
            heappush(ready, position)
        position = heappop(ready)
        ops.extend(extra.get(position, ()))
        ops.append(block.ops[position])
        order.done(position)
    return Block(tuple(ops), block.results)
