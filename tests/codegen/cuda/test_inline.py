"""Maps computed where they are read give the same results."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.codegen.cuda.inline import inline_members
from jax_mpk.graph import dtypes
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.fuse_maps import MAX_NODES, programs
from jax_mpk.graph.ir import Block, Graph, Nest, Op, Update
from jax_mpk.graph.reference import evaluate
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan
from jax_mpk.plan.planner import make_plan
from tests.codegen.cuda.support import boxes_of, planned
from tests.codegen.golden.text import plan
from tests.plan import graphs

#: Without loops and branches, so that a routine's operators can be put back into one list.
STRAIGHT = ("chain", "contraction", "diamond", "in_place", "norm", "pairs", "reduction", "scatter", "temporaries")


def members(made: Plan, routine: int) -> list[Op | None]:
    _, boxes = boxes_of(made, routine)
    return inline_members(made, made.routines[routine], boxes)


def inlined(made: Plan) -> tuple[Graph, int]:
    """The graph of what every routine still does, and how many maps are gone."""
    ops = [op for routine in range(len(made.routines)) for op in members(made, routine)]
    kept = tuple(op for op in ops if op is not None)
    return replace(made.graph, block=Block(kept, made.graph.block.results)), len(ops) - len(kept)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", STRAIGHT)
def test_same_results(name: str, fused: bool) -> None:
    case = graphs.case(name)
    made = make_plan(fuse(case.graph) if fused else case.graph, targets.H100)
    graph, _ = inlined(made)
    for inputs, expected in case.samples:
        for got, want in zip(evaluate(graph, inputs), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_programs_stay_small() -> None:
    """Every level of a scan reads the one before several times: written out, each would be a multiple of it."""

    def join(a, b):
        return a[0] * b[0] % 101, (a[1] * b[0] + b[1]) % 101

    x = jax.ShapeDtypeStruct((300,), jnp.int32)
    made = planned(lambda x: lax.associative_scan(join, (x % 7, x)), x)
    for routine in range(len(made.routines)):
        for op in members(made, routine):
            # Beyond the limit every map may still add a tenth.
            assert op is None or all(len(expr.nodes) <= 2 * MAX_NODES for expr in programs(op))


@pytest.mark.parametrize("name", ["attention", "streamed"])
def test_same_results_of_the_golden_samples(name: str) -> None:
    made = plan(name)
    graph, gone = inlined(made)
    assert gone or name == "streamed"
    rng = np.random.default_rng(0)
    inputs = []
    for v in made.graph.inputs:
        value = made.graph.values[v]
        drawn = rng.standard_normal(value.shape) if dtypes.is_float(value.dtype) else np.full(value.shape, 77)
        inputs.append(drawn.astype(dtypes.to_numpy(value.dtype)))
    for got, want in zip(evaluate(graph, inputs), evaluate(made.graph, inputs), strict=True):
        np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=2e-2, atol=1e-4)


def test_nothing_reads_what_is_gone() -> None:
    made = plan("attention")
    for number in range(len(made.routines)):
        ops = members(made, number)
        gone = {v for m, op in zip(made.routines[number].members, ops) if op is None for v in made.ops[m.op].outputs}
        assert gone <= set(made.routines[number].local_values)
        for op in ops:
            if op is not None:
                assert gone.isdisjoint(op.operands)
                assert not isinstance(op, Update) or op.base not in gone


def test_a_factor_that_costs_something_is_no_part_of_a_contraction() -> None:
    """Each element of a factor is read by every output."""

    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.exp(x) @ w

    made = planned(step, jax.ShapeDtypeStruct((1, 256), jnp.float32), jax.ShapeDtypeStruct((256, 4096), jnp.float32))
    shared = [r for r in range(len(made.routines)) if len(made.routines[r].members) > 1]
    assert shared
    for number in shared:
        assert all(op is not None for op in members(made, number))


def test_a_value_the_routine_overwrites_is_read_before() -> None:
    """What is computed where it is read must find its operands as they were."""

    def step(cache: jax.Array, x: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        old = cache[0] * 2
        return lax.dynamic_update_slice(cache, (x + 1)[None], (at, 0)), old

    f32 = jnp.float32
    avals = (jax.ShapeDtypeStruct((8, 16), f32), jax.ShapeDtypeStruct((16,), f32), jax.ShapeDtypeStruct((), jnp.int32))
    made = planned(step, *avals, donated=frozenset({0}))
    for number, routine in enumerate(made.routines):
        local = set(routine.local_values)
        stored = {int(made.value_storage[v]) for m in routine.members for v in made.ops[m.op].outputs if v not in local}
        for member, op in zip(routine.members, members(made, number), strict=True):
            before = made.ops[member.op]
            if op is None:
                assert isinstance(before, Nest)
                assert stored.isdisjoint(int(made.value_storage[v]) for v in before.operands if v not in local)
