"""Benchmarks: each script answers one question and writes its rows as JSON. See README.md."""
