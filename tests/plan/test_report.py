"""Figures about plans against figures counted by hand, and the text of explain."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk.capture import capture
from jax_mpk.graph.build import build_graph
from jax_mpk.graph.fuse import fuse
from jax_mpk.plan import targets
from jax_mpk.plan.estimate import _union, task_seconds, timeline, traffic
from jax_mpk.plan.ir import READ, Member, Plan, Routine, Target
from jax_mpk.plan.planner import make_plan
from jax_mpk.plan.report import LARGE_BYTES, _routine_text, explain, plan_stats
from tests.plan.graphs import case, names

CPU = targets.cpu(8)


def plan_of(fn: Callable[..., Any], *args: Any, donated: tuple[int, ...] = (), target: Target = CPU) -> Plan:
    """Plans a function of arrays; arguments are arrays or (shape, dtype)."""
    avals = [jax.ShapeDtypeStruct(*a) if isinstance(a, tuple) else a for a in args]
    captured = capture(jax.make_jaxpr(fn)(*avals))
    assert not captured.consts
    return make_plan(fuse(build_graph(captured.jaxpr, donated=frozenset(donated))), target)


def f32(*shape: int) -> tuple[tuple[int, ...], Any]:
    return shape, jnp.float32


def s32(*shape: int) -> tuple[tuple[int, ...], Any]:
    return shape, jnp.int32


def test_bytes_of_a_chain() -> None:
    plan = plan_of(lambda x, a, b: jnp.tanh(x @ a) @ b, f32(1, 640), f32(640, 1280), f32(1280, 320))
    stats = plan_stats(plan)
    assert stats.weight_bytes == 4 * (640 + 640 * 1280 + 1280 * 320)
    assert stats.cache_bytes == 0
    assert stats.written_bytes == 4 * 320
    # Written once, read by each of eight workers.
    assert stats.activation_bytes == 9 * 4 * 1280
    assert stats.phases == 2
    assert stats.workers == 8
    assert stats.tasks == len(plan.tasks.table)
    assert stats.roofline_s == pytest.approx(stats.weight_bytes / CPU.bandwidth)
    assert stats.predicted_s == pytest.approx(stats.work_s + stats.handoff_s)
    assert stats.handoff_s == pytest.approx(CPU.handoff)
    assert stats.work_s > stats.roofline_s
    first, second = stats.routines
    assert (first.text, second.text) == ("contract 1×640×1280", "contract 1×1280×320")
    assert first.contraction and second.contraction
    # x is read by every worker; the second contraction's own operand is no argument.
    assert first.streamed_bytes == 4 * (8 * 640 + 640 * 1280)
    assert second.streamed_bytes == 4 * 1280 * 320
    assert (first.busy, first.imbalance) == (1.0, 0.0)
    assert (first.handoff, second.handoff) == ("counters", "result")
    assert stats.large_contractions == (first, second)


def test_tagged_hand_offs_count_like_events() -> None:
    chain = (lambda x, a, b: jnp.tanh(x @ a) @ b, f32(1, 640), f32(640, 1280), f32(1280, 320))
    counted, tagged = (plan_of(*chain, target=targets.cpu(8, tagged)) for tagged in (False, True))
    assert (counted.events, tagged.events) == (1, 0)
    first, second = plan_stats(tagged).routines
    assert (first.handoff, second.handoff) == ("tagged", "result")
    assert plan_stats(tagged).phases == plan_stats(counted).phases == 2
    # But for the tags, which double what every task waits for.
    more = plan_stats(tagged).predicted_s - plan_stats(counted).predicted_s
    assert 0 < more <= 2 * 2 * 1280 * 4 * 8 / CPU.cache_bandwidth
    (line,) = (line for line in explain(tagged, name="f", equations=3).splitlines() if "1×640×1280" in line)
    assert "  tagged  " in line


def test_time_of_one_task() -> None:
    lone = targets.cpu(1)
    plan = plan_of(lambda x: x + 1, f32(1 << 20), target=lone)
    stats = plan_stats(plan)
    assert stats.tasks == 1
    assert stats.handoff_s == 0
    assert stats.predicted_s == pytest.approx(2 * 4 * (1 << 20) / lone.bandwidth + lone.task_overhead)


def test_time_waits_for_the_slowest() -> None:
    """A task's time adds to the whole exactly where it is on the critical path."""
    plan = plan_of(lambda x, a, b: jnp.tanh(x @ a) @ b, f32(1, 640), f32(640, 1280), f32(1280, 320))
    seconds = task_seconds(plan, traffic(plan))
    before = timeline(plan, seconds)
    slow = seconds.copy()
    slow[0] += 1.0
    assert timeline(plan, slow).work_s == pytest.approx(before.work_s + 1.0, rel=1e-3)
    equal = timeline(plan, np.full(len(seconds), 3.0))
    assert (equal.work_s, equal.handoff_s) == (pytest.approx(6.0), pytest.approx(CPU.handoff))


def test_lookup_reads_rows_not_the_table() -> None:
    plan = plan_of(lambda table, at: table[at] * 2, f32(50_000, 64), s32(3))
    stats = plan_stats(plan)
    assert 3 * 4 * 64 <= stats.weight_bytes <= 3 * 4 * 64 + 3 * 4 * 64
    assert all(r.streamed_bytes < LARGE_BYTES for r in stats.routines)


def test_lookup_in_a_table_that_is_also_a_factor() -> None:
    plan = plan_of(lambda table, at: table[at] @ table.T, f32(1000, 64), s32(2))
    assert plan_stats(plan).weight_bytes == 4 * 1000 * 64 + 2 * 4


def _attend(cache: jax.Array, row: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    cache = lax.dynamic_update_slice(cache, row[None], (at, 0))
    return cache, cache @ row


def test_cache_in_place() -> None:
    stats = plan_stats(plan_of(_attend, f32(4096, 128), f32(128), s32(), donated=(0,)))
    assert stats.aliased == 1
    assert stats.cache_bytes == 4 * 4096 * 128
    assert stats.weight_bytes == 4 * 128 + 4
    # Only the row is written, wherever it falls.
    assert 4 * 128 + 4 * 4096 <= stats.written_bytes <= 8 * 4 * 128 + 4 * 4096
    assert "4.19 MB" not in explain(
        plan_of(_attend, f32(64, 128), f32(128), s32(), donated=(0,)), name="f", equations=9
    )


def test_cache_not_donated_is_copied() -> None:
    stats = plan_stats(plan_of(_attend, f32(4096, 128), f32(128), s32()))
    assert stats.aliased == 0
    assert stats.cache_bytes == 0
    assert stats.weight_bytes == 4 * 4096 * 128 + 4 * 128 + 4
    assert stats.written_bytes >= 4 * 4096 * 128


def _repeat(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)


def _until(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.while_loop(lambda x: x[0, 0] > 0, lambda x: jnp.tanh(x @ w), x)


def test_loops() -> None:
    known = plan_stats(plan_of(_repeat, f32(1, 512), f32(512, 512)))
    unknown = plan_stats(plan_of(_until, f32(1, 512), f32(512, 512)))
    weight = 4 * 512 * 512
    assert 5 * weight <= known.weight_bytes <= 5 * weight + 4 * 512
    assert weight <= unknown.weight_bytes <= weight + 4 * 512
    assert known.predicted_s > 5 * weight / CPU.bandwidth
    assert weight / CPU.bandwidth < unknown.predicted_s < known.predicted_s
    assert [r.times for r in known.routines if r.contraction] == [5]
    assert "only known at run time" in explain(plan_of(_until, f32(1, 512), f32(512, 512)), name="f", equations=4)


def test_branches_take_the_slowest_arm() -> None:
    def choose(n: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.cond(n > 0, lambda x: x @ w, lambda x: x[:, :8], x)

    stats = plan_stats(plan_of(choose, s32(), f32(1, 4096), f32(4096, 8)))
    assert stats.predicted_s > 4 * 4096 * 8 / CPU.bandwidth


@pytest.mark.parametrize("target", [targets.cpu(1), targets.cpu(3), targets.H100], ids=lambda t: t.name)
@pytest.mark.parametrize("name", names())
def test_every_feature(name: str, target: Target) -> None:
    """Bounds that hold for any plan."""
    plan = make_plan(fuse(case(name).graph), target)
    moved, stats = traffic(plan), plan_stats(plan)
    assert stats == plan_stats(plan)
    rows = plan.accesses
    whole = np.prod(rows.box[:, 1] - rows.box[:, 0], axis=1) * 8
    assert np.all((moved.nbytes >= 0) & (moved.nbytes <= whole))
    inputs = sum(int(np.prod(plan.graph.values[v].shape)) * 8 for v in plan.graph.inputs)
    runs = max((r.times for r in stats.routines), default=1)
    segments = 1 + len(plan.ops)
    assert stats.weight_bytes + stats.cache_bytes <= inputs * runs * segments
    assert stats.predicted_s == pytest.approx(stats.work_s + stats.handoff_s)
    heaviest = max((r.seconds for r in stats.routines), default=0.0)
    if not plan.notes and all(r.times for r in stats.routines):
        assert stats.work_s + stats.handoff_s >= heaviest * (1 - 1e-9)
    text = explain(plan, name=name, equations=7)
    assert text.startswith(f"{name}   1 custom call   7 equations → ")
    assert "nan" not in text and "inf " not in text
    assert len(text.splitlines()) <= 6 + len(stats.routines) + len(plan.notes)


def test_reads_of_workspace_are_no_weights() -> None:
    plan = plan_of(lambda x: (jnp.tanh(x) @ x.T) @ x, f32(64, 256))
    stats = plan_stats(plan)
    assert stats.weight_bytes == 4 * 64 * 256


def test_union_of_boxes() -> None:
    rng = np.random.default_rng(0)
    for rank in range(4):
        for count in (0, 1, 2, 7, 30):
            lo = rng.integers(0, 6, (count, rank))
            hi = lo + rng.integers(0, 4, (count, rank))
            seen = np.zeros((10,) * rank, bool)
            for a, b in zip(lo, hi):
                seen[tuple(map(slice, a, b))] = True
            assert _union(np.stack([lo, hi], axis=1)) == (int(seen.sum()) if count else 0)


def test_huge_grids_are_bounded() -> None:
    lo = np.random.default_rng(0).integers(0, 10_000, (3000, 2))
    boxes = np.stack([lo, lo + 1], axis=1)
    assert len(np.unique(lo, axis=0)) <= _union(boxes) <= 3000


# -- explain ---------------------------------------------------------------------------------------------------


def _layers(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
    for w in weights:
        y = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
        x = x + jnp.tanh(y @ w.T)
    return x


def _layers_plan(target: Target = targets.H100) -> Plan:
    weights = [jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)] * 6
    captured = capture(jax.make_jaxpr(_layers)(jax.ShapeDtypeStruct((1, 2048), jnp.bfloat16), weights))
    return make_plan(fuse(build_graph(captured.jaxpr)), target)


def test_explain_says_what_a_person_asks() -> None:
    plan = _layers_plan()
    stats = plan_stats(plan)
    text = explain(plan, name="step", equations=60)
    lines = text.splitlines()
    assert lines[0] == (
        f"step   1 custom call   60 equations → {len(plan.ops)} operators → {len(plan.routines)} routines → "
        f"{stats.tasks} tasks on 132 SMs   6 dependent phases, {plan.events} events"
    )
    # 6 × 2048 × 2048 × 2 bytes, and the vector.
    assert "reads 50.3 MB weights" in lines[1]
    assert "of 3.09 TB/s" in lines[1]
    assert re.search(r"predicted [\d.]+ µs = [\d.]+ µs bytes \+ 4 µs phases", lines[1])
    assert f"{stats.workspace_bytes / 1e3:.3g} kB workspace" in lines[3]
    assert "per SM" in lines[3]
    # Equal layers share a line, the user's.
    assert sum("test_report.py:" in line for line in lines) <= 3
    assert sum(int(n) for n in re.findall(r"test_report\.py:\d+ +(\d+) ×", text)) == 6
    assert "contract 1×2048×2048" in text
    assert lines[-1] == "  no notes"
    # Shares of the time add up to most of it.
    shares = [float(found) for found in re.findall(r"([\d.]+)% of the time", text)]
    assert 80 < sum(shares) <= 100.5


def test_explain_on_the_cpu_says_workers() -> None:
    text = explain(_layers_plan(targets.cpu(2)), name="step", equations=1)
    assert "1 equation →" in text
    assert "on 2 workers" in text
    assert "SM" not in text


def test_explain_repeats_notes_once() -> None:
    plan = dataclasses.replace(_layers_plan(), notes=("a cast has two readers", "a cast has two readers", "other"))
    text = explain(plan, name="step", equations=1)
    assert text.count("a cast has two readers") == 1
    assert "note: a cast has two readers (2 ×)" in text
    assert "no notes" not in text


def test_explain_notes_idle_and_uneven_workers() -> None:
    # A prime number of elements, so that the reduction has no equal parts.
    wide = plan_of(lambda x, w: x @ w, f32(1, 400_009), f32(400_009, 3))
    assert "38% of the workers busy" in explain(wide, name="f", equations=1)
    uneven = plan_of(lambda x, w: x @ w, f32(1, 40_000), f32(40_000, 9), target=targets.cpu(4))
    assert "is uneven" in explain(uneven, name="f", equations=1)


def test_explain_of_nothing() -> None:
    text = explain(plan_of(lambda x: x, f32(3), donated=(0,)), name="same", equations=0)
    assert "0 equations → 0 operators → 0 routines → 0 tasks" in text


def test_siblings_and_batches_in_the_text() -> None:
    def project(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x @ a, x @ b

    plan = plan_of(project, f32(1, 512), f32(512, 256), f32(512, 128))
    together = Routine((Member(0), Member(1)), (), (), ())
    assert _routine_text(plan, together) == "contract 1×512×(256+128)"
    batched = plan_stats(plan_of(lambda x, y: x @ y, f32(4, 1, 300), f32(4, 300, 200)))
    assert [r.text for r in batched.routines] == ["contract 4 × 1×300×200"]


def test_traffic_counts_reads_of_a_task_once_per_region() -> None:
    plan = plan_of(lambda x: x[:-1] * x[1:], f32(1001), target=targets.cpu(1))
    rows = plan.accesses
    reads = traffic(plan).nbytes[rows.kind == READ]
    assert reads.sum() <= 2 * 4 * 1000
    assert plan_stats(plan).weight_bytes == 4 * 1001
