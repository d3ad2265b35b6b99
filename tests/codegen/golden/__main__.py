"""Writes the golden files anew: ``python -m tests.codegen.golden``."""

from tests.codegen.golden.functions import SAMPLES
from tests.codegen.golden.text import path, text

for name in SAMPLES:
    path(name).write_text(text(name), encoding="utf-8")
    print(path(name))
