"""From any tier to any tier: saved, loaded, copied and pickled in the middle of everything."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from asteria import CheckpointError, RuntimeConfig, StoreFullError
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.store.cell import Home
from tests.contract.test_state_on_tiers import CASES, EXTENT_BYTES, all_of, elsewhere, on_the_device
from tests.support.arms import OPTIMIZERS, PERIOD, over_optimizers
from tests.support.asynchronous import flying
from tests.support.execution import ManualExecutor, directed
from tests.support.tiers import ARRANGEMENTS, arranged, homes, limit_extents
from tests.support.training import assert_same_bits, clones, everything

CASE = CASES["defaults"]
MIDDLE, END = 21, 34
PLACES = ["device", "some on disk", "some pinned", "all three"]


@pytest.fixture(autouse=True)
def small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_extents(monkeypatch, EXTENT_BYTES)


def trained(name: str, place: str, steps: int = MIDDLE) -> SecondOrderOptimizer:
    if place == "device":
        optimizer = directed(CASE.build(name), ManualExecutor())
        CASE.train(optimizer, range(steps))
        return optimizer
    return elsewhere(CASE, name, ARRANGEMENTS[place], steps)[0]


def twin_of(optimizer: SecondOrderOptimizer, place: str) -> SecondOrderOptimizer:
    params = clones(optimizer.param_groups[0]["params"])
    twin = type(optimizer)(params, runtime=RuntimeConfig())
    if place == "device":
        return directed(twin, ManualExecutor())
    arranged(twin, ARRANGEMENTS[place])
    return twin


@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("source", PLACES)
def test_a_state_is_loaded_from_any_tier_to_any_tier(source: str, target: str) -> None:
    optimizer = trained("SOAP", source)
    assert flying(optimizer), "refreshes are part of it"
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = twin_of(optimizer, target)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert (homes(twin) == {Home.DEVICE}) == (target == "device")
    assert_same_bits(all_of(twin), all_of(optimizer))
    CASE.train(twin, range(MIDDLE, END))
    CASE.train(optimizer, range(MIDDLE, END))
    expected = on_the_device(CASE, "SOAP", END)
    assert_same_bits(all_of(twin), expected)
    assert_same_bits(all_of(optimizer), expected)


PAIRS = [(source, target) for source in PLACES for target in PLACES]
WINDOW = range(MIDDLE, MIDDLE + 2 * PERIOD)
"""Two periods, in which every matrix has something in flight at times."""


@pytest.mark.parametrize("turn", range(len(PAIRS)), ids=lambda turn: "->".join(PAIRS[turn]))
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_so_it_is_through_distributed_checkpoints(turn: int, tmp_path: Path) -> None:
    """Optimizers and steps of a window take turns over the pairs of places."""
    (source, target), name = PAIRS[turn], list(OPTIMIZERS)[turn % 3]
    steps = WINDOW[turn * 5 % len(WINDOW)]
    optimizer = trained(name, source, steps)
    twin = twin_of(optimizer, target)
    models = [nn.ParameterList(o.param_groups[0]["params"]) for o in (optimizer, twin)]
    options = StateDictOptions(flatten_optimizer_state_dict=bool(turn % 2))
    saved = get_optimizer_state_dict(models[0], optimizer, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    template = {"optimizer": get_optimizer_state_dict(models[1], twin, options=options)}
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(models[1], twin, template["optimizer"], options=options)
    models[1].load_state_dict(models[0].state_dict())  # a first step may have moved them
    assert_same_bits(all_of(twin), all_of(optimizer))
    for each in (twin, optimizer):
        CASE.train(each, range(steps, END))
    assert_same_bits(all_of(twin), all_of(optimizer))
    assert_same_bits(all_of(optimizer), on_the_device(CASE, name, END))


def test_a_state_may_be_loaded_where_it_came_from() -> None:
    optimizer = trained("SOAP", "all three")
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    CASE.train(optimizer, range(MIDDLE, END))
    assert_same_bits(all_of(optimizer), on_the_device(CASE, "SOAP", END))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("way", COPIES)
@over_optimizers
def test_a_copy_has_a_disk_folder_of_its_own(name: str, way: str, tmp_path: Path) -> None:
    case = CASES["defaults"]
    optimizer = case.build(name)
    runtime = RuntimeConfig(host_budget=0, nvme_path=tmp_path)
    original = type(optimizer)(
        optimizer.param_groups[0]["params"],
        precondition_frequency=3,
        shampoo_beta=0.5,
        lr=2.0**-6,
        runtime=runtime,
    )
    case.train(original, range(MIDDLE))
    twin = COPIES[way](original)
    assert len(list(tmp_path.iterdir())) == 2
    assert homes(twin) == homes(original) == {Home.NVME}
    assert_same_bits(all_of(twin), all_of(original))
    case.train(original, range(MIDDLE, END))
    case.train(twin, range(MIDDLE, END))
    expected = on_the_device(case, name, END)
    for one in (original, twin):
        assert_same_bits(all_of(one), expected)
        one.close()


def test_what_is_saved_does_not_change_afterwards() -> None:
    optimizer = trained("SOAP", "some on disk")
    saved = copy.deepcopy(optimizer.state_dict())
    state = optimizer.state_dict()["state"]
    away = {
        (p, key)
        for p, entries in enumerate(optimizer.state.values())
        for key in entries
        if entries.is_away(key)  # type: ignore[attr-defined]
    }
    assert away
    CASE.train(optimizer, range(MIDDLE, END))
    for p, key in away:
        assert torch.equal(state[p][key], saved["state"][p][key])


def test_a_load_that_finds_no_room_in_the_middle_is_told_of_until_one_succeeds() -> None:
    """The old state has made room by then: to go on with neither would be to begin afresh."""
    optimizer = trained("SOAP", "some on disk")
    saved, weights = trained("SOAP", "device").state_dict(), everything(optimizer)
    near = optimizer._engine._residence._host
    allocate = near._allocate

    def refuse(nbytes: int) -> torch.Tensor:
        raise StoreFullError(f"{nbytes} bytes")

    near._allocate = refuse
    with pytest.raises(StoreFullError):
        optimizer.load_state_dict(saved)
    near._allocate = allocate
    uses: list[Callable[[], object]] = [
        lambda: CASE.train(optimizer, range(MIDDLE, MIDDLE + 1)),
        optimizer.state_dict,
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dumps(optimizer),
    ]
    for use in uses:
        with pytest.raises(CheckpointError, match=r"StoreFullError.*load_state_dict again"):
            use()
    for index, p in enumerate(optimizer.param_groups[0]["params"]):
        assert torch.equal(p, weights[f"{index}"])
    optimizer.load_state_dict(saved)
    CASE.train(optimizer, range(MIDDLE, END))
    assert_same_bits(all_of(optimizer), on_the_device(CASE, "SOAP", END))


def test_a_load_that_is_refused_leaves_the_old_state() -> None:
    optimizer = trained("SOAP", "some on disk")
    before = all_of(optimizer)
    saved = trained("SOAP", "device").state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        optimizer.load_state_dict(saved)
    assert_same_bits(all_of(optimizer), before)
    CASE.train(optimizer, range(MIDDLE, END))
