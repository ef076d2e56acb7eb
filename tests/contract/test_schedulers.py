"""Every learning-rate scheduler of torch drives the optimizers as it drives torch's own."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

from tests.support.arms import LR, Arm, over_arms
from tests.support.training import Shape, assert_same_bits, clones, everything, parameters, train

STEPS = 8
MIDDLE = 4
SHAPES: list[Shape] = [(3, 3), (3, 3)]
BETAS = (0.9, 0.95)

Make = Callable[[torch.optim.Optimizer], Any]

SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.25, total_iters=4),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, total_iters=7, power=2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, T_max=8),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=3),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "CyclicLR": lambda o: schedules.CyclicLR(o, LR / 8, LR, step_size_up=3),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=2 * LR, total_steps=12),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o,
        [schedules.LinearLR(o, 0.1, total_iters=3), schedules.CosineAnnealingLR(o, T_max=6)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, total_iters=3), schedules.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=LR / 4, anneal_epochs=5),
}
NOT_SCHEDULERS = {"LRScheduler"}


def advance(scheduler: Any, step: int) -> None:
    """One scheduler step, with a metric that stagnates where one is asked for."""
    if isinstance(scheduler, schedules.ReduceLROnPlateau):
        scheduler.step(1.0 if step > 0 else 2.0)
    else:
        scheduler.step()


def plan(make: Make, optimizer: torch.optim.Optimizer) -> list[list[tuple[Any, Any]]]:
    """(lr, betas) of every group at every step; the optimizer itself does not matter."""
    scheduler = make(optimizer)
    planned = []
    for step in range(STEPS):
        planned.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
        optimizer.step()
        advance(scheduler, step)
    return planned


def two_groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    betas = {"betas": BETAS}
    return [{"params": params[:1], **betas}, {"params": params[1:], "lr": LR / 2, **betas}]


def test_the_table_is_complete() -> None:
    assert set(schedules.__all__) - NOT_SCHEDULERS <= SCHEDULERS.keys()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@over_arms
def test_scheduler_drives_the_update(arm: Arm, scheduler: str) -> None:
    """The run is, bit by bit, one whose groups are written by hand with AdamW's schedule."""
    make = SCHEDULERS[scheduler]
    adamw = torch.optim.AdamW(two_groups(parameters(SHAPES)), lr=LR, betas=BETAS)
    planned = plan(make, adamw)
    scheduled, by_hand = arm(two_groups(parameters(SHAPES))), arm(two_groups(parameters(SHAPES)))
    running = make(scheduled)
    for step, settings in enumerate(planned):
        for group, (lr, betas) in zip(by_hand.param_groups, settings, strict=True):
            group.update(lr=lr, betas=betas)
        for optimizer in (scheduled, by_hand):
            train(optimizer, [step])
        advance(running, step)
    assert_same_bits(everything(scheduled), everything(by_hand))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@over_arms
def test_scheduler_resumes_with_the_optimizer(arm: Arm, scheduler: str) -> None:
    make = SCHEDULERS[scheduler]
    optimizer = arm(two_groups(parameters(SHAPES)))
    running = make(optimizer)
    for step in range(MIDDLE):
        train(optimizer, [step])
        advance(running, step)
    saved = copy.deepcopy((optimizer.state_dict(), running.state_dict()))

    resumed = arm(two_groups(clones(p for g in optimizer.param_groups for p in g["params"])))
    continued = make(resumed)
    resumed.load_state_dict(saved[0])
    continued.load_state_dict(saved[1])
    for pair in ((optimizer, running), (resumed, continued)):
        for step in range(MIDDLE, STEPS):
            train(pair[0], [step])
            advance(pair[1], step)
    assert_same_bits(everything(resumed), everything(optimizer))
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]


@over_arms
def test_cycled_betas_reach_the_moments(arm: Arm) -> None:
    """OneCycleLR writes betas into the groups: another momentum must give other weights."""
    make = SCHEDULERS["OneCycleLR"]
    cycled, constant = arm(parameters(SHAPES)), arm(parameters(SHAPES))
    running = [make(cycled), schedules.OneCycleLR(constant, 2 * LR, 12, cycle_momentum=False)]
    betas = set()
    for step in range(STEPS):
        for optimizer, scheduler in zip((cycled, constant), running, strict=True):
            betas.add(optimizer.param_groups[0]["betas"])
            train(optimizer, [step])
            scheduler.step()
    assert len(betas) > STEPS / 2
    moved, still = everything(cycled), everything(constant)
    assert not torch.equal(moved["0"], still["0"])


@over_arms
def test_schedule_of_a_learning_rate_tensor(arm: Arm) -> None:
    """A scheduler writes into the tensor; the optimizer reads it at every step."""
    with_tensor, with_float = arm(parameters(SHAPES), lr=torch.tensor(LR)), arm(parameters(SHAPES))
    lr = with_tensor.param_groups[0]["lr"]
    running = [schedules.StepLR(o, 2, 0.5) for o in (with_tensor, with_float)]
    for step in range(STEPS):
        for optimizer, scheduler in zip((with_tensor, with_float), running, strict=True):
            train(optimizer, [step])
            scheduler.step()
    assert with_tensor.param_groups[0]["lr"] is lr
    assert float(lr) == with_float.param_groups[0]["lr"] < LR
    assert_same_bits(everything(with_tensor), everything(with_float))


@over_arms
def test_schedule_that_computes_in_numpy(arm: Arm) -> None:
    """A schedule may hand over numpy's numbers, of either precision."""
    narrow, plain = arm(parameters(SHAPES)), arm(parameters(SHAPES))
    make = {np.float32: narrow, float: plain}
    running = [
        schedules.LambdaLR(o, lambda step, number=number: number(0.5**step))
        for number, o in make.items()
    ]
    for step in range(4):
        for optimizer, scheduler in zip(make.values(), running, strict=True):
            train(optimizer, [step])
            scheduler.step()
    assert_same_bits(everything(narrow), everything(plain))


@over_arms
def test_schedule_that_rounds_below_zero(arm: Arm) -> None:
    """Cosine schedules end a rounding error below zero; that is no reason to stop a run."""
    optimizer = arm(parameters(SHAPES))
    schedules.LambdaLR(optimizer, lambda step: math.cos(math.pi / 2 + 1e-12))
    assert optimizer.param_groups[0]["lr"] < 0
    train(optimizer, range(3))
