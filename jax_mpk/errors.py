"""Every error that jax_mpk raises on purpose, and their long texts.

A user sees three kinds: something in the function cannot be compiled (:class:`UnsupportedPrimitiveError` and its
neighbours; the text names the user's line and the way out), something is wrong with how the function is used
(:class:`DifferentiationError`, :class:`ShardedInputError`, …), or something failed while a megakernel ran. XLA reports
the last: calls raise ``jax.errors.JaxRuntimeError``, whose text names :class:`LaunchError`, :class:`DeadlockError` or
:class:`DeadlineError`. These are raised where a program runs without XLA (``runtime.native.run_program``), where a plan
is simulated, and by ``jax_mpk.check()``. The ``…VerificationError`` classes mean that a stage of jax_mpk produced
something that its own checker refuses: a bug here, not in the user's program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SPLIT_HINT = (
    'To run this part in XLA and keep the rest in megakernels, pass on_unsupported="split" to '
    "jax_mpk.megakernelize; explain() then says where the function was split."
)


class JaxMpkError(Exception):
    """Base of all errors raised by jax_mpk."""


class ConfigError(JaxMpkError, ValueError):
    """An option or an environment variable has a value that jax_mpk cannot use."""


class UnsupportedError(JaxMpkError, NotImplementedError):
    """Part of the function cannot be put into a megakernel."""


class UnsupportedPrimitiveError(UnsupportedError):
    """A JAX primitive, or a use of it, that no rule lowers.

    Attributes:
      primitive: its name.
      line: ``file:line`` in the user's code, or "".
      reason: why, as half a sentence.
    """

    def __init__(self, message: str, *, primitive: str = "", line: str = "", reason: str = ""):
        super().__init__(message)
        self.primitive = primitive
        self.line = line
        self.reason = reason


class UnsupportedDtypeError(UnsupportedPrimitiveError):
    """An array has an element type that megakernels do not hold (complex, 4-bit, 8-bit floats, …)."""


class TaskTooLargeError(UnsupportedError):
    """A task is too large for the device, however the function is cut: its scratch memory, or 32-bit extents.

    Attributes:
      line: ``file:line`` in the user's code, or "".
    """

    def __init__(self, message: str, *, line: str = ""):
        super().__init__(message)
        self.line = line


class GraphVerificationError(JaxMpkError, AssertionError):
    """A Graph that breaks its own rules; a bug in jax_mpk."""


class PlanVerificationError(JaxMpkError, AssertionError):
    """A Plan that could race, deadlock or leave something unwritten; a bug in jax_mpk. It is never run."""


class ShardedInputError(JaxMpkError, ValueError):
    """An operand of a megakernel is sharded over several devices, outside ``jax.shard_map``.

    Raised when the surrounding program is compiled: XLA decides how arrays within it are sharded, also those that no
    one said anything about, if they are combined with sharded ones.
    """


class DifferentiationError(JaxMpkError, TypeError):
    """A megakernel was differentiated."""


class TargetError(JaxMpkError, RuntimeError):
    """The device is not one that the program was made for."""


class LaunchError(JaxMpkError, RuntimeError):
    """A megakernel could not be launched, or failed while it ran; through XLA, part of a JaxRuntimeError's text."""


class DeadlockError(LaunchError):
    """A megakernel waited for something that cannot happen; through XLA, part of a JaxRuntimeError's text."""


class DeadlineError(LaunchError):
    """A wait in a kernel on a GPU passed its deadline; through XLA, part of a JaxRuntimeError's text."""


class CompileError(JaxMpkError, RuntimeError):
    """The CUDA compiler refused a kernel; a bug in jax_mpk.

    Attributes:
      log: what the compiler said.
    """

    def __init__(self, message: str, *, log: str = ""):
        super().__init__(message)
        self.log = log


class CompilerNotFoundError(JaxMpkError, RuntimeError):
    """There is no CUDA compiler on this machine."""


class NativeModuleError(JaxMpkError, ImportError):
    """The compiled part of jax_mpk is missing or does not fit this installation."""


def unsupported_primitive(
    primitive: str,
    avals: Sequence[object],
    params: Mapping[str, object],
    line: str,
    reason: str = "",
) -> UnsupportedPrimitiveError:
    """The error for an equation that no rule lowers."""
    what = f"jax_mpk cannot put the primitive `{primitive}` into a megakernel"
    reason = reason or "there is no rule for it"
    text = _equation_text(what, avals, params, line, reason)
    return UnsupportedPrimitiveError(text, primitive=primitive, line=line, reason=reason)


def unsupported_dtype(
    dtype: object, primitive: str, avals: Sequence[object], params: Mapping[str, object], line: str
) -> UnsupportedDtypeError:
    """The error for an equation that reads or makes arrays of an element type the graph does not have."""
    where = f"used by the primitive `{primitive}`" if primitive else "of an argument"
    what = f"jax_mpk cannot put the element type {dtype} ({where}) into a megakernel"
    supported = "supported are bool, 8- to 64-bit integers, float16, bfloat16, float32, float64 and PRNG keys"
    text = _equation_text(what, avals, params, line, supported)
    return UnsupportedDtypeError(text, primitive=primitive, line=line, reason=f"{dtype} is not supported")


def task_too_large(primitive: str, line: str, reason: str) -> TaskTooLargeError:
    """The error for a task that the code of a GPU's kernel cannot hold."""
    lines = [f"a task of the megakernel, ending with `{primitive}`, is too large for the GPU: {reason}."]
    if line:
        lines.append(f"  in your code: {line}")
    lines.append("Give this part smaller arrays (a jax.lax loop over pieces), or leave it outside the megakernel.")
    return TaskTooLargeError("\n".join(lines), line=line)


def _equation_text(what: str, avals: Sequence[object], params: Mapping[str, object], line: str, reason: str) -> str:
    lines = [f"{what}: {reason}."]
    if line:
        lines.append(f"  in your code: {line}")
    if avals:
        lines.append("  operands: " + ", ".join(map(str, avals)))
    shown = {name: text for name, value in sorted(params.items()) if (text := _short(value))}
    if shown:
        lines.append("  parameters: " + ", ".join(f"{name}={text}" for name, text in shown.items()))
    lines.append(_SPLIT_HINT)
    return "\n".join(lines)


def _short(value: object) -> str:
    """A parameter as text, or "" where it says nothing to a reader (functions, jaxprs, defaults)."""
    if value is None or callable(value):
        return ""
    text = str(value)
    return text if len(text) <= 80 and "\n" not in text and " object at 0x" not in text else ""
