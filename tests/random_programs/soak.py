"""Many random programs, in a run that may be interrupted and goes on where it was.

    python -m tests.random_programs.soak --programs 20000 --out benchmarks/results/random_programs.json

Three fifths of the programs are exact, the others smooth. Every process takes a chunk of consecutive seeds and
ends with it, since each program leaves compiled code in memory. What is done is kept beside the output, a line per
chunk; the output is written at the end. Chunks of another commit are done again.
"""

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import harness
from tests.random_programs import coverage
from tests.random_programs.check import Refused, verdict, workers_of
from tests.random_programs.generate import FAMILIES, generate

CHUNK = 50
Chunk = dict[str, Any]


def check(family: str, first: int, count: int) -> Chunk:
    """Checks the programs of consecutive seeds."""
    start = time.perf_counter()
    wrong: dict[int, str] = {}
    refused: list[int] = []
    counts: collections.Counter[str] = collections.Counter()
    workers: collections.Counter[int] = collections.Counter()
    with jax.enable_x64(True):
        for seed in range(first, first + count):
            program = generate(seed, family)
            counts.update({f"{name} {dtype}": n for (name, dtype), n in coverage.histogram([program]).items()})
            workers.update(workers_of(program))
            try:
                message = verdict(program)
            except Refused:
                refused.append(seed)
                continue
            if message is not None:
                wrong[seed] = message
    return {
        "family": family,
        "first": first,
        "count": count,
        "wrong": wrong,
        "refused": refused,
        "workers": dict(workers),
        "pairs": dict(counts),
        "seconds": time.perf_counter() - start,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 if any program is wrong."""
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.random_programs.soak", description=about)
    add = parser.add_argument
    add("--programs", type=int, default=20_000)
    add("--processes", type=int, default=harness.cores())
    add("--out", type=Path, default=harness.RESULTS / "random_programs.json")
    add("--commit", help="where git cannot say")
    options = parser.parse_args(argv)
    log = options.out.with_suffix(".jsonl")
    commit = options.commit or harness.commit()
    exact = options.programs * 3 // 5
    wanted = [
        (family, first, min(CHUNK, total - first))
        for family, total in zip(FAMILIES, (exact, options.programs - exact), strict=True)
        for first in range(0, total, CHUNK)
    ]
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(c["family"], c["first"], c["count"]): c for c in found if c.get("commit") == commit}
    done = [known[chunk] for chunk in wanted if chunk in known]
    missing = [chunk for chunk in wanted if chunk not in known]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a") as file,
        concurrent.futures.ProcessPoolExecutor(
            options.processes, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as pool,
    ):
        for finished in concurrent.futures.as_completed([pool.submit(check, *chunk) for chunk in missing]):
            chunk = {**finished.result(), "commit": commit}
            # What was read back from the file has its keys as text.
            done.append(json.loads(json.dumps(chunk)))
            file.write(json.dumps(chunk) + "\n")
            file.flush()
            for seed, message in chunk["wrong"].items():
                print(f"{chunk['family']} {seed}: {message}", flush=True)
            print(f"{len(done)} of {len(wanted)} chunks", flush=True)
    row = summary(done)
    harness.write([row], options.out, commit=commit, programs_asked=options.programs)
    print(f"{row['programs']} programs, {len(row['wrong'])} wrong, {row['refused']} that jax.jit refuses")
    return 1 if row["wrong"] else 0


def summary(chunks: Sequence[Chunk]) -> harness.Row:
    """One row for all chunks."""
    pairs: collections.Counter[str] = collections.Counter()
    workers: collections.Counter[str] = collections.Counter()
    for chunk in chunks:
        pairs.update(chunk["pairs"])
        workers.update(chunk["workers"])
    return {
        "system": "jax_mpk",
        "programs": sum(c["count"] for c in chunks),
        "by_family": {f: sum(c["count"] for c in chunks if c["family"] == f) for f in FAMILIES},
        "wrong": [f"{c['family']} {seed}: {text}" for c in chunks for seed, text in c["wrong"].items()],
        "refused": sum(len(c["refused"]) for c in chunks),
        "programs_by_workers": dict(sorted(workers.items(), key=lambda item: int(item[0]))),
        "primitive_type_pairs": len(pairs),
        "fewest_of_a_pair": min(pairs.values(), default=0),
        "core_seconds": sum(c["seconds"] for c in chunks),
    }


if __name__ == "__main__":
    sys.exit(main())
