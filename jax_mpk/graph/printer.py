"""Graphs as text: one line per operator where it fits, the same text for the same graph.

Coordinates are ``i0, i1, …``, reduced ones ``r0, …``; values are ``%0, %1, …``. Conversions that only follow from
``f16`` and ``bf16`` being computed in ``f32`` are not shown. What an expression uses more than once, or what would make
it too long, is named first: ``t0 = …``.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Block, Branch, Combine, Cumulative, Graph, Loop, Nest, Op, Sort, Source, Value
from jax_mpk.graph.scalar import Expr, Node

#: Operator and binding strength; ``-`` and ``/`` bind their right side tighter.
_INFIX = {
    "or": ("|", 1),
    "xor": ("^", 2),
    "and": ("&", 3),
    "eq": ("==", 4),
    "ne": ("!=", 4),
    "lt": ("<", 4),
    "le": ("<=", 4),
    "gt": (">", 4),
    "ge": (">=", 4),
    "shl": ("<<", 5),
    "shr_arith": (">>", 5),
    "shr_logical": (">>>", 5),
    "add": ("+", 6),
    "sub": ("-", 6),
    "mul": ("*", 7),
    "div": ("/", 7),
    "rem": ("%", 7),
}
_PREFIX = {"neg": "-", "not": "!"}
_UNARY, _ATOM = 8, 9
_FUNCTIONS = {"select": "where"}
#: Longest expression that is not broken up.
_LONG = 88


def format_graph(graph: Graph) -> str:
    """The whole graph, nested blocks indented."""
    head = []
    for position, v in enumerate(graph.inputs):
        donated = " donated" if position in graph.donated else ""
        layout = graph.layouts[position] if graph.layouts else None
        stored = "" if layout is None else f" axes {','.join(map(str, layout))} of the argument"
        head.append(f"  {_declared(graph, v)}{donated}{stored}\n")
    lines = ["graph(\n", *head, "):\n"] if head else ["graph():\n"]
    lines += [f"  {line}\n" for line in _block_lines(graph, graph.block, "return")]
    lines += [f"# {note}\n" for note in graph.notes]
    return "".join(lines)


def format_op(graph: Graph, op: Op) -> str:
    """One operator, with its nested blocks."""
    return "\n".join(_op_lines(graph, op))


def format_expr(expr: Expr, operands: Sequence[str] | None = None, coords: Sequence[str] | None = None) -> str:
    """A scalar program: its results, separated by commas, after lines that name what they share.

    Args:
      expr: the program.
      operands: names of the operand slots; by default ``x0, x1, …``.
      coords: names of the coordinates; by default ``i0, i1, …``.
    """
    names, results = _expr_parts(expr, operands, coords)
    return "\n".join([*names, ", ".join(results)])


def type_name(value: Value) -> str:
    """Element type and shape, as ``f32[4,8]``."""
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


# -- operators -------------------------------------------------------------------------------------------------


def _declared(graph: Graph, v: int) -> str:
    return f"%{v}: {type_name(graph.values[v])}"


def _ids(ids: Sequence[int]) -> str:
    return ", ".join(f"%{v}" for v in ids)


def _block_lines(graph: Graph, block: Block, ending: str) -> list[str]:
    lines = [line for op in block.ops for line in _op_lines(graph, op)]
    return [*lines, f"{ending} {_ids(block.results)}".rstrip()]


def _op_lines(graph: Graph, op: Op) -> list[str]:
    outputs = ", ".join(_declared(graph, v) for v in op.outputs)
    if isinstance(op, Loop):
        return _loop_lines(graph, op, outputs)
    if isinstance(op, Branch):
        lines = [f"{outputs} = branch %{op.index}{_comment(op.source)}"]
        for k, arm in enumerate(op.arms):
            lines += [f"  arm {k}:", *_indented(_block_lines(graph, arm, "yield"), 4)]
        return lines
    if isinstance(op, Sort):
        what = f"top {op.top_k}" if op.top_k is not None else f"sort by {op.num_keys}"
        stable = ", stable" if op.stable and op.top_k is None else ""
        return [f"{outputs} = {what} along axis {op.axis}{stable} of {_ids(op.operands)}{_comment(op.source)}"]
    slots = [f"%{v}" for v in op.operands]
    if isinstance(op, Nest):
        return _nest_lines(op, outputs, slots)
    if isinstance(op, Cumulative):
        way = ", reversed" if op.reverse else ""
        head = f"{outputs} = cumulative {_combine(op.combine)} along axis {op.axis}{way}"
        parts: list[tuple[str, Expr, Sequence[str] | None]] = [("of", op.body, None)]
        if not _is_plain(op.epilogue):
            parts.append(("then", op.epilogue, None))
        return _with_programs(head, parts, slots, op.source)
    space = ", ".join(f"i{d}<{size}" for d, size in enumerate(op.space))
    head = f"{outputs} = update %{op.base} by {_combine(op.combine)} over [{space}]"
    return _with_programs(head, [("at", op.index, None), ("with", op.value, None)], slots, op.source)


def _loop_lines(graph: Graph, op: Loop, outputs: str) -> list[str]:
    times = f"{op.trips} times" if op.trips is not None else "while"
    lines = [f"{outputs} = loop {times}{_comment(op.source)}"]
    lines += [f"  {_declared(graph, param)} from %{init}" for param, init in zip(op.params, op.inits, strict=True)]
    if op.cond is not None:
        lines += ["  cond:", *_indented(_block_lines(graph, op.cond, "yield"), 4)]
    return [*lines, "  body:", *_indented(_block_lines(graph, op.body, "yield"), 4)]


def _nest_lines(op: Nest, outputs: str, slots: list[str]) -> list[str]:
    coords = [f"i{d}" for d in range(len(op.space))] + [f"r{d}" for d in range(len(op.rspace))]
    if op.kind == "map" or op.combine is None or op.epilogue is None:
        return _with_programs(f"{outputs} = {op.kind}", [("", op.body, coords)], slots, op.source)
    extents = ", ".join(f"r{d}<{size}" for d, size in enumerate(op.rspace))
    head = f"{outputs} = {op.kind} {_combine(op.combine)} in {','.join(op.acc)} over [{extents}]"
    parts = [("of", op.body, coords)]
    if not _is_plain(op.epilogue):
        parts.append(("then", op.epilogue, coords))
    return _with_programs(head, parts, slots, op.source)


def _is_plain(epilogue: Expr) -> bool:
    """Whether it only stores the accumulator."""
    return [n.op for n in epilogue.nodes if not _hidden(n)] == ["acc"]


def _with_programs(
    head: str,
    programs: Sequence[tuple[str, Expr, Sequence[str] | None]],
    slots: list[str],
    source: Source,
) -> list[str]:
    parts = [(word, *_expr_parts(expr, slots, coords)) for word, expr, coords in programs]
    flat = " ".join(part for word, _, results in parts for part in (word, ", ".join(results)) if part)
    if not any(names for _, names, _ in parts) and len(flat) <= _LONG:
        return [f"{head} {flat}".rstrip() + _comment(source)]
    lines = [head + _comment(source)]
    for word, names, results in parts:
        lines += [f"    {name}" for name in names]
        lines.append(f"  {word} {', '.join(results)}" if word else f"  = {', '.join(results)}")
    return lines


def _combine(combine: Combine) -> str:
    if combine.expr is None:
        return combine.kind
    names, results = _expr_parts(combine.expr, None, None)
    return f"{combine.kind} ({'; '.join([*names, ', '.join(results)])})"


def _comment(source: Source) -> str:
    return f"  # {source}" if str(source) else ""


def _indented(lines: Sequence[str], by: int) -> list[str]:
    return [" " * by + line for line in lines]


# -- expressions -----------------------------------------------------------------------------------------------


def _hidden(node: Node) -> bool:
    return node.op == "convert" and node.attr == "round"


def _expr_parts(
    expr: Expr, operands: Sequence[str] | None, coords: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Lines that name shared parts, and the text of every result."""
    uses = [0] * len(expr.nodes)
    for node in expr.nodes:
        for arg in node.args:
            uses[arg] += 1
    for r in expr.results:
        uses[r] += 1
    names: list[str] = []
    text: list[tuple[str, int]] = []
    for i, node in enumerate(expr.nodes):
        args = [text[a] for a in node.args]
        shown = args[0] if _hidden(node) else _node_text(node, args, operands, coords)
        shared = uses[i] > 1 and node.args and len(shown[0]) > 8 and not _hidden(node)
        if shared or len(shown[0]) > _LONG:
            names.append(f"t{len(names)} = {shown[0]}")
            shown = (f"t{len(names) - 1}", _ATOM)
        text.append(shown)
    return names, [text[r][0] for r in expr.results]


def _node_text(
    node: Node, args: list[tuple[str, int]], operands: Sequence[str] | None, coords: Sequence[str] | None
) -> tuple[str, int]:
    """Text of a node and how tightly it binds."""
    plain = [text for text, _ in args]
    if node.op == "coord":
        axis: int = node.attr  # type: ignore[assignment]
        return (coords[axis] if coords is not None else f"i{axis}"), _ATOM
    if node.op == "const":
        shown = _const_text(node)
        return shown, _UNARY if shown.startswith("-") else _ATOM
    if node.op in ("acc", "arg"):
        return f"{node.op}{node.attr}", _ATOM
    if node.op in ("load", "load_if"):
        slot: int = node.attr  # type: ignore[assignment]
        name = operands[slot] if operands is not None else f"x{slot}"
        if node.op == "load":
            return (f"{name}[{', '.join(plain)}]" if plain else name), _ATOM
        return f"{name}[{', '.join(plain[1:])} if {plain[0]}]", _ATOM
    if node.op in _INFIX and len(args) == 2:
        symbol, strength = _INFIX[node.op]
        left = _wrapped(args[0], strength)
        if node.op == "add" and plain[1].startswith("-") and args[1][1] == _UNARY:
            return f"{left} - {plain[1][1:]}", strength
        right = _wrapped(args[1], strength + (node.op not in ("add", "mul", "and", "or", "xor")))
        return f"{left} {symbol} {right}", strength
    if node.op in _PREFIX and len(args) == 1:
        return _PREFIX[node.op] + _wrapped(args[0], _UNARY), _UNARY
    if node.op == "convert":
        return f"{node.dtype}({', '.join(plain)})", _ATOM
    if node.op == "bitcast":
        return f"bits_{node.dtype}({', '.join(plain)})", _ATOM
    if node.op == "reduce_precision":
        return f"reduce_precision{node.attr}({', '.join(plain)})", _ATOM
    return f"{_FUNCTIONS.get(node.op, node.op)}({', '.join(plain)})", _ATOM


def _wrapped(part: tuple[str, int], strength: int) -> str:
    text, own = part
    return text if own >= strength else f"({text})"


def _const_text(node: Node) -> str:
    value = dtypes.from_bits(node.attr, node.dtype)  # type: ignore[arg-type]
    if node.dtype == "b1":
        return "true" if value else "false"
    if node.dtype in ("f16", "bf16"):
        value = float(value)  # type: ignore[assignment]
    return str(value)
