"""Capture: a jaxpr without calls and without constants.

JAX's jaxprs nest: ``jit``, custom derivatives, ``checkpoint`` and others are calls of inner jaxprs, each of which
may carry constants of its own. :func:`capture` writes all calls out, those of Python functions that JAX's "hijax"
primitives are too, and lifts the constants to the front of the argument list. Loops, branches and ``shard_map`` stay;
their inner jaxprs are captured likewise, and constants reach them as operands. The result is still a jaxpr that JAX
itself can evaluate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jax_mpk.capture import jaxprs
from jax_mpk.capture.jaxprs import Atom

#: Primitives that mean "apply this jaxpr to the operands", and the parameters that may hold it.
CALLS: dict[str, tuple[str, ...]] = {
    "call": ("call_jaxpr",),
    "checkpoint": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "composite": ("jaxpr", "call_jaxpr"),
    "core_call": ("call_jaxpr",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_lin": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "custom_vjp_call_jaxpr": ("fun_jaxpr", "call_jaxpr"),
    "custom_vmap_call": ("call",),
    "eval_jaxpr": ("call_jaxpr",),
    "jit": ("jaxpr",),
    "linear_call": ("callee",),
    "megakernel": ("jaxpr",),
    "pjit": ("jaxpr",),
    "remat": ("jaxpr",),
    "remat2": ("jaxpr",),
    "xla_metadata_call": ("jaxpr",),
}

#: What says something to JAX only: what stands around the parts of a split function, and that a value is not dead.
_MARKS = ("undifferentiable", "dce_sink")


@dataclass(frozen=True)
class Captured:
    """A captured function.

    Attributes:
      jaxpr: no calls and no constants; its first ``len(consts)`` arguments stand for the constants.
      consts: arrays (or tracers of an outer trace) the function closes over, each once.
    """

    jaxpr: Jaxpr
    consts: tuple[Any, ...]


def capture(closed_jaxpr: Any, *, batchable: bool = False) -> Captured:
    """Inlines calls, lifts constants and drops dead equations.

    Args:
      closed_jaxpr: what to capture.
      batchable: calls with a rule of their own for ``vmap`` stay, as the result may yet be batched.
    """
    jaxpr, consts = jaxprs.open_jaxpr(jaxprs.lower(closed_jaxpr))
    scope = _Scope(frozenset({"custom_vmap_call"}) if batchable else frozenset())
    new = scope.body(jaxpr, consts, None)
    lifted = scope.lifted
    new, used = jaxprs.eliminate_dead_code(new, len(lifted))
    return Captured(new, tuple(value for (value, _), keep in zip(lifted, used, strict=True) if keep))


class _Scope:
    """One jaxpr under construction; inner jaxprs of loops and branches have scopes of their own."""

    def __init__(self, kept: frozenset[str]) -> None:
        self.eqns: list[JaxprEqn] = []
        self._kept = kept
        self._consts: dict[int, tuple[Any, Var]] = {}

    @property
    def lifted(self) -> list[tuple[Any, Var]]:
        """Constants that this jaxpr takes as leading arguments."""
        return list(self._consts.values())

    def const(self, value: Any, aval: Any) -> Atom:
        """The atom for a constant: a literal for scalars known now, else an argument."""
        known = _scalar(value, aval)
        if known is not None:
            return Literal(known, aval)
        if id(value) not in self._consts:
            # The table keeps the value alive, so that its id stays its own.
            self._consts[id(value)] = (value, Var(aval))
        return self._consts[id(value)][1]

    def body(self, jaxpr: Jaxpr, consts: Sequence[Any], outer: JaxprEqn | None) -> Jaxpr:
        """The whole of ``jaxpr``, with the constants it turns out to need as leading arguments."""
        invars = [Var(v.aval) for v in jaxpr.invars]
        outvars = self.inline(jaxpr, consts, invars, outer)
        return jaxprs.make_jaxpr([*(var for _, var in self.lifted), *invars], outvars, self.eqns, jaxpr)

    def inline(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Atom], outer: JaxprEqn | None) -> list[Atom]:
        """Appends the equations of ``jaxpr`` applied to ``args``; returns its results."""
        env: dict[Var, Atom] = {}
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.const(value, var.aval)
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Atom) -> Atom:
            if not isinstance(atom, Literal):
                return env[atom]
            return atom if _scalar(atom.val, atom.aval) is not None else self.const(atom.val, atom.aval)

        for eqn in jaxpr.eqns:
            eqn = eqn.replace(
                invars=[read(atom) for atom in eqn.invars],
                source_info=jaxprs.join_source(outer, eqn, jaxpr),
            )
            name = eqn.primitive.name
            if name in CALLS and name not in self._kept:
                inner, inner_consts = jaxprs.open_jaxpr(_callee(eqn))
                results = self.inline(inner, inner_consts, eqn.invars, eqn)
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            if name in _MARKS:
                env.update(zip(eqn.outvars, eqn.invars, strict=False))  # a sink has no results
                continue
            outvars = [v if isinstance(v, jaxprs.DropVar) else Var(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outvars, strict=True))
            eqn = eqn.replace(outvars=outvars)
            structure = _STRUCTURES.get(name)
            self.eqns.append(structure(self, eqn) if structure is not None else eqn)
        return [read(atom) for atom in jaxpr.outvars]

    def nested(self, closed: Any, outer: JaxprEqn) -> tuple[Jaxpr, list[tuple[Any, Var]]]:
        """An inner jaxpr, captured, and the constants it takes first."""
        jaxpr, consts = jaxprs.open_jaxpr(closed)
        scope = _Scope(self._kept)
        return scope.body(jaxpr, consts, outer), scope.lifted

    def operands(self, lifted: Sequence[tuple[Any, Var]]) -> list[Atom]:
        """Atoms of this scope for the constants of an inner one."""
        return [self.const(value, var.aval) for value, var in lifted]


def _scan(scope: _Scope, eqn: JaxprEqn) -> JaxprEqn:
    body, lifted = scope.nested(eqn.params["jaxpr"], eqn)
    params = jaxprs.add_scan_consts(eqn.params, len(lifted))
    params["jaxpr"] = jaxprs.close_jaxpr(body)
    return eqn.replace(invars=[*scope.operands(lifted), *eqn.invars], params=params)


def _while(scope: _Scope, eqn: JaxprEqn) -> JaxprEqn:
    params = dict(eqn.params)
    cond, cond_lifted = scope.nested(params["cond_jaxpr"], eqn)
    body, body_lifted = scope.nested(params["body_jaxpr"], eqn)
    split = params["cond_nconsts"]
    invars = [
        *scope.operands(cond_lifted),
        *eqn.invars[:split],
        *scope.operands(body_lifted),
        *eqn.invars[split:],
    ]
    params.update(
        cond_jaxpr=jaxprs.close_jaxpr(cond),
        body_jaxpr=jaxprs.close_jaxpr(body),
        cond_nconsts=split + len(cond_lifted),
        body_nconsts=params["body_nconsts"] + len(body_lifted),
    )
    return eqn.replace(invars=invars, params=params)


def _cond(scope: _Scope, eqn: JaxprEqn) -> JaxprEqn:
    arms = [scope.nested(branch, eqn) for branch in eqn.params["branches"]]
    union = {id(value): (value, var) for _, lifted in arms for value, var in lifted}
    branches = []
    for jaxpr, lifted in arms:
        own = {id(value): var for value, var in lifted}
        leading = [own.get(key) or Var(var.aval) for key, (_, var) in union.items()]
        rest = jaxpr.invars[len(lifted) :]
        new = jaxprs.make_jaxpr([*leading, *rest], jaxpr.outvars, jaxpr.eqns, jaxpr)
        branches.append(jaxprs.close_jaxpr(new))
    index, *operands = eqn.invars
    invars = [index, *scope.operands(list(union.values())), *operands]
    return eqn.replace(invars=invars, params=dict(eqn.params, branches=tuple(branches)))


def _shard_map(scope: _Scope, eqn: JaxprEqn) -> JaxprEqn:
    body, lifted = scope.nested(eqn.params["jaxpr"], eqn)
    replicated = (jax.sharding.PartitionSpec(),) * len(lifted)
    params = dict(eqn.params, jaxpr=body, in_specs=(*replicated, *eqn.params["in_specs"]))
    return eqn.replace(invars=[*scope.operands(lifted), *eqn.invars], params=params)


_STRUCTURES = {"cond": _cond, "scan": _scan, "shard_map": _shard_map, "while": _while}


def _callee(eqn: JaxprEqn) -> Any:
    for name in CALLS[eqn.primitive.name]:
        if name in eqn.params:
            return eqn.params[name]
    raise KeyError(f"{eqn.primitive.name} holds no jaxpr in {', '.join(CALLS[eqn.primitive.name])}")


def _scalar(value: Any, aval: Any) -> Any:
    """The value as a scalar that a literal may hold, or None: an array, a key, or not known yet."""
    if isinstance(value, jax.core.Tracer) or not jaxprs.is_array_aval(aval) or aval.shape:
        return None
    if isinstance(value, bool | int | float | complex | np.generic):
        return value
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return np.asarray(value)[()]
