"""``on_unsupported="split"``: megakernels for what can be compiled, XLA for the rest.

The equations of a captured jaxpr are cut into *islands* of supported equations. Every equation gets a level: at least
that of whatever it reads, and one more where a supported equation reads from an unsupported one. Supported equations
that read nothing computed are of level 0; unsupported ones are of level −1, as they can come before all islands. The
supported equations of one level are an island. No value can leave an island and come back to it, since whatever reads
it from outside pushes its readers to the next level. But for side effects, which keep their order, fewer islands are
not possible: an equation of level n is the end of a chain in which n + 1 supported parts alternate with unsupported
ones. Loops and branches that cannot be compiled whole are split inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Var

from jax_mpk.capture import jaxprs
from jax_mpk.errors import UnsupportedError, UnsupportedPrimitiveError
from jax_mpk.graph.build import build_graph, unsupported
from jax_mpk.runtime import targets
from jax_mpk.runtime.call import Options, has_derivatives, megakernel_p, plan_target, undifferentiable_p
from jax_mpk.runtime.jax_internals import core

_NESTING = ("cond", "scan", "shard_map", "while")


@dataclass(frozen=True)
class Split:
    """A function in which islands have become ``megakernel`` equations.

    Attributes:
      jaxpr: the function.
      islands: the ``megakernel`` equations, those in nested jaxprs included.
      notes: for each equation left to XLA, why.
    """

    jaxpr: Jaxpr
    islands: tuple[JaxprEqn, ...]
    notes: tuple[str, ...]


def is_whole(jaxpr: Jaxpr, options: Options) -> bool:
    """Whether a captured jaxpr can be compiled as it is."""
    return _refusal(jaxpr, options) is None


def split(jaxpr: Jaxpr, donated: Sequence[bool], name: str, options: Options) -> Split:
    """Cuts a captured jaxpr into islands.

    Args:
      jaxpr: no calls, no constants.
      donated: one flag per argument.
      name: of the function; islands are called after it.
      options: of the call site.
    """
    return _Splitter(name, options).run(jaxpr, donated)


def undifferentiable(operands: Sequence[Any], jaxpr: Jaxpr, name: str) -> list[Any]:
    """The operands of a split function, such that differentiating it is refused where one megakernel would refuse it.

    References, which are no arrays, stay as they are: :func:`split` marks what is read from them.
    """
    are_arrays = [jaxprs.is_array_aval(v.aval) for v in jaxpr.invars]
    # Something may flow back through whatever is no array; a type of JAX's "hijax" layer need not know its tangents.
    flows = not all(are_arrays) or any(
        not jaxprs.is_array_aval(v.aval) or has_derivatives(v.aval) for v in jaxpr.outvars
    )
    return [
        undifferentiable_p.bind(x, name=name, differentiable_results=flows) if is_array else x
        for x, is_array in zip(operands, are_arrays, strict=True)
    ]


def refuse_effects(jaxpr: Jaxpr) -> None:
    """Raises UnsupportedPrimitiveError where a captured jaxpr has side effects."""
    # Most are refused when the megakernel is lowered, but JAX drops one whose results nobody needs before that.
    eqn = _effectful(jaxpr)
    if eqn is not None:
        raise unsupported(eqn, "it has a side effect, and a megakernel only computes its results")


def refuse_high_types(jaxpr: Jaxpr) -> None:
    """Raises UnsupportedError where arguments or results of a captured jaxpr have a type of JAX's "hijax" layer."""
    # Capture lowers those that only occur inside. JAX lowers a megakernel's own away before it comes to its rules.
    for eqn in jaxpr.eqns:
        for atom in (*eqn.invars, *eqn.outvars):
            if atom.aval.is_high:
                raise unsupported(eqn, f"it uses a {type(atom.aval).__name__}")
    for atom in jaxpr.outvars:
        if atom.aval.is_high:
            raise UnsupportedError(f"A megakernel makes arrays, and one of its results is a {atom.aval.str_short()}.")


def _effectful(jaxpr: Jaxpr) -> JaxprEqn | None:
    """The first equation with a side effect: the callback or access itself, not the loops around it."""
    for eqn in jaxpr.eqns:
        if all(isinstance(effect, core.NamedAxisEffect) for effect in eqn.effects):
            continue
        nested = (_effectful(inner) for inner in core.jaxprs_in_params(eqn.params))
        return next((found for found in nested if found is not None), eqn)
    return None


class _Splitter:
    def __init__(self, name: str, options: Options):
        self.name = name
        self.options = options
        self.islands: list[JaxprEqn] = []
        self.notes: list[str] = []

    def run(self, jaxpr: Jaxpr, donated: Sequence[bool]) -> Split:
        return Split(self._split(jaxpr, donated), tuple(self.islands), tuple(dict.fromkeys(self.notes)))

    def _split(self, jaxpr: Jaxpr, donated: Sequence[bool]) -> Jaxpr:
        supported = [self._is_supported(eqn, jaxpr) for eqn in jaxpr.eqns]
        levels = _levels(jaxpr, supported)
        steps: list[list[JaxprEqn]] = []
        for level in range(-1, max(levels, default=-1) + 1):
            here = [i for i, at in enumerate(levels) if at == level]
            island = [jaxpr.eqns[i] for i in here if supported[i]]
            if island:
                steps.append(island)
            steps += [[self._inside(jaxpr.eqns[i])] for i in here if not supported[i]]
        # Per variable, the steps that read it; the end of the function counts as one more.
        readers: dict[Var, set[int]] = {}
        reads = [[atom for eqn in step for atom in eqn.invars] for step in steps]
        for number, atoms in enumerate([*reads, jaxpr.outvars]):
            for atom in atoms:
                if isinstance(atom, Var):
                    readers.setdefault(atom, set()).add(number)
        kept = {v for v, flag in zip(jaxpr.invars, donated, strict=True) if not flag}
        eqns = []
        for number, step in enumerate(steps):
            is_island = len(step) > 1 or any(step[0] is e and s for e, s in zip(jaxpr.eqns, supported, strict=True))
            if is_island:
                eqns.append(self._island(step, number, readers, kept, jaxpr))
                self.islands.append(eqns[-1])
            else:
                eqns += self._reading(step[0])
        return jaxprs.make_jaxpr(jaxpr.invars, jaxpr.outvars, eqns, jaxpr)

    def _is_supported(self, eqn: JaxprEqn, jaxpr: Jaxpr) -> bool:
        refusal = _refusal(_single(eqn, jaxpr), self.options)
        if refusal is not None and eqn.primitive.name not in _NESTING:
            where = f"{PurePath(refusal.line).name} {refusal.primitive or eqn.primitive.name}".strip()
            self.notes.append(f"left to XLA: {where}: {refusal.reason}")
        return refusal is None

    def _island(
        self, eqns: list[JaxprEqn], number: int, readers: dict[Var, set[int]], kept: set[Var], like: Jaxpr
    ) -> JaxprEqn:
        made = {v for eqn in eqns for v in eqn.outvars}
        inputs = dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, Var) and v not in made)
        outputs = [
            v
            for eqn in eqns
            for v in eqn.outvars
            if not isinstance(v, jaxprs.DropVar) and readers.get(v, set()) - {number}
        ]
        inner = jaxprs.make_jaxpr(list(inputs), outputs, eqns, like)
        params = {
            "jaxpr": jaxprs.close_jaxpr(inner),
            # Whatever nobody reads after this island may be overwritten.
            "donated": tuple(v not in kept and max(readers[v]) == number for v in inputs),
            "name": f"{self.name}_{len(self.islands)}",
            "options": self.options,
        }
        return eqns[0].replace(
            primitive=megakernel_p, invars=list(inputs), outvars=outputs, params=params, effects=inner.effects
        )

    def _reading(self, eqn: JaxprEqn) -> list[JaxprEqn]:
        """An equation left to XLA; what it reads from references cannot be differentiated."""
        if all(jaxprs.is_array_aval(atom.aval) for atom in eqn.invars):
            return [eqn]
        read = {
            v: Var(v.aval) for v in eqn.outvars if jaxprs.is_array_aval(v.aval) and not isinstance(v, jaxprs.DropVar)
        }
        mark = eqn.replace(
            primitive=undifferentiable_p,
            params={"name": self.name, "differentiable_results": True},
            effects=core.no_effects,
        )
        return [
            eqn.replace(outvars=[read.get(v, v) for v in eqn.outvars]),
            *(mark.replace(invars=[own], outvars=[v]) for v, own in read.items()),
        ]

    def _inside(self, eqn: JaxprEqn) -> JaxprEqn:
        """Splits the jaxprs within a loop or branch that cannot be compiled whole."""
        if eqn.primitive.name not in _NESTING:
            return eqn
        return eqn.replace(params={key: self._inside_value(value) for key, value in eqn.params.items()})

    def _inside_value(self, value: Any) -> Any:
        if isinstance(value, tuple) and value and all(_is_jaxpr(v) for v in value):
            return tuple(self._inside_value(v) for v in value)
        if not _is_jaxpr(value):
            return value
        inner, consts = jaxprs.open_jaxpr(value)
        if consts:
            raise AssertionError("captured jaxprs have no constants")
        done = self._split(inner, [False] * len(inner.invars))
        return done if isinstance(value, Jaxpr) else jaxprs.close_jaxpr(done)


def _levels(jaxpr: Jaxpr, supported: Sequence[bool]) -> list[int]:
    made: dict[Var, int] = {}
    levels: list[int] = []
    ordered = -1
    for number, eqn in enumerate(jaxpr.eqns):
        level = 0 if supported[number] else -1
        for atom in eqn.invars:
            if isinstance(atom, Var) and atom in made:
                source = made[atom]
                crossing = supported[number] and not supported[source]
                level = max(level, levels[source] + crossing)
        if eqn.effects:
            # Side effects stay in their order.
            level = ordered = max(level, ordered)
        levels.append(level)
        made.update((v, number) for v in eqn.outvars)
    return levels


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr) or isinstance(getattr(value, "jaxpr", None), Jaxpr)


def _single(eqn: JaxprEqn, like: Jaxpr) -> Jaxpr:
    inputs = dict.fromkeys(v for v in eqn.invars if isinstance(v, Var))
    outputs = [v for v in eqn.outvars if not isinstance(v, jaxprs.DropVar)]
    return jaxprs.make_jaxpr(list(inputs), outputs, [eqn], like)


def _refusal(jaxpr: Jaxpr, options: Options) -> UnsupportedPrimitiveError | None:
    try:
        refuse_effects(jaxpr)
        build_graph(jaxpr, platform=targets.platform(plan_target(options)))
    except UnsupportedPrimitiveError as error:
        return error
    return None
