"""From a captured jaxpr to a :class:`~jax_mpk.graph.ir.Graph`: the rule table and what rules build with.

A rule turns one equation into operators. It gets the :class:`BlockBuilder` of the block under construction, the
equation (for avals and parameters) and the values of its operands, and returns the values of its results::

    @rule("neg")
    def _neg(bb, eqn, xs):
        def body(b, at, load):                       # b: scalar Builder; at: coordinates of the output
            return b.op("neg", b.compute(load(0, at)))
        return bb.map(xs[0].shape, xs, body, [xs[0].dtype])

Rules live in the modules ``rules_*.py`` beside this one, which are imported on first use.

Values have the *physical* shape of their aval: a PRNG key array has trailing axes and element type u32. Rules that only
move elements use :func:`reindex`, which leaves those axes alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

import jax_mpk.graph
from jax_mpk import errors
from jax_mpk.capture import capture, jaxprs
from jax_mpk.graph import dtypes
from jax_mpk.graph.builder import BlockBuilder, Body, Epilogue, Load, identity
from jax_mpk.graph.ir import Graph, Source, Value
from jax_mpk.graph.prune import prune
from jax_mpk.graph.scalar import Builder

__all__ = [
    "RULES",
    "BlockBuilder",
    "Body",
    "Epilogue",
    "Load",
    "Rule",
    "build_graph",
    "decompose",
    "element_type",
    "identity",
    "load_rules",
    "refusal",
    "reindex",
    "rule",
    "run",
    "unsupported",
]

Rule = Callable[[BlockBuilder, JaxprEqn, list[Value]], Sequence[Value]]

RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of the named primitives."""

    def register(fn: Rule) -> Rule:
        taken = [name for name in primitives if name in RULES]
        if taken:
            raise ValueError(f"{fn.__module__}: {', '.join(taken)} already have rules")
        RULES.update(dict.fromkeys(primitives, fn))
        return fn

    return register


def load_rules() -> dict[str, Rule]:
    """The complete rule table."""
    for module in pkgutil.iter_modules(jax_mpk.graph.__path__):
        if module.name.startswith("rules_"):
            importlib.import_module(f"jax_mpk.graph.{module.name}")
    return RULES


def build_graph(jaxpr: Jaxpr, *, donated: frozenset[int] = frozenset(), platform: str | None = None) -> Graph:
    """Lowers a captured jaxpr (no constants, no calls; see :func:`jax_mpk.capture.capture`).

    Args:
      jaxpr: the function.
      donated: positions of arguments whose storage may be overwritten.
      platform: where the graph will run, "cpu" or "cuda", or None where that is not known: functions that choose by
        platform (``lax.platform_dependent``) must choose the same for both then.

    Raises:
      UnsupportedPrimitiveError: an equation has no rule, its rule refuses it, or an element type is not supported.
    """
    load_rules()
    bb = BlockBuilder(platform=platform)
    inputs = []
    for var in jaxpr.invars:
        name = element_type(var.aval)
        if name is None:
            for eqn in jaxpr.eqns:
                if var in eqn.invars:
                    _check_types(eqn)
            raise errors.unsupported_dtype(getattr(var.aval, "dtype", var.aval), "", [var.aval], {}, "")
        inputs.append(bb.value(jaxprs.physical(var.aval)[0], name))
    results = run(bb, jaxpr, inputs)
    return prune(
        Graph(
            values=tuple(bb.values),
            inputs=tuple(v.id for v in inputs),
            block=bb.block(results),
            donated=donated,
        )
    )


def run(bb: BlockBuilder, jaxpr: Jaxpr, args: Sequence[Value]) -> list[Value]:
    """Builds the equations of a captured jaxpr into a block and returns the values of its results."""
    env: dict[Var, Value] = dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: jaxprs.Atom) -> Value:
        if isinstance(atom, Literal):
            return bb.constant_array(jaxprs.literal_value(atom))
        return env[atom]

    for eqn in jaxpr.eqns:
        source = Source(eqn.primitive.name, jaxprs.user_line(eqn), jaxprs.scope(eqn))
        with bb.built_from(source):
            _check_types(eqn)
            apply = RULES.get(eqn.primitive.name)
            if apply is None:
                raise unsupported(eqn)
            try:
                results = apply(bb, eqn, [read(atom) for atom in eqn.invars])
            except Exception as error:
                _name_equation(error, eqn)
                raise
        for var, value in zip(eqn.outvars, results, strict=True):
            _check_result(eqn, var, value)
            env[var] = value
    return [read(atom) for atom in jaxpr.outvars]


def unsupported(eqn: JaxprEqn, reason: str = "") -> errors.UnsupportedPrimitiveError:
    """The error for an equation that cannot be lowered; rules raise it where they refuse a use."""
    avals = [v.aval for v in eqn.invars]
    return errors.unsupported_primitive(eqn.primitive.name, avals, eqn.params, jaxprs.user_line(eqn), reason)


def element_type(aval: Any) -> str | None:
    """Short element type name of an aval's storage, or None where the graph has no such type."""
    dtype = jaxprs.storage_dtype(aval)
    return None if dtype is None else dtypes.from_numpy(dtype)


def reindex(
    bb: BlockBuilder,
    eqn: JaxprEqn,
    x: Value,
    index: Callable[[Builder, list[int]], Sequence[int]],
    result: int = 0,
) -> Value:
    """A map whose element at (logical) coordinates ``at`` is the element of ``x`` at ``index(b, at)``.

    ``index`` sees logical coordinates only; trailing physical axes of PRNG keys are passed through.
    """
    aval: Any = eqn.outvars[result].aval
    rank = len(aval.shape)

    def body(b: Builder, at: list[int], load: Load) -> int:
        return load(0, [*index(b, at[:rank]), *at[rank:]])

    return bb.map(jaxprs.physical(aval)[0], [x], body, [x.dtype])[0]


def decompose(
    bb: BlockBuilder, eqn: JaxprEqn, fn: Callable[..., Any], *values: Value, avals: Sequence[Any] | None = None
) -> list[Value]:
    """Builds a jax function inline: for primitives that are compositions of others.

    Args:
      bb: block to build into; operators get the source of the equation being built.
      eqn: that equation.
      fn: jax function of as many arrays as there are values.
      *values: its arguments.
      avals: what ``fn`` is traced on; by default arrays of the values' shapes and element types.
    """
    if avals is None:
        avals = [np.broadcast_to(np.zeros((), dtypes.to_numpy(v.dtype)), v.shape) for v in values]
    captured = capture(jaxprs.trace(fn, avals, eqn))
    consts = [bb.constant_array(np.asarray(const)) for const in captured.consts]
    with bb.built_from(bb.source, pin=True):
        return run(bb, captured.jaxpr, [*consts, *values])


def refusal(eqn: JaxprEqn) -> errors.UnsupportedPrimitiveError | None:
    """Why an equation of a captured jaxpr cannot be lowered, or None if it can."""
    load_rules()
    bb = BlockBuilder()
    try:
        _check_types(eqn)
        if eqn.primitive.name not in RULES:
            return unsupported(eqn)
        operands = []
        for atom in eqn.invars:
            dtype = element_type(atom.aval)
            assert dtype is not None
            operands.append(bb.value(jaxprs.physical(atom.aval)[0], dtype))
        RULES[eqn.primitive.name](bb, eqn, operands)
    except errors.UnsupportedPrimitiveError as error:
        return error
    return None


def _name_equation(error: Exception, eqn: JaxprEqn) -> None:
    """Says in an unexpected error which equation a rule failed on; the innermost one is enough."""
    if not isinstance(error, errors.JaxMpkError) and not getattr(error, "__notes__", None):
        error.add_note(f"while lowering {eqn.primitive.name} at {jaxprs.user_line(eqn)}: {eqn}")


def _check_types(eqn: JaxprEqn) -> None:
    atom: Any
    for atom in (*eqn.invars, *eqn.outvars):
        if element_type(atom.aval) is None:
            if not jaxprs.is_array_aval(atom.aval):
                raise unsupported(eqn, f"it uses a {type(atom.aval).__name__}")
            avals = [v.aval for v in eqn.invars]
            name, line = eqn.primitive.name, jaxprs.user_line(eqn)
            raise errors.unsupported_dtype(atom.aval.dtype, name, avals, eqn.params, line)


def _check_result(eqn: JaxprEqn, var: Var, value: Value) -> None:
    """Rules are checked against JAX's own shape rules on every use."""
    shape, name = jaxprs.physical(var.aval)[0], element_type(var.aval)
    if (value.shape, value.dtype) != (shape, name):
        raise errors.GraphVerificationError(
            f"the rule of {eqn.primitive.name} built {value.dtype}{list(value.shape)} "
            f"where JAX says {name}{list(shape)}\n  {eqn}"
        )
