"""A gradient with inf or nan never reaches a factor, a moment or a weight."""

import pytest
import torch
from torch import Tensor, nn

from asteria import SOAP, GradientError, NonFiniteGradientError, RuntimeConfig
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
def test_large_gradients_pass(arm: Arm) -> None:
    params = parameters([(300,), (8, 4)])
    optimizer = arm(params)
    for p in params:
        p.grad = torch.full(p.shape, 1e17)
    before = weights(params)
    optimizer.step()
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], before["0"])
    assert not torch.equal(params[1], before["1"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_arms
def test_gradients_whose_squares_overflow_are_refused(arm: Arm, dtype: torch.dtype) -> None:
    """They would make second moments and factors infinite for good."""
    params = parameters(SMALL, dtype)
    optimizer = arm(params)
    train(optimizer, range(3))
    before = everything(optimizer)
    set_gradients(params, 3)
    params[2].grad[0, 0] = 1e25  # type: ignore[index]
    with pytest.raises(NonFiniteGradientError, match="too large to be squared"):
        optimizer.step()
    assert_same_bits(everything(optimizer), before)


def test_float16_gradients_are_judged_in_float32() -> None:
    params = parameters([(30, 30)], torch.float16)
    optimizer = SOAP(params)
    params[0].grad = torch.full((30, 30), 6e4, dtype=torch.float16)
    optimizer.step()
    assert optimizer.stats().skipped_steps == 0
