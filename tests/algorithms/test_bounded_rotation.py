"""A rotation that is bounded leaves no momentum in a direction that has seen no gradient."""

import pytest
import torch

from asteria.algorithms.adam import bound_ratio_, largest_ratio
from asteria.algorithms.algorithm import BlockShape
from asteria.algorithms.kl import KLSOAP
from asteria.algorithms.soap import SOAP
from tests.algorithms.blocks import (
    SHAPES,
    changed,
    copied,
    hyper,
    normal,
    other_bases,
    random_state,
    scratch_of,
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", [SOAP(), KLSOAP()], ids=lambda rule: rule.name)
def test_second_moment_is_lifted_to_the_square_of_the_first(
    rule: SOAP | KLSOAP, shape: BlockShape
) -> None:
    plain = random_state(rule, shape)
    plain["exp_avg_sq"].mul_(1e-3)
    bounded, fresh = copied(plain), other_bases(plain, shape)
    for state, lift in ((plain, None), (bounded, 1.0)):
        pair = scratch_of(state["exp_avg"])
        rule.rotate_(state, fresh, scratch=pair, gate=None, bound=lift)
    assert changed(plain, bounded) == {"exp_avg_sq"}
    lifted = torch.maximum(plain["exp_avg_sq"], plain["exp_avg"].square())
    torch.testing.assert_close(bounded["exp_avg_sq"], lifted)


@pytest.mark.parametrize("rule", [SOAP(), KLSOAP()], ids=lambda rule: rule.name)
def test_a_closed_gate_lifts_nothing(rule: SOAP | KLSOAP) -> None:
    state = random_state(rule, SHAPES[1])
    state["exp_avg_sq"].zero_()
    before, pair = copied(state), scratch_of(state["exp_avg"])
    zero = torch.zeros((), dtype=torch.float64)
    rule.rotate_(state, other_bases(state, SHAPES[1]), scratch=pair, gate=zero, bound=1.0)
    assert changed(before, state) == set()


def test_what_is_large_enough_stays() -> None:
    mean, square = normal(4, 3), normal(4, 3).square() * 2
    kept = square.clone()
    bound_ratio_(mean, square, 1.0, out=torch.empty_like(mean), gate=None)
    assert torch.equal(square, kept)


def test_the_bound_is_what_gradients_can_cause() -> None:
    """The worst gradients by Cauchy-Schwarz: each in proportion to (beta1 / beta2)^age."""
    for beta1, beta2 in ((0.9, 0.98), (0.95, 0.95), (0.8, 0.999)):
        gradients = [(beta1 / beta2) ** age for age in reversed(range(2000))]
        mean = square = 0.0
        for gradient in gradients:
            mean = beta1 * mean + (1 - beta1) * gradient
            square = beta2 * square + (1 - beta2) * gradient**2
        expected = min(10.0, mean / square**0.5)
        assert largest_ratio(hyper(beta1=beta1, beta2=beta2)) == pytest.approx(expected, rel=1e-3)
    for beta1, beta2 in ((0.99, 0.9), (0.9, 0.81), (0.0, 0.0)):
        assert largest_ratio(hyper(beta1=beta1, beta2=beta2)) == 10.0
