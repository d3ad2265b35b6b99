"""How tiles of streamed rows are cut, and how threads hold the other factor: tasks/matmul.cuh."""

from __future__ import annotations

from dataclasses import dataclass

from jax_mpk.codegen.cuda.code import WARPS

#: Bytes of a stage of the ring; a chunk fits into one.
STAGE_BYTES = 8 << 10
#: Fewest stages of a ring with tiles: what a piece of a tile takes at most. A shelf leaves so many more.
TILE_STAGES, MORE_STAGES = 8, 4
#: Rows of a tile, steps of the reduced axis, and rows whose pieces make a chunk.
TILE_ROWS, TILE_STEP, PIECE_ROWS = 16, 32, 4
#: Lots of 16 bytes of the other factor that a thread holds in registers, and bytes of it that all hold in scratch.
_HELD, _SHELF_BYTES = 18, 68 << 10


@dataclass(frozen=True)
class Pieces:
    """How tiles of rows are cut, and how threads hold the other factor: `Pieces` in matmul.cuh.

    Attributes:
      width: columns of a piece.
      rows: of a tile, in a chunk.
      block: columns that the tiles of a group stream, one after the other, before what is behind these columns.
      group: tiles.
      sums: bytes of what the warps have of the tiles whose sums are kept.
      shelf: bytes of scratch for what registers do not hold.
    """

    width: int
    rows: int
    block: int
    group: int
    sums: int
    shelf: int


@dataclass(frozen=True)
class Held:
    """A factor that threads hold.

    Attributes:
      key: what tells it from others.
      name: its name in the text.
      cut: how it is held.
    """

    key: tuple[object, ...]
    name: str
    cut: Pieces


def pieces(depth: int, columns: int, itemsize: int, reach: str) -> Pieces:
    """How rows are multiplied with columns.

    Args:
      depth: elements of a row or column.
      columns: how many.
      itemsize: bytes of an element.
      reach: where columns are and how they are read, as `Reach` there: "kScratch", "kHeld" or "kPassing".
    """
    length, steps, tiles = depth * itemsize, depth // TILE_STEP, -(-columns // 8)
    fewest = -(-steps // (_HELD // tiles * WARPS))
    whole = length <= STAGE_BYTES // 2 and fewest == 1
    count = 1 if whole else max(-(-length * PIECE_ROWS // STAGE_BYTES), fewest)
    width = -(-steps // count) * TILE_STEP
    rows = min(1 << (STAGE_BYTES // length).bit_length() - 1, TILE_ROWS) if whole else PIECE_ROWS
    lots = -(-(width // TILE_STEP) // WARPS) * tiles
    piece_bytes = lots * WARPS * 32 * 16
    own = _HELD // lots
    more = _SHELF_BYTES // piece_bytes if reach == "kHeld" else 0
    stays = count == 1 or (reach != "kPassing" and count <= own + more)
    buffers = 2 if tiles <= 2 else 1
    return Pieces(
        width,
        rows,
        block=width * count if stays else width,
        group=1 if stays else buffers,
        sums=buffers * WARPS * tiles * 8 * TILE_ROWS * 4,
        shelf=max(0, count - own) * piece_bytes if stays else 0,
    )
