"""A text of a captured jaxpr that says everything about it, for keys of caches.

Two jaxprs with the same text are compiled to the same program. JAX's own text does not do: it rounds constants and
prints addresses.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, Literal

from jax_mpk.capture import jaxprs


class NotCanonicalError(Exception):
    """Something in a jaxpr is known by its address only."""


def canonical(jaxpr: Jaxpr) -> str | None:
    """The text, or None where there is none: something in the jaxpr is known by its address only.

    It includes the user's source lines, which become part of programs too.
    """
    try:
        return "\n".join(_jaxpr(jaxpr))
    except NotCanonicalError:
        return None


def _jaxpr(jaxpr: Jaxpr) -> Iterator[str]:
    names: dict[Any, int] = {}

    def name(var: Any) -> str:
        return f"{names.setdefault(var, len(names))}:{_aval(var.aval)}"

    def atom(value: Any) -> str:
        return _value(value.val) + ":" + _aval(value.aval) if isinstance(value, Literal) else name(value)

    inner, consts = jaxprs.open_jaxpr(jaxpr)
    yield f"in {[name(v) for v in (*inner.constvars, *inner.invars)]} consts {_value(tuple(consts))}"
    for eqn in inner.eqns:
        params = {key: _value(value) for key, value in sorted(eqn.params.items())}
        yield f"{[name(v) for v in eqn.outvars]} = {eqn.primitive.name} {[atom(v) for v in eqn.invars]} {params}"
        yield f"  at {jaxprs.user_line(eqn)} in {jaxprs.scope(eqn)}"
    yield f"out {[atom(v) for v in inner.outvars]}"


def _aval(aval: Any) -> str:
    return f"{aval.str_short()}{'*' if getattr(aval, 'weak_type', False) else ''}"


def _value(value: Any) -> str:
    if isinstance(value, Jaxpr) or isinstance(getattr(value, "jaxpr", None), Jaxpr):
        return "{" + "; ".join(_jaxpr(value)) + "}"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | enum.Enum):
        return repr(value)
    if isinstance(value, np.dtype):
        return str(value)
    if hasattr(value, "dtype") and hasattr(value, "__array__") and not isinstance(value, type):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}{array.tobytes().hex()}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_value(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}[{', '.join(map(_value, value))}]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_value, value))) + "}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ", ".join(f"{f.name}={_value(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({fields})"
    if isinstance(value, type) or callable(value):
        return _global(value)
    text = repr(value)
    if " at 0x" in text:
        raise NotCanonicalError
    return f"{type(value).__name__} {text}"


def _global(value: Any) -> str:
    """The name of a class or function that anybody can look up."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module is None or name is None or getattr(sys.modules.get(module), name, None) is not value:
        raise NotCanonicalError
    return f"{module}.{name}"
