"""What others do to groups and state of an optimizer that has begun."""

import pytest
import torch

from asteria import KLSOAP, SOAP, ConfigError
from tests.support.arms import Arm, over_arms
from tests.support.training import assert_same_bits, everything, parameters, set_gradients, train

SHAPES = [(6, 4), (5,), (4, 4)]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_precond_dim", 4),
        ("large_dims", "blocks"),
        ("merge_dims", True),
        ("precondition_1d", True),
        ("data_format", "channels_last"),
        ("batch_dims", 1),
    ],
)
def test_an_option_that_decided_on_the_blocks_cannot_change(option: str, value: object) -> None:
    params = parameters(SHAPES)
    optimizer = SOAP(params)
    train(optimizer, range(3))
    before = everything(optimizer)
    kept = optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    set_gradients(params, 3)
    with pytest.raises(ConfigError, match=f"{option}={kept!r}, now its group says {value!r}"):
        optimizer.step()
    assert_same_bits(everything(optimizer), before)
    optimizer.param_groups[0][option] = kept
    train(optimizer, range(3, 5))


def test_it_can_change_where_the_state_is_dropped() -> None:
    params = parameters(SHAPES)
    optimizer = KLSOAP(params)
    train(optimizer, range(3))
    optimizer.param_groups[0]["max_precond_dim"] = 4
    optimizer.state.clear()
    train(optimizer, range(3, 6))
    assert "factor_0" not in optimizer.state[params[0]]


@over_arms
def test_others_may_keep_tensors_beside_ours(arm: Arm) -> None:
    """As wrappers such as Lookahead do."""
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    alone, wrapped = arm(ours), arm(theirs)
    train(alone, range(8))
    for step in range(8):
        train(wrapped, [step])
        for p in theirs:
            wrapped.state[p]["slow_buffer"] = p.detach().clone()
    assert_same_bits(
        {k: v for k, v in everything(wrapped).items() if "slow" not in k}, everything(alone)
    )
    assert torch.equal(wrapped.state[theirs[0]]["slow_buffer"], theirs[0])
