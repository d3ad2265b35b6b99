"""A random program: a list of instructions that prints as Python and runs as it prints."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.random_programs import helpers
from tests.random_programs.values import FLOATS, KEY, NUMPY, Info, int_range, is_float

#: Names that the printed code uses.
NAMES: dict[str, Any] = {"jax": jax, "jnp": jnp, "lax": lax, "np": np, "helpers": helpers, **NUMPY}


@dataclass(frozen=True)
class Block:
    """A nested function, printed as a ``def`` before the instruction that uses it.

    Attributes:
      params: one entry per argument; a tuple of names stands for an argument that is unpacked.
      instrs: its body, which may read values of the functions around it.
      results: names of what it returns.
      returns: how they are returned, with ``{0}``, ``{1}``, …
    """

    params: tuple[str | tuple[str, ...], ...]
    instrs: tuple[Instr, ...]
    results: tuple[str, ...]
    returns: str

    def live(self) -> tuple[Instr, ...]:
        """The part of its body that its results need."""
        return live(self.instrs, self.results)


@dataclass(frozen=True)
class Instr:
    """One instruction.

    Attributes:
      names: what its results are called.
      code: an expression, with ``{0}``, … for the operands and ``{f0}``, … for the nested functions.
      args: names of the operands.
      blocks: the nested functions.
      packed: a single result comes in a tuple or list.
    """

    names: tuple[str, ...]
    code: str
    args: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    packed: bool = False

    def reads(self) -> Iterator[str]:
        """Names its results depend on, those inside nested functions included (also their own, which do no harm)."""
        yield from self.args
        for block in self.blocks:
            yield from block.results
            for instr in block.live():
                yield from instr.reads()


def live(instrs: Sequence[Instr], results: Iterable[str]) -> tuple[Instr, ...]:
    """The instructions that results need."""
    needed, kept = set(results), []
    for instr in reversed(instrs):
        if needed.intersection(instr.names):
            kept.append(instr)
            needed.update(instr.reads())
    return tuple(reversed(kept))


@dataclass(frozen=True)
class Input:
    """An argument of a program.

    Attributes:
      name: its name.
      info: its shape, type and bounds.
      style: how its elements are drawn: ``"bits"`` (integers: any bits) or ``"small"`` (integers: around zero, floats:
        within their bounds).
      same: the earlier input whose array it shares, or None.
      literal: its elements, where a shrunk program fixes them.
    """

    name: str
    info: Info
    style: str = "small"
    same: str | None = None
    literal: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Program:
    """A program and the inputs it is tried on.

    Attributes:
      family: "exact" or "smooth".
      seed: what it was generated from; also seeds the elements of its inputs.
      inputs: its arguments.
      instrs: its body.
      outputs: names of its results; a name may repeat, and may be an input.
      infos: what is known of its values.
    """

    family: str
    seed: int
    inputs: tuple[Input, ...]
    instrs: tuple[Instr, ...]
    outputs: tuple[str, ...]
    infos: Mapping[str, Info] = field(repr=False)

    def source(self) -> str:
        """The program as Python code."""
        names = ", ".join(i.name for i in self.inputs)
        lines = [f"def program({names}):"]
        lines += _body(self.instrs, "    ")
        lines.append(f"    return ({''.join(name + ', ' for name in self.outputs)})")
        return "\n".join(lines)

    def function(self, float_types: Mapping[str, str] | None = None) -> Callable[..., Any]:
        """The program as a callable, with float types replaced as ``float_types`` says."""
        space = {**NAMES, **{old: NUMPY[new] for old, new in (float_types or {}).items()}}
        exec(compile(self.source(), f"<random program {self.family} {self.seed}>", "exec"), space)
        fn: Callable[..., Any] = space["program"]
        return fn

    def arrays(self, *, wide: bool = False) -> list[Any]:
        """Its arguments."""
        made: dict[str, Any] = {}
        for position, given in enumerate(self.inputs):
            if given.same is not None:
                made[given.name] = made[given.same]
            elif given.literal is not None:
                made[given.name] = given.literal
            else:
                rng = np.random.default_rng([self.seed, position])
                made[given.name] = elements(given.info, given.style, rng)
        arrays = list(made.values())
        if wide:
            arrays = [a.astype(np.float64) if is_float(i.info.dtype) else a for a, i in zip(arrays, self.inputs)]
        return arrays

    def pruned(self) -> Program:
        """Without instructions and inputs that no output needs."""
        kept = live(self.instrs, self.outputs)
        needed = {*self.outputs, *(name for instr in kept for name in instr.reads())}
        inputs = []
        for i in self.inputs:
            if i.name in needed:
                inputs.append(i if i.same in needed else dataclasses.replace(i, same=None, literal=self._array(i)))
        return dataclasses.replace(self, inputs=tuple(inputs), instrs=kept)

    def _array(self, wanted: Input) -> Any:
        return None if wanted.same is None else self.arrays()[self.inputs.index(wanted)]

    def report(self) -> str:
        """Code that reproduces the program and its inputs, for a bug report."""
        lines = [
            f"# random program, family {self.family}, seed {self.seed}",
            "import jax, jax.numpy as jnp, ml_dtypes, numpy as np",
            "from jax import lax",
            "from numpy import bool_ as b1, float16 as f16, float32 as f32, float64 as f64",
            "from numpy import int8 as s8, int16 as s16, int32 as s32, int64 as s64",
            "from numpy import uint8 as u8, uint16 as u16, uint32 as u32, uint64 as u64",
            "bf16 = ml_dtypes.bfloat16",
            "jax.config.update('jax_enable_x64', True)",
        ]
        if "helpers." in self.source():
            lines.insert(3, "from tests.random_programs import helpers")
        lines += ["", "", self.source(), "", ""]
        for given, array in zip(self.inputs, self.arrays(), strict=True):
            lines.append(f"{given.name} = {array_code(array, given.info.dtype)}")
        lines.append(f"print(jax.jit(program)({', '.join(i.name for i in self.inputs)}))")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.report()


def _body(instrs: tuple[Instr, ...], indent: str) -> list[str]:
    lines = []
    for instr in instrs:
        functions = {}
        for k, block in enumerate(instr.blocks):
            functions[f"f{k}"] = name = f"{instr.names[0]}_f{k}"
            lines += _function(name, block, indent)
        targets = ", ".join(instr.names) + ("," if instr.packed and len(instr.names) == 1 else "")
        # Not str.format: the code may hold braces of its own.
        code = re.sub(r"\{(\d+)\}", lambda m, instr=instr: instr.args[int(m[1])], instr.code)
        code = re.sub(r"\{(f\d+)\}", lambda m, functions=functions: functions[m[1]], code)
        lines.append(f"{indent}{targets} = {code}")
    return lines


def _function(name: str, block: Block, indent: str) -> list[str]:
    heads = [p if isinstance(p, str) else f"t{k}" for k, p in enumerate(block.params)]
    lines = [f"{indent}def {name}({', '.join(heads)}):"]
    for head, param in zip(heads, block.params):
        if isinstance(param, tuple) and param:
            lines.append(f"{indent}    {', '.join(param)}{',' if len(param) == 1 else ''} = {head}")
    lines += _body(block.instrs, indent + "    ")
    returns = re.sub(r"\{(\d+)\}", lambda m: block.results[int(m[1])], block.returns)
    lines.append(f"{indent}    return {returns}")
    return lines


def elements(info: Info, style: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random elements within an input's bounds."""
    dtype = NUMPY[info.dtype]
    if info.dtype == "b1":
        return rng.integers(0, 2, info.shape).astype(np.bool_)
    if is_float(info.dtype):
        if info.rough:
            return np.clip(rng.normal(size=info.shape), info.lo, info.hi).astype(dtype)
        scale = 2**info.frac
        whole = rng.integers(int(info.lo * scale), int(info.hi * scale), info.shape, endpoint=True)
        return (whole / scale).astype(dtype)
    low, high = int_range(info.dtype)
    if style == "small":
        low, high = max(low, -9), min(high, 9)
    low, high = max(low, int(info.lo)), min(high, int(info.hi))
    return rng.integers(low, high, info.shape, dtype=dtype, endpoint=True)


def array_code(array: Any, dtype: str) -> str:
    """An expression whose value is ``array``, to the last bit."""
    if dtype == KEY:
        raise ValueError("keys are no inputs")
    array = np.asarray(array)
    if array.size <= 64 and dtype not in FLOATS:
        return f"np.array({array.tolist()}, {dtype}).reshape({array.shape})"
    exact = np.asarray(array, np.float64) if dtype in FLOATS else array
    if array.size <= 64 and np.isfinite(exact).all() and not (np.signbit(exact) & (exact == 0)).any():
        return f"np.array({exact.tolist()}, {dtype}).reshape({array.shape})"
    data = array.tobytes().hex()
    return f"np.frombuffer(bytes.fromhex({data!r}), {dtype}).reshape({array.shape})"
