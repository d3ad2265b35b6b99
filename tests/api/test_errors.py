"""What a user reads when part of a function cannot be compiled: the primitive, its operands, the line, the way out."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_mpk
from jax_mpk import megakernelize
from jax_mpk.graph import build
from tests.api.support import integers

X = integers(0, 4, 4)
Z = X.astype(jnp.complex64)


def line(text: str) -> str:
    """``file:line`` of the only line of this file that ends with ``# text``."""
    source = inspect.getsource(inspect.getmodule(line)).splitlines()  # type: ignore[arg-type]
    (number,) = [i for i, s in enumerate(source, 1) if s.endswith(f"# {text}")]
    return f"{__file__}:{number}"


@jax.jit
def traced_before(x):
    return jnp.linalg.qr(x)[0]  # in a function of the user's own


def directly(x):
    return jnp.linalg.qr(x)[0]  # directly


def in_a_loop(x):
    def body(c, row):
        return c, jnp.linalg.qr(row[None])[0]  # in a loop

    return lax.scan(body, 0, x)


def in_a_branch(x):
    return lax.cond(
        x[0, 0] > 0,
        lambda x: jnp.linalg.qr(x)[0],  # in a branch
        lambda x: x,
        x,
    )


def in_a_join(x):
    return lax.reduce(
        x,
        0.0,
        lambda a, b: a + jnp.linalg.qr(b[None, None])[1][0, 0],  # in a join
        (0,),
    )


def in_a_solver(x):
    return lax.custom_linear_solve(
        lambda v: x @ v,
        x[0],
        lambda _, b: jnp.linalg.qr(x)[0] @ b,  # in a solver
    )


def bits_of_another_generator(key):
    return jax.random.bits(key, (3,))  # bits


def uniforms_of_another_generator(keys):
    return jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys)  # uniforms


REFUSED = {
    "in a function of the user's own": ("qr", lambda x: traced_before(x) + 1, X),
    "directly": ("qr", directly, X),
    "in a loop": ("qr", in_a_loop, X),
    "in a branch": ("qr", in_a_branch, X),
    "in a join": ("qr", in_a_join, X),
    "in a solver": ("qr", in_a_solver, X),
    "bits": ("rng_bit_generator", bits_of_another_generator, jax.random.key(0, impl="rbg")),
    "uniforms": (
        "rng_bit_generator",
        uniforms_of_another_generator,
        jax.random.split(jax.random.key(0, impl="rbg"), 2),
    ),
}


@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("where", REFUSED)
def test_refused_primitive(where, around) -> None:
    primitive, f, x = REFUSED[where]
    jax.jit(f).lower(x)  # JAX has seen these functions before
    with pytest.raises(jax_mpk.UnsupportedPrimitiveError) as error:
        around(megakernelize(f))(x)
    assert (error.value.primitive, error.value.line) == (primitive, line(where))
    text = str(error.value)
    assert f"`{primitive}`" in text and f"in your code: {line(where)}" in text
    assert re.search(r"operands: \w+\[", text) and 'on_unsupported="split"' in text


def test_refused_within_what_a_rule_composes(monkeypatch) -> None:
    """Rules write some primitives in terms of others, which no line of the user's made."""
    build.load_rules()
    monkeypatch.delitem(build.RULES, "dynamic_slice")
    monkeypatch.delitem(build.RULES, "gather")
    for f, where in (
        (lambda x: jnp.linalg.cholesky(x @ x.T), "a factorization"),  # a factorization
        (lambda x: jax.vmap(lambda b: jax.scipy.linalg.solve_triangular(x, b))(x), "a system"),  # a system
    ):
        with pytest.raises(jax_mpk.UnsupportedPrimitiveError) as error:
            megakernelize(f)(X)
        assert error.value.line.rpartition(":")[0] == __file__
        number = int(error.value.line.rpartition(":")[2])
        source = inspect.getsource(inspect.getmodule(line)).splitlines()  # type: ignore[arg-type]
        assert source[number - 1].endswith(f"# {where}")


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
@pytest.mark.parametrize("f", [jnp.linalg.qr, jax.vmap(jnp.linalg.qr), functools.partial(jnp.linalg.qr, mode="r")])
def test_function_of_a_library(f, around) -> None:
    """It has no line of the user's: that of the call is named."""
    x = jnp.ones((2, 2, 3, 3))
    with pytest.raises(jax_mpk.UnsupportedPrimitiveError, match="`qr`") as error:
        around(megakernelize(f))(x)  # a call
    assert error.value.line == line("a call")


def test_wrapped_by_a_library() -> None:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    f = jax.shard_map(lambda x: x + 1, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    for g in (f, jax.jit(f)):
        with pytest.raises(jax_mpk.UnsupportedPrimitiveError, match="`shard_map`") as error:
            megakernelize(g)(X)  # another call
        assert error.value.line == line("another call")


@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_refused_element_type(around) -> None:
    def made(x):
        return (x * 2j).real  # made

    def read(x, z):
        y = x + 1
        return (y * z).real  # read

    def carried(z):
        return lax.fori_loop(0, 3, lambda _, c: c * 2, z)  # carried

    for f, args, primitive in ((made, (X,), "convert_element_type"), (read, (X, Z), "mul"), (carried, (Z,), "scan")):
        with pytest.raises(jax_mpk.UnsupportedDtypeError, match="complex64") as error:
            around(megakernelize(f))(*args)
        assert (error.value.primitive, error.value.line) == (primitive, line(f.__name__))
    with pytest.raises(jax_mpk.UnsupportedDtypeError, match=r"complex64 \(of an argument\)(.|\n)*complex64\[4,4\]"):
        around(megakernelize(lambda z: z))(Z)


def test_arguments_are_called_by_their_names() -> None:
    """Where JAX itself refuses arguments, its message is that for the user's function."""
    table = np.ones(3000, np.float32)

    def f(x, tree, *, scale=1.0):
        return x * tree["w"][0] * scale + table.sum()

    first, second = (jax.device_put(1.0, d) for d in jax.devices()[:2])
    calls = [
        (first, {"w": [second]}, {}),
        (1.0, {"w": [first]}, {"scale": second}),
        (1.0, {"w": [jax.ShapeDtypeStruct((), jnp.float32)]}, {}),
    ]
    for x, tree, named in calls:
        texts = []
        for compiler in (jax.jit, megakernelize):
            with pytest.raises((ValueError, TypeError)) as error:
                compiler(f)(x, tree, **named)
            texts.append(re.findall(r"\bargument '?([\w\[\]']+?)'? of", str(error.value), re.IGNORECASE))
        assert texts[0] == texts[1] and texts[0]
