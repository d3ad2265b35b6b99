"""What the encoder shares: operators that are alike have their code once."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jax_mpk.codegen.encode import encode
from tests.codegen.harness import plan_of


def test_equal_running_sums_share_code() -> None:
    x = np.ones((4, 100), np.float32)
    plan = plan_of(lambda x, y: (jnp.cumsum(x, 1), jnp.cumsum(y, 1)), x, x)
    assert len(plan.routines) == 2
    first, second = ([code for m in routine.members for _, code in m.codes] for routine in encode(plan).routines)
    assert len(first) == len(second) == 1
    assert first[0] is second[0]
