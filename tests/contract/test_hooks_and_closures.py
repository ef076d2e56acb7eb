"""Hooks of torch.optim.Optimizer, and closures."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from asteria import CheckpointError
from tests.support.arms import Arm, over_arms
from tests.support.training import (
    assert_same_bits,
    clones,
    everything,
    parameters,
    same_bits,
    set_gradients,
    train,
)


@over_arms
def test_step_hooks_run_around_the_update_in_order(arm: Arm) -> None:
    params = parameters()
    optimizer = arm(params)
    seen: list[tuple[str, Tensor]] = []

    def note(label: str) -> Any:
        return lambda *_: seen.append((label, params[0].detach().clone()))

    optimizer.register_step_pre_hook(note("pre 1"))
    optimizer.register_step_pre_hook(note("pre 2"))
    optimizer.register_step_post_hook(note("post 1"))
    removed = optimizer.register_step_post_hook(note("post 2"))
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    train(optimizer, range(2))
    for handle in handles:
        handle.remove()
    one_step = ["global pre", "pre 1", "pre 2", "post 1", "post 2", "global post"]
    assert [label for label, _ in seen] == one_step * 2
    *before, last_before, first_after, _, after = [weight for _, weight in seen[6:]]
    assert all(same_bits(weight, last_before) for weight in before)
    assert not same_bits(first_after, last_before)
    assert same_bits(after, params[0])

    seen.clear()
    removed.remove()
    train(optimizer, range(2, 3))
    assert [label for label, _ in seen] == ["pre 1", "pre 2", "post 1"]


@over_arms
def test_pre_hook_may_change_the_gradients(arm: Arm) -> None:
    hooked, plain = arm(parameters()), arm(parameters())

    def halve(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad.mul_(0.5)

    hooked.register_step_pre_hook(halve)
    train(hooked, range(4))
    train(plain, range(4), scale=0.5)
    assert_same_bits(everything(hooked), everything(plain))


@over_arms
def test_state_dict_hooks_see_the_complete_state(arm: Arm) -> None:
    optimizer = arm(parameters())
    train(optimizer, range(4))
    calls: list[str] = []

    def before(_: torch.optim.Optimizer) -> None:
        calls.append("pre")

    def after(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("post 1")
        assert len(saved["state"]) == len(optimizer.state)
        return {**saved, "mine": 1}

    def last(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        calls.append("post 2")
        assert saved["mine"] == 1

    optimizer.register_state_dict_pre_hook(before)
    optimizer.register_state_dict_post_hook(after)
    optimizer.register_state_dict_post_hook(last)
    assert optimizer.state_dict()["mine"] == 1
    assert calls == ["pre", "post 1", "post 2"]


@over_arms
def test_load_state_dict_hooks_see_the_complete_state(arm: Arm) -> None:
    source = arm(parameters())
    train(source, range(4))
    saved, expected = source.state_dict(), everything(source)
    target = arm(clones(source.param_groups[0]["params"]))
    calls: list[str] = []

    def note_pre(label: str) -> Any:
        def hook(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            calls.append(label)
            assert given["state"].keys() == saved["state"].keys()
            for key, entries in saved["state"].items():
                assert_same_bits(given["state"][key], entries)

        return hook

    def note_post(label: str) -> Any:
        def hook(optimizer: torch.optim.Optimizer) -> None:
            calls.append(label)
            assert_same_bits(everything(optimizer), expected)

        return hook

    target.register_load_state_dict_pre_hook(note_pre("pre 1"))
    target.register_load_state_dict_post_hook(note_post("post 1"))
    target.register_load_state_dict_pre_hook(note_pre("pre 2"))
    target.register_load_state_dict_post_hook(note_post("post 2"))
    target.load_state_dict(saved)
    target.load_state_dict(saved)
    assert calls == ["pre 1", "pre 2", "post 1", "post 2"] * 2


@over_arms
def test_load_hook_may_replace_the_state(arm: Arm) -> None:
    source = arm(parameters())
    train(source, range(4))
    saved = source.state_dict()
    state = {key: dict(entries) for key, entries in saved["state"].items()}
    state[0]["momentum"] = state[0].pop("exp_avg")
    renamed = {**saved, "state": state}
    target = arm(clones(source.param_groups[0]["params"]))
    with pytest.raises(CheckpointError, match="momentum"):
        target.load_state_dict(renamed)
    target.register_load_state_dict_pre_hook(lambda *_: saved)
    target.load_state_dict(renamed)
    assert_same_bits(everything(target), everything(source))


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
@over_arms
def test_closure_runs_once_with_gradients_enabled(arm: Arm, outer: Any) -> None:
    model, twin = nn.Linear(4, 4), nn.Linear(4, 4)
    twin.load_state_dict(model.state_dict())
    x = torch.linspace(-1, 1, 32).view(8, 4)
    optimizer, plain = arm(model.parameters()), arm(twin.parameters())
    modes: list[bool] = []

    def closure() -> Tensor:
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        return loss

    for step in range(4):
        with outer():
            loss = optimizer.step(closure)
            assert torch.is_grad_enabled() == (outer is torch.enable_grad)
        plain.zero_grad()
        expected = twin(x).square().mean()
        expected.backward()
        plain.step()
        assert same_bits(torch.as_tensor(loss), expected)
        assert modes == [True] * (step + 1)
    assert_same_bits(everything(optimizer), everything(plain))


@over_arms
def test_closure_that_fails_changes_nothing(arm: Arm) -> None:
    optimizer = arm(parameters())
    train(optimizer, range(2))
    before = everything(optimizer)

    def closure() -> float:
        set_gradients(optimizer.param_groups[0]["params"], 2)
        raise KeyError("no batch left")

    with pytest.raises(KeyError, match="no batch left"):
        optimizer.step(closure)
    assert_same_bits(everything(optimizer), before)
    assert torch.is_grad_enabled()
