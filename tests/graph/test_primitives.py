"""Every primitive of JAX has a rule or is named here, so that a new one in a new JAX does not go unnoticed."""

from __future__ import annotations

import importlib
import sys

import pytest
from jax.extend.core import Primitive

from jax_mpk.capture.inline import CALLS
from jax_mpk.graph.build import load_rules

#: Primitives that the graph does not take, by reason. Some may have got a rule since.
WITHOUT_RULE = {
    "complex numbers": "complex conj fft imag real",
    "factorizations beyond LU and Cholesky": "cholesky_update eig eigh geqp3 geqrf hessenberg householder_product "
    "ormqr qr schur svd symmetric_product tridiagonal tridiagonal_solve",
    "several devices": "all_gather all_gather_done all_gather_invariant all_gather_reduced all_gather_reduced_start "
    "all_gather_start all_to_all all_to_all_done all_to_all_start axis_index pbroadcast pbroadcast_done "
    "pbroadcast_dynamic pbroadcast_start pmax pmin ppermute ppermute_done ppermute_start precv preduced psend psum "
    "psum_done psum_invariant psum_invariant_start psum_start ragged_all_to_all reduce_scatter reduce_scatter_done "
    "reduce_scatter_start shard_map unreduced_pmax unreduced_pmin unreduced_psum unreduced_psum_start "
    "unreduced_reduce_scatter unreduced_reduce_scatter_start vary_unreduced_cast vary_unreduced_cast_p",
    "the host": "check debug_callback debug_print inspect_sharding io_callback pure_callback",
    "mutable references": "accum_grad_in_ref addupdate box_get box_set broadcast_to core_map create_linear empty_ref "
    "free_ref freeze get log_extend log_read new_box new_log new_ref pin run_state swap unpin "
    "with_memory_space_constraint",
    "kernels of other libraries": "call_exported cudnn_fusion custom_partitioning dot_product_attention_bwd "
    "dot_product_attention_bwd_wrapper dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper "
    "dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper dot_product_attention_fwd "
    "dot_product_attention_fwd_wrapper ffi_call pallas_call scaled_dot scaled_matmul scaled_matmul_wrapper "
    "tpu_custom_call",
    "shapes known only at run time": "dim_as_value dimension_size shape_assertion",
    "order of effects": "after_all create_token program_order tie",
    "never in a jaxpr that is compiled": "call_hi_primitive call_hi_primitive_linearized custom_jvp_call_jaxpr "
    "dce_sink empty2 relayout remat_opt select_and_scatter unreachable",
}


#: Languages of their own, whose primitives occur inside kernels only.
_ELSEWHERE = ("jax._src.pallas", "jax._src.test", "jax.experimental")


def primitives() -> dict[str, str]:
    """Names of all primitives that JAX's modules define, and where each was found."""
    for module in ("jax.numpy", "jax.random", "jax.scipy.linalg", "jax.scipy.special"):
        importlib.import_module(module)
    found: dict[str, str] = {}
    for module, contents in list(sys.modules.items()):
        if module.startswith("jax.") and not module.startswith(_ELSEWHERE):
            for value in list(vars(contents).values()):
                if isinstance(value, Primitive):
                    found.setdefault(value.name, module)
    return found


def test_every_primitive_is_accounted_for() -> None:
    named = {name for names in WITHOUT_RULE.values() for name in names.split()}
    known = {*load_rules(), *CALLS, *named}
    missing = {name: module for name, module in primitives().items() if name not in known}
    assert not missing, "no rule and no reason: " + ", ".join(f"{n} ({m})" for n, m in sorted(missing.items()))


@pytest.mark.parametrize("name", ["add", "dot_general", "gather", "scatter-add", "sort", "scan", "threefry2x32"])
def test_the_search_finds_primitives(name: str) -> None:
    assert name in primitives()
