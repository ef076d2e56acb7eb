"""Where state lives never changes a bit of what is computed."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from asteria import RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime import claims
from asteria.store.cell import Home
from tests.support.arms import OPTIMIZERS, over_optimizers
from tests.support.execution import ManualExecutor, directed
from tests.support.tiers import (
    ARRANGEMENTS,
    Arrangement,
    Stores,
    arranged,
    homes,
    limit_extents,
)
from tests.support.training import (
    Bits,
    Shape,
    assert_same_bits,
    everything,
    gradient,
    parameters,
)

STEPS, FEWER_STEPS = 50, 30
SHAPES: list[Shape] = [(12, 4), (5,), (4, 4), (4, 8), (3, 2, 4), (12, 4), (4, 8), (4, 4), (4, 8)]
"""Wide ones, whose factors can wait for contributions, and others."""
NOTE_BYTES = 192
"""What the largest of them notes for its factors in a step."""
EXTENT_BYTES = 2048
"""One block of the first shape, two of (4, 8), more of the others."""


@pytest.fixture(autouse=True)
def small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_extents(monkeypatch, EXTENT_BYTES)
    monkeypatch.setattr(claims, "_GAIN", 10.0)  # blocks so small are nearly square


def _nothing(optimizer: SecondOrderOptimizer, step: int) -> None:
    """Happens between two steps."""


@dataclass
class Case:
    """A run of some parameters, and what happens between its steps."""

    options: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    shapes: list[Shape] = field(default_factory=lambda: SHAPES)
    dtype: torch.dtype = torch.float32
    between: Callable[[SecondOrderOptimizer, int], None] = _nothing
    present: Callable[[int, int], bool] = lambda step, index: True

    def build(self, name: str) -> SecondOrderOptimizer:
        given = {"precondition_frequency": 3, "shampoo_beta": 0.5, "lr": 2.0**-6} | self.options
        runtime = RuntimeConfig(**self.runtime)
        params = parameters(self.shapes, self.dtype)
        return OPTIMIZERS[name](params, runtime=runtime, **given)

    def train(self, optimizer: SecondOrderOptimizer, steps: range) -> None:
        for step in steps:
            self.between(optimizer, step)
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for index, p in enumerate(params):
                if p.requires_grad and self.present(step, index):
                    p.grad = gradient(tuple(p.shape), p.dtype, step, index)
                else:
                    p.grad = None
            optimizer.step()


def all_of(optimizer: SecondOrderOptimizer) -> Bits:
    """Weights, state as it is shown, and state as it is saved, with what is in flight."""
    state = optimizer.state_dict()["state"]
    flat = {f"saved {p}.{k}": t.clone() for p, entries in state.items() for k, t in entries.items()}
    return everything(optimizer) | flat


def on_the_device(case: Case, name: str, steps: int = STEPS) -> Bits:
    optimizer = directed(case.build(name), ManualExecutor())
    case.train(optimizer, range(steps))
    return all_of(optimizer)


def elsewhere(
    case: Case, name: str, arrangement: Arrangement, steps: int = STEPS
) -> tuple[SecondOrderOptimizer, Stores]:
    optimizer = case.build(name)
    stores = arranged(optimizer, arrangement)
    case.train(optimizer, range(steps))
    return optimizer, stores


def add_a_group(optimizer: SecondOrderOptimizer, step: int) -> None:
    if step == 20:
        optimizer.add_param_group({"params": parameters([(12, 4), (4, 4), (5,)], seed=1)})


def freeze_and_unfreeze(optimizer: SecondOrderOptimizer, step: int) -> None:
    params = optimizer.param_groups[0]["params"]
    params[0].requires_grad_(not 10 <= step < 17)
    params[2].requires_grad_(step >= 8)


def replace_state(optimizer: SecondOrderOptimizer, step: int) -> None:
    """What others may do to the state: forget some of it, and put a tensor in."""
    params = optimizer.param_groups[0]["params"]
    if step == 15:
        del optimizer.state[params[0]]
    if step == 22:
        optimizer.state[params[3]]["exp_avg"] = torch.ones(params[3].shape)


CASES = {
    "defaults": Case(),
    "period 1": Case({"precondition_frequency": 1}),
    "period 10": Case({"precondition_frequency": 10}),
    "synchronous": Case(runtime={"refresh": "sync"}),
    "no staleness": Case(runtime={"staleness": 0}),
    "staleness 5": Case(runtime={"staleness": 5}),
    "eigh": Case(runtime={"start": "eigh", "refresh_method": "eigh"}),
    "adam": Case(runtime={"start": "adam"}),
    "ldlr": Case(runtime={"refresh_method": "ldlr"}),
    "narrow bases": Case(runtime={"state_dtype": torch.bfloat16}),
    "packed factors": Case(runtime={"factors": "packed"}),
    "slow factors": Case({"shampoo_beta": 0.95, "precondition_frequency": 10}),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float64": Case(dtype=torch.float64),
    "experts": Case(shapes=[(4, 12, 4), (5,), (3, 12, 4), (3, 4, 8)]),
    "one-sided": Case({"max_precond_dim": 4}, shapes=[(12, 4), (4, 12), (5,), *[(12, 4)] * 30]),
    "blocks": Case(
        {"max_precond_dim": 4, "large_dims": "blocks"}, shapes=[(13, 4), (4, 9), *[(29, 4)] * 4]
    ),
    "absent": Case(present=lambda step, index: (step + index) % 3 != 0),
    "added": Case(between=add_a_group),
    "unfrozen": Case(between=freeze_and_unfreeze),
    "replaced": Case(between=replace_state),
    "maximize": Case({"maximize": True, "weight_decay": 0.1}),
}


EVERYWHERE = {
    "disk": {Home.NVME},
    "some on disk": {Home.DEVICE, Home.NVME},
    "pinned": {Home.PINNED},
    "some pinned": {Home.DEVICE, Home.PINNED},
    "pinned and disk": {Home.PINNED, Home.NVME},
    "all three": {Home.DEVICE, Home.PINNED, Home.NVME},
    "disk behind a device": {Home.NVME},
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@over_optimizers
def test_state_may_live_anywhere(name: str, arrangement: str) -> None:
    case = CASES["defaults"]
    optimizer, stores = elsewhere(case, name, ARRANGEMENTS[arrangement])
    assert homes(optimizer) == EVERYWHERE[arrangement]
    assert any(extent.ledger is not None for extent in optimizer._engine._all())
    assert stores.workers.waited_for, "refreshes begin as late as they may"
    assert_same_bits(all_of(optimizer), on_the_device(case, name))


def _settings() -> Iterator[Any]:
    """Every case with every optimizer, over the host's tiers and a device's in turn."""
    for number, (case, name) in enumerate(itertools.product(CASES, OPTIMIZERS)):
        arrangement = ("some on disk", "all three")[number % 2]
        yield case, name, arrangement


@pytest.mark.parametrize(("case", "name", "arrangement"), list(_settings()))
def test_every_setting_gives_the_same_bits(case: str, name: str, arrangement: str) -> None:
    optimizer, _ = elsewhere(CASES[case], name, ARRANGEMENTS[arrangement], FEWER_STEPS)
    assert homes(optimizer) - {Home.DEVICE}
    assert_same_bits(all_of(optimizer), on_the_device(CASES[case], name, FEWER_STEPS))


ROTATED: dict[str, Any] = {"factors": "rotated"}
TURNING = {
    "defaults": Case(runtime=ROTATED),
    "period 1": Case({"precondition_frequency": 1}, ROTATED),
    "period 5": Case({"precondition_frequency": 5}, {"staleness": 3, **ROTATED}),
    "staleness 5": Case({"precondition_frequency": 1}, {"staleness": 5, **ROTATED}),
    "synchronous": Case({"precondition_frequency": 1}, {"refresh": "sync", **ROTATED}),
    "adam": Case(runtime={"start": "adam", **ROTATED}),
    "on the device": Case(runtime={"refresh_on": "device", **ROTATED}),
    "one-sided": Case(
        {"max_precond_dim": 4}, ROTATED, shapes=[(12, 4), (4, 12), (5,), *[(12, 4)] * 30]
    ),
    "blocks": Case(
        {"max_precond_dim": 4, "large_dims": "blocks"}, ROTATED, shapes=[(13, 4), (4, 9), (29, 4)]
    ),
    "absent": Case(runtime=ROTATED, present=lambda step, index: (step + index) % 3 != 0),
    "added": Case(runtime=ROTATED, between=add_a_group),
}


def _turning() -> Iterator[Any]:
    """Every case over the tiers in turn; one over all of them."""
    places = "disk", "some on disk", "all three"
    for number, case in enumerate(TURNING):
        for place in places if case == "period 5" else places[number % 3 : number % 3 + 1]:
            yield case, place


@pytest.mark.parametrize(("case", "arrangement"), list(_turning()))
def test_factors_that_turn_have_the_same_bits(case: str, arrangement: str) -> None:
    """What waits for them was made in the coordinates of its step, and is folded before they do."""
    optimizer, _ = elsewhere(TURNING[case], "SOAP", ARRANGEMENTS[arrangement], FEWER_STEPS)
    assert homes(optimizer) - {Home.DEVICE}
    assert_same_bits(all_of(optimizer), on_the_device(TURNING[case], "SOAP", FEWER_STEPS))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_budgets_hold_at_every_moment(arrangement: str) -> None:
    place = ARRANGEMENTS[arrangement]
    optimizer, stores = elsewhere(CASES["defaults"], "SOAP", place)
    largest = max(
        sum(cell.nbytes for cell in extent.cells.values()) for extent in optimizer._engine._all()
    )
    peak_bytes = stores.residence.peak_bytes_at
    device_bytes = place.budgets.get("device_budget")
    if place.apart:
        assert peak_bytes["device"] <= max(device_bytes or 0, largest + 2 * NOTE_BYTES)
    else:
        limit = place.budgets["host_budget"] - stores.residence._working_bytes
        assert peak_bytes["device"] <= max(limit, largest + 2 * NOTE_BYTES)
    assert stores.tier.puts == 0 or place.disk


@pytest.mark.parametrize("arrangement", ["pinned and disk", "all three"])
@over_optimizers
def test_pinned_memory_keeps_within_its_budget(name: str, arrangement: str) -> None:
    place = ARRANGEMENTS[arrangement]
    _, stores = elsewhere(CASES["defaults"], name, place, FEWER_STEPS)
    assert stores.residence.peak_bytes_at["pinned"] <= place.budgets["host_budget"]
