"""state_dict and load_state_dict: from any step, in any dtype, to the same bits."""

import io
from typing import Any

import pytest
import torch

from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import PERIOD, Arm, over_all_arms, over_arms
from tests.support.training import (
    COUNTERS,
    MIXED,
    assert_same_bits,
    clones,
    everything,
    parameters,
    same_bits,
    train,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WINDOW = range(2 * PERIOD + 1)
END = WINDOW.stop + 2


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    """What torch.save wrote and torch.load reads without trusting it."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def resumed(
    arm: Arm, params: list[torch.nn.Parameter], saved: dict[str, Any], **options: Any
) -> SecondOrderOptimizer:
    optimizer = arm(params, **options)
    optimizer.load_state_dict(saved)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_all_arms
def test_resumes_from_every_step_to_the_same_bits(arm: Arm, dtype: torch.dtype) -> None:
    options = {"stochastic_rounding": dtype == torch.bfloat16}
    optimizer = arm(parameters(MIXED, dtype), **options)
    params = optimizer.param_groups[0]["params"]
    points = []
    for step in WINDOW:
        train(optimizer, [step])
        points.append((step + 1, clones(params), through_a_file(optimizer.state_dict())))
    train(optimizer, range(WINDOW.stop, END))
    for step, weights, saved in points:
        twin = resumed(arm, weights, saved, **options)
        train(twin, range(step, END))
        assert_same_bits(everything(twin), everything(optimizer))


@over_arms
def test_state_is_flat_and_of_tensors(arm: Arm) -> None:
    optimizer = arm(parameters(MIXED))
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    assert list(saved["state"]) == list(range(len(MIXED)))
    for entries in saved["state"].values():
        assert all(isinstance(value, torch.Tensor) for value in entries.values())
        assert entries["step"].shape == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_arms
def test_loading_never_changes_a_dtype(arm: Arm, dtype: torch.dtype) -> None:
    """State is float32 (float64 for float64), whatever dtype the loaded state comes in."""
    optimizer = arm(parameters(MIXED, dtype))
    train(optimizer, range(4))
    saved = optimizer.state_dict()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for given in (None, torch.bfloat16, torch.float64):
        state = {
            key: {name: t if given is None else t.to(given) for name, t in entries.items()}
            for key, entries in saved["state"].items()
        }
        twin = resumed(arm, clones(optimizer.state), {**saved, "state": state})
        for entries in twin.state.values():
            dtypes = {name: t.dtype for name, t in entries.items() if name not in COUNTERS}
            assert set(dtypes.values()) == {wanted}
            assert {entries[name].dtype for name in COUNTERS & entries.keys()} == {torch.float32}
        if given is None:
            assert_same_bits(everything(twin), everything(optimizer))
        train(twin, [4])


@over_arms
def test_loaded_state_is_a_copy(arm: Arm) -> None:
    """Neither training writes into the loaded dict, nor the dict into the training."""
    source = arm(parameters(MIXED))
    train(source, range(4))
    saved = through_a_file(source.state_dict())
    kept = through_a_file(source.state_dict())
    a, b = (resumed(arm, clones(source.state), saved) for _ in range(2))
    train(a, range(4, 8))
    a.param_groups[0]["lr"] = 1.0
    for key, entries in kept["state"].items():
        assert_same_bits(saved["state"][key], entries)
    assert saved["param_groups"] == kept["param_groups"]
    for entries in saved["state"].values():
        for value in entries.values():
            value.fill_(float("nan"))
    train(b, range(4, 8))
    assert_same_bits(everything(b), everything(a))


@over_arms
def test_loading_replaces_what_was_there(arm: Arm) -> None:
    """Also state of parameters that the saved run never gave a gradient."""
    source, target = arm(parameters(MIXED)), arm(parameters(MIXED, seed=1))
    train(target, range(5))
    params = source.param_groups[0]["params"]
    for step in range(3):
        train(source, [step])
        if step == 0:
            source.state.clear()
    del source.state[params[0]]
    del source.state[params[4]]
    target.load_state_dict(source.state_dict())
    mine = target.param_groups[0]["params"]
    assert set(target.state) == {p for i, p in enumerate(mine) if i not in (0, 4)}
    with torch.no_grad():
        for p, q in zip(mine, params, strict=True):
            p.copy_(q)
    assert_same_bits(everything(target), everything(source))
    train(target, range(3, 8))
    train(source, range(3, 8))
    assert_same_bits(everything(target), everything(source))


@over_arms
def test_loading_before_the_first_step_was_saved(arm: Arm) -> None:
    source = arm(parameters())
    saved = source.state_dict()
    target = arm(clones(source.param_groups[0]["params"]))
    train(arm(clones(source.param_groups[0]["params"])), range(2))
    target.load_state_dict(saved)
    assert not target.state
    train(target, range(3))
    train(source, range(3))
    assert_same_bits(everything(target), everything(source))


@over_arms
def test_loading_again_and_again_adds_no_option(arm: Arm) -> None:
    optimizer = arm(parameters())
    options = optimizer.param_groups[0].keys() | set()
    for _ in range(3):
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        assert optimizer.param_groups[0].keys() == options
    arm(parameters()).load_state_dict(optimizer.state_dict())


@over_arms
def test_loading_takes_the_groups_options(arm: Arm) -> None:
    params = parameters()
    source = arm([{"params": params[:1], "lr": 0.5}, {"params": params[1:], "betas": (0.1, 0.2)}])
    train(source, range(2))
    target = arm([{"params": p} for p in (clones(params[:1]), clones(params[1:]))])
    target.load_state_dict(through_a_file(source.state_dict()))
    for mine, theirs in zip(target.param_groups, source.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"
        }


@over_arms
def test_what_was_saved_is_not_touched_by_further_training_of_its_copy(arm: Arm) -> None:
    """state_dict() shows the live state, as torch's do; a saved file does not move."""
    optimizer = arm(parameters())
    train(optimizer, range(3))
    live, file = optimizer.state_dict(), through_a_file(optimizer.state_dict())
    train(optimizer, [3])
    moved = [not same_bits(live["state"][0][k], file["state"][0][k]) for k in file["state"][0]]
    assert any(moved)
    for key, entry in optimizer.state[optimizer.param_groups[0]["params"][0]].items():
        assert same_bits(live["state"][0][key], entry)
