"""Handwritten kernels, for tests of what runs them."""

import textwrap
from typing import Any

from jax_mpk.codegen.cuda.ir import CudaProgram


def kernel(body: str, *, arguments: int, results: int, **fields: Any) -> CudaProgram:
    """A program whose kernel has this body, in which ``at<T>(i)`` is buffer i and ``me`` the number of the thread."""
    source = f"""\
#include "launch.cuh"

using namespace mpk;

extern "C" __global__ void entry(const __grid_constant__ Launch<{arguments + results}> launch) {{
  const unsigned me = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
  auto* header = static_cast<StateHeader*>(launch.state);
{textwrap.indent(body, "  ")}
}}
"""
    known = {
        "entry": "entry",
        "arch": "sm_90a",
        "workers": 4,
        "threads": 64,
        "shared_bytes": 0,
        "tables": b"",
        "state_bytes": 256,
        "workspace_bytes": 0,
    }
    return CudaProgram(source=source, arguments=arguments, results=results, **(known | fields))


#: Adds to each of n floats the number of launches so far.
COUNTING = """\
const auto* in = static_cast<const float*>(launch.buffers[0]);
auto* out = static_cast<float*>(launch.buffers[1]);
const u32 n = launch.tables[0];
const float count = static_cast<float>(header->launches);
for (u32 i = me; i < n; i += all) out[i] = in[i] + count;
__threadfence();
__syncthreads();
if (threadIdx.x == 0 && atomicAdd(&header->ticket, 1u) == gridDim.x - 1) {
  header->ticket = 0;
  header->launches += 1;
}
"""
