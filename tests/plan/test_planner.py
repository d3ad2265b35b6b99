"""The planner on small functions: every plan is verified, and replayed in random order against jax.jit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.capture import capture
from jax_mpk.errors import ConfigError
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.graph.verify import verify_graph
from jax_mpk.plan import cluster, targets
from jax_mpk.plan.ir import MUST, READ, Plan
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.simulate import Simulator
from jax_mpk.plan.verify import verify_plan
from tests.references import quick_jit

Array = np.ndarray[Any, Any]
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]] = {}


def case(*avals: Any, donate: tuple[int, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        CASES[f.__name__] = (f, avals, donate)
        return f

    return register


def aval(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


INT = aval(dtype=jnp.int32)


@case(aval(4, 8), aval(8, 16))
def matmul(a, b):
    return jnp.tanh(a @ b) + 1


@case(aval(5))
def fori(x):
    return lax.fori_loop(0, 7, lambda i, c: c * 2 + i, x)


@case(aval(6, 5), aval(5))
def scan(xs, c):
    return lax.scan(lambda c, x: (c + x, c * x), c, xs)


@case(aval(), aval(3))
def while_loop(n, x):
    return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] + c[0]), (0.0, x))


@case(aval(3))
def flag_carried(x):
    return lax.while_loop(lambda c: c[0], lambda c: (c[1].sum() < 20, c[1] * 2 + 1), (x.sum() < 20, x))


@case(aval(3), aval(4), aval(3))
def permuted_carry(a, b, c):
    return lax.fori_loop(0, 3, lambda i, t: (t[2], t[1] + 1, t[0]), (a, b, c))


@case(INT, aval(4))
def switch(i, x):
    return lax.switch(i, [lambda x: x + 1, lambda x: x * 2, lambda x: x], x)


@case(aval(4), aval(4), donate=(0,))
def passed_through(a, b):
    return a, b, a + b, a


@case(aval(4), aval(4), donate=(0, 1))
def crossed_donation(a, b):
    return a + b, b - a


@case(aval(10, 4), aval(1, 4), INT, donate=(0,))
def cache_write(c, u, p):
    new = lax.dynamic_update_slice(c, u, (p, 0))
    return new.sum(), new


@case(aval(10, 4), aval(1, 4), INT, donate=(0,))
def cache_read_before_write(c, u, p):
    new = lax.dynamic_update_slice(c, u, (p, 0))
    return jnp.cumsum(c, 1), new


@case(aval(10, 4), aval(1, 4), INT, donate=(0,))
def cache_write_in_loop(c, u, p):
    return lax.fori_loop(0, 5, lambda i, c: lax.dynamic_update_slice(c, u + c.sum(), (p + i, 0)), c)


@case(aval(3, 4), aval(3, 4))
def nested_control(a, b):
    def body(i, c):
        a, b = c
        a = lax.fori_loop(0, i, lambda j, x: x + b, a)
        b = lax.cond(i % 2 == 0, lambda: b * 2, lambda: a)
        return a, b

    return lax.fori_loop(0, 4, body, (a, b))


@case(aval(2, 16, 64))
def rows(x):
    return jax.nn.softmax(x, -1), jnp.argmax(x, -1), jnp.sort(x, -1)


@case(aval(0, 4), aval(4))
def zero_size(a, b):
    return a + b, a.sum(0)


@case(aval(16, 16), aval(16))
def shared_operands(x, w):
    h = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1) * w
    return h @ x, h @ x.T, h + 1


@case(aval(6, 8), aval(8, 8), aval(8, 8), aval(4, 6, 8), INT, donate=(3,))
def stored_and_copied(x, w, u, cache, p):
    """A value stored by one routine that another, which recomputes its readers, takes from memory."""
    h = jnp.tanh(x @ w)
    cache = lax.dynamic_update_slice(cache, h[None] * 2, (p, 0, 0))
    s = jax.nn.softmax(h @ h.T + cache.sum(0)[:, :6], -1)
    return s @ h @ u, (s * s).sum(-1), h.sum(0), cache


def attention(q, k, v, cache_k, cache_v, pos):
    """One step of grouped-query attention over a cache: 2 KV heads of 3 queries each."""
    cache_k = lax.dynamic_update_slice(cache_k, k, (0, pos, 0, 0))
    cache_v = lax.dynamic_update_slice(cache_v, v, (0, pos, 0, 0))
    scores = jnp.einsum("bhgd,bshd->bhgs", q, cache_k) * 0.25
    scores = jnp.where(jnp.arange(256) <= pos, scores, -jnp.inf)
    out = jnp.einsum("bhgs,bshd->bhgd", jax.nn.softmax(scores, -1), cache_v)
    return out.reshape(1, 48) @ jnp.ones((48, 8)), cache_k, cache_v


ATTENTION = (aval(1, 2, 3, 8), *[aval(1, 1, 2, 8)] * 2, *[aval(1, 256, 2, 8)] * 2, INT)
CASES["attention"] = (attention, ATTENTION, (3, 4))


def plan_of(name: str, workers: int, tagged: bool = False) -> tuple[Plan, list[Array]]:
    """The plan, and the constants that come before the arguments."""
    f, avals, donate = CASES[name]
    captured = capture(jax.make_jaxpr(f)(*avals))
    graph = fuse(build_graph(captured.jaxpr, donated=frozenset(len(captured.consts) + i for i in donate)))
    return make_plan(graph, targets.cpu(workers, tagged)), [np.asarray(c) for c in captured.consts]


def planned(name: str, workers: int, tagged: bool = False) -> tuple[Plan, list[Array], list[Array]]:
    """The plan, its arguments, and the results of ``jax.jit``."""
    f, avals, _ = CASES[name]
    rng = np.random.default_rng([workers, *name.encode()])
    inputs = [np.asarray(rng.integers(0, 3, a.shape) - (a.dtype != jnp.int32), a.dtype) for a in avals]
    plan, consts = plan_of(name, workers, tagged)
    want = [np.asarray(x) for x in jax.tree.leaves(quick_jit(f)(*inputs))]
    return plan, consts + inputs, want


@pytest.mark.parametrize(
    ("workers", "tagged"), [(1, False), (2, False), (3, False), (8, False), (64, False), (3, True), (64, True)]
)
@pytest.mark.parametrize("name", CASES)
def test_plan_is_proved_and_computes(name: str, workers: int, tagged: bool) -> None:
    plan, inputs, want = planned(name, workers, tagged)
    verify_graph(plan.graph)
    verify_plan(plan)
    for seed in range(3):
        got = Simulator(plan, inputs, seed=seed, poison=seed, late=True).run()
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "aliases"),
    [
        ("passed_through", {0: 0}),
        ("cache_write", {1: 0}),
        ("cache_read_before_write", {1: 0}),
        ("cache_write_in_loop", {0: 0}),
        ("attention", {1: 3, 2: 4}),
    ],
)
def test_donated_arguments_are_updated_in_place(name: str, aliases: dict[int, int]) -> None:
    plan, _, _ = planned(name, 2)
    assert plan.aliases == aliases


def test_what_crosses_workers_is_tagged_where_it_may_be() -> None:
    plan, _, _ = planned("stored_and_copied", 8, tagged=True)
    graph, rows, worker = plan.graph, plan.accesses, plan.tasks.table["worker"]
    writers = {v: set(worker[rows.task[(rows.value == v) & (rows.kind == MUST)]]) for v in range(len(graph.values))}
    tagged = [v for v in writers if plan.value_storage[v] >= 0 and plan.storages[plan.value_storage[v]].tagged]
    assert tagged
    for v in tagged:
        # Program order alone would not do.
        readers = set(worker[rows.task[(rows.value == v) & (rows.kind == READ)]])
        assert len(readers | writers[v]) > 1
    # Results, arguments and what stays on one worker are as ever; nothing is tagged beyond the target's limit.
    assert all(storage.kind == "workspace" for storage in plan.storages if storage.tagged)
    small = replace(targets.cpu(8, tagged=True), tagged_bytes=4)
    assert not any(storage.tagged for storage in make_plan(graph, small).storages)


def test_attention_is_split_over_workers_and_merged_by_its_reader() -> None:
    plan, _, _ = planned("attention", 64)
    shapes = {plan.graph.values[v].shape for op in plan.ops for v in op.outputs}
    assert (4, 2, 3, 1, 8) in shapes  # 4 chunks of 64 keys × 6 rows
    unsplit, _, _ = planned("attention", 2)
    assert (4, 2, 3, 1, 8) not in {unsplit.graph.values[v].shape for op in unsplit.ops for v in op.outputs}


def test_masked_out_chunks_and_stale_rows_do_not_leak() -> None:
    plan, inputs, _ = planned("attention", 64)
    for pos in (0, 63, 64, 255):
        stale = [np.array(x) for x in inputs]
        for cache in stale[3:5]:
            cache[:, pos] = np.nan  # the row that is overwritten
        stale[5] = np.asarray(pos, np.int32)
        want = quick_jit(attention)(*stale)
        got = Simulator(plan, stale, seed=pos).run()
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_plan_size_does_not_depend_on_trip_counts() -> None:
    def counted(n: int) -> int:
        captured = capture(jax.make_jaxpr(lambda x: lax.fori_loop(0, n, lambda i, c: c + i, x))(aval(4)))
        return len(make_plan(fuse(build_graph(captured.jaxpr)), targets.cpu(2)).tasks.table)

    assert counted(3) == counted(10**6)


def test_planning_is_deterministic() -> None:
    first, _, _ = planned("nested_control", 8)
    second, _, _ = planned("nested_control", 8)
    assert np.array_equal(first.tasks.table, second.tasks.table)
    assert np.array_equal(first.tasks.wait_event, second.tasks.wait_event)
    assert first.storages == second.storages


@pytest.mark.parametrize("scale", [1, 2])
def test_many_pieces_of_one_array_stay_within_bounds(scale: int) -> None:
    def pieces(x: jax.Array) -> jax.Array:
        return jnp.stack([x[i] * scale if scale > 1 else x[i] for i in reversed(range(128))])

    captured = capture(jax.make_jaxpr(pieces)(aval(128, 8)))
    graph = fuse(build_graph(captured.jaxpr))
    plan = make_plan(graph, targets.cpu(2))
    verify_plan(plan)
    x = np.arange(128 * 8, dtype=np.float32).reshape(128, 8)
    (got,) = Simulator(plan, [x]).run()
    np.testing.assert_array_equal(got, x[::-1] * scale)
    # Slices are read in place, whatever the size of the program; a routine holds no more operators than it may.
    assert len(graph.block.ops) == (1 if scale == 1 else 129)
    assert max(len(routine.members) for routine in plan.routines) <= 64


def test_elements_of_large_values_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "moved", lambda *_: pytest.fail("looks where each element comes from"))
    captured = capture(jax.make_jaxpr(lambda x: jnp.sort(x.T))(aval(4000, 4000)))
    verify_plan(make_plan(fuse(build_graph(captured.jaxpr)), targets.H100))


def test_permuted_products_are_not_gathered_by_every_task_that_reads_them() -> None:
    def turned_between(x, w, v):
        y = jnp.einsum("bk,nk->bn", x, w).reshape(16, 64, 32).swapaxes(1, 2)
        return jnp.einsum("bk,nk->bn", y.reshape(16, 2048), v)

    avals = [
        aval(16, 512, dtype=jnp.bfloat16),
        aval(2048, 512, dtype=jnp.bfloat16),
        aval(4096, 2048, dtype=jnp.bfloat16),
    ]
    plan = make_plan(fuse(build_graph(capture(jax.make_jaxpr(turned_between)(*avals)).jaxpr)), targets.H100)
    assert [plan.ops[member.op].kind for member in plan.routines[-1].members] == ["contract"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("workers", 0), ("granule", -1), ("bandwidth", 0.0), ("flops", np.nan), ("scratch_bytes", -1), ("handoff", -1e-6)],
)
def test_targets_that_no_device_is_like(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'cpu-2' is like no device: {name}={value}"):
        replace(targets.cpu(2), **{name: value})
