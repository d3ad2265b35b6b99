"""Which primitives occur with which element types, and which should.

What should occur is asked of JAX itself: every primitive of the rule table has a small example here, which is tried
with every type. Primitives that random programs cannot hold are listed with the reason.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax

from tests.random_programs import program as programs
from tests.random_programs.program import Program
from tests.random_programs.values import ALL, FLOATS, INTS, KEY, NUMPY, SIGNED

Pair = tuple[str, str]

#: The operand whose type counts, where it is not the first.
_OPERAND = {"select_n": 1, "clamp": 1, "random_wrap": 0}
#: Their operands are of any types: all of them count.
_STRUCTURES = ("cond", "scan", "while")
_SHORT = {np.dtype(v): k for k, v in NUMPY.items()}

_DOT = "lax.dot_general(x, x, (((0,), (0,)), ((), ())))"
_INDEX = "np.zeros((2, 1), np.int32)"
_SCATTER = f"(x, {_INDEX}, x[:2], lax.ScatterDimensionNumbers((1,), (0,), (0,)))"
_SOLVE = "jnp.linalg.solve(x[:, :3], x)"
_WINDOW = "(1, 2), (1, 1), 'VALID')"
_KEY = "jax.random.wrap_key_data(x)"
_UNARY = (
    "abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil clz cos cosh digamma erf erf_inv erfc exp "
    "exp2 expm1 floor is_finite lgamma log log1p logistic neg population_count round rsqrt sign sin sinh sqrt square "
    "tan tanh log2"
).split()
_BINARY = (
    "add atan2 div eq ge gt igamma igamma_grad_a igammac le lt max min mul ne nextafter pow rem shift_left "
    "shift_right_arithmetic shift_right_logical sub zeta polygamma random_gamma_grad mulhi"
).split()
#: Primitive: an expression of ``x``, an array of ones of shape (3, 4), that uses it.
EXAMPLES: dict[str, str] = {
    **{name: f"lax.{name}(x)" for name in _UNARY if hasattr(lax, name)},
    **{name: f"lax.{name}(x, x)" for name in _BINARY if hasattr(lax, name)},
    **{name: f"helpers.bound('{name}', x, x)" for name in ("eq_to", "le_to", "lt_to")},
    **{name: f"lax.{name}(x, axis=0)" for name in "cumsum cumprod cummax cummin cumlogsumexp".split()},
    **{name: f"lax.{name}(x, (0,))" for name in "reduce_sum reduce_prod reduce_max reduce_min".split()},
    **{name: f"lax.{name}(x, (0,))" for name in "reduce_and reduce_or reduce_xor".split()},
    **{f"scatter-{name}": f"lax.scatter_{name}{_SCATTER}" for name in "add sub mul min max".split()},
    "add_any": "helpers.add_any(x, x)",
    "and": "lax.bitwise_and(x, x)",
    "approx_top_k": "lax.approx_max_k(x, 2)",
    "argmax": "lax.argmax(x, 0, np.int32)",
    "argmin": "lax.argmin(x, 0, np.int32)",
    "bitcast_convert_type": "lax.bitcast_convert_type(x, f'u{x.dtype.itemsize}')",
    "broadcast_in_dim": "lax.broadcast_in_dim(x, (3, 4, 2), (0, 1))",
    "cholesky": "lax.linalg.cholesky(x[:, :3] + 3 * jnp.eye(3, dtype=x.dtype))",
    "custom_linear_solve": _SOLVE,
    "lu": _SOLVE,
    "lu_pivots_to_permutation": _SOLVE,
    "triangular_solve": _SOLVE,
    "clamp": "lax.clamp(x, x, x)",
    "concatenate": "lax.concatenate([x, x], 0)",
    "cond": "lax.cond(np.array(True) & (lax.iota(np.int32, 2)[0] > 0), lambda: x, lambda: x[::-1])",
    "conv_general_dilated": "lax.conv_general_dilated(x[None], x[None], (1,), 'VALID')",
    "convert_element_type": "lax.convert_element_type(x, np.int32 if x.dtype != np.int32 else np.int64)",
    "copy": "jax.numpy.copy(x)",
    "dot_general": _DOT,
    "dynamic_slice": "lax.dynamic_slice(x, (1, 1), (2, 2))",
    "dynamic_update_slice": "lax.dynamic_update_slice(x, x[:2], (1, 1))",
    "gather": "jax.numpy.take(x, np.array([1, 0]), axis=0)",
    "integer_pow": "lax.integer_pow(x, 3)",
    "iota": "lax.iota(x.dtype, 3)",
    "name": "helpers.bound('name', x, name='here')",
    "not": "lax.bitwise_not(x)",
    "optimization_barrier": "lax.optimization_barrier(x)",
    "or": "lax.bitwise_or(x, x)",
    "platform_index": "lax.platform_dependent(x, tpu=lambda x: x[::-1], default=lambda x: x)",
    "pad": "lax.pad(x, x[0, 0], [(1, 0, 0), (0, 0, 0)])",
    "random_bits": f"jax.random.bits({_KEY}, (2,), x.dtype)",
    "random_clone": f"jax.random.clone({_KEY})",
    "random_fold_in": f"jax.random.fold_in({_KEY}, 1)",
    "random_seed": "jax.random.key(x[0, 0])",
    "random_split": f"jax.random.split({_KEY})",
    "random_unwrap": f"jax.random.key_data({_KEY})",
    "random_wrap": _KEY,
    "reduce": "helpers.largest(x, x[0, 0], (0,))",
    "reduce_precision": "lax.reduce_precision(x, 5, 3)",
    "reduce_window": f"lax.reduce_window(x, x.dtype.type(1), lax.mul, {_WINDOW}",
    "reduce_window_max": f"lax.reduce_window(x, helpers.least(x), lax.max, {_WINDOW}",
    "reduce_window_min": f"lax.reduce_window(x, helpers.most(x), lax.min, {_WINDOW}",
    "reduce_window_sum": f"lax.reduce_window(x, x.dtype.type(0), lax.add, {_WINDOW}",
    "regularized_incomplete_beta": "lax.betainc(x, x, x)",
    "reshape": "lax.reshape(x, (4, 3))",
    "rev": "lax.rev(x, (0,))",
    "scan": "lax.scan(lambda c, r: (c, r[0]), x, x)",
    "scatter": f"lax.scatter{_SCATTER}",
    "select_and_gather_add": "helpers.pooled_jvp(x, x)",
    "select_and_scatter_add": "jax.grad(lambda v: helpers.pooled(v).sum())(x)",
    "select_n": "lax.select_n(lax.iota(np.int32, 3)[0] > 0, x, x)",
    "slice": "lax.slice(x, (1, 1), (2, 2))",
    "sort": "lax.sort(x)",
    "split": "lax.split(x, [1, 2])",
    "squeeze": "lax.squeeze(x[:1], (0,))",
    "stack": "jax.numpy.stack([x, x])",
    "threefry2x32": "helpers.hashed(x)",
    "tile": "lax.tile(x, (2, 1))" if hasattr(lax, "tile") else "jax.numpy.tile(x, (2, 1))",
    "top_k": "lax.top_k(x, 2)",
    "transpose": "lax.transpose(x, (1, 0))",
    "unstack": "jax.numpy.unstack(x)",
    "while": "lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1]), (0, x))",
    "xor": "lax.bitwise_xor(x, x)",
}
#: Not in every version of JAX.
_NEW = ("log2", "mulhi", "polynomial")
if hasattr(lax, "polynomial"):
    EXAMPLES["polynomial"] = "lax.polynomial(x, [x, x])"

_SHARDING = "says something about devices or meshes, and computes nothing on one device"
_INSIDE = "occurs only inside what other primitives are lowered to"
#: Primitives of the rule table that random programs do not hold.
EXCLUDED: dict[str, str] = {
    **dict.fromkeys(("device_put", "mesh_cast", "pcast", "pvary", "reduced_vary_cast", "reshard"), _SHARDING),
    **dict.fromkeys(("reduced_vary_cast_p", "sharding_constraint", "layout_constraint"), _SHARDING),
    **dict.fromkeys(("from_edtype", "to_edtype", "copy_p", "xla_metadata_value", "stop_gradient"), _INSIDE),
    **dict.fromkeys(("add_dependency", "stage", "zeros_like", "empty", "iota_2x32_shape"), _INSIDE),
    **dict.fromkeys(("psum", "pmax", "pmin"), "reductions only over axes that jax.vmap names; tests of their own"),
    "random_gamma": "rejects and draws again: a rounding decides how often",
    "rng_bit_generator": "refused: the platform decides its bits",
    "rng_uniform": "refused: it draws from a hidden state",
    "ragged_dot_general": "tests of its own; XLA has no CPU lowering for most of its types",
    "threefry4x32": "not reachable by the default key type; tests of its own",
    "philox2x32": "not reachable by the default key type; tests of its own",
    "philox4x32": "not reachable by the default key type; tests of its own",
    "one_minus_square": "occurs only in derivatives of inverse functions; tests of its own",
}
EXCLUDED.update({name: "not in this version of JAX" for name in _NEW if not hasattr(lax, name)})
_LAPACK = ("cholesky", "custom_linear_solve", "lu", "triangular_solve")
#: Pairs that JAX traces but no random program may hold.
EXCLUDED_PAIRS: dict[Pair, str] = {
    **{("mulhi", t): "XLA of JAX 0.10 cannot compile it inside a fusion" for t in SIGNED},
    **{("cumlogsumexp", t): "JAX cannot lower it" for t in INTS},
    **{("random_seed", t): "JAX cannot lower it" for t in ("b1", *FLOATS)},
    **{(p, t): "LAPACK does not have it" for p in _LAPACK for t in ("f16", "bf16")},
}


def histogram(examples: Iterable[Program]) -> collections.Counter[Pair]:
    """How often every pair of primitive and element type occurs, loops and branches included."""
    counts: collections.Counter[Pair] = collections.Counter()
    for program in examples:
        traced = jax.make_jaxpr(program.function())(*program.arrays())
        counts.update(pairs_of(traced))
    return counts


def pairs_of(closed: Any) -> Iterator[Pair]:
    """The pairs of a jaxpr, calls written out."""
    from jax_mpk.capture import capture

    yield from _pairs(capture(closed).jaxpr)


def _pairs(jaxpr: Any) -> Iterator[Pair]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        atoms = eqn.invars if name in _STRUCTURES else (eqn.invars or eqn.outvars)[_OPERAND.get(name, 0) :][:1]
        for atom in atoms:
            yield name, short(atom.aval.dtype)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _pairs(inner)


def short(dtype: Any) -> str:
    """The short name of a JAX dtype."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return KEY
    return _SHORT.get(np.dtype(dtype), str(dtype))


def allowed(primitive: str) -> list[str]:
    """Element types that JAX accepts for a primitive."""
    code = compile(EXAMPLES[primitive], primitive, "eval")

    def example(x: Any) -> Any:
        return eval(code, {**programs.NAMES, "x": x})

    found = set()
    for dtype in ALL:
        shape = (2,) if _KEY in EXAMPLES[primitive] else (3, 4)
        try:
            traced = jax.make_jaxpr(example)(np.ones(shape, NUMPY[dtype]))
        except Exception:  # whatever it is, this type is refused
            continue
        found.update(t for name, t in pairs_of(traced) if name == primitive)
    return sorted(found)


def holes(counts: collections.Counter[Pair], rules: Iterable[str]) -> list[str]:
    """Pairs of the rule table that do not occur."""
    missing = []
    for primitive in sorted(set(rules) - set(EXCLUDED)):
        if primitive not in EXAMPLES:
            missing.append(f"{primitive}: no example")
            continue
        missing += [f"{primitive} of {t}" for t in allowed(primitive) if not counts[primitive, t]]
    return [m for m in missing if tuple(m.split(" of ")) not in EXCLUDED_PAIRS]


def table(counts: collections.Counter[Pair]) -> str:
    """The histogram as text: a line per primitive, a column per type."""
    columns = [*ALL, KEY]
    lines = [f"{'':28}" + "".join(f"{c:>6}" for c in columns)]
    for primitive in sorted({p for p, _ in counts}):
        cells = "".join(f"{counts[primitive, c] or '.':>6}" for c in columns)
        lines.append(f"{primitive:28}{cells}")
    return "\n".join(lines)
