"""From what a user calls a target to a :class:`~jax_mpk.plan.ir.Target`."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

from jax_mpk import config
from jax_mpk.errors import ConfigError
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Target
from jax_mpk.runtime.native import cuda_device

_GPUS = {target.name: target for target in vars(targets).values() if isinstance(target, Target)}
_MAX_WORKERS = 4096
#: What the drivers call GPUs that have a description. The number of SMs has to match too: there are smaller variants.
_KNOWN = {"NVIDIA H100 80GB HBM3": targets.H100, "NVIDIA H200": targets.H200}
#: Shared memory of an SM that is not left for local values, and the part of the rated bandwidth that can be read.
_RESERVED_BYTES = (227 << 10) - targets.H100.scratch_bytes
_READABLE = 0.92


def platform(target: Target) -> str:
    """JAX's name of the platform that a target belongs to."""
    return "cpu" if target.arch == "cpu" else "cuda"


def resolve(target: Target | str | None) -> Target:
    """The target that a name stands for.

    Args:
      target: a Target; ``"cpu"`` (a worker for each thread); ``"cpu-8"`` (eight workers, whatever the number of
        threads); either with ``"+tagged"`` behind it (tagged hand-offs); ``"cuda"`` (this machine's first GPU; an H100
        where there is none); the name of a GPU, such as ``"h100-sxm"``; or None: this machine's CPU.

    Raises:
      ConfigError: no such target.
    """
    if isinstance(target, Target):
        return target
    if target is None:
        return targets.cpu(config.current().threads)
    if isinstance(target, str):
        if target in _GPUS:
            return _GPUS[target]
        if target == "cuda":
            return from_device() or targets.H100
        name = target.removesuffix(targets.TAGGED)
        tagged = name != target
        kind, _, count = name.partition("-")
        if name == "cpu":
            return targets.cpu(config.current().threads, tagged)
        if kind == "cpu" and count.isdecimal() and 1 <= int(count) <= _MAX_WORKERS:
            return targets.cpu(int(count), tagged)
    known = ", ".join(["cpu", "cuda", f"cpu-1 … cpu-{_MAX_WORKERS}", f"these with {targets.TAGGED}", *_GPUS])
    raise ConfigError(f"target={target!r} is not known; known are {known}, and jax_mpk.Target objects")


@functools.cache
def from_device(ordinal: int = 0) -> Target | None:
    """The description of a GPU, as its driver tells it, or None: there is no such GPU."""
    device = cuda_device(ordinal)
    if device is None:
        return None
    known = _KNOWN.get(device["name"])
    if known is not None and known.workers == device["multiprocessors"]:
        return known
    major, minor = device["capability"]
    # Kernels use instructions of one architecture only, which is what the letter asks for.
    arch = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    bandwidth = _READABLE * device["peak_bandwidth"] or targets.H100.bandwidth
    return replace(
        targets.H100,
        name=re.sub(r"\W+", "-", device["name"]).lower(),
        arch=arch,
        workers=device["multiprocessors"],
        scratch_bytes=max(0, device["shared_bytes"] - _RESERVED_BYTES),
        l2_bytes=device["l2_bytes"],
        bandwidth=bandwidth,
    )
