"""Chains of reductions and maps along the same short rows, such as a softmax: one warp takes a row through all of them.

Each of them alone is a few instructions between two barriers. Within a warp a row's elements and its sums stay in
registers, and nobody waits for anybody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jax_mpk.codegen.cuda.arrays import Array, register
from jax_mpk.codegen.cuda.code import WARPS
from jax_mpk.codegen.cuda.members import accumulated, combined, nothing
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Scalars, Term, fixed, product
from jax_mpk.codegen.cuda.texts import loader, rounded, stores, title
from jax_mpk.graph.ir import Nest, Op
from jax_mpk.graph.windows import is_identity

_LANES = 32
#: Most elements of a row that a lane holds, and most rows that a warp takes one after the other.
_EACH, _TURNS = 4, 2
_KINDS = ("sum", "max")


@dataclass(frozen=True)
class _Rows:
    """What all members of a chain go through.

    Attributes:
      space: extents of what numbers rows.
      size: elements of a row.
      boxes: int64 [tasks, 2, rank]: the rows of each task.
      scalar: number of the live scalar that says how many elements count, or None: all do.
    """

    space: tuple[int, ...]
    size: int
    boxes: np.ndarray
    scalar: int | None

    def are_those_of(self, other: _Rows) -> bool:
        same = self.space, self.size, self.scalar
        return same == (other.space, other.size, other.scalar) and np.array_equal(self.boxes, other.boxes)


def row_chain(frame: Frame, first: int, ops: Sequence[Op | None]) -> int:
    """Writes the members from ``first`` on that are such a chain; how many, or 0: it is none."""
    rows = _rows(frame, first, ops[first])
    head = ops[first]
    if rows is None or not isinstance(head, Nest) or head.kind != "reduce":
        return 0
    made: set[int] = set()
    read: set[int] = set()
    end = first
    while end < len(ops):
        op, found = ops[end], _rows(frame, end, ops[end])
        if found is None or not found.are_those_of(rows) or not isinstance(op, Nest):
            break
        if made and not _reads(op, made, rows):
            break
        # A row may not be overwritten, nor be read anew, while other warps take theirs through the chain.
        reads, writes = read | set(op.operands) - made, made | set(op.outputs)
        if any(frame.share(a, b) for a in reads for b in writes):
            break
        read, made = reads, writes
        end += 1
    if end - first < 2:
        return 0
    _emit(frame, rows, {m: op for m, op in enumerate(ops[first:end], first) if isinstance(op, Nest)})
    return end - first


def _rows(frame: Frame, member: int, op: Op | None) -> _Rows | None:
    """The rows that a member goes through; None: it cannot be part of a chain."""
    if not isinstance(op, Nest) or len(op.outputs) != 1 or op.outputs[0] in frame.views:
        return None
    if op.kind == "reduce":
        assert op.combine is not None
        if op.combine.kind not in _KINDS or op.acc != ("f32",) or len(op.rspace) != 1:
            return None
        space, size = op.space, op.rspace[0]
    elif op.kind == "map" and op.space:
        *lead, size = op.space
        space = tuple(lead)
    else:
        return None
    rank = len(space)
    boxes, limits = frame.boxes[member], frame.live.limits[member]
    if op.kind == "map" and rank not in limits and not np.all(boxes[:, 1, rank] - boxes[:, 0, rank] == size):
        return None
    counts = np.maximum(boxes[:, 1, :rank] - boxes[:, 0, :rank], 0).prod(axis=1)
    most = int(counts.max(initial=0))
    if not limits.keys() <= {rank} or not 1 < size <= _EACH * _LANES or not 0 < most <= _TURNS * WARPS:
        return None
    return _Rows(space, size, boxes[:, :, :rank], limits.get(rank))


def _reads(op: Nest, made: set[int], rows: _Rows) -> bool:
    """Whether a member reads something of the chain, and of that only its own row or element."""
    programs = [op.body, *([op.epilogue] if op.epilogue is not None else [])]
    found = False
    for expr in programs:
        for i in expr.loads():
            node = expr.nodes[i]
            if op.operands[node.attr] not in made:
                continue
            rank = len(node.args) - (node.op == "load_if")
            space = (*rows.space, rows.size)[:rank]
            if node.op != "load" or rank < len(rows.space) or not is_identity(expr, node.args, space):
                return False
            found = True
    return found


def _emit(frame: Frame, rows: _Rows, chain: dict[int, Nest]) -> None:
    rank, first = len(rows.space), next(iter(chain))
    made = [op.outputs[0] for op in chain.values()]
    outside = [op for op in frame.ops if not any(op is member for member in chain.values())]
    arrays = {v: frame.array(v) for op in chain.values() for v in op.operands if v not in made}
    stored: dict[int, Array] = {}
    for v in made:
        again = any(v in op.operands for op in outside)
        if again or not frame.is_local(v):
            stored[v] = frame.array(v, store=True, again=again)
    low, extents, _ = frame.box(first, rank)
    count = frame.live_count(first, rank) or fixed(rows.size)
    frame.meetings.meet(list(arrays.values()), list(stored.values()))
    coords, decode = frame.coordinates("n", low, extents, [f"i{d}" for d in range(rank)])
    each = math.ceil(rows.size / _LANES)
    frame.line(f"// one warp a row of {rows.size}")
    frame.line(f"for_rows(c, {product(extents).text}, [&](int n) {{")
    for text in decode:
        frame.line(f"  {text}")
    at = [*coords, Term("r")]
    for number, op in enumerate(chain.values()):
        (v,) = op.outputs
        load = loader([arrays[u] for u in op.operands])
        frame.line(f"  {title(frame, op)}")
        dtype, shape = frame.values[v].dtype, frame.values[v].shape
        if op.kind == "map":
            name = f"v{number}"
            kept = arrays[v] = register(f"{name}[k]", dtype, shape)
            frame.line(f"  {kept.dtype} {name}[{each}] = {{}};")
            frame.line(f"  over_row<{each}>(c, {count.text}, [&](int r, int k) {{")
            s = Scalars(op.body, at, load)
            (term,) = s.results()
            value = rounded(term, op.body.nodes[op.body.results[0]].dtype, kept.dtype)
            body = [*s.lines, f"{kept.name} = {value};"]
            body += [stored[v].store(at, kept.name)] if v in stored else []
            for text in body:
                frame.line(f"    {text}")
            frame.line("  });")
            continue
        assert op.combine is not None and op.epilogue is not None
        kept = arrays[v] = register(f"y{number}", dtype, shape)
        frame.line(f"  const {kept.dtype} {kept.name} = across_row<{each}>(")
        frame.line(f"      c, {count.text}, {nothing(op.combine, 'f32')},")
        body = accumulated(op.body, op.combine, op.acc, at, load, "r")
        finish = stores(op.epilogue, coords, load, [kept], lambda node: "a")
        for head, lines, end in (
            ("[&](int r, int k) -> f32 {", body, "},"),
            ("[&](f32 a, f32 b) -> f32 {", combined(op.combine, op.acc), "},"),
            (f"[&](f32 a) -> {kept.dtype} {{", finish, "});"),
        ):
            frame.lines_of(f"  {head}", [f"  {text}" for text in lines], f"  {end}")
        if v in stored:
            frame.line(f"  if (c.lane() == 0) {stored[v].store(coords, kept.name)}")
    frame.line("});")
