"""Packed factors are shown in full, and take half as long as nobody looks."""

import pytest
import torch
from torch import Tensor

from asteria.linalg.packed import pack
from asteria.runtime.halves import UnpackedSource
from asteria.runtime.promises import Promises
from asteria.store import sources
from asteria.store.distant import Distant, Source
from asteria.store.layout import FieldSpec, Layout
from asteria.store.sources import FieldSource, SlotReads
from asteria.store.tier import Lease
from tests.support.tiers import CheckedTier
from tests.support.training import same_bits


def symmetric(seed: int = 0, size: int = 5) -> Tensor:
    matrix = torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed))
    return matrix.tril() + matrix.tril(-1).mT


def on_disk(tier: CheckedTier, factor: Tensor) -> UnpackedSource:
    half = pack(factor)
    layout = Layout([FieldSpec("factor_0", tuple(half.shape[1:]), half_of=5)], 2, torch.float32)
    memory = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.views(memory)["factor_0"].copy_(half)
    lease = Lease(tier, tier.put(memory))
    return UnpackedSource(FieldSource(SlotReads(), lease, layout, "factor_0", 0, 2), factor.shape)


def test_values_are_read_each_time() -> None:
    tier, factor = CheckedTier(), symmetric()
    source = on_disk(tier, factor)
    assert source.lasts
    assert same_bits(source.read(), factor)
    assert source.read() is not source.read()


@pytest.mark.parametrize("least_bytes", [0, 2**20])
def test_what_replaces_them_goes_where_they_are(
    least_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a slot of half the size, or to memory if it is too small for one."""
    monkeypatch.setattr(sources, "_LEAST_SLOT_BYTES", least_bytes)
    tier, value = CheckedTier(), symmetric(1)
    source = on_disk(tier, symmetric())
    found = source.replaced(value)
    assert found is not None
    assert same_bits(found.read(), value)
    assert isinstance(found, UnpackedSource)
    assert found.is_in_memory == (least_bytes > 0)
    if not least_bytes:
        assert tier.slots[-1].nbytes == pack(value).nbytes


def test_what_is_not_symmetric_is_kept_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_LEAST_SLOT_BYTES", 0)
    value = torch.arange(50.0).view(2, 5, 5)
    found: Source | None = on_disk(CheckedTier(), symmetric()).replaced(value)
    assert found is not None
    assert same_bits(found.read(), value)


def test_the_live_state_is_kept_in_half_and_not_brought_back_for_room() -> None:
    live = pack(symmetric())
    before = symmetric()
    promises = Promises()
    shown = promises.borrowed(
        live.clone, before.shape, torch.float32, torch.device("cpu"), halves=True
    )
    assert isinstance(shown, Distant)
    promises.keep()
    live.zero_()
    assert not promises.give_way(), "there is nothing on a tier"
    assert not shown.is_held
    assert same_bits(shown.clone(), before)
    shown.copy_(2 * before)
    assert not shown.is_held
    assert same_bits(shown.clone(), 2 * before)
    shown.add_(1)
    assert shown.is_held, "of what is written in parts nobody knows that it is symmetric"
    assert same_bits(shown.clone(), 2 * before + 1)
