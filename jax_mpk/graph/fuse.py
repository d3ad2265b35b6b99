"""The fusion pipeline, in order. Each pass takes a Graph and returns a Graph."""

from __future__ import annotations

from jax_mpk.graph.fuse_duplicates import merge_duplicates
from jax_mpk.graph.fuse_epilogues import fuse_epilogues
from jax_mpk.graph.fuse_maps import fuse_maps, fuse_views
from jax_mpk.graph.fuse_updates import fuse_updates
from jax_mpk.graph.ir import Graph
from jax_mpk.graph.split_axes import split_axes

#: Epilogues come before maps are repeated by their readers: a residual add belongs to the one contraction before it.
PASSES = (
    merge_duplicates,
    fuse_views,
    split_axes,
    fuse_epilogues,
    fuse_maps,
    fuse_epilogues,
    fuse_maps,
    fuse_updates,
)


def fuse(graph: Graph) -> Graph:
    """Runs every fusion pass; the result computes the same values up to implicit roundings."""
    for run in PASSES:
        graph = run(graph)
    return graph
