"""What a refresh starts from stays what it was, wherever the state goes meanwhile."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from asteria import SOAP
from asteria.errors import StoreError
from asteria.runtime.extents import Extent
from asteria.runtime.snapshots import Snapshots, take_snapshots
from asteria.runtime.transfer import HostLink
from asteria.store.cell import Home
from asteria.store.door import acquire_all
from asteria.store.layout import Life
from tests.support.links import CheckedLink
from tests.support.tiers import ARRANGEMENTS, CheckedTier, FaultyTier, arranged
from tests.support.training import parameters, same_bits, train

LIVES = (Life.SUM, Life.BASIS)


ALIVE: list[SOAP] = []
"""With an optimizer goes its disk."""


def extent_on(arrangement: str, tier: CheckedTier | None = None) -> Extent:
    """Two blocks, (6, 4) each, after a few steps."""
    optimizer = SOAP(parameters([(6, 4), (6, 4)]), shampoo_beta=0.5)
    ALIVE.append(optimizer)
    arranged(optimizer, ARRANGEMENTS[arrangement], tier)
    train(optimizer, range(4))
    (extent,) = optimizer._engine._all()
    extent.settle()
    extent.door.flush()
    return extent


def values(extent: Extent, block: int) -> list[Tensor]:
    """Factor and basis of both modes, in the order of `flat`."""
    found = {name: t for life in LIVES for name, t in extent.door.read(extent.cells[life]).items()}
    names = ["factor_0", "basis_0", "factor_1", "basis_1"]
    return [found[name][block : block + 1].clone() for name in names]


def flat(snapshots: Snapshots) -> Iterator[Tensor]:
    for pair in snapshots:
        assert pair is not None
        for snapshot in pair:
            yield snapshot.on_host()


def overwrite(extent: Extent, value: float) -> None:
    """Use everything once more and write to it, and to the memory it was in."""
    for life in LIVES:
        cell = extent.cells[life]
        extent.door.acquire(cell)
        for field in cell.window(0, extent.blocks).values():
            field.fill_(value)
        extent.door.release(cell, dirty=True)
    extent.door.flush()


def assert_kept(snapshots: Snapshots, expected: list[Tensor]) -> None:
    assert all(same_bits(a, b) for a, b in zip(flat(snapshots), expected, strict=True))


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("block", [0, 1])
def test_what_lies_on_disk_is_read_later_and_not_copied(block: int, copies: bool) -> None:
    tier = CheckedTier()
    extent = extent_on("disk", tier)
    expected = values(extent, block)
    gets, taken = tier.gets, extent.door._near.used_bytes
    snapshots = take_snapshots(extent, extent.tiles[block], HostLink(), copy_bases=copies)
    assert (tier.gets, extent.door._near.used_bytes) == (gets, taken)
    overwrite(extent, 7.0)
    assert_kept(snapshots, expected)


def test_a_cell_is_read_once_for_all_fields_and_again_for_a_repeated_job() -> None:
    tier = CheckedTier()
    extent = extent_on("disk", tier)
    expected = values(extent, 0)
    snapshots = take_snapshots(extent, extent.tiles[0], HostLink(), copy_bases=True)
    for _ in range(2):
        gets = tier.gets
        assert_kept(snapshots, expected)
        assert tier.gets == gets + len(LIVES)


def test_what_is_being_written_can_be_read() -> None:
    extent = extent_on("disk")
    for life in LIVES:
        extent.door.acquire(extent.cells[life])
        for field in extent.cells[life].window(0, 2).values():
            field.fill_(3.0)
        extent.door.release(extent.cells[life], dirty=True)
    snapshots = take_snapshots(extent, extent.tiles[0], HostLink(), copy_bases=False)
    assert all(bool((tensor == 3.0).all()) for tensor in flat(snapshots))


def test_the_disk_keeps_a_snapshot_as_long_as_anybody_needs_it() -> None:
    tier = CheckedTier()
    extent = extent_on("disk", tier)
    used_bytes = tier.used_bytes
    snapshots = take_snapshots(extent, extent.tiles[0], HostLink(), copy_bases=False)
    overwrite(extent, 7.0)
    assert tier.used_bytes == used_bytes + sum(extent.cells[life].nbytes for life in LIVES)
    del snapshots
    assert tier.used_bytes == used_bytes


def test_what_is_at_home_in_host_memory_is_copied_as_far_as_it_changes() -> None:
    optimizer = SOAP(parameters([(6, 4), (6, 4)]), shampoo_beta=0.5)
    train(optimizer, range(4))
    (extent,) = optimizer._engine._all()
    expected = values(extent, 1)
    snapshots = take_snapshots(extent, extent.tiles[1], HostLink(), copy_bases=True)
    shared = take_snapshots(extent, extent.tiles[1], HostLink(), copy_bases=False)
    overwrite(extent, 7.0)
    assert_kept(snapshots, expected)
    found = list(flat(shared))
    assert same_bits(found[0], expected[0])
    assert bool((found[1] == 7.0).all()), "a basis changes when it is replaced only"


def test_a_device_copies_from_what_is_acquired() -> None:
    extent = extent_on("disk behind a device")
    cells = [extent.cells[life] for life in LIVES]
    expected = values(extent, 0)
    acquire_all(extent.door, cells)
    snapshots = take_snapshots(extent, extent.tiles[0], CheckedLink(), copy_bases=False)
    for cell in cells:
        extent.door.release(cell, dirty=False)
    overwrite(extent, 7.0)
    assert_kept(snapshots, expected)


def failing_later(tier: CheckedTier, fault: str) -> None:
    assert isinstance(tier, FaultyTier)
    tier.fault, tier.failing = fault, range(tier.puts, tier.puts + len(LIVES))


@pytest.mark.parametrize("fault", ["full"])
def test_what_could_not_be_written_is_kept_for_the_refresh(fault: str) -> None:
    tier = FaultyTier("none", 0)
    extent = extent_on("disk", tier)
    extent.door._near.budget_bytes = None
    expected = values(extent, 0)
    failing_later(tier, fault)
    for life in LIVES:
        extent.door.acquire(extent.cells[life])
        extent.door.release(extent.cells[life], dirty=True)
    snapshots = take_snapshots(extent, extent.tiles[0], HostLink(), copy_bases=False)
    overwrite(extent, 7.0)
    overwrite(extent, 8.0)
    assert tier.failed
    assert_kept(snapshots, expected)


def test_a_cell_that_is_demoted_leaves_its_memory_to_the_refresh() -> None:
    extent = extent_on("disk")
    extent.door._near.budget_bytes = None
    for life in LIVES:
        extent.door.move(extent.cells[life], Home.DEVICE)
    expected = values(extent, 0)
    snapshots = take_snapshots(extent, extent.tiles[0], HostLink(), copy_bases=False)
    for life in LIVES:
        extent.door.move(extent.cells[life], Home.NVME)
    extent.door.flush()
    overwrite(extent, 7.0)
    assert_kept(snapshots, expected)


def test_a_snapshot_that_cannot_be_read_says_so() -> None:
    tier = FaultyTier("none", 0)
    extent = extent_on("disk", tier)
    expected = values(extent, 0)
    snapshots = take_snapshots(extent, extent.tiles[0], HostLink(), copy_bases=False)
    tier.fault, tier.failing = "read", range(tier.gets, tier.gets + 1)
    with pytest.raises(StoreError):
        next(flat(snapshots))
    assert_kept(snapshots, expected)
    assert not any(bool(torch.isnan(tensor).any()) for tensor in flat(snapshots))
