"""RuntimeConfig.start: what the first steps do, and when bases are computed.

Of the synchronous schedule, where a refresh shows at once; test_async has the others.
"""

import pytest
import torch
from torch import Tensor

from asteria import RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import OPTIMIZERS, PERIOD, over_optimizers
from tests.support.tolerances import ADAM, SAME_MATH, TOLERANCES
from tests.support.training import (
    Shape,
    assert_near,
    assert_same_bits,
    clones,
    parameters,
    same_bits,
    train,
    weights,
)

SHAPES: list[Shape] = [(4, 4), (3, 3, 3)]


def build(name: str, start: str, **options: object) -> SecondOrderOptimizer:
    runtime = RuntimeConfig(start=start, refresh="sync")
    settings = {"precondition_frequency": PERIOD, "weight_decay": 0.0, "runtime": runtime}
    return OPTIMIZERS[name](parameters(SHAPES, torch.float64), **(settings | options))


def bases(optimizer: SecondOrderOptimizer) -> list[Tensor]:
    return [
        value.clone()
        for entries in optimizer.state.values()
        for key, value in entries.items()
        if key.startswith("basis")
    ]


def unlike_diagonal(optimizer: SecondOrderOptimizer) -> float:
    """Largest off-diagonal element of any factor in its eigenbasis, relative to its trace."""
    worst = 0.0
    for entries in optimizer.state.values():
        for key in entries:
            if key.startswith("factor"):
                q = entries[key.replace("factor", "basis")]
                rotated = q.mT @ entries[key] @ q
                rest = rotated - rotated.diagonal().diag()
                worst = max(worst, (rest.abs().max() / rotated.trace()).item())
    return worst


@over_optimizers
def test_fresh_starts_with_an_update_of_adams_size(name: str) -> None:
    """Every weight moves by the learning rate, and the bases fit the first gradient."""
    optimizer = build(name, "fresh", lr=0.25, eps=1e-30)
    params = optimizer.param_groups[0]["params"]
    start = weights(params)
    train(optimizer, [0])
    for index, p in enumerate(params):
        expected = start[str(index)] - 0.25 * p.grad.sign()
        torch.testing.assert_close(p.detach(), expected)
    assert unlike_diagonal(optimizer) < 1e-12


@pytest.mark.parametrize(
    ("period", "due"),
    [
        (100, [2, 3, 5, 8, 12, 18, 27]),
        (10, [2, 3, 5, 8, 10, 12, 18, 20, 27, 30, 40, 50]),
    ],
)
@over_optimizers
def test_fresh_refreshes_more_often_while_the_factors_are_young(
    name: str, period: int, due: list[int]
) -> None:
    optimizer = build(name, "fresh", precondition_frequency=period, shampoo_beta=0.8)
    refreshed = []
    train(optimizer, [0])
    for step in range(1, 60):
        before = bases(optimizer)
        train(optimizer, [step])
        after = bases(optimizer)
        if not all(map(same_bits, before, after)):
            refreshed.append(step)
    assert refreshed == due


@over_optimizers
def test_eigh_builds_the_bases_and_changes_no_weight(name: str) -> None:
    optimizer = build(name, "eigh", lr=0.25, weight_decay=0.5)
    params = optimizer.param_groups[0]["params"]
    start = weights(params)
    train(optimizer, [0])
    assert_same_bits(weights(params), start)
    assert unlike_diagonal(optimizer) < 1e-12
    for step in range(1, 3 * PERIOD + 1):
        before = bases(optimizer)
        train(optimizer, [step])
        assert all(map(same_bits, before, bases(optimizer))) == (step % PERIOD != 0)


@over_optimizers
def test_adam_keeps_identity_bases_until_an_exact_first_refresh(name: str) -> None:
    optimizer = build(name, "adam")
    for step in range(1, PERIOD):
        train(optimizer, [step])
        assert all(torch.equal(q, torch.eye(len(q), dtype=q.dtype)) for q in bases(optimizer))
    train(optimizer, [PERIOD])
    assert unlike_diagonal(optimizer) < TOLERANCES[SAME_MATH, torch.float64]


@pytest.mark.parametrize("name", ["SOAP", "KLSOAP"])
def test_adam_is_adam_until_then(name: str) -> None:
    """KL-SOAP's without bias correction, which a first step of its own size shows."""
    optimizer = build(name, "adam", lr=0.01, betas=(0.9, 0.95), eps=1e-30)
    params = optimizer.param_groups[0]["params"]
    start, theirs = weights(params), clones(params)
    adam = torch.optim.Adam(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-30)
    for step in range(1, PERIOD + 1):
        if name == "KLSOAP":
            adam.param_groups[0]["lr"] = 0.01 * (1 - 0.9**step) / (1 - 0.95**step) ** 0.5
        train(optimizer, [step])
        train(adam, [step])
    assert_near(weights(params), weights(theirs), ADAM, torch.float64, start)
