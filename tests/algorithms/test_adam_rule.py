"""Adam's moments and the AdamW rule, against the plain formula."""

import pytest
import torch
from torch import Tensor

from asteria.algorithms.adam import AdamW, adam_update_, bias_correction, bound_ratio_, ema_
from asteria.algorithms.algorithm import BlockShape, accumulate_, begin_
from tests.algorithms.blocks import (
    BLOCKS,
    changed,
    copied,
    hyper,
    normal,
    random_state,
    scratch_of,
    zero_state,
)

ELEMENT = BlockShape((), ())
ONE = torch.ones((), dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("gate", [None, ONE])
def test_ema(gate: Tensor | None) -> None:
    mean, value = normal(4, 3, seed=1), normal(4, 3, seed=2)
    wanted = 0.9 * mean + 0.1 * value
    ema_(mean, value, 0.9, gate)
    torch.testing.assert_close(mean, wanted)


def test_ema_behind_a_closed_gate() -> None:
    mean = normal(4, 3, seed=1)
    before = mean.clone()
    ema_(mean, normal(4, 3, seed=2), 0.9, ZERO)
    assert torch.equal(mean, before)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("gate", [None, ONE, ZERO])
def test_adam_update(gate: Tensor | None, in_place: bool) -> None:
    mean, square, given = normal(5, seed=1), normal(5, seed=2).abs(), normal(5, seed=3)
    gradient, out = given.clone(), given if in_place else torch.full_like(given, float("nan"))
    wanted_mean, wanted_square = mean.clone(), square.clone()
    if gate is not ZERO:
        wanted_mean = 0.9 * mean + 0.1 * gradient
        wanted_square = 0.8 * square + 0.2 * gradient**2
    update = adam_update_(mean, square, given, hyper(), out=out, gate=gate)
    assert update is out
    torch.testing.assert_close(mean, wanted_mean)
    torch.testing.assert_close(square, wanted_square)
    torch.testing.assert_close(update, wanted_mean / (wanted_square.sqrt() + 1e-3))
    assert in_place or torch.equal(given, gradient)


@pytest.mark.parametrize("gate", [None, ONE, ZERO])
def test_the_second_moment_is_lifted_to_the_square_of_the_first(gate: Tensor | None) -> None:
    mean = torch.tensor([3.0, -3.0, 0.0, 2.0, -1.0], dtype=torch.float64)
    square = torch.tensor([0.0, 4.0, 0.0, 5.0, 1.0], dtype=torch.float64)
    wanted = square.clone() if gate is ZERO else square.new_tensor([9.0, 9.0, 0.0, 5.0, 1.0])
    kept = mean.clone()
    bound_ratio_(mean, square, 1.0, out=torch.full_like(mean, float("nan")), gate=gate)
    assert torch.equal(square, wanted)
    assert torch.equal(mean, kept)


@pytest.mark.parametrize(
    ("beta1", "beta2", "step", "correction"),
    [
        (0.5, 0.75, 1, 0.5 / 0.5),
        (0.9, 0.99, 1, 0.1 / 0.1),
        (0.5, 0.75, 2, 0.4375**0.5 / 0.75),
        (0.0, 0.0, 1, 1.0),
        (0.9, 0.999, 100000, 1.0),
    ],
)
def test_bias_correction(beta1: float, beta2: float, step: int, correction: float) -> None:
    given = hyper(beta1=beta1, beta2=beta2)
    assert bias_correction(given, step) == pytest.approx(correction)
    assert bias_correction(hyper(beta1=beta1, beta2=beta2, correct_bias=False), step) == 1.0


@pytest.mark.parametrize("corrected", [True, False])
def test_five_steps_of_adamw(corrected: bool) -> None:
    rule, given, state = AdamW(), hyper(correct_bias=corrected), zero_state(AdamW(), ELEMENT)
    mean = square = torch.zeros(BLOCKS, dtype=torch.float64)
    for step in range(1, 6):
        gradient = normal(BLOCKS, seed=step)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.8 * square + 0.2 * gradient**2
        pair = scratch_of(gradient)
        update, scale = rule.direction_(state, gradient, given, step=step, scratch=pair, gate=None)
        wanted_scale = (1 - 0.8**step) ** 0.5 / (1 - 0.9**step) if corrected else 1.0
        assert scale == pytest.approx(wanted_scale)
        torch.testing.assert_close(update, mean / (square.sqrt() + 1e-3))
        assert update is pair[0] or update is pair[1]
    torch.testing.assert_close(state["exp_avg"], mean)
    torch.testing.assert_close(state["exp_avg_sq"], square)


def test_it_has_two_moments_and_nothing_else_to_do() -> None:
    rule, state = AdamW(), random_state(AdamW(), ELEMENT)
    assert [(spec.name, spec.shape) for spec in rule.fields(ELEMENT)] == [
        ("exp_avg", ()),
        ("exp_avg_sq", ()),
    ]
    assert not rule.has_bases
    before, gradient = copied(state), normal(BLOCKS)
    begin_(rule, state, gradient, hyper())
    accumulate_(rule, state, gradient, hyper(), scratch=scratch_of(gradient), gate=None)
    rule.rotate_(state, [], scratch=scratch_of(gradient), gate=None)
    assert changed(before, state) == set()
