"""Rules about the source tree: who imports whom, who reads the environment, how long a file may be.

The pipeline's data flows one way, and so do imports. Every import counts, also inside functions and
under ``TYPE_CHECKING``: a type that a layer should not know is knowledge it should not have.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "jax_mpk"

# Lowest first. A module imports from its own part and from lower lines; parts on one line do not
# know each other.
LAYERS = (
    ("_version", "errors"),
    ("config",),
    ("tasks",),
    ("capture",),
    ("graph",),
    ("plan",),
    ("codegen",),
    ("runtime",),
    ("debug", "sharding", "stages"),
    ("api",),
    ("__init__",),
)
# Vocabulary that every layer may import, because it imports nothing of jax_mpk itself.
SHARED = ("jax_mpk.graph.dtypes",)
# The extension module is a binary; only this layer may load it.
NATIVE = "_native"
NATIVE_USERS = {"runtime"}

# A verifier that shared code with the planner would share its mistakes: it reads IRs and derives the
# rest itself.
VERIFIERS = "jax_mpk/plan/verify*.py"
VERIFIERS_MAY_IMPORT = (
    "jax_mpk.errors",
    "jax_mpk.graph.bounds",
    "jax_mpk.graph.dtypes",
    "jax_mpk.graph.ir",
    "jax_mpk.graph.regions",
    "jax_mpk.graph.scalar*",
    "jax_mpk.graph.spans",
    "jax_mpk.plan.ir*",
    "jax_mpk.plan.verify*",
)

# Users of the public interface: what `import jax_mpk` offers and nothing below it.
PUBLIC_ONLY = ("models",)

ENVIRONMENT_READERS = {"jax_mpk/config.py"}

MAX_LINES = 600
SIZED = ("jax_mpk", "ffi", "csrc", "models", "tests", "benchmarks")
SOURCE_SUFFIXES = {".py", ".pyi", ".cc", ".cu", ".cuh", ".h"}

# The compiler knows operators and shapes, never models.
MODEL_FREE = ("jax_mpk", "ffi", "csrc")
MODEL_NAMES = re.compile(
    r"(?<![a-z])(llama|qwen|smol_?lm|bert|roberta|mini_?lm|gpt|mistral|mixtral|gemma|deepseek)",
    re.IGNORECASE,
)


def sources(*folders: str) -> Iterator[Path]:
    """Source files under the folders, as paths relative to the repository's root."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                yield path.relative_to(ROOT)


def python_sources(*folders: str) -> list[Path]:
    return [path for path in sources(*folders) if path.suffix == ".py"]


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(read(path), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file() or name == f"{PACKAGE}.{NATIVE}"


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of each import; `from a import b` is a.b where that is a module."""
    package = ".".join(path.parent.parts)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(path.parent.parts) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if is_module(inner) else base


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Like `imports`, only those of jax_mpk itself."""
    for line, name in imports(path):
        if name == PACKAGE or name.startswith(PACKAGE + "."):
            yield line, name


def part(name: str) -> str:
    """The first name under jax_mpk: 'plan' for jax_mpk.plan.ir, '__init__' for jax_mpk itself."""
    return (name.split(".") + ["__init__"])[1]


def rank(name: str) -> int:
    for i, layer in enumerate(LAYERS):
        if part(name) in layer:
            return i
    pytest.fail(f"{name} has no place in LAYERS of {Path(__file__).name}: decide where it belongs")


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(Path(name.replace(".", "/")).match(p.replace(".", "/")) for p in patterns)


def layer_faults(path: Path) -> Iterator[str]:
    me = module_name(path)
    for line, name in own_imports(path):
        if part(name) == NATIVE:
            if part(me) not in NATIVE_USERS:
                yield f"{path}:{line}: only {', '.join(NATIVE_USERS)} may import {name}"
        elif me in SHARED:
            yield f"{path}:{line}: {me} is shared by all layers and must not import {name}"
        elif part(name) != part(me) and name not in SHARED and rank(name) >= rank(me):
            yield f"{path}:{line}: {part(me)} must not import {name}"


def verifier_faults(path: Path) -> Iterator[str]:
    for line, name in own_imports(path):
        if not matches(name, VERIFIERS_MAY_IMPORT):
            yield f"{path}:{line}: a verifier must not import {name}"


def public_faults(path: Path) -> Iterator[str]:
    for line, name in own_imports(path):
        if name != PACKAGE:
            yield f"{path}:{line}: imports {name}, but the public interface is {PACKAGE} itself"


def environment_faults(path: Path) -> Iterator[str]:
    banned = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(parse(path)):
        names: set[str] = set()
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {node.attr} if node.value.id == "os" else set()
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
        for name in sorted(names & banned):
            yield f"{path}:{node.lineno}: os.{name} outside {', '.join(ENVIRONMENT_READERS)}"


def test_imports_go_one_way() -> None:
    faults = [f for path in python_sources(PACKAGE) for f in layer_faults(path)]
    assert not faults, "\n".join(faults)


def test_verifiers_know_only_the_irs() -> None:
    paths = [path.relative_to(ROOT) for path in sorted(ROOT.glob(VERIFIERS))]
    faults = [f for path in paths for f in verifier_faults(path)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("folder", PUBLIC_ONLY)
def test_public_interface_only(folder: str) -> None:
    faults = [f for path in python_sources(folder) for f in public_faults(path)]
    assert not faults, "\n".join(faults)


def test_environment_is_read_in_one_place() -> None:
    paths = [path for path in python_sources(PACKAGE) if path.as_posix() not in ENVIRONMENT_READERS]
    faults = [f for path in paths for f in environment_faults(path)]
    native = [path for path in sources("ffi", "csrc") if re.search(r"\bgetenv\b", read(path))]
    faults += [f"{path}: getenv; settings arrive from Python" for path in native]
    assert not faults, "\n".join(faults)


def test_csrc_sees_neither_xla_nor_python() -> None:
    include = re.compile(r'^\s*#\s*include\s*[<"](xla/|nanobind|pybind|Python\.h)', re.MULTILINE)
    faults = [str(path) for path in sources("csrc") if include.search(read(path))]
    assert not faults, "\n".join(faults)


def test_files_stay_readable() -> None:
    lengths = {path: read(path).count("\n") for path in sources(*SIZED)}
    faults = [f"{path}: {n} lines, {MAX_LINES} allowed" for path, n in lengths.items() if n > MAX_LINES]
    assert not faults, "\n".join(faults)


def test_compiler_names_no_model() -> None:
    faults = [
        f"{path}:{i}: {line.strip()}"
        for path in sources(*MODEL_FREE)
        for i, line in enumerate(read(path).splitlines(), 1)
        if MODEL_NAMES.search(line)
    ]
    assert not faults, "\n".join(faults)


# The rules themselves, tried on sources that break them: (file, source, number of faults).
BROKEN = [
    (layer_faults, "jax_mpk/graph/x.py", "from jax_mpk.plan import ir", 1),
    (layer_faults, "jax_mpk/graph/x.py", "from ..plan.ir import Plan", 1),
    (layer_faults, "jax_mpk/graph/x.py", "def f():\n    import jax_mpk.runtime.call", 1),
    (layer_faults, "jax_mpk/capture/x.py", "from jax_mpk.graph import ir", 1),
    (layer_faults, "jax_mpk/capture/x.py", "from jax_mpk.graph import dtypes", 0),
    (layer_faults, "jax_mpk/graph/dtypes.py", "from jax_mpk.graph import ir", 1),
    (layer_faults, "jax_mpk/graph/x.py", "import jax_mpk", 1),
    (layer_faults, "jax_mpk/plan/x.py", "from jax_mpk import _native", 1),
    (layer_faults, "jax_mpk/runtime/x.py", "from jax_mpk import _native, config, errors", 0),
    (layer_faults, "jax_mpk/plan/x.py", "from . import ir\nfrom ..graph import ir as g", 0),
    (verifier_faults, "jax_mpk/plan/verify_x.py", "from jax_mpk.plan import schedule", 1),
    (verifier_faults, "jax_mpk/plan/verify_x.py", "from jax_mpk.plan import ir", 0),
    (public_faults, "models/x.py", "from jax_mpk.graph.ir import Graph", 1),
    (public_faults, "models/x.py", "from jax_mpk import megakernelize", 0),
    (environment_faults, "jax_mpk/api.py", "import os\nos.environ['A']; os.getenv('A')", 2),
    (environment_faults, "jax_mpk/api.py", "from os import environ", 1),
]


@pytest.mark.parametrize(("rule", "file", "source", "expected"), BROKEN)
def test_rules_find_faults(rule, file, source, expected, monkeypatch) -> None:
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "parse", lambda path: ast.parse(source))
    # Whether these files exist is not the point: everything but megakernelize counts as a module.
    monkeypatch.setattr(here, "is_module", lambda name: name != "jax_mpk.megakernelize")
    assert len(list(rule(Path(file)))) == expected
