"""float64, float32, bfloat16 and float16 parameters, alone and mixed, and stochastic rounding."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.arms import Arm, over_alone_arms, over_arms
from tests.support.tolerances import ON_AVERAGE, OTHER_PRECISION, SAME_MATH, TOLERANCES
from tests.support.training import (
    COUNTERS,
    MIXED,
    SMALL,
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
NARROW = [torch.bfloat16, torch.float16]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@over_dtypes
@over_arms
def test_state_is_float32_or_wider(arm: Arm, dtype: torch.dtype) -> None:
    params = parameters(MIXED, dtype)
    optimizer = arm(params)
    train(optimizer, range(4))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(p.dtype == dtype for p in params)
    for entries in optimizer.state.values():
        assert {t.dtype for name, t in entries.items() if name not in COUNTERS} == {wanted}
        assert {entries[name].dtype for name in COUNTERS & entries.keys()} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@over_arms
def test_follows_the_run_in_float64(arm: Arm, dtype: torch.dtype) -> None:
    """With the gradients that the narrow dtype can hold; narrow weights are rounded once a step."""
    narrow = parameters(SMALL, dtype)
    exact = [nn.Parameter(p.detach().double()) for p in narrow]
    start = weights(exact)
    optimizer, reference = arm(narrow, lr=0.05), arm(exact, lr=0.05)
    for step in range(8):
        set_gradients(narrow, step)
        for p, q in zip(narrow, exact, strict=True):
            assert p.grad is not None
            q.grad = p.grad.double()
        optimizer.step()
        reference.step()
    assert_near(weights(narrow), weights(exact), OTHER_PRECISION, dtype, start)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@over_arms
def test_narrow_weights_are_rounded_once(arm: Arm, dtype: torch.dtype) -> None:
    """One step is the float32 step of the same weights, rounded: no arithmetic is done in them."""
    narrow = parameters(SMALL, dtype)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizer, twin = (arm(params, lr=0.03, weight_decay=0.3) for params in (narrow, wide))
    for step in range(3):
        for index, (p, q) in enumerate(zip(narrow, wide, strict=True)):
            with torch.no_grad():
                q.copy_(p)
            p.grad = gradient(tuple(p.shape), dtype, step, index)
            q.grad = p.grad.float()
        optimizer.step()
        twin.step()
        assert_same_bits(weights(narrow), {k: w.to(dtype) for k, w in weights(wide).items()})


@over_alone_arms
def test_dtypes_mixed_in_one_optimizer(arm: Arm) -> None:
    """Each parameter does what it does in an optimizer of its own."""
    groups = [parameters(SMALL, dtype, seed) for seed, dtype in enumerate(DTYPES)]
    apart = [clones(group) for group in groups]
    starts = [weights(group) for group in groups]
    together = arm([p for group in groups for p in group])
    train(together, range(8))
    for number, (dtype, group) in enumerate(zip(DTYPES, apart, strict=True)):
        train(arm(group), range(8), first_index=number * len(SMALL))
        actual, expected = weights(groups[number]), weights(group)
        if dtype in NARROW:
            assert_near(actual, expected, OTHER_PRECISION, dtype, starts[number])
        else:
            assert_near(actual, expected, SAME_MATH, dtype, starts[number])


TINY_LR = 2.0**-12
"""An update of about one learning rate is far below bfloat16's resolution at 1, 2**-8."""


def drift(arm: Arm, dtype: torch.dtype, *, stochastic_rounding: bool) -> list[Tensor]:
    """How far matrices and a vector of ones go under gradients that point one way, with noise."""
    shapes = [(4, 4)] * 40 + [(600,)]
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = arm(params, lr=TINY_LR, weight_decay=0.0, stochastic_rounding=stochastic_rounding)
    for step in range(50):
        for index, p in enumerate(params):
            noise = gradient(tuple(p.shape), torch.float32, step, index)
            p.grad = (noise + 1.5).to(torch.bfloat16).to(dtype)
        optimizer.step()
    matrices, vector = torch.stack([p.detach() for p in params[:-1]]), params[-1].detach()
    return [part.float().mean() - 1 for part in (matrices, vector)]


@over_arms
def test_stochastic_rounding_keeps_small_updates_alive(arm: Arm) -> None:
    exact = drift(arm, torch.float32, stochastic_rounding=False)
    dead = drift(arm, torch.bfloat16, stochastic_rounding=False)
    alive = drift(arm, torch.bfloat16, stochastic_rounding=True)
    for wanted, none, kept in zip(exact, dead, alive, strict=True):
        assert abs(wanted) > 10 * TINY_LR
        assert none == 0
        assert abs(kept - wanted) < TOLERANCES[ON_AVERAGE, torch.bfloat16] * abs(wanted)


@over_arms
def test_stochastic_rounding_is_off_by_default(arm: Arm) -> None:
    assert arm(parameters()).defaults["stochastic_rounding"] is False
    plain = arm(parameters(dtype=torch.bfloat16))
    off = arm(parameters(dtype=torch.bfloat16), stochastic_rounding=False)
    on = arm(parameters(dtype=torch.bfloat16), stochastic_rounding=True)
    for optimizer in (plain, off, on):
        train(optimizer, range(4))
    assert_same_bits(everything(plain), everything(off))
    assert not same_bits(everything(on)["0"], everything(off)["0"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@over_arms
def test_stochastic_rounding_is_for_bfloat16_alone(arm: Arm, dtype: torch.dtype) -> None:
    on, off = (arm(parameters(dtype=dtype), stochastic_rounding=flag) for flag in (True, False))
    train(on, range(4))
    train(off, range(4))
    assert_same_bits(everything(on), everything(off))


@over_arms
def test_stochastic_rounding_needs_no_seed_and_takes_none(arm: Arm) -> None:
    """Same run, same bits, whatever the global generator says; which is left as it was."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        optimizer = arm(parameters(MIXED, torch.bfloat16), stochastic_rounding=True)
        train(optimizer, range(6))
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(everything(optimizer))
    assert_same_bits(*runs)


@over_arms
def test_stochastic_rounding_rounds_equal_parameters_differently(arm: Arm) -> None:
    """Else the errors of equal layers would add up instead of cancelling out."""
    params = [nn.Parameter(torch.ones(6, 6, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = arm(params, lr=2.0**-10, stochastic_rounding=True)
    rounded = []
    for step in range(4):
        for p in params:
            p.grad = gradient((6, 6), p.dtype, step, 0)
        optimizer.step()
        rounded.append(weights(params))
    assert not same_bits(rounded[-1]["0"], rounded[-1]["1"])
    moves = [(b["0"] - a["0"]) != 0 for a, b in zip(rounded[1:], rounded[2:], strict=False)]
    assert not torch.equal(*moves)


@over_arms
def test_stochastic_rounding_rounds_equal_tiles_differently(arm: Arm) -> None:
    p = nn.Parameter(torch.ones(12, 6, dtype=torch.bfloat16))
    optimizer = arm(
        [p], lr=2.0**-10, max_precond_dim=6, large_dims="blocks", stochastic_rounding=True
    )
    for step in range(4):
        p.grad = gradient((6, 6), p.dtype, step, 0).repeat(2, 1)
        optimizer.step()
    assert not same_bits(p[:6], p[6:])
