"""The table of instructions, filled by the ``ops_*`` modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.random_programs.generator import Gen

Place = Callable[[Gen, str], None]


@dataclass(frozen=True)
class Op:
    """A kind of instruction.

    Attributes:
      name: a primitive it places, or what it is called where that depends.
      place: appends it for an element type.
      exact, smooth: element types it can be asked for, by family.
      weight, exact_weight: how often it is drawn, in the smooth and in the exact family.
    """

    name: str
    place: Place
    exact: tuple[str, ...]
    smooth: tuple[str, ...]
    weight: float
    exact_weight: float

    def dtypes(self, family: str) -> tuple[str, ...]:
        return self.exact if family == "exact" else self.smooth


OPS: dict[str, Op] = {}


def op(
    name: str,
    *,
    exact: Sequence[str] = (),
    smooth: Sequence[str] = (),
    weight: float = 1.0,
    exact_weight: float | None = None,
) -> Callable[[Place], Place]:
    """Registers the decorated function."""

    def register(place: Place) -> Place:
        if name in OPS:
            raise ValueError(f"two instructions are called {name}")
        OPS[name] = Op(
            name, place, tuple(exact), tuple(smooth), weight, weight if exact_weight is None else exact_weight
        )
        return place

    return register
