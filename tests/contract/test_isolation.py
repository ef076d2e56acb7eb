"""A run depends on its own inputs only, and leaves the process as it found it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from tests.support.arms import ARMS, Arm, over_all_arms, over_arms
from tests.support.training import (
    MIXED,
    assert_same_bits,
    clones,
    everything,
    parameters,
    set_gradients,
    train,
    weights,
)


@over_all_arms
def test_same_seed_same_bits(arm: Arm) -> None:
    """A module trained twice from the same seed, gradients by autograd."""
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 3))
        optimizer = arm(model.parameters())
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.randn(4, 2, 5, 5)).square().mean().backward()
            optimizer.step()
        runs.append(everything(optimizer))
    assert_same_bits(*runs)


@pytest.mark.parametrize("other", ARMS, ids=lambda arm: arm.name)
@over_arms
def test_two_optimizers_do_not_disturb_each_other(arm: Arm, other: Arm) -> None:
    alone, beside = arm(parameters(MIXED)), arm(parameters(MIXED))
    neighbour = other(parameters(MIXED, seed=1))
    for step in range(6):
        train(alone, [step])
    for step in range(6):
        train(neighbour, [step + 50])
        train(beside, [step])
    assert_same_bits(everything(beside), everything(alone))


@over_arms
def test_two_optimizers_may_share_a_module(arm: Arm) -> None:
    params = parameters(MIXED)
    front, back = arm(params[:4]), arm(params[4:])
    front_apart, back_apart = clones(params[:4]), clones(params[4:])
    for step in range(6):
        train(front, [step])
        train(back, [step])
    train(arm(front_apart), range(6))
    train(arm(back_apart), range(6))
    assert_same_bits(weights(params), weights([*front_apart, *back_apart]))


def settings() -> tuple[object, ...]:
    return (
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_inference_mode_enabled(),
    )


@over_all_arms
def test_global_settings_are_left_alone(arm: Arm) -> None:
    before = settings()
    optimizer = arm(parameters(MIXED, torch.bfloat16), stochastic_rounding=True)
    train(optimizer, range(5))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, range(2))
    assert settings() == before


def default_dtype() -> None:
    torch.set_default_dtype(torch.float64)


def default_device() -> None:
    torch.set_default_device("meta")


def deterministic() -> None:
    torch.use_deterministic_algorithms(mode=True)


def precision() -> None:
    torch.set_float32_matmul_precision("high")


def seed() -> None:
    torch.manual_seed(1234)


CHANGES: list[Callable[[], None]] = [default_dtype, default_device, deterministic, precision, seed]


@pytest.fixture
def settings_restored() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(mode=False)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("settings_restored")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@over_arms
def test_global_settings_make_no_difference(arm: Arm, change: Callable[[], None]) -> None:
    """A default device in particular is for new modules, not for an optimizer's temporaries."""
    expected = arm(parameters(MIXED, torch.bfloat16), stochastic_rounding=True)
    train(expected, range(5))
    params = parameters(MIXED, torch.bfloat16)
    optimizer = arm(params, stochastic_rounding=True)
    grads = []
    for step in range(5):
        set_gradients(params, step)
        grads.append([p.grad for p in params])
    change()
    for step in range(5):
        for p, grad in zip(params, grads[step], strict=True):
            p.grad = grad
        optimizer.step()
    devices = {t.device.type for entries in optimizer.state.values() for t in entries.values()}
    assert devices == {"cpu"}
    torch.set_default_device(None)
    assert_same_bits(everything(optimizer), everything(expected))


@over_arms
def test_state_is_outside_of_autograd(arm: Arm) -> None:
    optimizer = arm(parameters(MIXED))
    with torch.enable_grad():
        train(optimizer, range(4))
    params = optimizer.param_groups[0]["params"]
    assert all(p.requires_grad and p.is_leaf for p in params)
    for entries in optimizer.state.values():
        assert not any(t.requires_grad for t in entries.values())


@over_arms
def test_parameters_used_in_a_graph_notice_the_step(arm: Arm) -> None:
    """An update bumps the version, so autograd refuses a stale backward as with any optimizer."""
    (p,) = parameters([(4, 4)])
    optimizer = arm([p])
    train(optimizer, range(2))
    loss = (p * p).sum()
    train(optimizer, [2])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
