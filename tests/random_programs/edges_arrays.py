"""Edge values in what moves, combines, orders and addresses elements of arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.random_programs.edges import Array, Group, edges, int_edges, rows, signs
from tests.random_programs.values import ALL, FLOATS, INTS, NUMPY, int_range

# -- moves -----------------------------------------------------------------------------------------------------


def _moves(dtype: str) -> Group:
    """What copies elements keeps every bit of them."""
    group = Group({"x": rows(dtype), "v": edges(dtype)})
    group.arrays["at"] = np.array([2, -1, 0, 40, 2], np.int32)
    group.arrays["which"] = np.broadcast_to(np.arange(-1, 5, dtype=np.int32).repeat(4)[:, None], (24, 13)).copy()
    # XLA goes by way of f32 here, and processors that round to bf16 in one instruction flush subnormals in it.
    takes = (f"jnp.take(x, at, axis=0, mode={mode!r})" for mode in (None, "clip", "wrap", "fill"))
    group.add("lax.broadcast_in_dim(x, (24, 2, 13), (0, 2))", *takes, lenient=dtype == "bf16")
    group.add("lax.concatenate([x, x[:3]], 0)", "jnp.copy(x)")
    group.add("lax.pad(x, v[-1], [(1, 2, 1), (-1, 3, 0)])", "lax.reshape(x, (13, 24), dimensions=(1, 0))")
    group.add("lax.rev(x, (0, 1))", "lax.split(x, [5, 8], 1)[1]", "lax.squeeze(x[:1], (0,))", "jnp.tile(x, (1, 2))")
    group.add("jnp.stack([x, x[::-1]])", "lax.transpose(x, (1, 0))", "jnp.unstack(x)[3]", "lax.optimization_barrier(x)")
    group.add("helpers.bound('name', x, name='here')", "lax.slice(x, (1, 2), (20, 12), (3, 2))")
    group.add("lax.select_n(which, x, x[::-1], x[:, ::-1])", "lax.select(which > 0, x, x[::-1])")
    group.add("lax.dynamic_slice(x, (at[0], at[1]), (3, 5))", "lax.dynamic_update_slice(x, x[:3, :5], (at[0], at[3]))")
    group.add("x[at, at]")
    group.add("x.at[at].set(x[5:10])", "x.at[at].set(x[5:10], mode='clip')", "x.at[:, at].set(x[:, :5])")
    group.add("lax.scan(lambda c, r: (r, c), x[0], x)[1]", "lax.cond(at[0] > 1, lambda: x, lambda: x[::-1])")
    group.add("lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1][::-1]), (at[2], x))[1]")
    group.add("lax.platform_dependent(x, tpu=lambda x: x[::-1], default=lambda x: x)")
    if dtype != "b1":
        group.add("lax.iota(x.dtype, 9)")
    return group


# -- reductions, sorts -----------------------------------------------------------------------------------------


def _reductions(dtype: str) -> Group:
    x = rows(dtype)
    group = Group({"x": x})
    for name in ("max", "min"):
        group.add(f"lax.reduce_{name}(x, (1,))", f"lax.reduce_{name}(x, (0,))", lenient=True)
        for axis in (0, 1):
            group.add(*(f"lax.arg{name}(x, {axis}, {to})" for to in ("s32", "s64", "u8")))
        group.add(f"lax.reduce_{name}(x[:, :0], (1,))")
        group.add(f"lax.cum{name}(x, axis=1)", f"lax.cum{name}(x, axis=0, reverse=True)", lenient=True)
    if dtype in FLOATS:
        group.add("lax.cumlogsumexp(x, axis=1)", ulps=4)
    group.arrays["s"] = signs(x)
    group.add("lax.reduce_sum(s, (1,))", "lax.reduce_prod(s, (1,))", "lax.cumsum(s, axis=1)", "lax.cumprod(s, axis=1)")
    group.add("lax.reduce_sum(s[:, :0], (1,))", "lax.reduce_prod(s[:0], (0,))", "lax.cumsum(s, axis=0, reverse=True)")
    for name in ("max", "min", "add", "mul"):
        array = "x" if name in ("max", "min") else "s"
        group.add(f"lax.reduce({array}, {array}[0, 0], lax.{name}, (1,))", lenient=True)
    group.arrays["known"] = x if dtype in INTS else np.where(np.isnan(x), x.dtype.type(7), x)
    group.add(*(f"helpers.largest(known, known[0, 0], (1,))[{k}]" for k in (0, 1)))
    if dtype in INTS:
        group.add(*(f"lax.reduce_{name}(x, (1,))" for name in ("and", "or", "xor")))
        group.add(*(f"lax.reduce_{name}(x[:, :0], (1,))" for name in ("and", "or", "xor")))
        group.add("lax.dot_general(x, x, (((1,), (1,)), ((), ())))")
    return group


def _windows(dtype: str) -> Group:
    x = rows(dtype)
    group = Group({"x": x, "s": signs(x)})
    window = "(2, 3), (1, 2), [(1, 0), (0, 2)], (1, 1), (1, 2))"
    for start in ("helpers.{0}(x)", "x[0, 0]"):
        for name, least in (("max", "least"), ("min", "most")):
            group.add(f"lax.reduce_window(x, {start.format(least)}, lax.{name}, {window}", lenient=True)
    group.add(f"lax.reduce_window(s, s.dtype.type(0), lax.add, {window}")
    group.add(f"lax.reduce_window(s, s.dtype.type(1), lax.mul, {window}")
    if dtype in FLOATS:
        # Where a window holds NaN, what is selected depends on what stands before and behind it.
        for name, start in (("max", "least"), ("min", "most")):
            pool = f"lambda v: lax.reduce_window(v, helpers.{start}(v), lax.{name}, (2, 3), (2, 1), [(0, 0), (1, 2)])"
            group.add(f"jax.jvp({pool}, [x], [x[::-1]])[1]")
            group.add(f"jax.vjp({pool}, x)[1](lax.broadcasted_iota(x.dtype, (12, 14), 1))[0]")
    return group


def _scatters(dtype: str) -> Group:
    """Duplicates among them, and positions outside."""
    x = rows(dtype)
    group = Group({"x": x, "s": signs(x), "at": np.array([3, 0, 3, -1, 40, 23, 3], np.int32)})
    group.add("x.at[at].min(x[6:13])", "x.at[at].max(x[6:13])", lenient=True)
    if dtype != "b1":
        group.add(*(f"s.at[at].{name}(s[6:13])" for name in ("add", "subtract", "mul")))
    if dtype in FLOATS:
        group.add("helpers.add_any(x, x[::-1])")
    return group


def _sorts(dtype: str) -> Group:
    x = rows(dtype)
    group = Group({"x": x, "i": np.broadcast_to(np.arange(13, dtype=np.int32), x.shape).copy()})
    group.add("lax.sort(x, dimension=1)", "lax.sort(x, dimension=0)", "jnp.argsort(x, axis=1)")
    group.add(*(f"lax.sort((x, i), dimension=1, num_keys={k}, is_stable=True)[{j}]" for k in (1, 2) for j in (0, 1)))
    group.add("lax.sort((i // 5, x, i), dimension=1, num_keys=2)[2]", "jnp.argsort(x, axis=1, descending=True)")
    ranked = "x"
    if dtype == "bf16":
        # Processors differ in whether XLA's ranking sees a subnormal or a zero.
        ranked = "normal"
        group.arrays["normal"] = np.where(abs(x) < np.finfo(np.float32).tiny, np.copysign(x.dtype.type(0), x), x)
    group.add(*(f"lax.top_k({ranked}, {k})[{j}]" for k in (13, 3) for j in (0, 1)))
    if dtype in FLOATS:
        # XLA sorts by a comparison that knows no order of zeros and of NaN.
        group.arrays["ordered"] = np.where(np.isnan(x) | (np.abs(x) < 1e-4), x.dtype.type(1), x)
        group.add(*(f"lax.approx_{name}_k(ordered, 3)[{j}]" for name in ("max", "min") for j in (0, 1)))
    return group


def _products(dtype: str) -> Group:
    """Contractions of special values: every sum is special, zero or a power of two; integers wrap."""
    edge = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1, -1, 2], NUMPY[dtype]) if dtype in FLOATS else edges(dtype)
    rng = np.random.default_rng(5)
    x = np.where(rng.random((9, 7)) < 0.2, rng.choice(edge, (9, 7)), np.array(1, NUMPY[dtype]))
    group = Group({"x": x, "y": np.roll(x, 2)})
    group.add("lax.dot_general(x, y, (((1,), (1,)), ((), ())))", "lax.dot_general(x, y, (((0,), (0,)), ((), ())))")
    group.add("lax.dot_general(x[:, :0], y[:, :0], (((1,), (1,)), ((), ())))", "x[0] @ y[1]")
    group.add(
        "lax.conv_general_dilated(x[None], y[:3, None].swapaxes(1, 2), (1,), [(0, 0)], "
        "dimension_numbers=('NHC', 'HIO', 'NHC'))"
    )
    if dtype in FLOATS:
        dot = "lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type={})"
        group.add(*(dot.format(to) for to in ("s8", "s32", "s64", "u8")))
    return group


# -- addresses -------------------------------------------------------------------------------------------------


def _positions(dtype: str) -> Array:
    """Positions in, around and far outside an axis of 5."""
    low, high = int_range(dtype)
    found = [-(2**40), -300, -6, -5, -1, 0, 1, 3, 4, 5, 6, 200, 2**33, 2**33 + 1, low, high, high - 1]
    return np.array([v for v in found if low <= v <= high], NUMPY[dtype])


def _addresses(dtype: str) -> Group:
    at = _positions(dtype)
    x = np.arange(15, dtype=np.float32).reshape(5, 3) + 1
    group = Group({"x": x, "at": at, "u": np.arange(len(at) * 3, dtype=np.float32).reshape(-1, 3) + 100})
    group.arrays["n"] = np.arange(15, dtype=np.int16).reshape(5, 3)
    rows = "lax.GatherDimensionNumbers((1,), (0,), (0,))"
    pieces = "lax.GatherDimensionNumbers((1, 2), (), (0,))"
    for mode in ("clip", "fill", "promise_in_bounds"):
        given = "at[:, None]"
        if mode == "promise_in_bounds":
            given = "lax.clamp(at.dtype.type(0), at, at.dtype.type(3))[:, None]"
        group.add(f"lax.gather(x, {given}, {rows}, (1, 3), mode='{mode}')")
        group.add(f"lax.gather(n, {given}, {rows}, (1, 3), mode='{mode}')")
        group.add(f"lax.gather(x, {given}, {pieces}, (2, 3), mode='{mode}')")
        group.add(f"lax.gather(x, {given}, {pieces}, (2, 2), mode='{mode}', fill_value=-7)")
        where = "lax.ScatterDimensionNumbers((1,), (0,), (0,))"
        for name in ("scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub"):
            group.add(f"lax.{name}(x, {given}, u, {where}, mode='{mode}')")
        where = "lax.ScatterDimensionNumbers((1, 2), (), (0,))"
        group.add(f"lax.scatter(x, {given}, jnp.stack([u, u + 50], 1), {where}, mode='{mode}')")
    for k in range(len(at)):
        group.add(f"lax.dynamic_slice(x, (at[{k}], at[{k}]), (2, 2))")
        group.add(f"lax.dynamic_update_slice(x, u[:2, :2], (at[{k}], at[{k}]))")
        group.add(f"lax.switch(at[{k}], [lambda: u[0], lambda: u[1], lambda: -u[0]])")
    group.add("x[at]", "x.at[at].set(u)", "x.at[at].add(u)", "jnp.take(x, at, axis=0)")
    group.add("jnp.take(x, at, 0, mode='wrap')", "x.at[at].get(mode='fill', fill_value=3)")
    group.add("x.at[at].max(u, mode='clip')", "jnp.take_along_axis(x, u[:, :1].astype(s32), 0)")
    return group


def _loops(dtype: str) -> Group:
    """Trip counts from data, none among them."""
    x = np.array([1.0, -0.0, np.inf, np.nan], np.float32)
    group = Group({"n": np.array([-3, 0, 1, 2, 7], NUMPY[dtype]), "x": x})
    for k in range(5):
        group.add(f"lax.fori_loop(n.dtype.type(0), n[{k}], lambda i, v: v * 2 + 1, x)")
        group.add(f"lax.while_loop(lambda c: c[0] < n[{k}], lambda c: (c[0] + 1, c[1] - 3), (n[2], x))[1]")
        group.add(f"lax.cond(n[{k}] > 0, lambda v: v + 1, lambda v: -v, x)")
    group.add("lax.scan(lambda c, r: (c + r, c * r), x, x[:0, None] + x[None])[0]")
    return group


def _seeds(dtype: str) -> Group:
    group = Group({"seed": int_edges(dtype)})
    for k in range(len(group.arrays["seed"])):
        group.add(f"jax.random.key_data(jax.random.key(seed[{k}]))")
    return group


def _keys() -> Group:
    """Words and data of all zeros and all ones."""
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    first, second = (w.ravel() for w in np.meshgrid(words, words))
    group = Group({"words": np.stack([first, second], 1), "data": words})
    key = "jax.random.wrap_key_data(words[{}])"
    for k in range(0, 25, 8):
        one = key.format(k)
        group.add(f"jax.random.key_data(jax.random.split({one}, 3))", f"jax.random.key_data(jax.random.clone({one}))")
        group.add(*(f"jax.random.key_data(jax.random.fold_in({one}, data[{j}]))" for j in range(5)))
    group.add(*(f"jax.random.bits({key.format(24)}, (5,), u{width})" for width in (8, 16, 32, 64)))
    group.add("helpers.hashed(words)")
    return group


def _factorizations(dtype: str) -> Group:
    """Singular matrices, such as are not positive definite, and special values; otherwise exact results."""
    definite = [[4, 2, 0], [2, 5, 4], [0, 4, 8]]
    singular = [[1, 2, 3], [2, 4, 6], [1, 1, 1]]
    matrices = np.array([definite, singular, np.zeros((3, 3)), -np.eye(3), np.diag([np.inf, 1, 1])], NUMPY[dtype])
    lower = np.tril(matrices)
    group = Group({"m": matrices, "t": lower, "y": np.arange(30, dtype=NUMPY[dtype]).reshape(5, 3, 2)})
    group.add("lax.linalg.cholesky(m)", "lax.linalg.triangular_solve(t, y, left_side=True, lower=True)")
    group.add(
        "lax.linalg.triangular_solve(m, y, left_side=True, unit_diagonal=True)", "jnp.linalg.solve(m[3:4], y[3:4])"
    )
    group.add(*(f"lax.linalg.lu(m[:4])[{k}]" for k in range(3)), lenient=True)
    return group


def groups() -> Iterator[tuple[str, Group]]:
    """Every group, by name."""
    for dtype in ALL:
        yield f"moves {dtype}", _moves(dtype)
        yield f"products {dtype}", _products(dtype)
        yield f"scatters {dtype}", _scatters(dtype)
    for dtype in (*INTS, *FLOATS):
        yield f"reductions {dtype}", _reductions(dtype)
        yield f"windows {dtype}", _windows(dtype)
        yield f"sorts {dtype}", _sorts(dtype)
    for dtype in INTS:
        yield f"addresses {dtype}", _addresses(dtype)
        yield f"seeds {dtype}", _seeds(dtype)
    for dtype in ("s32", "s64"):
        yield f"loops {dtype}", _loops(dtype)
    for dtype in ("f32", "f64"):
        yield f"factorizations {dtype}", _factorizations(dtype)
    yield "keys", _keys()
