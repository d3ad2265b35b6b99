"""on_unsupported="split": megakernels for what can be compiled, XLA for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var

import jax_mpk
from jax_mpk import megakernelize
from tests.api.support import assert_same, integers, operations, pointer


def unsupported(x):
    """Something that no rule lowers."""
    return jnp.linalg.eigvalsh(x @ x.T)


def kernels(f, *args) -> int:
    return operations(f.lower(*args).compile()).count("custom-call")


X = integers(0, 4, 4)


def test_refused_without_split() -> None:
    with pytest.raises(jax_mpk.UnsupportedPrimitiveError, match="eigh"):
        megakernelize(unsupported)(X)


def test_equal_results_with_as_few_kernels_as_possible() -> None:
    def f(x, y):
        a = x + y  # first island, all of it
        b = y * 2
        c = unsupported(a) * 0 + a  # XLA, then the second island
        d = jnp.sort(b) + 1
        return c + d, b, d.sum()

    split = megakernelize(f, on_unsupported="split")
    y = integers(1, 4, 4)
    expected = jax.jit(f)(X, y)
    assert_same(split(X, y), expected)
    assert_same(jax.jit(split)(X, y), expected)
    lowered = split.lower(X, y)
    assert len(lowered.kernels) == 2
    assert lowered.as_text().count("@jax_mpk_cpu") == 2
    with pytest.raises(ValueError, match="2 megakernels"):
        _ = lowered.plan
    text = split.explain(X, y)
    assert "2 custom calls" in text
    where = f"test_split.py:{unsupported.__code__.co_firstlineno + 2}"
    assert f"left to XLA: {where} eigh: there is no rule for it" in text


def test_what_needs_no_island_comes_before_all_of_them() -> None:
    def f(x, y):
        return y * 2 + jnp.linalg.svd(x, compute_uv=False)

    split = megakernelize(f, on_unsupported="split")
    assert len(split.lower(X, X).kernels) == 1
    np.testing.assert_allclose(split(X, X), jax.jit(f)(X, X), rtol=1e-5)


def reached(eqns, start) -> list[bool]:
    """Which equations need, directly or not, a result of the one numbered ``start``."""
    made = set(eqns[start].outvars)
    found = [False] * len(eqns)
    for i, eqn in enumerate(eqns[start + 1 :], start + 1):
        if any(isinstance(atom, Var) and atom in made for atom in eqn.invars):
            found[i] = True
            made |= set(eqn.outvars)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_islands_are_maximal(seed) -> None:
    """Nothing supported is left out, and no two islands could be one: a value leaves the first and comes back."""
    rng = np.random.default_rng(seed)
    plan = [(2, 0, 1), *((rng.integers(0, 3), *rng.integers(0, i + 3, 2)) for i in range(rng.integers(4, 14)))]
    # Whole numbers throughout, so that results are equal bit by bit.
    operations = [jnp.add, lambda a, b: jnp.clip(a * b, -9, 9), lambda a, b: left(a) - b]

    def f(x, y):
        values = [x, y]
        for kind, a, b in plan:
            values.append(operations[kind](values[a], values[b]))
        return values[2:]

    def left(x):
        return jax.pure_callback(lambda x: -x, x, x, vmap_method="expand_dims")

    split = megakernelize(f, on_unsupported="split")
    y = integers(1, 4, 4)
    assert_same(split(X, y), jax.jit(f)(X, y))
    traced, _ = split._site.trace((X, y), {})
    eqns = traced.jaxpr.eqns
    assert {eqn.primitive.name for eqn in eqns} <= {"megakernel", "pure_callback"}
    after = [reached(eqns, i) for i in range(len(eqns))]
    islands = [i for i, eqn in enumerate(eqns) if eqn.primitive.name == "megakernel"]
    for i, first in enumerate(islands):
        for second in islands[i + 1 :]:
            assert any(after[first][k] and after[k][second] for k in range(len(eqns)))


def test_whole_function_is_one_kernel() -> None:
    f = megakernelize(lambda x: (x @ x).sum(), on_unsupported="split")
    assert_same(f(X), (X @ X).sum())
    assert len(f.lower(X).kernels) == 1


def test_function_without_anything_to_compile() -> None:
    f = megakernelize(lambda x: jnp.linalg.svd(x, compute_uv=False), on_unsupported="split")
    assert not f.lower(X).kernels
    np.testing.assert_array_equal(f(X), jnp.linalg.svd(X, compute_uv=False))


def test_inside_loops_and_branches() -> None:
    def f(x, n):
        def body(c, _):
            return jnp.clip(c @ x, -5, 5) + unsupported(c) * 0, c[0]

        x, rows = jax.lax.scan(body, x, None, length=3)
        x = jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c + 1 + unsupported(c) * 0, x)
        return jax.lax.cond(n > 0, lambda x: unsupported(x) * 0 + x, lambda x: x * 2, x), rows

    split = megakernelize(f, on_unsupported="split")
    for n in (0, 1):
        assert_same(split(X, n), jax.jit(f)(X, n))
    assert len(split.lower(X, 1).kernels) >= 3


def test_under_transformations() -> None:
    def f(x):
        return (unsupported(x + 1) * 0 + x).sum(0)

    split = megakernelize(f, on_unsupported="split")
    batch = jnp.stack([X, X + 1])
    np.testing.assert_array_equal(jax.vmap(split)(batch), jax.vmap(f)(batch))
    np.testing.assert_array_equal(jax.jit(jax.vmap(split))(batch), jax.vmap(f)(batch))
    assert_same(jax.lax.scan(lambda c, x: (c, split(x)), 0.0, batch)[1], jax.vmap(f)(batch))


def test_donation_across_islands() -> None:
    def f(cache, x):
        factor = unsupported(x) * 0 + x
        return cache.at[0].set(factor[0]), cache.sum()

    cache = integers(1, 8, 4)
    expected = jax.jit(f)(cache, X)
    split = megakernelize(f, on_unsupported="split", donate_argnums=0)
    where = pointer(cache)
    result = split(cache, X)
    assert_same(result, expected)
    assert cache.is_deleted() and pointer(result[0]) == where


def test_side_effects_keep_their_order(capfd) -> None:
    def f(x):
        jax.debug.print("first {}", x[0, 0], ordered=True)
        y = x + 1
        jax.debug.print("second {}", y[0, 0], ordered=True)
        return y

    split = megakernelize(f, on_unsupported="split")
    result = split(X)
    jax.effects_barrier()
    assert_same(result, X + 1)
    out = capfd.readouterr().out
    assert out.index("first") < out.index("second")


def test_unsupported_element_types() -> None:
    def f(x):
        z = x.astype(jnp.complex64) * 2j
        return z, jnp.abs(x) + 1, (z * 2).imag + 1

    split = megakernelize(f, on_unsupported="split")
    assert_same(split(X), jax.jit(f)(X))
    where = f"test_split.py:{f.__code__.co_firstlineno + 1}"
    assert f"left to XLA: {where} mul: complex64 is not supported" in split.explain(X)


@jax.custom_jvp
def left_to_xla(x):
    return jnp.linalg.svd(x, compute_uv=False)


@left_to_xla.defjvp
def _left_to_xla_jvp(primals, tangents):
    return left_to_xla(*primals), 100.0 * tangents[0][0]


@jax.custom_vjp
def left_to_xla_too(x):
    return jnp.linalg.svd(x, compute_uv=False)


left_to_xla_too.defvjp(lambda x: (left_to_xla_too(x), x), lambda x, t: (x * 100 + t,))


def in_a_loop(x):
    return jax.lax.fori_loop(0, 2, lambda _, c: c + left_to_xla(c), x)


def beside_a_kernel(x):
    return left_to_xla(x @ x) + 1


def with_unchanged(x):
    return x, left_to_xla_too(x)


@pytest.mark.parametrize("f", [left_to_xla, left_to_xla_too, in_a_loop, beside_a_kernel, with_unchanged])
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_derivatives_are_refused(f, outer) -> None:
    # What is left to XLA has no derivatives of its own any more: these would be others than the user's.
    split = megakernelize(f, on_unsupported="split")
    x = jnp.stack([X, X + 1]) if outer is jax.vmap else X
    used = outer(split)
    for derivative in (
        lambda: jax.grad(lambda x: sum(r.sum() for r in jax.tree.leaves(used(x))))(x),
        lambda: jax.jit(jax.grad(lambda x: sum(r.sum() for r in jax.tree.leaves(used(x)))))(x),
        lambda: jax.jvp(used, (x,), (x,)),
        lambda: jax.vjp(used, x),
        lambda: jax.linearize(used, x),
    ):
        with pytest.raises(jax_mpk.DifferentiationError, match=r"megakernelize\(jax\.grad\(f\)\)") as error:
            derivative()
        assert f.__name__ in str(error.value)
    # Nothing changes where nothing is differentiated.
    for ours, expected in zip(jax.tree.leaves(used(x)), jax.tree.leaves(outer(f)(x)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_derivatives_through_references_are_refused() -> None:
    def loss(f):
        def through(x):
            ref = jax.new_ref(x)
            return f(ref).sum()

        return jax.grad(through)

    def read(ref):
        return left_to_xla(ref[...])

    def write(ref):
        ref[...] = ref[...] + left_to_xla(ref[...])
        return jnp.int32(0)

    for f in (read, write):
        with pytest.raises(jax_mpk.DifferentiationError, match=r"jax\.grad"):
            loss(megakernelize(f, on_unsupported="split"))(X)


def test_differentiation_around_what_has_no_gradient() -> None:
    @megakernelize(on_unsupported="split")
    def largest(x):
        return jnp.argmax(left_to_xla(x))

    def loss(x):
        y = x @ x
        return y[largest(x)].sum() + megakernelize(left_to_xla, on_unsupported="split")(jax.lax.stop_gradient(y)).sum()

    expected = jax.grad(lambda x: (x @ x)[jnp.argmax(left_to_xla(x))].sum())(X)
    assert_same(jax.grad(loss)(X), expected)
    assert_same(jax.jit(jax.grad(loss))(X), expected)


def test_split_function_inside_a_megakernel() -> None:
    inner = megakernelize(lambda x: jnp.sort(x) + jnp.linalg.eigvalsh(x @ x.T)[0] * 0, on_unsupported="split")
    outer = megakernelize(lambda x: inner(x + 1) * 2, on_unsupported="split")
    assert_same(outer(X), jax.jit(lambda x: jnp.sort(x + 1) * 2)(X))
    assert "undifferentiable" not in outer.explain(X)
