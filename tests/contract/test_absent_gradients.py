"""Parameters that have no gradient: never, not yet, not any more, or now and then."""

from collections.abc import Callable

import pytest
import torch

from tests.support.arms import Arm, over_alone_arms, over_arms
from tests.support.tolerances import SAME_MATH
from tests.support.training import (
    SMALL,
    assert_near,
    assert_same_bits,
    clones,
    everything,
    gradient,
    parameters,
    same_bits,
    weights,
)

STEPS = 12
PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "unfrozen later": lambda index, step: index % 2 == 0 or step >= 5,
    "frozen later": lambda index, step: index % 2 == 0 or step < 5,
    "now and then": lambda index, step: (step + index) % 3 > 0,
    "one at a time": lambda index, step: step % 6 == index,
    "last ones first": lambda index, step: step >= 6 - index,
}
"""Whether parameter ``index`` has a gradient at ``step``."""


def give(params: list[torch.nn.Parameter], step: int, present: Callable[[int, int], bool]) -> None:
    for index, p in enumerate(params):
        there = present(index, step)
        p.grad = gradient(tuple(p.shape), p.dtype, step, index) if there else None


@over_arms
def test_without_a_gradient_a_parameter_is_untouched(arm: Arm) -> None:
    params = parameters()
    params[1].requires_grad_(requires_grad=False)
    start = weights(params)
    optimizer = arm(params, weight_decay=0.5)
    for step in range(5):
        give(params, step, lambda index, _: index == 0)
        optimizer.step()
    assert not same_bits(params[0], start["0"])
    assert_same_bits(weights(params[1:]), {str(i): start[str(i + 1)] for i in range(2)})
    assert list(optimizer.state) == params[:1]
    assert list(optimizer.state_dict()["state"]) == [0]


@pytest.mark.parametrize("pattern", PATTERNS)
@over_alone_arms
def test_each_parameter_lives_through_its_own_gradients_only(arm: Arm, pattern: str) -> None:
    """Steps without a gradient do not exist for a parameter, and the others do not notice.

    Frozen and later unfrozen parameters begin like new ones.
    """
    present = PATTERNS[pattern]
    params = parameters(SMALL * 2, torch.float64)
    start, alone = weights(params), clones(params)
    optimizer = arm(params)
    for step in range(STEPS):
        give(params, step, present)
        optimizer.step()
    for index, p in enumerate(alone):
        apart = arm([p])
        for step in range(STEPS):
            if present(index, step):
                p.grad = gradient(tuple(p.shape), p.dtype, step, index)
                apart.step()
        counted = optimizer.state[params[index]]["step"]
        assert counted == apart.state[p]["step"] > 0
    assert_near(weights(params), weights(alone), SAME_MATH, torch.float64, start)


@over_arms
def test_requires_grad_switched_on_and_off(arm: Arm) -> None:
    """With gradients made by autograd, as in fine-tuning."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    x = torch.linspace(-1, 1, 32).view(8, 4)
    optimizer = arm(model.parameters())

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model[1].requires_grad_(requires_grad=False)
    start = weights(model[1].parameters())
    run(3)
    assert_same_bits(weights(model[1].parameters()), start)
    assert len(optimizer.state) == 2
    model[1].requires_grad_(requires_grad=True)
    model[0].requires_grad_(requires_grad=False)
    frozen = weights(model[0].parameters())
    run(3)
    assert_same_bits(weights(model[0].parameters()), frozen)
    assert not same_bits(model[1].weight, start["0"])
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("pattern", ["unfrozen later", "last ones first"])
@over_arms
def test_order_of_arrival_leaves_no_trace(arm: Arm, pattern: str) -> None:
    """State is stacked by the parameters' order, so a resumed run stacks it alike."""
    optimizer = arm(parameters(SMALL * 2))
    params = optimizer.param_groups[0]["params"]
    for step in range(7):
        give(params, step, PATTERNS[pattern])
        optimizer.step()
    resumed = arm(clones(params))
    resumed.load_state_dict(optimizer.state_dict())
    for one in (optimizer, resumed):
        by_index = [one.state[p]["exp_avg"] for p in one.param_groups[0]["params"] if p.dim() > 1]
        places = [moment.data_ptr() for moment in by_index]
        assert places == sorted(places)
    for step in range(7, 14):
        for one in (optimizer, resumed):
            give(one.param_groups[0]["params"], step, lambda index, step: True)
            one.step()
    assert_same_bits(everything(resumed), everything(optimizer))
