"""A rotation that is bounded leaves no momentum in a direction that has seen no gradient."""

import pytest
import torch

from asteria.algorithms.adam import bound_ratio_
from asteria.algorithms.algorithm import BlockShape
from asteria.algorithms.kl import KLSOAP
from asteria.algorithms.soap import SOAP
from tests.algorithms.blocks import (
    SHAPES,
    changed,
    copied,
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
    for state, lift in ((plain, False), (bounded, True)):
        pair = scratch_of(state["exp_avg"])
        rule.rotate_(state, fresh, scratch=pair, gate=None, bounded=lift)
    assert changed(plain, bounded) == {"exp_avg_sq"}
    lifted = torch.maximum(plain["exp_avg_sq"], plain["exp_avg"].square())
    torch.testing.assert_close(bounded["exp_avg_sq"], lifted)


@pytest.mark.parametrize("rule", [SOAP(), KLSOAP()], ids=lambda rule: rule.name)
def test_a_closed_gate_lifts_nothing(rule: SOAP | KLSOAP) -> None:
    state = random_state(rule, SHAPES[1])
    state["exp_avg_sq"].zero_()
    before, pair = copied(state), scratch_of(state["exp_avg"])
    zero = torch.zeros((), dtype=torch.float64)
    rule.rotate_(state, other_bases(state, SHAPES[1]), scratch=pair, gate=zero, bounded=True)
    assert changed(before, state) == set()


def test_what_is_large_enough_stays() -> None:
    mean, square = normal(4, 3), normal(4, 3).square() * 2
    kept = square.clone()
    bound_ratio_(mean, square, out=torch.empty_like(mean), gate=None)
    assert torch.equal(square, kept)
