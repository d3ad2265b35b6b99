"""Places the tasks of a straight-line stretch on workers."""

from __future__ import annotations

import numpy as np

from jax_mpk.plan.cluster import Routine
from jax_mpk.plan.ir import Target
from jax_mpk.plan.tile import spread


class Placer:
    """Chooses a worker for every task, routine by routine.

    Routines with about as many tasks as workers are spread evenly in task order, so that equal cuts land on equal
    workers and element-wise chains need no hand-off. A routine of one task goes to the worker that produced most of
    what it reads, or else to the least loaded one.
    """

    def __init__(self, target: Target):
        self.workers = target.workers
        self.shortest = target.handoff
        self.load = np.zeros(target.workers)
        self._home: dict[int, int] = {}  # value → worker, for values written by a single task

    def place(self, routine: Routine) -> np.ndarray:
        """int32 worker of each task."""
        tasks = routine.cut.tasks
        if tasks == 1:
            workers = np.array([self._single(routine)], np.int32)
            self._home.update((v, int(workers[0])) for op in routine.ops for v in op.outputs)
        elif tasks >= self.workers:
            workers = spread(tasks, self.workers)
        else:
            # Leave idle the workers that have most to do already, but keep the order.
            busiest = np.argsort(self.load, kind="stable")[:tasks]
            workers = np.sort(busiest).astype(np.int32)
        # Even the shortest task holds its worker up for a while: many of them are spread, too.
        np.add.at(self.load, workers, np.maximum(routine.cut.seconds, self.shortest))
        return workers

    def _single(self, routine: Routine) -> int:
        weights: dict[int, int] = {}
        for touches in routine.cut.touches:
            for touch in touches:
                home = self._home.get(touch.value)
                if home is not None:
                    size = int(np.prod(touch.hi[0] - touch.lo[0]))
                    weights[home] = weights.get(home, 0) + size
        if weights:
            return max(sorted(weights), key=lambda w: weights[w])
        return int(np.argmin(self.load))
