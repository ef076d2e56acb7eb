"""Stochastic rounding: to a neighbour, right on average, and never worse than that."""

import math

import pytest
import torch
from torch import Tensor

from asteria.linalg.rounding import stochastic_round
from tests.linalg.matrices import generator

MAX_BF16 = torch.finfo(torch.bfloat16).max
SMALLEST = 2.0**-133
"""The smallest positive bfloat16."""


def rounded(x: Tensor, seed: int = 0) -> Tensor:
    return stochastic_round(x, generator(seed)).float()


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 values next to a finite float32, towards zero and away from it."""
    inner = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    outer = ((x.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    return inner, torch.where(inner == x, inner, outer)


def test_only_the_two_neighbours_come_out_and_both_do() -> None:
    x = torch.randn(4000, generator=generator(1)) * torch.logspace(-30, 30, 4000)
    inner, outer = neighbours(x)
    y = rounded(x)
    assert torch.all((y == inner) | (y == outer))
    assert (y == inner).any()
    assert (y == outer).any()


@pytest.mark.parametrize("fraction", [1 / 65536, 1 / 16, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**100])
def test_the_expectation_is_the_value(fraction: float, sign: float, scale: float) -> None:
    count, step = 40_000, 2.0**-7  # of bfloat16 between 1 and 2
    x = torch.full((count,), sign * scale * (1 + fraction * step))
    ups = (rounded(x).double().abs() > scale).double().mean()
    deviation = math.sqrt(fraction * (1 - fraction) / count)
    assert abs(float(ups) - fraction) < 5 * deviation + 1e-9
    assert torch.all(rounded(x).sign() == sign)


def test_updates_below_the_resolution_stay_alive_on_average() -> None:
    weight, noise = torch.ones(2000), generator(3)
    for _ in range(50):
        weight = stochastic_round(weight + 2.0**-12, noise).float()
    assert float(weight.mean()) == pytest.approx(1 + 50 * 2.0**-12, abs=6e-4)


@pytest.mark.parametrize(
    "value",
    [0.0, -0.0, 1.0, -1.0, 0.5, 3.140625, MAX_BF16, -MAX_BF16, SMALLEST, -SMALLEST, 2.0**-126],
)
def test_what_bfloat16_can_hold_stays(value: float) -> None:
    x = torch.full((1000,), value)
    y = rounded(x)
    assert torch.equal(y, x)
    assert torch.equal(y.signbit(), x.signbit())


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinities_stay(value: float) -> None:
    assert torch.equal(rounded(torch.full((1000,), value)), torch.full((1000,), value))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF])
def test_nan_stays_nan_whatever_its_bits(bits: int) -> None:
    x = torch.full((1000,), bits, dtype=torch.int32).view(torch.float32)
    assert torch.isnan(x).all()
    assert torch.isnan(rounded(x)).all()


def test_values_between_zero_and_the_smallest_become_one_of_them() -> None:
    x = torch.full((20_000,), SMALLEST / 4)
    for sign in (1.0, -1.0):
        y = rounded(sign * x)
        assert set(y.abs().tolist()) == {0.0, SMALLEST}
        assert float((y != 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_nothing_below_the_largest_value_overflows() -> None:
    below = torch.nextafter(torch.tensor(MAX_BF16), torch.tensor(0.0)).expand(1000)
    assert torch.isfinite(rounded(below)).all()
    above = torch.full((1000,), torch.finfo(torch.float32).max)
    for sign in (1.0, -1.0):
        assert set(rounded(sign * above).tolist()) <= {sign * MAX_BF16, sign * float("inf")}


def test_the_generator_decides() -> None:
    x = torch.randn(500, generator=generator(1))
    assert torch.equal(rounded(x, seed=1), rounded(x, seed=1))
    assert not torch.equal(rounded(x, seed=1), rounded(x, seed=2))
    state = torch.random.get_rng_state()
    rounded(x)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_shape_and_dtype(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator(1))
    before = x.clone()
    y = stochastic_round(x, generator(0))
    assert y.shape == x.shape
    assert y.dtype == torch.bfloat16
    assert torch.equal(x, before)


def test_any_layout() -> None:
    x = torch.randn(6, 4, generator=generator(1)).T
    inner, outer = neighbours(x.contiguous())
    y = rounded(x)
    assert torch.all((y == inner) | (y == outer))
