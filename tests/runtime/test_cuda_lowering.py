"""Calls compiled for a GPU, on a machine that has none: what the custom call carries, and what is refused."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

import jax_mpk
from jax_mpk import config, megakernelize
from jax_mpk.codegen.cuda.ir import CudaProgram
from jax_mpk.plan import targets
from jax_mpk.plan.ir import Plan
from jax_mpk.runtime import pipeline
from jax_mpk.runtime import targets as named
from tests.cuda_programs import kernel

X = jnp.arange(8.0)


@pytest.fixture(autouse=True)
def generated(monkeypatch, tmp_path):
    """Kernels that do nothing, a cache of their own; the plans they were made for."""
    plans: list[Plan] = []

    def generate(plan: Plan) -> CudaProgram:
        plans.append(plan)
        arguments, results = len(plan.graph.inputs), len(plan.graph.results)
        body = f"// {plan.target.name}"
        return kernel(body, arguments=arguments, results=results, workspace_bytes=512, workers=plan.target.workers)

    monkeypatch.setattr(pipeline.cuda_codegen, "generate", generate)
    with config.override(cache_dir=tmp_path / "cache"):
        yield plans


def lower_for(function, *args, platforms=("cuda",), **jit_options) -> str:
    return jax.jit(function, **jit_options).trace(*args).lower(lowering_platforms=platforms).as_text()


def test_custom_call() -> None:
    text = lower_for(megakernelize(lambda x: jnp.sin(x) * 2), X)
    assert text.count("stablehlo.custom_call @jax_mpk_cuda") == 1
    assert "tensor<512xui8>" in text  # the workspace is a result
    assert "JMPKCUDA" in text


def test_donated_arguments_are_aliased() -> None:
    f = megakernelize(lambda x, y, i: jax.lax.dynamic_update_slice(x, y, (i,)), donate_argnums=0)
    text = lower_for(f, X, X[:2], jnp.int32(3), donate_argnums=0)
    assert "output_operand_alias" in text and "operand_tuple_indices" in text


def test_every_platform_gets_its_own() -> None:
    text = lower_for(megakernelize(lambda x: jnp.sin(x) * 2), X, platforms=("cpu", "cuda"))
    assert "@jax_mpk_cpu" in text and "@jax_mpk_cuda" in text


def test_export() -> None:
    f = jax.jit(megakernelize(lambda x: jnp.sin(x) * 2))
    exported = jax.export.export(f, platforms=["cuda"], disabled_checks=jax_mpk.export_checks())(X)
    again = jax.export.deserialize(exported.serialize())
    assert "@jax_mpk_cuda" in again.mlir_module()


def test_planned_for_an_h100_where_there_is_no_gpu(generated, monkeypatch) -> None:
    monkeypatch.setattr(named, "from_device", lambda ordinal=0: None)
    lower_for(megakernelize(lambda x: jnp.sin(x) * 2), X)
    assert [plan.target for plan in generated] == [targets.H100]


def test_planned_for_the_gpu_that_is_there(generated, monkeypatch) -> None:
    device = {
        "name": "NVIDIA H100 PCIe",
        "capability": (9, 0),
        "multiprocessors": 114,
        "shared_bytes": 227 << 10,
        "l2_bytes": 50 << 20,
        "peak_bandwidth": 2.0e12,
    }
    monkeypatch.setattr(named, "cuda_device", lambda ordinal: device)
    named.from_device.cache_clear()
    try:
        lower_for(megakernelize(lambda x: jnp.sin(x) * 2), X)
    finally:
        named.from_device.cache_clear()
    (plan,) = generated
    target = plan.target
    assert (target.name, target.arch, target.workers) == ("nvidia-h100-pcie", "sm_90a", 114)
    assert target.scratch_bytes == targets.H100.scratch_bytes
    assert target.bandwidth == pytest.approx(1.84e12)


def test_known_gpus_have_their_own_description(monkeypatch) -> None:
    device = {"name": "NVIDIA H100 80GB HBM3", "multiprocessors": 132}
    monkeypatch.setattr(named, "cuda_device", lambda ordinal: device)
    assert named.from_device.__wrapped__() is targets.H100


def test_stages() -> None:
    lowered = megakernelize(lambda x: jnp.sin(x) * 2, backend="cuda", target="h100-sxm").lower(X)
    assert isinstance(lowered.program, CudaProgram)
    assert lowered.as_text("cuda").startswith('#include "launch.cuh"')
    assert lowered.as_text("program").startswith("// jax_mpk")
    with pytest.raises(ValueError, match="no CUDA source"):
        megakernelize(lambda x: x + 1, target="cpu-2").lower(X).as_text("cuda")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target": "cpu-2"}, "cannot run on a GPU"),
        ({"backend": "cpu"}, "compiled for cuda"),
    ],
)
def test_refusals(options, text) -> None:
    with pytest.raises(jax_mpk.TargetError, match=text):
        lower_for(megakernelize(lambda x: jnp.sin(x) * 2, **options), X)


def test_backend_of_a_gpu_on_the_cpu() -> None:
    with pytest.raises(jax_mpk.TargetError, match="compiled for cpu"):
        megakernelize(lambda x: jnp.sin(x) * 2, backend="gpu")(X)


def test_second_process_plans_nothing(generated) -> None:
    f = megakernelize(lambda x: jnp.sin(x) * 2)
    first = lower_for(f, X)
    f.clear_cache()
    jax.clear_caches()
    assert lower_for(f, X) == first
    assert len(generated) == 1
    # Other functions, constants and donations are other programs.
    for other in (lambda x: jnp.sin(x) * 2.0000001, lambda x: jnp.cos(x) * 2):
        lower_for(megakernelize(other), X)
    assert len(generated) == 3


def test_where_the_time_goes() -> None:
    before = jax_mpk.compile_seconds()
    lower_for(megakernelize(lambda x: jnp.sin(x) * 3), X)
    after = jax_mpk.compile_seconds()
    assert {stage for stage in after if after[stage] > before.get(stage, 0)} == {
        "trace",
        "graph",
        "plan",
        "verify",
        "codegen",
        "nvrtc",
        "cache",
    }
