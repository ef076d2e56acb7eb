"""Memory layout is nobody's business: parameters and gradients of any strides give equal bits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.arms import Arm, over_arms
from tests.support.training import assert_same_bits, everything, gradient, parameters

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(4, 6), (3, 4, 2, 2), (4, 6), (2, 4, 3), (7,)]
Layout = Callable[[Tensor], Tensor]


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def strided(x: Tensor) -> Tensor:
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    every_second = wide[..., ::2]
    return every_second.copy_(x)


def offset(x: Tensor) -> Tensor:
    storage = torch.zeros(x.numel() + 3, dtype=x.dtype)
    return storage[3:].view(x.shape).copy_(x)


LAYOUTS = [transposed, channels_last, strided, offset]
over_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def run(arm: Arm, dtype: torch.dtype, *, weights: Layout, gradients: Layout) -> dict[str, Tensor]:
    """Everything after six steps, with weights and gradients laid out like this."""
    params = [nn.Parameter(weights(p.detach())) for p in parameters(SHAPES, dtype)]
    strides = [p.stride() for p in params]
    optimizer = arm(params, stochastic_rounding=True, weight_decay=0.1)
    for step in range(6):
        for index, p in enumerate(params):
            p.grad = gradients(gradient(tuple(p.shape), p.dtype, step, index))
        optimizer.step()
    assert [p.stride() for p in params] == strides
    return everything(optimizer)


def as_is(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_layouts
@over_arms
def test_layout_of_parameters_and_gradients(arm: Arm, layout: Layout, dtype: torch.dtype) -> None:
    expected = run(arm, dtype, weights=as_is, gradients=as_is)
    assert_same_bits(run(arm, dtype, weights=layout, gradients=as_is), expected)
    assert_same_bits(run(arm, dtype, weights=as_is, gradients=layout), expected)


@over_arms
def test_gradients_that_are_expanded(arm: Arm) -> None:
    """As (w * 2).sum() leaves them: one element behind all of them."""
    params, dense = parameters(SHAPES), parameters(SHAPES)
    optimizer, twin = arm(params), arm(dense)
    for step in range(6):
        for p, q in zip(params, dense, strict=True):
            p.grad = torch.tensor(float(step + 1)).expand(p.shape)
            q.grad = p.grad.contiguous()
        optimizer.step()
        twin.step()
        assert all(p.grad is not None and p.grad[..., 0].max() == step + 1 for p in params)
    assert_same_bits(everything(optimizer), everything(twin))


@over_arms
def test_autograds_own_expanded_gradients(arm: Arm) -> None:
    (p,) = parameters([(4, 4)])
    optimizer = arm([p])
    for _ in range(4):
        optimizer.zero_grad()
        p.sum().backward()
        optimizer.step()
    assert p.isfinite().all()


@over_arms
def test_one_gradient_shared_by_several_parameters(arm: Arm) -> None:
    shared, apart = parameters([(4, 4), (4, 4)]), parameters([(4, 4), (4, 4)])
    optimizer, twin = arm(shared), arm(apart)
    for step in range(6):
        grad = gradient((4, 4), torch.float32, step, 0)
        for p in shared:
            p.grad = grad
        for q in apart:
            q.grad = grad.clone()
        optimizer.step()
        twin.step()
    assert_same_bits(everything(optimizer), everything(twin))


@over_arms
def test_convolution_in_channels_last_keeps_its_format(arm: Arm) -> None:
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer = arm(model.parameters())
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.isfinite().all()
