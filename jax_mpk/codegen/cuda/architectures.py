"""Which architectures have a body for which kind of task; docs/design.md has the table."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mpk.errors import TargetError
from jax_mpk.plan.ir import Target

#: Architectures that kernels are compiled for.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
#: Those with bulk copies and barriers that count bytes, without which nothing streams.
STREAMING = ("sm_90a", "sm_100a")


def check_architecture(target: Target) -> None:
    """Refuses targets that no kernel is compiled for.

    Raises:
      TargetError: naming those that there are.
    """
    if target.arch not in ARCHITECTURES:
        raise TargetError(f"kernels are compiled for {', '.join(ARCHITECTURES)}, and {target.name} is {target.arch}")


def check_streams(target: Target, streaming: Sequence[str]) -> None:
    """Refuses routines that stream rows where there is no body for that.

    Args:
      target: the device.
      streaming: labels of the routines.

    Raises:
      TargetError: naming them.
    """
    if streaming and target.arch not in STREAMING:
        raise TargetError(
            f"{target.arch} ({target.name}) has no code for contractions that stream their weights, which takes bulk "
            f"copies to shared memory ({', '.join(STREAMING)}): {'; '.join(dict.fromkeys(streaming))}. All other kinds "
            "of tasks have."
        )
