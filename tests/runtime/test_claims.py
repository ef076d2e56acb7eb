"""What state asks of the tiers: a pure function of shapes and settings."""

import math
from collections.abc import Callable

import pytest
import torch

from asteria import RuntimeConfig
from asteria.algorithms.algorithm import Algorithm, BlockShape
from asteria.algorithms.kl import KLSOAP, KLShampoo
from asteria.algorithms.soap import SOAP
from asteria.runtime import extents
from asteria.runtime.claims import items, ledger_steps, working_bytes
from asteria.runtime.extents import ExtentKey, layouts
from asteria.store.layout import Life

SYNC = RuntimeConfig(refresh="sync")
WIDE = BlockShape((512, 64), (True, True))
SQUARE = BlockShape((64, 64), (True, True))


def turned() -> SOAP:
    return SOAP(factors="rotated")


def key(shape: BlockShape = WIDE, rule: Callable[[], Algorithm] = SOAP) -> ExtentKey:
    return ExtentKey(rule(), shape, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("rule", [SOAP, KLShampoo, KLSOAP])
def test_every_cell_asks_for_its_bytes_in_the_order_of_the_layouts(rule: type, blocks: int) -> None:
    of = key(rule=rule)
    found = items(of, blocks, 10, RuntimeConfig())
    cells = layouts(of.rule, of.shape, blocks, of.dtype)
    assert [item.nbytes for item in found] == [cell.nbytes for cell in cells.values()]
    assert list(cells) == [Life.STEP, Life.BASIS, Life.SUM]


def test_what_a_step_reads_and_writes_is_moved_twice() -> None:
    step, basis, factors = items(key(SQUARE, KLShampoo), 2, 10, SYNC)
    assert step.moved_bytes == 2 * step.nbytes
    assert basis.moved_bytes == pytest.approx(1.1 * basis.nbytes), "it is written when replaced"
    if not ledger_steps(key(SQUARE, KLShampoo), 10):
        assert factors.moved_bytes == 2 * factors.nbytes


def test_refreshes_in_flight_take_room_beside_what_they_start_from() -> None:
    assert all(item.beside_bytes == 0 for item in items(key(), 2, 10, SYNC))
    still = RuntimeConfig(staleness=0)
    assert all(item.beside_bytes == 0 for item in items(key(), 2, 10, still))
    step, basis, factors = items(key(), 2, 10, RuntimeConfig(staleness=2))
    assert step.beside_bytes == 0
    assert basis.beside_bytes == pytest.approx(0.3 * basis.nbytes)
    assert factors.beside_bytes == pytest.approx(0.3 * factors.nbytes)


def test_refreshes_on_the_device_take_room_there() -> None:
    config = RuntimeConfig(refresh_on="device", staleness=2)
    step, basis, factors = items(key(), 2, 10, config)
    assert {item.beside_bytes for item in (step, basis, factors)} == {0.0}
    assert step.flying_bytes == 0
    assert basis.flying_bytes == pytest.approx(0.3 * basis.nbytes), "until they land"
    assert factors.flying_bytes == pytest.approx(0.1 * factors.nbytes), "until they are done with"
    assert all(item.flying_bytes == 0 for item in items(key(), 2, 10, RuntimeConfig()))


def test_factors_wait_where_contributions_are_smaller() -> None:
    assert ledger_steps(key(WIDE), 10) == 5
    assert ledger_steps(key(WIDE), 3) == 3
    assert ledger_steps(key(WIDE), 100) == 5, "notes take disk space"
    assert ledger_steps(key(WIDE), 1) == 0, "a refresh wants them in every step"
    one_sided = BlockShape((512, 8), (False, True))
    assert ledger_steps(key(one_sided), 10) == 0


def test_notes_are_counted_and_their_traffic_is_less() -> None:
    contributed = 512 * 64 * 4 * 2
    factors = items(key(WIDE), 2, 10, SYNC)[-1]
    assert factors.noted_bytes == 4 * contributed
    assert factors.moved_bytes == 2 * contributed + 2 * factors.nbytes / 5
    assert factors.moved_bytes < 2 * factors.nbytes


@pytest.mark.parametrize("rule", [SOAP, KLShampoo, KLSOAP])
def test_contributed_tensors_are_counted_as_they_come(rule: type) -> None:
    of = key(BlockShape((6, 4), (True, True)), rule)
    fold = 2 * of.rule.contributed_tensors(of.shape) * math.prod(of.shape.dims)
    assert bool(ledger_steps(of, 10)) == (fold + 0.4 * (36 + 16) <= 0.5 * 2 * (36 + 16))


def test_packed_factors_are_half_and_unpacked_beside() -> None:
    packed = ExtentKey(SOAP(factors="packed"), SQUARE, torch.float32, torch.device("cpu"))
    half = 64 * 65 // 2 * 4
    *others, factors = items(packed, 3, 10, SYNC)
    assert factors.nbytes == 3 * 2 * half
    assert [item.nbytes for item in others] == [
        item.nbytes for item in items(key(SQUARE), 3, 10, SYNC)
    ][:2]
    nothing = working_bytes([], refreshes=1)
    held = 2 * 64 * 64 * 4 + 2 * half
    step = 3 * 64 * 64 * 4 + 32 * 64 * 4
    assert working_bytes([(packed, 1)], refreshes=1) - nothing == step + 9 * 64 * 64 * 4 + held
    # Nearly square ones need not be noted: there is half as much to be read and written.
    shape = BlockShape((256, 64), (True, True))
    rules = SOAP(), SOAP(factors="packed")
    device = torch.device("cpu")
    steps = [ledger_steps(ExtentKey(rule, shape, torch.float32, device), 10) for rule in rules]
    assert steps == [5, 0]


def test_temporary_memory_grows_with_the_largest_of_all() -> None:
    nothing = working_bytes([], refreshes=1)
    small = working_bytes([(key(SQUARE), 1)], refreshes=1) - nothing
    held = (2 * 64 * 64 + 2 * 64 * 64) * 4
    assert small == 3 * 64 * 64 * 4 + 8 * 64 * 64 * 4 + held
    both = working_bytes([(key(SQUARE), 1), (key(WIDE), 2)], refreshes=1) - nothing
    largest = 2 * 2 * (512 * 512 + 64 * 64) * 4
    assert both == 3 * 2 * 512 * 64 * 4 + 8 * 512 * 512 * 4 + largest
    several = working_bytes([(key(SQUARE), 1)], refreshes=3) - nothing
    assert several == 3 * 64 * 64 * 4 + 3 * (8 * 64 * 64 * 4 + held)
    assert working_bytes([(key(SQUARE), 1)], refreshes=0) == small + nothing


def test_factors_that_turn_take_room_while_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns of both sides, and three matrices of the larger one, for what goes together."""
    plain, turning = key(), key(rule=turned)
    one = 4 * (512**2 + 64**2 + 3 * 512**2)
    for together, blocks in ((3, 3), (2, 3)):
        monkeypatch.setattr(extents, "CHUNK_BYTES", together * 4 * 512**2)
        beside = working_bytes([(plain, blocks)], refreshes=1)
        assert working_bytes([(turning, blocks)], refreshes=1) - beside == together * one


def test_factors_that_turn_are_moved_for_every_install_too() -> None:
    plain, turning = (items(key(rule=rule), 1, 10, RuntimeConfig()) for rule in (SOAP, turned))
    assert [item.nbytes for item in turning] == [item.nbytes for item in plain]
    assert turning[2].read_bytes - plain[2].read_bytes == pytest.approx(plain[2].nbytes / 10)
    sync = items(key(rule=turned), 1, 10, SYNC)
    assert sync[2] == items(key(), 1, 10, SYNC)[2], "in one go with the refresh"
