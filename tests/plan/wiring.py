"""Copies that loops, branches and results need, as operators, and which values then have the same bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jax_mpk.graph.ir import Block, Branch, Graph, Loop, Nest, Op, Source, Update, reads
from jax_mpk.graph.scalar import Builder

Control = Loop | Branch


@dataclass(frozen=True)
class Wired:
    """A graph with explicit copies.

    Attributes:
      graph: the graph.
      home: per value, a value that stands for all that have the same bytes.
      aliases: result number → argument number.
    """

    graph: Graph
    home: tuple[int, ...]
    aliases: dict[int, int]


class _Wiring:
    def __init__(self, graph: Graph, in_place: bool):
        self.graph = graph
        self.in_place = in_place
        self.values = list(graph.values)
        self.parent = list(range(len(self.values)))
        self.inputs = {v: i for i, v in enumerate(graph.inputs)}
        self.aliases: dict[int, int] = {}

    def find(self, v: int) -> int:
        while self.parent[v] != v:
            v = self.parent[v]
        return v

    def join(self, a: int, b: int) -> None:
        self.parent[self.find(b)] = self.find(a)

    def alone(self, v: int) -> bool:
        home = self.find(v)
        return sum(self.find(u) == home for u in range(len(self.values))) == 1

    def copy(self, v: int, ops: list[Op]) -> int:
        old = self.values[v]
        new = replace(old, id=len(self.values))
        self.values.append(new)
        self.parent.append(new.id)
        b = Builder(old.shape)
        body = b.build(b.load(0, b.coords(), old.dtype))
        ops.append(Nest("map", old.shape, (), (v,), (new.id,), body, source=Source("copy")))
        return new.id

    def block(self, block: Block, mine: set[int]) -> Block:
        """A block with its nested blocks wired; ``mine``: outer values whose bytes it may overwrite."""
        ops: list[Op] = []
        own = set(mine)
        for at, op in enumerate(block.ops):
            if isinstance(op, Loop):
                op = self.loop(op, ops)
            elif isinstance(op, Branch):
                op = self.branch(op)
            elif isinstance(op, Update) and self.in_place and op.base in own:
                later = any(op.base in reads(other) for other in block.ops[at + 1 :])
                if not later and op.base not in block.results and op.base not in op.operands:
                    self.join(op.base, op.output)
            if not isinstance(op, Control):
                own.update(op.outputs)
            ops.append(op)
        return Block(tuple(ops), block.results)

    def loop(self, op: Loop, before: list[Op]) -> Loop:
        inits = []
        for k, init in enumerate(op.inits):
            inits.append(self.copy(init, before))
            for v in (op.params[k], op.outputs[k]):
                self.join(inits[k], v)
        body = self.block(op.body, set(op.params))
        ops, results = list(body.ops), list(body.results)
        moved = [k for k, r in enumerate(results) if self.find(r) != self.find(op.params[k])]
        # All results are taken aside before any carry is overwritten: carries may be permuted.
        aside = {k: self.copy(results[k], ops) for k in moved}
        for k in moved:
            results[k] = self.copy(aside[k], ops)
            self.join(op.params[k], results[k])
        cond = op.cond
        if cond is not None:
            cond = self.block(cond, set())
            late = list(cond.ops)
            cond = Block((), (self.copy(cond.results[0], late),))
            cond = Block(tuple(late), cond.results)
        return replace(op, inits=tuple(inits), body=Block(tuple(ops), tuple(results)), cond=cond)

    def branch(self, op: Branch) -> Branch:
        arms = []
        for arm in op.arms:
            arm = self.block(arm, set())
            ops, results = list(arm.ops), []
            for k, v in enumerate(arm.results):
                results.append(self.copy(v, ops))
                self.join(op.outputs[k], results[k])
            arms.append(Block(tuple(ops), tuple(results)))
        return replace(op, arms=tuple(arms))

    def run(self) -> Wired:
        graph = self.graph
        donated = {graph.inputs[i] for i in graph.donated}
        # A donated argument may be updated in place where the update is the only thing that becomes of it.
        mine = {
            v
            for v in donated
            if sum(isinstance(op, Update) and op.base == v for op in graph.block.ops) == 1
            and any(
                isinstance(op, Update) and op.base == v and graph.results.count(op.output) == 1
                for op in graph.block.ops
            )
        }
        block = self.block(graph.block, mine)
        ops, results = list(block.ops), []
        produced = {v for op in ops if not isinstance(op, Control) for v in op.outputs}
        for number, v in enumerate(block.results):
            argument = next((i for x, i in self.inputs.items() if self.find(x) == self.find(v)), -1)
            if argument >= 0 and v not in self.inputs:
                self.aliases[number] = argument
                results.append(v)
            elif v in produced and self.alone(v) and block.results.count(v) == 1:
                results.append(v)
            else:
                results.append(self.copy(v, ops))
        graph = replace(graph, values=tuple(self.values), block=Block(tuple(ops), tuple(results)))
        return Wired(graph, tuple(map(self.find, range(len(self.values)))), self.aliases)


def explicit(graph: Graph, *, in_place: bool = True) -> Wired:
    """Makes the copies that loops, branches and results need into operators."""
    return _Wiring(graph, in_place).run()
