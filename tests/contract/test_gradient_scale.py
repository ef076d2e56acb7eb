"""The gradient's scale is immaterial; gradients of zeros, at first or in places, harm nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.arms import ARMS, OPTIMIZERS, RUNTIMES, Arm, over_arms
from tests.support.tolerances import OTHER_SCALE
from tests.support.training import (
    MIXED,
    SMALL,
    Shape,
    assert_near,
    clones,
    everything,
    gradient,
    parameters,
    set_gradients,
    train,
    weights,
)

# Regular first factors: squares, and tensors whose unfoldings have full rank.
SHAPES: list[Shape] = [*SMALL, (), (4, 3, 3), (3, 3, 2, 2)]
KL_ARMS = [arm for arm in ARMS if arm.optimizer is not OPTIMIZERS["SOAP"]]


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e4])
@over_arms
def test_scaled_gradients_give_the_same_run(arm: Arm, scale: float) -> None:
    params, scaled = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    start = weights(params)
    train(arm(params, eps=1e-14), range(10))
    train(arm(scaled, eps=1e-14), range(10), scale=scale)
    assert_near(weights(scaled), weights(params), OTHER_SCALE, torch.float64, start)


@pytest.mark.parametrize("arm", KL_ARMS, ids=lambda arm: arm.name)
def test_published_constant_depends_on_the_scale(arm: Arm) -> None:
    """Which shows that the runs above are long enough to tell."""
    params, scaled = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    start = weights(params)
    train(arm(params, eps=1e-14, init_factor=0.1), range(10))
    train(arm(scaled, eps=1e-14, init_factor=0.1), range(10), scale=1e4)
    with pytest.raises(AssertionError, match="apart"):
        assert_near(weights(scaled), weights(params), OTHER_SCALE, torch.float64, start)


@pytest.mark.parametrize("zeros", [1, 2, 5])
@over_arms
def test_training_works_after_first_gradients_of_zero(arm: Arm, zeros: int) -> None:
    """No weight moves before; then a bowl is descended, by every kind of parameter."""
    params = parameters(MIXED)
    start, targets = weights(params), [torch.zeros_like(p) for p in params]
    optimizer = arm(params, lr=0.05, weight_decay=0.0)
    for _ in range(zeros):
        set_gradients(params, 0, scale=0.0)
        optimizer.step()
    for key, weight in weights(params).items():
        assert torch.equal(weight, start[key])
    assert all(value.isfinite().all() for value in everything(optimizer).values())
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = sum((p - t).square().sum() for p, t in zip(params, targets, strict=True))
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@over_arms
def test_gradients_of_zero_in_mid_training(arm: Arm) -> None:
    """Momentum carries on; nothing becomes infinite, however long it takes."""
    params = parameters(MIXED)
    optimizer = arm(params)
    train(optimizer, range(4))
    train(optimizer, range(4, 40), scale=0.0)
    train(optimizer, range(40, 44))
    assert all(value.isfinite().all() for value in everything(optimizer).values())


@over_arms
def test_one_block_of_a_stack_that_starts_with_zeros(arm: Arm) -> None:
    """Blocks move through the products together, and are none of each other's business."""
    live, idle = parameters([(4, 4), (4, 4)], torch.float64)
    (alone,) = clones([live])
    together, twin = arm([live, idle]), arm([alone])
    for step in range(8):
        for p in (live, alone):
            p.grad = gradient((4, 4), p.dtype, step, 0)
        idle.grad = gradient((4, 4), idle.dtype, step, 1) * (step >= 4)
        together.step()
        twin.step()
    torch.testing.assert_close(live, alone, rtol=1e-9, atol=1e-12)
    assert idle.isfinite().all()


def touched_rows(count: int) -> Callable[[int, torch.Generator], Tensor]:
    """Gradients like an embedding's: a few rows of 16, others in the next step."""

    def make(step: int, generator: torch.Generator) -> Tensor:
        grad = torch.zeros(16, 8)
        rows = (3 * torch.arange(count) + 5 * step) % 16
        grad[rows] = torch.randn(count, 8, generator=generator)
        return grad

    return make


def of_rank(rank: int) -> Callable[[int, torch.Generator], Tensor]:
    def make(step: int, generator: torch.Generator) -> Tensor:
        left, right = torch.randn(16, rank, generator=generator), torch.randn(rank, 8)
        return left @ right

    return make


SINGULAR = {
    "one row": touched_rows(1),
    "three rows": touched_rows(3),
    "rank one": of_rank(1),
    "rank two": of_rank(2),
}
LARGEST_UPDATE = 300.0
"""In learning rates. Adam's own bound is (1 - beta1) / sqrt(1 - beta2), below one here."""


@pytest.mark.parametrize("starts_with_zeros", [False, True])
@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_singular_factors_make_no_giant_update(
    name: str, kind: str, starts_with_zeros: bool
) -> None:
    """A moment must not be turned into a direction whose second moment has seen nothing."""
    p = nn.Parameter(torch.zeros(16, 8))
    arm = Arm(name, OPTIMIZERS[name], RUNTIMES["default"])
    optimizer = arm([p], lr=1.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        p.grad = SINGULAR[kind](step, generator) * (step > 0 or not starts_with_zeros)
        before = p.detach().clone()
        optimizer.step()
        assert (p.detach() - before).abs().max() < LARGEST_UPDATE
