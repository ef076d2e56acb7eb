"""Bases that a device cannot compute: those in use stay, and the host is told later."""

import warnings

import pytest
import torch

from asteria import RefreshError, RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import extents, inline
from asteria.runtime.inline import InlineRefresher
from tests.support.arms import PERIOD, over_optimizers
from tests.support.asynchronous import GROWN, build
from tests.support.execution import versions
from tests.support.sides import ALIKE, ONE, BrokenSide, DeferredSide, Spoiler, on_device
from tests.support.training import Bits, assert_same_bits, everything, same_bits, train

# Failures


def all_of(factor: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(factor), dtype=torch.bool)


def bases_of(optimizer: SecondOrderOptimizer) -> Bits:
    return {k: v for k, v in everything(optimizer).items() if "basis" in k}


def unversioned(optimizer: SecondOrderOptimizer) -> Bits:
    """Everything but the versions, which the host learns of later."""
    return {k: v for k, v in everything(optimizer).items() if "version" not in k}


@over_optimizers
def test_a_basis_that_cannot_be_used_leaves_every_bit_of_its_block(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the host learns of it later: until then it has not waited."""
    spoiler, side = Spoiler(monkeypatch), DeferredSide()
    optimizer = on_device(name, side, ALIKE)
    train(optimizer, range(GROWN + 5))
    before, first = bases_of(optimizer), versions(optimizer)
    installs = optimizer.stats().installs
    spoiler.spoils = all_of
    waits = side.waits
    with pytest.warns(RuntimeWarning, match="no basis on the device"):
        train(optimizer, range(30, 30 + 3 * PERIOD))
    assert side.waits == waits
    assert_same_bits(bases_of(optimizer), before)
    stats = optimizer.stats()
    assert stats.failures == {"no basis on the device": stats.failed_refreshes}
    assert stats.failed_refreshes >= 2 * 8 * 2
    assert versions(optimizer) == first, "no version was installed, and none is told"
    assert stats.installs == installs
    assert all(bool(value.isfinite().all()) for value in everything(optimizer).values())
    spoiler.spoils = None
    train(optimizer, range(40, 40 + 3 * PERIOD))
    assert not same_bits(bases_of(optimizer)["0.basis_0"], before["0.basis_0"])


def test_moments_of_a_block_that_keeps_its_bases_keep_every_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the refresh had not been there."""
    spoiler = Spoiler(monkeypatch)
    finals = []
    for spoils in (None, all_of):
        optimizer = on_device("SOAP", DeferredSide(), ONE, period=10**6)
        train(optimizer, range(GROWN))
        spoiler.spoils = spoils
        for group in optimizer.param_groups:
            group["precondition_frequency"] = PERIOD if spoils else 10**6
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(optimizer, range(GROWN, GROWN + 7))
        assert bool(optimizer.stats().failures) == bool(spoils)
        finals.append(unversioned(optimizer))
        spoiler.spoils = None
    assert_same_bits(*finals)


def test_the_other_bases_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiler = Spoiler(monkeypatch)
    optimizer = on_device("SOAP", DeferredSide(), [(6, 4)])
    train(optimizer, range(GROWN + 3))
    before, (version,) = bases_of(optimizer), versions(optimizer)
    spoiler.spoils = lambda factor: torch.tensor([factor.shape[-1] == 6])
    with pytest.warns(RuntimeWarning, match="failed"):
        train(optimizer, range(30, 30 + 2 * PERIOD))
    after = bases_of(optimizer)
    assert same_bits(after["0.basis_0"], before["0.basis_0"])
    assert not same_bits(after["0.basis_1"], before["0.basis_1"])
    assert versions(optimizer)[0] > version


def test_a_failure_does_not_bring_an_older_basis_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several in flight, the one that it began with is not the one in use any more."""
    spoiler = Spoiler(monkeypatch)
    optimizer = on_device("SOAP", DeferredSide(), ONE, period=1, staleness=3)
    train(optimizer, range(GROWN + 5))
    seen = []

    def go_on(steps: range) -> None:
        for step in steps:
            train(optimizer, [step])
            seen.append(bases_of(optimizer)["0.basis_0"])

    go_on(range(30, 35))
    spoiler.spoils = all_of  # of what is done now
    go_on(range(35, 36))
    spoiler.spoils = None
    with pytest.warns(RuntimeWarning, match="failed"):
        go_on(range(36, 40))
    again = [(i, j) for i in range(len(seen)) for j in range(i) if same_bits(seen[i], seen[j])]
    assert again == [(5, 4)], "it stays for one step"


def test_a_failure_in_flight_is_saved_as_the_basis_it_began_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoiler = Spoiler(monkeypatch)
    optimizer = on_device("SOAP", DeferredSide(), ONE, period=4)
    train(optimizer, range(GROWN + 2))
    spoiler.spoils = all_of
    train(optimizer, range(GROWN + 2, GROWN + 5))
    (state,) = optimizer.state_dict()["state"].values()
    assert state["shadow_version"].max() >= GROWN
    assert same_bits(state["shadow_basis_0"][0, 0], state["basis_0"])


def test_many_failures_in_a_row_are_an_error_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised before a step changes anything, once the device has told of them."""
    spoiler = Spoiler(monkeypatch)
    optimizer = on_device("SOAP", DeferredSide(), ONE, max_failures=2)
    train(optimizer, range(GROWN))
    spoiler.spoils = all_of
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(GROWN, GROWN + 6 * PERIOD):
            before = unversioned(optimizer)
            try:
                train(optimizer, [step])
            except RefreshError as error:
                told.append(str(error))
                assert_same_bits(unversioned(optimizer), before)
    assert 2 <= len(told) <= 3
    assert "2 refreshes of parameter 0 of group 0 in a row failed" in told[0]


def test_a_full_device_keeps_the_bases_and_the_training_goes_on() -> None:
    side = BrokenSide()
    optimizer = on_device("SOAP", side, ONE)
    train(optimizer, range(GROWN + 3))
    side.full = True
    train(optimizer, range(20, 22))  # what is in flight lands
    before = bases_of(optimizer)
    with pytest.warns(RuntimeWarning, match="no memory on the device"):
        train(optimizer, range(30, 30 + 2 * PERIOD))
    assert_same_bits(bases_of(optimizer), before)
    side.full = False
    train(optimizer, range(40, 40 + 2 * PERIOD))
    assert not same_bits(bases_of(optimizer)["0.basis_0"], before["0.basis_0"])


def test_state_that_is_dropped_takes_its_verdicts_along(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiler = Spoiler(monkeypatch)
    optimizer = on_device("SOAP", DeferredSide(), ONE)
    train(optimizer, range(GROWN))
    spoiler.spoils = all_of
    train(optimizer, range(GROWN, GROWN + PERIOD))
    (p,) = optimizer.param_groups[0]["params"]
    del optimizer.state[p]
    spoiler.spoils = None
    train(optimizer, range(3))
    assert optimizer.stats().failures == {}


@pytest.fixture
def nothing_on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshes inside the step are done as on an accelerator."""
    monkeypatch.setattr(InlineRefresher, "_is_on_host", lambda self, factor: False)


@pytest.mark.usefixtures("nothing_on_host")
@pytest.mark.parametrize("chunk_bytes", [extents.CHUNK_BYTES, 128])
def test_inside_the_step_failures_are_told_by_block(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extents, "CHUNK_BYTES", chunk_bytes)
    spoiler = Spoiler(monkeypatch, inline)
    optimizer = build("SOAP", RuntimeConfig(refresh="sync", start="eigh"), [(4, 4)] * 5)
    train(optimizer, range(PERIOD))
    before, first = bases_of(optimizer), versions(optimizer)
    spoiler.spoils = lambda factor: factor[:, 0, 0] == factor[:, 0, 0].max()
    with pytest.warns(RuntimeWarning, match="no basis on the device"):
        train(optimizer, range(PERIOD, 2 * PERIOD))
    after, stats = bases_of(optimizer), optimizer.stats()
    kept = {key for key in before if same_bits(after[key], before[key])}
    assert stats.failures == {"no basis on the device": len(kept)}
    assert 0 < len(kept) < len(before)
    assert stats.installs == stats.refreshes - len(kept)
    for place, (now, then) in enumerate(zip(versions(optimizer), first, strict=True)):
        assert (now == then) == (kept >= {f"{place}.basis_0", f"{place}.basis_1"})
