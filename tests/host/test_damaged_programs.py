"""Programs from a cache or a file may be damaged: they are refused, or stay within their buffers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_damage_never_crashes() -> None:
    script = Path(__file__).with_name("fuzz_program.py")
    done = subprocess.run([sys.executable, str(script), "1", "2000"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = re.search(r"(\d+) refused, (\d+) ran, .*, (\d+) were stopped", done.stdout)
    assert found is not None
    refused, ran, stopped = map(int, found.groups())
    # Most damage shows; some of it (an unused word, another constant) leaves a program that can run.
    assert refused > 1000 and ran > 100 and stopped < 10
