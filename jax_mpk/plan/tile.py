"""Boxes: how a routine's anchor is cut into tasks, what each task computes, and what that costs.

A routine is a list of operators; the last is the anchor. Cutting the anchor's output space into boxes decides
everything else: every other member computes, per task, the box of its output the later members read (regions are
propagated backwards). The best cut is searched for with the cost model and remembered by the routine's structure, so
a model's repeated layers are searched once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, takewhile

import numpy as np

from jax_mpk.graph import dtypes
from jax_mpk.graph.ir import Cumulative, Graph, Nest, Op, Sort, Source, Update, reads
from jax_mpk.graph.regions import Touch, op_touches, shifted_coord
from jax_mpk.plan import columns, costs
from jax_mpk.plan.ir import WHOLE, Target
from jax_mpk.plan.locals import lay_out

#: Low and high corners of boxes, int64 [tasks, axes] each.
Grid = tuple[np.ndarray, np.ndarray]

#: A cut may leave this share of the workers idle if it makes the tasks more even.
_IDLE = 0.05
#: How many answers about regions are kept.
_MOST_KNOWN = 1024


@dataclass(frozen=True)
class Cut:
    """A routine cut into tasks.

    Attributes:
      lo, hi: per member, int64 [tasks, axes]: the box of its output space each task computes.
      touches: per member, what each task reads (regions of values; local ones included).
      seconds: predicted time of the routine alone on the target, hand-offs not included.
      scratch: bytes of scratch its local values need.
    """

    lo: tuple[np.ndarray, ...]
    hi: tuple[np.ndarray, ...]
    touches: tuple[tuple[Touch, ...], ...]
    seconds: float
    scratch: int

    @property
    def tasks(self) -> int:
        return len(self.lo[-1])


def output_space(graph: Graph, op: Op) -> tuple[int, ...]:
    """Index space of an operator's outputs."""
    return graph.values[op.outputs[0]].shape


def spread(tasks: int, workers: int) -> np.ndarray:
    """Worker of each of at least ``workers`` tasks: contiguous runs of equal length."""
    return (np.arange(tasks, dtype=np.int64) * workers // tasks).astype(np.int32)


class Tiler:
    """Finds the best cut of routines of one graph for one target.

    Args:
      graph: the prepared graph.
      target: the device.
      share: per value, the representative of the storage it lives in.
    """

    def __init__(self, graph: Graph, target: Target, share: Sequence[int]):
        self.graph = graph
        self.target = target
        self.share = share
        self.arguments = {share[v] for v in graph.inputs}
        self._constant = columns.constants(graph)
        self._by_columns: dict[int, tuple[columns.ColumnWeight | None, Op]] = {}  # by identity, like the structures
        self._best: dict[object, Cut | None] = {}
        self._numbers: dict[Op, int] = {}
        self._known: dict[tuple[int, int, bytes, bytes], tuple[tuple[Touch, ...], Op]] = {}
        self._structures: dict[int, tuple[int, Op]] = {}  # by identity; the operator is kept so that it stays unique

    def in_place(self, op: Update) -> bool:
        """Whether an Update writes into its base's storage."""
        return self.share[op.base] == self.share[op.output]

    def best(self, members: tuple[Op, ...], anchors: tuple[int, ...], stored: frozenset[int]) -> Cut | None:
        """The fastest cut, or None where none fits the scratch memory or keeps the stored members exact.

        Args:
          members: operators in data-flow order.
          anchors: positions in ``members`` of the independent operators the routine exists for; the last member is
            always one.
          stored: values of other members that must also be written to memory; their boxes must partition.
        """
        found, values = self._search(members, anchors, stored)
        if found is None:
            return None
        touches = tuple(tuple(replace(t, value=values[t.value]) for t in some) for some in found.touches)
        return replace(found, touches=touches)

    def seconds(self, members: tuple[Op, ...], anchors: tuple[int, ...], stored: frozenset[int]) -> float:
        """Predicted time of the best cut; infinite where there is none."""
        found, _ = self._search(members, anchors, stored)
        return math.inf if found is None else found.seconds

    def _search(
        self, members: tuple[Op, ...], anchors: tuple[int, ...], stored: frozenset[int]
    ) -> tuple[Cut | None, list[int]]:
        """The fastest cut, with the positions of values in the list beside it in place of the values."""
        key, values = self._key(members, anchors, stored)
        if key not in self._best:
            chosen: Cut | None = None
            for round_ in self._candidates([members[a] for a in anchors]):
                for grids in round_:
                    cut = self._cut(members, anchors, grids)
                    if cut.scratch > self.target.scratch_bytes or (
                        chosen is not None and cut.seconds >= chosen.seconds
                    ):
                        continue
                    if self._exact(members, anchors, stored, cut):
                        chosen = cut
                if chosen is not None:
                    break
            if chosen is not None:
                number = {v: i for i, v in enumerate(values)}
                touches = tuple(tuple(replace(t, value=number[t.value]) for t in some) for some in chosen.touches)
                chosen = replace(chosen, touches=touches)
            self._best[key] = chosen
        return self._best[key], values

    # -- candidates --------------------------------------------------------------------------------------------

    def _candidates(self, anchors: list[Op]) -> Iterator[list[list[Grid]]]:
        """Cuts into one or about as many tasks as workers; then, for scratch memory's sake, into many more."""
        workers = self.target.workers
        seen: set[tuple[tuple[int, ...], ...]] = set()
        for totals in ((1, workers), (2 * workers,), (4 * workers,), (16 * workers,), (64 * workers,)):
            found: dict[tuple[tuple[int, ...], ...], None] = {}
            for total in totals:
                choices = [list(self._parts(anchor, total)) for anchor in anchors]
                if len(anchors) == 1:
                    found.update(((parts,), None) for parts in choices[0])
                    continue
                # Several anchors must agree on the number of tasks, and if they can on the axes they are cut along.
                by_cut = [
                    {(math.prod(parts), tuple(p > 1 for p in parts)): parts for parts in some} for some in choices
                ]
                for key in dict.fromkeys(key for some in by_cut for key in some):
                    if all(key in some for some in by_cut):
                        found[tuple(some[key] for some in by_cut)] = None
                by_count = [{math.prod(parts): parts for parts in reversed(some)} for some in choices]
                exact = {n for some in by_count for n in some}
                for n in sorted(exact):
                    agreed = [
                        some.get(n) or next((p for p in self._parts(a, n) if math.prod(p) == n), None)
                        for a, some in zip(anchors, by_count, strict=True)
                    ]
                    if None not in agreed:
                        found[tuple(agreed)] = None  # type: ignore[arg-type]
                # Or they are cut alike along the axes they begin with.
                spaces = [output_space(self.graph, anchor) for anchor in anchors]
                common = sum(1 for _ in takewhile(lambda extents: len(set(extents)) == 1, zip(*spaces)))
                for parts in choices[max(range(len(spaces)), key=lambda k: len(spaces[k]))]:
                    if all(p == 1 for p in parts[common:]):
                        found[tuple(parts[:common] + (1,) * (len(space) - common) for space in spaces)] = None
            yield [
                [self._grid(a, p) for a, p in zip(anchors, parts, strict=True)] for parts in found if parts not in seen
            ]
            seen.update(found)

    def _parts(self, anchor: Op, total: int) -> Iterator[tuple[int, ...]]:
        space = output_space(self.graph, anchor)
        whole = {anchor.axis} if isinstance(anchor, Sort | Cumulative) else set()
        axes = [a for a, extent in enumerate(space) if extent > 1 and a not in whole]
        if isinstance(anchor, Update):
            # Which part of the output an update hits is known at run time: only aligned axes may be cut.
            axes = [a for a in axes if a in _aligned_axes(anchor)]
        found = self._columns(anchor)
        if found is not None and total > 1:
            tasks = math.prod(space[a] for a in found.shared) * found.readers
            parts = [space[a] if a in found.shared else 1 for a in range(len(space))]
            if found.readers > 1:
                parts[found.rows[0]] = found.readers
            parts[found.axis] = _even_parts(space[found.axis] // found.step, max(total // tasks, 1))
            return iter([tuple(parts)])
        return _part_counts(space, axes, total)

    def _columns(self, op: Op) -> columns.ColumnWeight | None:
        known = self._by_columns.get(id(op))
        if known is None:
            found = columns.find(self.graph.values, self._constant, self.target, op)
            known = self._by_columns[id(op)] = found, op
        return known[0]

    def _grid(self, anchor: Op, parts: tuple[int, ...]) -> Grid:
        found = self._columns(anchor)
        space = output_space(self.graph, anchor)
        steps = [found.step if found is not None and a == found.axis else 1 for a in range(len(space))]
        return _grid(space, parts, steps)

    # -- evaluation --------------------------------------------------------------------------------------------

    def _cut(self, members: tuple[Op, ...], anchors: tuple[int, ...], grids: list[Grid]) -> Cut:
        graph = self.graph
        seeds = dict(zip(anchors, grids, strict=True))
        tasks = len(grids[-1][0])
        need: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        boxes: list[tuple[np.ndarray, np.ndarray]] = []
        touches: list[tuple[Touch, ...]] = []
        inner = {v for i, op in enumerate(members) if i not in seeds for v in op.outputs}
        for i, op in reversed(list(enumerate(members))):
            if i in seeds:
                box = seeds[i]
            else:
                box = _union([need[v] for v in op.outputs if v in need], tasks, output_space(graph, op))
                box = _whole_axis(op, box)
            boxes.append(box)
            found = self._touched(op, *box)
            touches.append(found)
            for touch in found:
                if touch.value in inner:
                    known = need.get(touch.value)
                    box = (touch.lo, touch.hi)
                    need[touch.value] = (
                        box if known is None else _union([known, box], tasks, graph.values[touch.value].shape)
                    )
        boxes.reverse()
        touches.reverse()
        _, scratch = lay_out(graph, members, boxes, inner)
        seconds = self._seconds(members, boxes, touches, inner)
        return Cut(tuple(b[0] for b in boxes), tuple(b[1] for b in boxes), tuple(touches), seconds, scratch)

    def _touched(self, op: Op, lo: np.ndarray, hi: np.ndarray) -> tuple[Touch, ...]:
        """What tasks read to compute their boxes of an operator.

        A routine that takes in one more operator is cut in the same ways again, so the latest answers are kept.
        """
        key = id(op), len(lo), lo.tobytes(), hi.tobytes()
        known = self._known.get(key)
        if known is not None:
            return known[0]
        found = op_touches(self.graph, op, lo, hi)
        if isinstance(op, Update) and self.in_place(op) and op.combine.kind == "set":
            found.pop()  # the base: it is not copied
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[key] = tuple(found), op
        return tuple(found)

    def _seconds(
        self,
        members: tuple[Op, ...],
        boxes: list[tuple[np.ndarray, np.ndarray]],
        touches: list[tuple[Touch, ...]],
        inner: set[int],
    ) -> float:
        target, graph = self.target, self.graph
        tasks = len(boxes[-1][0])
        flops = np.zeros(tasks)
        regions: dict[int, np.ndarray] = {}  # value → elements each task moves; read twice, it is still in scratch
        slower: dict[int, np.ndarray] = {}  # value → how much, where it is not read as memory likes it
        for op, (lo, hi), found in zip(members, boxes, touches, strict=True):
            if not all(v in inner for v in op.outputs):
                in_place = isinstance(op, Update) and self.in_place(op)
                written = costs.evaluations(op, WHOLE, lo, hi) if in_place else costs.volume(lo, hi)
                regions.update((v, written) for v in op.outputs)
            flops += costs.flops(op, lo, hi)
            for touch in found:
                if touch.value not in inner:
                    known = regions.get(touch.value)
                    regions[touch.value] = touch.most if known is None else np.maximum(known, touch.most)
            if (by_columns := self._columns(op)) is not None:
                assert isinstance(op, Nest)
                slower[by_columns.weight] = columns.slowdown(by_columns, op, target, lo, hi)
        cache, memory, staged = np.zeros(tasks), np.zeros(tasks), np.zeros(tasks)
        for v, elements in regions.items():
            itemsize = dtypes.itemsize(graph.values[v].dtype)
            nbytes, whole = elements * itemsize, math.prod(graph.values[v].shape) * itemsize
            argument = self.share[v] in self.arguments
            if not argument:
                tagged = target.may_tag(whole, itemsize, nbytes.max(initial=0))
                waited = costs.staged_bytes(target, nbytes, itemsize, tagged)
                staged += waited
                nbytes = np.where(waited > 0, 0, nbytes)
            fresh = costs.fresh_share(nbytes.sum(), whole)
            much = slower.get(v, 1.0)
            cache += much * nbytes
            memory += much * costs.memory_bytes(target, nbytes, fresh, argument, whole)
        each = costs.task_seconds(target, cache, memory, flops, staged)
        each += target.task_overhead * tasks / target.workers  # more tasks, more events: not for next to nothing
        if tasks > target.workers:
            each = np.bincount(spread(tasks, target.workers), weights=each).astype(np.float64)
        return float(each.max(initial=0.0))

    def _exact(self, members: tuple[Op, ...], anchors: tuple[int, ...], stored: frozenset[int], cut: Cut) -> bool:
        """Whether stored members are computed once, and no task reads what another task of the routine writes."""
        for i, (op, lo, hi) in enumerate(zip(members, cut.lo, cut.hi, strict=True)):
            if i not in anchors:
                if not stored.intersection(op.outputs):
                    continue
                if not is_partition(lo, hi, output_space(self.graph, op)):
                    return False
            homes = {self.share[v] for v in op.outputs}
            for touch in (touch for touches in cut.touches for touch in touches):
                if self.share[touch.value] in homes and not _private(lo, hi, touch):
                    return False
        return True

    def _key(
        self, members: tuple[Op, ...], anchors: tuple[int, ...], stored: frozenset[int]
    ) -> tuple[object, list[int]]:
        """The routine's structure, its operators with values renumbered and origins removed; and those values."""
        number: dict[int, int] = {}
        signature: list[object] = [anchors]
        for op in members:
            for v in (*reads(op), *op.outputs):
                if v not in number:
                    number[v] = len(number)
                    value = self.graph.values[v]
                    signature.append((value.shape, value.dtype, v in stored, self.share[v] in self.arguments))
            base = number[op.base] if isinstance(op, Update) else -1
            operands, outputs = tuple(number[v] for v in op.operands), tuple(number[v] for v in op.outputs)
            signature.append((self._structure(op), operands, outputs, base))
        homes: dict[int, int] = {}
        signature.append(tuple(homes.setdefault(self.share[v], len(homes)) for v in number))
        return tuple(signature), list(number)

    def _structure(self, op: Op) -> int:
        """A number that operators share which differ in nothing but values and origin."""
        found = self._structures.get(id(op))
        if found is None:
            names = {"output": -1, "base": -1} if isinstance(op, Update) else {"outputs": ()}
            bare = replace(op, operands=(), source=Source(""), **names)  # type: ignore[arg-type]
            number = self._numbers.setdefault(bare, len(self._numbers))
            found = self._structures[id(op)] = number, op
        return found[0]


def is_partition(lo: np.ndarray, hi: np.ndarray, space: tuple[int, ...]) -> bool:
    """Whether boxes cover a space exactly once."""
    volume = np.prod((hi - lo).astype(np.int64), axis=1)
    if int(volume.sum()) != math.prod(space):
        return False
    keep = volume > 0
    lo, hi = lo[keep], hi[keep]
    if len(lo) < 2 or not space:
        return True
    overlap = np.all((lo[:, None] < hi[None]) & (lo[None] < hi[:, None]), axis=2)
    return int(overlap.sum()) == len(lo)


def _private(lo: np.ndarray, hi: np.ndarray, touch: Touch) -> bool:
    """Whether every task's region of ``touch`` meets only the box the same task writes."""
    if touch.lo.shape[1] != lo.shape[1]:
        return len(lo) == 1
    overlap = np.all((lo[:, None] < touch.hi[None]) & (touch.lo[None] < hi[:, None]), axis=2)
    empty = np.any(touch.hi <= touch.lo, axis=1)
    return not np.any(overlap & ~empty[None] & ~np.eye(len(lo), dtype=bool))


def _aligned_axes(op: Update) -> set[int]:
    return {a for a, r in enumerate(op.index.results[:-1]) if shifted_coord(op.index, r) is not None}


def _union(
    boxes: list[tuple[np.ndarray, np.ndarray]], tasks: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest boxes around several per-task boxes; empty ones do not count."""
    rank = len(shape) if not boxes else boxes[0][0].shape[1]
    lo = np.full((tasks, rank), np.iinfo(np.int64).max)
    hi = np.full((tasks, rank), -1)
    any_full = np.zeros(tasks, bool)
    for a, b in boxes:
        full = np.all(b > a, axis=1)
        any_full |= full
        lo[full] = np.minimum(lo[full], a[full])
        hi[full] = np.maximum(hi[full], b[full])
    lo[~any_full] = 0
    hi[~any_full] = 0
    return lo, hi


def _whole_axis(op: Op, box: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(op, Sort | Cumulative):
        return box
    lo, hi = box[0].copy(), box[1].copy()
    full = np.all(hi > lo, axis=1)
    extent = op.space[op.axis] if isinstance(op, Cumulative) or op.top_k is None else op.top_k
    lo[full, op.axis], hi[full, op.axis] = 0, extent
    return lo, hi


def _part_counts(space: tuple[int, ...], axes: list[int], total: int) -> Iterator[tuple[int, ...]]:
    """Ways to cut a space into about ``total`` boxes: some axes whole and one more in parts, or two in parts."""
    ones = [1] * len(space)
    if total == 1 or not axes:
        yield tuple(ones)
        return
    found: dict[tuple[int, ...], None] = {}
    # Every axis a cut names coordinate by coordinate: batch × heads × chunks, in whatever order they lie.
    for whole, tasks in _whole_axes(space, axes, total):
        for a in axes:
            if a not in whole and total // tasks > 1:
                parts = [space[d] if d in whole else 1 for d in range(len(space))]
                parts[a] = _even_parts(space[a], total // tasks)
                found[tuple(parts)] = None
    for a in axes:
        for first in _divisors(space[a], total):
            for b in axes:
                if b != a and total // first > 1:
                    parts = list(ones)
                    parts[a], parts[b] = first, _even_parts(space[b], total // first)
                    found[tuple(parts)] = None
    yield from found


def _whole_axes(space: tuple[int, ...], axes: list[int], total: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Sets of axes of no more than ``total`` coordinates together, and how many those are; most axes first."""
    for count in range(len(axes) - 1, -1, -1):
        for whole in combinations(axes, count):
            tasks = math.prod(space[a] for a in whole)
            if tasks <= total:
                yield whole, tasks


def _divisors(extent: int, most: int) -> list[int]:
    found = [d for d in range(2, min(extent, most) + 1) if extent % d == 0]
    return [*found[-3:], *([min(extent, most)] if not found else [])]


def _even_parts(extent: int, total: int) -> int:
    """The number of parts, at most ``total`` and within a few per cent of it, that gives the most even pieces."""
    if extent <= total:
        return extent
    low = max(1, math.ceil(total * (1 - _IDLE)))
    return min(range(low, total + 1), key=lambda p: (-(-extent // p), -(-extent // p) * p - extent, -p))


def _grid(space: tuple[int, ...], parts: tuple[int, ...], steps: Sequence[int]) -> Grid:
    """The boxes; axes are cut at multiples of ``steps``."""
    edges = [
        np.arange(p + 1, dtype=np.int64) * (extent // step) // p * step
        for extent, p, step in zip(space, parts, steps, strict=True)
    ]
    los = np.meshgrid(*(e[:-1] for e in edges), indexing="ij") if space else []
    his = np.meshgrid(*(e[1:] for e in edges), indexing="ij") if space else []
    if not space:
        return np.zeros((1, 0), np.int64), np.zeros((1, 0), np.int64)
    return np.stack([x.ravel() for x in los], axis=1), np.stack([x.ravel() for x in his], axis=1)
