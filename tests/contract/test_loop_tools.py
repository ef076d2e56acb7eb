"""What else stands in a training loop: loss scaling, clipping, accumulation, zero_grad, tying."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tests.support.arms import LR, Arm, over_arms
from tests.support.tolerances import SAME_MATH
from tests.support.training import (
    MIXED,
    assert_near,
    assert_same_bits,
    clones,
    everything,
    gradient,
    parameters,
    same_bits,
    set_gradients,
    train,
    weights,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Tied(nn.Module):
    """A square layer used twice, between an embedding and a head that are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, dtype=torch.float64)
        self.twice = nn.Linear(4, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 6, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight
        for index, p in enumerate(self.parameters()):
            p.data.copy_(gradient(tuple(p.shape), p.dtype, 99, index))

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        for _ in range(2):
            x = torch.tanh(self.twice(x))
        logits: Tensor = self.head(x)
        return logits


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens), tokens.flip(0))


TOKENS = torch.tensor([0, 5, 3, 3, 1, 2, 4, 0])


@over_arms
def test_grad_scaler_unscales_and_skips_overflows(arm: Arm) -> None:
    """Scaled by powers of two, a run equals the plain one; a step with inf does not happen."""
    scaled, plain = arm(parameters()), arm(parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for step in range(8):
        scale = scaler.scale(torch.ones(())).item()
        scales.append(scale)
        params = scaled.param_groups[0]["params"]
        set_gradients(params, step, scale=scale)
        if step in (0, 4):
            params[1].grad[2] = float("inf")
        before = everything(scaled)
        scaler.step(scaled)
        scaler.update()
        if step in (0, 4):
            assert_same_bits(everything(scaled), before)
            assert scaler.get_scale() < scale
        else:
            train(plain, [step])
    assert_same_bits(everything(scaled), everything(plain))
    assert len(set(scales)) > 1
    assert scaled.stats().skipped_steps == 0


@over_arms
def test_full_loop_hands_over_the_gradients_it_ends_with(arm: Arm) -> None:
    """Loss scaling, accumulation, unscaling, clipping: the step sees what is in .grad then."""
    model, replayed = Tied(), Tied()
    optimizer, plain = arm(model.parameters()), arm(replayed.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(6):
        for part in TOKENS.split(4):
            scaler.scale(loss_of(model, part) / 2).backward()
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(model.parameters(), 0.05)
        clip_grad_value_(model.parameters(), 0.02)
        assert norm > 0.05
        for p, q in zip(model.parameters(), replayed.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        plain.step()
    assert_same_bits(everything(optimizer), everything(plain))


@pytest.mark.parametrize("options", [{}, {"maximize": True, "normalize_grads": True}])
@over_arms
def test_step_leaves_the_gradients_alone(arm: Arm, options: dict[str, Any]) -> None:
    """Someone may log, clip or accumulate into them afterwards."""
    params = parameters(MIXED)
    optimizer = arm(params, **options)
    for step in range(5):
        set_gradients(params, step)
        given = [(p.grad, p.grad.clone()) for p in params if p.grad is not None]
        optimizer.step()
        for p, (grad, copy) in zip(params, given, strict=True):
            assert p.grad is grad
            assert same_bits(grad, copy)


@over_arms
def test_accumulated_gradients_equal_a_big_batch(arm: Arm) -> None:
    models = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double() for _ in "ab"]
    parts, whole = models
    whole.load_state_dict(parts.state_dict())
    start = weights(parts.parameters())
    accumulating, big = arm(parts.parameters()), arm(whole.parameters())
    for step in range(5):
        x, y = (gradient((16, 4), torch.float64, step, index) for index in range(2))
        for some_x, some_y in zip(x.split(4), y.split(4), strict=True):
            (nn.functional.mse_loss(parts(some_x), some_y) / 4).backward()
        accumulating.step()
        accumulating.zero_grad()
        big.zero_grad()
        nn.functional.mse_loss(whole(x), y).backward()
        big.step()
    actual, expected = weights(parts.parameters()), weights(whole.parameters())
    assert_near(actual, expected, SAME_MATH, torch.float64, start)


@over_arms
def test_both_ways_of_zero_grad(arm: Arm) -> None:
    models = {True: Tied(), False: Tied()}
    optimizers = {flag: arm(model.parameters()) for flag, model in models.items()}
    for _ in range(4):
        for to_none, model in models.items():
            optimizers[to_none].zero_grad(set_to_none=to_none)
            grads = [p.grad for p in model.parameters()]
            assert all(grad is None or not (to_none or grad.any()) for grad in grads)
            loss_of(model, TOKENS).backward()
            optimizers[to_none].step()
    assert_same_bits(everything(optimizers[True]), everything(optimizers[False]))


@over_arms
def test_shared_parameters_are_one(arm: Arm) -> None:
    """Tied weights stay tied, have one state, and move once a step by the sum of gradients."""
    model = Tied()
    optimizer = arm(model.parameters())
    params = list(model.parameters())
    twins = clones(params)
    plain = arm(twins)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = loss_of(model, TOKENS)
        loss.backward()
        for p, twin in zip(params, twins, strict=True):
            twin.grad = p.grad
        optimizer.step()
        plain.step()
        losses.append(loss.item())
    assert model.head.weight is model.embedding.weight
    assert len(optimizer.state) == len(params) == 3
    assert_same_bits(everything(optimizer), everything(plain))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_arms
def test_learning_rate_of_zero_keeps_the_weights(arm: Arm, dtype: torch.dtype) -> None:
    """The state moves on, no bit of a weight does, weight decay and rounding included."""
    params = parameters(dtype=dtype)
    start = weights(params)
    optimizer = arm(params, lr=0.0, weight_decay=0.5, stochastic_rounding=True)
    train(optimizer, range(2))
    before = everything(optimizer)
    train(optimizer, range(2, 5))
    assert_same_bits(weights(params), start)
    moved = everything(optimizer)
    assert not any(same_bits(moved[key], before[key]) for key in moved if "exp_avg" in key)


@over_arms
def test_learning_rate_scales_the_update_and_decay_follows_it(arm: Arm) -> None:
    """w <- (w - lr d)(1 - lr decay): with lr doubled, twice the way and twice the decay."""
    ways = {}
    for lr, decay in ((LR, 0.0), (2 * LR, 0.0), (LR, 0.25)):
        params = parameters(dtype=torch.float64)
        train(arm(params, lr=lr, weight_decay=decay), range(1))
        start = parameters(dtype=torch.float64)
        ways[lr, decay] = [
            (p, s, p.detach() - s.detach()) for p, s in zip(params, start, strict=True)
        ]
    for one, two, decayed in zip(*ways.values(), strict=True):
        torch.testing.assert_close(two[2], 2 * one[2])
        if one[2].any():
            torch.testing.assert_close(decayed[0], one[0] * (1 - LR * 0.25))


@pytest.mark.parametrize("kind", [(), (1,)], ids=["scalar", "one element"])
@over_arms
def test_learning_rate_as_a_tensor(arm: Arm, kind: tuple[int, ...]) -> None:
    tensor, number = arm(parameters(), lr=torch.full(kind, LR)), arm(parameters())
    train(tensor, range(5))
    train(number, range(5))
    tensor.param_groups[0]["lr"].mul_(2)
    number.param_groups[0]["lr"] *= 2
    train(tensor, range(5, 8))
    train(number, range(5, 8))
    assert_same_bits(everything(tensor), everything(number))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0, "normalize_grads": True}])
@over_arms
def test_maximize_is_minimize_of_the_negative(arm: Arm, options: dict[str, Any]) -> None:
    up, down = arm(parameters(), maximize=True, **options), arm(parameters(), **options)
    train(up, range(7))
    train(down, range(7), scale=-1.0)
    assert_same_bits(everything(up), everything(down))
