"""Contributions to factors that are elsewhere: kept until a refresh wants the factors.

A factor that does not live near the processor would be read and written by every step only to add
to it. What a step adds is X X^T, and X is the gradient: smaller than the factors, in a
transformer's MLP by eight times. So steps write X, and a refresh reads the factors once and folds
all X in, in order and batched as the steps would have: the same bits. (Summing the increments
instead would take as much memory as the factors, and folding on the host would round otherwise.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from asteria.algorithms.algorithm import BlockState, Contribution, fold_
from asteria.store.cell import Cell, Home
from asteria.store.door import Door, acquire_all
from asteria.store.layout import Layout

__all__ = ["Ledger"]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one step adds to the factors of some blocks."""

    cells: list[Cell]
    """Of the different X, each (blocks, *dims)."""
    terms: list[tuple[int, int, float]]
    """(mode, which X, weight), in the order of the step."""
    start: int
    stop: int
    beta: float
    gate: Tensor | None


class Ledger:
    """Entries of one extent, oldest first. For the training thread."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._entries: list[_Entry] = []
        self._blank: list[Cell] = []
        """Acquired for the next entry."""

    def __len__(self) -> int:
        return len(self._entries)

    def cells(self) -> list[Cell]:
        """What `fold_into` is going to acquire, in order."""
        return [cell for entry in self._entries for cell in entry.cells]

    def open(self, layout: Layout, tensors: int, home: Home) -> None:
        """Make room for an entry of so many X of one ``layout``, whose field is ``x``.

        Raises as `Door.acquire`, and keeps nothing then.
        """
        self.close()
        blank = [Cell(layout, home) for _ in range(tensors)]
        acquire_all(self._door, blank)
        self._blank = blank

    def close(self) -> None:
        """Give up the room that no entry has taken."""
        for cell in self._blank:
            self._door.release(cell, dirty=False)
            self._door.discard(cell)
        self._blank = []

    def note(
        self,
        given: Iterable[Contribution],
        place: tuple[int, int],
        *,
        beta: float,
        gate: Tensor | None,
    ) -> None:
        """Write a step's contributions to the blocks of ``place``, (first, one past the last).

        Into what `open` has made room for.
        """
        cells: list[Cell] = []
        terms: list[tuple[int, int, float]] = []
        for mode, x, weight, again in given:
            if not again:
                cells.append(self._blank.pop(0))
                cells[-1].window(0, len(x))["x"].copy_(x)
                self._door.release(cells[-1], dirty=True)
            terms.append((mode, len(cells) - 1, weight))
        self._entries.append(_Entry(cells, terms, *place, beta, gate))

    def fold_into(self, factors: Cell) -> None:
        """Fold all entries into the acquired ``factors``.

        Raises StoreError, as `Door.acquire`; what was folded until then is not folded again.
        """
        while self._entries:
            entry = self._entries[0]
            acquire_all(self._door, entry.cells)
            try:
                state: BlockState = factors.window(entry.start, entry.stop)
                for mode, which, weight in entry.terms:
                    x = entry.cells[which].window(0, entry.stop - entry.start)["x"]
                    fold_(state, Contribution(mode, x, weight), entry.beta, entry.gate)
            finally:
                for cell in entry.cells:
                    self._door.release(cell, dirty=False)
            for cell in entry.cells:
                self._door.discard(cell)
            del self._entries[0]

    def discard(self) -> None:
        """The factors are not needed any more."""
        self.close()
        for cell in self.cells():
            self._door.discard(cell)
        self._entries.clear()
