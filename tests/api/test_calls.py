"""Eager calls: arguments, results, caching and errors are those of jax.jit."""

import copy
import dataclasses
import functools
import inspect
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk import megakernelize
from jax_mpk.runtime import dispatch, jax_internals
from tests.api.support import assert_same, integers


def test_result_equals_jit() -> None:
    def f(x, w):
        return jnp.maximum(x @ w, 0) + 1

    x, w = integers(0, 3, 5), integers(1, 5, 4)
    assert_same(megakernelize(f)(x, w), jax.jit(f)(x, w))


def test_decorator_with_and_without_arguments() -> None:
    @megakernelize
    def plain(x):
        """Adds one."""
        return x + 1

    @megakernelize(static_argnames="n")
    def with_options(x, n):
        return x * n

    x = integers(0, 4)
    assert_same(plain(x), x + 1)
    assert_same(with_options(x, n=3), x * 3)
    assert plain.__name__ == "plain" and plain.__doc__ == "Adds one."
    assert "plain" in repr(plain)


def test_looks_like_the_function() -> None:
    def f(x: float, y: float = 2.0, *, n: int = 3) -> float:
        """Doc."""
        return x * y * n

    compiled, reference = megakernelize(f, static_argnames="n"), jax.jit(f, static_argnames="n")
    assert inspect.signature(compiled) == inspect.signature(f)
    assert compiled.__wrapped__ is f and isinstance(compiled, jax.stages.Wrapped)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        assert getattr(compiled, name) == getattr(reference, name)

    twice = megakernelize(functools.partial(functools.partial(f, 1.0), n=2))
    assert twice.__name__ == "f"
    assert_same(twice(), reference(1.0, n=2))

    class Scale:
        def __call__(self, x):
            return x * 2

    assert megakernelize(Scale()).__name__ == "Scale"
    assert_same(megakernelize(Scale())(3.0), jax.jit(Scale())(3.0))


def test_keyword_arguments_and_defaults() -> None:
    def f(x, y=2.0, *, scale=3, shift):
        return x * y * scale + shift

    x = integers(0, 4)
    compiled, reference = megakernelize(f), jax.jit(f)
    assert_same(compiled(x, shift=1), reference(x, shift=1))
    assert_same(compiled(x, 4.0, shift=x), reference(x, 4.0, shift=x))
    assert_same(compiled(shift=x, x=x, scale=x), reference(shift=x, x=x, scale=x))


def test_arguments_called_like_those_of_methods() -> None:
    def f(self, args):
        return self * 2 + args

    x = integers(0, 4)
    compiled, expected = megakernelize(f), jax.jit(f)(self=x, args=x)
    for call in (compiled, jax.jit(compiled)):
        assert_same(call(self=x, args=x), expected)
    for look in (compiled.eval_shape, compiled.explain, compiled.lower, compiled.trace):
        look(self=x, args=x)


def test_variable_arguments() -> None:
    def f(*xs, **named):
        return sum(xs) + named["a"] - named["b"]

    x = integers(0, 4)
    assert_same(megakernelize(f)(x, 2, x, b=x, a=3), jax.jit(f)(x, 2, x, b=x, a=3))


class Pair(NamedTuple):
    first: Any
    second: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["label"])
@dataclasses.dataclass(frozen=True)
class Labelled:
    value: Any
    label: str


@jax.tree_util.register_pytree_node_class
class Custom:
    def __init__(self, a, b):
        self.a, self.b = a, b

    def tree_flatten(self):
        return (self.a, self.b), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_pytrees() -> None:
    def f(tree, other=None):
        doubled = jax.tree.map(lambda x: x * 2, tree)
        return {"out": doubled, "none": None, "empty": (), "other": other}

    x = integers(0, 4)
    tree = [Pair(x, None), Labelled({"k": x}, "name"), Custom(x, (x, 1)), {}]
    assert_same(megakernelize(f)(tree), jax.jit(f)(tree))
    assert_same(megakernelize(f)(tree, other=Pair(None, x)), jax.jit(f)(tree, other=Pair(None, x)))


@jax.tree_util.register_pytree_node_class
class MadeAnew:
    """A class whose leaves are other objects each time that it is flattened."""

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def tree_flatten(self):
        return (self.values[...], jnp.asarray(self.scale, jnp.float32)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        made = cls.__new__(cls)
        made.values, made.scale = children
        return made


def test_leaves_made_anew() -> None:
    def f(x, *, other):
        return MadeAnew(x.values * x.scale + other.scale, 1)

    args, named = (MadeAnew(integers(0, 4), 3),), {"other": MadeAnew(integers(1, 4), 2.5)}
    expected = jax.jit(f)(*args, **named)
    assert_same(megakernelize(f)(*args, **named), expected)
    assert_same(jax.jit(megakernelize(f))(*args, **named), expected)


def test_methods() -> None:
    class Model:
        def __init__(self, w):
            self.w = w

        @functools.partial(megakernelize, static_argnums=0)
        def step(self, x):
            return x @ self.w

    w, x = integers(0, 3, 3), integers(1, 3)
    model = Model(w)
    assert_same(model.step(x), x @ w)
    assert_same(Model(w + 1).step(x), x @ (w + 1))


def test_static_arguments() -> None:
    traces = []

    def f(n, x, mode="add"):
        traces.append((n, mode))
        return x + n if mode == "add" else x * n

    compiled = megakernelize(f, static_argnums=0, static_argnames="mode")
    x = integers(0, 4)
    for n, mode in [(1, "add"), (2, "add"), (1, "mul"), (1, "add")]:
        assert_same(compiled(n, x, mode=mode), x + n if mode == "add" else x * n)
    assert_same(compiled(1, x), x + 1)
    assert_same(compiled(1, mode="mul", x=x), x * 1)
    assert traces == [(1, "add"), (2, "add"), (1, "mul"), (1, "add"), (1, "mul")]


def test_weak_types() -> None:
    def f(x, s):
        return x + s, s, s * 2, x.astype(jnp.bfloat16) * s, jnp.float32(1), 1

    for x in (integers(0, 3), integers(0, 3, dtype=np.int32), np.arange(3), np.float64(2) * np.ones(2)):
        for s in (2, 2.5, True, np.float32(2), np.int8(2), jnp.bfloat16(3)):
            assert_same(megakernelize(f)(x, s), jax.jit(f)(x, s))


def test_no_results_and_no_arguments() -> None:
    assert megakernelize(lambda x: None)(1.0) is None
    assert megakernelize(lambda: ())() == ()
    assert_same(megakernelize(lambda: jnp.arange(3))(), jnp.arange(3))
    assert_same(megakernelize(lambda x: jnp.zeros((0, 3)) + x)(1.0), jnp.ones((0, 3)))


def test_unused_and_repeated_arguments_and_results() -> None:
    def f(unused, x, y):
        z = x + y
        return z, z, x, (z, 3)

    x = integers(0, 4)
    assert_same(megakernelize(f)("no array" and x, x, x), jax.jit(f)(x, x, x))


def test_unused_arguments_may_have_any_type() -> None:
    z = jnp.ones(3, jnp.complex64)
    assert_same(megakernelize(lambda x, z: x + 1)(1.0, z), jax.jit(lambda x, z: x + 1)(1.0, z))


def test_keys() -> None:
    def f(key, x):
        key, sub = jax.random.split(key)
        return key, jax.random.bits(sub, (3,)), jax.random.fold_in(key, x)

    key = jax.random.key(7)
    assert_same(megakernelize(f)(key, 3), jax.jit(f)(key, 3))
    keys = jax.random.split(key, 4)
    assert_same(megakernelize(lambda k: k[::-1])(keys), keys[::-1])


def test_traced_once_for_each_signature() -> None:
    traces = []

    @megakernelize
    def f(x, y):
        traces.append(None)
        return x + y

    x = integers(0, 4)
    for _ in range(3):
        f(x, x)
    assert len(traces) == 1
    f(x, 2.0)
    f(x, 3.0)
    assert len(traces) == 2  # weakly typed scalar
    f(np.asarray(x), np.ones(4, np.float32))
    assert len(traces) == 2
    f(integers(0, 2, 4), x)
    assert len(traces) == 3
    f(x.astype(jnp.int32), x)
    assert len(traces) == 4
    f(x, y=x)
    assert len(traces) == 5
    f(x, x)
    assert len(traces) == 5
    f.clear_cache()
    f(x, x)
    assert len(traces) == 6


@pytest.mark.cpu
def test_traced_as_often_as_with_jit() -> None:
    x, devices = integers(0, 4), jax.devices()

    def within(context, *args):
        def call(f):
            with context():
                f(x, *args)

        return call

    calls = [
        *(lambda f, y=y: f(x, y) for y in (2.0, 3, True, np.float32(3), np.ones(4), x, x.astype(jnp.bfloat16))),
        lambda f: f(jax.device_put(x, devices[3])),
        lambda f: f(jax.device_put(x, devices[3])),
        lambda f: f(x, n=1),
        lambda f: f(x, n=(1, "a")),
        lambda f: f(x, n=(1, "a")),
        lambda f: jax.jit(f)(x),
        lambda f: f.lower(jax.ShapeDtypeStruct((4,), jnp.float32)),
        lambda f: jax.eval_shape(f, x),
        lambda f: jax.vmap(f)(jnp.ones((2, 4))),
        lambda f: jax.lax.map(f, jnp.ones((2, 4))),
        within(lambda: jax.enable_x64(True)),
        within(lambda: jax.default_matmul_precision("high")),
        within(lambda: jax.default_device(devices[2])),
        within(lambda: jax.default_prng_impl("rbg")),
        within(lambda: jax.numpy_rank_promotion("raise")),
        within(lambda: jax.debug_nans(True)),
        within(lambda: jax.transfer_guard("allow")),
    ]
    counts = []
    for compiler in (jax.jit, megakernelize):
        traces: list[None] = []

        def f(x, y=1.0, n=0, traces=traces):
            traces.append(None)
            return x @ x + y

        compiled = compiler(f, static_argnames=("n", "traces"))
        counts.append([(call(compiled), len(traces))[1] for call in calls * 2])
    assert counts[0] == counts[1]
    assert len(set(counts[0])) > 10 and counts[0][-1] == counts[0][len(calls)]


def test_traced_anew_when_jax_is_configured_otherwise() -> None:
    traces = []

    @megakernelize
    def f(x):
        traces.append(None)
        return x @ x, jnp.arange(3) + 1

    x = integers(0, 4, 4)
    assert f(x)[1].dtype == jnp.int32
    with jax.enable_x64(True):
        assert f(x)[1].dtype == jnp.int64
    assert len(traces) == 2
    with jax.default_matmul_precision("high"):
        f(x)
    assert len(traces) == 3
    f(x)
    assert len(traces) == 3


@pytest.fixture
def from_python(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls made during the test that Python sees: in the others C++ goes straight to the executable."""
    seen: list[Any] = []

    def parse(jitted: Any, args: Any, kwargs: Any) -> Any:
        seen.append(args)
        return jax_internals.parse_arguments(jitted, args, kwargs)

    monkeypatch.setattr(dispatch, "parse_arguments", parse)
    return seen


def test_calls_without_python(from_python: list[Any]) -> None:
    big, key = integers(5, 3000), jax.random.key(0)

    def f(x, *, n):
        return {"x": x["a"] * n + big[:3], "key": jax.random.uniform(key, (3,)) + x["b"]}

    step = megakernelize(f, static_argnames="n")
    different = [
        (integers(0, 3), 2.0, 2),
        (integers(0, 3), 2.0, 3),
        (np.ones(3, np.float32), jnp.int32(1), 2),
        (jax.device_put(integers(0, 3), jax.devices()[-1]), 1, 2),
    ]
    for known in (False, True):
        from_python.clear()
        for a, b, n in different:
            assert_same(step({"a": a, "b": b}, n=n), jax.jit(f, static_argnames="n")({"a": a, "b": b}, n=n))
        assert bool(from_python) != known
    for forget in (step.clear_cache, jax.clear_caches):
        forget()
        step({"a": integers(0, 3), "b": 2.0}, n=2)
        assert from_python
        from_python.clear()


def test_first_call_is_interrupted(from_python: list[Any]) -> None:
    interrupts = [KeyboardInterrupt]

    @megakernelize
    def step(x):
        if interrupts:
            raise interrupts.pop()
        return x + 1

    x = integers(0, 3)
    with pytest.raises(KeyboardInterrupt):
        step(x)
    assert_same(step(x), x + 1)
    from_python.clear()
    assert_same(step(x), x + 1)
    assert not from_python


def test_without_parts_of_jax_that_may_go(monkeypatch: pytest.MonkeyPatch, from_python: list[Any]) -> None:
    monkeypatch.setattr(jax_internals, "pxla", object())
    step = megakernelize(lambda x, n: x * n, static_argnums=1, donate_argnums=0)
    for _ in range(2):
        from_python.clear()
        x = integers(0, 3)
        assert_same(step(x, 2), integers(0, 3) * 2)
        assert x.is_deleted() and from_python


def test_closed_over_arrays_become_arguments() -> None:
    w = integers(0, 64, 64)
    small = integers(1, 64)
    table = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)

    @megakernelize
    def f(x):
        return x @ w + small + x @ table

    x = integers(2, 64)
    assert_same(f(x), jax.jit(lambda x: x @ w + small + x @ table)(x))
    text = f.lower(x).compile().as_text()
    assert "constant({" not in text.replace(" ", "")
    assert text.count(" parameter(") >= 3
    assert_same(f.lower(x).compile()(x), f(x))


def test_closed_over_array_made_anew_in_every_trace() -> None:
    @megakernelize
    def f(x):
        big = jax.device_put(np.arange(4096.0, dtype=np.float32))
        return (x[:, None] * big[: 1024 * x.shape[0]].reshape(x.shape[0], -1)).sum(1)

    for size in (1, 2, 1, 3):
        x = integers(size, size)
        expected = [float(v) * sum(range(1024 * i, 1024 * (i + 1))) for i, v in enumerate(x)]
        np.testing.assert_array_equal(f(x), np.array(expected, np.float32))


def test_bad_arguments_raise_what_jit_raises() -> None:
    def f(x, n=1):
        return x * n

    x = integers(0, 4)
    cases = [
        ({}, ("text",), {}),
        ({}, (object(),), {}),
        ({}, (), {}),
        ({}, (x,), {"unknown": 1}),
        ({"static_argnums": 1}, (x, [1]), {}),
        ({"static_argnums": 0}, (x,), {}),
    ]
    for options, args, kwargs in cases:
        with pytest.raises(Exception) as expected:
            jax.jit(f, **options)(*args, **kwargs)
        with pytest.raises(expected.type) as actual:
            megakernelize(f, **options)(*args, **kwargs)
        assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]
    for options in ({"static_argnames": "unknown"}, {"donate_argnums": 0, "static_argnums": 0}, {"static_argnums": 9}):
        with pytest.raises(ValueError) as expected:
            jax.jit(f, **options)
        with pytest.raises(ValueError) as actual:
            megakernelize(f, **options)
        assert str(actual.value) == str(expected.value)
    with pytest.raises(TypeError):
        megakernelize(3)


@pytest.mark.cpu
def test_bad_options() -> None:
    for options in (
        {"on_unsupported": "ignore"},
        {"backend": "tpu"},
        {"target": "cpu-0"},
        {"target": "cpu-x"},
        {"target": "cpu-8+tag"},
        {"target": "h100-sxm+tagged"},
        {"target": "toaster"},
    ):
        with pytest.raises(jax_mpk.ConfigError, match=next(iter(options))):
            megakernelize(lambda x: x, **options)
    with pytest.raises(jax_mpk.TargetError, match="h100-sxm"):
        megakernelize(lambda x: x + 1, target="h100-sxm")(1.0)


@pytest.mark.cpu
@pytest.mark.parametrize("target", ["cpu-1", "cpu-2", "cpu-3", "cpu-8", "cpu-64", "cpu-8+tagged", "cpu+tagged"])
def test_any_number_of_workers(target) -> None:
    def f(x, w):
        return (x @ w).sum(0) + jnp.cumsum(x[:, 0])[-1]

    x, w = integers(0, 17, 33), integers(1, 33, 65)
    assert_same(megakernelize(f, target=target)(x, w), jax.jit(f)(x, w))


def test_tracing_from_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    f = megakernelize(lambda x: x * 2 + 1)
    with ThreadPoolExecutor(4) as pool:
        for size, result in zip([1, 2, 3, 4] * 5, pool.map(lambda n: f(jnp.ones(n)), [1, 2, 3, 4] * 5), strict=True):
            assert_same(result, jnp.ones(size) * 3)


def module_level(x, n):
    return x * n


@pytest.mark.cpu
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies(duplicate) -> None:
    f = megakernelize(module_level, static_argnums=1, target="cpu-2", on_unsupported="split")
    x = integers(0, 4)
    for _ in range(2):
        other = duplicate(f)
        assert_same(other(x, 3), f(x, 3))
        assert other.__name__ == "module_level"
        assert other.lower(x, 3).plan.target == f.lower(x, 3).plan.target


def test_float0() -> None:
    """The gradient with respect to integers holds nothing."""

    def loss(x, w):
        return (x * w).sum()

    def assert_same_tree(actual, expected) -> None:
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_array_equal(a, b)

    gradient = jax.grad(loss, argnums=(0, 1), allow_int=True)
    x, w = np.arange(3), integers(0, 3)
    expected = jax.jit(gradient)(x, w)
    f = megakernelize(gradient)
    for compute in (f, jax.jit(f), lambda x, w: f.lower(x, w).compile()(x, w)):
        assert_same_tree(compute(x, w), expected)
    rows = np.stack([x, x + 1])
    assert_same_tree(jax.vmap(f, (0, None))(rows, w), jax.vmap(jax.jit(gradient), (0, None))(rows, w))

    def update(nothing, a, b, c):
        return nothing, b.at[0].set(1.0), nothing, a.at[0].set(c), c

    def arguments():
        return expected[0], integers(1, 4), integers(2, 4), 2.0

    for how in ("error", "split"):
        g = megakernelize(update, donate_argnums=(1, 2), on_unsupported=how)
        assert_same_tree(g(*arguments()), jax.jit(update)(*arguments()))
    only = megakernelize(lambda x: x)
    assert_same_tree(only(expected[0]), expected[0])
