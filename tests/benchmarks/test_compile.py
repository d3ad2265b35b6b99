"""Cold and warm compilation of a small step for a GPU that is not there."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import compile


def test_a_warm_cache_leaves_only_tracing(tmp_path: Path) -> None:
    out = tmp_path / "compile.json"
    assert compile.main(["--model", "tiny", "--commit", "none", "--out", str(out)]) == 0
    cold, warm = json.loads(out.read_text())["rows"]
    assert [row["disk_cache"] for row in (cold, warm)] == ["empty", "warm"]
    assert cold["nvrtc"] > 0 and cold["plan"] > 0
    assert "nvrtc" not in warm and "plan" not in warm and warm["trace"] > 0
    assert cold["seconds"] > sum(cold[stage] for stage in ("trace", "graph", "plan", "verify", "codegen", "nvrtc"))
