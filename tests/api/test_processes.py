"""What has to work in another process: export, the persistent cache, start-up orders, the environment."""

import jax
import jax.numpy as jnp
import pytest

import jax_mpk
from jax_mpk import megakernelize
from tests.api.support import run_python

EXPORT = """
    import sys
    import jax, jax.numpy as jnp
    import jax_mpk

    @jax_mpk.megakernelize(donate_argnums=1)
    def step(w, cache, x, key):
        cache = cache.at[1].set(x)
        return cache, (cache @ w).sum(0), jax.random.split(key)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 3), (8, 4), (4,))]
    shapes.append(jax.typeof(jax.random.key(0)))
    for f, path in ((step, sys.argv[1]), (jax.jit(step), sys.argv[2])):
        exported = jax.export.export(f, disabled_checks=jax_mpk.export_checks())(*shapes)
        open(path, "wb").write(exported.serialize())
"""

RUN = """
    import sys
    import jax, jax.numpy as jnp
    import jax_mpk

    for path in sys.argv[1:]:
        f = jax.export.deserialize(open(path, "rb").read())
        for call in (f.call, jax.jit(f.call)):
            w, cache, x = jnp.ones((4, 3)), jnp.zeros((8, 4)), jnp.arange(4.0)
            cache, total, keys = call(w, cache, x, jax.random.key(5))
            assert cache[1].tolist() == [0, 1, 2, 3] and total.tolist() == [6, 6, 6], (cache, total)
            assert (jax.random.key_data(keys) == jax.random.key_data(jax.random.split(jax.random.key(5)))).all()
    print("ran", len(sys.argv) - 1)
"""


def test_export_runs_in_a_new_process(tmp_path) -> None:
    files = [str(tmp_path / name) for name in ("direct", "jitted")]
    arguments = "import sys; sys.argv = " + repr(["", *files]) + "\n"
    run_python(arguments + dedented(EXPORT))
    assert run_python(arguments + dedented(RUN)) == "ran 2\n"


def test_export_runs_here() -> None:
    import jax_mpk

    f = megakernelize(lambda x: x * 2 + 1)
    exported = jax.export.export(jax.jit(f), disabled_checks=jax_mpk.export_checks())(jnp.ones(3))
    assert exported.call(jnp.ones(3)).tolist() == [3, 3, 3]


@pytest.mark.parametrize("how", ["error", "split"])
def test_symbolic_shapes_are_refused(how) -> None:
    f = megakernelize(lambda x: jnp.concatenate([x, x * 2]).sum(), on_unsupported=how)
    shapes = jax.ShapeDtypeStruct(jax.export.symbolic_shape("a, 3"), jnp.float32)
    for exported in (f, jax.jit(f), jax.jit(jax.vmap(f))):
        with pytest.raises(jax_mpk.UnsupportedError, match=r"fixed sizes.*symbolic shape.*\[a,3\]"):
            jax.export.export(exported, disabled_checks=jax_mpk.export_checks())(shapes)


CACHED = """
    import jax, jax.numpy as jnp
    from jax._src import monitoring
    import jax_mpk

    events = []
    monitoring.register_event_listener(lambda name, **_: events.append(name))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    W = jnp.ones((4, 4))

    @jax_mpk.megakernelize
    def f(x):
        return (x @ W).sum(), jax.lax.fori_loop(0, 5, lambda i, c: c + x, x)

    x = jnp.arange(4.0)
    events.clear()
    total, last = f(x)
    print(*(events.count(f"/jax/compilation_cache/cache_{what}") for what in ("hits", "misses")))
    assert total == 24 and last.tolist() == [0, 6, 12, 18]
"""


def test_persistent_compilation_cache(tmp_path) -> None:
    first, second = (run_python(CACHED, JAX_COMPILATION_CACHE_DIR=str(tmp_path)).split() for _ in range(2))
    assert first == ["0", "1"] and second == ["1", "0"]


@pytest.mark.parametrize(
    "source",
    [
        "import jax_mpk, jax; jax.devices()",
        "import jax; jax.devices(); import jax_mpk",
        "import jax_mpk.runtime.native, jax; jax.jit(lambda x: x + 1)(1.0); import jax_mpk",
    ],
)
def test_import_order(source) -> None:
    program = f"{source}\nimport jax_mpk\nprint(jax_mpk.megakernelize(lambda x: x + 1)(1.0))"
    assert run_python(program) == "2.0\n"


def test_importing_starts_no_backend() -> None:
    program = """
        import jax_mpk
        from jax._src import xla_bridge
        print(xla_bridge.backends_are_initialized())
    """
    assert run_python(program) == "False\n"


def test_environment() -> None:
    program = """
        import jax_mpk
        f = jax_mpk.megakernelize(lambda x: (x * 2).sum())
        import jax.numpy as jnp
        print(f(jnp.ones(1000)), jax_mpk.config.current().threads, jax_mpk.config.current().chaos)
    """
    assert run_python(program, JAX_MPK_THREADS="1", JAX_MPK_CHAOS="7") == "2000.0 1 7\n"


def dedented(source: str) -> str:
    import textwrap

    return textwrap.dedent(source)
