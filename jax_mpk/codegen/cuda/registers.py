"""Reductions of a task to one element, which every thread keeps in a register: nobody waits for one that has it."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mpk.codegen.cuda.arrays import Array
from jax_mpk.codegen.cuda.routine import Frame
from jax_mpk.codegen.cuda.scalars import Term
from jax_mpk.codegen.cuda.texts import accumulator, accumulators, loader, partials, stores, title
from jax_mpk.graph.ir import Nest

#: Most positions that each warp combines by itself, see `reduce_for_all` in csrc/device/tasks/reduce.cuh.
_ALONE = 64


def reduce_for_all(
    frame: Frame,
    member: int,
    op: Nest,
    arrays: Sequence[Array],
    coords: Sequence[Term],
    depth: int,
    body: Sequence[str],
    join: Sequence[str],
    spread: str = "Spread::kStrided",
) -> bool:
    """Writes such a reduction; False where a task has several elements or others may want the one.

    Args:
      frame: the routine's frame.
      member: position of the reduction.
      op: the reduction; a contraction counts as one.
      arrays: of its operands.
      coords: of the element.
      depth: steps of the reduction.
      body: statements that compute what step ``r`` contributes, ending in a return.
      join: statements that join accumulators a and b, ending in a return.
      spread: how the steps are spread over threads.
    """
    assert op.epilogue is not None
    if len(op.outputs) != 1 or (kept := frame.in_register(member, op.outputs[0])) is None:
        return False
    joins = depth > _ALONE
    frame.meetings.meet(arrays, [], joins=joins)
    frame.line(title(frame, op))
    acc = accumulators(op.acc)
    frame.line(f"const {kept.dtype} {kept.name} = reduce_for_all<{acc}, {spread}, {depth}>(")
    frame.line("    c,")
    frame.lines_of(f"[&](int r) -> {acc} {{", body, "},")
    frame.lines_of(f"[&]({acc} a, {acc} b) -> {acc} {{", join, "},")
    finish = stores(op.epilogue, coords, loader(arrays), [kept], lambda node: accumulator(op.acc, "a", node))
    frame.lines_of(f"[&]({acc} a) -> {kept.dtype} {{", finish, "});")
    if joins:
        frame.code.partials = max(frame.code.partials, partials(op.acc))
        after = {op.epilogue.nodes[i].attr for i in op.epilogue.loads()}
        frame.meetings.met_before([a for slot, a in enumerate(arrays) if slot in after])
    return True
