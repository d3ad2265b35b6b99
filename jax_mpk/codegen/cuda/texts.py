"""Text that all kinds of members share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from jax_mpk.codegen.cuda.arrays import Array
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Load, Scalars, Term
from jax_mpk.graph.ir import Cumulative, Nest, Sort, Update
from jax_mpk.graph.scalar import Expr, Node


def title(frame: Frame, op: Nest | Update | Cumulative | Sort) -> str:
    """The comment above a member."""
    out = ", ".join(f"{frame.values[v].dtype}[{','.join(map(str, frame.values[v].shape))}]" for v in op.outputs)
    over = f" over {'×'.join(map(str, op.rspace))}" if isinstance(op, Nest) and op.rspace else ""
    kind = op.kind if isinstance(op, Nest) else type(op).__name__.lower()
    line = f"  {Path(op.source.line).name}" if op.source.line else ""
    return f"// {kind} {out}{over}{line}"


def loader(operands: Sequence[Array | None]) -> Load:
    """Loads from the arrays of an operator's operands; None: an operand that no program at hand loads from."""

    def load(slot: int, indices: list[Term], dtype: str, pred: str | None) -> str:
        array = operands[slot]
        assert array is not None
        return array.load(indices)

    return load


def rounded(term: Term, source: str, dtype: str) -> str:
    """A value in the type it is stored as."""
    return term.text if source == dtype else f"convert<{dtype}>({term.text})"


def stores(
    expr: Expr,
    coords: Sequence[Term],
    load: Load,
    outputs: Sequence[Array],
    leaf: Callable[[Node], str] | None = None,
) -> list[str]:
    """Statements that compute the results of a program and store them at the coordinates."""
    s = Scalars(expr, coords, load, leaf)
    results = s.results()
    lines = list(s.lines)
    for root, term, output in zip(expr.results, results, outputs, strict=True):
        lines.append(output.store(coords, rounded(term, expr.nodes[root].dtype, output.dtype)))
    return lines


def accumulators(types: Sequence[str]) -> str:
    """The C++ type of an output's accumulators."""
    return types[0] if len(types) == 1 else f"Accumulators<{', '.join(types)}>"


def accumulator(types: Sequence[str], name: str, node: Node) -> str:
    """One of them."""
    return name if len(types) == 1 else f"{name}.template get<{node.attr}>()"


def made(types: Sequence[str], values: Sequence[str]) -> str:
    """All of them, from their values."""
    return values[0] if len(types) == 1 else f"{accumulators(types)}({', '.join(values)})"


def partials(types: Sequence[str]) -> int:
    """Bytes to join what all warps have of one output: accumulators take up to 8 bytes each."""
    return 16 * 8 * len(types)


def group(outputs: int, depth: int) -> int:
    """Lanes that share an output."""
    found = 1
    while found < 32 and found * 2 <= depth and outputs * found < 256:
        found *= 2
    return found
