"""From scalar programs to code of the vector VM: levels, element offsets, registers.

Loops run over the axes of a box in a chosen order. A value's *level* is the number of outer loops it depends on;
instructions sorted by level can be run again from the level of the loop that has stepped, and whatever does not depend
on the lanes is computed once for all of them. Index arithmetic that is linear in the coordinates disappears into the
strides of loads; the rest becomes an offset register.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jax_mpk.codegen.ir import Access, Code, Instruction
from jax_mpk.graph import dtypes
from jax_mpk.graph.dtypes import INDEX
from jax_mpk.graph.scalar import COMPARE, Expr, Node

#: An array as code sees it: element type and elements per step along each axis.
Layout = tuple[str, tuple[int, ...]]
#: Sum of coefficient × node, and a constant.
Linear = tuple[dict[int, int], int]

_HALF = ("f16", "bf16")


@dataclass
class Value:
    """An instruction's result before it has a register.

    Attributes:
      symbol: operation; "acc" and "arg" stand for registers that exist anyway.
      args: values read lane by lane.
      dtype: element type.
      immediate: see :class:`~jax_mpk.codegen.ir.Instruction`; for loads and stores the position of the access.
      level: number of outer loops it depends on, or one of the phases behind them.
      into: value whose register receives the result, or -1.
    """

    symbol: str
    args: tuple[int, ...]
    dtype: str
    immediate: int
    level: int
    into: int = -1


class Compiler:
    """Collects the values of one code.

    Args:
      order: axis of each loop, outermost first.
      operands, outputs: layouts of the arrays, in the order of their slots.
      tiles: element types of accumulator tiles.
    """

    def __init__(
        self,
        order: Sequence[int],
        operands: Sequence[Layout] = (),
        outputs: Sequence[Layout] = (),
        tiles: Sequence[str] = (),
    ):
        self.order = tuple(order)
        self.rank = len(self.order)
        self.loop = {axis: p for p, axis in enumerate(self.order)}
        self.operands = tuple(operands)
        self.outputs = tuple(outputs)
        self.tiles = tuple(tiles)
        self.values: list[Value] = []
        self.accesses: list[Access] = []  # offset and predicate name values until registers exist
        self.results: list[int] = []
        self.accumulators: list[int] = []
        self.kept: set[int] = set()
        self._memo: dict[object, int] = {}

    # -- values ------------------------------------------------------------------------------------------------

    def emit(self, symbol: str, args: Sequence[int], dtype: str, immediate: int = 0, *, level: int = 0) -> int:
        """The value of an operation, at the deepest level of its arguments and ``level``."""
        level = level if level else max((self.values[a].level for a in args), default=0)
        key = (symbol, tuple(args), dtype, immediate, level)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = len(self.values)
            self.values.append(Value(symbol, tuple(args), dtype, immediate, level))
        return found

    def const(self, bits: int, dtype: str) -> int:
        return self.emit(f"const.{dtype}", (), dtype, _signed(bits))

    def coord(self, axis: int) -> int:
        p = self.loop[axis]
        return self.emit(f"coord.{INDEX}", (), INDEX, p, level=p + 1)

    def move(self, value: int, level: int) -> int:
        """A copy in a register of its own, made at ``level``."""
        dtype = self.values[value].dtype
        self.values.append(Value(f"move.{dtype}", (value,), dtype, 0, level))
        return len(self.values) - 1

    def access(self, access: Access) -> int:
        key = ("access", access)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = len(self.accesses)
            self.accesses.append(access)
        return found

    def accumulator(self, dtype: str) -> int:
        """A register that combining and the epilogue share; its value belongs to the combine phase."""
        self.values.append(Value("acc", (), dtype, 0, self.rank + 1))
        self.accumulators.append(len(self.values) - 1)
        return len(self.values) - 1

    def later(self, value: int, level: int) -> int:
        """``value`` as seen by a phase: what depends on it belongs there."""
        self.values.append(Value("arg", (), self.values[value].dtype, 0, level, into=value))
        return len(self.values) - 1

    def alias(self, value: int, dtype: str) -> int:
        """The bits of ``value`` as another type."""
        key = ("alias", value, dtype)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = self.later(value, self.values[value].level)
            self.values[found].dtype = dtype
        return found

    # -- expressions -------------------------------------------------------------------------------------------

    def lower(self, expr: Expr, roots: Sequence[int], leaf: Callable[[Node], int] | None = None) -> Lowered:
        """Emits the nodes ``roots`` of a program; ``leaf`` gives the values of its ``acc`` and ``arg`` nodes."""
        lowered = Lowered(self, expr, leaf)
        for root in roots:
            lowered.value(root)
        return lowered

    def store(self, output: int, value: int, strides: Sequence[int], level: int | None = None) -> None:
        """Stores a value at the current coordinates, rounding f32 on the way to f16 or bf16."""
        memory = self.outputs[output][0]
        found = self.values[value]
        if found.symbol == f"convert.f32.{memory}" and memory in _HALF:
            value = found.args[0]
        dtype = self.values[value].dtype
        slot = len(self.operands) + output
        access = self.access(Access(slot, 0, tuple(strides)))
        level = self.rank if level is None else level
        self.values.append(Value(f"store.{memory}.{dtype}", (value,), memory, access, level))

    # -- the finished code -------------------------------------------------------------------------------------

    def build(self) -> Code:
        """Sorts by level, drops what nobody needs and assigns registers."""
        live = self._live()
        sequence = sorted((v for v in live if self.values[v].symbol not in ("acc", "arg")), key=self._level)
        registers = _Allocator(self, sequence).run()
        use_level = [0] * len(self.values)
        for v in sequence:
            for a in self.values[v].args:
                a = self._real(a)
                use_level[a] = max(use_level[a], self.values[v].level)
        for v in self.results:
            use_level[self._real(v)] = self.rank + 2
        instructions = []
        used = sorted({self.values[v].immediate for v in sequence if _is_memory(self.values[v])} | self._stepped())
        position = {access: i for i, access in enumerate(used)}
        for v in sequence:
            value = self.values[v]
            immediate = position[value.immediate] if _is_memory(value) else value.immediate
            out = 0 if value.symbol.startswith("store.") else registers[v]
            args = tuple(registers[self._real(a)] for a in value.args)
            instructions.append(Instruction(value.symbol, out, args, immediate, use_level[v]))
        levels = [self.values[v].level for v in sequence]
        begin = tuple(int(i) for i in np.searchsorted(levels, np.arange(self.rank + 3))) + (len(sequence),)

        def named(value: int) -> tuple[int, int]:
            return (-1, 0) if value < 0 else (registers[self._real(value)], self.values[value].level)

        accesses = []
        for i in used:
            access = self.accesses[i]
            offset, predicate = named(access.offset[0]), named(access.predicate[0])
            accesses.append(
                Access(access.slot, access.constant, access.strides, offset, predicate, access.stepped_only)
            )
        self.registers = registers
        self.access_position = position
        return Code(
            order=self.order,
            lane_bytes=registers.size,
            arrays=len(self.operands) + len(self.outputs),
            accesses=tuple(accesses),
            instructions=tuple(instructions),
            begin=begin,
            results=tuple((registers[self._real(v)], self.values[v].dtype) for v in self.results),
            accumulators=tuple((registers[v], self.values[v].dtype) for v in self.accumulators),
        )

    def _level(self, v: int) -> int:
        return self.values[v].level

    def _real(self, v: int) -> int:
        """The value whose register ``v`` is."""
        while self.values[v].symbol == "arg":
            v = self.values[v].into
        return v

    def _stepped(self) -> set[int]:
        return {i for i, access in enumerate(self.accesses) if access.stepped_only}

    def reads(self, v: int) -> list[int]:
        """Values an instruction needs, those of its access included."""
        value = self.values[v]
        out = list(value.args)
        if _is_memory(value):
            access = self.accesses[value.immediate]
            out += [a for a in (access.offset[0], access.predicate[0]) if a >= 0]
        if value.into >= 0:
            out.append(value.into)
        return [self._real(a) for a in out]

    def _live(self) -> list[int]:
        needed = [False] * len(self.values)
        stack = [v for v, value in enumerate(self.values) if value.symbol.startswith("store.")]
        stack += [v for v, value in enumerate(self.values) if value.into >= 0 and value.symbol != "arg"]
        stack += [*(self._real(r) for r in self.results), *(self._real(k) for k in self.kept), *self.accumulators]
        while stack:
            v = stack.pop()
            if not needed[v]:
                needed[v] = True
                stack.extend(self.reads(v))
        return [v for v, need in enumerate(needed) if need]


class Lowered:
    """One program on its way into a :class:`Compiler`: values of its nodes, linear forms of its indices."""

    def __init__(self, compiler: Compiler, expr: Expr, leaf: Callable[[Node], int] | None):
        self.compiler = compiler
        self.expr = expr
        self.leaf = leaf
        self._values: dict[int, int] = {}
        self._linear: dict[int, Linear] = {}

    def value(self, root: int) -> int:
        """The value of a node; its arguments are emitted just before it."""
        stack = [root]
        while stack:
            i = stack[-1]
            if i in self._values:
                stack.pop()
                continue
            missing = [a for a in self._children(i) if a not in self._values]
            if missing:
                stack.extend(reversed(missing))
            else:
                self._values[i] = self._emit(i)
                stack.pop()
        return self._values[root]

    def linear(self, i: int) -> Linear:
        """An index as a sum of coefficient × node (coordinates among them) plus a constant."""
        stack = [i]
        while stack:
            at = stack[-1]
            if at in self._linear:
                stack.pop()
                continue
            node = self.expr.nodes[at]
            args = node.args if node.dtype == INDEX and node.op in ("add", "sub", "mul") else ()
            missing = [a for a in args if a not in self._linear]
            if missing:
                stack.extend(missing)
                continue
            self._linear[at] = self._combine(at, node, [self._linear[a] for a in args])
            stack.pop()
        return self._linear[i]

    def _combine(self, i: int, node: Node, args: list[Linear]) -> Linear:
        if node.op == "const" and node.dtype == INDEX:
            return {}, int(dtypes.from_bits(node.attr, node.dtype))
        if not args:
            return {i: 1}, 0
        (ta, ca), (tb, cb) = args
        if node.op == "mul":
            if ta and tb:
                return {i: 1}, 0
            terms, constant, scale = (ta, ca, cb) if ta else (tb, cb, ca)
            return {a: c * scale for a, c in terms.items() if c * scale}, constant * scale
        sign = 1 if node.op == "add" else -1
        out = dict(ta)
        for atom, c in tb.items():
            out[atom] = out.get(atom, 0) + sign * c
        return {a: c for a, c in out.items() if c}, ca + sign * cb

    def offset(self, slot: int, indices: Sequence[int]) -> tuple[int, dict[int, int], dict[int, int]]:
        """Element offset of an operand: constant, axis → stride, node → coefficient of what is left."""
        constant = 0
        strides: dict[int, int] = {}
        atoms: dict[int, int] = {}
        for index, stride in zip(indices, self.compiler.operands[slot][1], strict=True):
            terms, c = self.linear(index)
            constant += stride * c
            for atom, coefficient in terms.items():
                node = self.expr.nodes[atom]
                into, key = (strides, node.attr) if node.op == "coord" else (atoms, atom)
                into[key] = into.get(key, 0) + stride * coefficient
        return constant, strides, {a: c for a, c in atoms.items() if c}

    def total(self, atoms: dict[int, int]) -> int:
        """Sum of coefficient × node as one value, outer levels first; -1 for an empty sum."""
        c = self.compiler
        out = -1
        for value, coefficient in sorted(
            ((self.value(a), k) for a, k in atoms.items()), key=lambda term: (c.values[term[0]].level, term[0])
        ):
            term = value
            if coefficient != 1:
                term = c.emit(f"mul.{INDEX}", (value, c.const(coefficient, INDEX)), INDEX)
            out = term if out < 0 else c.emit(f"add.{INDEX}", (out, term), INDEX)
        return out

    def _half_load(self, i: int) -> int:
        """The load of f16 or bf16 that conversion ``i`` widens, or -1."""
        node = self.expr.nodes[i]
        if node.op == "convert" and node.dtype == "f32":
            source = self.expr.nodes[node.args[0]]
            if source.op in ("load", "load_if") and source.dtype in _HALF:
                return node.args[0]
        return -1

    def _children(self, i: int) -> list[int]:
        node = self.expr.nodes[i]
        load = self._half_load(i)
        if load >= 0:
            node = self.expr.nodes[load]
        if node.op not in ("load", "load_if"):
            return list(node.args)
        indices = node.args[1:] if node.op == "load_if" else node.args
        atoms = list(self.offset(node.attr, indices)[2])
        return atoms + ([node.args[0]] if node.op == "load_if" else [])

    def _load(self, node: Node, register: str) -> int:
        c = self.compiler
        indices = node.args[1:] if node.op == "load_if" else node.args
        constant, strides, atoms = self.offset(node.attr, indices)
        offset = self.total(atoms)
        predicate = self._values[node.args[0]] if node.op == "load_if" else -1
        by_loop = tuple(strides.get(axis, 0) for axis in c.order)
        access = Access(node.attr, constant, by_loop, (offset, 0), (predicate, 0))
        level = max((p + 1 for p, stride in enumerate(by_loop) if stride), default=0)
        level = max([level] + [c.values[v].level for v in (offset, predicate) if v >= 0])
        symbol = f"load.{c.operands[node.attr][0]}.{register}"
        return c.emit(symbol, (), register, c.access(access), level=level)

    def _emit(self, i: int) -> int:
        c, node = self.compiler, self.expr.nodes[i]
        load = self._half_load(i)
        if load >= 0:
            return self._load(self.expr.nodes[load], "f32")
        if node.op in ("load", "load_if"):
            return self._load(node, node.dtype)
        if node.op == "coord":
            return c.coord(node.attr)
        if node.op == "const":
            return c.const(node.attr, node.dtype)
        if node.op in ("acc", "arg"):
            assert self.leaf is not None
            return self.leaf(node)
        args = [self._values[a] for a in node.args]
        source = c.values[args[-1]].dtype
        if node.op == "bitcast":
            if dtypes.itemsize(source) != dtypes.itemsize(node.dtype):
                raise ValueError(f"bitcast from {source} to {node.dtype} changes the size")
            return c.alias(args[0], node.dtype)
        if node.op == "convert":
            return self._convert(args[0], source, node.dtype)
        if node.op == "or" and (turned := self._rotation(args)) is not None:
            return turned
        immediate = 0
        if node.op == "reduce_precision":
            exponent, mantissa = node.attr
            immediate = exponent * 256 + mantissa
        by_argument = node.op in COMPARE or node.op == "is_finite"
        return c.emit(f"{node.op}.{source if by_argument else node.dtype}", args, node.dtype, immediate)

    def _rotation(self, args: list[int]) -> int | None:
        """``x << k | x >> (width - k)`` as one rotation, as random number generators need them."""
        c = self.compiler
        for left, right in (args, args[::-1]):
            a, b = c.values[left], c.values[right]
            if a.symbol not in ("shl.u32", "shl.u64") or b.symbol != f"shr_logical.{a.dtype}":
                continue
            by, back = c.values[a.args[1]], c.values[b.args[1]]
            if a.args[0] != b.args[0] or by.symbol != back.symbol or not by.symbol.startswith("const."):
                continue
            width = dtypes.itemsize(a.dtype) * 8
            if 0 < by.immediate < width and by.immediate + back.immediate == width:
                return c.emit(f"rotate_left.{a.dtype}", (a.args[0],), a.dtype, by.immediate)
        return None

    def _convert(self, value: int, source: str, dtype: str) -> int:
        c = self.compiler
        found = c.values[value]
        if source in _HALF and dtype == "f32" and found.symbol == f"const.{source}":
            bits = dtypes.to_bits(dtypes.from_bits(found.immediate, source), dtype)
            return c.const(bits, dtype)
        return c.emit(f"convert.{source}.{dtype}", (value,), dtype)


class _Registers(dict[int, int]):
    """Register of each value.

    Attributes:
      size: bytes of all registers for one lane.
    """

    size: int = 0


class _Allocator:
    """Linear scan. A value read at a deeper level than its own keeps its register for good: the deeper levels run
    again without it. Within a level registers are reused.
    """

    def __init__(self, compiler: Compiler, sequence: list[int]):
        self.compiler = compiler
        self.sequence = sequence
        self.free: dict[int, list[int]] = {}
        self.registers = _Registers()

    def run(self) -> _Registers:
        c = self.compiler
        last: dict[int, int] = {}
        forever = {c._real(r) for r in (*c.results, *c.kept, *c.accumulators)}
        for i, v in enumerate(self.sequence):
            for a in c.reads(v):
                last[a] = i
                if c.values[a].level < c.values[v].level:
                    forever.add(a)
        for v in c.accumulators:
            self._take(v)
        for i, v in enumerate(self.sequence):
            value = c.values[v]
            dying = [a for a in set(c.reads(v)) if last[a] == i and a not in forever]
            store = value.symbol.startswith("store.")
            size = 0 if store else dtypes.itemsize(value.dtype)
            elementwise = not store and not value.symbol.startswith("load.")
            # A result may replace an argument of its own size, never a part of a larger or smaller one.
            early = [a for a in dying if elementwise and dtypes.itemsize(c.values[a].dtype) == size]
            for a in early:
                self._release(a)
            if value.into >= 0:
                self.registers[v] = self.registers[c._real(value.into)]
            elif not store:
                self._take(v)
                if v not in last and v not in forever:
                    self._release(v)
            for a in dying:
                if a not in early:
                    self._release(a)
        return self.registers

    def _take(self, v: int) -> None:
        size = dtypes.itemsize(self.compiler.values[v].dtype)
        free = self.free.setdefault(size, [])
        if free:
            self.registers[v] = free.pop()
        else:
            self.registers[v] = self.registers.size
            self.registers.size += size

    def _release(self, v: int) -> None:
        if self.compiler.values[v].into < 0:
            self.free.setdefault(dtypes.itemsize(self.compiler.values[v].dtype), []).append(self.registers[v])


def _is_memory(value: Value) -> bool:
    return value.symbol.startswith(("load.", "store."))


def _signed(bits: int) -> int:
    """Bits as the int64 word that holds them."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits
