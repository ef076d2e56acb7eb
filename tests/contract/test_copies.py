"""Pickling and copying: a copy is an optimizer of its own that goes on to the same bits."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from asteria import NonFiniteGradientError, RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import Arm, over_all_arms, over_arms
from tests.support.training import (
    MIXED,
    assert_same_bits,
    everything,
    parameters,
    set_gradients,
    train,
)

WAYS: dict[str, Callable[[SecondOrderOptimizer], SecondOrderOptimizer]] = {
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": copy.deepcopy,
}
over_ways = pytest.mark.parametrize("way", WAYS)


@over_ways
@over_all_arms
def test_copy_goes_on_to_the_same_bits(arm: Arm, way: str) -> None:
    """From before the first step, and from every step of two periods."""
    optimizer = arm(parameters(MIXED))
    copies = []
    for step in range(7):
        copies.append(WAYS[way](optimizer))
        assert_same_bits(everything(copies[-1]), everything(optimizer))
        train(optimizer, [step])
    train(optimizer, range(7, 10))
    for step, twin in enumerate(copies):
        train(twin, range(step, 10))
        assert_same_bits(everything(twin), everything(optimizer))


@over_ways
@over_arms
def test_copy_is_independent(arm: Arm, way: str) -> None:
    optimizer = arm(parameters())
    train(optimizer, range(4))
    before = everything(optimizer)
    twin = WAYS[way](optimizer)
    twin.param_groups[0]["lr"] *= 2
    train(twin, range(4, 8))
    assert_same_bits(everything(optimizer), before)
    assert optimizer.param_groups[0]["lr"] != twin.param_groups[0]["lr"]


@over_ways
@over_arms
def test_copy_keeps_options_and_runtime(arm: Arm, way: str) -> None:
    runtime = RuntimeConfig(nonfinite="skip", start=arm.runtime.start)
    params = parameters()
    groups = [{"params": params[:1], "eps": 1e-3}, {"params": params[1:], "name": "rest"}]
    optimizer = arm(groups, runtime=runtime)
    train(optimizer, range(2))
    twin = WAYS[way](optimizer)
    for mine, theirs in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"
        }
    assert {"lr", "betas"} <= optimizer.defaults.keys() <= twin.defaults.keys()
    assert str(twin.describe()) == str(optimizer.describe())
    copied = [p for group in twin.param_groups for p in group["params"]]
    set_gradients(copied, 2, scale=float("nan"))
    twin.step()
    assert twin.stats().skipped_steps == 1
    twin.add_param_group({"params": parameters(seed=1)})
    train(twin, range(2))


@over_arms
def test_model_and_optimizer_copied_together_stay_together(arm: Arm) -> None:
    model = nn.Linear(4, 4)
    optimizer = arm(model.named_parameters())
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    model_twin, twin = copy.deepcopy((model, optimizer))
    assert [p is q for p, q in zip(model_twin.parameters(), twin.state, strict=True)] == [True] * 2
    for one, its_optimizer in ((model, optimizer), (model_twin, twin)):
        its_optimizer.zero_grad()
        one(torch.ones(2, 4)).square().sum().backward()
        its_optimizer.step()
    assert_same_bits(everything(twin), everything(optimizer))


@over_ways
@over_arms
def test_copy_of_an_optimizer_with_a_scheduler(arm: Arm, way: str) -> None:
    """Schedulers wrap step(); the copy is free of it and gets a scheduler of its own."""
    optimizer = arm(parameters())
    scheduler = StepLR(optimizer, 2, 0.5)
    train(optimizer, range(3))
    scheduler.step()
    twin = WAYS[way](optimizer)
    train(twin, range(3, 6))
    train(optimizer, range(3, 6))
    assert_same_bits(everything(twin), everything(optimizer))
    its_own = StepLR(twin, 1, 0.5)
    train(twin, [6])
    its_own.step()
    assert twin.param_groups[0]["lr"] < optimizer.param_groups[0]["lr"]


@over_arms
def test_copied_optimizer_loads_and_refuses_like_its_original(arm: Arm) -> None:
    optimizer = arm(parameters())
    train(optimizer, range(3))
    twin = copy.deepcopy(optimizer)
    train(twin, range(3, 5))
    twin.load_state_dict(optimizer.state_dict())
    params = twin.param_groups[0]["params"]
    steps = [[entries["step"] for entries in one.state.values()] for one in (twin, optimizer)]
    assert steps[0] == steps[1]
    set_gradients(params, 5, scale=float("inf"))
    with pytest.raises(NonFiniteGradientError):
        twin.step()
