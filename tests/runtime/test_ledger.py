"""Contributions that wait for their factors: the same bits as folding at once, and none is lost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asteria.algorithms.algorithm import Contribution, fold_
from asteria.errors import StoreCorruptError, StoreError
from asteria.runtime.ledger import Ledger
from asteria.store.cell import Cell, Home
from asteria.store.layout import FieldSpec, Layout
from tests.contract.test_state_on_tiers import CASES, all_of, on_the_device
from tests.store.doors import Place
from tests.support.tiers import ARRANGEMENTS, CheckedLane, FaultyTier, arranged, limit_extents
from tests.support.training import assert_same_bits, same_bits

DIMS = (6, 4)
BLOCKS = 3
BETA = 0.75


def factors(home: Home = Home.NVME) -> Cell:
    fields = [FieldSpec("factor_0", (6, 6)), FieldSpec("factor_1", (4, 4))]
    return Cell(Layout(fields, BLOCKS, torch.float32), home)


def contribution(seed: int, blocks: int = BLOCKS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(blocks, *DIMS, generator=generator)


def given(x: Tensor) -> list[Contribution]:
    return [Contribution(0, x, 0.25), Contribution(1, x, 0.25, again=True)]


def note(
    ledger: Ledger,
    x: Tensor,
    start: int = 0,
    gate: Tensor | None = None,
    home: Home = Home.NVME,
) -> None:
    layout = Layout([FieldSpec("x", DIMS)], len(x), torch.float32)
    ledger.open(layout, 1, home)
    ledger.note(given(x), (start, start + len(x)), beta=BETA, gate=gate)
    ledger.close()


def at_once(steps: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    state = {"factor_0": torch.zeros(BLOCKS, 6, 6), "factor_1": torch.zeros(BLOCKS, 4, 4)}
    for x, start in steps:
        part = {name: tensor[start : start + len(x)] for name, tensor in state.items()}
        for one in given(x):
            fold_(part, one, BETA, None)
    return state


def folded(place: Place, ledger: Ledger, cell: Cell) -> dict[str, Tensor]:
    place.door.acquire(cell)
    ledger.fold_into(cell)
    place.door.release(cell, dirty=True)
    return place.door.read(cell)


@pytest.mark.parametrize("lane", [None, CheckedLane()])
def test_folding_later_gives_the_same_bits(lane: CheckedLane | None) -> None:
    place, cell = Place(lane=lane), factors()
    ledger = Ledger(place.door)
    steps = [(contribution(1), 0), (contribution(2, 1), 2), (contribution(3, 2), 0)]
    for x, start in steps:
        source = x.clone()
        note(ledger, source, start)
        source.fill_(torch.nan)
    assert len(ledger) == 3
    found, expected = folded(place, ledger, cell), at_once(steps)
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert len(ledger) == 0
    place.door.acquire(cell)
    ledger.fold_into(cell)
    place.door.release(cell, dirty=False)


def test_entries_take_room_only_until_they_are_folded() -> None:
    place, cell = Place(), factors()
    ledger = Ledger(place.door)
    for step in range(3):
        note(ledger, contribution(step))
    place.door.flush()
    place.near.trim()
    assert place.near.used_bytes == 0
    assert place.tier.used_bytes == 3 * BLOCKS * 24 * 4 + 3 * 32  # 288 bytes each, to 64
    folded(place, ledger, cell)
    assert place.tier.used_bytes == cell.nbytes


def test_entries_in_host_memory_are_folded_and_gone() -> None:
    place, cell = Place(lane=CheckedLane()), factors(Home.PINNED)
    ledger = Ledger(place.door)
    for step in range(2):
        note(ledger, contribution(step), home=Home.PINNED)
    folded(place, ledger, cell)
    place.door.flush()
    place.host.trim()
    assert place.host.used_bytes == cell.nbytes


def test_what_is_discarded_takes_no_room() -> None:
    place = Place()
    ledger = Ledger(place.door)
    note(ledger, contribution(1))
    ledger.open(Layout([FieldSpec("x", DIMS)], 1, torch.float32), 2, Home.NVME)
    ledger.discard()
    place.near.trim()
    assert (place.near.used_bytes, place.tier.used_bytes, len(ledger)) == (0, 0, 0)


def test_room_that_nobody_has_taken_is_given_up() -> None:
    place = Place()
    ledger = Ledger(place.door)
    ledger.open(Layout([FieldSpec("x", DIMS)], BLOCKS, torch.float32), 2, Home.NVME)
    ledger.note(given(contribution(1)), (0, BLOCKS), beta=BETA, gate=None)
    ledger.close()
    place.door.flush()
    place.near.trim()
    assert place.near.used_bytes == 0
    assert len(ledger.cells()) == 1


def test_a_closed_gate_folds_nothing() -> None:
    place, cell = Place(), factors()
    ledger = Ledger(place.door)
    note(ledger, contribution(1))
    note(ledger, contribution(2), gate=torch.zeros(()))
    note(ledger, contribution(3), gate=torch.ones(()))
    found = folded(place, ledger, cell)
    expected = at_once([(contribution(1), 0), (contribution(3), 0)])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_what_was_folded_before_a_failure_is_not_folded_again() -> None:
    place, cell = Place(tier=FaultyTier("read", 1)), factors()
    ledger = Ledger(place.door)
    steps = [(contribution(seed), 0) for seed in range(3)]
    for x, start in steps:
        note(ledger, x, start)
    place.door.acquire(cell)
    with pytest.raises(StoreCorruptError):
        ledger.fold_into(cell)
    assert len(ledger) == 2
    ledger.fold_into(cell)
    found, expected = cell.window(0, BLOCKS), at_once(steps)
    assert all(same_bits(found[name], expected[name]) for name in expected)
    place.door.release(cell, dirty=True)


class FailingNote(FaultyTier):
    """A disk that once cannot read the second of the notes that are folded together."""

    def __init__(self, ledgers: Callable[[], list[Ledger]]) -> None:
        super().__init__("read", 0, 0)
        self._ledgers = ledgers
        self._notes_read = 0

    def get(self, slot: Any, target: Tensor) -> Any:
        leases = [cell.lease for ledger in self._ledgers() for cell in ledger.cells()]
        is_note = any(lease is not None and lease.slot is slot for lease in leases)
        self._notes_read = self._notes_read + 1 if is_note else 0
        if self._notes_read == 2 and not self.failed:
            self.failing = range(self.gets, self.gets + 1)
        return super().get(slot, target)


def test_a_step_that_fails_in_the_middle_of_a_fold_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_extents(monkeypatch, 2048)
    case = CASES["slow factors"]
    optimizer = case.build("SOAP")
    tier = FailingNote(lambda: [e.ledger for e in optimizer._engine._all() if e.ledger is not None])
    # Nothing is prefetched, so that the failure comes while the notes are folded.
    monkeypatch.setattr("asteria.store.door.Door.prefetch", lambda self, cells: None)
    arranged(optimizer, ARRANGEMENTS["disk"], tier)
    for step in range(30):
        try:
            case.train(optimizer, range(step, step + 1))
        except StoreError:
            case.train(optimizer, range(step, step + 1))
    assert tier.failed == 1
    assert_same_bits(all_of(optimizer), on_the_device(case, "SOAP", 30))
