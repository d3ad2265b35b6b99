"""What the README promises: its example runs and gives the texts shown, and its table of variables is complete."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from jax_mpk import config, megakernelize

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def example() -> dict[str, Any]:
    """The names that the example defines."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec(compile(code[1], "example.py", "exec"), names)
    return names


def test_example_runs(capsys) -> None:
    names = example()
    assert "layer   1 custom call" in capsys.readouterr().out
    args = names["x"], names["up"], names["down"]
    np.testing.assert_allclose(names["layer"](*args), names["layer"].__wrapped__(*args), rtol=1e-5)


def test_stages_are_those_of_the_example() -> None:
    names = example()
    layer = megakernelize(names["layer"].__wrapped__, target="cpu-2")
    args = names["x"], names["up"], names["down"]
    lowered = layer.lower(*args)
    texts = [lowered.as_text("graph"), lowered.as_text("plan"), layer.explain(*args)]
    shown = re.findall(r"^```\n((?:graph\(|plan for |layer ).*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert shown == [text.strip() + "\n" for text in texts]


def test_every_variable_is_listed() -> None:
    listed = set(re.findall(r"^\| `(JAX_MPK_\w+)`", README, re.MULTILINE))
    assert config.__doc__ is not None
    assert listed == set(re.findall(r"^(JAX_MPK_\w+) ", config.__doc__, re.MULTILINE))


def test_commands_exist() -> None:
    root = Path(__file__).resolve().parent.parent
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (root / Path(*module.split("."))).with_suffix(".py").is_file(), module
