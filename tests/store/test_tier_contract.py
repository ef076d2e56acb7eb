"""What every tier does."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from asteria import ConfigError, StoreError, StoreFullError
from asteria.store.array_files import padded_bytes, page_aligned
from asteria.store.nvme import NvmeTier
from asteria.store.tier import Slot, Tier
from tests.store.places import PAGE, SIZES, noise, read

Open = Callable[[int | None], Tier]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    tiers: list[Tier] = []

    def open_tier(budget_bytes: int | None) -> Tier:
        tiers.append(NvmeTier(tmp_path, budget_bytes=budget_bytes))
        return tiers[-1]

    yield open_tier
    for tier in tiers:
        tier.close()


@pytest.fixture
def tier(opened: Open) -> Tier:
    return opened(None)


def real_bytes(tier: Tier, nbytes: int) -> int:
    return padded_bytes(nbytes)


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("aligned", [True, False])
def test_what_is_put_comes_back(tier: Tier, nbytes: int, aligned: bool) -> None:
    source = page_aligned(nbytes + 1)[:nbytes] if aligned else torch.empty(nbytes + 1).byte()[1:]
    source.copy_(noise(nbytes))
    slot = tier.put(source)
    slot.wait()
    assert slot.done
    assert slot.nbytes == nbytes
    source.zero_()
    assert torch.equal(read(tier, slot), noise(nbytes))
    assert torch.equal(read(tier, slot), noise(nbytes)), "reading takes nothing away"


def test_zeros_are_content_as_any_other(tier: Tier) -> None:
    slot = tier.put(torch.zeros(2 * PAGE, dtype=torch.uint8))
    assert not read(tier, slot).any()


def test_a_slot_is_not_overwritten(tier: Tier) -> None:
    slots = [tier.put(noise(PAGE, seed)) for seed in range(3)]
    tier.drop(slots[1])
    newer = tier.put(noise(PAGE, 9))
    for slot, seed in ((slots[0], 0), (slots[2], 2), (newer, 9)):
        assert torch.equal(read(tier, slot), noise(PAGE, seed))


@pytest.mark.parametrize("nbytes", SIZES)
def test_what_slots_take_is_counted(tier: Tier, nbytes: int) -> None:
    first, second = tier.put(noise(nbytes)), tier.put(noise(5))
    assert tier.used_bytes == real_bytes(tier, nbytes) + real_bytes(tier, 5)
    tier.drop(first)
    tier.drop(first)
    assert tier.used_bytes == real_bytes(tier, 5)
    tier.drop(second)
    assert tier.used_bytes == 0


def test_a_budget_is_kept_and_a_refusal_changes_nothing(opened: Open) -> None:
    tier = opened(2 * PAGE)
    assert tier.budget_bytes == 2 * PAGE
    slot = tier.put(noise(PAGE))
    with pytest.raises(StoreFullError, match=f"{PAGE}.* budget of {2 * PAGE}.*raise .*_budget"):
        tier.put(noise(PAGE + 1))
    assert tier.used_bytes == PAGE
    other = tier.put(noise(PAGE, 1))
    assert torch.equal(read(tier, slot), noise(PAGE))
    tier.drop(slot)
    assert torch.equal(read(tier, tier.put(noise(PAGE, 2))), noise(PAGE, 2))
    assert torch.equal(read(tier, other), noise(PAGE, 1))


def test_any_thread_may_come(tier: Tier) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(20):
                content = noise(PAGE * (1 + seed) + turn, 100 * seed + turn)
                slot = tier.put(content)
                assert torch.equal(read(tier, slot), content)
                tier.drop(slot)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert tier.used_bytes == 0


def test_what_is_no_row_of_bytes_on_the_host_is_refused(tier: Tier) -> None:
    wrong = [
        torch.zeros(4),
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.uint8)[::2],
        torch.zeros(4, dtype=torch.uint8, device="meta"),
    ]
    slot = tier.put(noise(4))
    for tensor in wrong:
        with pytest.raises(ConfigError, match="contiguous"):
            tier.put(tensor)
        with pytest.raises(ConfigError, match="moves 4 bytes"):
            tier.get(slot, tensor)
    with pytest.raises(ConfigError, match="moves 4 bytes"):
        tier.get(slot, torch.zeros(5, dtype=torch.uint8))


def test_a_slot_that_is_not_there_is_refused(opened: Open) -> None:
    tier, other = opened(None), opened(None)
    slot, foreign = tier.put(noise(4)), other.put(noise(4, 1))
    target = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(StoreError, match="of another tier"):
        tier.get(foreign, target)
    tier.drop(foreign)
    assert torch.equal(read(other, foreign), noise(4, 1))
    tier.drop(slot)
    with pytest.raises(StoreError, match="dropped"):
        tier.get(slot, target)


def test_closing_is_final_and_can_be_repeated(tier: Tier) -> None:
    slot: Slot = tier.put(noise(PAGE))
    tier.close()
    tier.close()
    tier.drop(slot)
    with pytest.raises(StoreError, match="closed"):
        tier.put(noise(4))
    with pytest.raises(StoreError):
        tier.get(slot, noise(PAGE))
