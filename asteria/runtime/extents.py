"""Blocks that live and are stepped together, and the state they have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from asteria.algorithms.algorithm import Algorithm, BlockShape
from asteria.linalg.packed import size_of
from asteria.runtime.ledger import Ledger
from asteria.runtime.records import Tile
from asteria.store.cell import Cell, Home
from asteria.store.door import Door, acquire_all
from asteria.store.layout import Layout, Life
from asteria.telemetry.phases import phase

__all__ = [
    "CHUNK_BYTES",
    "EXTENT_BYTES",
    "Extent",
    "ExtentKey",
    "block_parts",
    "cut_blocks",
    "layouts",
]

CHUNK_BYTES = 32 * 1024**2
"""Size of one temporary tensor. A step uses three, or three single tiles where one is larger."""

EXTENT_BYTES = 64 * 1024**2
"""State of an extent, or a single tile's where that is larger: what is moved at a time."""

T = TypeVar("T")


class ExtentKey(NamedTuple):
    """What blocks must have in common to live in one extent."""

    rule: Algorithm
    shape: BlockShape
    dtype: torch.dtype
    device: torch.device
    part: tuple[int, int] | None = None
    """Of a sharded parameter: the extent that its blocks are in where one process has everything,
    by its first parameter and tile. What is multiplied together there is so here.
    """

    @property
    def most_blocks(self) -> int:
        """Of an extent."""
        itemsize = self.dtype.itemsize
        elements = max(1, math.prod(self.shape.dims))
        numbers = sum(math.prod(spec.shape) for spec in self.rule.fields(self.shape))
        return max(1, min(CHUNK_BYTES // elements, EXTENT_BYTES // max(1, numbers)) // itemsize)


def block_parts(matrices: Iterable[Tensor]) -> Iterator[slice]:
    """Cuts stacked factors or bases so that what is made of the largest of them fits a chunk.

    Shapes: (b, n, n) each, or halves of these. Nothing where there are no matrices.
    """
    given = list(matrices)
    if given:
        largest = max(size_of(matrix.shape) ** 2 * matrix.element_size() for matrix in given)
        step = max(1, CHUNK_BYTES // largest)
        for start in range(0, len(given[0]), step):
            yield slice(start, start + step)


def cut_blocks(parts: Sequence[tuple[T, int]], most_blocks: int) -> Iterator[list[T]]:
    """Neighbours of up to ``most_blocks`` blocks together, or one part that has more alone.

    ``parts`` are (tile, blocks). A pure function of the tiles: which of them go through a product
    together decides on its last bits, so it must not depend on memory at hand.
    """
    current: list[T] = []
    total = 0
    for part, blocks in parts:
        if current and total + blocks > most_blocks:
            yield current
            current, total = [], 0
        current.append(part)
        total += blocks
    if current:
        yield current


def layouts(
    rule: Algorithm, shape: BlockShape, blocks: int, dtype: torch.dtype, kept: int | None = None
) -> dict[Life, Layout]:
    """How the state of so many blocks lies in memory, for each life that a field of it has.

    Of the factors there are ``kept`` blocks here, by default all; other ranks keep the rest.
    """
    fields, found = rule.fields(shape), {}
    for life in Life:
        own = [spec for spec in fields if spec.life is life]
        count = blocks if kept is None or life is not Life.SUM else kept
        if own and (count or not blocks):
            found[life] = Layout(own, count, dtype)
    return found


@dataclass(slots=True, eq=False)
class Extent:
    """Neighbouring tiles of one kind and the cells that hold their state, in order."""

    key: ExtentKey
    tiles: list[Tile]
    door: Door
    cells: dict[Life, Cell] = field(default_factory=dict)
    ledger: Ledger | None = None
    """What is still to be folded into the factors."""
    resident: bool = False
    """Whether all of the state stays on the device, so that nothing has to be acquired."""
    keeps_all: bool = True
    """Whether no factor is with another rank."""
    _windows: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    """Views that the last steps used while the extent is resident."""
    notes: dict[tuple[int, int], object] = field(default_factory=dict)
    """What is remembered of these views, until they are other ones."""

    def __post_init__(self) -> None:
        self.keeps_all = all(tile.kept for tile in self.tiles)

    @property
    def rule(self) -> Algorithm:
        """Of all its blocks."""
        return self.key.rule

    @property
    def shape(self) -> BlockShape:
        """Of each of its blocks."""
        return self.key.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the state."""
        return self.key.dtype

    @property
    def device(self) -> torch.device:
        """Where the blocks are computed."""
        return self.key.device

    @property
    def blocks(self) -> int:
        """Of all tiles."""
        return self.tiles[-1].stop

    @property
    def kept_blocks(self) -> int:
        """Those whose factors are here: their cell has these and no others, in order."""
        return self.place(0, self.blocks, Life.SUM)[1]

    def place(self, start: int, stop: int, life: Life) -> tuple[int, int]:
        """Where the blocks ``start`` to ``stop`` are in the cell of this life."""
        if life is not Life.SUM or self.keeps_all:
            return start, stop
        before = [t for t in self.tiles if t.kept and t.start < stop]
        last = sum(min(tile.stop, stop) - tile.start for tile in before)
        return last - sum(r.stop - r.start for r in self.kept(start, stop)), last

    def kept(self, start: int, stop: int) -> list[slice]:
        """Which of the blocks ``start`` to ``stop`` have their factors here, counted from start."""
        if self.keeps_all:
            return [slice(0, stop - start)]
        runs: list[slice] = []
        for tile in self.tiles:
            first, last = max(tile.start, start) - start, min(tile.stop, stop) - start
            if not tile.kept or first >= last:
                continue
            if runs and runs[-1].stop == first:
                first = runs.pop().start
            runs.append(slice(first, last))
        return runs

    @property
    def period(self) -> int:
        """Steps between refreshes of its first tile; it only decides where things are kept."""
        return self.tiles[0].record.refresh_steps

    @property
    def is_at_home(self) -> bool:
        """Whether all of the state is in the memory of the device."""
        return all(cell.home is Home.DEVICE for cell in self.cells.values())

    def cells_of(self, lives: Iterable[Life]) -> list[Cell]:
        """Those of these lives that there are."""
        return [self.cells[life] for life in lives if life in self.cells]

    @phase("acquire")
    def acquire(self, lives: Iterable[Life]) -> None:
        """Bring all fields of these lives; all of them or, if one cannot be had, none."""
        if self.resident:
            return
        acquire_all(self.door, self.cells_of(lives))

    def release(self, lives: Iterable[Life], dirty: Iterable[Life]) -> None:
        """The fields of these lives are not used any more; those of ``dirty`` have changed."""
        if self.resident:
            return
        changed = set(dirty)
        for life in lives:
            if life in self.cells:
                self.door.release(self.cells[life], dirty=life in changed)

    def fold(self) -> None:
        """Bring the factors, which are acquired, up to date.

        Raises as `Door.acquire`; they have changed then as far as the ledger has become shorter.
        """
        if self.ledger is not None:
            self.ledger.fold_into(self.cells[Life.SUM])

    def settle(self) -> None:
        """Bring the factors up to date wherever they are; raises as `Door.acquire`."""
        if self.ledger is not None and len(self.ledger):
            self.acquire([Life.SUM])
            try:
                self.fold()
            finally:
                self.release([Life.SUM], [Life.SUM])

    def moved_in(self) -> None:
        """The cells have homes, maybe new ones."""
        self.resident = False
        self._forget_windows()
        if self.is_at_home:
            self.acquire(self.cells)  # what was blank has memory from now on
            self.release(self.cells, dirty=[])
            self.resident = True

    def keep_ledger(self, *, wanted: bool) -> None:
        """Whether steps note what they add to factors that are not at home on the device."""
        away = Life.SUM in self.cells and self.cells[Life.SUM].home is not Home.DEVICE
        if not (away and wanted):
            self.settle()
            self.ledger = None
        elif self.ledger is None:
            self.ledger = Ledger(self.door)

    def discard(self) -> None:
        """The state is not needed any more."""
        if self.ledger is not None:
            self.ledger.discard()
        for cell in self.cells.values():
            self.door.discard(cell)

    def window(self, start: int, stop: int, lives: Iterable[Life]) -> Mapping[str, Tensor]:
        """Views of the fields of blocks ``start`` to ``stop``, which are acquired.

        Of a resident extent all fields, whatever the lives. Factors are those of the blocks that
        are `kept`.
        """
        if self.resident:
            place = (start, stop)
            if place not in self._windows:
                # Steps that cut the blocks in ever new ways shall not pile up views.
                if len(self._windows) > len(self.tiles):
                    self._forget_windows()
                self._windows[place] = self._merged(start, stop, self.cells)
            return self._windows[place]
        return self._merged(start, stop, lives)

    def _forget_windows(self) -> None:
        self._windows.clear()
        self.notes.clear()

    def _merged(self, start: int, stop: int, lives: Iterable[Life]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for life in lives:
            if life in self.cells:
                found.update(self.cells[life].window(*self.place(start, stop, life)))
        return found
