"""Rules for dense factorizations and triangular systems, as loops over rows or columns.

These are the textbook algorithms, one column after the other: right, and fast only for the small systems that occur
inside larger functions. What needs more than that (singular values, eigenvalues, QR) has no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jax_mpk.capture import jaxprs
from jax_mpk.graph.build import BlockBuilder, decompose, rule
from jax_mpk.graph.ir import Value


def _batched(fn: Callable[..., Any], x: Value, rank: int) -> Callable[..., Any]:
    """``fn`` of one matrix (or vector) over the leading axes of ``x``."""
    for _ in range(len(x.shape) - rank):
        fn = jax.vmap(fn)
    return fn


@rule("cholesky")
def _cholesky_rule(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    return decompose(bb, eqn, _batched(_cholesky, xs[0], 2), *xs)


def _cholesky(a: Any) -> Any:
    """Lower factor; all NaN where the matrix is not positive definite, as from LAPACK."""
    if a.size == 0:
        return a
    rows = jnp.arange(a.shape[0])

    def column(k: Any, factor: Any) -> Any:
        # Columns from k on are still 0, so the product runs over finished ones.
        rest = a[:, k] - factor @ factor[k]
        diagonal = jnp.sqrt(rest[k])
        new = jnp.where(rows == k, diagonal, jnp.where(rows > k, rest / diagonal, 0))
        return factor.at[:, k].set(new)

    factor = jax.lax.fori_loop(0, a.shape[0], column, jnp.zeros_like(a))
    return jnp.where((jnp.diagonal(factor) > 0).all(), factor, jnp.nan)


@rule("triangular_solve")
def _triangular_solve_rule(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    names = ("left_side", "lower", "transpose_a", "unit_diagonal")
    fn = partial(_triangular_solve, **{name: eqn.params[name] for name in names})
    return decompose(bb, eqn, _batched(fn, xs[0], 2), *xs)


def _triangular_solve(a: Any, b: Any, *, left_side: bool, lower: bool, transpose_a: bool, unit_diagonal: bool) -> Any:
    """x with ``a x = b``, or ``x a = b``, by substitution; ``a`` may be read transposed."""
    if b.size == 0:
        return b
    if not left_side:
        # x a = b is aᵀ xᵀ = bᵀ.
        b, transpose_a = b.T, not transpose_a
    if transpose_a:
        a, lower = a.T, not lower
    size, diagonal = a.shape[0], jnp.diagonal(a)
    # The other triangle may hold anything, and so may the diagonal: even infinity times an unsolved 0 must be 0.
    a = jnp.tril(a, -1) if lower else jnp.triu(a, 1)

    def row(step: Any, x: Any) -> Any:
        k = step if lower else size - 1 - step
        # Rows not yet solved are 0.
        rest = b[k] - a[k] @ x
        return x.at[k].set(rest if unit_diagonal else rest / diagonal[k])

    x = jax.lax.fori_loop(0, size, row, jnp.zeros_like(b))
    return x if left_side else x.T


@rule("lu")
def _lu_rule(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    return decompose(bb, eqn, _batched(_lu, xs[0], 2), *xs)


def _lu(a: Any) -> tuple[Any, Any, Any]:
    """Both factors in one matrix, the row swapped with each step's, and the permutation of the rows."""
    m, n = a.shape
    rows, columns = jnp.arange(m), jnp.arange(n)
    pivots = jnp.zeros(min(m, n), jnp.int32)

    def step(k: Any, state: Any) -> Any:
        a, pivots, order = state
        sizes = jnp.where(rows >= k, jnp.abs(a[:, k]), -jnp.inf)
        chosen = jnp.argmax(sizes).astype(jnp.int32)
        swap = jnp.where(rows == k, chosen, jnp.where(rows == chosen, k, rows))
        a, order = a[swap], order[swap]
        pivot = a[k, k]
        factor = jnp.where((rows > k) & (pivot != 0), a[:, k] / pivot, a[:, k])
        below = rows[:, None] > k
        a = jnp.where(below & (columns[None] > k), a - factor[:, None] * a[k], a)
        return a.at[:, k].set(factor), pivots.at[k].set(chosen), order

    order = jnp.arange(m, dtype=jnp.int32)
    return jax.lax.fori_loop(0, min(m, n), step, (a, pivots, order)) if min(m, n) else (a, pivots, order)


@rule("lu_pivots_to_permutation")
def _lu_pivots_rule(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    fn = partial(_permutation, size=eqn.params["permutation_size"])
    return decompose(bb, eqn, _batched(fn, xs[0], 1), *xs)


def _permutation(pivots: Any, *, size: int) -> Any:
    def swap(k: Any, order: Any) -> Any:
        other = pivots[k]
        return order.at[k].set(order[other]).at[other].set(order[k])

    order = jnp.arange(size, dtype=jnp.int32)
    return jax.lax.fori_loop(0, pivots.shape[0], swap, order) if pivots.shape[0] else order


@rule("custom_linear_solve")
def _custom_linear_solve(bb: BlockBuilder, eqn: JaxprEqn, xs: list[Value]) -> Sequence[Value]:
    """The user's solver; the other functions beside it serve differentiation."""
    lengths, solve = eqn.params["const_lengths"], eqn.params["jaxprs"].solve
    before = lengths.matvec + lengths.vecmat
    everything = before + lengths.solve + lengths.transpose_solve
    used = [*range(before, before + lengths.solve), *range(everything, len(xs))]
    jaxpr, consts = jaxprs.open_jaxpr(solve)

    def fn(*args: Any) -> Any:
        return jax.core.eval_jaxpr(jaxpr, consts, *args)

    return decompose(bb, eqn, fn, *(xs[k] for k in used), avals=[eqn.invars[k].aval for k in used])
