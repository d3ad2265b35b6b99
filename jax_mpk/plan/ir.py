"""The Plan: tasks, events, per-worker queues and memory for one Graph on one target.

A *task* is the piece of a routine that one worker (an SM, or a virtual SM of the CPU executor) runs without waiting.
A *routine* is one or more operators computed together, task by task: the values between
them may be *local*, live in the worker's scratch memory and be recomputed by every task that needs them, which is how
a norm costs no phase of its own; all other outputs are stored. An *event* counts finished
tasks; a task waits for events.

Everything there can be tens of thousands of sits in NumPy arrays. A Plan is a value: planning another target makes
another Plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_mpk.errors import ConfigError
from jax_mpk.graph.bounds import Spans
from jax_mpk.graph.ir import Graph


@dataclass(frozen=True)
class Target:
    """The device a Plan is made for.

    Attributes:
      name: e.g. "cpu-2" or "h100-sxm".
      arch: "cpu" or a CUDA architecture such as "sm_90a".
      workers: SMs, or virtual SMs; every one of them runs a queue.
      scratch_bytes: scratch (shared) memory a task may use for local values.
      l2_bytes: last-level cache.
      bandwidth: read bandwidth of device memory, bytes per second, all workers together.
      cache_bandwidth: the same for bytes another worker reads too (last-level cache).
      flops: multiply-adds per second × 2, dense, in the fastest type the bodies use.
      handoff: seconds from one worker's signal to another's proceeding.
      task_overhead: seconds a task costs beyond its bytes and flops.
      granule: elements of a weight's row below which loads lose bandwidth; 0: it does not matter where rows are cut.
      tagged_bytes: size of the largest value that is handed over by tagged words; 0: none ever is. No task may read
        more than a quarter of that, or a sixteenth in elements of 8 and 16 bits: so much is better copied as it is.
      live_keys: attention reads only the keys that its mask leaves, in chunks cut at run time; else every chunk has its
        place and all keys are read.
      contracted_last: a contraction streams its weight best with the contracted axes innermost; else row-major order
        is as good as any.
    """

    name: str
    arch: str
    workers: int
    scratch_bytes: int
    l2_bytes: int
    bandwidth: float
    cache_bandwidth: float
    flops: float
    handoff: float
    task_overhead: float
    granule: int
    tagged_bytes: int
    contracted_last: bool = False
    live_keys: bool = False

    def __post_init__(self) -> None:
        positive = ("workers", "bandwidth", "cache_bandwidth", "flops")
        others = ("granule", "scratch_bytes", "l2_bytes", "tagged_bytes", "handoff", "task_overhead")
        wrong = [name for name in positive if not getattr(self, name) > 0]
        wrong += [name for name in others if not getattr(self, name) >= 0]
        if wrong:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in wrong)
            raise ConfigError(f"target {self.name!r} is like no device: {values}")

    def may_tag(self, size: int, itemsize: int, read: float) -> bool:
        """Whether a value may be handed over by tagged words.

        Args:
          size: its bytes.
          itemsize: bytes of an element.
          read: most bytes of it that a task reads.
        """
        most = self.tagged_bytes // (16 if itemsize <= 2 else 4)
        return itemsize <= TAGGED_ITEMSIZE and size <= self.tagged_bytes and read <= most


@dataclass(frozen=True)
class Storage:
    """Bytes that hold one value, or several values that take turns (loop carries, in-place updates).

    Attributes:
      kind: "input" (an argument's buffer), "output" (a result's buffer), or "workspace".
      index: argument or result number; -1 for workspace. An output that aliases a donated argument is one storage
        of kind "output" with ``argument`` set.
      argument: the aliased argument's number, or -1.
      offset: first byte within the workspace (0 for the other kinds).
      nbytes: size.
      tagged: each element carries a tag beside its payload, written with it; see :data:`TAGS`.
    """

    kind: str
    index: int
    argument: int
    offset: int
    nbytes: int
    tagged: bool = False


#: A task that reads a region of a tagged storage, other than what its own routine stores, starts when every element of
#: it carries the tag of this execution of the segment, ``1 + sequence mod TAGS``, where ``sequence`` counts the times
#: that the segment has run in this launch. A tag is never 0, so zeroed memory never matches.
#:
#: Each element is its own event and orders nothing but itself: what else the writer did before may still be invisible.
#: A tagged storage lies in the workspace and shares no byte with another, since nothing else would keep a reader from
#: seeing an overwritten word. It holds one value, of at most TAGGED_ITEMSIZE bytes an element (payload and tag are one
#: machine word), written as MUST and read within one segment.
TAGS = 65535
TAGGED_ITEMSIZE = 4


#: Stages of an operator. WHOLE computes boxes of the output over the whole reduced space. A reduction split over
#: workers has PARTIAL tasks (each a box of ``space + rspace``; writes accumulators to a partial storage of shape
#: ``(splits, *space)``) and FINISH tasks, which join the partial results in order of split and run the epilogue.
WHOLE, PARTIAL, FINISH = range(3)


@dataclass(frozen=True)
class Member:
    """One operator within a routine.

    Attributes:
      op: position of the operator in ``Plan.ops``.
      stage: WHOLE, PARTIAL or FINISH.
    """

    op: int
    stage: int = WHOLE


@dataclass(frozen=True)
class Routine:
    """Operators computed together, task by task.

    Every member's outputs are either all local or all stored. Over the routine's tasks, the boxes of a member with
    stored outputs partition its space (there may be several such members: independent siblings, or an Update whose
    rows the same task goes on to read); a member with local outputs may be computed by several tasks, each for
    the box its later members read. A task may read what an earlier member of its own stored, but nothing that
    another task of the same routine stores.

    Attributes:
      members: in data-flow order; the last one's outputs are stored.
      local_values: value ids held in scratch.
      local_offsets: byte offset in scratch of each local value.
      local_extents: extents its scratch array is laid out with (row-major); a task's own box may be smaller.
    """

    members: tuple[Member, ...]
    local_values: tuple[int, ...]
    local_offsets: tuple[int, ...]
    local_extents: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Split:
    """Partial accumulators of a reduction split over workers.

    Attributes:
      op: position in ``Plan.ops``.
      bounds: cut points of the first reduced axis, ``splits + 1`` of them, from 0 to its extent.
      storages: one per accumulator; shape ``(splits, *space)``, accumulator type.
    """

    op: int
    bounds: tuple[int, ...]
    storages: tuple[int, ...]


#: Access kinds. MUST writes every element of the box; MAY writes some of it, the others keep their values.
READ, MUST, MAY = range(3)

TASK = np.dtype([("routine", np.int32), ("worker", np.int32), ("box", np.int32)])


@dataclass(frozen=True)
class Tasks:
    """All tasks of a plan, in columns.

    Attributes:
      table: one TASK row per task; ``box`` is the row in ``boxes`` of its first member, the others follow.
      boxes: int64 [rows, 2, rank]: low and high corner (exclusive) over the member's output space (PARTIAL: over
        ``space + rspace``). An Update's task owns a box of the *output* and applies, in order, every update that
        falls into it, after copying that box of the base unless both share storage; a Sort or Cumulative box
        spans its whole axis. Unused axes hold [0, 1).
      wait_start, wait_event: CSR; events each task waits for before it starts.
      signal_start, signal_event: CSR; events each task adds one to when it has finished.
    """

    table: np.ndarray
    boxes: np.ndarray
    wait_start: np.ndarray
    wait_event: np.ndarray
    signal_start: np.ndarray
    signal_event: np.ndarray


@dataclass(frozen=True)
class Accesses:
    """What every task reads and writes in storages (local values excepted), in columns.

    A region is a box, whatever run-time scalars will be, and beside it the spans that these leave of it: an update's
    window, or what lies outside of it. A read counts where the value is used; elsewhere it may be fetched and dropped.
    Spans depend on stored values only, so that a symbol is one number for all tasks of a segment. A read and a write
    whose spans never meet need no order. Two writes do: what a write leaves of its box it may store again.

    Attributes:
      task: int32, ascending.
      value: int32 value id, or ``-1 - k`` for accumulator storage k of a split (``Split.storages`` flattened).
      kind: uint8, READ, MUST or MAY.
      box: int64 [rows, 2, rank]: low and high corner in the value's own axes; an empty box touches nothing.
      within: int32: position in ``spans``, or -1: the whole box.
      spans: regions known at run time only.
    """

    task: np.ndarray
    value: np.ndarray
    kind: np.ndarray
    box: np.ndarray
    within: np.ndarray
    spans: tuple[Spans, ...]


@dataclass(frozen=True)
class Segment:
    """Straight-line work: one queue of task ids per worker, ordered among workers only by events.

    Attributes:
      queues: int32 arrays, one per worker.
    """

    queues: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class LoopNode:
    """A loop every worker follows.

    Attributes:
      op: position of the Loop in ``Plan.ops``.
      cond: schedule that computes ``predicate``; () where ``trips`` is known.
      body: schedule of one round, the copies into the carry included.
      predicate: b1 scalar value read by every worker after ``cond``, or -1.
      trips: rounds, or -1.
    """

    op: int
    cond: Schedule
    body: Schedule
    predicate: int
    trips: int


@dataclass(frozen=True)
class BranchNode:
    """One of several schedules, chosen by an s32 scalar value every worker reads.

    Attributes:
      op: position of the Branch in ``Plan.ops``.
      index: the value; clamped to [0, len(arms)).
      arms: schedules.
    """

    op: int
    index: int
    arms: tuple[Schedule, ...]


#: Items run in order; between two items, and between two rounds of a loop, lies a barrier of all workers. A launch
#: begins and ends with one (the stream orders launches).
Schedule = tuple["Segment | LoopNode | BranchNode", ...]


@dataclass(frozen=True)
class Plan:
    """A Graph, placed.

    Attributes:
      graph: the graph planned (fused, with the copies loops and results need made explicit).
      ops: its operators, nested blocks included, in ``walk`` order; positions name them everywhere here.
      target: the device.
      storages: byte ranges; ``value_storage[v]`` is value v's, or -1 (local, or a loop/branch name without bytes).
      value_storage: int32 per value.
      workspace_bytes: size of the workspace result.
      aliases: result number → argument number sharing its buffer.
      routines, tasks, accesses, splits: see the classes.
      events: number of events; an event's threshold is the number of tasks that signal it, times the number of
        times its segment has run in this launch.
      schedule: the queues.
      scratch_bytes: most scratch any routine uses.
      notes: what was not fused or not recognised, and why, one sentence each; equal ones are repeated.
    """

    graph: Graph
    ops: tuple
    target: Target
    storages: tuple[Storage, ...]
    value_storage: np.ndarray
    workspace_bytes: int
    aliases: dict[int, int]
    routines: tuple[Routine, ...]
    tasks: Tasks
    accesses: Accesses
    splits: tuple[Split, ...]
    events: int
    schedule: Schedule
    scratch_bytes: int
    notes: tuple[str, ...] = ()
