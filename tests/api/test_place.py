"""Weights in the layouts that a call prefers: `jax_mpk.place`, `Format(Layout.AUTO)`, and arrays that lie elsewhere."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

import jax_mpk
from jax_mpk import place
from jax_mpk.errors import ConfigError
from jax_mpk.plan import targets
from jax_mpk.runtime import pipeline
from tests.api.support import assert_same, integers, operations, pointer
from tests.random_programs.check import Reference, disagreement, run_jit
from tests.random_programs.generate import generate

#: Runs on the CPU and wants its weights as a GPU does.
TARGET = dataclasses.replace(targets.cpu(4), contracted_last=True)
megakernelize = functools.partial(jax_mpk.megakernelize, target=TARGET)


def order(x: Any) -> tuple[int, ...]:
    return x.format.layout.major_to_minor


def stored(x: jax.Array, *layout: int) -> jax.Array:
    return jax.device_put(x, Format(Layout(layout), x.sharding))


def layer(params, cache, x, pos):
    """Whole numbers, so that results are exact: heads, a cache, a bias, a tied embedding."""
    h = x + params["embed"][pos]
    q = jnp.einsum("td,dhk->thk", h, params["q"])
    h = jnp.einsum("thk,hkd->td", jnp.clip(q, -2, 2), params["o"])
    h = jnp.clip(jnp.clip(h, -1, 1) @ params["up"] + params["bias"], -1, 1) @ params["down"]
    cache = jax.lax.dynamic_update_slice(cache, jnp.clip(h, -3, 3), (pos, 0))
    return h + cache.sum(0), (h @ params["embed"].T).astype(jnp.int32), cache


def parameters(dtype: Any = np.float32) -> dict[str, jax.Array]:
    shapes = {
        "embed": (96, 64),
        "q": (64, 4, 16),
        "o": (4, 16, 64),
        "up": (64, 80),
        "bias": (80,),
        "down": (80, 64),
    }
    return {name: integers(i, *shape, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


PARAMS = parameters()
BEST = {"embed": (0, 1), "q": (1, 2, 0), "o": (2, 0, 1), "up": (1, 0), "bias": (0,), "down": (1, 0)}
X = integers(7, 2, 64)
POS = jnp.int32(3)


def cache() -> jax.Array:
    return integers(8, 16, 64)


def moved() -> tuple[Any, dict[str, jax.Array]]:
    """A new function, and the parameters where it wants them."""
    step = megakernelize(lambda *args: layer(*args), donate_argnums=1)
    return step, place(step, PARAMS, cache(), X, POS)[0]


def declared(compiled: Any) -> list[str]:
    """Operand layouts of the custom calls in a compiled function that are not row-major."""
    found = re.findall(r"operand_layout_constraints=\{(.*?)\}, (?:output|api)", compiled.as_text())
    assert found
    layouts = [layout for call in found for layout in re.findall(r"\{([\d,]+)\}", call)]
    return [x for x in layouts if x != ",".join(map(str, reversed(range(x.count(",") + 1))))]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[pipeline.Stages]:
    """What is compiled during the test."""
    made: list[pipeline.Stages] = []
    monkeypatch.setattr(pipeline, "_observers", [made.append])
    return made


def test_place_moves_what_contractions_read() -> None:
    step = megakernelize(layer, donate_argnums=1)
    kept = cache()
    params, same_cache, same_x, same_pos = place(step, PARAMS, kept, X, POS)
    assert {name: order(x) for name, x in params.items()} == BEST
    assert same_cache is kept and same_x is X and same_pos is POS
    assert params["embed"] is PARAMS["embed"] and params["bias"] is PARAMS["bias"]
    for name, x in params.items():
        assert_same(x, PARAMS[name])
        assert x.sharding == PARAMS[name].sharding
    again = place(step, params, kept, X, POS)[0]
    assert all(again[name] is params[name] for name in params)


def test_placed_and_unplaced_arguments_agree(compiled: list[pipeline.Stages]) -> None:
    expected = jax.jit(layer)(PARAMS, cache(), X, POS)
    step, params = moved()
    assert not compiled
    for given, plans in ((params, 1), (PARAMS, 2), (params, 2)):
        mine = cache()
        where = pointer(mine)
        result = step(given, mine, X, POS)
        assert_same(result, expected)
        assert mine.is_deleted() and pointer(result[2]) == where
        assert len(compiled) == plans
    mixed = {**params, "up": PARAMS["up"]}
    assert_same(step(mixed, cache(), X, POS), expected)
    assert len(compiled) == 3


def test_calls_do_not_ask_layouts_how_xla_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Layout] = []
    write = Layout._to_xla_layout

    def count(layout: Layout, dtype: Any) -> Any:
        asked.append(layout)
        return write(layout, dtype)

    monkeypatch.setattr(Layout, "_to_xla_layout", count)
    step, params = moved()
    expected = jax.jit(layer)(PARAMS, cache(), X, POS)
    for _ in range(2):
        assert_same(step(params, cache(), X, POS), expected)
    asked.clear()
    assert_same(step(params, cache(), X, POS), expected)
    assert not asked


def test_nothing_is_copied() -> None:
    step, params = moved()
    for given, count in ((params, 4), (PARAMS, 0)):
        eager = step.lower(given, cache(), X, POS).compile()
        jitted = jax.jit(step, donate_argnums=1).lower(given, cache(), X, POS).compile()
        for made in (eager, jitted):
            assert operations(made) == ["custom-call"]
            assert len(declared(made)) == count


def test_stages_are_those_of_the_call() -> None:
    step, params = moved()
    lowered = step.lower(params, cache(), X, POS)
    assert [x for x in lowered.graph.layouts if x is not None] == [(1, 0), (2, 0, 1), (1, 2, 0), (1, 0)]
    assert "axes 1,2,0 of the argument" in lowered.as_text("graph")
    assert_same(lowered.compile()(params, cache(), X, POS), jax.jit(layer)(PARAMS, cache(), X, POS))
    assert step.lower(PARAMS, cache(), X, POS).graph.layouts == ()
    assert step.explain(params, cache(), X, POS)


def test_auto_reports_what_place_does() -> None:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, cache(), X, POS))
    made = jax.jit(megakernelize(layer), in_shardings=Format(Layout.AUTO)).lower(*shapes).compile()
    formats = made.input_formats[0]
    assert {name: x.layout.major_to_minor for name, x in formats[0].items()} == BEST
    args = jax.tree.map(jax.device_put, (PARAMS, cache(), X, POS), formats)
    assert_same(made(*args), jax.jit(layer)(PARAMS, cache(), X, POS))


def test_given_formats_are_declared() -> None:
    step, params = moved()
    formats = jax.tree.map(lambda x: x.format, (params, cache(), X, POS))
    jitted = jax.jit(step, in_shardings=formats, donate_argnums=1)
    made = jitted.lower(params, cache(), X, POS).compile()
    assert operations(made) == ["custom-call"]
    assert len(declared(made)) == 4


def test_the_cpu_takes_weights_as_they_are() -> None:
    step = jax_mpk.megakernelize(layer)
    args = PARAMS, cache(), X, POS
    placed = place(step, *args)
    assert all(a is b for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(args), strict=True))
    _, params = moved()
    assert_same(step(params, *args[1:]), jax.jit(layer)(*args))
    assert operations(step.lower(params, *args[1:]).compile()) == ["custom-call"]


def test_shapes_get_formats() -> None:
    step = megakernelize(layer, donate_argnums=1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, cache(), X, POS))
    params, *rest = place(step, *shapes)
    assert all(order(params[name]) == BEST[name] for name in ("q", "o", "up", "down"))
    assert [x for x in step.lower(params, *rest).graph.layouts if x is not None] == [
        BEST[k] for k in ("down", "o", "q", "up")
    ]


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_of_arrays_that_lie_anyhow(seed: int) -> None:
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        program = generate(seed, "exact", 8)
        given = program.arrays()
        (expected,) = run_jit(program.function(), given)
        args = [stored(x, *map(int, rng.permutation(x.ndim))) if x.ndim else x for x in map(jax.device_put, given)]
        got = [np.asarray(x) for x in megakernelize(program.function())(*args)]
        wrong = disagreement(program, Reference(given, expected, [None] * len(got), [0.0] * len(got)), got)
    assert wrong is None, wrong


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.bfloat16, jnp.float16, jnp.float32])
def test_element_types(dtype: Any) -> None:
    def step(x, w, b):
        return x @ w + b

    w = (integers(0, 80, 96) % 3).astype(dtype)
    x, b = (integers(1, 2, 80) % 3).astype(dtype), integers(2, 96).astype(dtype)
    mpk = megakernelize(step)
    placed = place(mpk, x, w, b)[1]
    assert order(placed) == (1, 0)
    assert_same(mpk(x, placed, b), jax.jit(step)(x, w, b))


def test_any_layout_that_can_be_indexed_is_taken_as_it_is() -> None:
    step = megakernelize(lambda table, ids: table[ids] * 2)
    table, ids = stored(integers(0, 64, 48), 1, 0), jnp.arange(3)
    assert_same(step(table, ids), table[ids] * 2)
    assert operations(step.lower(table, ids).compile()) == ["custom-call"]
    assert place(step, table, ids)[0].format == integers(0, 64, 48).format


def test_what_cannot_be_permuted_is_copied_first() -> None:
    step = megakernelize(lambda x, w: (x @ w, w))
    w = stored(integers(0, 64, 96), 1, 0)
    assert_same(step(X, w), (X @ w, w))
    donating = megakernelize(lambda x, w: (x @ w, w + 1), donate_argnums=1)
    expected = X @ w, w + 1
    assert_same(donating(X, w), expected)
    assert w.is_deleted()


def test_empty_arrays_are_declared_in_their_default_order() -> None:
    """XLA would stop with a division by zero here (see `movable`)."""
    step = megakernelize(lambda x, empty: (x + 1, empty + 1))
    empty = stored(integers(0, 0, 7), 1, 0)
    assert order(empty) == (1, 0)
    assert_same(step(X, empty), (X + 1, empty + 1))
    assert not declared(step.lower(X, empty).compile())


def test_axes_of_size_one() -> None:
    step = megakernelize(lambda x, w: jnp.einsum("td,adbk->tbk", x, w))
    w = integers(0, 1, 64, 1, 96)
    placed = place(step, X, w)[1]
    assert order(placed).index(1) == 3
    assert_same(step(X, placed), jnp.einsum("td,adbk->tbk", X, w))


def test_keyword_and_static_arguments() -> None:
    def step(x, w, *, scale, times):
        return x @ w * scale * times

    mpk = megakernelize(step, static_argnames="times")
    w = integers(0, 64, 96)
    (x, placed), named = place(mpk, X, w, scale=jnp.float32(2), times=3)
    assert order(placed) == (1, 0) and x is X
    assert_same(mpk(x, placed, **named), step(X, w, scale=2, times=3))
    (x,), named = place(mpk, X, w=np.asarray(w), scale=2.0, times=3)
    assert order(named["w"]) == (1, 0) and named["times"] == 3


def test_methods() -> None:
    class Model:
        @megakernelize(static_argnums=0)
        def step(self, x, w):
            return x @ w

    model = Model()
    x, w = place(model.step, X, integers(0, 64, 96))
    assert order(w) == (1, 0)
    assert_same(model.step(x, w), X @ w)


def test_place_needs_a_megakernel_and_arrays() -> None:
    with pytest.raises(ConfigError, match="is not a megakernelized function"):
        place(layer, PARAMS, cache(), X, POS)
    step = megakernelize(layer)
    with pytest.raises(ConfigError, match=r"outside jax\.jit"):
        jax.jit(lambda x: place(step, PARAMS, cache(), x, POS)[2])(X)


def test_split_functions() -> None:
    def fn(x, w, v):
        y = jax.lax.complex(x @ w, x @ w)  # no megakernel holds complex numbers
        return jnp.abs(y.real) @ v

    step = megakernelize(fn, on_unsupported="split")
    w, v = integers(0, 64, 96), integers(1, 96, 64)
    placed = place(step, X, w, v)
    assert [order(x) for x in placed] == [(0, 1), (1, 0), (1, 0)]
    assert_same(step(*placed), jax.jit(fn)(X, w, v))
    assert len(declared(step.lower(*placed).compile())) == 2
    assert [k.graph.layouts for k in step.lower(*placed).kernels] == [(None, (1, 0)), (None, (1, 0))]


# -- under transformations -----------------------------------------------------------------------------------------


def twice(step: Callable[..., Any], params: Any, state: Any) -> Any:
    return step(params, step(params, state, X, POS)[2], X, POS)


def loop(step: Callable[..., Any], params: Any, state: Any) -> Any:
    return jax.lax.fori_loop(0, 3, lambda i, s: step(params, s, X, POS)[2], state)


def scanned(step: Callable[..., Any], params: Any, state: Any) -> Any:
    return jax.lax.scan(lambda s, x: (step(params, s, x, POS)[2], x), state, jnp.stack([X, X + 1]))


def while_carry(step: Callable[..., Any], params: Any, state: Any) -> Any:
    """The weights are carried along."""

    def body(s):
        return s[0] + 1, s[1], step(s[1], s[2], X, POS)[2]

    return jax.lax.while_loop(lambda s: s[0] < 3, body, (0, params, state))[2]


def chosen(step: Callable[..., Any], params: Any, state: Any) -> Any:
    return jax.lax.cond(state[0, 0] > -100, lambda: step(params, state, X, POS)[2], lambda: state)


def nested(step: Callable[..., Any], params: Any, state: Any) -> Any:
    return jax.jit(lambda *args: jax.jit(step)(*args))(params, state, X, POS)


FORMS = [twice, loop, scanned, while_carry, chosen, nested]


@pytest.mark.parametrize("form", FORMS)
def test_under_jit(form: Callable[..., Any]) -> None:
    step, params = moved()
    expected = jax.jit(lambda p, s: form(layer, p, s))(PARAMS, cache())
    run = jax.jit(lambda p, s: form(step, p, s), donate_argnums=1)
    assert_same(run(params, cache()), expected)
    made = run.lower(params, cache()).compile()
    assert len(declared(made)) == 4 * (2 if form is twice else 1)
    # Copies of anything but what is updated and counted.
    assert not re.findall(
        r" = f32\[(?:64,4,16|4,16,64|64,80|80,64|96,64)\]\S* (?:copy|transpose|fusion)\(", made.as_text()
    )
    assert_same(run(PARAMS, cache()), expected)
    assert not declared(run.lower(PARAMS, cache()).compile())


@pytest.mark.parametrize("form", FORMS)
def test_closed_over(form: Callable[..., Any]) -> None:
    step, params = moved()
    expected = jax.jit(lambda s: form(layer, PARAMS, s))(cache())
    assert_same(form(step, params, cache()), expected)
    whole = megakernelize(lambda s: form(layer, params, s))
    assert_same(whole(cache()), expected)
    assert len(declared(whole.lower(cache()).compile())) == 4


def test_vmap() -> None:
    step, params = moved()
    caches, xs = jnp.stack([cache(), cache() + 1]), jnp.stack([X, X - 1])
    expected = jax.vmap(layer, in_axes=(None, 0, 0, None))(PARAMS, caches, xs, POS)
    batched = jax.vmap(step, in_axes=(None, 0, 0, None))
    assert_same(jax.jit(batched)(params, caches, xs, POS), expected)
    made = jax.jit(batched, donate_argnums=1).lower(params, caches, xs, POS).compile()
    assert operations(made) == ["custom-call"]
    assert len(declared(made)) == 4
    assert_same(batched(params, caches, xs, POS), expected)


def test_shard_map() -> None:
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    step = megakernelize(lambda x, w: x @ w)
    w = integers(0, 64, 96)
    spread = jax.device_put(w, Format(Layout((1, 0)), jax.sharding.NamedSharding(mesh, spec(None, "i"))))
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec(None, "i")), out_specs=spec(None, "i")))
    x = jax.device_put(X, jax.sharding.NamedSharding(mesh, spec()))
    np.testing.assert_array_equal(run(x, spread), X @ w)
    made = run.lower(x, spread).compile()
    assert declared(made) == ["0,1"]
    assert operations(made) == ["custom-call"]


def test_export() -> None:
    step, params = moved()
    args = params, cache(), X, POS
    exported = jax.export.export(jax.jit(step), disabled_checks=jax_mpk.export_checks())(*args)
    again = jax.export.deserialize(exported.serialize())
    expected = jax.jit(layer)(PARAMS, cache(), X, POS)
    assert_same(again.call(*args), expected)
    assert_same(again.call(PARAMS, *args[1:]), expected)


def test_first_call_plans_once(compiled: list[pipeline.Stages]) -> None:
    step = megakernelize(lambda *args: layer(*args), donate_argnums=1)
    step(PARAMS, cache(), X, POS)
    step(PARAMS, cache(), X, POS)
    assert len(compiled) == 1
