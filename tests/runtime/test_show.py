"""What the optimizer shows as state is the state, wherever it is."""

import pytest
import torch

from asteria import SOAP, RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime.entries import Entries
from asteria.runtime.show import show
from asteria.store.cell import Home
from tests.support.execution import ManualExecutor, directed
from tests.support.tiers import ARRANGEMENTS, arranged, limit_extents
from tests.support.training import parameters, same_bits, train


def built(place: str | None) -> SecondOrderOptimizer:
    optimizer = SOAP(parameters([(12, 4), (5,), (12, 4)]), shampoo_beta=0.5)
    if place is None:
        return directed(optimizer, ManualExecutor())
    arranged(optimizer, ARRANGEMENTS[place])
    return optimizer


def entries_of(optimizer: SecondOrderOptimizer, position: int = 0) -> Entries:
    entries = optimizer.state[optimizer.param_groups[0]["params"][position]]
    assert isinstance(entries, Entries)
    return entries


def test_what_is_at_home_is_a_view_of_the_state() -> None:
    optimizer = built(None)
    train(optimizer, range(3))
    entries = entries_of(optimizer)
    moment = entries["exp_avg"]
    before = moment.clone()
    train(optimizer, range(3, 5))
    assert entries["exp_avg"] is moment
    assert not torch.equal(moment, before)
    moment.zero_()
    assert bool((entries_of(optimizer)["exp_avg"] == 0).all())


@pytest.mark.parametrize("place", ["disk", "pinned", "disk behind a device"])
def test_what_is_elsewhere_is_read_anew_each_time(place: str) -> None:
    optimizer, twin = built(place), built(None)
    for steps in (range(3), range(3, 6), range(6, 20)):
        train(optimizer, steps)
        train(twin, steps)
        for position in range(3):
            found, expected = entries_of(optimizer, position), entries_of(twin, position)
            assert list(found) == list(expected) or set(found) == set(expected)
            assert all(same_bits(found[key], expected[key]) for key in expected)
    assert entries_of(optimizer)["exp_avg"] is not entries_of(optimizer)["exp_avg"]


@pytest.mark.parametrize("place", ["disk", "pinned"])
def test_what_is_saved_is_as_large_as_what_is_shown(place: str) -> None:
    optimizer = SOAP(parameters([(12, 4)] * 6), shampoo_beta=0.5)
    arranged(optimizer, ARRANGEMENTS[place])
    train(optimizer, range(3))
    for position in range(6):
        for key, value in entries_of(optimizer, position).items():
            size = value.untyped_storage().nbytes()
            assert size == value.numel() * value.element_size(), key


def test_counters_are_always_near() -> None:
    optimizer = built("disk")
    train(optimizer, range(3))
    entries = entries_of(optimizer)
    away = {key for key in entries if entries.is_away(key)}
    assert set(entries) - away == {"step", "born", "version"}


def test_looking_at_factors_folds_what_waits_for_them() -> None:
    optimizer = built("disk")
    train(optimizer, range(20))
    ledgers = [e.ledger for e in optimizer._engine._all() if e.ledger is not None]
    assert any(map(len, ledgers))
    for position in (0, 2):
        entries_of(optimizer, position)["factor_0"]
    assert not any(map(len, ledgers))


def test_a_parameter_in_several_extents_is_shown_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_extents(monkeypatch, 2048)
    options = {"max_precond_dim": 4, "large_dims": "blocks", "shampoo_beta": 0.5}
    optimizer = directed(SOAP(parameters([(48, 4)]), **options), ManualExecutor())
    train(optimizer, range(3))
    extents = optimizer._engine._all()
    assert len(extents) > 1
    entries = entries_of(optimizer)
    assert entries.is_away("factor_0"), "it has no memory of its own"
    assert entries["factor_0"].shape == (12, 4, 4)
    for extent in extents:
        for tile in extent.tiles:
            _, first, _ = tile.record.route.place_of(tile.plan)
            for cell in extent.cells.values():
                values = extent.door.read(cell)
                if "factor_0" in values:
                    shown = entries["factor_0"][first : first + tile.plan.blocks]
                    assert same_bits(shown, values["factor_0"][tile.start : tile.stop])


def test_after_a_move_others_see_the_new_place_and_keep_what_they_have() -> None:
    optimizer = built(None)
    train(optimizer, range(3))
    engine = optimizer._engine
    entries = entries_of(optimizer)
    held, expected = entries["basis_0"], entries["basis_0"].clone()
    for extent in engine._all():
        for cell in extent.cells.values():
            assert cell.shown
            assert cell.home is Home.DEVICE
    engine._residence._near[torch.device("cpu")].trim()
    show(engine._all())
    assert entries_of(optimizer)["basis_0"].data_ptr() == held.data_ptr()
    assert same_bits(held, expected)


@pytest.mark.parametrize("place", ["disk", "pinned"])
def test_bases_in_bfloat16_are_promised_as_they_are(place: str) -> None:
    runtime = RuntimeConfig(state_dtype=torch.bfloat16)
    optimizer = SOAP(parameters([(12, 4)] * 3), shampoo_beta=0.5, runtime=runtime)
    arranged(optimizer, ARRANGEMENTS[place])
    train(optimizer, range(3))
    saved = optimizer.state_dict()["state"]
    for position in range(3):
        for key, value in entries_of(optimizer, position).items():
            assert saved[position][key].dtype == value.dtype, key
            assert same_bits(saved[position][key].clone(), value), key
