"""What a file of results says about where it comes from."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import harness


def commits(path: Path) -> list[str]:
    return [row["commit"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_rows_name_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(tmp_path)]
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    (tmp_path / "source.py").write_text("1\n", encoding="utf-8")
    for command in (["init", "-q"], ["add", "source.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout[:12]
    harness.write([{"system": "a"}, {"system": "b"}], tmp_path / "rows.json")
    assert commits(tmp_path / "rows.json") == [head, head]
    (tmp_path / "source.py").write_text("2\n", encoding="utf-8")
    harness.write([{}], tmp_path / "rows.json")
    assert commits(tmp_path / "rows.json") == [head + "+"]


def test_rows_of_no_commit_are_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    harness.write([{}], tmp_path / "rows.json")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.unknown.json"]
    assert commits(tmp_path / "rows.unknown.json") == ["unknown"]
    harness.write([{}], tmp_path / "rows.json", commit="abc")
    assert commits(tmp_path / "rows.json") == ["abc"]
