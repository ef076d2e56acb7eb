"""A step that a disk has interrupted: the next call completes it, as if nothing had happened."""

from collections.abc import Iterator
from typing import Any

import pytest

from asteria import StoreError
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.contract.test_state_on_tiers import CASES, EXTENT_BYTES, Case, all_of, on_the_device
from tests.support.arms import OPTIMIZERS
from tests.support.tiers import ARRANGEMENTS, FaultyTier, arranged, limit_extents
from tests.support.training import assert_same_bits

STEPS = 20


@pytest.fixture(autouse=True)
def small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_extents(monkeypatch, EXTENT_BYTES)


def finished(
    case: Case, name: str, place: str, tier: FaultyTier
) -> tuple[SecondOrderOptimizer, int]:
    """A run that calls step() again after an error, and how many there were."""
    optimizer = case.build(name)
    arranged(optimizer, ARRANGEMENTS[place], tier)
    errors = 0
    for step in range(STEPS):
        for attempt in range(3):
            try:
                case.train(optimizer, range(step, step + 1))
                break
            except StoreError:
                errors += 1
                if attempt == 2:
                    raise
    tier.failing = range(0)
    return optimizer, errors


def _runs() -> Iterator[Any]:
    """Reads fail in turn: each of the first steps, then here and there."""
    for number, (name, place) in enumerate(
        (name, place)
        for name in OPTIMIZERS
        for place in ("disk", "some on disk", "pinned and disk", "disk behind a device")
    ):
        yield pytest.param(name, place, range(number % 7, 400, 37), id=f"{name}-{place}")


@pytest.mark.parametrize(("name", "place", "reads"), list(_runs()))
def test_a_read_that_fails_once_changes_no_bit(name: str, place: str, reads: range) -> None:
    case = CASES["synchronous"]
    expected = on_the_device(case, name, STEPS)
    for read in reads:
        tier = FaultyTier("read", read)
        optimizer, errors = finished(case, name, place, tier)
        assert_same_bits(all_of(optimizer), expected)
        if not tier.failed:
            break
        assert errors <= 1


def test_a_refresh_whose_read_fails_once_is_not_lost() -> None:
    case = CASES["defaults"]
    expected = on_the_device(case, "SOAP", STEPS)
    for read in range(400, 600, 10):
        optimizer, _ = finished(case, "SOAP", "disk", FaultyTier("read", read))
        assert_same_bits(all_of(optimizer), expected)


@pytest.mark.parametrize("fault", ["full", "write"])
@pytest.mark.parametrize("place", ["disk", "disk behind a device"])
def test_a_write_that_fails_once_changes_no_bit(place: str, fault: str) -> None:
    case = CASES["synchronous"]
    expected = on_the_device(case, "SOAP", STEPS)
    for write in range(0, 400, 53):
        optimizer, _ = finished(case, "SOAP", place, FaultyTier(fault, write))
        assert_same_bits(all_of(optimizer), expected)


def interrupted(case: Case, step: int) -> SecondOrderOptimizer:
    """One whose call number ``step`` has done some parameters and not the last."""
    optimizer = case.build("SOAP")
    tier = FaultyTier("read", 0, 0)
    arranged(optimizer, ARRANGEMENTS["disk"], tier)
    case.train(optimizer, range(step))
    for extent in optimizer._engine._all():
        extent.door.flush()
    tier.failing = range(tier.gets + 7, tier.gets + 10_000)
    with pytest.raises(StoreError):
        case.train(optimizer, range(step, step + 1))
    tier.failing = range(0)
    return optimizer


def test_each_parameter_is_as_before_the_step_or_as_after_it() -> None:
    case = CASES["synchronous"]
    optimizer = interrupted(case, 18)
    before, after = on_the_device(case, "SOAP", 18), on_the_device(case, "SOAP", 19)
    moved = 0
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        found = parameter.detach()
        old, new = before[f"{index}"], after[f"{index}"]
        assert found.equal(old) or found.equal(new)
        moved += not found.equal(old)
    assert 0 < moved < len(optimizer.param_groups[0]["params"])


def test_the_next_call_completes_the_step() -> None:
    case = CASES["synchronous"]
    optimizer = interrupted(case, 18)
    case.train(optimizer, range(18, 19))
    assert_same_bits(all_of(optimizer), on_the_device(case, "SOAP", 19))


def test_what_was_done_is_not_done_again_together_with_others() -> None:
    """The second call has a gradient that the first had not."""
    case = Case(
        runtime={"refresh": "sync"},
        shapes=[(4, 4), (4, 4), (12, 4), (12, 4), (12, 4)],
        present=lambda step, index: index != 1 or step != 18,
    )
    before = interrupted(case, 18)
    parameter = before.param_groups[0]["params"][0]
    done = parameter.detach().clone()
    assert int(before.state[parameter]["step"]) == 18, "its step is complete"
    Case(shapes=case.shapes).train(before, range(18, 19))
    assert parameter.detach().equal(done), "one call for one gradient"
