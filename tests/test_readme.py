"""What the README promises: its example runs, and its table of variables is complete."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from jax_mpk import config

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_example_runs(capsys) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    assert len([line for line in example[1].splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec(compile(example[1], "example.py", "exec"), names)
    assert "layer   1 custom call" in capsys.readouterr().out
    args = names["x"], names["up"], names["down"]
    np.testing.assert_allclose(names["layer"](*args), names["layer"].__wrapped__(*args), rtol=1e-5)


def test_every_variable_is_listed() -> None:
    listed = set(re.findall(r"^\| `(JAX_MPK_\w+)`", README, re.MULTILINE))
    assert config.__doc__ is not None
    assert listed == set(re.findall(r"^(JAX_MPK_\w+) ", config.__doc__, re.MULTILINE))


def test_commands_exist() -> None:
    root = Path(__file__).resolve().parent.parent
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (root / Path(*module.split("."))).with_suffix(".py").is_file(), module
