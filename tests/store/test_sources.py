"""Values in slots, in parts, and zeros: what is read, how often, and what it takes."""

import io

import pytest
import torch

from asteria.errors import StoreError, StoreFullError
from asteria.store import sources
from asteria.store.layout import FieldSpec, Layout
from asteria.store.sources import FieldSource, JoinedSource, SlotReads, SlotSource, ZeroSource
from asteria.store.tier import Lease
from tests.support.tiers import CheckedTier, FaultyTier

LAYOUT = Layout(
    [FieldSpec("moment", (2, 3)), FieldSpec("basis", (3, 3), by_columns=True)], 4, torch.float32
)


def written(tier: CheckedTier, seed: int = 0) -> tuple[Lease, dict[str, torch.Tensor]]:
    """A slot of `LAYOUT`, and what it holds."""
    memory = torch.zeros(LAYOUT.nbytes, dtype=torch.uint8)
    views = LAYOUT.views(memory)
    for view in views.values():
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(seed)))
    return Lease(tier, tier.put(memory)), {name: view.clone() for name, view in views.items()}


@pytest.mark.parametrize("name", ["moment", "basis"])
def test_a_field_is_read_in_memory_of_its_own(name: str) -> None:
    lease, fields = written(CheckedTier())
    found = FieldSource(SlotReads(), lease, LAYOUT, name, 1, 3).read()
    assert torch.equal(found, fields[name][1:3])
    assert found.untyped_storage().nbytes() == found.nbytes
    assert found.stride() == fields[name][1:3].stride()


def test_a_slot_is_read_once_for_its_fields() -> None:
    tier = CheckedTier()
    (one, _), (two, _) = written(tier, 1), written(tier, 2)
    reads = SlotReads()
    for lease in (one, two, one, two):
        for name in ("moment", "basis"):
            FieldSource(reads, lease, LAYOUT, name, 0, 4).read()
    assert tier.gets == 2
    reads.forget()
    reads.read(one)
    assert tier.gets == 3


def test_only_the_latest_slots_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_RECENT_BYTES", 2 * LAYOUT.nbytes)
    tier, reads = CheckedTier(), SlotReads()
    leases = [written(tier, seed)[0] for seed in range(3)]
    for number, gets in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        reads.read(leases[number])
        assert tier.gets == gets
    monkeypatch.setattr(sources, "_RECENT_BYTES", 0)
    for _ in range(2):
        reads.read(leases[1])
    assert tier.gets == 4, "the last one is kept in any case"
    reads.read(leases[2])
    assert tier.gets == 5


def test_what_could_not_be_read_is_read_again() -> None:
    tier = FaultyTier("read", 0)
    lease, fields = written(tier)
    source = FieldSource(SlotReads(), lease, LAYOUT, "moment", 0, 4)
    with pytest.raises(StoreError, match="something else"):
        source.read()
    assert torch.equal(source.read(), fields["moment"])


@pytest.mark.parametrize(
    "value", [torch.randn(4, 5), torch.randn(5, 4).mT, torch.randn(1).expand(3)]
)
def test_what_takes_the_place_of_a_field_has_a_slot_for_itself(
    value: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_LEAST_SLOT_BYTES", 0)
    tier = CheckedTier()
    lease, _ = written(tier)
    replaced = FieldSource(SlotReads(), lease, LAYOUT, "moment", 0, 4).replaced(value)
    assert isinstance(replaced, SlotSource)
    assert tier.puts == 2
    assert torch.equal(replaced.read(), value)
    again = replaced.replaced(value + 1)
    assert again is not None
    assert torch.equal(again.read(), value + 1)
    del replaced
    assert len(tier.slots) == 2, "what nobody needs is gone"


def test_a_small_tensor_is_not_worth_a_slot() -> None:
    tier = CheckedTier()
    lease, _ = written(tier)
    source = FieldSource(SlotReads(), lease, LAYOUT, "moment", 0, 4)
    assert source.replaced(torch.zeros(1000)) is None
    assert tier.puts == 1
    big = torch.zeros(2**18)
    assert source.replaced(big) is not None


def test_a_full_tier_takes_nothing() -> None:
    tier = CheckedTier()
    lease, _ = written(tier)
    tier.budget_bytes = tier.used_bytes
    with pytest.raises(StoreFullError):
        FieldSource(SlotReads(), lease, LAYOUT, "moment", 0, 4).replaced(torch.zeros(2**18))


def test_parts_are_put_together() -> None:
    lease, fields = written(CheckedTier())
    reads = SlotReads()
    parts = [
        FieldSource(reads, lease, LAYOUT, "moment", 2, 4),
        ZeroSource((1, 2, 3), torch.float32),
        FieldSource(reads, lease, LAYOUT, "moment", 0, 1),
    ]
    found = JoinedSource(parts, (4, 6)).read()
    moment = fields["moment"]
    wanted = torch.cat([moment[2:4], torch.zeros(1, 2, 3), moment[:1]]).view(4, 6)
    assert torch.equal(found, wanted)
    assert torch.equal(JoinedSource(parts[:1], (2, 6)).read(), moment[2:4].reshape(2, 6))
    assert isinstance(JoinedSource(parts[1:], (2, 6)).replaced(torch.zeros(2**18)), SlotSource)
    assert JoinedSource(parts[1:2], (6,)).replaced(torch.zeros(2**18)) is None


@pytest.mark.parametrize("shape", [(300, 400), (1, 1), (), (0, 3), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_take_no_room(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    zeros = ZeroSource(shape, dtype).read()
    assert zeros.shape == shape
    assert zeros.dtype == dtype
    assert not zeros.any()
    assert zeros.untyped_storage().nbytes() <= dtype.itemsize
    file = io.BytesIO()
    torch.save(zeros, file)
    assert file.tell() < 2000
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), torch.zeros(shape, dtype=dtype))
