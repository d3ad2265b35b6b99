"""From JAX's jaxpr to one without calls and constants: see :mod:`jax_mpk.capture.inline`."""

from jax_mpk.capture.inline import Captured, capture

__all__ = ["Captured", "capture"]
