"""A gradient with inf or nan never reaches a factor, a moment or a weight."""

import pytest
import torch
from torch import Tensor, nn

from asteria import GradientError, NonFiniteGradientError, RuntimeConfig
from tests.support.arms import PERIOD, Arm, over_arms
from tests.support.training import (
    MIXED,
    SMALL,
    assert_same_bits,
    everything,
    parameters,
    set_gradients,
    train,
    weights,
)

VALUES = [float("nan"), float("inf"), float("-inf")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PLACES = {"scalar": 1, "vector": 2, "matrix": 0, "tensor": 5}
"""Positions in MIXED."""


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{index}", p) for index, p in enumerate(params)]


def spoil(p: Tensor, value: float) -> None:
    """Put ``value`` into the last element of the gradient."""
    assert p.grad is not None
    p.grad[tuple(size - 1 for size in p.shape)] = value


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("place", PLACES)
@over_arms
def test_raises_by_name_and_changes_nothing(arm: Arm, place: str, value: float) -> None:
    params, undisturbed = parameters(MIXED), parameters(MIXED)
    optimizer, twin = arm(named(params)), arm(undisturbed)
    for step in range(PERIOD + 1):
        set_gradients(params, step)
        spoil(params[PLACES[place]], value)
        before = everything(optimizer)
        with pytest.raises(NonFiniteGradientError, match=rf"layer\.{PLACES[place]}\b") as caught:
            optimizer.step()
        assert isinstance(caught.value, GradientError)
        assert isinstance(caught.value, RuntimeError)
        assert_same_bits(everything(optimizer), before)
        train(optimizer, [step])
        train(twin, [step])
    assert_same_bits(everything(optimizer), everything(twin))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_arms
def test_skip_counts_and_goes_on(arm: Arm, dtype: torch.dtype) -> None:
    runtime = RuntimeConfig(
        nonfinite="skip", start=arm.runtime.start, refresh_method=arm.runtime.refresh_method
    )
    params, undisturbed = parameters(SMALL, dtype), parameters(SMALL, dtype)
    optimizer, twin = arm(params, runtime=runtime), arm(undisturbed, runtime=runtime)
    skipped = 0
    for step in range(8):
        if step in (0, 3, 4):
            set_gradients(params, step, scale=float("inf"))
            before = everything(optimizer)
            assert optimizer.step() is None
            assert_same_bits(everything(optimizer), before)
            skipped += 1
            assert optimizer.stats().skipped_steps == skipped
        train(optimizer, [step])
        train(twin, [step])
    assert_same_bits(everything(optimizer), everything(twin))
    assert optimizer.stats().steps == 8 + skipped
    assert twin.stats().skipped_steps == 0


@over_arms
def test_error_lists_the_first_few_of_many(arm: Arm) -> None:
    params = parameters([(2, 2)] * 8)
    optimizer = arm(named(params))
    set_gradients(params, 0, scale=float("nan"))
    with pytest.raises(NonFiniteGradientError, match=r"layer\.0, .*layer\.4 and 3 more") as caught:
        optimizer.step()
    assert "layer.5" not in str(caught.value)
    assert not optimizer.state


@over_arms
def test_large_finite_gradients_pass(arm: Arm) -> None:
    """Their sum of squares may overflow; that is no reason to call them infinite."""
    params = parameters([(300,)])
    optimizer = arm(params)
    params[0].grad = torch.full((300,), 1e19)
    before = weights(params)
    optimizer.step()
    optimizer.step()
    assert params[0].isfinite().all()
    assert not torch.equal(params[0], before["0"])
