"""Environment variables and overrides."""

import pytest

from jax_mpk import ConfigError, config


def test_defaults() -> None:
    found = config.from_environment({"PATH": "/bin", "JAX_PLATFORMS": "cpu"})
    assert found.threads >= 1 and found.chaos is None and found.dump_to is None


def test_values(tmp_path) -> None:
    found = config.from_environment(
        {"JAX_MPK_THREADS": "3", "JAX_MPK_CHAOS": "0", "JAX_MPK_DUMP_TO": str(tmp_path / "new")}
    )
    assert (found.threads, found.chaos, found.dump_to) == (3, 0, tmp_path / "new")
    assert config.from_environment({"JAX_MPK_CHAOS": ""}).chaos is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_MPK_THREADS", "0"),
        ("JAX_MPK_THREADS", "many"),
        ("JAX_MPK_CHAOS", "-1"),
        ("JAX_MPK_CHAOS", str(2**63)),
        ("JAX_MPK_DUMP_TO", __file__),
        ("JAX_MPK_TREADS", "2"),
    ],
)
def test_bad_values_name_the_variable(name, value) -> None:
    with pytest.raises(ConfigError, match=name):
        config.from_environment({name: value})


def test_override_is_undone() -> None:
    before = config.current()
    seen = []
    config.on_change(seen.append)
    with pytest.raises(RuntimeError), config.override(chaos=5, threads=1) as inside:
        assert (inside.chaos, config.current().chaos, config.current().threads) == (5, 5, 1)
        raise RuntimeError
    assert config.current() == before
    assert [found.chaos for found in seen] == [before.chaos, 5, before.chaos]
