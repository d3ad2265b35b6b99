"""Local values in scratch: what a map makes of a large one lies in its place, where that is proved to be harmless."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mpk.errors import PlanVerificationError
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan, Routine
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.simulate import Simulator
from jax_mpk.plan.verify import verify_plan
from tests.plan.test_live import graph_of
from tests.plan.test_verify import edit, refused

ROWS, WIDTH, COLUMNS = 16, 512, 4096  # rows of 32 KB in f32


def normalized(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rewritten(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("bk,nk->bn", normalized(jnp.tanh(x)), w)


def turned(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("bk,nk->bn", jnp.tanh(normalized(jnp.tanh(x))[:, ::-1]), w)


def read_again(x: jax.Array, w: jax.Array) -> jax.Array:
    x = jnp.tanh(x)
    return jnp.einsum("bk,nk->bn", normalized(x), w) + jnp.tile(x, COLUMNS // WIDTH)


def plan_of(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Plan:
    avals = [jax.ShapeDtypeStruct((n, WIDTH), jnp.float32) for n in (ROWS, COLUMNS)]
    plan = make_plan(graph_of(function, avals), targets.H100)
    verify_plan(plan)
    return plan


def large(plan: Plan) -> tuple[Routine, list[int]]:
    """The only routine and the places of its large local values."""
    (routine,) = plan.routines
    places = [i for i, extents in enumerate(routine.local_extents) if extents == (ROWS, WIDTH)]
    assert len(places) > 1
    return routine, places


def laid_out(plan: Plan, offsets: list[int]) -> Plan:
    """The plan with the local values of its routine elsewhere."""
    (routine,) = plan.routines
    moved = replace(routine, local_offsets=tuple(offsets))
    return edit(plan, lambda d: d.routines.__setitem__(0, moved))


def test_a_map_takes_the_place_of_what_it_reads() -> None:
    plan = plan_of(rewritten)
    routine, places = large(plan)
    assert len({routine.local_offsets[i] for i in places}) == 1
    assert plan.scratch_bytes < 1.1 * ROWS * WIDTH * 4
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=(n, WIDTH)).astype(np.float32) for n in (ROWS, COLUMNS))
    (found,) = Simulator(plan, [x, w]).run()
    np.testing.assert_allclose(found, jax.jit(rewritten)(x, w), rtol=1e-4, atol=1e-4)


def test_it_does_not_begin_in_the_middle() -> None:
    plan = plan_of(rewritten)
    routine, (_, second) = large(plan)
    offsets = list(routine.local_offsets)
    offsets[second] += 64
    refused(replace(laid_out(plan, offsets), scratch_bytes=plan.scratch_bytes + 64), "overlap in scratch")


@pytest.mark.parametrize("function", [turned, read_again])
def test_what_is_read_elsewhere_or_later_keeps_its_place(function: Callable[..., jax.Array]) -> None:
    plan = plan_of(function)
    routine, places = large(plan)
    refusals = 0
    for a, b in combinations(places, 2):
        if routine.local_offsets[a] != routine.local_offsets[b]:
            offsets = list(routine.local_offsets)
            offsets[b] = offsets[a]
            try:
                verify_plan(laid_out(plan, offsets))
            except PlanVerificationError as error:
                assert "overlap in scratch" in str(error)
                refusals += 1
    assert refusals
