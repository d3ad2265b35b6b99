"""Named targets. A device is described here or read from the driver; planning needs none to be present."""

from __future__ import annotations

from dataclasses import replace

from jax_mpk.plan.ir import Target

#: Ends the name of a CPU target with tagged hand-offs.
TAGGED = "+tagged"


def cpu(workers: int, tagged: bool = False) -> Target:
    """The CPU executor. Rates are those of a common two-core server slice.

    Args:
      workers: virtual SMs.
      tagged: hand values over by tagged words wherever that is possible, and cut attention at run time, as for a GPU.
        The executor gains nothing from it; tests do.
    """
    return Target(
        name=f"cpu-{workers}" + (TAGGED if tagged else ""),
        arch="cpu",
        workers=workers,
        scratch_bytes=1 << 20,
        l2_bytes=1 << 20,
        bandwidth=20e9,
        cache_bandwidth=80e9,
        flops=100e9,
        handoff=1.5e-6,
        task_overhead=0.5e-6,
        granule=0,
        tagged_bytes=1 << 20 if tagged else 0,
        live_keys=tagged,
    )


#: One H100 SXM: 132 SMs; bandwidth is what 16 KB bulk copies read on it.
H100 = Target(
    name="h100-sxm",
    arch="sm_90a",
    workers=132,
    scratch_bytes=176 << 10,
    l2_bytes=50 << 20,
    bandwidth=3.09e12,
    cache_bandwidth=6e12,
    flops=800e12,
    handoff=0.8e-6,
    task_overhead=0.05e-6,
    granule=64,
    tagged_bytes=512 << 10,
    contracted_last=True,
    live_keys=True,
)

#: One H200 SXM: the same chip with faster memory; its rated bandwidth at the H100's share of what can be read.
H200 = replace(H100, name="h200-sxm", bandwidth=4.4e12)
