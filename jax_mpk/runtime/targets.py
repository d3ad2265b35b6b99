"""From what a user calls a target to a :class:`~jax_mpk.plan.ir.Target`."""

from __future__ import annotations

from jax_mpk import config
from jax_mpk.errors import ConfigError
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Target

_GPUS = {target.name: target for target in vars(targets).values() if isinstance(target, Target)}
_MAX_WORKERS = 4096


def platform(target: Target) -> str:
    """JAX's name of the platform that a target belongs to."""
    return "cpu" if target.arch == "cpu" else "cuda"


def resolve(target: Target | str | None) -> Target:
    """The target that a name stands for.

    Args:
      target: a Target; ``"cpu"`` (a worker for each thread); ``"cpu-8"`` (eight workers, whatever the number of
        threads); either with ``"+tagged"`` behind it (tagged hand-offs); the name of a GPU, such as ``"h100-sxm"``;
        or None: this machine's CPU.

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
        name = target.removesuffix(targets.TAGGED)
        tagged = name != target
        kind, _, count = name.partition("-")
        if name == "cpu":
            return targets.cpu(config.current().threads, tagged)
        if kind == "cpu" and count.isdecimal() and 1 <= int(count) <= _MAX_WORKERS:
            return targets.cpu(int(count), tagged)
    known = ", ".join(["cpu", f"cpu-1 … cpu-{_MAX_WORKERS}", f"these with {targets.TAGGED}", *_GPUS])
    raise ConfigError(f"target={target!r} is not known; known are {known}, and jax_mpk.Target objects")
