"""JAX's jaxpr data structures as this package uses them, over all supported JAX versions.

The only module of ``capture`` and ``graph`` that imports JAX internals; what differs between versions is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import core, dtypes, source_info_util
from jax._src.interpreters import partial_eval
from jax._src.lax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

Atom = Var | Literal

# Frames of this package are not the user's.
source_info_util.register_exclusion(str(Path(__file__).parent.parent))

DropVar = core.DropVar


def open_jaxpr(closed: Any) -> tuple[Jaxpr, list[Any]]:
    """Jaxpr and constants of what a parameter may hold: a closed jaxpr, or an open one without constants."""
    if isinstance(closed, Jaxpr):
        # From 0.11 on a Jaxpr carries its own constants.
        return closed, list(getattr(closed, "consts", ()))
    return closed.jaxpr, list(closed.consts)


def close_jaxpr(jaxpr: Jaxpr) -> Any:
    """Inverse of :func:`open_jaxpr` for a jaxpr without constants."""
    # From 0.12 on there is no other class; before, 0.11 had two names for one.
    closed: Callable[[Jaxpr, Sequence[Any]], Any] | None = getattr(core, "ClosedJaxpr", None)
    return jaxpr if closed is None else closed(jaxpr, ())


def lower(closed: Any) -> Any:
    """The closed jaxpr that JAX itself would compile: without primitives and types of its "hijax" layer.

    Such a primitive (from 0.12 on, ``jnp.searchsorted`` binds one) holds no jaxpr but a Python function, which
    JAX traces when it lowers the calls, loops and branches around it.
    """
    jaxpr, _ = open_jaxpr(closed)
    # Arguments of such a type stand for any number of arrays, or for places to write to. They are refused later.
    if not jaxpr.is_high or any(v.aval.is_high for v in (*jaxpr.constvars, *jaxpr.invars, *jaxpr.outvars)):
        return closed
    return partial_eval.lower_jaxpr2(closed)


def make_jaxpr(invars: Sequence[Var], outvars: Sequence[Atom], eqns: Sequence[JaxprEqn], like: Jaxpr) -> Jaxpr:
    """A jaxpr without constants; effects are those of its equations."""
    effects: set[Any] = set().union(*(eqn.effects for eqn in eqns))
    # Effects on references name variables that are no arguments here.
    effects = {e for e in effects if not isinstance(e, core.effects.JaxprInputEffect)}
    info = like.debug_info._replace(arg_names=None, result_paths=None)
    return Jaxpr((), list(invars), list(outvars), list(eqns), frozenset(effects), info)  # type: ignore[call-arg]


def eliminate_dead_code(jaxpr: Jaxpr, consts: int) -> tuple[Jaxpr, list[bool]]:
    """Drops equations, and carries of loops, that no result needs.

    Args:
      jaxpr: a jaxpr without constants.
      consts: number of leading arguments that may be dropped too; the others stay.

    Returns:
      The new jaxpr, and which of the leading arguments it kept.
    """
    if any(isinstance(e, core.effects.JaxprInputEffect) for eqn in jaxpr.eqns for e in eqn.effects):
        return jaxpr, [True] * consts  # equations on references name variables; they are refused later anyway
    stay = [False] * consts + [True] * (len(jaxpr.invars) - consts)
    new, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=stay)
    return new, list(used)[:consts]


def trace(fn: Callable[..., Any], avals: Sequence[Any], source: JaxprEqn) -> Any:
    """Closed jaxpr of ``fn`` on arguments of the given avals; its equations come from where ``source`` does."""
    args = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    info = source.source_info
    with source_info_util.user_context(info.traceback, name_stack=info.name_stack):
        return jax.make_jaxpr(fn)(*args)


def join_source(outer: JaxprEqn | None, eqn: JaxprEqn, jaxpr: Jaxpr) -> Any:
    """Source of an equation of ``jaxpr`` once it is part of what ``outer`` called.

    Name stacks are joined. Functions of JAX itself (``jax.nn.silu``) are traced once and reused, so that
    their equations remember the line of the first call; those take the line of ``outer``. So do equations that
    remember none, as JAX keeps no frames below those of the function it traces: ``jax.jit(jnp.linalg.qr)``. Without
    ``outer`` it is the call that runs now.
    """
    info = eqn.source_info
    unknown = source_info_util.user_frame(info.traceback) is None
    if outer is None:
        return info.replace(traceback=source_info_util.current().traceback) if unknown else info
    around = outer.source_info
    _, _, where = str(jaxpr.debug_info.func_src_info).rpartition(" at ")
    library = bool(where) and not source_info_util.is_user_filename(where.rpartition(":")[0])
    traceback = around.traceback if library or unknown else info.traceback
    return info.replace(traceback=traceback, name_stack=around.name_stack + info.name_stack)


def ragged_dot_general(*args: Any, **params: Any) -> Any:
    """JAX's own decomposition of ``ragged_dot_general`` into masked contractions."""
    return lax._ragged_dot_general_impl(*args, **params)


def user_line(eqn: JaxprEqn) -> str:
    """``file:line`` of the user's code that an equation comes from, or ""."""
    frame = source_info_util.user_frame(eqn.source_info.traceback)
    return f"{frame.file_name}:{frame.start_line}" if frame is not None else ""


def scope(eqn: JaxprEqn) -> str:
    """The user's name stack around an equation, as "a/b", or ""."""
    return str(eqn.source_info.name_stack)


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of constants and of carries among the arguments of a ``scan`` equation."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def add_scan_consts(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Parameters of a ``scan`` with more constants; the caller puts them first and replaces the jaxpr."""
    consts, _ = scan_sizes(params)
    if "num_consts" in params:
        return dict(params, num_consts=consts + count)
    from jax._src import flattree  # type: ignore[attr-defined]

    _, carry, xs = params["ft_in"].unpack()
    return dict(params, ft_in=flattree.pack((flattree.nones(consts + count), carry, xs)))


def is_array_aval(aval: Any) -> bool:
    return isinstance(aval, core.ShapedArray)


def physical(aval: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and NumPy dtype in which an aval is stored: PRNG keys are uint32 arrays with trailing axes."""
    if isinstance(aval.dtype, dtypes.ExtendedDType):
        aval = core.physical_aval(aval)
    return tuple(aval.shape), aval.dtype


def trailing(aval: Any) -> tuple[int, ...]:
    """The axes that the storage of an aval has beyond those JAX shows: () for all but PRNG keys."""
    return physical(aval)[0][len(aval.shape) :]


def storage_dtype(aval: Any) -> np.dtype | None:
    """NumPy dtype in which an aval is stored, or None for what no array holds (tokens, references, float0)."""
    if not is_array_aval(aval) or aval.dtype == jax.dtypes.float0:
        return None
    return physical(aval)[1]


def literal_value(literal: Literal) -> np.ndarray:
    """A literal's value as an array of its storage type."""
    return np.asarray(literal.val, dtype=physical(literal.aval)[1])
