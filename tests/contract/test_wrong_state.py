"""State that does not belong here is refused as a whole; state that was removed begins afresh."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from asteria import CheckpointError
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import OPTIMIZERS, Arm, over_arms, over_optimizers
from tests.support.tolerances import SAME_MATH
from tests.support.training import (
    SMALL,
    assert_near,
    assert_same_bits,
    clones,
    everything,
    parameters,
    train,
    weights,
)

State = dict[int, dict[str, Any]]


def missing(state: State) -> list[str]:
    del state[0]["exp_avg"]
    del state[2]["step"]
    return ["exp_avg is missing", "step is missing"]


def unknown(state: State) -> list[str]:
    state[1]["max_exp_avg_sq"] = torch.zeros(5)
    return ["max_exp_avg_sq"]


def misshapen(state: State) -> list[str]:
    state[0]["exp_avg"] = torch.zeros(4, 5)
    state[1]["exp_avg"] = torch.zeros(())
    state[2]["basis_0"] = state[2]["basis_0"][None]
    return ["(4, 5)", "(4, 4)", "(5,)", "(1, 4, 4)"]


def swapped(state: State) -> list[str]:
    state[0], state[1] = state[1], state[0]
    return ["exp_avg has shape (5,), needs (4, 4)", "factor_0 is not part"]


def foreign_parameter(state: State) -> list[str]:
    state[7] = dict(state[0])
    return ["7"]


def no_tensors(state: State) -> list[str]:
    state[0]["exp_avg"] = "lost"
    return ["exp_avg"]


def several(state: State) -> list[str]:
    return [*missing(state), *unknown(state), *foreign_parameter(state)]


DAMAGES: list[Callable[[State], list[str]]] = [
    missing,
    unknown,
    misshapen,
    swapped,
    foreign_parameter,
    no_tensors,
    several,
]


def named(params: list[torch.nn.Parameter]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"layer.{index}", p) for index, p in enumerate(params)]


def assert_refuses(optimizer: SecondOrderOptimizer, saved: dict[str, Any]) -> CheckpointError:
    """The error; weights, state, options and the training that follows are as they were."""
    before = everything(optimizer)
    options = [{**group} for group in optimizer.param_groups]
    undisturbed = type(optimizer)(
        clones(p for group in optimizer.param_groups for p in group["params"]),
        runtime=optimizer._runtime,
    )
    undisturbed.load_state_dict(optimizer.state_dict())
    with pytest.raises(CheckpointError) as caught:
        optimizer.load_state_dict(saved)
    assert_same_bits(everything(optimizer), before)
    assert [{**group} for group in optimizer.param_groups] == options
    for each in (optimizer, undisturbed):
        train(each, range(50, 54))
    assert_same_bits(everything(optimizer), everything(undisturbed))
    return caught.value


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@over_arms
def test_damaged_state_is_refused_with_every_problem(
    arm: Arm, damage: Callable[[State], list[str]]
) -> None:
    source = arm(named(parameters()))
    train(source, range(3))
    saved = source.state_dict()
    saved["state"] = {key: dict(entries) for key, entries in saved["state"].items()}
    problems = damage(saved["state"])
    target = arm(named(parameters(seed=1)))
    train(target, range(4))
    error = assert_refuses(target, saved)
    assert isinstance(error, ValueError)
    assert [problem for problem in problems if problem not in str(error)] == []
    if damage is not foreign_parameter:
        assert "layer." in str(error)


@pytest.mark.parametrize("other", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3], ids=["unused", "used"])
@over_arms
def test_state_of_another_of_our_optimizers_is_refused(arm: Arm, steps: int, other: str) -> None:
    """Whatever its keys are, its groups say whose it is."""
    if OPTIMIZERS[other] is arm.optimizer:
        return
    source = OPTIMIZERS[other](parameters())
    optimizer = arm(parameters())
    train(optimizer, range(2))
    train(source, range(steps))
    error = assert_refuses(optimizer, source.state_dict())
    name, mine = (kind.rule.name for kind in (OPTIMIZERS[other], arm.optimizer))
    assert f"the state is one of {name}, this optimizer is {mine}" in str(error)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("{name}/2", "the state is of format 2, this version of asteria reads formats up to 1"),
        ("{name}/x", "asteria is '{name}/x', needs '{name}/1'"),
        (None, "asteria is None, needs '{name}/1'"),
        ("frodo/7", "the state is one of frodo"),
    ],
)
@over_optimizers
def test_a_manifest_that_cannot_be_followed(name: str, says: str | None, message: str) -> None:
    optimizer = OPTIMIZERS[name](parameters())
    train(optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    rule = optimizer.rule.name
    saved["param_groups"][0]["asteria"] = says and says.format(name=rule)
    saved["state"][9] = {}
    error = assert_refuses(optimizer, saved)
    assert message.format(name=rule) in str(error)
    assert "parameter 9 that no group has" in str(error)


@over_optimizers
def test_a_group_cannot_claim_to_be_another_optimizers(name: str) -> None:
    group = {"params": parameters(), "asteria": "frodo/7"}
    optimizer = OPTIMIZERS[name]([group])
    assert optimizer.param_groups[0]["asteria"] == f"{optimizer.rule.name}/1"


@over_arms
def test_option_that_an_older_state_lacks_takes_its_default(arm: Arm) -> None:
    optimizer, twin = (arm(parameters(), normalize_grads=True) for _ in range(2))
    train(optimizer, range(3))
    train(twin, range(3))
    saved = optimizer.state_dict()
    for option in ("normalize_grads", "large_dims", "batch_dims"):
        del saved["param_groups"][0][option]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["normalize_grads"] is True
    assert optimizer.param_groups[0].keys() == twin.param_groups[0].keys()
    train(optimizer, range(3, 6))
    train(twin, range(3, 6))
    assert_same_bits(everything(optimizer), everything(twin))


@over_arms
def test_what_is_no_state_dict_is_refused(arm: Arm) -> None:
    optimizer = arm(parameters())
    train(optimizer, range(2))
    whole = optimizer.state_dict()
    for given in ({}, {"state": whole["state"]}, {"param_groups": whole["param_groups"]}):
        assert_refuses(optimizer, given)


@over_arms
def test_other_number_of_groups_or_parameters(arm: Arm) -> None:
    optimizer = arm(parameters())
    train(optimizer, range(2))
    before = everything(optimizer)
    for groups in ([{"params": p} for p in parameters()], parameters(SMALL[:2])):
        other = arm(groups)
        train(other, range(2))
        with pytest.raises(
            CheckpointError, match=r"parameter groups have \[.*\] parameters, needs"
        ):
            optimizer.load_state_dict(other.state_dict())
        assert_same_bits(everything(optimizer), before)


def clear(optimizer: SecondOrderOptimizer) -> None:
    optimizer.state.clear()


def delete(optimizer: SecondOrderOptimizer) -> None:
    for p in optimizer.param_groups[0]["params"]:
        del optimizer.state[p]


def replace(optimizer: SecondOrderOptimizer) -> None:
    optimizer.state = defaultdict(dict)


def replace_each(optimizer: SecondOrderOptimizer) -> None:
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p] = {}


@pytest.mark.parametrize("remove", [clear, delete, replace, replace_each])
@over_arms
def test_removed_state_begins_afresh(
    arm: Arm, remove: Callable[[SecondOrderOptimizer], None]
) -> None:
    optimizer = arm(parameters())
    train(optimizer, range(5))
    afresh = arm(clones(optimizer.param_groups[0]["params"]))
    remove(optimizer)
    assert not any(optimizer.state_dict()["state"].values())
    for each in (optimizer, afresh):
        train(each, range(5, 10))
    assert_same_bits(everything(optimizer), everything(afresh))


@over_arms
def test_one_parameters_removed_state_begins_afresh(arm: Arm) -> None:
    """The others, of the same stack, keep theirs."""
    params = parameters(SMALL * 2, torch.float64)
    start = weights(params)
    undisturbed = clones(params)
    optimizer, twin = arm(params), arm(undisturbed)
    train(optimizer, range(5))
    train(twin, range(5))
    removed = 2
    del optimizer.state[params[removed]]
    alone = clones([params[removed]])
    train(optimizer, range(5, 10))
    train(twin, range(5, 10))
    train(arm(alone), range(5, 10), first_index=removed)
    expected = weights(undisturbed) | {str(removed): alone[0].detach()}
    assert_near(weights(params), expected, SAME_MATH, torch.float64, start)


def fresh_tensors(optimizer: SecondOrderOptimizer) -> None:
    """As code does that moves state to a device by hand."""
    for entries in optimizer.state.values():
        for key, value in entries.items():
            entries[key] = value.clone()


def fresh_dicts(optimizer: SecondOrderOptimizer) -> None:
    for p, entries in list(optimizer.state.items()):
        optimizer.state[p] = {key: value.clone() for key, value in entries.items()}


@pytest.mark.parametrize("put", [fresh_tensors, fresh_dicts])
@over_arms
def test_state_put_in_from_outside_is_what_the_run_goes_on_with(
    arm: Arm, put: Callable[[SecondOrderOptimizer], None]
) -> None:
    optimizer, twin = arm(parameters()), arm(parameters())
    train(optimizer, range(4))
    train(twin, range(4))
    put(optimizer)
    train(optimizer, range(4, 8))
    train(twin, range(4, 8))
    assert_same_bits(everything(optimizer), everything(twin))

    for value in [entries["exp_avg"] for entries in twin.state.values()]:
        value.zero_()
    for entries in optimizer.state.values():
        entries["exp_avg"] = torch.zeros_like(entries["exp_avg"])
    assert_same_bits(everything(optimizer), everything(twin))
    train(optimizer, range(8, 12))
    train(twin, range(8, 12))
    assert_same_bits(everything(optimizer), everything(twin))


@over_arms
def test_state_put_in_from_outside_that_does_not_fit(arm: Arm) -> None:
    params = parameters()
    optimizer, twin = arm(params), arm(parameters())
    train(optimizer, range(4))
    train(twin, range(4))
    right = optimizer.state[params[0]]["exp_avg"].clone()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3, 3)
    before = everything(optimizer)
    with pytest.raises(CheckpointError, match=r"\(3, 3\)"):
        train(optimizer, [4])
    assert_same_bits(everything(optimizer), before)
    optimizer.state[params[0]]["exp_avg"] = right
    train(optimizer, range(4, 8))
    train(twin, range(4, 8))
    assert_same_bits(everything(optimizer), everything(twin))


@pytest.mark.parametrize("value", [{}, "x", None, [1.0], torch.tensor(1j)], ids=repr)
@pytest.mark.parametrize("key", ["step", "version", "exp_avg"])
@over_optimizers
def test_what_is_no_number_is_refused(name: str, key: str, value: object) -> None:
    """A flattened state dict holds {} for a parameter that had no state."""
    optimizer = OPTIMIZERS[name](parameters())
    train(optimizer, range(3))
    saved = optimizer.state_dict()
    saved["state"][0][key] = value
    before = everything(optimizer)
    with pytest.raises(CheckpointError, match=f"{key} (is|has shape) .*needs"):
        optimizer.load_state_dict(saved)
    assert_same_bits(everything(optimizer), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 2.0**30])
@pytest.mark.parametrize("key", ["step", "version"])
@over_optimizers
def test_counters_that_count_nothing(name: str, key: str, value: float) -> None:
    optimizer = OPTIMIZERS[name](parameters())
    train(optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key].fill_(value)
    before = everything(optimizer)
    with pytest.raises(CheckpointError, match=f"{key} is .*needs counts of steps"):
        optimizer.load_state_dict(saved)
    assert_same_bits(everything(optimizer), before)
