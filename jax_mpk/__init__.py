"""jax_mpk turns a JAX function into one persistent kernel: a single XLA custom call per device."""

from jax_mpk import config
from jax_mpk._version import __version__
from jax_mpk.api import Megakernelized, export_checks, megakernelize, place
from jax_mpk.errors import (
    CompileError,
    CompilerNotFoundError,
    ConfigError,
    DeadlineError,
    DeadlockError,
    DifferentiationError,
    GraphVerificationError,
    JaxMpkError,
    LaunchError,
    NativeModuleError,
    PlanVerificationError,
    ShardedInputError,
    TargetError,
    TaskTooLargeError,
    UnsupportedDtypeError,
    UnsupportedError,
    UnsupportedPrimitiveError,
)
from jax_mpk.plan.ir import Target
from jax_mpk.runtime.native import check
from jax_mpk.runtime.timing import compile_seconds
from jax_mpk.stages import MegakernelLowered

__all__ = [
    "CompileError",
    "CompilerNotFoundError",
    "ConfigError",
    "DeadlineError",
    "DeadlockError",
    "DifferentiationError",
    "GraphVerificationError",
    "JaxMpkError",
    "LaunchError",
    "MegakernelLowered",
    "Megakernelized",
    "NativeModuleError",
    "PlanVerificationError",
    "ShardedInputError",
    "Target",
    "TargetError",
    "TaskTooLargeError",
    "UnsupportedDtypeError",
    "UnsupportedError",
    "UnsupportedPrimitiveError",
    "__version__",
    "check",
    "compile_seconds",
    "config",
    "export_checks",
    "megakernelize",
    "place",
]
