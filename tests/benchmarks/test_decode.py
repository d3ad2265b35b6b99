"""The decode benchmark on the CPU: what it counts, what it writes and what it refuses. Nothing here is timed."""

import dataclasses
import json
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import decode, roofline
from benchmarks.bandwidth import compile_cuda
from benchmarks.decode_check import Check
from benchmarks.decode_systems import JaxSystem, Rows, Setting
from benchmarks.shapes import SHAPES, first_tokens, random_cache, random_params, random_weight, step_bytes
from models.decoder import Decoder

FIELDS = {
    *("system", "method", "model", "batch", "kv_len", "dtype", "ms_per_step", "spread", "bytes_per_step"),
    *("tb_per_s", "read_tb_per_s", "fraction_of_roofline", "device", "num_devices", "jax_version", "commit"),
}
SHORT = ["--model", "tiny", "--cache-len", "32", "--position", "12", "--steps", "4", "--rounds", "1"]
SHORT += ["--read-bytes", "4194304"]


def test_bytes_of_a_step() -> None:
    config = SHAPES["llama-3.2-1b"]
    # 16 layers of Q, K, V (2048 + 2 * 512 columns), output, and three of 8192; the head; 2 * 512 numbers a position.
    weights = 2 * (16 * (3072 * 2048 + 2048 * 2048 + 3 * 8192 * 2048) + 128_256 * 2048)
    assert weights == 2_471_493_632
    assert step_bytes(config, 1, [511]) == weights + 2 * 16 * 2 * 512 * 512
    assert step_bytes(config, 8, range(480, 544)) == weights + 8 * 2 * 16 * 2 * 512 * 512.5


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_are_those_of_the_matrices(name: str) -> None:
    config = dataclasses.replace(SHAPES[name], num_layers=2)
    params = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    matrices = {path: leaf.size for path, leaf in nnx.to_flat_state(params) if len(leaf.shape) == 2}
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    if not config.tie_embeddings:
        del matrices["embed_tokens", "embedding"]
    cache = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    assert step_bytes(config, 1, [9]) == 2 * sum(matrices.values()) + cache * 10


def test_random_weights_are_the_same_in_torch() -> None:
    torch_decoder = pytest.importorskip("benchmarks.torch_decoder", exc_type=ImportError)
    ours = np.asarray(random_weight("layers.3.mlp.up_proj.kernel", (300, 77)).astype(jnp.float32))
    source = torch_decoder.Source(decode.harness.ROOT, "cpu")
    assert np.array_equal(source("layers.3.mlp.up_proj.kernel", 300, 77).float().numpy(), ours)
    assert abs(ours.std() * 300**0.5 - 1) < 0.02 and abs(ours.mean()) < 1e-3


@pytest.fixture(scope="module")
def setting() -> Setting:
    config = SHAPES["tiny"]
    graphdef, params = random_params(config)
    token = jnp.asarray(first_tokens(config, 2))
    return Setting("tiny", config, graphdef, params, random_cache(config, 2, 32), token, 10, 4, random=True)


class Altered:
    """A system's results with something else in the place of some."""

    def __init__(self, system: JaxSystem, tokens: np.ndarray | None = None, rows: Rows | None = None) -> None:
        self._tokens = system.tokens() if tokens is None else tokens
        self._rows = system.rows() if rows is None else rows

    def tokens(self) -> np.ndarray:
        return self._tokens

    def rows(self) -> Rows:
        return self._rows


def test_check_refuses_what_is_wrong(setting: Setting) -> None:
    system, check = JaxSystem(setting, jax.jit, loop=False), Check(setting)
    assert check(system)[1] == ""
    tokens, rows = system.tokens(), system.rows()

    other = tokens.copy()
    other[-1, 1] = (other[-1, 1] + 1) % setting.config.vocab_size
    assert "token" in check(Altered(system, tokens=other))[1]
    other[-1, 1] = setting.config.vocab_size
    assert "there is no token" in check(Altered(system, tokens=other))[1]
    assert "shape" in check(Altered(system, tokens=tokens[:-1]))[1]

    # One step's keys are those of the step before, as if written for the wrong position.
    keys = rows[1][0].copy()
    keys[:, 2] = keys[:, 1]
    assert "keys of layer 1" in check(Altered(system, rows=[rows[0], (keys, rows[1][1])]))[1]
    values = rows[0][1] * np.float32(1.02)
    assert "values of layer 0" in check(Altered(system, rows=[(rows[0][0], values), rows[1]]))[1]
    nan = np.full_like(values, np.nan)
    assert "values of layer 0" in check(Altered(system, rows=[(rows[0][0], nan), rows[1]]))[1]


def test_rows_that_stray_are_refused(setting: Setting) -> None:
    system = JaxSystem(setting, jax.jit, loop=True)
    system._cache = jax.tree.map(lambda array: array.at[0, 3].add(1), system._cache)
    with pytest.raises(RuntimeError, match="other positions"):
        system.rows()


@pytest.mark.slow
def test_rows_have_every_field(tmp_path) -> None:
    out = tmp_path / "decode.json"
    assert decode.main([*SHORT, "--peers", "jax", "--commit", "abc", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["system"] for row in rows] == ["mpk", "mpk_loop", "jit", "jit_loop"]
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["commit"] == "abc" and row["kv_len"] == 12.5
        speed = row["bytes_per_step"] / (row["ms_per_step"] * 1e-3) / 1e12
        assert np.isclose(row["tb_per_s"], speed) and np.isclose(
            row["fraction_of_roofline"], speed / row["read_tb_per_s"]
        )


@pytest.mark.slow
def test_no_row_for_a_system_that_is_wrong_or_fails(tmp_path, monkeypatch) -> None:
    make = decode.make_system

    def broken(name, setting, options):
        if name == "jit_loop":
            raise MemoryError("too large")
        system = make(name, setting, options)
        if name == "mpk":
            chosen = system.tokens() * 0
            monkeypatch.setattr(system, "tokens", lambda: chosen)
        return system

    monkeypatch.setattr(decode, "make_system", broken)
    out = tmp_path / "decode.json"
    assert decode.main([*SHORT, "--systems", "mpk", "--peers", "jax", "--out", str(out)]) == 1
    document = json.loads(out.read_text())
    assert [row["system"] for row in document["rows"]] == ["jit"]
    failed, wrong = document["left_out"]
    assert failed.startswith("jit_loop, tiny, batch 1: MemoryError") and wrong.startswith("mpk, tiny, batch 1: ")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_bandwidth_kernels_compile(architecture: str) -> None:
    try:
        image = compile_cuda(architecture)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert image.startswith(b"\x7fELF")


def test_picture_of_rows() -> None:
    row = {"model": "tiny", "batch": 1, "ms_per_step": 1.5, "read_tb_per_s": 3.0, "device": "A <B>"}
    row |= {"jax_version": "0", "commit": "abc", "fraction_of_roofline": 0.5}
    picture = roofline.draw([row | {"system": "jit"}, row | {"system": "mpk"}])
    texts = [element.text for element in ElementTree.fromstring(picture).iter() if element.text]
    assert {"1.500 ms", "50 %"} <= set(texts) and any("A <B>" in text for text in texts)
    assert texts.index("jax_mpk") < texts.index("jax.jit")
    with pytest.raises(ValueError, match="one device"):
        roofline.draw([])


def test_picture_is_up_to_date() -> None:
    picture = roofline.draw(roofline.read(roofline.RESULTS))
    assert roofline.PICTURE.read_text(encoding="utf-8") == picture, "run python -m benchmarks.roofline"
