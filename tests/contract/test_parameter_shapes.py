"""Parameters of any rank and size train: what is stacked, merged, cut or left to AdamW's rule."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asteria import ConfigError, RuntimeConfig
from tests.support.arms import Arm, over_alone_arms, over_arms
from tests.support.tolerances import ADAM
from tests.support.training import (
    Shape,
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

RULES = {"SOAP": "soap", "KLShampoo": "kl-shampoo", "KLSOAP": "kl-soap"}

# Shape -> sizes of the factors under SOAP, and under the Kullback-Leibler rules.
SHAPES: dict[Shape, tuple[Shape, Shape]] = {
    (): ((), ()),
    (1,): ((), ()),
    (7,): ((), ()),
    (1, 1): ((), ()),
    (5, 1): ((5,), ()),
    (1, 5): ((5,), ()),
    (1, 1, 1, 6): ((6,), ()),
    (4, 4): ((4, 4), (4, 4)),
    (9, 3): ((9, 3), (9, 3)),
    (1, 3, 4): ((3, 4), (3, 4)),
    (2, 3, 4): ((2, 3, 4), (2, 3, 4)),
    (4, 3, 3, 3): ((4, 3, 3, 3), (4, 3, 3, 3)),
    (2, 3, 2, 3, 2): ((2, 3, 2, 3, 2), (2, 3, 2, 3, 2)),
    (2, 32, 33): ((32, 33), (32, 33)),
    (0,): ((), ()),
    (0, 3): ((), ()),
    (2, 0, 3): ((), ()),
}
STEPS = 32


def factors_of(entries: dict[str, Tensor]) -> list[str]:
    return sorted(key for key in entries if key.startswith("factor"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@over_arms
def test_every_shape_trains(arm: Arm, shape: Shape) -> None:
    """Down a quadratic bowl, with the factors that this shape is to have."""
    (p,) = parameters([shape])
    optimizer = arm([{"params": [p], "batch_dims": None}], lr=0.1, weight_decay=0.0)
    target = gradient(shape, p.dtype, 77, 0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (p - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    factors = SHAPES[shape][arm.optimizer.__name__ != "SOAP"]
    entries = optimizer.state[p]
    assert len(factors_of(entries)) == len(factors)
    assert all(value.isfinite().all() for value in entries.values())
    assert entries["exp_avg"].numel() == p.numel()
    assert entries["step"] == STEPS - bool(arm.skips_first_update or factors)
    (row,) = optimizer.describe().rows
    assert row.rule == (RULES[arm.optimizer.__name__] if factors else "adamw")
    assert sum(row.factors, ()) == factors
    if p.numel():
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("shape", [(), (6,), (1, 1)], ids=str)
@over_arms
def test_scalars_and_vectors_follow_adam(arm: Arm, shape: Shape) -> None:
    start = parameters([shape], torch.float64)
    ours, theirs = clones(start), clones(start)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-30, "weight_decay": 0.0}
    optimizer, adam = arm(ours, **options), torch.optim.Adam(theirs, **options)
    if arm.skips_first_update:
        train(optimizer, [99])
        assert_same_bits(weights(ours), weights(start))
    train(optimizer, range(6))
    train(adam, range(6))
    assert_near(weights(ours), weights(theirs), ADAM, torch.float64, weights(start))


EXPERTS: dict[str, tuple[Shape, dict[str, Any], Shape]] = {
    "found out": ((3, 32, 33), {"batch_dims": None}, (32, 33)),
    "one dim": ((3, 5, 4), {"batch_dims": 1}, (5, 4)),
    "two dims": ((2, 3, 5, 4), {"batch_dims": 2}, (5, 4)),
    "of convolutions": ((3, 4, 2, 3), {"batch_dims": 1}, (4, 2, 3)),
    "one-sided": ((3, 5, 4), {"batch_dims": 1, "max_precond_dim": 4}, (5, 4)),
    "of vectors": ((3, 5), {"batch_dims": 1}, (5,)),
    "not a stack": ((2, 33, 32), {"batch_dims": 0}, (2, 33, 32)),
}


@pytest.mark.parametrize("kind", EXPERTS)
@over_alone_arms
def test_stack_of_experts_is_so_many_parameters(arm: Arm, kind: str) -> None:
    """Bit by bit: their blocks lie side by side either way."""
    shape, options, block = EXPERTS[kind]
    (stack,) = parameters([shape])
    apart = clones(stack.detach().reshape(-1, *block))
    limit = {key: value for key, value in options.items() if key == "max_precond_dim"}
    together, separate = arm([{"params": [stack], **options}]), arm(apart, **limit)
    if kind == "not a stack":
        assert len(factors_of(together.state_dict()["state"])) == 0
        separate = arm([{"params": apart, "batch_dims": 0}])
    for step in range(8):
        set_gradients([stack], step)
        assert stack.grad is not None
        for p, one in zip(apart, stack.grad.reshape(-1, *block), strict=True):
            p.grad = one
        together.step()
        separate.step()
    assert_same_bits(weights(stack.detach().reshape(-1, *block)), weights(apart))
    (row,) = together.describe().rows
    if len(block) > 1:
        assert row.blocks == ((len(apart), block),)


@over_arms
def test_stacks_are_found_by_their_shape_but_in_the_control_arm(arm: Arm) -> None:
    """The published code knows none. Small last two dims are a convolution's."""
    shapes: list[Shape] = [(3, 32, 32), (3, 31, 32), (3, 2, 32, 32)]
    rows = arm(parameters(shapes)).describe().rows
    found = [sum(count for count, _ in row.blocks) for row in rows]
    assert found == [1 if arm.runtime == RuntimeConfig.reference() else 3, 1, 1]


@over_arms
def test_too_many_batch_dims_are_refused(arm: Arm) -> None:
    with pytest.raises(ConfigError, match="batch_dims=2"):
        arm([{"params": parameters([(3, 4)]), "batch_dims": 2}])


TILINGS: dict[str, tuple[Shape, int, list[tuple[slice, ...]]]] = {
    "tall": ((12, 4), 4, [(slice(i, i + 4),) for i in (0, 4, 8)]),
    "wide": ((4, 8), 4, [(slice(None), slice(i, i + 4)) for i in (0, 4)]),
    "both": ((8, 8), 4, [(slice(i, i + 4), slice(j, j + 4)) for i in (0, 4) for j in (0, 4)]),
    "uneven": ((7, 4), 4, [(slice(0, 4),), (slice(4, 7),)]),
    "convolution": ((6, 3, 2, 2), 3, [(slice(0, 3),), (slice(3, 6),)]),
}


@pytest.mark.parametrize("kind", TILINGS)
@over_alone_arms
def test_blocks_are_so_many_parameters(arm: Arm, kind: str) -> None:
    """With large_dims="blocks", tiles of at most max_precond_dim train as they would apart."""
    shape, limit, tiles = TILINGS[kind]
    (whole,) = parameters([shape])
    apart = clones(whole[tile].contiguous() for tile in tiles)
    options = {"max_precond_dim": limit, "large_dims": "blocks"}
    together, separate = arm([whole], **options), arm(apart, **options)
    for step in range(8):
        set_gradients([whole], step)
        assert whole.grad is not None
        for p, tile in zip(apart, tiles, strict=True):
            p.grad = whole.grad[tile].contiguous()
        together.step()
        separate.step()
    assert_same_bits(weights(whole[tile] for tile in tiles), weights(apart))
    (row,) = together.describe().rows
    assert sum(count for count, _ in row.blocks) == len(tiles)
    assert max(max(sizes) for sizes in row.factors) <= limit
    assert row.state_bytes == sum(row.state_bytes for row in separate.describe().rows)


LARGE: dict[str, tuple[Shape, Shape]] = {
    "embedding": ((50, 4), (4,)),
    "head": ((4, 50), (4,)),
    "too large": ((50, 40), ()),
    "convolution": ((50, 4, 3, 3), (4, 3, 3)),
}


@pytest.mark.parametrize("kind", LARGE)
@over_arms
def test_large_dims_have_no_factor_when_one_sided(arm: Arm, kind: str) -> None:
    shape, factors = LARGE[kind]
    (p,) = parameters([shape])
    start = weights([p])
    optimizer = arm([p], max_precond_dim=10)
    train(optimizer, range(6))
    (row,) = optimizer.describe().rows
    assert sum(row.factors, ()) == factors
    squares = [value.numel() for key, value in optimizer.state[p].items() if "factor" in key]
    assert squares == [size**2 for size in factors]
    assert max(value.numel() for value in optimizer.state[p].values()) == p.numel()
    assert not same_bits(p, start["0"])
    assert p.isfinite().all()


@pytest.mark.parametrize("large_dims", ["one_sided", "blocks"])
@over_arms
def test_embedding_and_head_above_the_limit_learn(arm: Arm, large_dims: str) -> None:
    """Rows that a batch does not touch have gradients of zero."""
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 40, bias=False))
    optimizer = arm(model.parameters(), lr=0.02, max_precond_dim=16, large_dims=large_dims)
    losses = []
    for step in range(40):
        tokens = (torch.arange(12) + 5 * step) % 40
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 40)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@over_arms
def test_empty_parameters_among_others_change_nothing(arm: Arm) -> None:
    with_empty = parameters([(4, 4), (0, 3), (5,), (0,)])
    without = clones([with_empty[0], with_empty[2]])
    mixed, plain = arm(with_empty, normalize_grads=True), arm(without, normalize_grads=True)
    for step in range(5):
        set_gradients(with_empty, step)
        for p, q in zip(without, (with_empty[0], with_empty[2]), strict=True):
            p.grad = q.grad
        mixed.step()
        plain.step()
    assert_same_bits(weights([with_empty[0], with_empty[2]]), weights(without))
    again = arm(clones(with_empty))
    again.load_state_dict(mixed.state_dict())
    assert_same_bits(everything(again), everything(mixed))
