"""Draws how much of the device's read bandwidth each system uses, from the rows that `benchmarks.decode` wrote.

python -m benchmarks.roofline                   # benchmarks/results/decode_h200/*.json to docs/roofline.svg
python -m benchmarks.roofline FILE --out OUT
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks import harness

RESULTS = tuple(sorted((harness.RESULTS / "decode_h200").glob("*.json")))
PICTURE = harness.ROOT / "docs" / "roofline.svg"
# In this order, with what a reader calls them and a colour.
SYSTEMS = {
    "mpk_loop": ("jax_mpk, loop in the kernel", "#1a5fb4"),
    "mpk": ("jax_mpk", "#62a0ea"),
    "torch": ("torch.compile, CUDA graph", "#e66100"),
    "jit_loop": ("jax.jit, fori_loop", "#77767b"),
    "jit": ("jax.jit", "#c0bfbc"),
}
WIDTH, LABELS, RIGHT = 900, 230, 150
BAR, GAP, GROUP = 16, 4, 30
SCALE = WIDTH - LABELS - RIGHT
INK = "#222222"


def read(files: Iterable[Path]) -> list[harness.Row]:
    """The rows of several result files."""
    return [row for path in files for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def draw(rows: Sequence[harness.Row]) -> str:
    """One group of bars for each model and batch size, as SVG.

    Args:
        rows: of one device; of each system, model and batch size one.

    Raises:
        ValueError: there are no rows, or they do not belong into one picture.
    """
    rows = [row for row in rows if row["system"] in SYSTEMS]
    devices = sorted({row["device"] for row in rows})
    if len(devices) != 1:
        raise ValueError(f"one picture is of one device, and the rows are of {devices}")
    order = list(SYSTEMS)
    groups: dict[tuple[str, int], list[harness.Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["batch"]), []).append(row)
    body, y = [], 76.0
    for (model, batch), group in sorted(groups.items()):
        body.append(_text(16, y, f"{model}, batch {batch}", weight="bold"))
        y += 12
        for row in sorted(group, key=lambda row: order.index(row["system"])):
            body += _bar(row, y)
            y += BAR + GAP
        y += GROUP
    return "\n".join([*_frame(rows, devices[0], y), *body, "</svg>", ""])


def _bar(row: harness.Row, y: float) -> Iterator[str]:
    name, colour = SYSTEMS[row["system"]]
    fraction = row["fraction_of_roofline"]
    width, middle = SCALE * fraction, y + BAR - 4
    yield _text(LABELS - 10, middle, name, anchor="end")
    yield f'<rect x="{LABELS}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>'
    # In a column behind the last line of the grid, where no bar or line crosses them.
    yield _text(WIDTH - 70, middle, f"{row['ms_per_step']:.3f} ms", anchor="end")
    yield _text(WIDTH - 16, middle, f"{100 * fraction:.0f} %", anchor="end")


def _frame(rows: Sequence[harness.Row], device: str, height: float) -> Iterator[str]:
    reads = [row["read_tb_per_s"] for row in rows]
    speeds = f"{min(reads):.2f}" + (f"–{max(reads):.2f}" if f"{min(reads):.2f}" != f"{max(reads):.2f}" else "")
    about = [
        f"one {device}, reads {speeds} TB/s",
        *(
            f"{name} {', '.join(sorted({row[key] for row in rows}))}"
            for name, key in (("JAX", "jax_version"), ("commit", "commit"))
        ),
    ]
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">'
    )
    yield f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>'
    yield _text(16, 24, "Decode step: share of read bandwidth, and time", weight="bold", size=16)
    yield _text(16, 44, "; ".join(about))
    for tenth in range(0, 11, 2):
        x = LABELS + SCALE * tenth / 10
        last = tenth == 10
        yield (
            f'<line x1="{x:.1f}" y1="62" x2="{x:.1f}" y2="{height - GROUP:.1f}" '
            f'stroke="{"#c01c28" if last else "#dddddd"}" stroke-width="{2 if last else 1}"/>'
        )
        yield _text(x, height - 12, f"{10 * tenth} %" if not last else "read bandwidth", anchor="middle")


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", size: int = 13) -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="*", default=RESULTS)
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args(argv)
    picture = draw(read(options.files))
    options.out.write_text(picture, encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
