"""Parameters and groups: whatever torch.optim takes, with options that are live."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import asteria
from asteria import ConfigError
from tests.support.arms import LR, OPTIMIZERS, Arm, over_alone_arms, over_arms
from tests.support.tolerances import SAME_MATH
from tests.support.training import (
    SMALL,
    assert_near,
    assert_same_bits,
    clones,
    everything,
    parameters,
    same_bits,
    set_gradients,
    train,
    weights,
)

CHANGES: dict[str, tuple[Any, Any]] = {
    "lr": (LR, 4 * LR),
    "betas": ((0.9, 0.95), (0.5, 0.8)),
    "shampoo_beta": (None, 0.5),
    "eps": (1e-8, 1e-1),
    "weight_decay": (0.0, 0.5),
    "precondition_frequency": (10, 1),
    "normalize_grads": (False, True),
    "maximize": (False, True),
    "correct_bias": (True, False),
    "damp_factors": (False, True),
    "max_inverse_root": (None, 1.0),
}
NEEDS: dict[str, dict[str, Any]] = {
    "damp_factors": {"eps": 1e-2},
    "max_inverse_root": {"shampoo_beta": 0.5},
}
"""Options under which a change can be seen."""


def test_every_public_optimizer_is_in_the_table() -> None:
    public = {name: getattr(asteria, name) for name in asteria.__all__}
    assert OPTIMIZERS == {
        name: value
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }


@over_arms
def test_is_a_torch_optimizer_whose_base_is_initialized(arm: Arm) -> None:
    optimizer = arm(parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    plain = torch.optim.SGD(parameters(), lr=LR)
    assert plain.__dict__.keys() <= optimizer.__dict__.keys()
    assert repr(optimizer).startswith(arm.optimizer.__name__)


@over_arms
def test_defaults_and_groups_hold_every_option(arm: Arm) -> None:
    signature = inspect.signature(arm.optimizer).parameters
    options = {name: p.default for name, p in signature.items() if name not in ("params",)}
    runtime = options.pop("runtime")
    assert runtime is None
    optimizer = arm.optimizer(parameters())
    assert {name: optimizer.defaults[name] for name in options} == options
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in options} == options


@over_arms
def test_positional_arguments_follow_torchs_order(arm: Arm) -> None:
    optimizer = arm.optimizer(parameters(), 0.5, (0.1, 0.2))
    assert optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["betas"] == (0.1, 0.2)


@over_arms
def test_parameters_come_as_any_iterable(arm: Arm) -> None:
    expected: dict[str, torch.Tensor] | None = None
    for kind in ("list", "generator", "groups", "lone tensors", "named", "named groups"):
        params = parameters()
        named = [(f"p{index}", p) for index, p in enumerate(params)]
        given: dict[str, Any] = {
            "list": params,
            "generator": (p for p in params),
            "groups": [{"params": (p for p in params)}],
            "lone tensors": [{"params": p} for p in params],
            "named": (pair for pair in named),
            "named groups": [{"params": named[:1]}, {"params": named[1:]}],
        }
        optimizer = arm(given[kind])
        assert [p for g in optimizer.param_groups for p in g["params"]] == params
        train(optimizer, range(4))
        expected = expected or everything(optimizer)
        assert_same_bits(everything(optimizer), expected)


@over_alone_arms
def test_groups_behave_as_optimizers_of_their_own(arm: Arm) -> None:
    groups: list[dict[str, Any]] = [
        {},
        {"lr": 4 * LR, "weight_decay": 0.5},
        {"betas": (0.5, 0.9), "eps": 1e-3, "precondition_frequency": 2},
        {"max_precond_dim": 3, "normalize_grads": True, "maximize": True},
    ]
    params = [parameters(SMALL, torch.float64, seed) for seed in range(len(groups))]
    start = weights(p for group in params for p in group)
    apart = [arm(clones(group), **own) for group, own in zip(params, groups, strict=True)]
    together = arm([{"params": group, **own} for group, own in zip(params, groups, strict=True)])
    train(together, range(8))
    for number, optimizer in enumerate(apart):
        train(optimizer, range(8), first_index=number * len(SMALL))
    expected = weights(p for optimizer in apart for p in optimizer.param_groups[0]["params"])
    actual = weights(p for group in params for p in group)
    assert_near(actual, expected, SAME_MATH, torch.float64, start)


@pytest.mark.parametrize("option", CHANGES)
@over_arms
def test_options_are_read_at_every_step(arm: Arm, option: str) -> None:
    """A value written into a group acts from the next step on, as if it had been given."""
    before, after = CHANGES[option]
    if option not in inspect.signature(arm.optimizer).parameters:
        with pytest.raises(TypeError):
            arm.optimizer(parameters(), **{option: after})
        return
    others = NEEDS.get(option, {})
    unchanged, changed = (arm(parameters(), **others, **{option: before}) for _ in range(2))
    for optimizer in (unchanged, changed):
        train(optimizer, range(4))
    given = arm(clones(changed.param_groups[0]["params"]), **others, **{option: after})
    saved = changed.state_dict()
    given.load_state_dict({**given.state_dict(), "state": saved["state"]})

    changed.param_groups[0][option] = after
    # So far that a refresh which only the new period asks for is used, though computed by workers.
    for optimizer in (unchanged, changed, given):
        train(optimizer, range(4, 13), scale=0.01)
    assert_same_bits(everything(changed), everything(given))
    untouched = everything(unchanged)
    assert any(not same_bits(t, untouched[name]) for name, t in everything(changed).items())


@over_alone_arms
def test_group_added_in_mid_training(arm: Arm) -> None:
    """Old parameters go on undisturbed; new ones of the same shapes begin like a new optimizer."""
    old, new = (parameters(SMALL, torch.float64, seed) for seed in range(2))
    start = weights([*old, *new])
    old_apart, new_apart = clones(old), clones(new)
    optimizer = arm(old)
    train(optimizer, range(4))
    optimizer.add_param_group({"params": new, "lr": 2 * LR})
    assert optimizer.param_groups[1]["eps"] == optimizer.defaults["eps"]
    train(optimizer, range(4, 12))

    train(arm(old_apart), range(12))
    train(arm(new_apart, lr=2 * LR), range(4, 12), first_index=len(SMALL))
    expected = weights([*old_apart, *new_apart])
    assert_near(weights([*old, *new]), expected, SAME_MATH, torch.float64, start)


@over_arms
def test_refused_group_changes_nothing(arm: Arm) -> None:
    optimizer = arm(parameters())
    for group in (
        {"params": parameters(seed=1), "beta": (0.9, 0.9)},
        {"params": parameters(seed=1), "lr": -1.0},
        {"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))]},
    ):
        with pytest.raises(ConfigError):
            optimizer.add_param_group(group)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"][:1]})
    assert len(optimizer.param_groups) == 1


@over_arms
def test_names_are_kept_and_shown(arm: Arm) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = arm(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert [row.name for row in optimizer.describe().rows] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


@over_arms
def test_keys_of_schedulers_and_users_are_let_through(arm: Arm) -> None:
    extra = {"initial_lr": 0.1, "name": "trunk", "_mine": object()}
    optimizer = arm([{"params": parameters(), **extra}])
    train(optimizer, range(2))
    assert {key: optimizer.param_groups[0][key] for key in extra} == extra


@over_arms
def test_step_without_parameters_that_have_gradients(arm: Arm) -> None:
    optimizer = arm(parameters())
    before = everything(optimizer)
    assert optimizer.step() is None
    assert_same_bits(everything(optimizer), before)
    assert not optimizer.state


@over_arms
def test_one_parameter_given_twice_is_stepped_once(arm: Arm) -> None:
    """torch warns of a duplicate; the parameter must not be moved twice in any step."""
    once, twice = parameters([(4, 4)]), parameters([(4, 4)])
    alone = arm(once)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        doubled = arm(twice * 2)
    for step in range(5):
        for params, optimizer in ((once, alone), (twice, doubled)):
            set_gradients(params, step)
            optimizer.step()
    assert_same_bits(weights(twice), weights(once))
